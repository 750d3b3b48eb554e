"""`make evidence`: the table is that of the rows; README.md and data/EXPERIMENTS.md have the
numbers of the committed rows."""

import importlib
import re
from collections import Counter

import pytest
from conftest import ROOT

import common
from common import InputError

evidence = importlib.import_module("data.tools.evidence")
COMMITTED = sorted(common.DATA.glob("*/evidence.csv"))


def remembered(function):
    """The function, which computes each value once."""
    values = {}

    def call(strata, seed):
        key = repr((strata, seed))
        if key not in values:
            values[key] = function(strata, seed)
        return values[key]

    return call


@pytest.fixture(scope="module", autouse=True)
def each_bootstrap_once():
    """The notebook's table and the README's have values in common."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mean_and_interval", "paired_test"):
            patch.setattr(evidence.ev, name, remembered(getattr(evidence.ev, name)))
        yield


def rows(rewards: dict) -> list[dict]:
    """Rows of {plans: {seed: [reward, ...]}}, a task for each reward; success is a reward of 1."""
    found = {}
    for plans, seeds in rewards.items():
        for seed, values in seeds.items():
            for i, reward in enumerate(values):
                row = found.setdefault((seed, i), {"seed": seed, "task": f"find/{i}"})
                row[f"{plans}_reward"] = reward
                row[f"{plans}_success"] = int(reward == 1)
    return list(found.values())


def test_table():
    """Means over seeds of means over tasks; differences and shares of the headroom are paired."""
    sft = {0: [0.0, 0.5] * 20, 1: [0.5, 0.5] * 20}
    mpo = {0: [0.5, 0.5] * 20, 1: [0.5, 1.0] * 20}
    oracle = {0: [1.0, 1.0] * 20, 1: [1.0, 1.0] * 20}
    text = evidence.table(rows({"oracle": oracle, "mpo": mpo, "sft": sft, "half": {0: [1.0] * 40}}))
    lines = {}
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            lines[cells[0]] = cells
    assert list(lines) == ["plans", "---", "SFT", "MPO", "oracle (control)"], "half has one seed"
    assert lines["SFT"][1].startswith("37.5 [") and lines["SFT"][2].startswith("0.0 [0.0, 0.0]")
    assert lines["MPO"][1].startswith("62.5 [") and lines["MPO"][2].startswith("25.0 [")
    assert lines["MPO"][3].startswith("+25.0 [") and lines["MPO"][3].endswith("p 0.0002")
    assert lines["MPO"][5] == "40%" and lines["oracle (control)"][5] == ""
    assert "40 of seed 0, 40 of seed 1" in text
    low, high = map(float, re.findall(r"[\d.]+", lines["MPO"][1])[1:])
    assert 58 < low < 62.5 < high < 67
    assert "MPO over" not in text
    both = evidence.table(rows({"mpo": mpo, "sft": sft, "per_type": sft}))
    assert re.search(r"MPO over 'one plan per type': reward \+25.0 .* p 0.0002; success", both)
    without_headroom = evidence.table(rows({"oracle": sft, "mpo": mpo, "sft": sft}))
    assert "%" not in without_headroom
    with pytest.raises(InputError, match="there are none of every seed"):
        evidence.table(rows({"mpo": mpo}))


def test_more_seeds_are_not_more_tasks():
    """Three seeds that do the same are as uncertain as one: the tasks are the same."""
    one = rows({"sft": {0: [0.0, 1.0] * 20}, "mpo": {0: [1.0] * 40}})
    three = []
    for seed in (0, 1, 2):
        three.extend({**row, "seed": seed} for row in one)
    table_of_one = evidence.table(one).splitlines()[:-2]
    assert evidence.table(three).splitlines()[: len(table_of_one)] == table_of_one


def test_the_table_is_that_of_the_file(tmp_path):
    """A file with plans, as `make evidence` writes it, gives the same rows again. Plans may be
    missing, hold commas and several lines."""
    path = tmp_path / "evidence.csv"
    written = rows({"none": {0: [0.1667, 0.0]}, "sft": {0: [1.0, 0.25]}, "half": {0: [1.0]}})
    written[0]["sft_plan"] = 'Step 1: "go", look\nStep 2: take it'
    evidence.write_csv(path, written)
    names = "none_reward,none_success,sft_reward,sft_success,sft_plan,half_reward,half_success"
    assert path.read_text().splitlines()[0] == f"seed,task,{names}"
    assert evidence.read_csv(path) == written
    written[0].pop("sft_plan")
    evidence.write_csv(path, written)
    assert path.read_text().splitlines()[1:] == [
        "0,find/0,0.1667,0,1.0,1,1.0,1",
        "0,find/1,0.0,0,0.25,0,,",
    ]
    assert evidence.read_csv(path) == written


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "the first line must name the columns"),
        ("plans,reward\nsft,1\n", "the first line must name the columns"),
        ("seed,task,sft_reward\n0,find/1,1.0\n0,find/2,much\n", ":3: could not convert .* 'much'"),
        ("seed,task,sft_success\n0,find/1,yes\n", ":2: invalid literal .* 'yes'"),
        ("seed,task\n0,find/1,1.0\n", ":2: a row has a seed, a task and at most one cell"),
        ("seed,task\n,find/1\n", ":2: a row has a seed, a task"),
    ],
)
def test_a_file_that_is_none(tmp_path, text, says):
    path = tmp_path / "evidence.csv"
    with pytest.raises(InputError, match="does not exist: make evidence"):
        evidence.read_csv(path)
    path.write_text(text)
    with pytest.raises(InputError, match=f"evidence.csv.*{says}"):
        evidence.read_csv(path)


@pytest.mark.parametrize("path", COMMITTED, ids=[p.parent.name for p in COMMITTED])
def test_committed_rows_give_the_notebook_s_table(path):
    committed = evidence.read_csv(path)
    tasks = Counter(row["seed"] for row in committed)
    assert len(tasks) >= 3 and min(tasks.values()) >= 150
    settings = evidence.complete_settings(committed)
    assert {"none", "mismatched", "sft", "mpo", "oracle"} <= set(settings)
    assert evidence.table(committed) in (common.DATA / "EXPERIMENTS.md").read_text()


def test_committed_rows_give_the_readme_s_result():
    readme = (ROOT / "README.md").read_text().splitlines()
    [demo] = common.DATA.glob("*/demo.csv")
    rows = [*evidence.demo_rows(evidence.read_csv(demo)), *evidence.readme_rows()]
    missing = [line for line in rows if line not in readme]
    assert not missing


def test_picture(tmp_path, monkeypatch):
    """A panel for each environment that has evidence, named as its README is headed."""
    for name, reward in (("sciworld", 0.25), ("alfworld", 0.75)):
        evidence.write_csv(tmp_path / name / "evidence.csv", rows({"sft": {0: [reward, 0.0]}}))
        (tmp_path / name / "README.md").write_text(f"# The {name}\n\nMore.\n")
    (tmp_path / "webshop").mkdir()
    monkeypatch.setattr(common, "DATA", tmp_path)
    drawn = []
    monkeypatch.setattr(evidence.figures, "save", lambda figure, path: drawn.append(figure))
    evidence.draw(tmp_path / "evidence.png")
    panels = drawn[0].axes
    titles = [panel.get_title() for panel in panels]
    assert titles == ["The alfworld, 2 test tasks", "The sciworld, 2 test tasks"]
    assert [panel.texts[0].get_text() for panel in panels] == ["37.5", "12.5"]


def test_rows_of_runs(tmp_path):
    """Validation and test tasks are apart; an episode that is missing is named."""
    folder = tmp_path / "seed3" / "eval"
    names = {"env": "e", "agent": "a", "agent_id": "1", "plan_position": "instruction"}
    none = {**names, "plans": "none", "plans_id": None}
    sft = {**names, "plans": "sft", "plans_id": "2"}
    conditions = [
        {**none, "split": "train", "tasks": ["t/1"]},
        {**none, "split": "seen", "tasks": ["t/2"]},
        {**sft, "split": "seen", "tasks": ["t/2"]},
    ]
    common.write_rows(folder / "conditions.jsonl", conditions)
    plan = {"task": "t/2", "plan": "Step 1: go", "plans_id": "2"}
    common.write_rows(folder / "plans.jsonl", [plan])
    episodes = []
    for task, text, reward in (("t/1", None, 0.25), ("t/2", "Step 1: go", 1), ("t/2", None, 0.5)):
        end = {"reward": reward, "success": reward == 1, "end": "steps", "steps": []}
        episodes.append({**names, "task": task, "plan": text, **end})
    common.write_rows(folder / "rollouts.jsonl", episodes)
    run = str(tmp_path / "seed3")
    assert evidence.rows_of([run], validation=True) == [
        {"seed": 3, "task": "t/1", "none_reward": 0.25, "none_success": 0}
    ]
    assert evidence.rows_of([run], validation=False) == [
        {
            "seed": 3,
            "task": "t/2",
            "none_reward": 0.5,
            "none_success": 0,
            "sft_reward": 1,
            "sft_success": 1,
            "sft_plan": "Step 1: go",
        }
    ]
    common.write_rows(folder / "rollouts.jsonl", episodes[:2])
    with pytest.raises(InputError, match="none has no episode of t/2"):
        evidence.rows_of([run], validation=False)
