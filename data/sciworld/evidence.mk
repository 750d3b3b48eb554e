# The evidence: four short task types, SmolLM2-135M as planner and agent, 20 test tasks of a type and
# split. Types and DPO's settings were chosen on validation tasks (../EXPERIMENTS.md), the others are guesses.
M := 5
N := 2
PROMPTS := brief
PLANS := none mismatched sft per_type per_type_adapted mpo oracle
TYPES := find-animal find-living-thing find-plant find-non-living-thing
ENV_ARGS := --types $(TYPES) --observation_chars 400 --workers 2
SEED_PLANS_ARGS := --limit $(if $(filter %/base,$(RUN)),240 --plan_share 0.95,120)
AGENT_SFT_ARGS := --lr 3e-4 --epochs 2 --warmup_ratio 0.05
SFT_ARGS := --lr 2e-4 --epochs 3 --warmup_ratio 0.05
SERVE := --max_model_len 2048 --agent_tokens 32 --concurrency 48
SCORE_ARGS := --adaptive true --limit 120 --plan_temperature 1.0 --agent_temperature 0.7 \
  --plan_tokens 160 $(SERVE) $(if $(WITHOUT),--types $(filter-out $(WITHOUT),$(TYPES)))
DPO_ARGS := --beta 0.1 --lr 1e-4 --warmup_ratio 0.1 --epochs 3 --nll 1.0
EVAL_ARGS := --plan_tokens 160 $(SERVE) $(if $(DEV),--splits train --skip 240 --limit 120,\
  --tasks seen=data/sciworld/evidence/dev.json unseen=data/sciworld/evidence/test.json) \
  $(if $(WITHOUT),--types $(WITHOUT))
# The agents of evidence-table2: first guesses, looked at on validation tasks (../EXPERIMENTS.md)
ETO_ROUNDS := 3
EXPLORE_ARGS := $(SERVE)
ETO_ARGS := --warmup_ratio 0.1 --epochs 1
ETO_FIRST := --beta 0.1 --lr 2e-5
ETO_NEXT := --beta 0.5 --lr 1e-5
KNOWAGENT := knowagent-brief
