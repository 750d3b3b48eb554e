# `make evidence ENV=NAME`: does MPO beat its own SFT planner? One agent, then for each of SEEDS all
# stages and the test tasks; nothing is held back. Settings: data/NAME/evidence.mk. It resumes;
# stage 5 plays what is missing, once for all seeds with the same plan (the agent is greedy).
# DEV=1 plays validation tasks, by which settings are chosen: train tasks that neither agent nor
# planner has seen.
SEEDS ?= 0 1 2
EVIDENCE := runs/evidence-$(ENV)
ONE = $(MAKE) DEMO=evidence AGENT=$(EVIDENCE)/base/agent AGENT_SFT_ARGS= DEV=$(DEV)

.PHONY: evidence
evidence: | .venv/ready
	$(if $(wildcard data/$(ENV)/evidence.mk),,$(error data/$(ENV)/evidence.mk is missing))
	@$(MAKE) agent-sft DEMO=evidence RUN=evidence-$(ENV)/base
	for seed in $(SEEDS); do mkdir -p $(EVIDENCE)/seed$$seed/eval; \
	  ln -sf ../base/trajectories.jsonl $(EVIDENCE)/seed$$seed; \
	  ln -sf ../../episodes.jsonl $(EVIDENCE)/seed$$seed/eval/rollouts.jsonl; \
	  rm -f $(EVIDENCE)/seed$$seed/eval/done; \
	  $(ONE) stages RUN=evidence-$(ENV)/seed$$seed SEED=$$seed; done
	$(BIN) python -m data.tools.evidence $(if $(DEV),,--to data/$(ENV)/evidence.json) \
	  --runs $(SEEDS:%=$(EVIDENCE)/seed%)
