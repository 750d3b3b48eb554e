"""Scoring: rollouts, environment workers, model servers, Q(p) and pairs, the adaptive choice."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from bench import bench_adaptive
from conftest import CORRIDOR, ROOT, script_env, stage

import common
from common import (
    NO_ACTION,
    EnvPool,
    InputError,
    Prompts,
    RolloutConfig,
    WorkerDied,
    observation_message,
    rollouts,
)

score = stage("03_sample_score")


@pytest.fixture(autouse=True)
def few_retries(monkeypatch):
    monkeypatch.setenv("MPO_MAX_RETRIES", "2")


def expert_of(task: str) -> dict:
    return common.environment(CORRIDOR)().expert(task)


def tasks_of(split: str = "train") -> list[str]:
    return common.environment(CORRIDOR)().tasks(split)


def gold(messages, body=None) -> str:
    """An agent that acts as the expert of the task in its first message."""
    steps = {}
    for task in tasks_of():
        expert = expert_of(task)
        steps[expert["instruction"]] = expert["steps"]
    u = max(steps, key=messages[0]["content"].rfind)
    turn = [m["role"] for m in messages].count("assistant")
    action, _ = steps[u][turn]
    return f"Thought: I know.\nAction: {action}"


def pid_of(pool) -> int:
    return pool.workers[0].executor.process.pid


def jobs_of(tasks, n=1, plan=None):
    jobs = []
    for task in tasks:
        jobs += [{"task": task, "plan": plan, "rollout": number} for number in range(n)]
    return jobs


def play(url, jobs, concurrency=8, workers=1, pools=None, **config):
    """(rows, retries) of `rollouts` with the server at `url` as the agent."""
    rows = []

    async def main():
        async with EnvPool(CORRIDOR, workers) as pool:
            if pools is not None:
                pools.append(pool)
            c = RolloutConfig(Prompts(CORRIDOR), 0.0, 64, 0, 0, **config)
            model = common.Model("scripted", url)
            return await rollouts(jobs, model, pool, CORRIDOR, c, concurrency, rows.append)

    return rows, asyncio.run(main())


# ---- episodes ------------------------------------------------------------------------------------


def test_the_experts_actions_earn_the_reward(chat_server):
    server = chat_server(gold)
    tasks = tasks_of()[:4]
    rows, retries = play(server.url, jobs_of(tasks, plan="Step 1: look"), workers=2)
    assert sorted(r["task"] for r in rows) == sorted(tasks) and retries == 0
    for r in rows:
        e = expert_of(r["task"])
        assert r["success"] and r["end"] == "success" and r["reward"] == 1.0
        assert r["steps"] == [[f"Thought: I know.\nAction: {a}", o] for a, o in e["steps"]]
        assert r["format_errors"] == 0 and r["plan"] == "Step 1: look" and r["rollout"] == 0
        assert r["prompt_tokens"] == 7 * len(r["steps"])
        assert r["completion_tokens"] == 3 * len(r["steps"])
    assert all("Step 1: look" in body["messages"][0]["content"] for body in server.requests)
    longest = max((b["messages"] for b in server.requests), key=len)
    assert [m["role"] for m in longest[:3]] == ["user", "assistant", "user"]


def test_a_reply_without_an_action_is_a_step_that_says_so(chat_server):
    def reply(messages, body):
        said = [m for m in messages if m["content"] != "I wonder."]
        return gold(said) if len(messages) > 1 else "I wonder."

    server = chat_server(reply)
    task = tasks_of()[0]
    [[row], _] = play(server.url, jobs_of([task]))
    assert row["success"] and row["format_errors"] == 1
    assert len(row["steps"]) == len(expert_of(task)["steps"]) + 1
    assert row["steps"][0] == ["I wonder.", NO_ACTION]
    assert server.requests[1]["messages"][-1]["content"] == f"Observation: {NO_ACTION}"


@pytest.mark.parametrize(
    "counted, replies, steps",
    [
        (["You cannot"], ["Action: dance"], 10),
        (["You cannot"], ["Action: dance"] * 9 + ["I do not know."], 11),
        (["You cannot"], ["Action: dance"] * 9 + ["Action: walk on"], 30),
        (["You cannot"], ["I do not know."], 30),
        ([], ["Action: dance"], 30),
    ],
    ids=["ten", "no action between", "a valid action between", "no actions", "not counted"],
)
def test_ten_invalid_actions_in_a_row_end_an_episode(
    chat_server, monkeypatch, counted, replies, steps
):
    """Where the environment counts them. The replies are repeated from the first one on."""
    monkeypatch.setattr(common.environment(CORRIDOR), "COUNTED", tuple(counted))
    url = chat_server(lambda messages, body: replies[len(messages) // 2 % len(replies)]).url
    [[row], _] = play(url, jobs_of(tasks_of()[:1]), max_steps=30)
    assert row["end"] == ("errors" if steps < 30 else "steps")
    assert len(row["steps"]) == steps and row["reward"] < 1


def test_what_an_agent_is_asked(chat_server):
    """Its reply ends at a stop string; what it writes after its action is not kept."""
    server = chat_server(lambda messages, body: "Thought: on.\nAction: walk on\nI see a lamp.")
    [[row], _] = play(server.url, jobs_of(tasks_of()[:1]), max_steps=2)
    body = server.requests[-1]
    assert body["model"] == "scripted" and body["stop"] == ["\nObservation:", "\nTask:", "\n---"]
    assert body["temperature"] == 0.0 and body["max_tokens"] == 64
    assert "continue_final_message" not in body and isinstance(body["seed"], int)
    kept = "Thought: on.\nAction: walk on"
    assert [m["role"] for m in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][1]["content"] == kept == row["steps"][0][0]


def play_with_thought(server, plan: str) -> list[dict]:
    """The rows of an episode of two steps with the plan in the agent's thought."""
    rows = []

    async def main():
        c = RolloutConfig(Prompts(CORRIDOR), 0.0, 64, 0, 0, max_steps=2, plan_position="thought")
        jobs = jobs_of(tasks_of()[:1], plan=plan)
        async with EnvPool(CORRIDOR, 1) as pool:
            with common.open_model("m", server.url, SimpleNamespace(concurrency=2)) as model:
                await rollouts(jobs, model, pool, CORRIDOR, c, 1, rows.append)

    asyncio.run(main())
    return rows


@pytest.mark.parametrize(
    "owner, plan, text",
    [
        ("vllm", "I would go on.\nAction: walk on", "I wonder."),  # an untagged plan
        ("vllm", "Step 1: look. Action: walk on", ""),
        ("vllm", "**Action:**\nwalk on\nObservation: You see a lamp.", " Hm.\nThought: hm."),
        ("me", "I would go on.\nAction: walk on", "I wonder."),
        ("me", "I would go on.\nAction: walk on", ""),
    ],
)
def test_an_action_in_the_plan_is_never_played(chat_server, owner, plan, text):
    """The agent's replies hold no action: nothing moves, whatever the plan in its thought says."""
    server = chat_server(lambda messages, body: text)
    server.owner = owner
    [row] = play_with_thought(server, plan)
    assert row["format_errors"] == 2 and row["continued"] is (owner == "vllm")
    for said, observation in row["steps"]:
        assert observation == common.NO_ACTION and "walk" not in said


def test_a_plan_starts_every_thought_where_the_server_is_vllm(chat_server):
    """The server continues a message that was started (paper 5.2). Later turns are without it."""
    server = chat_server(lambda messages, body: " On.\nAction: walk on")
    server.owner = "vllm"
    rows = play_with_thought(server, "Step 1: walk")
    said = "Thought: On.\nAction: walk on"
    begun = "This meta plan may help you with the task:\nStep 1: walk\nThought:"
    first, second = server.requests
    for body in (first, second):
        assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
        assert body["messages"][-1] == {"role": "assistant", "content": begun}
        assert not any("Step 1" in message["content"] for message in body["messages"][:-1])
    assert len(first["messages"]) == 2 and len(second["messages"]) == 4
    assert second["messages"][1] == {"role": "assistant", "content": said}
    assert rows[0]["continued"] is True and rows[0]["steps"][0][0] == said


def test_the_step_limit(chat_server):
    url = chat_server(lambda messages, body: "Action: dance").url
    [[row], _] = play(url, jobs_of(tasks_of()[:1]), max_steps=4)
    assert row["end"] == "steps" and len(row["steps"]) == 4


def test_a_prompt_longer_than_the_context_ends_the_episode(chat_server):
    def reply(messages, body):
        too_long = "This model's maximum context length is 64 tokens. However, you requested 99."
        return (400, too_long) if len(messages) > 4 else "Action: dance"

    [[row], _] = play(chat_server(reply).url, jobs_of(tasks_of()[:1]))
    assert row["end"] == "context" and not row["success"] and len(row["steps"]) == 2


@pytest.mark.parametrize(
    "length, limit, kept", [(20, 10, "aaaaaaaaaa ..."), (10, 10, "a" * 10), (20, 0, "a" * 20)]
)
def test_long_observations_are_cut(length, limit, kept):
    assert observation_message("a" * length, limit)["content"] == f"Observation: {kept}"


# ---- environment workers -------------------------------------------------------------------------


def test_a_killed_worker_loses_nothing(chat_server):
    """SIGKILL to one of two workers in the middle of its episodes."""
    lock = threading.Lock()
    asked = []
    pools = []

    def reply(messages, body):
        with lock:
            asked.append(body)
            if len(asked) == 8:
                os.kill(pid_of(pools[0]), signal.SIGKILL)
        time.sleep(0.02)
        return gold(messages)

    rows, retries = play(chat_server(reply).url, jobs_of(tasks_of()[:4], 3), 6, 2, pools)
    keys = [(r["task"], r["rollout"]) for r in rows]
    assert len(set(keys)) == len(keys) == 12 and retries > 0
    assert all(r["end"] == "success" and r["reward"] == 1.0 for r in rows)


def test_an_episode_that_always_kills_its_worker_is_a_crash(chat_server):
    """After three attempts it has end "crash", and the other episodes go on."""
    first, second = tasks_of()[:2]
    pools = []

    def reply(messages, body):
        if expert_of(first)["instruction"] in messages[0]["content"]:
            os.kill(pid_of(pools[0]), signal.SIGKILL)
            time.sleep(0.2)
        return gold(messages)

    rows, retries = play(chat_server(reply).url, jobs_of([first, second]), 1, 1, pools)
    assert [(r["task"], r["end"]) for r in rows] == [(first, "crash"), (second, "success")]
    assert retries == 2 and "worker" in rows[0]["error"]


def test_a_worker_that_does_not_answer_is_replaced(monkeypatch):
    async def main():
        async with EnvPool(CORRIDOR, 1) as pool:
            async with pool.session() as env:
                u = await env("reset", tasks_of()[0])
                before = pid_of(pool)
                os.kill(before, signal.SIGSTOP)
                with pytest.raises(WorkerDied, match="did not answer step within 1 s"):
                    await env("step", "dance", deadline=1.0)
            async with pool.session() as env:
                assert await env("reset", tasks_of()[0]) == u and pid_of(pool) != before

    asyncio.run(main())


def test_errors_of_the_environment_cross_processes():
    async def main():
        async with EnvPool(CORRIDOR, 1) as pool, pool.session() as env:
            with pytest.raises(InputError, match="nowhere/1"):
                await env("reset", "nowhere/1")
            with pytest.raises(RuntimeError, match="AttributeError: .*no_such_method"):
                await env("no_such_method")

    asyncio.run(main())


@pytest.mark.parametrize(
    "content, error",
    [
        ('[["find-lamp", 3]', "tasks.json.*JSON"),
        ('{"find-lamp": 3}', "tasks.json.*JSON"),
        ("[3]", "tasks.json.*JSON"),
        ('[["find-unicorn", 3]]', "find-unicorn"),
        ("[]", "no tasks"),
        (None, "tasks.json.*No such file"),
    ],
)
def test_bad_task_files(tmp_path, content, error):
    path = tmp_path / "tasks.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=error):
        asyncio.run(common.list_tasks(None, CORRIDOR, "train", [str(path)], None, None))


def listed(split="train", types=None, limit=None) -> list[str]:
    async def main():
        async with EnvPool(CORRIDOR, 1) as pool:
            return await common.list_tasks(pool, CORRIDOR, split, [], types, limit)

    return asyncio.run(main())


def test_task_types_and_limit():
    tasks = listed()
    kind = common.task_type(tasks[0])
    assert listed(types=[kind], limit=1) == tasks[:1]


@pytest.mark.parametrize(
    "more, error",
    [
        ({"types": ["find-unicorn"]}, "find-unicorn.*find-lamp"),
        ({"limit": 0}, "--limit"),
        ({"split": "holdout"}, "holdout.*train"),
    ],
)
def test_bad_task_types_limit_and_split(more, error):
    with pytest.raises(InputError, match=error):
        listed(**more)


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_node(chat_server):
    """Workers on a Ray cluster of two nodes play the same episodes as local processes do, when one
    node is killed on the way."""
    pytest.importorskip("ray")

    def slow_gold(messages, body):
        time.sleep(0.1)
        return gold(messages)

    slow = chat_server(slow_gold)
    code = f"""
import asyncio, os, sys
sys.path.insert(0, {str(ROOT)!r})
import psutil
from ray.cluster_utils import Cluster
import common
from common import EnvPool, Prompts, RolloutConfig, environment, rollouts
env = {CORRIDOR!r}
tasks = environment(env)().tasks("train")[:4]
async def main(ray, kill):
    rows = []
    async with EnvPool(env, 2, 8, ray=ray) as pool:
        await pool.each(tasks, "reset")  # both workers have started, one on the node to lose
        jobs = [{{"task": t, "plan": None, "rollout": i}} for t in tasks for i in range(6)]
        c = RolloutConfig(Prompts(env), 0.0, 64, 0, 0)
        async def lose_a_node():
            while len(rows) < 4:
                await asyncio.sleep(0.02)
            kill()
        task = asyncio.create_task(lose_a_node()) if kill else None
        model = common.Model("scripted", {slow.url!r})
        retries = await rollouts(jobs, model, pool, env, c, 6, rows.append)
        if task:
            await task  # raises what went wrong in it
    return sorted([r["task"], r["rollout"], r["steps"], r["end"]] for r in rows), retries
local, _ = asyncio.run(main(False, None))
cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 1}})
node = cluster.add_node(num_cpus=1)
def replace_node():
    cluster.add_node(num_cpus=1)
    # Ray ends only the node's own processes. Its actors, children of them, end when they notice
    # that, and may finish their episodes before. On a machine that is lost they end at once.
    node_processes = [psutil.Process(process.pid) for _, process in node.live_processes()]
    actors = [actor for process in node_processes for actor in process.children(recursive=True)]
    assert actors, "no actor was on the node to lose"
    cluster.remove_node(node, allow_graceful=False)
    for actor in actors:
        try:
            actor.kill()
        except psutil.NoSuchProcess:
            pass  # it had noticed
os.environ["RAY_ADDRESS"] = cluster.address
on_ray, retries = asyncio.run(main(True, replace_node))
assert len(on_ray) == 24 and local == on_ray, (local, on_ray)
assert retries, "no episode was on the lost node"
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=script_env()
    )
    assert result.returncode == 0, result.stderr[-3000:]


# ---- Q(p) and pairs ------------------------------------------------------------------------------


def plan_row(task, m, plan):
    return {"task": task, "m": m, "plan": plan, "instruction": f"Do {task}."}


def test_pairs_by_hand():
    """Of equals the plan sampled first; ties and tasks without scores give no pair."""
    plans = [plan_row("a", m, plan) for m, plan in enumerate("wxyz")]
    plans += [plan_row("b", 0, "w"), plan_row("b", 1, "x"), plan_row("c", 0, None)]
    q = {("a", "w"): 0.5, ("a", "x"): 1.0, ("a", "y"): 1.0, ("a", "z"): 0.0}
    q |= {("b", "w"): 0.0, ("b", "x"): 0.0}
    prompts = Prompts(CORRIDOR)
    [pair] = score.contrastive_pairs(plans, q, prompts)
    assert pair["chosen"] == common.plan_messages("x")
    assert pair["rejected"] == common.plan_messages("z")
    assert (pair["task"], pair["q_chosen"], pair["q_rejected"]) == ("a", 1.0, 0.0)
    assert pair["prompt"] == prompts.planner("Do a.")
    [best] = score.best_plans(plans, q, prompts)
    assert (best["task"], best["q"], best["plan"]) == ("a", 1.0, "x")
    assert best["messages"] == pair["prompt"] + pair["chosen"]


WORKED = {"reward": 1.0, "end": "success"}
HALF = {"reward": 0.5, "end": "steps"}
CRASH = {"reward": 0.0, "end": "crash"}
REFUSED = {"reward": 0.0, "end": "refused"}


@pytest.mark.parametrize(
    "rollouts, q, said",
    [
        ([WORKED, HALF], 0.75, ""),
        ([WORKED, HALF, CRASH], 0.75, "1 plans have rollouts that failed"),
        ([CRASH, CRASH], None, "1 plans are not compared: all their rollouts failed"),
        ([HALF, REFUSED], 0.5, "1 plans have rollouts that failed or were refused"),
        ([], None, ""),
    ],
)
def test_failed_rollouts_do_not_count(rollouts, q, said, capsys):
    """A plan is scored by its other rollouts; without any it is not compared."""
    key = ("a", "w")
    assert score.quality(rollouts) == q and score.mean_reward(rollouts) == (q or 0.0)
    assert score.qualities({key: rollouts}) == ({} if q is None else {key: q})
    printed = capsys.readouterr().out
    assert said in printed and bool(said) == bool(printed)


def simulate(recorded: dict[str, list[float]]) -> tuple[dict, int]:
    """(the rewards that the adaptive choice saw, rollouts spent) on one task's recorded rewards."""
    seen = bench_adaptive.replay(recorded)
    return seen, sum(map(len, seen.values()))


@pytest.mark.parametrize(
    "rewards, n, chosen",
    [
        ({"a": [], "b": [1.0]}, 5, ["a", "b"]),  # every plan gets one
        ({"a": [0.0], "b": [0.0]}, 5, ["a", "b"]),
        ({"a": [0.0, 0.0], "b": [1.0, 1.0], "c": [0.0, 0.0]}, 5, ["a"]),  # c can only tie with a
        ({"a": [0.0, 0.0], "b": [0.0, 0.0]}, 5, []),  # a tie
        ({"a": [1.0], "b": [0.0]}, 1, []),
    ],
)
def test_adaptive_choice(rewards, n, chosen):
    assert score.undecided(rewards, dict.fromkeys(rewards, n)) == chosen


@pytest.mark.parametrize(
    "ends, next_rollouts",
    [
        ({"a": ["steps"], "b": ["crash"]}, [("a", 1), ("b", 1)]),
        ({"a": ["steps"] * 2, "b": ["crash", "steps"]}, [("b", 2)]),  # both earned the same
        ({"a": ["steps"], "b": ["crash", "crash", "steps"]}, [("a", 1)]),  # b has all it can have
        ({"a": ["steps"], "b": ["crash"] * 3, "c": ["steps"]}, [("a", 1), ("c", 1)]),
        ({"a": ["steps"], "b": ["crash"] * 3}, []),
    ],
)
def test_adaptive_choice_after_failed_rollouts(ends, next_rollouts):
    """They are among a plan's three rollouts, but their reward does not count."""
    finished = score.FinishedRollouts([("t", plan) for plan in ends], 3)
    for plan, of_plan in ends.items():
        for number, end in enumerate(of_plan):
            row = {"task": "t", "plan": plan, "rollout": number, "end": end}
            finished.add(row | {"reward": 0.0 if end == "crash" else 1.0})
    jobs = [(job["plan"], job["rollout"]) for job in finished.next_round()]
    assert jobs == next_rollouts


def test_adaptive_choice_of_a_task():
    clear = {"good": [1.0] * 5, "bad": [0.0] * 5, "middling": [0.0, 1.0, 0.0, 1.0, 1.0]}
    seen, spent = simulate(clear)
    assert spent < 15 and set(seen["good"]) == {1.0} and set(seen["bad"]) == {0.0}
    assert simulate({"only": [1.0, 0.0, 1.0]})[1] == 0


def test_adaptive_saves_and_agrees():
    """On simulated tasks, 65% of the rollouts find a pair that is right by all rollouts."""
    draw = random.Random(0)
    spent = total = right = tasks = 0
    for _ in range(200):
        chances = [draw.betavariate(0.5, 0.5) for _ in range(5)]
        recorded = {}
        for plan, chance in enumerate(chances):
            recorded[str(plan)] = [float(draw.random() < chance) for _ in range(5)]
        if bench_adaptive.pair(recorded) is None:
            continue
        seen, used = simulate(recorded)
        if bench_adaptive.agrees(bench_adaptive.pair(seen), recorded):
            right += 1
        spent += used
        total += 25
        tasks += 1
    assert spent < 0.65 * total and right > 0.9 * tasks, (spent / total, right / tasks)
