# The evidence: three task types, SmolLM2-135M as planner and agent. DPO's terms were compared on
# validation tasks (../EXPERIMENTS.md); the agent's settings are first guesses.
M := 5
N := 2
PROMPTS := brief
PLANS := none mismatched sft per_type per_type_adapted mpo oracle
TYPES := pick_and_place_simple pick_clean_then_place_in_recep pick_cool_then_place_in_recep
ENV_ARGS := --types $(TYPES) --observation_chars 400 --workers 2
SEED_PLANS_ARGS := --limit $(if $(filter %/base,$(RUN)),180 --plan_share 0.95,120)
AGENT_SFT_ARGS := --lr 3e-4 --epochs 2 --warmup_ratio 0.05
SFT_ARGS := --lr 2e-4 --epochs 3 --warmup_ratio 0.05
SERVE := --max_steps 20 --max_model_len 3072 --agent_tokens 32 --concurrency 48
SCORE_ARGS := --adaptive true --limit 120 --plan_temperature 1.0 --agent_temperature 0.7 \
  --plan_tokens 160 $(SERVE) $(if $(WITHOUT),--types $(filter-out $(WITHOUT),$(TYPES)))
DPO_ARGS := --beta 0.1 --lr 2e-5 --warmup_ratio 0.1 --epochs 3 --nll 1.0
EVAL_ARGS := --plan_tokens 160 $(SERVE) $(if $(DEV),--splits train --skip 180 --limit 120) \
  $(if $(WITHOUT),--types $(WITHOUT))
