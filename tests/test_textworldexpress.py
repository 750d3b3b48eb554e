"""TextWorldExpress: beside the package's own environment, the expert, the rules teacher."""

import asyncio

import pytest
from conftest import stage
from test_examples import examples_of, turns

import common
from common import EnvPool, InputError, task_type

package = pytest.importorskip("textworld_express")
World = common.environment("textworldexpress")
seed = stage("01_seed_plans")
TASKS = [f"{game}/{number}" for number in (0, 20000) for game in World.GAMES]
HELD_OUT = [f"{game}/{number}" for number in (10003, 20001) for game in World.GAMES]
IN_VAIN = ["dance on the moon", "look around", "inventory", "take unicorn", ""]


async def transcript(env, task, actions) -> list:
    """All that a session says while it plays `actions`; others play in between."""
    said = [await env("reset", task)]
    for action in actions:
        observation, reward, done, success = await env("step", action)
        said.append((observation, reward, success))
        if done:
            break
    return said


def stock_transcript(env, task: str, actions: list[str]) -> list:
    game, number = task.split("/")
    fold = {"0": "train", "1": "dev", "2": "test"}[number[0] if len(number) == 5 else "0"]
    first, infos = env.reset(int(number), fold, game, World.GAMES[game])
    said = [f"{first.strip()}\n{infos['taskDescription']}"]
    for action in actions:
        observation, _, done, infos = env.step(action)
        said.append((observation.strip(), infos["score"], infos["tasksuccess"]))
        if done:
            break
    return said


@pytest.mark.slow
def test_same_as_the_stock_environment():
    """On held-out seeds: same observations and scores, whoever else plays in the same JVM."""
    stock = package.TextWorldExpressEnv(envStepLimit=1000)
    wanted = {}
    played = {}
    for task in HELD_OUT:
        game, number = task.split("/")
        stock.reset(
            int(number), "dev" if number[0] == "1" else "test", game, World.GAMES[game], True
        )
        actions = stock.getGoldActionSequence()
        for place, action in enumerate(IN_VAIN):
            actions.insert(2 * place, action)
        played[task] = actions
        wanted[task] = stock_transcript(stock, task, actions)
    assert all(said[-1][1:] == (1.0, True) for said in wanted.values())

    async def main():
        async with EnvPool("textworldexpress", 1) as pool:

            async def play(task):
                async with pool.session() as env:
                    return await transcript(env, task, played[task])

            return await asyncio.gather(*[play(task) for task in HELD_OUT])

    assert dict(zip(HELD_OUT, asyncio.run(main()), strict=True)) == wanted


@pytest.mark.slow
def test_the_expert_and_its_plans():
    """It succeeds within the step limit, each time in the same way, and nothing is in vain."""

    async def experts(tasks):
        async with EnvPool("textworldexpress", 1) as pool:
            return await pool.each(tasks, "expert")

    found = asyncio.run(experts(TASKS))
    again = asyncio.run(experts(TASKS[:3]))
    assert again == {task: found[task] for task in again}
    for task, e in found.items():
        actions = [action for action, _ in e["steps"]]
        assert e["reward"] == 1.0 and 0 < len(actions) <= World.max_steps(task), task
        assert not any(World.failed(observation) for _, observation in e["steps"])
        assert "look around" not in actions
        reads = any(action.startswith("read ") for action in actions)
        assert reads == (task_type(task) not in ("twc", "sorting"))
        plan = common.number_steps(World.abstract(e["instruction"], e["steps"]))
        assert seed.check_plan(plan, World.VERBS) is None, plan


@pytest.mark.parametrize(
    "u, steps, plan",
    [
        (
            "You see an oven, and a counter that has a knife. Let's cook a delicious meal.",
            "read cookbook; take knife; take red apple; open fridge; take salt; dice red apple; "
            "cook red apple in oven; prepare meal",
            "read cookbook; take knife; open fridge; take each ingredient of the recipe; "
            "slice, dice or chop what the recipe says; "
            "cook in the oven what the recipe says to roast; prepare meal",
        ),
        (
            "A wardrobe, and a shirt. To the South you see the hall. Put the objects away.",
            "take shirt; open wardrobe; put shirt in wardrobe; move south > hall; take cup; "
            "open fridge; put cup in fridge; put shirt in fridge",
            "take shirt; open wardrobe; put shirt in wardrobe; go to the hall; "
            "take the other object; open its usual place; "
            "put the other object in its usual place; put shirt in its usual place",
        ),
        (
            "The coin is in the bar, the box in the hall. A map is provided.",
            "read map; move east > den; move west > bar; take coin; move east > hall; "
            "put coin in box",
            "read map; go to the bar; take coin; go to the hall; put coin in box",
        ),
        (
            "Your task is to sort objects by quantity, and repeat until all are in the box.",
            "take 2kg of oak; put 2kg of oak in box; take 3kg of tin; put 3kg of tin in box",
            "take the smallest quantity that is not in the box; put it in the box; "
            "repeat until the task is completed",
        ),
        (
            "Solve the math problem. 3 pears, box.",
            "take math problem; read math problem; take 3 pears; put 3 pears in box",
            "take math problem; read math problem; take the objects whose number is the answer; "
            "put them in the box",
        ),
    ],
)
def test_what_a_plan_tells(u, steps, plan):
    """What the task says or shows; not what is found out only by playing it."""
    if "meal" in u:
        plan = plan.replace("open fridge", "open its usual place")
    played = []
    for step in steps.split("; "):
        action, _, room = step.partition(" > ")
        played.append([action, f"You are in the {room}. You see a cup." if room else "Done."])
    assert World.abstract(u, played) == plan.split("; ")


def test_tasks():
    env = object.__new__(World)  # without a JVM
    every = []
    for split in World.SPLITS:
        tasks = env.tasks(split)
        assert {task_type(task) for task in tasks[:6]} == set(World.GAMES)
        every += tasks
        for task in tasks:
            World.check(task)
    assert len(every) == len(set(every)) == 6 * 240
    for wrong in ("coin/0", "twc/1000", "twc/30000", "twc/21000", "twc/-1", "twc", "twc/1 "):
        with pytest.raises(InputError, match=f"unknown TextWorldExpress task '{wrong}': GAME/SEED"):
            World.check(wrong)


@pytest.mark.slow
def test_the_example_is_what_the_game_says():
    u, found = turns(examples_of("textworldexpress")["*"])

    async def main():
        async with EnvPool("textworldexpress", 1) as pool, pool.session() as env:
            return await transcript(env, "cookingworld/302", [action for _, action, _ in found])

    first, *said = asyncio.run(main())
    assert u == f"Task: {first}" and said[-1][1:] == (1.0, True)
    assert [observation for observation, _, _ in said] == [seen for _, _, seen in found]
