"""Bad input: one clear line that names the thing, and finished rows stay. Whole commands with their
exit status are in test_stages.py."""

import errno
import json
import re
import shutil

import pytest
from conftest import CORRIDOR, ROOT, stage, write_jsonl

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
        (dpo, {"prompt": PAIR["prompt"], "chosen": PAIR["chosen"]}),
        (dpo, {**PAIR, "rejected": "Action: eat"}),
        (dpo, {**PAIR, "rejected": []}),
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


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_truncated_model_files(tmp_path, tiny_model, file):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / file).write_bytes((model / file).read_bytes()[:100])
    data = write_jsonl(tmp_path / "rows.jsonl", [TALK])
    with pytest.raises(InputError, match=f"cannot load {model}"):
        sft.main(sft.Args(model=str(model), data=str(data), out=str(tmp_path / "out")))


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
