# The demo: two task types, SmolLM2-135M as planner and agent.
M := 4
N := 1
ENV_ARGS := --types pick_and_place_simple look_at_obj_in_light --prompts brief \
  --observation_chars 400 --workers 2
SEED_PLANS_ARGS := --limit 160 --plan_share 0.9
AGENT_SFT_ARGS := --lr 3e-4 --epochs 2 --warmup_ratio 0.05
SFT_ARGS := --lr 2e-4 --epochs 2 --warmup_ratio 0.05 --limit 100
SERVE := --max_steps 20 --max_model_len 3072 --agent_tokens 32 --concurrency 32
SCORE_ARGS := --limit 48 --plan_tokens 128 $(SERVE)
DPO_ARGS := --beta 0.1 --lr 2e-5 --warmup_ratio 0.1 --epochs 3
EXPLORE_ARGS := $(SERVE)
ETO_ARGS := --beta 0.1 --lr 5e-5 --warmup_ratio 0.1 --epochs 2 --limit 64
EVAL_ARGS := --limit 24 --plan_tokens 128 $(SERVE)
