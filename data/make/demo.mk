# `make demo` and `make evidence`: SmolLM2-135M for everything; data/NAME/demo.mk and evidence.mk
# have the settings of an environment
MODEL := models/SmolLM2-135M-Instruct
MODEL_FILES := $(MODEL)/config.json
PLANNER := $(MODEL)
AGENT := $(MODEL)
TEACHER := rules
JUDGE := $(MODEL)
JUDGE_ARGS := --tokens 300 --max_model_len 4096
TRAIN_ARGS := --batch_size 8 --micro_tokens 2048 --max_length 2048 --save_steps 20
ETO_ROUNDS := 1
PLANS := none mismatched sft mpo oracle
include data/$(ENV)/$(if $(filter evidence,$(DEMO)),evidence,demo).mk
