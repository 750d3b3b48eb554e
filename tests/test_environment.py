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


def test_loading():
    cls = common.environment(CORRIDOR)
    assert cls is common.environment(CORRIDOR)
    assert cls.__module__ == "environments.corridor"


@pytest.mark.parametrize(
    "code, error",
    [
        ("from common import Environment\n", "one subclass of common.Environment, not 0"),
        ("import no_such_package\n", "no_such_package: pip install -r .*requirements.txt"),
    ],
)
def test_an_env_py_that_is_no_environment(tmp_path, code, error):
    (tmp_path / "env.py").write_text(code)
    with pytest.raises(InputError, match=error):
        common.environment(str(tmp_path))


def test_a_folder_without_env_py(tmp_path):
    with pytest.raises(InputError, match=f"--env {tmp_path}: .*env.py does not exist.*sciworld"):
        common.environment(str(tmp_path))


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
    train = env.tasks("train")
    assert env.tests() == ["seen", "unseen"]
    assert {common.task_type(task) for task in train[:2]} == set(env.MAX_STEPS), "they alternate"
    with pytest.raises(InputError, match="unknown split 'test': one of train, seen, unseen"):
        env.tasks("test")
    assert train == env.tasks("train")
    assert env.max_steps(train[0]) == env.MAX_STEPS[common.task_type(train[0])]


def test_a_run_folder_is_of_one_version_of_the_data(tmp_path, monkeypatch):
    """Also of none."""
    cls = common.environment(CORRIDOR)
    for old, new in [("", "one"), ("one", "two"), ("two", "")]:
        out = tmp_path / f"run{old}"
        monkeypatch.setattr(cls, "version", classmethod(lambda cls, said=old: said))
        common.check_data(CORRIDOR, out)
        common.check_data(CORRIDOR, out)
        monkeypatch.setattr(cls, "version", classmethod(lambda cls, said=new: said))
        with pytest.raises(InputError, match="rows of other .* data.*another run folder"):
            common.check_data(CORRIDOR, out)


def reply(messages, body):
    """A planner whose every other plan is good; an agent that finds the lamp if it is told how."""
    if "stop" not in body:  # the planner is asked
        if body["seed"] % 2 == 0:
            return plan_reply("Step 1: take the lamp")
        return plan_reply("Step 1: walk on until there is a lamp\nStep 2: take the lamp")
    told = "walk on until" in messages[0]["content"]
    if told and "You see a lamp" not in messages[-1]["content"]:
        return "Action: walk on"
    return "Action: take lamp"


def copy_repository(copy: Path) -> None:
    """A copy of the repository with tests/corridor as data/corridor and without data/webshop."""
    left_out = (".git", ".venv", "runs", "models", "logs", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*left_out))
    shutil.copytree(copy / "tests" / "corridor", copy / "data" / "corridor")
    shutil.rmtree(copy / "data" / "webshop")


def run_python(folder: Path, command: str, *more, timeout: float = 120) -> None:
    """Run Python in a folder: the words of `command`, then `more`."""
    result = subprocess.run(
        [sys.executable, *command.split(), *map(str, more)],
        cwd=folder,
        env=script_env(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr


@pytest.mark.slow
def test_a_new_folder_in_data_is_all_it_takes(tmp_path, chat_server):
    """In a copy of the repository: with tests/corridor as data/corridor and without data/webshop,
    stages 1, 3 and 5 play it by name, and the tests of the rest pass."""
    copy = tmp_path / "copy"
    copy_repository(copy)
    run = copy / "run"
    url = chat_server(reply).url
    corridor = "--env corridor --types find-lamp --out run --workers 2"

    run_python(copy, f"01_seed_plans.py {corridor} --teacher rules")
    seeds = read_rows(run / "seed_plans.jsonl")
    assert [row["task"] for row in seeds] == [f"find-lamp/{i}" for i in range(4)]
    for row in seeds:
        assert parse_plan(row["messages"][-1]["content"]) == row["plan"]

    models = f"--planner p --agent a --planner_url {url} --agent_url {url}"
    run_python(copy, f"03_sample_score.py {corridor} {models} --m 8 --n 1")
    pairs = read_rows(run / "pairs.jsonl")
    assert {(pair["q_chosen"], pair["q_rejected"]) for pair in pairs} == {(1.0, 0.0)}

    plan = "Step 1: walk on until there is a lamp"
    plans = [{"task": f"find-lamp/{i}", "plan": plan} for i in range(10, 14)]
    told = write_jsonl(tmp_path / "told.jsonl", plans)
    run_python(copy, f"05_eval.py {corridor} --agents {url} --splits seen --plans none", told)
    results = json.loads((run / "results.json").read_text())["results"]
    assert [(r["plans"], r["tasks"], r["reward"]["mean"]) for r in results] == [
        ("none", 4, 0.0),
        ("told.jsonl", 4, 1.0),
    ]

    names = ("rows", "prompts", "make", "environment", "eval")
    tests = [f"tests/test_{name}.py" for name in names]
    run_python(copy, "-m pytest -q", *tests, timeout=400)


def test_nothing_else_names_an_environment():
    """Only the default value of --env, and of paths made from it, may name one outside its
    folder."""
    names = [path.parent.name for path in (ROOT / "data").glob("*/env.py")]
    files = [ROOT / "Makefile", *ROOT.glob("*.py"), *ROOT.glob("requirements*.txt")]
    for folder in ("report", "tools", "make"):
        files += [path for path in (ROOT / "data" / folder).glob("*.*") if path.suffix != ".png"]
    files = [path for path in files if not path.name.startswith("versions")]  # all packages
    for path in files:
        text = path.read_text()
        text = re.sub(r'\b(arg\(|default=)\s*"[^"]*"', "", text)  # of a stage, of a tool
        text = re.sub(r"^ENV \?=.*", "", text, flags=re.M)  # of the Makefile
        for name in names:
            assert name not in text, f"{path} names {name}"
