# The demo: three task types, SmolLM2-135M as planner and agent; evidence.mk, smaller.
# said at the end
DEMO_NOTE := this demo only exercises the pipeline: it is too small to tell MPO from SFT. The default \
  demo (make demo) shows the gain, make evidence measures it, in ScienceWorld and ALFWorld.
M := 4
N := 1
PROMPTS := brief
ENV_ARGS := --types pick_and_place_simple pick_clean_then_place_in_recep \
  pick_cool_then_place_in_recep --observation_chars 400 --workers 2
SEED_PLANS_ARGS := --limit 100 --plan_share 0.95
AGENT_SFT_ARGS := --lr 3e-4 --epochs 2 --warmup_ratio 0.05
SFT_ARGS := --lr 2e-4 --epochs 3 --warmup_ratio 0.05
SERVE := --max_steps 20 --max_model_len 3072 --agent_tokens 32 --concurrency 48
SCORE_ARGS := --limit 40 --plan_temperature 1.0 --plan_tokens 160 $(SERVE)
DPO_ARGS := --beta 0.1 --lr 2e-5 --warmup_ratio 0.1 --epochs 3 --nll 1.0
EXPLORE_ARGS := $(SERVE)
ETO_ARGS := --beta 0.1 --lr 5e-5 --warmup_ratio 0.1 --epochs 2 --limit 64
EVAL_ARGS := --limit 24 --plan_tokens 160 $(SERVE)
