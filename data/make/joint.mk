# `make all ENV="a b"`: one planner for several environments (the paper's second limitation). Each has
# its own settings, seed plans, agent, rollouts and evaluation in runs/$(RUN)/NAME; the planner, with
# the settings of the first, learns from the seed plans and the pairs of all. The tables of all are in the
# first one's folder pooled/.
EACH = for env in $(ENV); do $(MAKE) ENV=$$env RUN=$(RUN)/$$env
PLANNER_OF_ALL = $(MAKE) ENV=$(firstword $(ENV)) FILTER= RUN=$(RUN) AGENT_SFT_ARGS=
PARTS = $(ENV:%=runs/$(RUN)/%/$(1))
# the rows of all, as old as the newest of their files
JOIN = cat $(PARTS) > runs/$(RUN)/$(2) && touch -r $$(ls -t $(PARTS) | head -1) runs/$(RUN)/$(2)
SHARE = for env in $(ENV); do ln -sfn ../$(1) runs/$(RUN)/$$env/$(1); done

.PHONY: all stages demo check seed sft score dpo eval
demo: ; $(MAKE) all DEMO=1
all stages: check eval
	. .venv/bin/activate && python 05_eval.py report --out $(ENV:%=runs/$(RUN)/%)
check:
	$(EACH) check; done
seed: | check
	$(EACH) seed; done
	$(call JOIN,$(if $(FILTER),filtered,seed)_plans.jsonl,seed_plans.jsonl)
sft: seed
	$(PLANNER_OF_ALL) sft
	$(call SHARE,sft)
score: sft
	$(EACH) score; done
	$(call JOIN,pairs.jsonl,pairs.jsonl)
dpo: score
	$(PLANNER_OF_ALL) dpo
	$(call SHARE,mpo)
eval: dpo
	$(EACH) eval; done
