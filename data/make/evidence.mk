# `make evidence ENV=NAME`: does MPO beat its own SFT planner? One agent, then for each of SEEDS all
# stages and the test tasks. Nothing is held back: all seed plans, full training. The settings are in
# data/NAME/evidence.mk. It resumes. The seeds share one file of episodes: the agent is greedy, so a
# plan that several seeds have for a task is played once. The rows are in evidence.csv of the run
# folder; those of the README's table are data/NAME/evidence.csv.
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
	  $(if $(DEV),,--to $(EVIDENCE)/evidence.csv)

# The lower half of the paper's table 2, in small: the untrained agent and those of agents.mk, without
# a plan and with the plans of seed 0's MPO planner. They are trained in base/. Run it after evidence.
evidence-table2: | .venv/ready
	$(if $(shell grep -s ^ETO_FIRST data/$(ENV)/evidence.mk),,$(error data/$(ENV)/evidence.mk has no \
	  settings of these agents (ETO_FIRST ...); with them: $(patsubst data/%/evidence.mk,%,$(shell \
	  grep -ls ^ETO_FIRST data/*/evidence.mk))))
	$(MAKE) agent-eto agent-knowagent DEMO=evidence RUN=evidence-$(ENV)/base
	$(MAKE) table2 DEMO=evidence RUN=evidence-$(ENV)/seed0 AGENT_SFT_ARGS= DEV=$(DEV) \
	  AGENTS_RUN=$(EVIDENCE)/base KNOWAGENT_PLANS="none mpo"

# A task type, WITHOUT, that seed 0's planner knows from SFT only: no plan was sampled for its tasks, so
# DPO has no pair of them
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
