"""The controls of an evaluation: plans that must not help, and plans that show what is possible."""

import contextlib
import json
from pathlib import Path

import pytest
from conftest import CORRIDOR, stage, write_jsonl

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


def test_controls(tmp_path, tiny_model, settings, capsys):
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

    one_type = "mismatched: all test tasks are of one type"
    assert one_type not in capsys.readouterr().out
    ev.main(ev.Args(**usual, types=["find-key"], seed=1, plans=["mismatched"]))  # all of one type
    assert one_type in capsys.readouterr().out
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


# ---- one plan per task type ----------------------------------------------------------------------


def write_scores(out: Path, scores: dict, rewritten: bool = False) -> None:
    """plans.jsonl and rollouts.jsonl of stage 3 from {(task, plan): its rewards}, None for a
    rollout that failed. `rewritten`: after rows of earlier models."""
    plans = []
    rollouts = []
    for (task, plan), rewards in scores.items():
        instruction = f"Find the lamp of corridor {task.split('/')[1]}."
        plans.append({"task": task, "m": 0, "plan": plan, "instruction": instruction})
        for number, reward in enumerate(rewards):
            end = {"reward": reward, "end": "steps"}
            if reward is None:
                end = {"reward": 0.0, "end": common.REFUSED}
            rollouts.append({"task": task, "plan": plan, "rollout": number, **end})
    for name, rows in (("plans", plans), ("rollouts", rollouts)):
        new = [row | {"fingerprint": "new"} for row in rows]
        earlier = [row | {"fingerprint": "old", "reward": 1.0} for row in rows[::-1]]
        write_jsonl(out / f"{name}.jsonl", earlier + new if rewritten else new)


@pytest.mark.parametrize(
    ("scores", "best", "source"),
    [
        ({("boil/1", "a"): [0.5], ("boil/1", "b"): [0.0]}, "a", 1),  # of one task, as all are
        (  # a gains 1/4 over two tasks: of more than one, so 1/2 in one task does not count
            {
                ("boil/1", "a"): [1.0],
                ("boil/1", "b"): [0.0],
                ("boil/2", "a"): [0.0, 0.0],
                ("boil/2", "c"): [0.0],
                ("boil/3", "d"): [1.0],
                ("boil/3", "e"): [0.0],
            },
            "a",
            1,
        ),
        (  # b has the higher Q, but in an easy task; failed rollouts do not count
            {
                ("boil/1", "a"): [0.75, 0.75],
                ("boil/1", "c"): [0.25],
                ("boil/2", "b"): [1.0],
                ("boil/2", "c"): [1.0],
                ("boil/3", "a"): [None, 0.5],
                ("boil/3", "c"): [0.0],
                ("boil/4", "b"): [1.0],
                ("boil/4", "d"): [1.0],
                ("boil/5", "d"): [None],
            },
            "a",
            1,
        ),
        (  # equals: 0.1 + 0.2 and 0.3 are the same; the last in the alphabet
            {
                ("boil/1", "a"): [0.6],
                ("boil/1", "b"): [0.2],
                ("boil/2", "b"): [0.8],
                ("boil/2", "a"): [0.4],
            },
            "b",
            2,
        ),
    ],
)
def test_the_best_plan_of_a_type(tmp_path, scores, best, source):
    instruction = f"Find the lamp of corridor {source}."
    for rewritten in (False, True):
        write_scores(tmp_path, scores, rewritten)
        assert ev.best_of_types(str(tmp_path)) == {"boil": (best, instruction)}
    reordered = dict(reversed(list(scores.items())))
    write_scores(tmp_path, reordered)
    assert ev.best_of_types(str(tmp_path)) == {"boil": (best, instruction)}, "in any order"


FIND = "Your task is to find a(n) living thing. Then, move it to the {} box in the {}."
ROOM = "In the room are a {} 1, and a shelf 1.\n\nYour task is to: {}"


@pytest.mark.parametrize(
    ("source", "target", "plan", "adapted"),
    [
        (
            FIND.format("red", "kitchen"),
            FIND.format("green", "living room"),
            "Step 1: go to kitchen\nStep 2: move the living thing to red box",
            "Step 1: go to living room\nStep 2: move the living thing to green box",
        ),
        (
            FIND.format("red", "living room"),
            FIND.format("red", "art studio"),
            "Step 1: go to Living Room\nStep 2: move the living thing to red box",
            "Step 1: go to art studio\nStep 2: move the living thing to red box",
        ),
        (  # the two names change places
            FIND.format("red", "kitchen"),
            FIND.format("kitchen", "red"),
            "Step 1: go to kitchen, to the red box",
            "Step 1: go to red, to the kitchen box",
        ),
        (  # another article, preposition and room
            ROOM.format("desk", "put a cup in cabinet."),
            ROOM.format("bed", "put some cd on safe."),
            "Step 1: find a cup in the desk, not the cups\nStep 2: put it in cabinet",
            "Step 1: find a cd in the desk, not the cups\nStep 2: put it in safe",
        ),
        (  # the same words in another order
            ROOM.format("desk", "put a clean cup in cabinet."),
            ROOM.format("bed", "clean some fork and put it in drawer."),
            "Step 1: take the cup\nStep 2: clean the cup\nStep 3: put it in cabinet",
            "Step 1: take the fork\nStep 2: clean the fork\nStep 3: put it in drawer",
        ),
        (FIND.format("red", "kitchen"), FIND.format("red", "kitchen"), "go to kitchen", None),
        ("Find a red shoe.", "Find a shoe, and pay 30 dollars for it.", "Search red shoe", None),
    ],
)
def test_a_plan_in_the_words_of_another_task(source, target, plan, adapted):
    assert ev.adapted(plan, source, target) == (adapted or plan)


def test_one_plan_per_type(tmp_path, settings):
    """A type of which no plan was scored is played without one, which the report says. Other scores
    are other plans. Without any score nothing is asked."""
    usual = {**settings, "splits": ["seen"], "plans": ["none", "per_type,per_type_adapted"]}
    with pytest.raises(InputError, match=f"--plans per_type: {tmp_path} has no plans with scores"):
        ev.main(ev.Args(**usual))
    assert not (tmp_path / "eval").exists()
    plan = "Step 1: walk on in corridor 3"
    scores = {("find-lamp/3", plan): [0.5], ("find-lamp/3", "Step 1: wait"): [0.0]}
    write_scores(tmp_path, scores)
    ev.main(ev.Args(**usual))
    rows = read_rows(tmp_path / "eval" / "plans.jsonl")
    assert len(rows) == 2 * 8
    for row in rows:
        kind, number = row["task"].split("/")
        if kind == "find-key":
            assert row["plan"] is None and row["reason"] == "no plan of its type"
        elif row["setting"] == "per_type":
            assert row["plan"] == plan and "reason" not in row
        else:
            assert row["plan"] == f"Step 1: walk on in corridor {number}"
    note = "4 tasks were played without a plan of '{}': no plan of their type was sampled."
    for name in ("one plan per type", "one per type, adapted"):
        assert note.format(name) in (tmp_path / "table3.md").read_text()
    played = read_rows(tmp_path / "eval" / "rollouts.jsonl")
    assert len(played) == 8 + 2 * 4, "without a plan once"
    ev.main(ev.Args(**usual))
    assert len(read_rows(tmp_path / "eval" / "rollouts.jsonl")) == len(played)

    write_scores(tmp_path, scores | {("find-lamp/3", "Step 1: wait"): [None, 1.0]})
    ev.main(ev.Args(**usual))
    later = read_rows(tmp_path / "eval" / "plans.jsonl")[len(rows) :]
    assert {r["plan"] for r in later} == {"Step 1: wait", None} and len(later) == len(rows)
