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
from bench.bench_adaptive import replay
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
    by_u = {e["instruction"]: e["steps"] for e in map(expert_of, tasks_of())}
    u = max(by_u, key=messages[0]["content"].rfind)
    turn = sum(m["role"] == "assistant" for m in messages)
    return f"Thought: I know.\nAction: {by_u[u][turn][0]}"


def pid_of(pool) -> int:
    return pool.workers[0].executor.process.pid


def jobs_of(tasks, n=1, plan=None):
    return [{"task": task, "plan": plan, "rollout": i} for task in tasks for i in range(n)]


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
    server, tasks = chat_server(gold), tasks_of()[:4]
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

    server, task = chat_server(reply), tasks_of()[0]
    [[row], _] = play(server.url, jobs_of([task]))
    assert row["success"] and row["format_errors"] == 1
    assert len(row["steps"]) == len(expert_of(task)["steps"]) + 1
    assert row["steps"][0] == ["I wonder.", NO_ACTION]
    assert server.requests[1]["messages"][-1]["content"] == f"Observation: {NO_ACTION}"


@pytest.mark.parametrize("text, format_errors", [("Action: dance", 0), ("I do not know.", 10)])
def test_ten_invalid_actions_in_a_row_end_an_episode(chat_server, monkeypatch, text, format_errors):
    """Where the environment says so."""
    url = chat_server(lambda messages, body: text).url
    [[row], _] = play(url, jobs_of(tasks_of()[:1]), max_steps=30)
    assert (row["end"], row["success"], row["reward"]) == ("errors", False, 0.0)
    assert len(row["steps"]) == 10 and row["format_errors"] == format_errors
    monkeypatch.setattr(common.environment(CORRIDOR), "MAX_FAILURES", None)
    [[row], _] = play(url, jobs_of(tasks_of()[:1]), max_steps=30)
    assert row["end"] == "steps" and len(row["steps"]) == 30


def test_what_an_agent_is_asked(chat_server):
    """Its reply ends at a stop string; what it writes after its action is not kept."""
    server = chat_server(lambda messages, body: "Thought: on.\nAction: walk on\nI see a lamp.")
    [[row], _] = play(server.url, jobs_of(tasks_of()[:1]), max_steps=2)
    body = server.requests[-1]
    assert {k: body[k] for k in ("model", "temperature", "max_tokens", "stop")} == {
        "model": "scripted",
        "temperature": 0.0,
        "max_tokens": 64,
        "stop": ["\nObservation:", "\nTask:", "\n---"],
    }
    assert "continue_final_message" not in body and isinstance(body["seed"], int)
    kept = "Thought: on.\nAction: walk on"
    assert [m["role"] for m in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][1]["content"] == kept == row["steps"][0][0]


def test_a_plan_starts_every_thought_where_the_server_is_vllm(chat_server):
    """The server continues a message that was started (paper 5.2)."""
    server = chat_server(lambda messages, body: " On.\nAction: walk on")
    server.owner, rows = "vllm", []
    a = SimpleNamespace(concurrency=2)

    async def main():
        c = RolloutConfig(Prompts(CORRIDOR), 0.0, 64, 0, 0, max_steps=2, plan_position="thought")
        async with EnvPool(CORRIDOR, 1) as pool:
            with common.open_model("m", server.url, a) as model:
                jobs = jobs_of(tasks_of()[:1], plan="Step 1: walk")
                await rollouts(jobs, model, pool, CORRIDOR, c, 1, rows.append)

    asyncio.run(main())
    started, said = "Step 1: walk\nThought:", "Step 1: walk\nThought: On.\nAction: walk on"
    for body, before in zip(server.requests, (1, 3), strict=True):
        assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
        assert body["messages"][before:] == [{"role": "assistant", "content": started}]
        assert "Step 1" not in body["messages"][0]["content"]
    assert server.requests[1]["messages"][1] == {"role": "assistant", "content": said}
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


def test_long_observations_are_cut():
    assert observation_message("a" * 20, 10)["content"] == "Observation: aaaaaaaaaa ..."
    assert observation_message("a" * 10, 10)["content"] == "Observation: aaaaaaaaaa"
    assert observation_message("a" * 20, 0)["content"] == "Observation: " + "a" * 20


# ---- environment workers -------------------------------------------------------------------------


def test_a_killed_worker_loses_nothing(chat_server):
    """SIGKILL to one of two workers in the middle of its episodes."""
    tasks, lock, asked, pools = tasks_of()[:4], threading.Lock(), [], []

    def reply(messages, body):
        with lock:
            asked.append(body)
            if len(asked) == 8:
                os.kill(pid_of(pools[0]), signal.SIGKILL)
        time.sleep(0.02)
        return gold(messages)

    rows, retries = play(chat_server(reply).url, jobs_of(tasks, 3), 6, 2, pools)
    keys = [(r["task"], r["rollout"]) for r in rows]
    assert len(set(keys)) == len(keys) == 12 and retries > 0
    assert all(r["end"] == "success" and r["reward"] == 1.0 for r in rows)


def test_an_episode_that_always_kills_its_worker_is_a_crash(chat_server):
    """After three attempts it has end "crash", and the other episodes go on."""
    first, second, pools = *tasks_of()[:2], []

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
                u, before = await env("reset", tasks_of()[0]), pid_of(pool)
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


def test_task_types_and_limit():
    async def listed(**more):
        async with EnvPool(CORRIDOR, 1) as pool:
            options = {"tasks": [], "types": None, "limit": None, **more}
            return await common.list_tasks(pool, CORRIDOR, options.pop("split", "train"), **options)

    tasks = asyncio.run(listed())
    kind = common.task_type(tasks[0])
    assert asyncio.run(listed(types=[kind], limit=1)) == tasks[:1]
    for more, error in [
        ({"types": ["find-unicorn"]}, "find-unicorn.*" + kind),
        ({"limit": 0}, "--limit"),
        ({"split": "holdout"}, "holdout.*train"),
    ]:
        with pytest.raises(InputError, match=error):
            asyncio.run(listed(**more))


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_node(chat_server):
    """Workers on a Ray cluster of two nodes play the same episodes as local processes do, when one
    node is killed on the way."""
    pytest.importorskip("ray")
    slow = chat_server(lambda messages, body: (time.sleep(0.1), gold(messages))[1])
    code = f"""
import asyncio, json, os, sys
sys.path.insert(0, {str(ROOT)!r})
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
    return sorted([r["task"], r["rollout"], r["steps"], r["end"]] for r in rows), retries
local, _ = asyncio.run(main(False, None))
cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 1}})
node = cluster.add_node(num_cpus=1)
def replace_node():
    cluster.add_node(num_cpus=1)
    cluster.remove_node(node, allow_graceful=False)
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
    plans = [plan_row("a", m, p) for m, p in enumerate(["w", "x", "y", "z"])]
    plans += [plan_row("b", 0, "w"), plan_row("b", 1, "x"), plan_row("c", 0, None)]
    q = {
        ("a", "w"): 0.5,
        ("a", "x"): 1.0,
        ("a", "y"): 1.0,
        ("a", "z"): 0.0,
        ("b", "w"): 0.0,
        ("b", "x"): 0.0,
    }
    prompts = Prompts(CORRIDOR)
    [pair] = score.contrastive_pairs(plans, q, prompts)
    assert pair["chosen"] == score.assistant("x") and pair["rejected"] == score.assistant("z")
    assert (pair["task"], pair["q_chosen"], pair["q_rejected"]) == ("a", 1.0, 0.0)
    assert pair["prompt"] == prompts.planner("Do a.")
    every = score.contrastive_pairs([*plans, plan_row("a", 4, "z")], q, prompts, all_pairs=True)
    assert [(p["q_chosen"], p["q_rejected"]) for p in every] == [
        (1.0, 0.5),
        (1.0, 0.0),
        (1.0, 0.5),
        (1.0, 0.0),
        (0.5, 0.0),
    ]
    assert [p["chosen"] for p in every] == [*map(score.assistant, "xxyyw")]
    assert len(score.contrastive_pairs(plans, q, prompts, 0.6, True)) == 2
    assert not score.contrastive_pairs(plans, q, prompts, 1.1)
    [best] = score.best_plans(plans, q, prompts)
    assert (best["task"], best["q"], best["plan"]) == ("a", 1.0, "x")
    assert best["messages"] == pair["prompt"] + pair["chosen"]


def test_quality():
    ends = ((1.0, "success"), (0.5, "steps"), (0.0, "crash"))
    rows = [{"reward": r, "end": end} for r, end in ends]
    assert score.quality(rows[:2], 2) == 0.75 and score.quality(rows[:2], 3) is None
    assert score.quality(rows, 3) is None and score.quality(rows, 3, allow_partial=True) == 0.75
    assert score.quality(rows[2:], 1, allow_partial=True) is None


def simulate(recorded: dict[str, list[float]]) -> tuple[dict, int]:
    """(the rewards that the adaptive choice saw, rollouts spent) on one task's recorded rewards."""
    seen = replay(recorded)
    return seen, sum(map(len, seen.values()))


def test_adaptive_choice():
    assert score.undecided({"a": [], "b": [1.0]}, 5) == ["a", "b"], "every plan gets one"
    assert score.undecided({"a": [0.0], "b": [0.0]}, 5) == ["a", "b"]
    three = {"a": [0.0, 0.0], "b": [1.0, 1.0], "c": [0.0, 0.0]}
    assert score.undecided(three, 5) == ["a"], "c can only tie with a"
    assert score.undecided({"a": [0.0, 0.0], "b": [0.0, 0.0]}, 5) == [], "a tie"
    assert score.undecided({"a": [1.0], "b": [0.0]}, 1) == []
    clear = {"good": [1.0] * 5, "bad": [0.0] * 5, "middling": [0.0, 1.0, 0.0, 1.0, 1.0]}
    seen, spent = simulate(clear)
    assert spent < 15 and set(seen["good"]) == {1.0} and set(seen["bad"]) == {0.0}
    assert simulate({"only": [1.0, 0.0, 1.0]})[1] == 0


def test_adaptive_saves_and_agrees():
    """On simulated tasks, 65% of the rollouts find a pair that is right by all rollouts."""
    draw, spent, total, right, tasks = random.Random(0), 0, 0, 0, 0
    for _ in range(200):
        chances = [draw.betavariate(0.5, 0.5) for _ in range(5)]
        recorded = {
            str(i): [float(draw.random() < c) for _ in range(5)] for i, c in enumerate(chances)
        }
        q = {p: sum(r) / 5 for p, r in recorded.items()}
        if max(q.values()) == min(q.values()):
            continue
        seen, used = simulate(recorded)
        mean = {p: sum(r) / len(r) for p, r in seen.items()}
        best, worst = max(mean, key=mean.get), min(mean, key=mean.get)
        right += q[best] == max(q.values()) and q[worst] == min(q.values())
        spent, total, tasks = spent + used, total + 25, tasks + 1
    assert spent < 0.65 * total and right > 0.9 * tasks, (spent / total, right / tasks)
