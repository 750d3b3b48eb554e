# Agents with training (table 2), as in the line of work that the paper follows: `make agent-sft`,
# `agent-eto`, `agent-knowagent`, `agent-wkm`. ETO has a first round and next ones; ETO_ARGS is for all.
AGENT_ARGS ?= --batch_size 48 --lr 2e-5 --lr_scheduler cosine --warmup_ratio 0.03 --epochs 3
ETO_ROUNDS ?= 3
ETO_FIRST ?= --beta 0.1 --lr 1e-6
ETO_NEXT ?= --beta 0.5 --lr 5e-7
ETO_ARGS ?= --batch_size 32 --lr_scheduler constant --warmup_ratio 0.1 --epochs 3
AGENT_SFT = $(or $(AGENT_SFT_ARGS),$(AGENT_ARGS))
EXPLORE = $(BIN) python 03_sample_score.py explore $(COMMON) --experts $(R)/trajectories.jsonl \
  --seed $(SEED) $(EXPLORE_ARGS)

.PHONY: agent-sft agent-eto agent-knowagent agent-wkm
agent-sft: $(R)/agent/config.json
agent-eto: $(R)/agent-eto$(ETO_ROUNDS)/config.json
agent-knowagent: $(R)/agent-knowagent/config.json
agent-wkm: $(R)/agent-wkm/config.json $(R)/wkm/config.json

$(foreach n,1 2 3 4 5,$(eval $(call ROUND,agent-eto$n,agent$(addprefix -eto,$(call before,0,$n)),eto$n,\
  $$(EXPLORE) --agent,$(if $(filter 1,$n),$$(ETO_FIRST),$$(ETO_NEXT)) $$(ETO_ARGS))))

# KnowAgent: the prompt says what each action needs and does; the agent learns from its successes
$(R)/knowagent/won.jsonl: 03_sample_score.py $(R)/agent/config.json | .venv/ready
	$(EXPLORE) --prompts knowagent --out $(R)/knowagent --agent $(R)/agent
$(R)/agent-knowagent/config.json: 02_sft.py $(R)/knowagent/won.jsonl
	$(SFT) --model $(R)/agent --data $(R)/knowagent/won.jsonl --out $(@D) $(AGENT_SFT)

# WKM: the teacher compares the expert's trajectories with the agent's failures; one model learns to
# write such task knowledge, the agent learns to act with it in its prompt
$(R)/wkm-seed/seed_plans.jsonl: 01_seed_plans.py $(R)/eto1/pairs.jsonl | .venv/ready
	$(SEED_PLANS) --prompts wkm --out $(R)/wkm-seed --explored $(R)/eto1/explore.jsonl --plan_share 1
$(R)/wkm/config.json: 02_sft.py $(R)/wkm-seed/seed_plans.jsonl
	$(SFT) --model $(PLANNER) --data $(R)/wkm-seed/seed_plans.jsonl --out $(@D) $(SFT_ARGS)
$(R)/agent-wkm/config.json: 02_sft.py $(R)/wkm-seed/seed_plans.jsonl
	$(SFT) --model $(AGENT) --data $(R)/wkm-seed/agent_sft.jsonl --out $(@D) $(AGENT_SFT)

# tables 2 and 6 list every agent that exists, these two with their own prompts
OWN_PROMPTS = $(wildcard $(patsubst %,$(R)/agent-%/config.json,knowagent wkm))
table2 table6: private AGENTS = $(AGENT) $(patsubst %/config.json,%,$(filter-out $(OWN_PROMPTS),\
  $(wildcard $(R)/agent/config.json $(R)/agent-*/config.json)))
# a recipe line for each, as make check reads one command a line
define NEWLINE


endef
PLAY_OTHERS = $(foreach a,$(OWN_PROMPTS:$(R)/agent-%/config.json=%),$(EVALUATE) --prompts $a \
  --agents $(R)/agent-$a --plans $(if $(filter wkm,$a),wkm,none)$(NEWLINE))
