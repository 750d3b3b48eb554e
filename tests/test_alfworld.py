"""ALFWorld: patched TextWorld beside the stock one, both dialects, the expert, bad games."""

import asyncio
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, check_run, stage
from test_examples import examples_of, turns

import common
from common import EnvPool, InputError, task_type

pytest.importorskip("alfworld")
ALFWorld = common.environment("alfworld")
DATA = Path(os.environ.get("ALFWORLD_DATA") or "~/.cache/alfworld").expanduser()
pytestmark = pytest.mark.skipif(
    not (DATA / ALFWorld.FOLDER).is_dir(),
    reason=f"no ALFWorld games in {DATA}: make data ENV=alfworld",
)


@pytest.fixture(scope="module")
def tasks() -> dict[str, list[str]]:
    return {split: ALFWorld().tasks(split) for split in ALFWorld.SPLITS}


@pytest.fixture(autouse=True)
def own_games():
    yield
    ALFWorld.games.cache_clear()


def folder(task: str) -> Path:
    return next(games[task] for games in ALFWorld.games().values() if task in games)


def game(task: str) -> Path:
    return folder(task) / "game.tw-pddl"


def test_splits(tasks):
    sizes = {split: len(found) for split, found in tasks.items()}
    assert sizes == {"train": 3553, "seen": 140, "unseen": 134}
    assert len(set().union(*tasks.values())) == sum(sizes.values())
    for found in tasks.values():
        assert set(map(task_type, found[:6])) == set(ALFWorld.MAX_STEPS), "one of each type"
    assert ALFWorld().tasks("seen") == tasks["seen"], "the order is fixed"


def old_dialect(command: str, draw: random.Random) -> str:
    """A command in the words of the papers' prompts, written as a careless model would."""
    command = re.sub(
        r"^move (.+?) to (.+)", rf"put \1 {draw.choice(['in/on', 'in', 'on'])} \2", command
    )
    command = draw.choice([str, str.capitalize, str.upper])(re.sub("^use ", "toggle ", command))
    return draw.choice(["{}", "{}.", '"{}"', " {} ", "'{}.'"]).format(command)


def check_walkthroughs(chosen: list[str]) -> None:
    """The games' own walkthroughs succeed in both dialects, and nothing is said as TextWorld
    does."""
    env = ALFWorld()
    draw = random.Random(0)
    assert set(map(task_type, chosen)) == set(ALFWorld.MAX_STEPS)
    for task in chosen:
        u = env.reset(task)
        assert u.startswith("You are in the middle of a room.") and "Welcome" not in u
        assert "\nYour task is to: " in u
        commands = env._walkthrough()
        for spoken in (commands, [old_dialect(command, draw) for command in commands]):
            env.reset(task)
            for i, command in enumerate(spoken, 1):
                observation, reward, done, success = env.step(command)
                assert "You arrive" not in observation and not env.failed(observation), command
                won = i == len(commands)
                assert (reward, done, success) == (float(won), won, won)
    assert env.step("dance") == ("Nothing happens.", 1.0, True, True)


def test_walkthroughs_in_both_dialects(tasks):
    check_walkthroughs(tasks["seen"][:6])


@pytest.mark.slow
def test_walkthroughs_of_forty_games(tasks):
    check_walkthroughs(tasks["seen"][:20] + tasks["unseen"][:20])


def start_stock_environment(jobs: list[str]) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "stock_env.py")],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    process.stdin.write("".join(jobs))
    process.stdin.close()
    return process


@pytest.mark.slow
def test_same_as_the_stock_environment(tasks):
    """Twenty games, the smaller ones of every type, with random actions: introduction,
    observations, rewards and admissible commands are those of unpatched TextWorld."""
    smallest = sorted(
        tasks["seen"][:40] + tasks["unseen"][:40], key=lambda t: game(t).stat().st_size
    )
    columns = []
    for kind in ALFWorld.MAX_STEPS:
        columns.append([task for task in smallest if task_type(task) == kind][:4])
    chosen = common.interleaved(columns)[:20]
    jobs = []
    for seed, task in enumerate(chosen):
        jobs.append(json.dumps({"game": str(game(task)), "steps": 30, "seed": seed}) + "\n")
    stock = [start_stock_environment(jobs[0::2]), start_stock_environment(jobs[1::2])]
    env = ALFWorld()
    steps = 0
    for i, task in enumerate(chosen):
        theirs = json.loads(stock[i % 2].stdout.readline())
        banner = "-= Welcome to TextWorld, ALFRED! =-\n\n"
        assert env.reset(task) == theirs["intro"].removeprefix(banner)
        for action, observation, reward, done, admissible in theirs["rows"]:
            ours = env.step(action)
            assert ours[:3] == (re.sub(r"^You arrive at .*?\. ", "", observation), reward, done)
            assert env.state.admissible_commands == admissible
            steps += 1
    assert steps > 400
    for process in stock:
        assert process.wait() == 0


@pytest.mark.parametrize(
    "said, meant",
    [
        ("put mug 1 in/on desk 2", "move mug 1 to desk 2"),
        ("Toggle desklamp 1.", "use desklamp 1"),
        ("place cd 3 on the bed", "move cd 3 to the bed"),
        ("'go to shelf 1'", "go to shelf 1"),
        ("use desklamp 1 with cd 2", "use desklamp 1"),
        ("LOOK", "look"),
    ],
)
def test_meanings(said, meant):
    assert ALFWorld.meanings(said)[0] == meant


def test_expert(tasks):
    """It solves a game of each type; its actions, in the prompt's words, succeed again."""
    env = ALFWorld()
    check_plan = stage("01_seed_plans").check_plan
    for task in tasks["train"][:6]:
        e = env.expert(task)
        assert e["reward"] == 1.0 and e["by"] in ("search", "walkthrough")
        assert len(e["steps"]) <= 30
        assert not any(a.startswith(("move ", "use ", "look")) for a, _ in e["steps"])
        assert env.reset(task) == e["instruction"]
        for action, observation in e["steps"]:
            said, _, _, success = env.step(action)
            assert said == observation
        assert success
        plan = common.number_steps(env.abstract(e["instruction"], e["steps"]))
        assert check_plan(plan, ALFWorld.VERBS) is None, plan
    assert env.expert(task) == e, "the same every time"


def test_plan_names_every_kind_of_place_that_was_searched():
    actions = (
        "go to drawer 1; open drawer 1; close drawer 1; go to shelf 1; go to drawer 2; "
        "open drawer 2; take mug 1 from drawer 2; go to sofa 1; go to fridge 1; open fridge 1; "
        "put mug 1 in/on fridge 1"
    )
    steps = [[action, ""] for action in actions.split("; ")]
    assert ALFWorld.abstract("Your task is to: put a mug in fridge.", steps) == [
        "go to where the mug may be, such as the drawer or the shelf",
        "take the mug",
        "go to the fridge",
        "open the fridge",
        "put the mug in/on the fridge",
    ]


def test_the_examples_take_what_the_task_names():
    for kind, example in examples_of("alfworld").items():
        u, found = turns(example)
        wanted = u.split("Your task is to: ")[1]
        taken = [action.split()[1] for _, action, _ in found if action.startswith("take ")]
        assert len(taken) == (2 if " two " in wanted else 1), kind
        assert all(re.search(rf"\b{thing}\b", wanted) for thing in taken), kind


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALFWorld.MAX_STEPS)
def test_the_examples_are_what_a_game_says(tasks, kind):
    """A train game of the type answers the actions of the example as the example says."""
    u, found = turns(examples_of("alfworld")[kind])
    wanted = u.split("Your task is to: ")[1]
    env = ALFWorld()
    candidates = [task for task in tasks["train"] if task_type(task) == kind]
    task = next(t for t in candidates if wanted in game(t).read_text() and env.reset(t) == u)
    env.reset(task)
    for _, action, observation in found:
        said, _, _, success = env.step(action)
        assert said == observation
    assert success


def test_sessions_of_a_process_do_not_affect_each_other(tasks):
    """Two games interleaved on one worker, with the same library underneath."""
    first, second = tasks["seen"][:2]

    async def main():
        async with EnvPool("alfworld", 1) as pool, pool.session() as a, pool.session() as b:
            alone = [await a("reset", first), *[await a("step", "look") for _ in range(3)]]
            mixed = [await a("reset", first)]
            for _ in range(3):
                await b("reset", second)
                await b("step", "go to cabinet 1")
                mixed.append(await a("step", "look"))
            return alone, mixed

    alone, mixed = asyncio.run(main())
    assert alone == mixed


@pytest.mark.slow
def test_stages(tasks, tmp_path, chat_server):
    """Stages 1, 3 and 5 from the command line, with a scripted planner and agent."""
    out = tmp_path / "run"
    listed = tmp_path / "tasks.json"
    listed.write_text(json.dumps([t.split("/") for t in tasks["seen"][:4]]))
    flags = ["--env", "alfworld", "--out", out, "--tasks", listed, "--workers", 2]
    said = check_run("01_seed_plans.py", *flags, "--teacher", "rules", "--plan_share", 1.0)
    assert "expert: 4 of 4 tasks solved" in said and "  look_at_obj_in_light 1 of 1 (" in said
    plans = {r["task"]: r["plan"] for r in common.read_rows(out / "seed_plans.jsonl")}
    experts = common.read_rows(out / "trajectories.jsonl")
    by_task = {e["task"]: e for e in experts}
    by_instruction = {e["instruction"]: e for e in experts}
    for row in common.read_rows(out / "agent_sft.jsonl"):
        spoken = [message["content"] for message in row["messages"][1::2]]
        assert spoken == [f"Action: {action}" for action, _ in by_task[row["task"]]["steps"]]

    def reply(messages, body):
        first = messages[0]["content"]
        e = by_instruction[max(by_instruction, key=first.rfind)]
        plan = plans[e["task"]]
        if "stop" not in body:  # the planner
            return common.plan_reply(plan if body["seed"] % 2 else "Step 1: go to the fridge")
        if plan not in first:
            return "I wonder."
        return f"Action: {e['steps'][len(messages) // 2][0].upper()}."

    url = chat_server(reply).url
    urls = ["--planner_url", url, "--agent_url", url]
    check_run("03_sample_score.py", *flags, *urls, "--m", 6, "--n", 1, "--limit", 3)
    pairs = common.read_rows(out / "pairs.jsonl")
    assert {(p["q_chosen"], p["q_rejected"]) for p in pairs} == {(1.0, 0.0)}
    check_run("05_eval.py", *flags, "--agents", url, "--plans", "none", "--max_steps", 4)
    [result] = json.loads((out / "results.json").read_text())["results"]
    assert result["tasks"] == 4 and result["format_errors"] == 16 and result["ends"] == {"steps": 4}


# ---- bad games -----------------------------------------------------------------------------------


def test_bad_games_are_named_and_left_out(tasks, tmp_path, monkeypatch, capfd):
    copies = []
    for task in tasks["seen"][:5]:
        trial = folder(task)
        copy = tmp_path / ALFWorld.FOLDER / "valid_seen" / trial.parent.name / trial.name
        copies.append(shutil.copytree(trial, copy))
    _, truncated, no_game, no_data, unsolvable = copies
    whole = (truncated / "game.tw-pddl").read_bytes()
    (truncated / "game.tw-pddl").write_bytes(whole[: len(whole) // 2])
    (no_game / "game.tw-pddl").unlink()
    (no_data / "traj_data.json").unlink()
    text = (unsolvable / "game.tw-pddl").read_text()
    (unsolvable / "game.tw-pddl").write_text(text.replace('"solvable": true', '"solvable": false'))
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    ALFWorld.games.cache_clear()
    env = ALFWorld()
    assert env.tasks("seen") == tasks["seen"][:1]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("left out: ") for line in lines)
    reasons = {
        truncated: "incomplete",
        no_game: "No such file",
        no_data: "traj_data.json",
        unsolvable: "solvable",
    }
    for where, reason in reasons.items():
        assert any(str(where) in line and reason in line for line in lines), lines

    data = json.loads(whole)
    rules = data["grammar"].replace('"task"', '"chore"')
    other_rules = json.dumps({**data, "grammar": rules})
    no_problem = json.dumps({**data, "pddl_problem": "(define (problem p)"})
    for bad in (whole[: len(whole) // 2].decode(), "", "[]", other_rules, no_problem):
        (truncated / "game.tw-pddl").write_text(bad)
        with pytest.raises(InputError, match=f"{truncated}.*cannot be played.*make data"):
            env.reset(tasks["seen"][1])
    assert env.reset(tasks["seen"][0]), "the session still works"
    with pytest.raises(InputError, match="unknown ALFWorld task"):
        env.reset("pick_and_place_simple/trial_none")


def test_no_games(tmp_path, monkeypatch):
    (tmp_path / "json_2.1.0").mkdir()
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    ALFWorld.games.cache_clear()
    with pytest.raises(InputError, match=r"no ALFWorld games .*json_2\.1\.0 only.*make data"):
        ALFWorld().tasks("train")
