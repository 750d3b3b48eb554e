"""`make evidence`: the table is that of the rows; the README has that of the committed rows."""

import importlib
import re

import pytest
from conftest import stage

import common
from common import InputError

evidence = importlib.import_module("data.tools.evidence")
ev = stage("05_eval")
COMMITTED = sorted(common.DATA.glob("*/evidence.json"))


def rows(values: dict) -> list[dict]:
    """{plans: {seed: [reward, ...]}} as rows, a task for each reward; success is a reward of 1."""
    return [
        {"plans": plans, "seed": seed, "task": f"find/{i}", "reward": r, "success": r == 1}
        for plans, seeds in values.items()
        for seed, rewards in seeds.items()
        for i, r in enumerate(rewards)
    ]


def test_table():
    """Means over seeds of means over tasks; differences and the share of the room are paired."""
    sft = {0: [0.0, 0.5] * 20, 1: [0.5, 0.5] * 20}
    mpo = {0: [0.5, 0.5] * 20, 1: [0.5, 1.0] * 20}
    oracle = {0: [1.0, 1.0] * 20, 1: [1.0, 1.0] * 20}
    text = evidence.table(rows({"oracle": oracle, "mpo": mpo, "sft": sft, "half": {0: [1.0] * 40}}))
    lines = {
        cells[0]: cells
        for line in text.splitlines()
        if line.startswith("|")
        for cells in [[c.strip() for c in line.strip("|").split("|")]]
    }
    assert list(lines) == ["plans", "---", "SFT", "MPO", "oracle (control)"], "half has one seed"
    assert lines["SFT"][1].startswith("37.5 [") and lines["SFT"][2].startswith("0.0 [0.0, 0.0]")
    assert lines["MPO"][1].startswith("62.5 [") and lines["MPO"][2].startswith("25.0 [")
    assert lines["MPO"][3].startswith("+25.0 [") and lines["MPO"][3].endswith("p 0.0002")
    assert lines["MPO"][5] == "40%" and lines["oracle (control)"][5] == ""
    assert "40 of seed 0, 40 of seed 1" in text
    low, high = map(float, re.findall(r"[\d.]+", lines["MPO"][1])[1:])
    assert 58 < low < 62.5 < high < 67, "seeds are strata: only seed 1's tasks differ"
    without_room = evidence.table(rows({"oracle": sft, "mpo": mpo, "sft": sft}))
    assert "%" not in without_room
    with pytest.raises(InputError, match="there are none of every seed"):
        evidence.table(rows({"mpo": mpo}))


@pytest.mark.parametrize("path", COMMITTED, ids=[p.parent.name for p in COMMITTED])
def test_committed_rows_give_the_readme_s_table(path):
    committed = common.read_rows(path, ("plans", "seed", "task", "reward", "success"))
    assert evidence.table(committed) in (path.parent / "README.md").read_text()
    per_seed = {(r["plans"], r["seed"]) for r in committed}
    assert len({seed for _, seed in per_seed}) >= 3
    assert {"none", "wrong", "sft", "mpo", "oracle"} <= {plans for plans, _ in per_seed}
    tasks = {key: sum((r["plans"], r["seed"]) == key for r in committed) for key in per_seed}
    assert min(tasks.values()) >= 150


def test_rows_of_runs(tmp_path):
    """Validation and test tasks are apart; an episode that is missing is named."""
    folder = tmp_path / "seed3" / "eval"
    cell = {
        "env": "e",
        "agent": "a",
        "agent_id": "1",
        "plan_position": "instruction",
        "plans": "none",
        "plans_id": None,
    }
    common.write_rows(
        folder / "cells.jsonl",
        [{**cell, "split": "train", "tasks": ["t/1"]}, {**cell, "split": "seen", "tasks": ["t/2"]}],
    )
    episodes = [
        {
            "task": f"t/{i}",
            "plan": None,
            "reward": i / 4,
            "success": i == 2,
            "agent_id": "1",
            "plan_position": "instruction",
            "end": "steps",
        }
        for i in (1, 2)
    ]
    common.write_rows(folder / "rollouts.jsonl", episodes)
    run = str(tmp_path / "seed3")
    [row] = evidence.rows_of([run], validation=True)
    assert row == {"plans": "none", "seed": 3, "task": "t/1", "reward": 0.25, "success": False}
    [row] = evidence.rows_of([run], validation=False)
    assert row["task"] == "t/2" and row["success"] is True
    common.write_rows(folder / "rollouts.jsonl", episodes[:1])
    with pytest.raises(InputError, match="none has no episode of t/2"):
        evidence.rows_of([run], validation=False)
