# The demo: SmolLM2-135M as planner and agent, on the products in WEBSHOP_DATA.
# said at the end
DEMO_NOTE := this demo only exercises the pipeline: it is too small to tell MPO from SFT. The default \
  demo (make demo) shows the gain, make evidence measures it, in ScienceWorld and ALFWorld.
M := 4
N := 1
PROMPTS := brief
ENV_ARGS := --observation_chars 800 --workers 2
SEED_PLANS_ARGS := --limit 40 --plan_share 0.9
AGENT_SFT_ARGS := --lr 3e-4 --epochs 2 --warmup_ratio 0.05
TRAIN_ARGS += --max_length 4096
SFT_ARGS := --lr 2e-4 --epochs 3 --warmup_ratio 0.05
SERVE := --max_steps 10 --max_model_len 4096 --agent_tokens 32 --concurrency 32
SCORE_ARGS := --limit 32 --plan_temperature 1.0 --plan_tokens 128 $(SERVE)
DPO_ARGS := --beta 0.1 --lr 2e-5 --warmup_ratio 0.1 --epochs 3
EXPLORE_ARGS := $(SERVE)
ETO_ARGS := --beta 0.1 --lr 2e-5 --warmup_ratio 0.1 --epochs 3
EVAL_ARGS := --limit 48 --plan_tokens 128 $(SERVE)
