"""An environment is a folder: loading it, using it by path or by name, removing one."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CORRIDOR, ROOT, script_env, write_jsonl

import common
from common import InputError, parse_plan, plan_reply, read_rows


def test_loading(tmp_path):
    cls = common.environment(CORRIDOR)
    assert cls is common.environment(CORRIDOR) and cls.__module__ == "environments.corridor"
    for name in ("nowhere", str(tmp_path)):
        with pytest.raises(InputError, match=f"--env {name}: .*env.py does not exist.*sciworld"):
            common.environment(name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "env.py").write_text("from common import Environment\n")
    with pytest.raises(InputError, match="one subclass of common.Environment, not 0"):
        common.environment(str(tmp_path / "empty"))
    (tmp_path / "needy").mkdir()
    (tmp_path / "needy" / "env.py").write_text("import no_such_package\n")
    with pytest.raises(InputError, match="no_such_package: pip install -r .*requirements.txt"):
        common.environment(str(tmp_path / "needy"))


def test_an_environment_is_light():
    """Loading one imports neither torch nor transformers: workers start fast."""
    code = (
        f"import sys, common; common.environment({CORRIDOR!r})\n"
        "print([m for m in ('torch', 'transformers', 'openai') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


def test_the_protocol():
    env = common.environment(CORRIDOR)()
    tasks = {split: env.tasks(split) for split in env.SPLITS}
    assert env.tests() == ["seen", "unseen"] and tasks["train"] == env.tasks("train")
    assert {common.task_type(t) for t in tasks["train"][:2]} == set(env.MAX_STEPS), "they alternate"
    with pytest.raises(InputError, match="unknown split 'test': one of train, seen, unseen"):
        env.tasks("test")
    assert env.max_steps(tasks["train"][0]) == env.MAX_STEPS[common.task_type(tasks["train"][0])]


def test_a_run_folder_is_of_one_version_of_the_data(tmp_path, monkeypatch):
    cls = common.environment(CORRIDOR)
    common.check_data(CORRIDOR, tmp_path)
    assert not list(tmp_path.iterdir()), "no version, no file"
    monkeypatch.setattr(cls, "version", classmethod(lambda cls: "one"))
    common.check_data(CORRIDOR, tmp_path)
    common.check_data(CORRIDOR, tmp_path)
    monkeypatch.setattr(cls, "version", classmethod(lambda cls: "two"))
    with pytest.raises(InputError, match="rows of other .* data.*another run folder"):
        common.check_data(CORRIDOR, tmp_path)


def reply(messages, body):
    """A planner whose every other plan is good; an agent that finds the lamp if it is told how."""
    first, last = messages[0]["content"], messages[-1]["content"]
    if "stop" not in body:
        good = "Step 1: walk on until there is a lamp\nStep 2: take the lamp"
        return plan_reply(good if body["seed"] % 2 else "Step 1: take the lamp")
    told = "walk on until" in first and "You see a lamp" not in last
    return f"Action: {'walk on' if told else 'take lamp'}"


@pytest.mark.slow
def test_a_new_folder_in_data_is_all_it_takes(tmp_path, chat_server):
    """In a copy of the repository: with tests/corridor as data/corridor and without data/webshop,
    stages 1, 3 and 5 play it by name, and the tests of the rest pass."""
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(".git", ".venv", "runs", "models", "logs", "__pycache__"),
    )
    shutil.copytree(copy / "tests" / "corridor", copy / "data" / "corridor")
    shutil.rmtree(copy / "data" / "webshop")
    (copy / "tests" / "test_webshop.py").unlink()
    url = chat_server(reply).url

    def run(script, *args):
        command = [sys.executable, script, "--env", "corridor", "--out", "run", "--workers", "2"]
        result = subprocess.run(
            [*command, *map(str, args)],
            cwd=copy,
            env=script_env(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stdout + result.stderr

    run("01_seed_plans.py", "--teacher", "rules", "--types", "find-lamp")
    seeds = read_rows(copy / "run" / "seed_plans.jsonl")
    assert [r["task"] for r in seeds] == [f"find-lamp/{i}" for i in range(4)]
    assert all(parse_plan(r["messages"][-1]["content"]) == r["plan"] for r in seeds)
    run(
        "03_sample_score.py",
        "--planner",
        "p",
        "--agent",
        "a",
        "--planner_url",
        url,
        "--agent_url",
        url,
        "--m",
        8,
        "--n",
        1,
        "--types",
        "find-lamp",
    )
    pairs = read_rows(copy / "run" / "pairs.jsonl")
    assert pairs and {(p["q_chosen"], p["q_rejected"]) for p in pairs} == {(1.0, 0.0)}
    plans = write_jsonl(
        tmp_path / "told.jsonl",
        [
            {"task": f"find-lamp/{i}", "plan": "Step 1: walk on until there is a lamp"}
            for i in range(10, 14)
        ],
    )
    run(
        "05_eval.py",
        "--agents",
        url,
        "--plans",
        "none",
        plans,
        "--types",
        "find-lamp",
        "--splits",
        "seen",
    )
    results = json.loads((copy / "run" / "results.json").read_text())["results"]
    assert [(r["plans"], r["tasks"], r["reward"]["mean"]) for r in results] == [
        ("none", 4, 0.0),
        ("told.jsonl", 4, 1.0),
    ]
    tests = [f"tests/test_{name}.py" for name in ("rows", "prompts", "make", "environment", "eval")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *tests],
        cwd=copy,
        env=script_env(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stdout[-3000:]


def test_nothing_else_names_an_environment():
    """Only the default value of --env, and of paths made from it, may name one outside its
    folder."""
    names = [p.parent.name for p in (ROOT / "data").glob("*/env.py")]
    files = [
        *ROOT.glob("*.py"),
        ROOT / "Makefile",
        *ROOT.glob("requirements*.txt"),
        *(p for p in (ROOT / "data").glob("*.py")),
        *(ROOT / "data" / "report").glob("*"),
    ]
    for path in files:
        if path.suffix == ".png":
            continue
        for number, line in enumerate(Path(path).read_text().splitlines(), 1):
            default = re.search(r'arg\("|default="|^ENV \?=', line)
            assert default or not any(name in line for name in names), f"{path}:{number}: {line}"
