# `make evidence ENV=NAME`: does MPO beat its own SFT planner? One agent, then for each of SEEDS all
# stages and the test tasks. Nothing is held back: all seed plans, full training. The settings are in
# data/NAME/evidence.mk. It resumes. The seeds share one file of episodes: the agent is greedy, so a
# plan that several seeds have for a task is played once.
# DEV=1 plays validation tasks, by which settings are chosen: train tasks that neither agent nor
# planner has seen.
SEEDS ?= 0 1 2
EVIDENCE := runs/evidence-$(ENV)

evidence: | .venv/ready
	$(if $(wildcard data/$(ENV)/evidence.mk),,$(error data/$(ENV)/evidence.mk is missing))
	$(MAKE) agent-sft DEMO=evidence RUN=evidence-$(ENV)/base
# make runs a command that starts make also with -n: so what changes files is not in it
	for seed in $(SEEDS); do \
	  run=$(EVIDENCE)/seed$$seed; \
	  mkdir -p $$run/eval; \
	  ln -sf ../base/trajectories.jsonl $$run; \
	  ln -sf ../../episodes.jsonl $$run/eval/rollouts.jsonl; \
	  rm -f $$run/eval/done; \
	done
	for seed in $(SEEDS); do \
	  $(MAKE) all DEMO=evidence RUN=evidence-$(ENV)/seed$$seed SEED=$$seed DEV=$(DEV) \
	    AGENT=$(EVIDENCE)/base/agent AGENT_SFT_ARGS= || exit; \
	done
	$(VENV) python -m data.tools.evidence --runs $(SEEDS:%=$(EVIDENCE)/seed%) \
	  $(if $(DEV),,--to data/$(ENV)/evidence.csv)

# The lower half of the paper's table 2, in small: the untrained agent and those of agents.mk, without
# a plan and with the plans of seed 0's MPO planner. They are trained in base/. Run it after evidence.
evidence-table2: | .venv/ready
	$(MAKE) agent-eto agent-knowagent DEMO=evidence RUN=evidence-$(ENV)/base
	$(MAKE) table2 DEMO=evidence RUN=evidence-$(ENV)/seed0 AGENT_SFT_ARGS= DEV=$(DEV) \
	  AGENTS_RUN=$(EVIDENCE)/base KNOWAGENT_PLANS="none mpo"

# A new task type, WITHOUT: seed 0's planner, but no plan was sampled for the tasks of this type
evidence-without: | .venv/ready
	$(if $(WITHOUT),,$(error evidence-without needs WITHOUT=TYPE, a task type))
	run=$(EVIDENCE)/without-$(WITHOUT); \
	mkdir -p $$run/eval; \
	ln -sfn ../seed0/sft $$run/sft; \
	ln -sf ../seed0/seed_plans.jsonl ../seed0/trajectories.jsonl $$run; \
	ln -sf ../../episodes.jsonl $$run/eval/rollouts.jsonl; \
	rm -f $$run/eval/done
	$(MAKE) all DEMO=evidence RUN=evidence-$(ENV)/without-$(WITHOUT) WITHOUT=$(WITHOUT) \
	  AGENT=$(EVIDENCE)/base/agent AGENT_SFT_ARGS= DEV=$(DEV)

# the README's picture, from the rows of all environments
evidence-picture: | .venv/ready
	$(VENV) python -m data.tools.evidence --picture data/report/evidence.png
