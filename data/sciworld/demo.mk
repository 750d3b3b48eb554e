# The demo: two task types, SmolLM2-135M as planner and agent; evidence.mk, smaller. Types and the
# share of concrete plans were chosen on validation tasks (../EXPERIMENTS.md).
M := 4
N := 1
PROMPTS := brief
# three of four seed plans are concrete, which is their fault: env.py
export SCIWORLD_CONCRETE := 3
PLANS := none sft per_type_adapted mpo oracle
ENV_ARGS := --types find-animal find-living-thing --observation_chars 400 --workers 2
SEED_PLANS_ARGS := --limit 90 --plan_share 0.95
AGENT_SFT_ARGS := --lr 3e-4 --epochs 2 --warmup_ratio 0.05
SFT_ARGS := --lr 2e-4 --epochs 3 --warmup_ratio 0.05
SERVE := --max_model_len 2048 --agent_tokens 32 --concurrency 48
SCORE_ARGS := --limit 42 --plan_temperature 1.0 --plan_tokens 160 $(SERVE)
DPO_ARGS := --beta 0.1 --lr 1e-4 --warmup_ratio 0.1 --epochs 3 --nll 1.0
EXPLORE_ARGS := $(SERVE)
ETO_ARGS := --beta 0.1 --lr 5e-5 --warmup_ratio 0.1 --epochs 3
EVAL_ARGS := --limit 24 --plan_tokens 160 $(SERVE)
