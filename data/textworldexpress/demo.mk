# The demo: two games that an agent of this size can learn, SmolLM2-135M as planner and agent. They
# were chosen on validation tasks (../EXPERIMENTS.md).
# said at the end
DEMO_NOTE := this demo only exercises the pipeline: it is too small to tell MPO from SFT. The default \
  demo (make demo) shows the gain, make evidence measures it, in ScienceWorld and ALFWorld.
M := 4
N := 1
PROMPTS := brief
ENV_ARGS := --types twc peckingorder --observation_chars 300 --workers 2
SEED_PLANS_ARGS := --limit 60 --plan_share 0.95
AGENT_SFT_ARGS := --lr 3e-4 --epochs 2 --warmup_ratio 0.05
SFT_ARGS := --lr 2e-4 --epochs 3 --warmup_ratio 0.05
SERVE := --max_steps 14 --max_model_len 2048 --agent_tokens 24 --concurrency 48
SCORE_ARGS := --limit 24 --plan_temperature 1.0 --plan_tokens 160 $(SERVE)
DPO_ARGS := --beta 0.1 --lr 1e-4 --warmup_ratio 0.1 --epochs 3 --nll 1.0
EXPLORE_ARGS := $(SERVE)
ETO_ARGS := --beta 0.1 --lr 5e-5 --warmup_ratio 0.1 --epochs 3
EVAL_ARGS := --limit 12 --plan_tokens 160 $(SERVE)
