# `make all ENV="a b"`: one planner for several environments (the paper's second limitation). Each
# environment has its own settings, seed plans, agent, rollouts and evaluation in runs/$(RUN)/NAME.
# The planner has the settings of the first one, and learns from the seed plans and the pairs of all.
# The tables of all are in the first one's folder pooled/.

PLANNER_OF_ALL = $(MAKE) ENV=$(firstword $(ENV)) RUN=$(RUN) AGENT_SFT_ARGS=
SEED_PLANS_OF_ALL := $(ENV:%=$(R)/%/seed_plans.jsonl)
PAIRS_OF_ALL := $(ENV:%=$(R)/%/pairs.jsonl)

.PHONY: all demo check seed sft score dpo eval tasks
demo:
	$(MAKE) all DEMO=1
all: eval
	$(VENV) python 05_eval.py report --out $(ENV:%=$(R)/%)
check:
	for env in $(ENV); do $(MAKE) ENV=$$env RUN=$(RUN)/$$env check || exit; done

# a joined file is as old as the newest of its parts: what is unchanged is not trained on again
seed: check
	for env in $(ENV); do $(MAKE) ENV=$$env RUN=$(RUN)/$$env seed || exit; done
	cat $(SEED_PLANS_OF_ALL) > $(R)/seed_plans.jsonl
	touch -r $$(ls -t $(SEED_PLANS_OF_ALL) | head -1) $(R)/seed_plans.jsonl
sft: seed
	$(PLANNER_OF_ALL) sft
	for env in $(ENV); do ln -sfn ../sft $(R)/$$env/sft; done
score: sft
	for env in $(ENV); do $(MAKE) ENV=$$env RUN=$(RUN)/$$env score || exit; done
	cat $(PAIRS_OF_ALL) > $(R)/pairs.jsonl
	touch -r $$(ls -t $(PAIRS_OF_ALL) | head -1) $(R)/pairs.jsonl
dpo: score
	$(PLANNER_OF_ALL) dpo
	for env in $(ENV); do ln -sfn ../mpo $(R)/$$env/mpo; done
eval: dpo
	for env in $(ENV); do $(MAKE) ENV=$$env RUN=$(RUN)/$$env eval || exit; done
tasks:
	for env in $(ENV); do $(MAKE) ENV=$$env tasks || exit; done
