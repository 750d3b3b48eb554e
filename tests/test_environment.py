"""Another environment: a class in common.py and a folder of prompts are all that the stages need."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, script_env, write_jsonl

from common import parse_plan, read_rows

CORRIDOR = '''
class Corridor(Environment):
    """Four rooms in a row, a lamp in one of them."""

    SPLITS, MAX_STEPS = {"train": 0, "seen": 10}, {"find-lamp": 6}
    VERBS, FAILED = {"walk", "take"}, ("You cannot",)

    def columns(self, split):
        return [[f"find-lamp/{self.SPLITS[split] + i}" for i in range(4)]]

    @classmethod
    def check(cls, task):
        if task_type(task) not in cls.MAX_STEPS:
            raise InputError(f"unknown corridor task {task!r}")

    def reset(self, task):
        self.check(task)
        self.room, self.lamp = 0, 1 + int(task.split("/")[1]) % 3
        return f"Take the lamp of corridor {task.split('/')[1]}."

    def step(self, action):
        if action == "walk on" and self.room < 3:
            self.room += 1
            return "You see a lamp." if self.room == self.lamp else "You see nothing.", 0.0, False, False
        if action == "take lamp" and self.room == self.lamp:
            return "You have the lamp.", 1.0, True, True
        return "You cannot do that.", 0.0, False, False

    def expert(self, task):
        u, steps = self.reset(task), []
        for action in [*["walk on"] * self.lamp, "take lamp"]:
            observation, reward, *_ = self.step(action)
            steps.append([action, observation])
        return {"instruction": u, "steps": steps, "reward": reward}

    @staticmethod
    def abstract(u, steps):
        return ["walk on until there is a lamp", "take the lamp"]


ENVIRONMENTS = {"corridor": Corridor, '''


def reply(messages, body):
    """A planner whose every other plan is good, and an agent that finds the lamp when it is told how to."""
    first, last = messages[0]["content"], messages[-1]["content"]
    if "Write a plan" in first:
        good = "Step 1: walk on until there is a lamp\nStep 2: take the lamp"
        return f"<meta_plan>\n{good if body['seed'] % 2 else 'Step 1: take the lamp'}\n</meta_plan>"
    told = "walk on until" in first and "You see a lamp" not in last
    return f"Action: {'walk on' if told else 'take lamp'}"


@pytest.fixture
def repository(tmp_path) -> Path:
    """A copy of the scripts with the corridor in it."""
    for script in ("01_seed_plans.py", "03_sample_score.py", "05_eval.py"):
        shutil.copy(ROOT / script, tmp_path)
    shutil.copytree(ROOT / "data", tmp_path / "data")
    source = (ROOT / "common.py").read_text()
    assert source.count("\n\nENVIRONMENTS = {") == 1
    (tmp_path / "common.py").write_text(source.replace("\n\nENVIRONMENTS = {", "\n" + CORRIDOR))
    (tmp_path / "data" / "corridor").mkdir()
    (tmp_path / "data" / "corridor" / "planner.txt").write_text("Write a plan for a task in a corridor.\n{task}\n")
    (tmp_path / "data" / "corridor" / "agent.txt").write_text("You can walk on and take lamp.\n{task}{plan_line}\n")
    return tmp_path


def test_a_class_and_a_folder_of_prompts_are_all(repository, chat_server):
    url = chat_server(reply).url

    def run(script, *args):
        result = subprocess.run([sys.executable, script, "--env", "corridor", "--out", "run", "--workers", "2", *map(str, args)],
                                cwd=repository, env=script_env(), capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stdout + result.stderr

    run("01_seed_plans.py", "--teacher", "rules")
    [*seeds] = read_rows(repository / "run" / "seed_plans.jsonl")
    assert [r["task"] for r in seeds] == [f"find-lamp/{i}" for i in range(4)]
    assert {parse_plan(r["messages"][-1]["content"]) for r in seeds} == {"Step 1: walk on until there is a lamp\nStep 2: take the lamp"}
    run("03_sample_score.py", "--planner", "p", "--agent", "a", "--planner_url", url, "--agent_url", url, "--m", 8, "--n", 1)
    pairs = read_rows(repository / "run" / "pairs.jsonl")
    assert pairs and {(p["q_chosen"], p["q_rejected"]) for p in pairs} == {(1.0, 0.0)}
    assert all("walk on until" in p["chosen"][0]["content"] for p in pairs)
    plans = write_jsonl(repository / "told.jsonl", [{"task": f"find-lamp/{i}", "plan": "Step 1: walk on until there is a lamp"}
                                                    for i in range(10, 14)])
    run("05_eval.py", "--agents", url, "--plans", "none", plans)
    results = json.loads((repository / "run" / "results.json").read_text())["results"]
    assert [(r["plans"], r["split"], r["tasks"], r["reward"]["mean"]) for r in results] == [
        ("none", "seen", 4, 0.0), ("told.jsonl", "seen", 4, 1.0)]
