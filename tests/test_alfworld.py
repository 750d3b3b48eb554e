"""ALFWorld: our engine against the stock one, both dialects, the expert, bad games, and rollouts of a scripted agent."""

import asyncio
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, check_run, run_script

import common
from common import (
    NO_ACTION,
    AlfredGame,
    ALFWorld,
    EnvPool,
    InputError,
    Model,
    Prompts,
    RolloutConfig,
    check_plan,
    rollouts,
    task_type,
)

pytest.importorskip("alfworld")
DATA = Path(os.environ.get("ALFWORLD_DATA") or "~/.cache/alfworld").expanduser()
pytestmark = pytest.mark.skipif(not (DATA / ALFWorld.FOLDER).is_dir(), reason=f"no ALFWorld games in {DATA}: make data")


@pytest.fixture(scope="module")
def tasks() -> dict[str, list[str]]:
    return {split: ALFWorld().tasks(split) for split in ALFWorld.SPLITS}


@pytest.fixture(scope="module")
def forty(tasks) -> list[str]:
    """20 tasks of each test split, all six types."""
    return [t for pair in zip(tasks["seen"][:20], tasks["unseen"][:20], strict=True) for t in pair]


def folder(task: str) -> Path:
    return next(games[task] for games in ALFWorld.games().values() if task in games)


def prompt_view(stock: str) -> str:
    """What the stock environment says, without the banner and the prefix that agents are not shown."""
    return re.sub(r"^You arrive at .*?\. ", "", stock.removeprefix("-= Welcome to TextWorld, ALFRED! =-\n\n"))


def test_splits(tasks):
    assert {split: len(ts) for split, ts in tasks.items()} == {"train": 3553, "seen": 140, "unseen": 134}
    assert len({t for ts in tasks.values() for t in ts}) == 3553 + 140 + 134
    for ts in tasks.values():
        assert {task_type(t) for t in ts[:6]} == set(ALFWorld.MAX_STEPS), "the first tasks are one of each type"
    assert ALFWorld().tasks("seen") == tasks["seen"], "the order is fixed"
    with pytest.raises(InputError, match="unknown split"):
        ALFWorld().tasks("test")


def old_dialect(command: str, draw: random.Random) -> str:
    """A command in the words of the papers' prompts, written as a careless model would."""
    command = re.sub(r"^move (.+?) to (.+)", rf"put \1 {draw.choice(['in/on', 'in', 'on'])} \2", command)
    command = re.sub(r"^use ", "toggle ", command)
    return draw.choice(["{}", "{}.", '"{}"', " {} ", "'{}.'"]).format(draw.choice([str, str.capitalize, str.upper])(command))


def test_walkthroughs_win_in_both_dialects(forty):
    assert {task_type(t) for t in forty} == set(ALFWorld.MAX_STEPS)
    env, draw = ALFWorld(), random.Random(0)
    for task in forty:
        u = env.reset(task)
        assert u.startswith("You are in the middle of a room.") and "\nYour task is to: " in u and "Welcome" not in u
        for speak in (str, lambda command: old_dialect(command, draw)):
            env.reset(task)
            for i, command in enumerate(env.game.walkthrough, 1):
                observation, reward, done, success = env.step(speak(command))
                assert "You arrive" not in observation and "Nothing happens" not in observation, (task, speak(command))
                won = i == len(env.game.walkthrough)
                assert (reward, done, success) == (float(won), won, won), (task, command)


def test_same_as_the_stock_environment(forty):
    # 20 of the forty, the smaller games of every type: the stock environment takes its time
    sizes = {task: (folder(task) / "game.tw-pddl").stat().st_size for task in forty}
    ranked = [sorted((t for t in forty if task_type(t) == kind), key=sizes.get)[:4] for kind in ALFWorld.MAX_STEPS]
    games = {task: str(folder(task) / "game.tw-pddl") for column in itertools.zip_longest(*ranked) for task in column if task}
    games = dict(list(games.items())[:20])
    assert len(games) == 20 and {task_type(t) for t in games} == set(ALFWorld.MAX_STEPS)
    jobs = [json.dumps({"game": path, "steps": 30, "seed": i}) + "\n" for i, path in enumerate(games.values())]
    stock = [subprocess.Popen([sys.executable, str(ROOT / "tests" / "stock_env.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True) for _ in range(2)]
    try:
        for i, process in enumerate(stock):
            process.stdin.write("".join(jobs[i::2]))
            process.stdin.close()
        found = {}
        for process in stock:
            for line in process.stdout:
                row = json.loads(line)
                found[row["name"]] = row
    finally:
        for process in stock:
            process.kill()
            process.wait()
    assert set(found) == set(games.values())
    env = ALFWorld()
    for task, path in games.items():
        assert env.reset(task) == prompt_view(found[path]["intro"])
        assert len(found[path]["rows"]) == 30
        for action, observation, score, done, admissible in found[path]["rows"]:
            assert env.step(action)[:3] == (prompt_view(observation), score, done), (task, action)
            assert sorted(env.game.commands(env.here)) == admissible, (task, action)


def random_play(env, task: str, seed: int, steps: int = 15):
    """Plays random actions and yields after each; what was said is in the list it yields."""
    draw, said = random.Random(seed), [env.reset(task)]
    for _ in range(steps):
        action = draw.choice(sorted(env.game.commands(env.here)))
        said.append([action, *env.step(action)])
        yield said


def test_sessions_do_not_disturb_each_other(tasks, monkeypatch):
    """Sessions that take turns in one process, with one engine for all of them and a table that is dropped
    again and again, see what each sees alone."""
    jobs = [(task, seed) for seed in range(3) for task in tasks["seen"][:3]]
    alone = [[*random_play(ALFWorld(), *job)][-1] for job in jobs]
    monkeypatch.setattr(AlfredGame, "ENGINES", 1)
    monkeypatch.setattr(AlfredGame, "MAX_STATES", 4)
    monkeypatch.setattr(AlfredGame, "engines", [])
    ALFWorld._load.cache_clear()
    players = [random_play(ALFWorld(), *job) for job in jobs]
    together = [None] * len(jobs)
    for _ in range(15):
        together = [next(p) for p in players]
    assert together == alone and len(AlfredGame.engines) == 1
    ALFWorld._load.cache_clear()


@pytest.mark.parametrize("said, meant", [
    ("put mug 1 in/on desk 2", "move mug 1 to desk 2"), ("put mug 1 in desk 2", "move mug 1 to desk 2"),
    ("Put mug 1 on desk 2.", "move mug 1 to desk 2"), ("move mug 1 to desk 2", "move mug 1 to desk 2"),
    ("toggle desklamp 1", "use desklamp 1"), ("use desklamp 1", "use desklamp 1"), ("toggle desklamp 1 desk 1", "use desklamp 1"),
    ('"Go to cabinet 4."', "go to cabinet 4"), ("GO TO  cabinet 4", "go to cabinet 4"), ("clean mug 1 with sinkbasin 1",) * 2])
def test_dialects(said, meant):
    assert ALFWorld.meanings(said)[0] == meant
    if meant.startswith(("move", "use")):
        assert ALFWorld.meanings(ALFWorld.spoken(meant)) == ALFWorld.meanings(said), "the prompt's words mean the same"


def test_games_of_the_old_version(tasks, tmp_path, monkeypatch):
    """Games whose grammar still says `put X in/on Y` and `toggle X` understand both dialects too."""
    for kind in ("pick_and_place_simple", "look_at_obj_in_light"):
        task = next(t for t in tasks["seen"] if task_type(t) == kind)
        new = tmp_path / ALFWorld.FOLDER / "valid_seen" / folder(task).parent.name / folder(task).name
        shutil.copytree(folder(task), new)
        game = new / "game.tw-pddl"
        data = json.loads(game.read_text())
        data["grammar"] = data["grammar"].replace("move {o} to {r}", "put {o} in/on {r}").replace('"use {o}"', '"toggle {o}"')
        game.write_text(json.dumps(data))
    other_games(tmp_path, monkeypatch)
    env = ALFWorld()
    assert len(env.tasks("seen")) == 2
    for task in env.tasks("seen"):
        for speak in (str, ALFWorld.spoken):
            env.reset(task)
            assert not any(c.startswith(("move", "use")) for c in env.game.commands(env.here))
            results = [env.step(speak(command)) for command in env.game.walkthrough]
            assert results[-1][1:] == (1.0, True, True)


def test_expert(tasks):
    """Trajectories of the hand-coded expert: in the prompt's words, within the step limit, and when they
    are replayed they win. Its plans pass quality control and name no instance."""
    env = ALFWorld()
    for task in tasks["train"][:12]:
        e = env.expert(task)
        assert e and e["reward"] == 1.0 and 2 <= len(e["steps"]) <= 30 and e["by"] in ("search", "walkthrough"), task
        assert env.expert(task) == e, "the same every time"
        assert env.reset(task) == e["instruction"]
        for action, observation in e["steps"]:
            assert action.split()[0] in "go take put open close toggle clean heat cool".split()
            said, reward, done, success = env.step(action)
            assert said == observation
        assert (reward, done, success) == (1.0, True, True)
        plan = env.abstract(e["instruction"], e["steps"])
        assert check_plan(common.number_steps(plan), ALFWorld.VERBS) is None and not re.search(r"\d", " ".join(plan)), plan
        assert plan[0].startswith("go to where the ") and len(plan) <= len(e["steps"]) + 1


def test_rules_teacher_searches():
    u = "You are in the middle of a room.\n\nYour task is to: put two mug in cabinet."
    steps = [["go to shelf 1", "nothing"], ["go to drawer 2", "closed"], ["open drawer 2", "a mug 3"], ["take mug 3 from drawer 2", ""],
             ["go to cabinet 1", ""], ["put mug 3 in/on cabinet 1", ""], ["go to desk 1", ""], ["take mug 1 from desk 1", ""],
             ["go to cabinet 1", ""], ["put mug 1 in/on cabinet 1", ""]]
    assert ALFWorld.abstract(u, steps) == [
        "go to where the first mug may be, such as the drawer", "open the drawer", "take the first mug from the drawer",
        "go to the cabinet", "put the first mug in/on the cabinet", "go to where the second mug may be, such as the desk",
        "take the second mug from the desk", "go to the cabinet", "put the second mug in/on the cabinet"]


def test_rollouts(tasks, chat_server):
    """The project's own rollout code, two workers: the expert's actions win, a reply without an action is told
    so and counted, and an agent that does not know what to do fails within the step limit."""
    chosen, env = tasks["unseen"][:6], ALFWorld()
    experts = {task: env.expert(task) for task in chosen}
    instructions = {e["instruction"]: task for task, e in experts.items()}
    assert len(instructions) == len(chosen)

    def reply(messages, body):
        first, step = messages[0]["content"], sum(m["role"] == "assistant" for m in messages)
        task = instructions[max(instructions, key=first.rfind)]
        if "meta plan" in first.split("---")[1]:
            return "I would rather not." if step == 0 else f"Thought: next.\nAction: {experts[task]['steps'][step - 1][0]}"
        return "Action: go to cabinet 99" if step % 2 else "Action: look"

    server, rows = chat_server(reply), []
    jobs = [{"task": task, "plan": plan, "rollout": i} for task in chosen for plan in ("Step 1: go to the shelf", None) for i in range(2)]

    async def main():
        async with EnvPool("alfworld", 2) as pool:
            c = RolloutConfig(Prompts("alfworld"), 0.0, 64, 0, 0)
            retries = await rollouts(jobs, Model(None, server.url), pool, "alfworld", c, 12, rows.append)
            return retries, [w.live for w in pool.workers], len(pool.homes)

    assert asyncio.run(main()) == (0, [0, 0], len(chosen))
    assert len(rows) == len(jobs)
    for row in rows:
        if row["plan"]:
            assert row["end"] == "success" and row["reward"] == 1.0 and row["format_errors"] == 1
            assert row["steps"][0] == ["I would rather not.", NO_ACTION] and len(row["steps"]) == len(experts[row["task"]]["steps"]) + 1
        else:
            assert row["end"] == "steps" and row["reward"] == 0.0 and len(row["steps"]) == 30
            assert row["steps"][1][1] == "Nothing happens."


def test_stages(tasks, tmp_path, chat_server):
    """Stages 1, 3 and 5 on ALFWorld from the command line, with a scripted planner and agent."""
    out, listed = tmp_path / "run", tmp_path / "tasks.json"
    listed.write_text(json.dumps([t.split("/") for t in tasks["seen"][:4]]))
    said = check_run("01_seed_plans.py", "--env", "alfworld", "--out", out, "--teacher", "rules", "--tasks", listed, "--plan_share", 1.0)
    assert "expert: 4 of 4 tasks solved" in said and "  look_at_obj_in_light 1 of 1 (" in said
    trajectories = common.read_rows(out / "trajectories.jsonl")
    plans = {r["task"]: r["plan"] for r in common.read_rows(out / "seed_plans.jsonl")}
    gold = {r["instruction"]: r for r in trajectories}
    by_task = {e["task"]: e for e in trajectories}
    for row in common.read_rows(out / "agent_sft.jsonl"):
        e = by_task[row["task"]]
        assert plans[e["task"]] in row["messages"][0]["content"]
        spoken = [m["content"] for m in row["messages"][1::2]]
        assert spoken == [f"Action: {a}" for a, _ in e["guided"]], "it acts as one who knows the plan"
        assert len(e["guided"]) <= len(e["steps"])
        game = ALFWorld()
        game.reset(row["task"])
        assert [game.step(common.parse_action(said))[3] for said in spoken][-1], "what the agent is trained to say wins the game again"

    def reply(messages, body):
        first = messages[0]["content"]
        e = gold[max(gold, key=first.rfind)]
        if "<meta_plan>" in first:
            return common.plan_reply(plans[e["task"]] if body["seed"] is None or body["seed"] % 2 else "Step 1: go to the fridge")
        return f"Action: {e['guided'][len(messages) // 2][0].upper()}." if plans[e["task"]] in first else "I do not know."

    server = chat_server(reply)
    common_flags = ["--env", "alfworld", "--out", out, "--tasks", listed, "--workers", 2]
    check_run("03_sample_score.py", *common_flags, "--planner_url", server.url, "--agent_url", server.url, "--m", 6, "--n", 1, "--limit", 3)
    pairs = common.read_rows(out / "pairs.jsonl")
    assert pairs and all(p["q_chosen"] == 1.0 and p["q_rejected"] == 0.0 for p in pairs)
    check_run("05_eval.py", *common_flags, "--agents", server.url, "--plans", "none", "--max_steps", 4)
    [result] = json.loads((out / "results.json").read_text())["results"]
    assert result["tasks"] == 4 and result["reward"]["mean"] == 0.0 and result["format_errors"] == 16 and result["ends"] == {"steps": 4}


# ---- bad games -----------------------------------------------------------------------------------


def other_games(path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ALFWORLD_DATA", str(path))
    ALFWorld.games.cache_clear()
    ALFWorld._load.cache_clear()


@pytest.fixture(autouse=True)
def own_games_again():
    yield
    ALFWorld.games.cache_clear()


def test_bad_games_are_named_and_left_out(tasks, tmp_path, monkeypatch, capfd):
    good, *bad = [folder(t) for t in tasks["seen"][:5]]
    new = {f: tmp_path / ALFWorld.FOLDER / "valid_seen" / f.parent.name / f.name for f in (good, *bad)}
    for old, copy in new.items():
        shutil.copytree(old, copy)
    truncated, no_game, no_data, unsolvable = (new[f] for f in bad)
    whole = (truncated / "game.tw-pddl").read_bytes()
    (truncated / "game.tw-pddl").write_bytes(whole[: len(whole) // 2])
    (no_game / "game.tw-pddl").unlink()
    (no_data / "traj_data.json").unlink()
    text = (unsolvable / "game.tw-pddl").read_text()
    (unsolvable / "game.tw-pddl").write_text(text.replace('"solvable": true', '"solvable": false'))
    other_games(tmp_path, monkeypatch)
    env = ALFWorld()
    assert env.tasks("seen") == tasks["seen"][:1]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("left out: ") for line in lines)
    for where, reason in ((truncated, "not whole"), (no_game, "No such file"), (no_data, "traj_data.json"), (unsolvable, "solvable")):
        assert any(str(where) in line and reason in line for line in lines), lines

    def refused(content: bytes) -> str:
        (truncated / "game.tw-pddl").write_bytes(content)
        ALFWorld._load.cache_clear()
        with pytest.raises(InputError) as error:
            env.reset(tasks["seen"][1])
        return str(error.value)

    assert "is not whole" in refused(whole[: len(whole) // 2]) and "is not whole" in refused(b"")
    data = json.loads(whole)
    assert "'grammar'" in refused(json.dumps({k: v for k, v in data.items() if k != "grammar"}).encode())
    assert "states no task" in refused(json.dumps({**data, "grammar": data["grammar"].replace('"task"', '"chore"')}).encode())
    assert "cannot be translated" in refused(json.dumps({**data, "pddl_problem": "(define (problem p)"}).encode())
    assert "another version" in refused(b"[]")
    with pytest.raises(InputError, match="unknown ALFWorld task"):
        env.reset("pick_and_place_simple/trial_none")


def test_no_games(tmp_path):
    def first_line(data):
        result = run_script("01_seed_plans.py", "--env", "alfworld", "--teacher", "rules", "--out", tmp_path / "run",
                            env={"ALFWORLD_DATA": str(data)})
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
        return result.stderr.strip().splitlines()[-1]

    assert "no ALFWorld games" in first_line(tmp_path / "none") and "make data" in first_line(tmp_path / "none")
    (tmp_path / "json_2.1.0").mkdir()
    assert "has json_2.1.0 only" in first_line(tmp_path)
