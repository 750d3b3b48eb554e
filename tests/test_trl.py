"""The same numbers as TRL: same weights, batches and hyper-parameters, in float32, 20 optimizer
steps."""

import itertools

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import make_tokenizer, save_model, stage, write_jsonl
from safetensors.torch import load_file

import common

pytestmark = pytest.mark.slow
sft, dpo = stage("02_sft"), stage("04_dpo")
# nothing follows the end token: TRL would train on ChatML's newline there, we stop at the end token
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "go to the kitchen focus on a plant look around wait take cup open door mix paint"
WORDS = TEXT.split()
STEPS = 20
BATCH = 4
LR = 1e-3


def text(*key, longest: int) -> str:
    n = 3 + common.seed_of(*key) % longest
    return " ".join(WORDS[common.seed_of(*key, i) % len(WORDS)] for i in range(n))


def said(role: str, *key, longest: int) -> list[dict]:
    return [{"role": role, "content": text(*key, longest=longest)}]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    tokenizer = make_tokenizer(TEMPLATE)
    return str(save_model(tmp_path_factory.mktemp("base"), tokenizer, tie_word_embeddings=False))


def recorded_training(module, args, monkeypatch) -> list[dict]:
    """Run a stage; the clipped gradients of each optimizer step."""
    steps = []
    clip = common.clip_gradients

    def record(model, limit):
        norm = clip(model, limit)
        steps.append({k: p.grad.full_tensor().clone() for k, p in model.named_parameters()})
        return norm

    monkeypatch.setattr(common, "clip_gradients", record)
    module.main(args)
    AcceleratorState._reset_state(True)
    return steps


def compare(trainer_class, config, rows, base, out, ours: list[dict], **more) -> None:
    """Train with TRL on `rows` in their order: losses, norms, gradients and final weights must be
    ours to 1e-4."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    steps = []

    class Record(TrainerCallback):
        def on_pre_optimizer_step(self, *_, model, **__):
            steps.append({k: p.grad.clone() for k, p in model.named_parameters()})

    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(base),
        args=config,
        callbacks=[Record()],
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        **more,
    )
    trainer.train()
    theirs = [row for row in trainer.state.log_history if "loss" in row]
    mine = common.read_rows(out / "metrics.jsonl")
    assert len(steps) == len(ours) == len(mine) == len(theirs) == STEPS
    for a, b in zip(mine, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["grad_norm"] == pytest.approx(float(b["grad_norm"]), rel=1e-4, abs=1e-4)
        assert a["lr"] == pytest.approx(b["learning_rate"], rel=1e-4)
    for a, b in zip(ours, steps, strict=True):
        assert a.keys() == b.keys() and any(g.abs().max() > 1e-2 for g in b.values())
        for name, grad in a.items():
            torch.testing.assert_close(grad, b[name], rtol=0, atol=1e-4, msg=name)
    weights = load_file(out / "model.safetensors")
    for name, value in trainer.model.state_dict().items():
        difference = (weights[name] - value).abs()  # Adam enlarges the noise of gradients near 0
        assert difference.max() < LR and (difference < 1e-4).float().mean() > 0.999, name


def settings(folder) -> dict:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": BATCH // 2,
        "max_steps": STEPS,
        "learning_rate": LR,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "max_length": None,
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
    }


def in_order(rows: list, lengths: list[int]) -> list:
    """The rows in the order of our loop, one optimizer step after the other."""
    out = []
    for epoch in range(5):
        for step in common.epoch_schedule(lengths, BATCH, 256, 1, 0, epoch):
            out += [rows[i] for i in itertools.chain(*step)]
    return out


def ours(base, out, data, **more) -> dict:
    return {
        "model": base,
        "out": str(out),
        "data": str(data),
        "batch_size": BATCH,
        "lr": LR,
        "epochs": 5,
        "micro_tokens": 256,
        "precision": "fp32",
        "warmup_ratio": 0.0,
        **more,
    }


def test_sft_is_trl_sft(tmp_path, base, monkeypatch):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = []
    for i in range(16):
        prompt = said("user", "p", i, longest=40)
        rows.append({"prompt": prompt, "completion": said("assistant", "c", i, longest=25)})
    conversations = [{"messages": row["prompt"] + row["completion"]} for row in rows]
    data = write_jsonl(tmp_path / "rows.jsonl", conversations)
    args = sft.Args(**ours(base, tmp_path / "sft", data))
    steps = recorded_training(sft, args, monkeypatch)
    _, tokenizer = common.load_model(base)
    rows = in_order(rows, common.lengths(sft.load_rows(args, tokenizer)))
    config = SFTConfig(**settings(tmp_path / "trl"))
    compare(SFTTrainer, config, rows, base, tmp_path / "sft", steps)
    SFTTrainer(
        str(tmp_path / "sft"),
        args=SFTConfig(**settings(tmp_path / "again")),
        train_dataset=Dataset.from_list(rows),
    )  # TRL loads our model


def test_dpo_is_trl_dpo(tmp_path, base, monkeypatch):
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    rows = []
    for i in range(16):
        row = {
            "prompt": said("user", "p", i, longest=40),
            "chosen": said("assistant", "c", i, longest=25),
            "rejected": said("assistant", "r", i, longest=25),
        }
        rows.append(row)
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    args = dpo.Args(**ours(base, tmp_path / "dpo", data, beta=0.3))
    steps = recorded_training(dpo, args, monkeypatch)
    _, tokenizer = common.load_model(base)
    rows = in_order(rows, common.lengths(dpo.load_pairs(args, tokenizer), True))
    config = DPOConfig(**settings(tmp_path / "trl"), beta=0.3)
    reference = AutoModelForCausalLM.from_pretrained(base)
    compare(DPOTrainer, config, rows, base, tmp_path / "dpo", steps, ref_model=reference)
