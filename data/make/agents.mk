# The fine-tuned agents of table 2, as in the line of work that the paper follows: `make agent-sft`,
# `agent-eto`, `agent-knowagent`, `agent-wkm`.

# SFT on the expert's trajectories; the thoughts before the expert's actions are the teacher's
AGENT_ARGS ?= --batch_size 48 --lr 2e-5 --lr_scheduler cosine --warmup_ratio 0.03 --epochs 3
AGENT_SFT = $(SFT) $(or $(AGENT_SFT_ARGS),$(AGENT_ARGS))
# ETO (Song et al. 2024): one to three rounds; ETO_ARGS are of all rounds
ETO_ROUNDS ?= 3
ETO_ARGS ?= --batch_size 32 --lr_scheduler constant --warmup_ratio 0.1 --epochs 3
ETO_FIRST ?= --beta 0.1 --lr 1e-6
ETO_NEXT ?= --beta 0.5 --lr 5e-7
ifeq ($(filter $(ETO_ROUNDS),1 2 3),)
$(error ETO_ROUNDS=$(ETO_ROUNDS) must be 1, 2 or 3)
endif

# KnowAgent's prompt folder, and the plans that table 2 gives that agent
KNOWAGENT ?= knowagent
KNOWAGENT_PLANS ?= none

agent-sft: $(R)/agent/config.json
agent-eto: $(R)/agent-eto$(ETO_ROUNDS)/config.json
agent-knowagent: $(R)/agent-knowagent/config.json
agent-wkm: $(R)/agent-wkm/config.json $(R)/wkm/config.json

# The stage writes seed_plans.jsonl again, with the same rows. The file keeps its time, so that the
# planner is not trained again.
$(R)/thoughts.done: $(R)/seed_plans.jsonl
	$(TOUCH) -r $(R)/seed_plans.jsonl $(R)/seed_plans.time
	$(SEED_PLANS) --out $(R) --thoughts true
	$(TOUCH) -r $(R)/seed_plans.time $(R)/seed_plans.jsonl
	$(TOUCH) $@

# the rules teacher has no thoughts
$(R)/agent/config.json: 02_sft.py $(R)/seed_plans.jsonl $(MODEL_FILES) \
  $(if $(filter-out rules,$(TEACHER)),$(R)/thoughts.done) | .venv/ready
	$(AGENT_SFT) --model $(AGENT) --data $(R)/agent_sft.jsonl --out $(@D)
	$(CURVES) $(@D)

# ---- ETO: the agent explores, DPO prefers the expert's trajectories to the agent's failures ------

$(R)/eto1/pairs.jsonl: 03_sample_score.py $(AGENT_PROMPT) $(R)/agent/config.json
	$(EXPLORE) --agent $(R)/agent --out $(@D)
$(R)/agent-eto1/config.json: 04_dpo.py $(R)/eto1/pairs.jsonl
	$(DPO) --model $(R)/agent --data $(R)/eto1/pairs.jsonl --out $(@D) $(ETO_FIRST) $(ETO_ARGS)
	$(CURVES) $(@D)

$(R)/eto2/pairs.jsonl: 03_sample_score.py $(AGENT_PROMPT) $(R)/agent-eto1/config.json
	$(EXPLORE) --agent $(R)/agent-eto1 --out $(@D)
$(R)/agent-eto2/config.json: 04_dpo.py $(R)/eto2/pairs.jsonl
	$(DPO) --model $(R)/agent-eto1 --data $(R)/eto2/pairs.jsonl --out $(@D) $(ETO_NEXT) $(ETO_ARGS)
	$(CURVES) $(@D)

$(R)/eto3/pairs.jsonl: 03_sample_score.py $(AGENT_PROMPT) $(R)/agent-eto2/config.json
	$(EXPLORE) --agent $(R)/agent-eto2 --out $(@D)
$(R)/agent-eto3/config.json: 04_dpo.py $(R)/eto3/pairs.jsonl
	$(DPO) --model $(R)/agent-eto2 --data $(R)/eto3/pairs.jsonl --out $(@D) $(ETO_NEXT) $(ETO_ARGS)
	$(CURVES) $(@D)

# ---- KnowAgent: the prompt says what each action needs and does; the agent learns from its successes

$(R)/knowagent/won.jsonl: 03_sample_score.py $(AGENT_PROMPT) $(R)/agent/config.json
	$(EXPLORE) --prompts $(KNOWAGENT) --agent $(R)/agent --out $(@D)
$(R)/agent-knowagent/config.json: 02_sft.py $(R)/knowagent/won.jsonl
	$(AGENT_SFT) --model $(R)/agent --data $(R)/knowagent/won.jsonl --out $(@D)
	$(CURVES) $(@D)

# ---- WKM: the teacher compares the expert's trajectories with the agent's failures. One model learns
# to write such task knowledge, the agent learns to act with it in its prompt. The trajectories and
# their thoughts are the run's. --------------------------------------------------------------------

$(R)/wkm-seed/seed_plans.jsonl: 01_seed_plans.py $(R)/eto1/pairs.jsonl $(R)/thoughts.done
	for file in $(if $(EXPERT),,trajectories.jsonl) thoughts.jsonl; do \
	  if [ -e $(R)/$$file ]; then $(COPY) $(@D) $(R)/$$file; fi; done
	$(SEED_PLANS) --prompts wkm --out $(@D) \
	  --explored $(R)/eto1/explore.jsonl --plan_share 1 --thoughts true \
	  $(if $(EXPERT),--expert $(R)/trajectories.jsonl)
$(R)/wkm/config.json: 02_sft.py $(R)/wkm-seed/seed_plans.jsonl
	$(SFT) --model $(PLANNER) --data $(R)/wkm-seed/seed_plans.jsonl --out $(@D) $(SFT_ARGS)
	$(CURVES) $(@D)
$(R)/agent-wkm/config.json: 02_sft.py $(R)/wkm-seed/seed_plans.jsonl
	$(AGENT_SFT) --model $(AGENT) --data $(R)/wkm-seed/agent_sft.jsonl --out $(@D)
	$(CURVES) $(@D)

# ---- tables 2 and 6: AGENTS, or every agent that the run has. KnowAgent and WKM have prompts of
# their own. ---------------------------------------------------------------------------------------

# the run folder that has the fine-tuned agents
AGENTS_RUN ?= $(R)
# those, if no AGENTS were given; of ETO's rounds the last that is there
AGENTS_THERE = $(patsubst %/config.json,%,$(wildcard \
  $(AGENTS_RUN)/agent/config.json $(AGENTS_RUN)/agent-*/config.json))
ETO_THERE = $(sort $(filter %/agent-eto1 %/agent-eto2 %/agent-eto3,$(AGENTS_THERE)))
AGENTS_HERE = $(filter-out %/agent-knowagent %/agent-wkm $(ETO_THERE),$(AGENTS_THERE)) $(lastword $(ETO_THERE))
table2 table6: $(R)/eval/done
	$(EVALUATE) --agents $(if $(filter file,$(origin AGENTS)),$(AGENT) $(AGENTS_HERE),$(AGENTS)) \
	  --plans none mpo
	if [ -e $(AGENTS_RUN)/agent-knowagent/config.json ]; then \
	  $(EVALUATE) --prompts $(KNOWAGENT) --agents $(AGENTS_RUN)/agent-knowagent --plans $(KNOWAGENT_PLANS); fi
	if [ -e $(AGENTS_RUN)/agent-wkm/config.json ]; then \
	  $(EVALUATE) --prompts wkm --agents $(AGENTS_RUN)/agent-wkm --plans wkm; fi
