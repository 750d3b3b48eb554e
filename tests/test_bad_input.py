"""Bad input: one clear line that names the thing, and finished rows stay. Whole commands with their
exit status are in test_stages.py."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import CORRIDOR, ROOT, script_env, stage, write_jsonl

import common
from common import InputError, fingerprint, plan_reply, read_rows

seed = stage("01_seed_plans")
sft = stage("02_sft")
score = stage("03_sample_score")
dpo = stage("04_dpo")
ev = stage("05_eval")
TALK = {
    "messages": [
        {"role": "user", "content": "Boil water."},
        {"role": "assistant", "content": "Action: wait"},
    ]
}
PAIR = {
    "prompt": TALK["messages"][:1],
    "chosen": TALK["messages"][1:],
    "rejected": [{"role": "assistant", "content": "Action: eat"}],
}


def run_seed(out, **more) -> None:
    settings = {"env": CORRIDOR, "out": str(out), "teacher": "rules", "limit": 2, "workers": 1}
    seed.main(seed.Args(**(settings | more)))


def run_score(out, url, **more) -> None:
    models = {"planner": "p", "agent": "a", "planner_url": url, "agent_url": url}
    settings = {"env": CORRIDOR, "out": str(out), "limit": 2, "workers": 1, "m": 2, "n": 1}
    score.main(score.Args(**(models | settings | more)))


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture
def refused(capsys, monkeypatch):
    """refused(main, module, command): the error line of a stage that must exit with status 2."""

    def run(main, module, command: str) -> str:
        monkeypatch.setattr("sys.argv", ["stage", *command.split()])
        with pytest.raises(SystemExit) as error:
            common.run_stage(main, module.Args)
        assert error.value.code == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        return line

    return run


@pytest.mark.parametrize(
    "module, command, says",
    [
        (sft, "--lerning_rate 3", "--lerning_rate"),
        (sft, "--epochs many", "--epochs.*many"),
        (seed, "--env nowhere --teacher rules", "--env nowhere: .*env.py does not exist.*sciworld"),
    ],
)
def test_unknown_flags_and_values(refused, module, command, says):
    assert re.search(says, refused(module.main, module, command))


def test_a_full_disk_is_one_line(refused):
    def main(a):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/rollouts.jsonl")

    said = refused(main, sft, "")
    assert re.search("cannot write runs/x/rollouts.jsonl: No space left.*--out", said)


@pytest.mark.parametrize("name", ["EISDIR", "ENAMETOOLONG", "ELOOP", "EDQUOT", "EFBIG"])
def test_other_files_that_cannot_be_written(refused, name):
    number = getattr(errno, name)

    def main(a):
        raise OSError(number, os.strerror(number), "runs/x/results.md")

    assert f"cannot write runs/x/results.md: {os.strerror(number)}" in refused(main, sft, "")


def test_an_environment_that_ends_the_stage(refused):
    """Not with status 0 and nothing said."""

    def main(a):
        raise SystemExit(0)

    said = refused(main, sft, "")
    assert "an environment or a package has ended the stage (SystemExit: 0)" in said


def test_names_that_are_too_long(tmp_path):
    long = "x" * 300
    with pytest.raises(InputError, match=f"--env {long}: "):
        run_seed(tmp_path, env=long)
    with pytest.raises(InputError, match=f"--prompts {long}: "):
        run_seed(tmp_path, prompts=long)
    with pytest.raises(InputError, match="cannot be served|does not exist|cannot be read"):
        common.check_model(f"runs/{long}")
    assert not common.is_local(long) and common.model_fingerprint(long) == long
    with pytest.raises(InputError, match="File name too long"):
        read_rows(tmp_path / long)


def test_out_is_a_file(tmp_path):
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(OSError) as error:
        run_seed(tmp_path / "run")
    assert error.value.errno in (errno.EEXIST, errno.ENOTDIR)
    assert (tmp_path / "run").read_text() == "not a folder"


@pytest.mark.parametrize(
    "more, says",
    [
        ({"types": ["find-unicorn"]}, "find-unicorn.*find-lamp"),
        ({"limit": 0}, "--limit"),
        ({"prompts": "nowhere"}, "--prompts nowhere: .*brief"),
        ({"workers": 0}, "--workers"),
        ({"tasks": ["none.json"]}, "--tasks none.json: .*No such file"),
    ],
)
def test_settings_of_the_environment(tmp_path, more, says):
    with pytest.raises(InputError, match=says):
        run_seed(tmp_path, **more)


def test_no_episode_in_flight(tmp_path):
    with pytest.raises(InputError, match="--concurrency must be at least 1"):
        run_score(tmp_path, "http://127.0.0.1:9/v1", concurrency=0)


# ---- signals -------------------------------------------------------------------------------------

# a stage script whose main function starts with `prelude` and ends with what it is given
SCRIPT = """
import argparse, asyncio, ctypes, pathlib, sys, time
import common
from tqdm import tqdm

common.parse_arguments = lambda *_: (argparse.ArgumentParser(), None)
common.StopSignals.PATIENCE = 1.0
common.server_command = lambda *_: ["sleep", "100"]

def waits():
    bar = tqdm(range(1000), mininterval=100)
    print("started", flush=True)
    for _ in bar:
        time.sleep(0.1)

async def lane(_=None):
    print("started", flush=True)
    while True:
        await asyncio.sleep(PAUSE)

async def lanes():
    try:
        await common.run_concurrently(lane, range(4), 2)
    finally:
        print("cleaned up")

async def starts_server():
    server = common._start_server("m", [], 9, pathlib.Path(sys.argv[1]))
    print("started", flush=True)
    try:
        common._wait_healthy(server, 100)
    finally:
        server.process.stdin.close()
        server.process.wait()
        print("cleaned up")

async def never_ends():
    print("started", flush=True)
    while True:
        try:
            await asyncio.sleep(0.1)
        except BaseException:
            pass

def is_outside_python():
    print("started", flush=True)
    while True:
        ctypes.CDLL(None).sleep(100)

async def fails():
    try:
        await lane()
    finally:
        raise common.InputError("a server is gone")

def main(_):
    MAIN

common.run_stage(main, None, training=TRAINING)
"""
STAGES = {
    "waits": "waits()",
    "episodes": "asyncio.run(lanes())",
    "a server starts": "asyncio.run(starts_server())",
    "fails": "asyncio.run(fails())",
    "never ends": "asyncio.run(never_ends())",
}
TERM, HUP, INT = signal.SIGTERM, signal.SIGHUP, signal.SIGINT


def start_signalled(tmp_path, main: str, pause: float, training: bool, ignored=None):
    values = {"MAIN": main, "PAUSE": str(pause), "TRAINING": str(training)}
    code = re.sub("|".join(values), lambda match: values[match[0]], SCRIPT)
    file = tmp_path / "stage.py"
    file.write_text(code)

    def ignore():
        signal.signal(INT, signal.SIG_DFL)  # a shell ignores it in what it starts with `&`
        if ignored is not None:
            signal.signal(ignored, signal.SIG_IGN)

    process = subprocess.Popen(
        [sys.executable, file, tmp_path],
        env=script_env(PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=ignore,
    )
    assert process.stdout.readline() == "started\n"
    return process


def end_of(process, status: int, kept: str = "finished rows") -> str:
    """What a process printed that must end, and say so in one line, with this status."""
    out, err = process.communicate(timeout=10)
    *_, last = re.split("[\n\r]", err.rstrip("\n"))
    by = {130: "Ctrl-C", 129: "SIGHUP", 143: "SIGTERM"}[status]
    assert last.startswith(f"interrupted: {kept} are kept, run the same command to resume")
    assert last.endswith(f"({by})") and err.count("interrupted") == 1 and "Traceback" not in err
    assert process.returncode == status
    return out


@pytest.mark.parametrize(
    "stage, number, pause, ignored",
    [
        ("waits", HUP, 0, None),
        ("episodes", TERM, 1, None),
        ("episodes", TERM, 0, INT),  # in the background of a shell script
        ("episodes", INT, 1, None),
        ("a server starts", TERM, 0, None),
        ("fails", HUP, 1, None),  # the server, too, got the signal
        ("never ends", TERM, 0, None),
    ],
)
def test_a_stage_that_is_told_to_end(tmp_path, stage, number, pause, ignored):
    process = start_signalled(tmp_path, STAGES[stage], pause, False, ignored)
    process.send_signal(number)
    said = end_of(process, 128 + number)
    assert ("cleaned up" in said) == (stage in ("episodes", "a server starts"))


@pytest.mark.parametrize("main", ["waits()", "is_outside_python()"])
def test_a_training_that_is_told_to_end(tmp_path, main):
    """At once, before its first step, also while the main thread waits for another process."""
    process = start_signalled(tmp_path, main, 0, True)
    for _ in range(2):  # a second signal changes nothing
        process.send_signal(TERM)
    end_of(process, 143, kept="saved checkpoints")


SEES_TO = """signals = common.StopSignals.current
    signals.waits = True
    signals.what = "OUT is finished"
    print("started", flush=True)
    while signals.number is None:
        time.sleep(0.01)
    END"""


@pytest.mark.parametrize(
    "end, says",
    [
        ("", "interrupted: OUT is finished (SIGTERM)"),
        ("raise common.InputError('the disk is full')", "error: the disk is full"),
        pytest.param(
            "raise RuntimeError('Connection closed by peer')",
            "interrupted: OUT is finished",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "common.StopSignals.SAME = 0; waits()",
            "interrupted: OUT is finished (SIGTERM)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_training_that_sees_to_a_signal(tmp_path, end, says):
    """It is in a step, or writes the model: it ends by itself, or at the second signal."""
    process = start_signalled(tmp_path, SEES_TO.replace("END", end), 0, True)
    process.send_signal(TERM)
    if "waits()" in end:
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(TERM)
    _, err = process.communicate(timeout=10)
    assert says in err and "Traceback" not in err
    assert process.returncode == (2 if "error" in says else 143)


def test_signals_that_come_twice(tmp_path):
    """From make and from the terminal: as one. Later: the stage ends at once."""
    process = start_signalled(tmp_path, STAGES["episodes"], 1, False)
    process.send_signal(HUP)
    process.send_signal(HUP)
    assert "cleaned up" in end_of(process, 129)
    process = start_signalled(tmp_path, "common.StopSignals.SAME = 0.1; waits()", 0, False)
    process.send_signal(TERM)
    time.sleep(0.2)
    process.send_signal(TERM)
    end_of(process, 143)


@pytest.mark.parametrize("training", [False, True])
def test_nohup(tmp_path, training):
    process = start_signalled(tmp_path, "waits()", 0, training, ignored=HUP)
    process.send_signal(HUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(TERM)
    end_of(process, 143, kept="saved checkpoints" if training else "finished rows")


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module, row",
    [
        (sft, {"message": []}),
        (sft, {"messages": "Boil water."}),
        (sft, {"messages": ["Boil."]}),
        (sft, {"messages": [{"role": "assistant"}]}),
        (sft, {"messages": [{"role": "assistant", "content": None}]}),
        (sft, {"messages": TALK["messages"][:1]}),
        (sft, {"messages": 5}),
        (sft, {"messages": [TALK["messages"][0], {"role": "assistant", "content": 5}]}),
        (sft, {"messages": [TALK["messages"][0], {"role": "assistant", "content": "\ud83d"}]}),
        (dpo, {"prompt": PAIR["prompt"], "chosen": PAIR["chosen"]}),
        (dpo, {**PAIR, "rejected": "Action: eat"}),
        (dpo, {**PAIR, "rejected": []}),
        (dpo, {**PAIR, "prompt": {"role": "user", "content": "Boil."}}),
        (dpo, {**PAIR, "chosen": [{"role": "assistant", "content": 5}]}),
    ],
)
def test_row_of_the_wrong_shape(tmp_path, tokenizer, module, row):
    data = write_jsonl(tmp_path / "rows.jsonl", [TALK | PAIR, row])
    load = module.load_rows if module is sft else module.load_pairs
    with pytest.raises(InputError, match=f"{data}:2"):
        load(module.Args(data=str(data)), tokenizer)


@pytest.mark.parametrize("module", [sft, dpo])
def test_missing_broken_and_empty_data(tmp_path, tiny_model, module):
    data = tmp_path / "rows.jsonl"
    a = module.Args(model=tiny_model, data=str(data), out=str(tmp_path / "out"))
    with pytest.raises(InputError, match=f"{data} does not exist"):
        module.main(a)
    data.write_text(json.dumps(TALK | PAIR) + '\n{"messages": [}\n')
    with pytest.raises(InputError, match=f"{data}:2: invalid JSON"):
        module.main(a)
    data.write_text('{"messages": [{"role"')  # only an incomplete line, left by a kill
    with pytest.raises(InputError, match=str(data)):
        module.main(a)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ['{"task": "t", "plan": 5}', '{"task": "t", "plan": null}'])
def test_an_edited_plan_that_is_no_text(tmp_path, line):
    (tmp_path / "edited_plans.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"edited_plans.jsonl:1: the .*plan (must be|is null)"):
        run_seed(tmp_path)
    (tmp_path / "edited_plans.jsonl").write_text(line + "\n" + line[:9])
    with pytest.raises(InputError, match=r"edited_plans.jsonl:[12]: "):
        seed.edited_plans(seed.Args(out=str(tmp_path)), set())


@pytest.mark.parametrize("text", ["[1]", '{"a": 1}', "{", "[" * 100_000])
def test_examples_that_are_damaged(tmp_path, text):
    (tmp_path / "agent.txt").write_text("{example} {task} {plan_line}")
    (tmp_path / "examples.json").write_text(text)
    with pytest.raises(InputError, match=r"examples\.json of .* (is damaged|must be)"):
        common.Prompts(CORRIDOR, str(tmp_path))


@pytest.mark.parametrize(
    "kind, says",
    [
        ("cut", "rows.jsonl:2: the file ends within this line, so it has lost rows"),
        ("cut in a character", "rows.jsonl:2: the file ends within this line"),
        ("nested", "rows.jsonl:2: nested too deeply"),
        ("number", "rows.jsonl:2: each line must be a JSON object"),
        ("folder", "rows.jsonl cannot be read: Is a directory"),
        ("link to itself", "rows.jsonl cannot be read: Too many levels"),
    ],
)
@pytest.mark.parametrize("module", [sft, dpo])
def test_training_data_that_is_not_whole(tmp_path, tokenizer, module, kind, says):
    """It was written as a whole: to train on what is left of it would be silent."""
    data = tmp_path / "rows.jsonl"
    row = json.dumps(TALK | PAIR | {"task": "h\u00e9"}, ensure_ascii=False).encode()
    if kind == "folder":
        data.mkdir()
    elif kind == "link to itself":
        data.symlink_to(data)
    else:
        bad = {"cut": row[:-20], "nested": b'{"prompt": ' + b"[" * 100_000, "number": b"5"}
        bad["cut in a character"] = row[: row.index(b"\xc3") + 1]
        end = b"" if kind.startswith("cut") else b"\n"
        data.write_bytes(row + b"\n" + bad[kind] + end)
    load = module.load_rows if module is sft else module.load_pairs
    with pytest.raises(InputError, match=says):
        load(module.Args(data=str(data)), tokenizer)
    if kind != "folder":
        data.unlink()
        data.write_bytes(row + b"\n" + row)  # only the end of the line is missing
        assert len(load(module.Args(data=str(data)), tokenizer)) == 2


def test_rows_of_another_version(tmp_path):
    path = tmp_path / "trajectories.jsonl"
    path.write_text('{"task": "find-lamp/0"}\n')
    with pytest.raises(InputError, match=f"{path}:1: .*steps"):
        run_seed(tmp_path)
    assert path.read_text() == '{"task": "find-lamp/0"}\n'


# ---- models --------------------------------------------------------------------------------------


def test_model_folders(tmp_path, tiny_model):
    model = tmp_path / "model"
    with pytest.raises(InputError, match=f"{model} does not exist"):
        common.check_model(str(model))
    with pytest.raises(InputError, match="runs/x/sft does not exist"):
        common.check_model("runs/x/sft")
    common.check_model("meta-llama/Llama-3.1-8B-Instruct")  # may be downloaded
    shutil.copytree(tiny_model, model, ignore=shutil.ignore_patterns("tokenizer*", "chat_temp*"))
    with pytest.raises(InputError, match=f"{model} has no tokenizer_config.json"):
        common.check_model(str(model))
    settings = json.loads((ROOT / tiny_model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=f"{model} has no chat template"):
        common.check_model(str(model))


def test_models_of_an_api(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in ("gpt-4o", "api:openai/gpt-4o"):
        with pytest.raises(InputError, match="OPENAI_API_KEY"):
            common.check_model(name)
    common.check_model("gpt-4o", "http://127.0.0.1:9/v1")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"5", b'{"a"', b"\xff\xfe", b"[" * 100_000, None])
def test_a_damaged_configuration_of_a_served_model(tmp_path, tiny_model, file, content):
    """None: a folder is in its place."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / file).unlink()
    if content is None:
        (model / file).mkdir()
    else:
        (model / file).write_bytes(content)
    with pytest.raises(InputError, match=f"{model / file} is damaged"):
        common.check_model(str(model))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"hidden_size": "many"}, "cannot be served"),
        ({"num_hidden_layers": None, "layer_types": 5}, "cannot be served|inf"),
        ({"max_position_embeddings": "many"}, "cannot be served"),
        ({"max_position_embeddings": None}, "cannot be served: .*max_position_embeddings"),
        ({"model_type": 5}, "cannot be served|inf"),
        ({"model_type": "of-tomorrow"}, "inf"),  # the server may know it
        ({"rope_parameters": "linear"}, "cannot be served|inf"),
    ],
)
def test_values_of_a_configuration(tmp_path, tiny_model, change, says):
    """One line, or no limit of the context: then the server's log says what is wrong."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    try:
        found = str(common.context_of(str(model)))
    except InputError as e:
        found = str(e)
        assert str(model) in found and "\n" not in found
    assert re.search(says, found)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_truncated_model_files(tmp_path, tiny_model, file):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / file).write_bytes((model / file).read_bytes()[:100])
    data = write_jsonl(tmp_path / "rows.jsonl", [TALK])
    with pytest.raises(InputError, match=f"cannot load {model}"):
        sft.main(sft.Args(model=str(model), data=str(data), out=str(tmp_path / "out")))


CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path(FILE).touch()
class Config(LlamaConfig):
    pass
class Model(LlamaForCausalLM):
    pass
"""


@pytest.mark.parametrize("model_type", ["llama", "of-its-own"])
def test_code_that_comes_with_a_model_is_not_run(tmp_path, tiny_model, monkeypatch, model_type):
    """Nor is anybody asked whether it may."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    ran = tmp_path / "ran"
    (model / "code.py").write_text(CODE.replace("FILE", repr(str(ran))))
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": model_type, "architectures": ["Model"]}
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (model / "config.json").write_text(json.dumps(config))
    if model_type == "llama":
        common.load_model(str(model))
    else:
        with pytest.raises(InputError, match=f"cannot load {model}.* custom code"):
            common.load_model(str(model))
    assert not ran.exists()


def test_a_planner_that_was_not_trained(tmp_path):
    url = "http://127.0.0.1:9/v1"
    a = ev.Args(env=CORRIDOR, out=str(tmp_path), plans=["none", "sft"], agents=[url])
    with pytest.raises(InputError, match="sft"):
        ev.main(a)


def test_no_key_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        run_seed(tmp_path / "run", teacher="gpt-4o")
    assert not (tmp_path / "run").exists()


# ---- servers that fail halfway -------------------------------------------------------------------


def test_a_planner_that_fails_halfway(tmp_path, chat_server, monkeypatch):
    """The finished plans are kept."""
    monkeypatch.setenv("MPO_MAX_RETRIES", "0")
    working = []

    def reply(messages, body):
        working.append(body)
        plan = plan_reply(f"Step 1: wait {len(working)}")
        return plan if len(working) <= 2 else (400, "maximum context length is 64 tokens.")

    with pytest.raises(InputError, match="context"):
        run_score(tmp_path, chat_server(reply).url, concurrency=1)
    assert len(read_rows(tmp_path / "plans.jsonl", ("task", "m", "plan"))) == 2
    assert (tmp_path / "plans.jsonl").read_bytes().endswith(b"\n")


def test_an_agent_that_fails_halfway(tmp_path, chat_server, monkeypatch):
    """Finished episodes are kept; an episode that could not be played is not one."""
    monkeypatch.setenv("MPO_MAX_RETRIES", "0")

    def reply(messages, body):
        if "stop" not in body:
            return plan_reply(f"Step 1: wait {fingerprint(messages, body['seed'])}")
        return "Action: touch the trap" if len(server.requests) < 8 else (500, "out of order")

    server = chat_server(reply)
    with pytest.raises(InputError, match="500"):
        run_score(tmp_path, server.url, n=3, concurrency=2)
    rows = read_rows(tmp_path / "rollouts.jsonl", ("task", "plan", "rollout", "reward"))
    assert rows and not any(r["end"] == "crash" for r in rows)
