"""The two training scripts: they learn, resume, start over, stop when it goes wrong, and write
models that load."""

import contextlib
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import (
    ROOT,
    check_run,
    make_model,
    run_script,
    save_model,
    script_env,
    stage,
    start_script,
    write_jsonl,
)
from safetensors.torch import load_file, save_file
from test_training import (
    PAIRS,
    QWEN3,
    TALKS,
    assistant,
    example,
    log_prob_alone,
    user,
    with_template,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

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


def weights_of(out) -> dict:
    return load_file(Path(out) / "model.safetensors")


def same_weights(one: dict, other: dict) -> bool:
    """Bit for bit, of models of the same shape."""
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def assert_loads(out, base) -> None:
    """A complete Hugging Face model in the base model's dtype that differs from it."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    before = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    assert model.dtype == before.dtype and AutoTokenizer.from_pretrained(out).chat_template
    assert not same_weights(model.state_dict(), before.state_dict())
    for name in ("metrics.jsonl", "README.md"):
        assert (Path(out) / name).stat().st_size > 100


def test_sft_learns_its_rows(tmp_path, tiny_model, talks):
    out = tmp_path / "sft"
    settings = {"batch_size": 5, "lr": 1e-2, "epochs": 60, "precision": "fp32"}
    sft.main(sft.Args(model=tiny_model, data=talks, out=str(out), **settings))
    assert losses(out)[0] > 3 and losses(out)[-1] < 0.5 and len(losses(out)) == 60
    assert_loads(out, tiny_model)
    assert [p.name for p in tmp_path.iterdir()] == ["sft"], "no partial run is left"


def test_dpo_learns_which_is_better(tmp_path, tokenizer, preferences):
    base = save_model(tmp_path / "base", tokenizer, dtype="bfloat16")
    out = tmp_path / "mpo"
    settings = {"batch_size": 4, "lr": 1e-3, "epochs": 10}
    dpo.main(dpo.Args(model=str(base), data=preferences, out=str(out), **settings))
    rows = read_rows(out / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-3), "the policy is the reference"
    assert rows[-1]["reward_accuracy"] == 1.0 and rows[-1]["reward_margin"] > 0.1
    assert rows[-1]["loss"] < 0.65
    assert_loads(out, base)


def test_long_rows_are_counted_and_left_out(tmp_path, tokenizer, capsys):
    long = [user("long " * 200), assistant("Action: wait")]
    conversations = [*TALKS, long]
    data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": talk} for talk in conversations])
    rows = sft.load_rows(sft.Args(data=str(data), max_length=150), tokenizer)
    short = [talk for talk in conversations if len(tokenize(talk, tokenizer, "").ids) <= 150]
    assert 0 < len(rows) == len(short) < len(conversations)
    assert f"skipped {len(conversations) - len(short)} rows" in capsys.readouterr().out
    a = sft.Args(data=str(data), max_length=3)
    with pytest.raises(InputError, match="no row to train on .--max_length 3"):
        common.hold_out(sft.load_rows(a, tokenizer), a)


# ---- what is saved -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, kept",
    [
        ("gemma3", ["preprocessor_config.json", "processor_config.json"]),
        ("gemma3_text", []),
    ],
)
def test_processors_of_images_are_kept(tmp_path, kind, kept):
    """Of a model with a vision tower: servers need them. Also before the first step, so that they
    are downloaded then."""
    base = tmp_path / "base"
    out = tmp_path / "out"
    for folder in (base, out):
        folder.mkdir()
    for name in ("preprocessor_config.json", "processor_config.json", "other_config.json"):
        (base / name).write_text(json.dumps({"of": name}))
    model = SimpleNamespace(config=AutoConfig.for_model(kind))
    common.copy_processors(model, str(base), out)
    assert sorted(file.name for file in out.iterdir()) == kept
    for name in kept:
        assert json.loads((out / name).read_text()) == {"of": name}


def generation_settings(folder) -> dict:
    settings = json.loads((Path(folder) / "generation_config.json").read_text())
    settings.pop("transformers_version", None)
    return settings


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.9, "top_p": 0.6},
        {"do_sample": False, "top_k": 20, "min_p": 0.1},
        {"pad_token_id": -1, "eos_token_id": [1, 2]},
        {"early_stopping": True, "length_penalty": 0.8},
        {"output_scores": True},
        {"temperature": "0.6", "do_sample": True},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_generation_are_kept(tmp_path, tokenizer, settings):
    """Also those that `save_pretrained` refuses: what serves the model reads them."""
    model = make_model(tokenizer)
    model.generation_config = GenerationConfig(**settings)
    common.save_model(model, tmp_path / "saved")
    assert generation_settings(tmp_path / "saved") == settings
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    common.save_model(loaded, tmp_path / "again")
    assert generation_settings(tmp_path / "again") == settings
    assert same_weights(weights_of(tmp_path / "saved"), weights_of(tmp_path / "again"))


def test_training_of_a_model_with_settings_that_are_refused(
    tmp_path, tokenizer, talks, preferences
):
    base = save_model(tmp_path / "base", tokenizer)
    settings = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}
    (base / "generation_config.json").write_text(json.dumps(settings))
    out = tmp_path / "sft"
    sft.main(sft.Args(model=str(base), data=talks, out=str(out), epochs=1, lora_rank=2))
    AcceleratorState._reset_state(True)
    dpo.main(dpo.Args(model=str(out), data=preferences, out=f"{out}/mpo", epochs=1))
    assert generation_settings(out) == generation_settings(out / "mpo") == settings


def test_what_cannot_be_saved_is_said_before_training(tmp_path, tiny_model, talks, monkeypatch):
    def refuse(*_):
        raise ValueError("dtype is not allowed\nSecond line")

    monkeypatch.setattr("transformers.LlamaConfig.save_pretrained", refuse)
    args = sft.Args(model=tiny_model, data=talks, out=str(tmp_path / "sft"))
    with pytest.raises(
        InputError, match=f"{tiny_model} could not be saved .*: dtype is not allowed$"
    ):
        sft.main(args)
    assert not list(tmp_path.iterdir())


def test_a_trained_model_is_asked_as_it_was_trained(tmp_path, tokenizer, talks, capsys):
    """Thinking is off in training. In the saved chat template it is off, too, unless a request
    turns it on; a template without a switch stays as it is."""
    base = save_model(tmp_path / "base", with_template(tokenizer, QWEN3))
    out = tmp_path / "sft"
    sft.main(sft.Args(model=str(base), data=talks, out=str(out), epochs=1))
    assert "2 rows are a sequence per reply" in capsys.readouterr().out
    ask = {"conversation": TALKS[0][:3], "tokenize": False, "add_generation_prompt": True}
    before = AutoTokenizer.from_pretrained(base).apply_chat_template
    after = AutoTokenizer.from_pretrained(out).apply_chat_template
    assert after(**ask) == before(**ask, enable_thinking=False) != before(**ask)
    assert after(**ask, enable_thinking=True) == before(**ask, enable_thinking=True)
    for text in (AutoTokenizer.from_pretrained(out).chat_template, tokenizer.chat_template):
        same = with_template(tokenizer, text)
        common.turn_thinking_off(same)
        assert same.chat_template == text


# ---- resuming ------------------------------------------------------------------------------------


def wait_for_checkpoint(partial: Path, process, seconds: float) -> None:
    end = time.time() + seconds
    while not list(partial.glob("step-*[0-9]")) and process.poll() is None:
        assert time.time() < end
        time.sleep(0.005)


def as_flags(settings: dict) -> list[str]:
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", str(value)]
    return flags


@pytest.mark.parametrize("script", [pytest.param("02_sft.py", marks=pytest.mark.slow), "04_dpo.py"])
def test_killed_training_resumes(tmp_path, tiny_model, talks, preferences, script, capsys):
    """Killed in the middle and run again, it ends bit for bit as if it had not been."""
    module, data = (sft, talks) if script == "02_sft.py" else (dpo, preferences)
    settings = {"model": tiny_model, "data": data, "batch_size": 1, "lr": 1e-3, "epochs": 6}
    out = tmp_path / "killed"
    partial = tmp_path / "killed.partial"
    command = [script, *as_flags(settings), "--save_steps", 1, "--out", out]
    process = start_script(*command)
    try:
        wait_for_checkpoint(partial, process, 60)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert not out.exists()
    module.main(module.Args(**settings, save_steps=1, out=str(out)))
    assert "resuming from step " in capsys.readouterr().out and not partial.exists()
    whole = tmp_path / "whole"
    module.main(module.Args(**settings, save_steps=0, out=str(whole)))
    assert same_weights(weights_of(whole), weights_of(out))
    assert losses(out) == losses(whole)


@pytest.mark.parametrize("change", ["nothing", "memory", "settings", "data", "model"])
def test_what_starts_over(tmp_path, tokenizer, talks, monkeypatch, capsys, change):
    """A run resumes with smaller micro-batches, and starts over with other settings, rows or
    weights. One checkpoint is kept."""
    base = save_model(tmp_path / "base", tokenizer)
    data = tmp_path / "rows.jsonl"
    data.write_text(Path(talks).read_text())
    out = tmp_path / "sft"
    settings = {"batch_size": 2, "epochs": 2, "save_steps": 1}
    args = sft.Args(model=str(base), data=str(data), out=str(out), **settings)
    end_step = common.Training.end_step
    steps = []

    def until_three(run, done, metrics):
        steps.append(done)
        line = end_step(run, done, metrics)
        if len(steps) == 3:
            run.append.__exit__()  # as the end of the process would
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr(common.Training, "end_step", until_three)
    with pytest.raises(KeyboardInterrupt):
        sft.main(args)
    assert [p.name for p in (tmp_path / "sft.partial").glob("step-*")] == ["step-3"]
    if change == "memory":
        args.micro_tokens = 100
        args.gradient_checkpointing = True
    elif change == "settings":
        args.lr *= 2
    elif change == "data":
        write_jsonl(data, [{"messages": talk} for talk in TALKS[:4]])
    elif change == "model":
        weights = {name: weight * 1.1 for name, weight in weights_of(base).items()}
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    sft.main(args)
    resumes = change in ("nothing", "memory")
    total = 4 if change == "data" else 6
    assert steps[3:] == list(range(4 if resumes else 1, total + 1))
    said = "resuming from step 3 of 6" if resumes else "starting over"
    assert said in capsys.readouterr().out
    assert len(losses(out)) == total


class Killed(BaseException):
    """A kill."""


class FakeModel:
    config = SimpleNamespace(sub_configs={})
    generation_config = GenerationConfig()

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("new")
        (folder / "model.safetensors").write_text("new")


class FakeTraining(common.Training):
    """A training of nothing. Its checkpoints are copies of `checkpoint`."""

    def __init__(self, folder: Path, data: Path, settings: str):
        accelerator = SimpleNamespace(
            is_main_process=True,
            num_processes=1,
            process_index=0,
            gather=lambda numbers: numbers,
            wait_for_everyone=lambda: None,
            end_training=lambda: None,
            print=print,
            log_with=None,
            device=torch.device("cpu"),
        )
        tokenizer = SimpleNamespace(chat_template=settings, save_pretrained=lambda folder: None)
        a = sft.Args(model="gpt-4o", data=str(data), out=str(folder / "sft"), save_steps=1)
        optimizer = torch.optim.AdamW([torch.zeros(1)])
        super().__init__(a, accelerator, None, optimizer, tokenizer, 3)

    def _state(self):
        return None

    def _load(self, folder):
        pass

    def _bytes_saved(self):
        return 1000, 100

    def _final_model(self):
        return FakeModel()

    def train(self) -> None:
        for step in range(self.start + 1, 4):
            self.end_step(step, {"loss": 1.0, "lr": 1.0, "tokens_per_second": 1.0})
        self.finish("nothing")


PI = [3.0, 1.0, 4.0]


@pytest.fixture
def fake_run(tmp_path, talks, monkeypatch):
    """A folder with an old model `sft` and a run of other settings, killed after its second step;
    and a function that trains once in such a folder."""
    import torch.distributed.checkpoint as dcp

    checkpoint = tmp_path / "checkpoint"
    dcp.save({"w": torch.tensor(PI)}, checkpoint_id=checkpoint)
    real_save = dcp.save
    monkeypatch.setattr(dcp, "save", lambda _, checkpoint_id: copy_files(checkpoint, checkpoint_id))

    def train(folder: Path, settings: str = "new") -> None:
        FakeTraining(folder, talks, settings).train()

    def start() -> FakeTraining:
        return FakeTraining(folder, talks, "another")

    folder = tmp_path / "before"
    (folder / "sft").mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (folder / "sft" / file).write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(FakeTraining, "finish", lambda *_: None)
        train(folder, "old")
    return SimpleNamespace(folder=folder, train=train, start=start, real_save=real_save)


def copy_files(source: Path, to: Path) -> None:
    to.mkdir()
    for file in source.iterdir():
        (to / file.name).write_bytes(file.read_bytes())


def kill_at(patch, count: int) -> None:
    """From the count-th change of the file system on, there are no more."""
    calls = itertools.count(1)

    def dying(change):
        def call(*args, **options):
            if next(calls) >= count:
                raise Killed
            return change(*args, **options)

        return call

    for name in ("mkdir", "rename", "replace", "rmdir", "unlink"):
        patch.setattr(os, name, dying(getattr(os, name)))


def assert_whole(folder: Path) -> None:
    """A model folder is the old model or the new one; every checkpoint is complete."""
    out = common.target_of(str(folder / "sft"))
    partial = common.partial_folder(str(folder / "sft"))
    if not out.exists():
        out = partial / "replaced"
    content = {path.name: path.read_text() for path in out.glob("[cm]*[ns]")}
    assert content in [dict.fromkeys(content, "old"), dict.fromkeys(content, "new")]
    assert content.keys() == {"config.json", "model.safetensors"}
    one = SimpleNamespace(num_processes=1, process_index=0)
    for checkpoint in partial.glob("step-*[0-9]"):
        step = int(checkpoint.name.removeprefix("step-"))
        assert (checkpoint / "settings").exists() and not common.why_damaged(checkpoint, step, one)


@pytest.mark.parametrize("old_model", ["folder", "link"])
def test_a_kill_at_any_moment(tmp_path, fake_run, monkeypatch, old_model):
    """A training starts over in a folder that has another run's checkpoint and an old model. It is
    killed at each change that it makes to the file system, and run again."""
    if old_model == "link":  # which stays
        disk = fake_run.folder / "disk"
        disk.mkdir()
        for name in ("sft", "sft.partial"):
            (fake_run.folder / name).rename(disk / name)
        (fake_run.folder / "sft").symlink_to("disk/sft")
    for count in itertools.count(1):
        folder = tmp_path / f"killed-{count}"
        shutil.copytree(fake_run.folder, folder, symlinks=True)
        killed = False
        with monkeypatch.context() as patch:
            kill_at(patch, count)
            try:
                fake_run.train(folder)
            except Killed:
                killed = True
        assert_whole(folder)
        fake_run.train(folder)
        if old_model == "link":
            assert os.readlink(folder / "sft") == "disk/sft"
            assert [path.name for path in (folder / "disk").iterdir()] == ["sft"]
        else:
            assert [path.name for path in folder.iterdir()] == ["sft"]
        assert (folder / "sft" / "model.safetensors").read_text() == "new"
        assert len(losses(folder / "sft")) == 3
        if not killed:
            break
    assert count > 30


@pytest.mark.parametrize(
    "damage, says",
    [
        ("no settings", "it has no settings"),
        ("no .metadata", "it is damaged .*No such file"),
        ("no __0_0.distcp", "it is damaged .*No such file"),
        ("no metrics.jsonl", "it is damaged .*does not exist"),
        ("cut __0_0.distcp", "it is damaged .*not a zip file"),
        ("cut .metadata", "it is damaged"),
        ("cut metrics.jsonl", "it is damaged .*:2: the file ends within this line"),
        ("empty .metadata", "it is damaged .*Ran out of input"),
        ("changed __0_0.distcp", "it is damaged .*checksum of .*data/0 is wrong"),
        ("changed settings", "it has other settings or data"),
    ],
)
def test_a_damaged_checkpoint(fake_run, capsys, damage, says):
    """Such as a kill, a disk or a scratch file system that deletes old files leaves: a line says
    so, and the training starts over, or resumes from the checkpoint before."""
    checkpoint = fake_run.folder / "sft.partial" / "step-2"
    before = checkpoint.with_name("step-1")
    alone = damage == "no settings"
    if not alone:
        shutil.copytree(checkpoint, before)
        [first, _] = (before / "metrics.jsonl").read_text().splitlines()
        (before / "metrics.jsonl").write_text(first + "\n")
    kind, name = damage.split()
    file = checkpoint / name
    content = file.read_bytes()
    if kind == "no":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(content[:-3])
    elif kind == "empty":
        file.write_bytes(b"")
    else:
        place = max(0, content.find(struct.pack("3f", *PI)))
        assert place or name == "settings"
        file.write_bytes(content[:place] + b"x" + content[place + 1 :])
    fake_run.train(fake_run.folder, "old")
    said = capsys.readouterr().out
    assert re.search(f"{checkpoint} is not used: {says}", said)
    assert ("starting over" if alone else "resuming from step 1 of 3") in said
    assert (fake_run.folder / "sft" / "config.json").read_text() == "new"
    assert len(losses(fake_run.folder / "sft")) == 3


class Foreign:
    """A pickle that runs code."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("place", [".metadata", "__0_0.distcp"])
def test_a_checkpoint_of_somebody_else(tmp_path, fake_run, capsys, place):
    """Nothing in it is run, although its settings are this run's."""
    import torch.distributed.checkpoint as dcp

    ran = tmp_path / "ran"
    checkpoint = fake_run.folder / "sft.partial" / "step-2"
    if place == ".metadata":
        (checkpoint / place).write_bytes(pickle.dumps(Foreign(ran)))
    else:
        foreign = tmp_path / "foreign"
        fake_run.real_save({"w": Foreign(ran)}, checkpoint_id=foreign)
        for name in (place, ".metadata"):
            shutil.copy(foreign / name, checkpoint / name)
        with contextlib.suppress(dcp.api.CheckpointException):
            dcp.load({"w": 0}, checkpoint_id=checkpoint)
        assert ran.exists(), "the library runs it"
        ran.unlink()
    fake_run.train(fake_run.folder, "old")
    assert f"{checkpoint} is not used: it is damaged" in capsys.readouterr().out
    assert not ran.exists()


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
    other_run = common.Appender(run / "sft.partial" / "metrics.jsonl")
    with other_run, pytest.raises(InputError, match="written by another run"):
        sft.main(sft.Args(**args, out=f"{run}/sft"))


# ---- what goes wrong -----------------------------------------------------------------------------


def test_training_that_diverges_stops(tmp_path, tiny_model, talks):
    """Before the weights are lost, with the step and its lines; the last checkpoint is kept."""
    settings = {"batch_size": 1, "lr": 1e30, "epochs": 5, "save_steps": 1}
    args = sft.Args(model=tiny_model, data=talks, out=str(tmp_path / "sft"), **settings)
    with pytest.raises(InputError, match=r"norm nan at step 2: lower --lr, or look at lines \d of"):
        sft.main(args)
    partial = tmp_path / "sft.partial"
    assert (partial / "step-1").is_dir() and not (tmp_path / "sft").exists()
    assert [row["step"] for row in read_rows(partial / "metrics.jsonl")] == [1]


def test_a_loss_that_explodes_stops_training():
    """Ten times the highest of the first ten steps, which is 0.59."""
    run = common.Training.__new__(common.Training)
    run.log = [{"loss": 0.5 + 0.01 * i} for i in range(12)]
    run.partial = "x.partial"
    run.a = sft.Args()
    batch = [common.Example([], "t", 7), common.Example([], "t", 3)]
    run.stop_if_diverged(13, 5.8, 1.0, batch)
    with pytest.raises(InputError, match="loss is 5.95 .* step 13.*lines 3, 7 of"):
        run.stop_if_diverged(13, 5.95, 1.0, batch)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process becomes larger: a write then fails as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# a checkpoint of the tiny model has 0.67 MB, its weights 0.15 MB, its tokenizer 27 KB
@pytest.mark.parametrize(
    "save_steps, size, what",
    [
        (1, 300_123, "the checkpoint of step 1"),
        (0, 100_000, "the model"),
        pytest.param(1, 2_000, "the checkpoint of step 1", marks=pytest.mark.slow),
        pytest.param(1, 640_000, "the checkpoint of step 1", marks=pytest.mark.slow),
        pytest.param(0, 20_000, "the model", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk(tmp_path, tiny_model, talks, save_steps, size, what):
    """The writers of torch, safetensors and tokenizers say it in their own ways, here it is a line.
    What was being written is deleted."""
    args = {"model": tiny_model, "data": talks, "batch_size": 3, "epochs": 1}
    a = sft.Args(**args, save_steps=save_steps, out=str(tmp_path / "sft"))
    with (
        file_size_limit(size),
        pytest.raises(InputError, match=f"^cannot write {what} to .*GB were free.*last checkpoint"),
    ):
        sft.main(a)
    assert [file.name for file in (tmp_path / "sft.partial").iterdir()] == ["metrics.jsonl"]
    assert not (tmp_path / "sft").exists()


@pytest.mark.slow
def test_a_disk_that_is_full(tmp_path, tiny_model, talks):
    """A real one. The checkpoint before is kept, and resumed from when there is space again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    try:
        settings = {"model": tiny_model, "data": talks, "save_steps": 1, "batch_size": 5}
        command = ["02_sft.py", *as_flags(settings), "--out", disk / "sft"]
        done = run_script(*command)
        [line] = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        assert done.returncode == 2 and "cannot write the checkpoint of step 2 to" in line
        assert "Traceback" not in done.stderr
        kept = [file.name for file in (disk / "sft.partial").iterdir()]
        assert sorted(kept) == ["metrics.jsonl", "step-1"]
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        assert "resuming from step 1 of 3" in check_run(*command)
        assert len(losses(disk / "sft")) == 3
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    "save_steps, start, need",
    [(0, 0, 1), (3, 0, 1), (2, 0, 11), (1, 0, 20), (1, 2, 1), (1, 1, 10), (0, 1, 1)],
)
def test_the_disk_is_looked_at_first(tmp_path, monkeypatch, save_steps, start, need):
    """Of checkpoints of 10 GB and a model of 1 GB, in a run of 3 steps."""
    run = common.Training.__new__(common.Training)
    run.a = SimpleNamespace(save_steps=save_steps)
    run.start = start
    run.total = 3
    run.out = run.partial = tmp_path
    monkeypatch.setattr(run, "_bytes_saved", lambda: (10e9, 1e9), raising=False)
    free = SimpleNamespace(free=need * 1e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    run._check_disk()
    free.free -= 1
    with pytest.raises(InputError, match=f"writing {tmp_path} needs about {need}.0 GB, .*--out"):
        run._check_disk()


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_bytes_that_are_saved(tmp_path, tokenizer, talks, lora_rank, monkeypatch):
    """What is looked for on the disk is what is written, but for names and other small things."""
    base = save_model(tmp_path / "base", tokenizer, dtype="bfloat16", hidden_size=256)
    bytes_saved = common.Training._bytes_saved
    save = common.Training._save
    found = []

    def note(run):
        found.extend(bytes_saved(run))
        return found[0], found[1]

    def note_size(run, done):
        save(run, done)
        folder = run.partial / f"step-{done}"
        found.append((folder / "__0_0.distcp").stat().st_size)
        with (folder / ".metadata").open("rb") as file:
            found.append(len(common.MetadataUnpickler(file).load().storage_data))

    monkeypatch.setattr(common.Training, "_bytes_saved", note)
    monkeypatch.setattr(common.Training, "_save", note_size)
    out = tmp_path / "sft"
    settings = {"batch_size": 3, "epochs": 1, "save_steps": 1, "lora_rank": lora_rank}
    sft.main(sft.Args(model=str(base), data=talks, out=str(out), **settings))
    checkpoint, model, written, parts = found
    assert checkpoint < written < checkpoint + 2000 * parts
    assert (out / "model.safetensors").stat().st_size == pytest.approx(model, rel=0.2)


@pytest.mark.parametrize("variable", ["FSDP", "DEEPSPEED"])
def test_a_configuration_of_ones_own_is_refused(tmp_path, tiny_model, talks, monkeypatch, variable):
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(InputError, match=f"turns on {variable}, but training shards the model"):
        sft.main(sft.Args(model=tiny_model, data=talks, out=str(tmp_path / "sft")))


@pytest.mark.parametrize(
    "flags, precision",
    [
        ("flags\t: fpu avx512f avx512_bf16 avx_vnni", "fp32"),
        ("flags\t: fpu avx512_bf16 amx_bf16 amx_tile", "bf16"),
        ("Features\t: fp asimd bf16 i8mm", "bf16"),
        (None, "fp32"),
    ],
)
def test_the_precision_that_a_cpu_computes_faster(tmp_path, monkeypatch, flags, precision):
    cpuinfo = tmp_path / "cpuinfo"
    if flags:
        cpuinfo.write_text(f"processor\t: 0\n{flags}\nbugs\t:\n")
    look = common.cpu_multiplies_bf16
    monkeypatch.setattr(common, "cpu_multiplies_bf16", lambda: look(str(cpuinfo)))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for given in ("auto", "bf16", "fp32"):
        a = sft.Args(out=str(tmp_path / "out"), precision=given)
        common.make_accelerator(a)
        assert a.precision == (precision if given == "auto" else given)


@pytest.mark.parametrize(
    "setting, value",
    [
        ("precision", "fp8"),
        ("lr_scheduler", "triangle"),
        ("log_with", "x"),
        ("batch_size", 0),
        ("epochs", -1),
        ("limit", -1),
        ("save_steps", -1),
        ("out", "."),
    ],
)
def test_settings_are_checked(tmp_path, tiny_model, talks, setting, value):
    args = {"model": tiny_model, "data": talks, "out": str(tmp_path / "sft"), setting: value}
    with pytest.raises(InputError, match=f"--{setting}.*{value}"):
        sft.main(sft.Args(**args))


def test_a_line_is_named_as_it_is_in_the_file(tmp_path, tokenizer):
    """Blank lines count."""
    data = tmp_path / "rows.jsonl"
    data.write_text(
        '{"messages": []}\n'.replace("[]", json.dumps(TALKS[0])) + '\n\n{"messages": 1}\n'
    )
    with pytest.raises(InputError, match=r"rows.jsonl:4: "):
        sft.load_rows(sft.Args(data=str(data)), tokenizer)


# ---- more options --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lora(tmp_path, tokenizer, preferences, precision, monkeypatch):
    """Only adapters are trained; they are merged into a complete model."""
    base = save_model(tmp_path / "base", tokenizer, dtype="bfloat16")
    out = tmp_path / "mpo"
    settings = {"batch_size": 2, "lr": 1e-2, "epochs": 10, "lora_rank": 4, "precision": precision}
    trained = []
    weights = common.Training._trained_weights

    def record(run):
        for name, weight in weights(run):
            trained.append(name)
            yield name, weight

    monkeypatch.setattr(common.Training, "_trained_weights", record)
    dpo.main(dpo.Args(model=str(base), data=preferences, out=str(out), **settings))
    assert trained and all(".lora_" in name for name in trained)
    rows = read_rows(out / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert rows[-1]["reward_accuracy"] == 1.0 and rows[-1]["loss"] < 0.6
    assert_loads(out, base)
    assert not (out / "adapter_config.json").exists()
    changed = weights_of(out)
    for name, weight in weights_of(base).items():
        assert torch.equal(weight, changed[name]) == ("_proj" not in name), name


def test_held_out_tasks_and_tracker(tmp_path, tiny_model, tokenizer):
    """The loss after each epoch is that of the held-out tasks' rows; a tracker gets all metrics."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [{"task": f"t/{i % 6}", "messages": TALKS[i % len(TALKS)]} for i in range(12)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "sft"
    settings = {"batch_size": 4, "lr": 1e-2, "epochs": 3, "eval_share": 0.4, "precision": "fp32"}
    args = {"model": tiny_model, "data": str(data), "out": str(out), "log_with": "tensorboard"}
    a = sft.Args(**args, **settings)
    train, held_out = common.hold_out(sft.load_rows(a, tokenizer), a)
    assert len(train) + len(held_out) == 12 and held_out
    assert {row.task for row in train}.isdisjoint(row.task for row in held_out)
    sft.main(a)
    log = read_rows(out / "metrics.jsonl")
    measured = [row["eval_loss"] for row in log if "eval_loss" in row]
    assert len(measured) == 3 and "eval_loss" in log[-1]
    double = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)
    loss = 0
    tokens = 0
    for row in held_out:
        log_prob, count = log_prob_alone(double, rows[row.line - 1]["messages"], tokenizer)
        loss -= log_prob.item()
        tokens += count
    assert measured[-1] == pytest.approx(loss / tokens, rel=1e-4)
    [folder] = {f.parent for f in Path(f"{out}.logs").rglob("events.*") if f.parent.name == "sft"}
    values = [v.value for v in EventAccumulator(str(folder)).Reload().Scalars("loss")]
    assert values == pytest.approx(losses(out), rel=1e-4)


# ---- several processes ---------------------------------------------------------------------------


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
LAUNCH = ["-m", "data.tools.launch", "--num_processes"]  # as make does


@pytest.mark.slow
@pytest.mark.parametrize("script", ["02_sft.py", "04_dpo.py"])
def test_accelerate_launch(tmp_path, tiny_model, talks, preferences, script):
    """The command of the scripts' docstrings; on a CPU it starts one process."""
    data = talks if script == "02_sft.py" else preferences
    launch = ["-m", "accelerate.commands.launch", "--num_processes", 2, "--cpu"]
    settings = {"model": tiny_model, "data": data, "out": tmp_path / "out", "epochs": 1}
    check_run(*launch, script, *as_flags(settings))
    assert losses(tmp_path / "out")


def start_long_training(folder: Path, model: str, data: str, processes: int, **more):
    """Start a training of thousands of steps, and wait for its first step. Returns the process."""
    settings = {"model": model, "data": data, "out": folder / "sft", **LONG, **more}
    command = ["02_sft.py", *as_flags(settings)]
    if processes > 1:
        command = [*LAUNCH, processes, *command]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=script_env(ACCELERATE_USE_CPU="true"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = folder / "sft.partial" / "metrics.jsonl"
    end = time.time() + 100
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.time() < end and process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


LONG = {"batch_size": 2, "epochs": 2000, "save_steps": 1000}


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, number", [(1, signal.SIGTERM), (2, signal.SIGTERM), (2, signal.SIGHUP)]
)
def test_a_training_that_is_preempted(tmp_path, tiny_model, talks, processes, number):
    """It saves the step that it is at, says so in one line, and ends with the signal's status. The
    signal comes twice, as from make and from a terminal."""
    process = start_long_training(tmp_path, tiny_model, talks, processes)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert not psutil.wait_procs(children, 5)[1] and len(children) >= processes - 1
    [step] = re.findall(r"interrupted: step (\d+) of 6000 is saved, run the same command", err)
    assert err.rstrip().endswith(f"({number.name})") and err.count("interrupted") == 1
    assert process.returncode == 128 + number and "Traceback" not in err
    [folder] = (tmp_path / "sft.partial").glob("step-*")
    assert folder.name == f"step-{step}" and int(step) < 1000
    assert len(read_rows(folder / "metrics.jsonl")) == int(step)


@pytest.mark.slow
def test_a_launcher_that_is_killed(tmp_path, tiny_model, talks):
    """Its processes end, too. They have met on loopback, and listen nowhere else."""
    process = start_long_training(tmp_path, tiny_model, talks, 2)
    children = psutil.Process(process.pid).children(recursive=True)
    addresses = []
    for p in [psutil.Process(process.pid), *children]:
        for connection in p.net_connections():
            if connection.status == psutil.CONN_LISTEN:
                addresses.append(connection.laddr.ip)
    assert len(children) == 2 and set(addresses) == {"127.0.0.1"}
    process.kill()
    _, alive = psutil.wait_procs(children, 10)
    assert not alive
    _, err = process.communicate()
    assert err.count("interrupted: saved checkpoints are kept") == 1
    assert "(the launcher has ended)" in err and "Traceback" not in err


@pytest.mark.slow
def test_a_process_that_is_killed(tmp_path, tiny_model, talks):
    """Such as by the kernel, for its memory: the others end, and the launcher says why."""
    process = start_long_training(tmp_path, tiny_model, talks, 2)
    children = psutil.Process(process.pid).children()
    [second] = [p for p in children if p.environ()["RANK"] == "1"]
    second.kill()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 137 and not psutil.wait_procs(children, 1)[1]
    assert "error: process 1 of 2 was ended by SIGKILL" in err


class FakeSignals:
    """Of a training that is told to end before its second step."""

    number = None
    waits = False
    what = ""


@pytest.mark.parametrize("save_steps", [2, 0])
def test_a_step_after_a_signal(fake_run, monkeypatch, capsys, save_steps):
    """It is the last one. Without checkpoints nothing waits for the end of a step."""
    signals = FakeSignals()
    monkeypatch.setattr(common.StopSignals, "current", signals)

    def end(status):
        raise Killed(status)

    monkeypatch.setattr(os, "_exit", end)
    run = fake_run.start()
    run.a.save_steps = save_steps
    run.progress_bar("test").close()
    assert signals.waits == (save_steps > 0)
    metrics = {"loss": 1.0, "lr": 1.0, "tokens_per_second": 1.0}
    run.end_step(1, dict(metrics))
    assert not list(run.partial.glob("step-*"))
    signals.number = signal.SIGTERM
    if save_steps:
        with pytest.raises(Killed, match="143"):
            run.end_step(2, dict(metrics))
        said = "interrupted: step 2 of 3 is saved, run the same command to resume (SIGTERM)"
        assert said in capsys.readouterr().err
        assert [file.name for file in run.partial.glob("step-*")] == ["step-2"]
    run.finish("nothing")
    assert signals.waits and signals.what == f"{run.out} is finished"
    assert (run.out / "config.json").read_text() == "new"


@pytest.mark.slow
def test_an_error_of_several_processes(tmp_path, tiny_model):
    """The launcher adds nothing to what they say."""
    settings = {"model": tiny_model, "data": tmp_path / "no.jsonl", "out": tmp_path / "sft"}
    command = [*LAUNCH, 2, "02_sft.py", *as_flags(settings)]
    done = run_script(*command)  # on a CPU, as there is no GPU
    assert done.returncode == 2 and "no.jsonl does not exist" in done.stderr
    assert "Traceback" not in done.stderr


PRECISIONS = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16", "gradient_checkpointing": True},
    "alone": {"precision": "fp32"},  # layers that would mix the rows of a pack
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("script", ["02_sft.py", "04_dpo.py"])
def test_two_processes_train_as_one_does(
    tmp_path, tokenizer, tiny_model, talks, preferences, script, precision
):
    """Sharded over two processes (FSDP2 on gloo), also when killed in the middle. With small
    micro-batches and an odd number of rows, one process has less to do, at times nothing."""
    module, data = (sft, talks) if script == "02_sft.py" else (dpo, preferences)
    base = tiny_model
    if precision == "alone":
        base = save_model(tmp_path / "mamba", tokenizer, kind="mamba", state_size=4)
    settings = {"model": str(base), "data": data, **PRECISIONS[precision]}
    settings |= {"batch_size": 3, "micro_tokens": 64, "lr": 1e-3, "epochs": 4, "save_steps": 1}
    one = tmp_path / "one"
    module.main(module.Args(**settings, out=str(one)))
    # it prints if the interpreter shuts down, where a thread of gloo can abort the process
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os\nif 'RANK' in os.environ: atexit.register(print, 'shut down')\n"
    )
    env = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(tmp_path)}
    out = tmp_path / "two"
    command = [*TORCHRUN, 2, script, *as_flags(settings), "--out", out]
    process = start_script(*command, **env)
    wait_for_checkpoint(tmp_path / "two.partial", process, 100)
    for p in [*psutil.Process(process.pid).children(recursive=True), process]:
        p.kill()
    process.wait()
    assert "shut down" not in check_run(*command, env=env)
    atol = 0.02 if precision == "bf16" else 1e-4
    assert losses(out) == pytest.approx(losses(one), abs=atol)
    expected = weights_of(one)
    found = weights_of(out)
    assert found.keys() == expected.keys()
    for name in found:
        assert (found[name] - expected[name]).abs().max() < atol, name
    assert (out / "config.json").read_text() == (one / "config.json").read_text()


@contextlib.contextmanager
def own_memory() -> Iterator[list[int]]:
    """Bytes of this process's memory, taken every 5 ms. Pages of a mapped file do not count: the
    kernel can drop them, and all processes share them."""
    samples = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            status = Path("/proc/self/status").read_text()
            kinds = re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", status)
            samples.append(sum(int(size) * 1024 for size in kinds))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def load_and_check(folder: str, settings: str) -> None:
    """What each process of the two tests below runs: load a model as the scripts do. The weights,
    gathered from all processes, are the checkpoint's bit for bit. Writes the peak of this process's
    memory in bytes, and the fingerprint of the rest: adapters and buffers."""
    args = sft.Args(**json.loads(settings))
    accelerator = common.make_accelerator(args)
    with own_memory() as samples:
        model, _ = common.load_model(args.model)
        # Few tokens: in bf16 a backward pass is 100 times slower on a CPU without AVX-512.
        rows = [example(([3, 4, 5, 6], [False, False, True, True]))]
        model, _ = common.prepare_model(model, accelerator, args, rows)
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
    result = {"peak": max(samples), "names": sorted(more)}
    result["fingerprint"] = common.fingerprint(more)
    Path(folder, f"{accelerator.process_index}.json").write_text(json.dumps(result))


def load_with(processes: int, folder: Path, **settings) -> list[dict]:
    """The result of `load_and_check` of each of `processes` processes."""
    folder.mkdir()
    command = [*TORCHRUN, processes, __file__, folder, json.dumps(settings)]
    # By the second setting, memory of 1 MB or more goes back to the system once it is freed.
    env = {"ACCELERATE_USE_CPU": "true", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    check_run(*command, env=env)
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
    shape = {"dtype": "bfloat16", "tie_word_embeddings": tied, "intermediate_size": 65}
    base = save_model(tmp_path / "base", tokenizer, **shape)
    [one] = load_with(1, tmp_path / "one", model=str(base), **settings)
    for result in load_with(2, tmp_path / "two", model=str(base), **settings):
        assert result["fingerprint"] == one["fingerprint"]
    kinds = " ".join(one["names"])
    assert "inv_freq" in kinds and ("lora_A" in kinds) == ("lora_rank" in settings)


@pytest.mark.slow
@pytest.mark.parametrize("precision, bytes_per_weight", [("bf16", 2), ("fp32", 4)])
def test_memory_of_loading_on_two_processes(tmp_path, tokenizer, precision, bytes_per_weight):
    """To load 1 GB of bf16 weights and to measure how rows are computed, two processes together
    need less than half a copy of the weights more than one process: a copy in the precision that
    they compute in, as each gathers some layers in it."""
    shape = {"hidden_size": 2048, "intermediate_size": 5632}
    shape |= {"num_hidden_layers": 12, "num_attention_heads": 16}
    base = save_model(tmp_path / "base", tokenizer, dtype="bfloat16", **shape)
    size = (base / "model.safetensors").stat().st_size
    settings = {"model": str(base), "precision": precision}
    [result] = load_with(1, tmp_path / "one", **settings)
    one = result["peak"]
    two = sum(result["peak"] for result in load_with(2, tmp_path / "two", **settings))
    (base / "model.safetensors").unlink()  # pytest keeps the folder
    assert size > 1e9 and 2 * size < one < 4 * size, "float32, and one copy in bf16 at most"
    copy = size * bytes_per_weight / 2  # the file has two bytes per weight
    assert two < one + copy / 2


if __name__ == "__main__":
    load_and_check(*sys.argv[1:])
    os._exit(0)  # as `run_stage` does
