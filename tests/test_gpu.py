"""Training on a GPU, with random models, and serving: `make test-gpu`. Without its first test it
needs torch, transformers, accelerate and pytest alone, and less than five minutes. Skipped without
CUDA; MPO_TEST_DEVICE=cpu runs on the CPU what it can.

A `promise` is what a test shows, in the words of the README's status table."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import (
    CORRIDOR,
    ROOT,
    flags,
    kill_when,
    make_model,
    save_large_model,
    save_model,
    script_env,
    stage,
    write_jsonl,
)
from safetensors.torch import load_file
from test_training import (
    KINDS,
    PAIRS,
    TALKS,
    as_pairs,
    as_rows,
    choose,
    gradients,
    log_prob_alone,
    sides_alone,
)

import common
from common import EnvPool, Prompts, RolloutConfig, read_rows, rollouts, target_log_probs

DEVICE = os.environ.get("MPO_TEST_DEVICE", "cuda")
without_device = DEVICE == "cuda" and not torch.cuda.is_available()
pytestmark = [
    pytest.mark.skipif(without_device, reason="needs CUDA, or MPO_TEST_DEVICE=cpu"),
    pytest.mark.usefixtures("fresh_accelerate"),
]
sft, dpo = stage("02_sft"), stage("04_dpo")
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
# a stage with deterministic kernels: which stage, and its arguments
SCRIPT = (
    "import runpy, sys, torch; torch.use_deterministic_algorithms(True); "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


@pytest.mark.promise("episodes with a model behind vLLM on GPUs")
def test_a_served_model_plays(tmp_path):
    """The model is MPO_TEST_MODEL. The first test: the others leave less memory of the GPU free
    than vLLM asks for."""
    model = os.environ.get("MPO_TEST_MODEL")
    if not model:
        pytest.skip("no model at hand: make test-gpu MODEL=FOLDER")
    assert DEVICE == "cpu" or common.uses_vllm()
    a = SimpleNamespace(out=tmp_path, tensor_parallel=1, max_model_len=4096, concurrency=4)
    c = RolloutConfig(Prompts(CORRIDOR), 0.7, 64, 0, 0, max_steps=4)
    jobs = [{"task": f"find-key/{i}", "plan": "Walk on.", "rollout": 0} for i in range(4)]
    rows = []

    async def play():
        async with EnvPool(CORRIDOR, 2) as pool:
            with common.open_model(model, None, a) as agent:
                await rollouts(jobs, agent, pool, CORRIDOR, c, 4, rows.append)

    asyncio.run(play())
    assert {row["task"] for row in rows} == {job["task"] for job in jobs}
    for row in rows:
        assert row["end"] in ("success", "failure", "steps", "errors")
        assert 0 < row["completion_tokens"] <= 4 * 64 and row["prompt_tokens"] > 0


def two_models(tokenizer, kind, config):
    """(a float64 model on the CPU with the library's attention, the same in float32 on DEVICE with
    ours)."""
    exact = make_model(tokenizer, "float64", kind=kind, **SHAPE, **config)
    exact.set_attn_implementation("eager" if kind == "gemma2" else "sdpa")
    model = make_model(tokenizer, kind=kind, **SHAPE, **config).to(DEVICE)
    choose(model, as_pairs(PAIRS, tokenizer))
    return exact, model


def assert_near(grads: dict, expected: dict, share: float) -> None:
    """Each gradient is within this share of the largest of all."""
    largest = max(g.abs().max() for g in expected.values())
    for name, grad in grads.items():
        worst = (grad.cpu().double() - expected[name]).abs().max()
        assert worst < share * largest, (name, worst, largest)


@pytest.mark.promise("SFT and DPO on a GPU: losses and gradients as in float64")
@pytest.mark.parametrize("kind, packing, config", KINDS, ids=[kind for kind, *_ in KINDS])
def test_sft_equals_float64(tokenizer, kind, packing, config):
    """Loss and gradients of packed rows."""
    exact, model = two_models(tokenizer, kind, config)
    alone = [log_prob_alone(exact, talk, tokenizer) for talk in TALKS]
    count = sum(n for _, n in alone)
    expected = sft.sft_loss(torch.stack([lp for lp, _ in alone]), count)
    expected_grads = gradients(exact, expected)
    log_probs, _ = target_log_probs(model, as_rows(TALKS, tokenizer))
    loss = sft.sft_loss(log_probs, count)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert_near(gradients(model, loss), expected_grads, 1e-3)


@pytest.mark.promise("SFT and DPO on a GPU: losses and gradients as in float64")
@pytest.mark.parametrize("share", [True, False])
def test_dpo_equals_float64(tokenizer, share):
    exact, model = two_models(tokenizer, "llama", {})
    pairs = as_pairs(PAIRS, tokenizer)
    sides = sides_alone(exact, PAIRS, tokenizer)
    reference = sides.detach() - 0.5
    a = dpo.Args()
    expected = dpo.losses_and_metrics(sides, reference, pairs, a)[0].mean()
    expected_grads = gradients(exact, expected)
    policy = dpo.pair_log_probs(model, pairs, share)
    torch.testing.assert_close(policy.cpu().double(), sides, rtol=1e-4, atol=1e-3)
    loss = dpo.losses_and_metrics(policy, reference.to(DEVICE), pairs, a)[0].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert_near(gradients(model, loss), expected_grads, 1e-3)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "base", tokenizer, **SHAPE))


def data_of(script: str, folder: Path) -> str:
    rows = [{"messages": talk} for talk in TALKS] if script == "02_sft.py" else PAIRS
    return str(write_jsonl(folder / "rows.jsonl", rows))


def losses(out) -> list[float]:
    return [row["loss"] for row in read_rows(Path(out) / "metrics.jsonl")]


@pytest.mark.promise("on a GPU, checkpointing, `--compile` and micro-batches change no loss")
@pytest.mark.parametrize("script", ["02_sft.py", "04_dpo.py"])
def test_settings_that_change_nothing(tmp_path, base, script):
    """Gradient checkpointing, compiled layers and small micro-batches give the losses of the plain
    run; bf16 is within 3%. The model that is written is read on the CPU."""
    module = sft if script == "02_sft.py" else dpo
    data = data_of(script, tmp_path)

    def run(name, **changed):
        settings = {"batch_size": 4, "lr": 1e-4, "epochs": 3, "save_steps": 0, "precision": "fp32"}
        out = tmp_path / name
        module.main(module.Args(model=base, data=data, out=str(out), **{**settings, **changed}))
        AcceleratorState._reset_state(True)
        return losses(out)

    plain = run("plain")
    for name, settings, near in (
        ("checkpointing", {"gradient_checkpointing": True}, 1e-4),
        ("compiled", {"compile": True}, 1e-3),
        ("micro", {"micro_tokens": 60}, 1e-4),
        ("bf16", {"precision": "bf16"}, 3e-2),
    ):
        if name != "compiled" or DEVICE == "cuda":
            assert run(name, **settings) == pytest.approx(plain, rel=near), name
    written = load_file(tmp_path / "plain" / "model.safetensors", device="cpu")
    assert all(torch.isfinite(w).all() for w in written.values())
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert model.device.type == "cpu" and model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.promise("training on a GPU that was killed resumes bit for bit")
@pytest.mark.parametrize("script", ["02_sft.py", "04_dpo.py"])
def test_killed_training_resumes_bit_for_bit(tmp_path, base, script):
    settings = flags(batch_size=1, lr=1e-3, epochs=12, save_steps=1)
    data = flags(model=base, data=data_of(script, tmp_path))
    command = [sys.executable, "-c", SCRIPT, script, *data, *settings]
    env = script_env(CUBLAS_WORKSPACE_CONFIG=":4096:8")
    if DEVICE == "cuda":
        env.pop("CUDA_VISIBLE_DEVICES")
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [*command, "--out", out], cwd=ROOT, env=env, stderr=subprocess.DEVNULL
    )
    kill_when(lambda: list(tmp_path.glob("killed.partial/step-*[0-9]")), process, 120)
    assert not out.exists()
    for name in ("killed", "whole"):
        subprocess.run([*command, "--out", tmp_path / name], cwd=ROOT, env=env, check=True)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    resumed = load_file(tmp_path / "killed" / "model.safetensors")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert losses(out) == losses(tmp_path / "whole")


@pytest.mark.promise("training on two GPUs is as on one")
@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_train_as_one(tmp_path, base):
    settings = ["--batch_size", "4", "--epochs", "3", "--precision", "fp32", "--lr", "1e-4"]
    data = data_of("02_sft.py", tmp_path)
    arguments = ["02_sft.py", "--model", base, "--data", data, *settings, "--out"]
    env = script_env()
    if DEVICE == "cuda":
        env.pop("CUDA_VISIBLE_DEVICES")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    if DEVICE == "cpu":
        launch.append("--cpu")
    subprocess.run([*launch, *arguments, tmp_path / "two"], cwd=ROOT, env=env, check=True)
    subprocess.run([sys.executable, *arguments, tmp_path / "one"], cwd=ROOT, env=env, check=True)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.promise("the memory of training is the estimate's, within 10%")
@pytest.mark.skipif(DEVICE == "cpu", reason="the peak is the GPU allocator's")
def test_peak_memory_is_the_estimate(tmp_path, tokenizer):
    """Of one SFT step of Llama's 8B shape, or of 3B where 8B do not fit: within 10%."""
    name = "8B" if torch.cuda.get_device_properties(0).total_memory > 145e9 else "3B"
    save_large_model(tmp_path / "model", name, DEVICE)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    row = [{"role": "user", "content": "go " * 600}, {"role": "assistant", "content": "on " * 300}]
    length = len(common.tokenize(row, tokenizer, "row").ids)
    a = sft.Args(
        model=str(tmp_path / "model"),
        out=str(tmp_path / "out"),
        batch_size=4,
        epochs=1,
        data=str(write_jsonl(tmp_path / "rows.jsonl", [{"messages": row}] * 4)),
        micro_tokens=4 * length,
        max_length=length,
        save_steps=0,
        gradient_checkpointing=True,
    )
    sft.main(a)
    [metrics] = read_rows(tmp_path / "out" / "metrics.jsonl")
    sizes, _ = common.model_sizes(a.model)
    expected = sum(common.training_memory(sizes, 4 * length, True, 0, "bf16")) / 1e9
    assert metrics["memory_gb"] == pytest.approx(expected, rel=0.1), name
