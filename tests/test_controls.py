"""The controls of an evaluation: plans that must not help, and plans that show what is possible."""

import contextlib
import json

import pytest
from conftest import CORRIDOR, stage

import common
from common import InputError, plan_reply, read_rows, task_type

ev = stage("05_eval")


def test_controls(tmp_path, tiny_model, chat_server, monkeypatch):
    """`mismatched` is the planner's plan for a task of another type; `oracle` is made of the task's own
    expert trajectory and is in no file that a planner is trained on."""

    def reply(messages, body):
        first = messages[0]["content"]
        planning = "Action" not in first
        return plan_reply(f"Step 1: {first.splitlines()[-1]}") if planning else "Action: walk on"

    server = chat_server(reply)
    monkeypatch.setattr(common, "serve", lambda *_: contextlib.nullcontext(server.url))
    (tmp_path / "mpo").symlink_to(tiny_model)
    a = {
        "env": CORRIDOR,
        "workers": 1,
        "out": str(tmp_path),
        "agents": [server.url],
        "splits": ["seen"],
        "max_steps": 2,
    }
    ev.main(ev.Args(**a, plans=["none", "mismatched", "mpo", "oracle"]))
    rows = read_rows(tmp_path / "eval" / "plans.jsonl")
    plans = {(r["setting"], r["task"]): r["plan"] for r in rows}
    u = {r["task"]: r["instruction"] for r in rows}
    assert len(plans) == len(rows) == 3 * 8
    env, used = common.environment(CORRIDOR)(), set()
    for task in u:
        assert u[task] in plans["mpo", task]
        [other] = [t for t in u if u[t] in plans["mismatched", task]]
        assert task_type(other) != task_type(task)
        used.add(other)
        e = env.expert(task)
        assert plans["oracle", task] == common.number_steps(env.abstract(u[task], e["steps"]))
    assert len(used) > 2, "drawn, not always the same"
    assert not list(tmp_path.glob("*.jsonl"))
    settings = [r["plans"] for r in json.loads((tmp_path / "results.json").read_text())["results"]]
    assert settings == ["none", "mismatched", "mpo", "oracle"]
    for name in ("table2", "table3", "table6"):
        assert len((tmp_path / f"{name}.md").read_text().split("```")[0].splitlines()) >= 8
    ev.main(ev.Args(**a, types=["find-key"], seed=1, plans=["mismatched"]))  # all of one type
    for r in read_rows(tmp_path / "eval" / "plans.jsonl")[len(rows) :]:
        assert r["plan"] and u[r["task"]] not in r["plan"], "still of another task"
    with pytest.raises(InputError, match="--plans mismatched needs two test tasks"):
        ev.main(ev.Args(**a, limit=1, seed=2, plans=["mismatched"]))


def test_validation_tasks_are_those_after_the_others(tmp_path, chat_server, monkeypatch):
    """--skip leaves out the tasks that the other stages use with --limit."""
    server = chat_server(lambda messages, body: "Action: walk on")
    monkeypatch.setattr(common, "serve", lambda *_: contextlib.nullcontext(server.url))
    a = {
        "env": CORRIDOR,
        "workers": 1,
        "out": str(tmp_path),
        "agents": [server.url],
        "splits": ["train"],
        "max_steps": 1,
        "plans": ["none"],
    }
    ev.main(ev.Args(**a, skip=3, limit=2))
    [cell] = read_rows(tmp_path / "eval" / "conditions.jsonl")
    assert cell["tasks"] == common.environment(CORRIDOR)().tasks("train")[3:5]
    with pytest.raises(InputError, match="--skip 8 is negative or leaves no task of train"):
        ev.main(ev.Args(**a, skip=8))


def test_the_room_between_sft_and_oracle():
    """(60 - 50) / (90 - 50); no share of a room that may be none."""
    from data.report import tables

    def note(low: float) -> str:
        over = {"plans": "sft", "plan_position": "instruction"}
        found = {"mpo": [0.1, -0.1, 0.3], "oracle": [0.4, low, 0.7]}
        return tables.gains(
            [],
            [
                {
                    "agent": "a",
                    "split": "all",
                    "plans": plans,
                    "plan_position": "instruction",
                    "over": over,
                    "tasks": 3,
                }
                | {
                    metric: {"mean": mean, "interval": [a, b], "p": 0.5}
                    for metric in ("reward", "solved", "ended")
                }
                for plans, (mean, a, b) in found.items()
            ],
        ).note

    assert "a, all: MPO recovers 25% of the reward from SFT" in note(0.1)
    assert "recovers" not in note(-0.1)
