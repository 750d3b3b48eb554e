"""The two training scripts: they learn, resume, start over, stop when it goes wrong, and write
models that load."""

import errno
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, check_run, save_model, script_env, stage, start_script, write_jsonl
from safetensors.torch import load_file, save_file
from test_training import PAIRS, TALKS, assistant, log_prob_alone, user
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
from common import InputError, read_rows, tokenize

sft, dpo = stage("02_sft"), stage("04_dpo")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps one state per process."""
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "talks.jsonl"
    return str(write_jsonl(path, [{"messages": talk} for talk in TALKS]))


@pytest.fixture(scope="module")
def preferences(tmp_path_factory) -> str:
    return str(write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS))


def losses(out) -> list[float]:
    return [row["loss"] for row in read_rows(Path(out) / "metrics.jsonl")]


def assert_loads(out, base) -> None:
    """A complete Hugging Face model in the base model's dtype that differs from it."""
    model, before = (AutoModelForCausalLM.from_pretrained(x, dtype="auto") for x in (out, base))
    assert model.dtype == before.dtype and AutoTokenizer.from_pretrained(out).chat_template
    mine, theirs = model.state_dict(), before.state_dict()
    assert mine.keys() == theirs.keys()
    assert any(not torch.equal(mine[k], theirs[k]) for k in mine)
    for name in ("metrics.jsonl", "curves.png", "README.md"):
        assert (Path(out) / name).stat().st_size > 100


def test_sft_learns_its_rows(tmp_path, tiny_model, talks):
    out = tmp_path / "sft"
    sft.main(
        sft.Args(
            model=tiny_model,
            data=talks,
            out=str(out),
            batch_size=5,
            lr=1e-2,
            epochs=60,
            precision="fp32",
        )
    )
    assert losses(out)[0] > 3 and losses(out)[-1] < 0.5 and len(losses(out)) == 60
    assert_loads(out, tiny_model)
    assert [p.name for p in tmp_path.iterdir()] == ["sft"], "no partial run is left"


def test_dpo_learns_which_is_better(tmp_path, tokenizer, preferences):
    base, out = save_model(tmp_path / "base", tokenizer, dtype="bfloat16"), tmp_path / "mpo"
    dpo.main(
        dpo.Args(model=str(base), data=preferences, out=str(out), batch_size=4, lr=1e-3, epochs=10)
    )
    rows = read_rows(out / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-3), "the policy is the reference"
    assert rows[-1]["reward_accuracy"] == 1.0 and rows[-1]["reward_margin"] > 0.1
    assert rows[-1]["loss"] < 0.65
    assert_loads(out, base)


def test_long_rows_are_counted_and_left_out(tmp_path, tokenizer, capsys):
    long = [user("long " * 200), assistant("Action: wait")]
    data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": t} for t in [*TALKS, long]])
    rows = sft.load_rows(sft.Args(data=str(data), max_length=150), tokenizer)
    short = [t for t in [*TALKS, long] if len(tokenize(t, tokenizer, "")[0]) <= 150]
    assert 0 < len(rows) == len(short) < len(TALKS) + 1
    assert f"skipped {len(TALKS) + 1 - len(short)} rows" in capsys.readouterr().out
    a = sft.Args(data=str(data), max_length=3)
    with pytest.raises(InputError, match="no row to train on .--max_length 3"):
        common.hold_out(sft.load_rows(a, tokenizer), a)


# ---- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["02_sft.py", "04_dpo.py"])
def test_killed_training_resumes(tmp_path, tiny_model, talks, preferences, script):
    """Killed in the middle and run again, it ends bit for bit as if it had not been."""
    data = talks if script == "02_sft.py" else preferences
    args = [
        script,
        "--model",
        tiny_model,
        "--data",
        data,
        "--batch_size",
        1,
        "--lr",
        1e-3,
        "--epochs",
        12,
        "--save_steps",
        1,
    ]
    out, partial = tmp_path / "killed", tmp_path / "killed.partial"
    process = start_script(*args, "--out", out)
    try:
        end = time.time() + 60
        while not list(partial.glob("step-*[0-9]")):
            assert time.time() < end and process.poll() is None
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert not out.exists()
    assert "resuming from step " in check_run(*args, "--out", out) and not partial.exists()
    module = sft if script == "02_sft.py" else dpo
    module.main(
        module.Args(
            model=tiny_model,
            data=args[4],
            out=str(tmp_path / "whole"),
            batch_size=1,
            lr=1e-3,
            epochs=12,
            save_steps=0,
        )
    )
    whole, resumed = (load_file(tmp_path / x / "model.safetensors") for x in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert losses(out) == losses(tmp_path / "whole")


@pytest.mark.parametrize("change", ["nothing", "memory", "settings", "data", "model"])
def test_what_starts_over(tmp_path, tokenizer, talks, monkeypatch, capsys, change):
    """A run resumes with smaller micro-batches, and starts over with other settings, rows or
    weights. One checkpoint is kept."""
    base, data = save_model(tmp_path / "base", tokenizer), tmp_path / "rows.jsonl"
    data.write_text(Path(talks).read_text())
    args = sft.Args(
        model=str(base),
        data=str(data),
        out=str(tmp_path / "sft"),
        batch_size=2,
        epochs=2,
        save_steps=1,
    )
    steps, step = [], common.Training.step

    def until_three(run, done, metrics):
        steps.append(done)
        line = step(run, done, metrics)
        if len(steps) == 3:
            run.append.__exit__()  # as the end of the process would
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr(common.Training, "step", until_three)
    with pytest.raises(KeyboardInterrupt):
        sft.main(args)
    assert [p.name for p in (tmp_path / "sft.partial").glob("step-*")] == ["step-3"]
    if change == "memory":
        args.micro_tokens, args.gradient_checkpointing = 100, True
    elif change == "settings":
        args.lr *= 2
    elif change == "data":
        write_jsonl(data, [{"messages": talk} for talk in TALKS[:4]])
    elif change == "model":
        weights = {k: v * 1.1 for k, v in load_file(base / "model.safetensors").items()}
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    sft.main(args)
    resumes = change in ("nothing", "memory")
    assert steps[3:] == list(range(4 if resumes else 1, 5 if change == "data" else 7))
    said = "resuming from step 3 of 6" if resumes else "starting over"
    assert said in capsys.readouterr().out
    assert len(losses(tmp_path / "sft")) == (4 if change == "data" else 6)


def test_out_is_a_model_or_nothing(tmp_path, tiny_model, talks):
    """The new model replaces an older one, but never a run folder or a file; a second run on the
    same folder is refused."""
    args = {"model": tiny_model, "data": talks, "epochs": 1}
    run = tmp_path / "run"
    run.mkdir()
    (run / "rollouts.jsonl").write_text("{}\n")
    for out in (run, run / "rollouts.jsonl"):
        with pytest.raises(InputError, match="exists and is not a model"):
            sft.main(sft.Args(**args, out=str(out)))
    for _ in range(2):
        sft.main(sft.Args(**args, out=f"{run}/sft/"))
        assert (run / "sft" / "model.safetensors").exists()
        assert sorted(p.name for p in run.iterdir()) == ["rollouts.jsonl", "sft"]
    with common.Appender(run / "sft.partial" / "metrics.jsonl"):
        with pytest.raises(InputError, match="written by another run"):
            sft.main(sft.Args(**args, out=f"{run}/sft"))


# ---- what goes wrong -----------------------------------------------------------------------------


def test_training_that_diverges_stops(tmp_path, tiny_model, talks):
    """Before the weights are lost, with the step and its lines; the last checkpoint is kept."""
    args = sft.Args(
        model=tiny_model,
        data=talks,
        out=str(tmp_path / "sft"),
        batch_size=1,
        lr=1e30,
        epochs=5,
        save_steps=1,
    )
    with pytest.raises(InputError, match=r"norm nan at step 2: lower --lr, or look at lines \d of"):
        sft.main(args)
    partial = tmp_path / "sft.partial"
    assert (partial / "step-1").is_dir() and not (tmp_path / "sft").exists()
    assert [row["step"] for row in read_rows(partial / "metrics.jsonl")] == [1]

    run = common.Training.__new__(common.Training)
    run.log, run.partial, run.a = [{"loss": 0.5 + 0.01 * i} for i in range(12)], "x.partial", args
    run.check(13, 5.8, 1.0, [1])
    with pytest.raises(InputError, match="loss is 5.95 .* step 13.*lines 3, 7 of"):
        run.check(13, 5.95, 1.0, [7, 3])


def test_a_full_disk_at_a_checkpoint(tmp_path, tiny_model, talks, monkeypatch):
    """The checkpoint library wraps the error; `run_stage` makes one line of the OSError inside."""
    import torch.distributed.checkpoint as dcp

    def full(*_, **__):
        error = OSError(errno.ENOSPC, "No space left on device")
        raise dcp.api.CheckpointException("failed", {0: (error, None)})

    monkeypatch.setattr(dcp, "save", full)
    with pytest.raises(OSError, match="No space left"):
        sft.main(
            sft.Args(
                model=tiny_model, data=talks, out=str(tmp_path / "sft"), batch_size=2, save_steps=1
            )
        )


@pytest.mark.parametrize("variable", ["FSDP", "DEEPSPEED"])
def test_a_configuration_of_ones_own_is_refused(tmp_path, tiny_model, talks, monkeypatch, variable):
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(InputError, match=f"turns on {variable}, but training shards the model"):
        sft.main(sft.Args(model=tiny_model, data=talks, out=str(tmp_path / "sft")))


def test_settings_are_checked(tmp_path, tiny_model, talks):
    for setting, value in (("precision", "fp8"), ("lr_scheduler", "triangle"), ("log_with", "x")):
        with pytest.raises(InputError, match=f"--{setting}.*{value}"):
            sft.main(
                sft.Args(
                    **{
                        "model": tiny_model,
                        "data": talks,
                        "out": str(tmp_path / "sft"),
                        setting: value,
                    }
                )
            )
        AcceleratorState._reset_state(True)


# ---- more options --------------------------------------------------------------------------------


@pytest.mark.parametrize("merge, precision", [(True, "fp32"), (False, "bf16")])
def test_lora(tmp_path, tokenizer, preferences, merge, precision):
    """Only adapters are trained; merged, the result is a complete model; else peft loads them."""
    import peft

    base, out = save_model(tmp_path / "base", tokenizer, dtype="bfloat16"), tmp_path / "mpo"
    dpo.main(
        dpo.Args(
            model=str(base),
            data=preferences,
            out=str(out),
            batch_size=2,
            lr=1e-2,
            epochs=10,
            lora_rank=4,
            lora_merge=merge,
            precision=precision,
        )
    )
    rows = read_rows(out / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert rows[-1]["reward_accuracy"] == 1.0 and rows[-1]["loss"] < 0.6
    if merge:
        assert_loads(out, base)
        assert not (out / "adapter_config.json").exists()
    else:
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
        assert any("lora_B" in n and p.abs().max() > 0 for n, p in model.named_parameters())


def test_held_out_tasks_and_tracker(tmp_path, tiny_model, tokenizer):
    """The loss after each epoch is that of the held-out tasks' rows; a tracker gets all metrics."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [{"task": f"t/{i % 6}", "messages": TALKS[i % len(TALKS)]} for i in range(12)]
    data, out = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "sft"
    a = sft.Args(
        model=tiny_model,
        data=str(data),
        out=str(out),
        batch_size=4,
        lr=1e-2,
        epochs=3,
        eval_share=0.4,
        precision="fp32",
        log_with="tensorboard",
    )
    train, held = common.hold_out(sft.load_rows(a, tokenizer), a)
    assert len(train) + len(held) == 12 and held
    assert {task for _, task, _ in train}.isdisjoint(task for _, task, _ in held)
    sft.main(a)
    log = read_rows(out / "metrics.jsonl")
    measured = [r["eval_loss"] for r in log if "eval_loss" in r]
    assert len(measured) == 3 and "eval_loss" in log[-1]
    double = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)
    found = [log_prob_alone(double, rows[line - 1]["messages"], tokenizer) for *_, line in held]
    expected = -sum(lp.item() for lp, _ in found) / sum(n for _, n in found)
    assert measured[-1] == pytest.approx(expected, rel=1e-4)
    [folder] = {f.parent for f in Path(f"{out}.logs").rglob("events.*") if f.parent.name == "sft"}
    values = [v.value for v in EventAccumulator(str(folder)).Reload().Scalars("loss")]
    assert values == pytest.approx(losses(out), rel=1e-4)


# ---- several processes ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("script", ["02_sft.py", "04_dpo.py"])
def test_accelerate_launch(tmp_path, tiny_model, talks, preferences, script):
    """The command that make uses; on a CPU it starts one process."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--cpu",
        script,
        "--model",
        tiny_model,
        "--out",
        str(tmp_path / "out"),
        "--epochs",
        "1",
        "--data",
        talks if script == "02_sft.py" else preferences,
    ]
    result = subprocess.run(
        command, cwd=ROOT, env=script_env(), capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(tmp_path / "out")


PRECISIONS = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16", "gradient_checkpointing": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("script", ["02_sft.py", "04_dpo.py"])
def test_two_processes_train_as_one_does(
    tmp_path, tiny_model, talks, preferences, script, precision
):
    """Sharded over two processes (FSDP2 on gloo), also when killed in the middle. With small
    micro-batches and an odd number of rows, one process has less to do, at times nothing."""
    module, data = (sft, talks) if script == "02_sft.py" else (dpo, preferences)
    settings = {
        "model": tiny_model,
        "data": data,
        "batch_size": 3,
        "micro_tokens": 64,
        "lr": 1e-3,
        "epochs": 4,
        "save_steps": 1,
        **PRECISIONS[precision],
    }
    module.main(module.Args(**settings, out=str(tmp_path / "one")))
    # it prints if the interpreter shuts down, where a thread of gloo can abort the process
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os\nif 'RANK' in os.environ: atexit.register(print, 'shut down')\n"
    )
    args = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        script,
        *[str(x) for k, v in settings.items() for x in (f"--{k}", v)],
    ]
    env, out = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(tmp_path)}, tmp_path / "two"
    process = start_script(*args, "--out", out, **env)
    end = time.time() + 100
    while not list(Path(f"{out}.partial").glob("step-*[0-9]")) and process.poll() is None:
        assert time.time() < end
        time.sleep(0.005)
    for p in [*psutil.Process(process.pid).children(recursive=True), process]:
        p.kill()
    process.wait()
    assert "shut down" not in check_run(*args, "--out", out, env=env)
    atol = 1e-4 if precision == "fp32" else 0.02
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), abs=atol)
    one, two = (load_file(x / "model.safetensors") for x in (tmp_path / "one", out))
    assert one.keys() == two.keys()
    assert all((one[k] - two[k]).abs().max() < atol for k in one)
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"


def load_and_check(folder: str, settings: str) -> None:
    """What each process of the two tests below runs: load a model as the scripts do. The weights,
    gathered from all processes, are the checkpoint's bit for bit. Writes this process's peak
    resident memory in bytes, and a digest of what is not in the checkpoint: adapters, buffers."""
    args = sft.Args(**json.loads(settings))
    accelerator = common.make_accelerator(args)
    model, _ = common.prepare_model(common.load_model(args.model)[0], accelerator, args)
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    saved = load_file(Path(args.model) / "model.safetensors")
    more = {name: buffer.tolist() for name, buffer in model.named_buffers()}
    for name, p in model.named_parameters():
        value = p.detach().full_tensor()
        expected = saved.pop(re.sub(r"base_model\.model\.|\.base_layer", "", name), None)
        if expected is None:
            more[name] = value.tolist()
            expected = value.float()
        elif p.requires_grad or args.precision == "fp32":
            expected = expected.float()
        assert value.dtype == expected.dtype and torch.equal(value, expected), name
    assert not saved, "each weight of the checkpoint is a parameter, a tied one only once"
    result = {"peak": int(peak) * 1024, "names": sorted(more), "digest": common.fingerprint(more)}
    Path(folder, f"{accelerator.process_index}.json").write_text(json.dumps(result))


def load_with(processes: int, folder: Path, **settings) -> list[dict]:
    """The result of `load_and_check` of each of `processes` processes."""
    folder.mkdir()
    check_run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        processes,
        __file__,
        folder,
        json.dumps(settings),
        env={"ACCELERATE_USE_CPU": "true"},
    )
    results = [json.loads(file.read_text()) for file in folder.iterdir()]
    assert len(results) == processes
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    "tied, settings",
    [(True, {}), (True, {"lora_rank": 4}), (False, {"lora_rank": 4, "precision": "fp32"})],
    ids=["tied", "lora", "untied-lora-fp32"],
)
def test_two_processes_load_the_checkpoint(tmp_path, tokenizer, tied, settings):
    """Also weights that do not divide by two. Adapters and buffers are those of one process."""
    base = save_model(
        tmp_path / "base",
        tokenizer,
        dtype="bfloat16",
        tie_word_embeddings=tied,
        intermediate_size=65,
    )
    results = [
        r for n in (1, 2) for r in load_with(n, tmp_path / str(n), model=str(base), **settings)
    ]
    assert all(r["digest"] == results[0]["digest"] for r in results)
    kinds = " ".join(results[0]["names"])
    assert "inv_freq" in kinds and ("lora_A" in kinds) == ("lora_rank" in settings)


@pytest.mark.slow
def test_memory_of_loading_on_two_processes(tmp_path, tokenizer):
    """Two processes need less than 1.5 GB more than one to load 1 GB of bf16 weights. Peaks are of
    resident memory, as the kernel keeps them: pages of the file that both have mapped count twice,
    so the sum is at least what they use."""
    base = save_model(
        tmp_path / "base",
        tokenizer,
        dtype="bfloat16",
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=12,
        num_attention_heads=16,
    )
    size = (base / "model.safetensors").stat().st_size
    one, two = (
        sum(r["peak"] for r in load_with(n, tmp_path / str(n), model=str(base))) for n in (1, 2)
    )
    (base / "model.safetensors").unlink()  # pytest keeps the folder
    assert size > 1e9 and 2 * size < one < 4 * size, "float32, and one copy in bf16 at most"
    assert two < one + 1.5e9


if __name__ == "__main__":
    load_and_check(*sys.argv[1:])
    os._exit(0)  # as `run_stage` does
