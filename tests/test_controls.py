"""The controls of an evaluation: plans that must not help, and plans that show what is possible."""

import contextlib
import json

import pytest
from conftest import CORRIDOR, stage

import common
from common import InputError, plan_reply, read_rows, task_type
from data.report import tables

ev = stage("05_eval")


@pytest.fixture
def settings(tmp_path, chat_server, monkeypatch) -> dict:
    """Settings of an evaluation in tmp_path, whose planner's plan is the task's instruction."""

    def reply(messages, body):
        prompt = messages[0]["content"]
        if "Action" in prompt:
            return "Action: walk on"
        return plan_reply(f"Step 1: {prompt.splitlines()[-1]}")

    server = chat_server(reply)
    monkeypatch.setattr(common, "serve", lambda *_: contextlib.nullcontext(server.url))
    return {
        "env": CORRIDOR,
        "workers": 1,
        "out": str(tmp_path),
        "agents": [server.url],
        "max_steps": 2,
    }


def test_controls(tmp_path, tiny_model, settings):
    """`mismatched` is mpo's plan for a task of another type; `oracle` is made of the task's own
    expert trajectory and is in no file that a planner is trained on."""
    (tmp_path / "mpo").symlink_to(tiny_model)
    usual = {**settings, "splits": ["seen"]}
    ev.main(ev.Args(**usual, plans=["none", "mismatched", "mpo", "oracle"]))
    rows = read_rows(tmp_path / "eval" / "plans.jsonl")
    plans = {(r["setting"], r["task"]): r["plan"] for r in rows}
    instructions = {r["task"]: r["instruction"] for r in rows}
    assert len(plans) == len(rows) == 3 * 8
    env = common.environment(CORRIDOR)()
    partners = set()
    for task, instruction in instructions.items():
        assert instruction in plans["mpo", task]
        [other] = [t for t in instructions if instructions[t] in plans["mismatched", task]]
        assert task_type(other) != task_type(task)
        partners.add(other)
        steps = env.abstract(instruction, env.expert(task)["steps"])
        assert plans["oracle", task] == common.number_steps(steps)
    assert len(partners) > 2, "drawn, not always the same"
    assert not list(tmp_path.glob("*.jsonl"))
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [r["plans"] for r in results] == ["none", "mismatched", "mpo", "oracle"]
    for name in ("table2", "table3", "table6"):
        assert len((tmp_path / f"{name}.md").read_text().split("```")[0].splitlines()) >= 8

    ev.main(ev.Args(**usual, types=["find-key"], seed=1, plans=["mismatched"]))  # all of one type
    for row in read_rows(tmp_path / "eval" / "plans.jsonl")[len(rows) :]:
        assert row["plan"] and instructions[row["task"]] not in row["plan"], "of another task"
    with pytest.raises(InputError, match="--plans mismatched needs two test tasks"):
        ev.main(ev.Args(**usual, limit=1, seed=2, plans=["mismatched"]))


def test_mismatched_tasks_are_those_of_earlier_runs():
    tasks = ["boil/1", "boil/2", "melt/1", "melt/2", "grow/1"]
    drawn = [ev.task_of_another_type(ev.Args(seed=seed), "boil/1", tasks) for seed in range(4)]
    assert drawn == ["grow/1", "melt/1", "melt/1", "grow/1"]


def test_validation_tasks_are_those_after_the_others(tmp_path, settings):
    """--skip leaves out the tasks that the other stages use with --limit."""
    usual = {**settings, "splits": ["train"], "plans": ["none"]}
    ev.main(ev.Args(**usual, skip=3, limit=2))
    [condition] = read_rows(tmp_path / "eval" / "conditions.jsonl")
    assert condition["tasks"] == common.environment(CORRIDOR)().tasks("train")[3:5]
    for wrong, says in (
        ({"skip": 8}, "--skip 8 leaves no task of train"),
        ({"skip": -1}, "--skip -1 is negative"),
        ({"skip": 3, "limit": -1}, "--limit must be at least 1"),
    ):
        with pytest.raises(InputError, match=says):
            ev.main(ev.Args(**usual, **wrong))


@pytest.mark.parametrize(
    ("low", "note"),
    [
        (0.1, "a, all: MPO recovers 25% of the reward from SFT"),  # (60 - 50) / (90 - 50)
        (-0.1, None),  # no share of a headroom that may be none
    ],
)
def test_the_headroom_between_sft_and_oracle(low, note):
    differences = []
    for plans, mean, interval in (("mpo", 0.1, [-0.1, 0.3]), ("oracle", 0.4, [low, 0.7])):
        value = {"mean": mean, "interval": interval, "p": 0.5}
        difference = {
            "agent": "a",
            "split": "all",
            "plans": plans,
            "plan_position": "instruction",
            "over": {"plans": "sft", "plan_position": "instruction"},
            "tasks": 3,
            "reward": value,
            "solved": value,
            "ended": value,
        }
        differences.append(difference)
    found = tables.gains([], differences).note
    assert note in found if note else "recovers" not in found
