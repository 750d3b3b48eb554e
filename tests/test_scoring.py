"""Stage 3 survives faults, splits into shards, and can spend fewer rollouts; nothing is lost or made twice."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench_adaptive import replay
from conftest import ROOT, ChatServer, check_run, run_script, script_env, stage, start_script, write_jsonl

from common import (
    EnvPool,
    InputError,
    Model,
    Prompts,
    RolloutConfig,
    read_merged,
    read_rows,
    read_shards,
    rollouts,
    shard_of,
    shard_path,
)

score = stage("03_sample_score")
TYPES = ["find-animal", "find-living-thing", "find-plant", "find-non-living-thing"]
PLANS = ["teleport to the greenhouse", "look around", "focus on the plant", "wait", "open the door"]


def seed_of_request(body) -> random.Random:
    """The server's own randomness: it depends on the conversation and, above temperature 0, on the seed."""
    return random.Random(f"{body['messages'][-1]['content']} {body['seed'] if body['temperature'] else ''}")


def player(messages, body):
    """Planner and agent of the scoring runs: replies that depend on the request alone."""
    draw = seed_of_request(body)
    if "Write a step-by-step meta plan" in messages[0]["content"]:
        return "<meta_plan>\n" + "\n".join(f"Step {i}: {p}" for i, p in enumerate(draw.sample(PLANS, 2), 1)) + "\n</meta_plan>"
    return "Action: " + draw.choice(["look around", "teleport to greenhouse", "teleport to kitchen", "focus on flower pot", "wait1"])


def arguments(out, url, tasks, *more, m=2, n=2):
    path = Path(out).parent / f"{Path(out).name}-tasks.json"
    path.write_text(json.dumps(tasks))
    return ["--env", "sciworld", "--tasks", path, "--out", out, "--planner_url", url, "--agent_url", url, "--m", m, "--n", n,
            "--max_steps", 3, "--workers", 2, "--concurrency", 16, *more]


def tasks_of(n: int) -> list:
    return [[TYPES[i % 4], i // 4] for i in range(n)]


def comparable(rows, *keys) -> dict:
    """{key: the row without times}; keys must be unique."""
    out = {tuple(r[k] for k in keys): {k: v for k, v in r.items() if k not in ("seconds", "agent", "setting")} for r in rows}
    assert len(out) == len(rows), "a row was made twice"
    return out


def results(out) -> tuple:
    return (comparable(read_shards(out / "plans.jsonl"), "task", "m"),
            comparable(read_shards(out / "rollouts.jsonl"), "task", "plan", "rollout"))


# ---- faults --------------------------------------------------------------------------------------


def faulty(draw: random.Random):
    """The same server on a bad day: about one request in ten fails in some way."""
    lock, silences = threading.Lock(), iter([30, 30])

    def reply(messages, body):
        with lock:
            fault = draw.choice(["429", "500", "cut", "empty", "silent"]) if draw.random() < 0.12 else None
        if fault in ("429", "500"):
            return int(fault), "try again"
        if fault == "cut":
            return 200, '{"id": "0", "object": "chat.completion", "choices": [{"ind'
        if fault == "empty":
            return 200, json.dumps({"id": "0", "object": "chat.completion", "created": 0, "model": "scripted", "choices": []})
        if fault == "silent":
            time.sleep(next(silences, 2))
        return player(messages, body)

    return reply


def children(pid: int) -> list[int]:
    try:
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def test_random_kills_and_faults(tmp_path, chat_server):
    """200 episodes, once undisturbed and once with workers, JVMs and the stage itself killed at random and a
    server that fails in every way: the same rows, each once."""
    server, tasks = chat_server(player), tasks_of(25)
    calm = tmp_path / "calm"
    temperatures = ["--plan_temperature", 0.7, "--agent_temperature", 0]
    check_run("03_sample_score.py", *arguments(calm, server.url, tasks, *temperatures, n=4), timeout=400)
    plans, rows = results(calm)
    assert len(plans) == 50 and 160 <= len(rows) <= 200

    draw, wild, kills = random.Random(1), tmp_path / "wild", {"worker": 0, "jvm": 0, "stage": 0}
    bad = chat_server(faulty(random.Random(2)))
    deadline = time.time() + 300
    while time.time() < deadline:
        process = start_script("03_sample_score.py", *map(str, arguments(wild, bad.url, tasks, *temperatures, n=4)), MPO_MAX_RETRIES="8")
        began = time.time()
        while process.poll() is None and time.time() < deadline:
            time.sleep(draw.uniform(3.0, 5.0))  # an episode that is hit three times would rightly be given up
            workers = children(process.pid)
            jvms = [j for w in workers for j in children(w)]
            what = draw.choice(["worker", "jvm", "jvm", "stage"])
            if what == "stage" and kills["stage"] < 1 and time.time() - began > 8:
                process.kill()
                process.wait()
            elif what != "stage" and (victims := jvms if what == "jvm" else workers) and kills[what] < 2:
                os.kill(draw.choice(victims), signal.SIGKILL)
            else:
                continue
            kills[what] += 1
        if process.wait() == 0:
            break
    assert process.returncode == 0 and kills["worker"] + kills["jvm"] >= 2, kills
    assert results(wild) == (plans, rows)
    assert read_rows(wild / "pairs.jsonl") == read_rows(calm / "pairs.jsonl")


def test_server_that_comes_back(chat_server):
    """A server that is gone for a while (MPO_TEST_OUTAGE seconds): requests wait and go on where they were."""
    arrived, rows, back = threading.Event(), [], []
    server = chat_server(lambda messages, body: (arrived.set(), player(messages, body))[1])

    def gone(messages, body):
        raise ConnectionAbortedError

    def outage():
        arrived.wait(60)
        server.reply = gone  # connections that are open end as well
        server.shutdown()
        server.server_close()
        time.sleep(float(os.environ.get("MPO_TEST_OUTAGE", 8)))
        back.append(ChatServer(player, server.server_port))

    async def main():
        async with EnvPool("sciworld", 1) as pool:
            jobs = [{"task": f"find-plant/{i}", "plan": None, "rollout": 0} for i in range(6)]
            c = RolloutConfig(Prompts("sciworld"), 0.0, 64, 0, 0, max_steps=5)
            await rollouts(jobs, Model(None, server.url), pool, "sciworld", c, 6, rows.append)

    thread = threading.Thread(target=outage)
    thread.start()
    try:
        asyncio.run(main())
    finally:
        thread.join()
        for again in back:
            again.shutdown()
            again.server_close()
    assert len(rows) == 6 and not any(r["end"] == "crash" for r in rows) and back[0].requests


# ---- shards, more rollouts, several servers ------------------------------------------------------


def test_shard_names():
    assert shard_of(None) == (0, 1) and shard_of("2/3") == (2, 3)
    assert shard_path("runs/x/pairs.jsonl", "1/4") == Path("runs/x/pairs.1of4.jsonl")
    assert shard_path("runs/x/pairs.jsonl", None) == Path("runs/x/pairs.jsonl")
    for bad in ("3/3", "a", "1", "-1/2", "0/0"):
        with pytest.raises(InputError, match="--shard"):
            shard_of(bad)


def test_merged_shards(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_jsonl(shard_path(path, "1/2"), [{"x": 1}])
    with pytest.raises(InputError, match=r"pairs.0of2.jsonl is missing"):
        read_merged(path, ("x",))
    write_jsonl(shard_path(path, "0/2"), [{"x": 0}])
    assert read_merged(path, ("x",)) == [{"x": 0}, {"x": 1}] == read_shards(path)
    write_jsonl(path, [{"x": 5}])
    assert read_merged(path) == [{"x": 5}] and len(read_shards(path)) == 3
    with pytest.raises(InputError, match="does not exist"):
        read_merged(tmp_path / "none.jsonl")


def test_shards_make_the_same_run(tmp_path, chat_server):
    """Two shards, one after the other, make what one run makes; a run without --shard finds all of it
    done; stage 4 reads the shards together. Raising N plays only what is missing."""
    server, tasks = chat_server(player), tasks_of(7)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    check_run("03_sample_score.py", *arguments(whole, server.url, tasks))
    for i in range(2):
        check_run("03_sample_score.py", *arguments(parts, server.url, tasks, "--shard", f"{i}/2"))
    assert not (parts / "rollouts.jsonl").exists() and (parts / "rollouts.1of2.jsonl").exists()
    assert results(parts) == results(whole)
    key = lambda pairs: sorted(pairs, key=lambda r: r["task"])  # noqa: E731
    assert key(read_merged(parts / "pairs.jsonl")) == key(read_rows(whole / "pairs.jsonl"))

    before, asked = {p.name: p.read_bytes() for p in parts.glob("*.jsonl")}, len(server.requests)
    check_run("03_sample_score.py", *arguments(parts, server.url, tasks))
    assert len(server.requests) == asked, "nothing is asked for again"
    assert {name: (parts / name).read_bytes() for name in before} == before
    assert read_rows(parts / "pairs.jsonl") == read_rows(whole / "pairs.jsonl")

    n2 = results(whole)[1]
    check_run("03_sample_score.py", *arguments(whole, server.url, tasks, n=4))
    n4 = results(whole)[1]
    assert len(n4) == 2 * len(n2) and {k: n4[k] for k in n2} == n2


def test_several_servers_share_the_load(chat_server):
    """Requests are spread over the servers; an episode stays with one of them."""
    servers = [chat_server(lambda messages, body: (time.sleep(0.05), player(messages, body))[1]) for _ in range(3)]
    rows = []

    async def main():
        async with EnvPool("sciworld", 1) as pool:
            jobs = [{"task": f"find-plant/{i}", "plan": None, "rollout": 0} for i in range(12)]
            c = RolloutConfig(Prompts("sciworld"), 0.0, 64, 0, 0, max_steps=4)
            await rollouts(jobs, Model(None, ",".join(s.url for s in servers)), pool, "sciworld", c, 12, rows.append)

    asyncio.run(main())
    counts = [len(s.requests) for s in servers]
    assert len(rows) == 12 and sum(counts) == sum(len(r["steps"]) for r in rows) and min(counts) > 0.15 * sum(counts), counts
    first = [{body["messages"][0]["content"] for body in s.requests} for s in servers]
    assert sum(map(len, first)) <= 12 + 3, "the requests of an episode go to one server"


def test_duplicate_plans_are_scored_once(tmp_path, chat_server):
    def reply(messages, body):
        return "<meta_plan>\nStep 1: wait\n</meta_plan>" if "Write a step-by-step" in messages[0]["content"] else player(messages, body)

    server = chat_server(reply)
    result = run_script("03_sample_score.py", *arguments(tmp_path / "run", server.url, tasks_of(2), m=3, n=2))
    assert result.returncode == 2 and "no task has a better and a worse plan" in result.stderr
    plans, rows = results(tmp_path / "run")
    assert len(plans) == 6 and len(rows) == 4


def test_second_run_on_a_folder_is_refused(tmp_path, chat_server):
    slow = chat_server(lambda messages, body: (time.sleep(1.0), player(messages, body))[1])
    first = start_script("03_sample_score.py", *map(str, arguments(tmp_path / "run", slow.url, tasks_of(8))))
    try:
        while not (tmp_path / "run" / "plans.jsonl").exists():
            time.sleep(0.1)
            assert first.poll() is None
        second = run_script("03_sample_score.py", *arguments(tmp_path / "run", slow.url, tasks_of(8)))
        assert second.returncode == 2 and "is being written by another run" in second.stderr and "Traceback" not in second.stderr
    finally:
        first.kill()
        first.wait()


def test_window_keeps_a_long_conversation_going(chat_server):
    """A conversation that passes the model's context ends, or goes on with the task and the last turns."""

    def reply(messages, body):
        if len(messages) > 5:
            return 400, "This model's maximum context length is 100 tokens, your prompt is too long"
        return "Action: look around"

    server, rows = chat_server(reply), []

    async def play(window):
        rows.clear()
        async with EnvPool("sciworld", 1) as pool:
            c = RolloutConfig(Prompts("sciworld"), 0.0, 64, 0, 0, max_steps=8, window=window)
            jobs = [{"task": "find-plant/0", "plan": None, "rollout": 0}]
            await rollouts(jobs, Model(None, server.url), pool, "sciworld", c, 1, rows.append)
        return rows[0]

    row = asyncio.run(play(0))
    assert row["end"] == "context" and len(row["steps"]) == 3
    server.requests.clear()
    row = asyncio.run(play(2))
    assert row["end"] == "steps" and len(row["steps"]) == 8
    last = server.requests[-1]["messages"]
    assert last[0] == server.requests[0]["messages"][0] and len(last) == 5 and last[-1]["content"].startswith("Observation: ")


@pytest.mark.parametrize("script", ["03_sample_score.py", "05_eval.py"])
def test_what_a_short_context_ended_is_played_again_in_a_longer_one(tmp_path, chat_server, script):
    """Only that, and only when --max_model_len is raised."""
    room, out = [1], tmp_path / "run"  # messages that fit

    def reply(messages, body):
        if len(messages) > room[0] and "animal" in messages[0]["content"][-400:]:
            return 400, "This model's maximum context length is 100 tokens, your prompt is too long"
        return player(messages, body)

    server = chat_server(reply)
    args = arguments(out, server.url, [["find-non-living-thing", 0], ["find-animal", 0]], "--pairs", tmp_path / "pairs.jsonl")
    file = out / "rollouts.jsonl"
    if script == "05_eval.py":
        args = ["--env", "sciworld", "--workers", 1, "--out", out, "--tasks", tmp_path / "run-tasks.json", "--agents", server.url,
                "--plans", "none", "--max_steps", 3]
        file = out / "eval" / "rollouts.jsonl"

    def ends(max_model_len: int) -> list[tuple]:
        """(task, end) of the rows that this run adds."""
        before = len(read_rows(file, missing_ok=True))
        check_run(script, *args, "--max_model_len", max_model_len)
        return [(r["task"].split("/")[0], r["end"]) for r in read_rows(file)[before:]]

    first = ends(100)
    assert set(first) == {("find-non-living-thing", "steps"), ("find-animal", "context")}
    again = [end for end in first if end[1] == "context"]
    room[0] = 3
    assert ends(100) == [] and ends(200) == again, "it is not long enough yet"
    room[0] = 99
    assert ends(200) == [] and ends(300) == [("find-animal", "steps")] * len(again) and ends(300) == ends(100) == []
    if script == "05_eval.py":
        [result] = json.loads((out / "results.json").read_text())["results"]
        assert result["context_overflows"] == 0 and result["ends"] == {"steps": 2}


def test_ray_workers(chat_server):
    """Environment workers on a local Ray cluster play the same episodes; one that is killed is replaced."""
    pytest.importorskip("aiohttp_cors", reason="Ray is optional: pip install 'ray[default]'")
    pytest.importorskip("ray", reason="Ray is optional: pip install 'ray[default]'")
    server = chat_server(player)
    code = f"""
import asyncio, json, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from common import EnvPool, Model, Prompts, RolloutConfig, rollouts
async def main(ray, kill):
    rows = []
    async with EnvPool("sciworld", 2, 8, ray=ray) as pool:
        jobs = [{{"task": f"find-plant/{{i}}", "plan": None, "rollout": 0}} for i in range(6)]
        c = RolloutConfig(Prompts("sciworld"), 0.0, 64, 0, 0, max_steps=5)
        async def murder():
            while not rows:
                await asyncio.sleep(0.05)
            pool.workers[0].kill()
        task = asyncio.create_task(murder()) if kill else None
        retries = await rollouts(jobs, Model(None, {server.url!r}), pool, "sciworld", c, 3, rows.append)
    return sorted([r["task"], r["steps"], r["end"]] for r in rows), retries
local, _ = asyncio.run(main(False, False))
ray, retries = asyncio.run(main(True, True))
print(json.dumps([local == ray, len(ray), retries]))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=script_env(RAY_ADDRESS="local"))
    assert out.returncode == 0, out.stderr[-3000:]
    same, count, retries = json.loads(out.stdout.strip().splitlines()[-1])
    assert same and count == 6


# ---- adaptive rollouts ---------------------------------------------------------------------------


def simulate(recorded: dict[str, list[float]]) -> tuple[dict, int]:
    """(rewards that the adaptive choice saw, rollouts spent) on one task's recorded rewards."""
    seen = replay(recorded)
    return seen, sum(map(len, seen.values()))


def test_adaptive_choice():
    """Everybody is tried; ties are given up after two; what cannot be best or worst any more is left alone."""
    assert score.undecided({"a": [], "b": [1.0]}, 5) == ["a", "b"]
    assert score.undecided({"a": [0.0], "b": [0.0]}, 5) == ["a", "b"]
    assert score.undecided({"a": [0.0, 0.0], "b": [1.0, 1.0], "c": [0.0, 0.0]}, 5) == ["a"], "c can only draw level with a"
    assert score.undecided({"a": [0.0, 0.0], "b": [0.0, 0.0]}, 5) == []
    assert score.undecided({"a": [1.0], "b": [0.0]}, 1) == []
    clear = {"good": [1.0] * 5, "bad": [0.0] * 5, "middling": [0.0, 1.0, 0.0, 1.0, 1.0]}
    seen, spent = simulate(clear)
    assert spent < 15 and sum(seen["good"]) / len(seen["good"]) == 1.0 and sum(seen["bad"]) == 0.0
    assert all(len(r) <= 5 for r in seen.values())
    assert simulate({"only": [1.0, 0.0, 1.0]})[1] == 0


def test_adaptive_saves_and_agrees():
    """On simulated tasks whose plans differ, 65% of the rollouts find a pair that is right by all of them."""
    draw, spent, total, right, tasks = random.Random(0), 0, 0, 0, 0
    for _ in range(200):
        chances = [draw.betavariate(0.5, 0.5) for _ in range(5)]
        recorded = {str(i): [float(draw.random() < c) for _ in range(5)] for i, c in enumerate(chances)}
        q = {p: sum(r) / 5 for p, r in recorded.items()}
        if max(q.values()) == min(q.values()):
            continue
        seen, used = simulate(recorded)
        mean = {p: sum(r) / len(r) for p, r in seen.items()}
        best, worst = max(mean, key=mean.get), min(mean, key=mean.get)
        right += q[best] == max(q.values()) and q[worst] == min(q.values())
        spent, total, tasks = spent + used, total + 25, tasks + 1
    assert spent < 0.65 * total and right > 0.9 * tasks, (spent / total, right / tasks)


def test_adaptive_run(tmp_path, chat_server):
    """Plans that all earn the same are given up after two rollouts each; asked for all four, a run keeps those."""

    def reply(messages, body):
        return player(messages, body) if "Write a step-by-step meta plan" in messages[0]["content"] else "Action: wait1"

    server, out, tasks = chat_server(reply), tmp_path / "run", tasks_of(3)
    result = run_script("03_sample_score.py", *arguments(out, server.url, tasks, "--adaptive", "True", m=3, n=4))
    assert result.returncode == 2 and "no task has a better and a worse plan" in result.stderr
    plans, some = results(out)
    different = {(task, row["plan"]) for (task, _), row in plans.items()}
    compared = {key for key in different if sum(task == key[0] for task, _ in different) > 1}
    assert compared and Counter((task, plan) for task, plan, _ in some) == {key: 2 for key in compared}
    assert run_script("03_sample_score.py", *arguments(out, server.url, tasks, m=3, n=4)).returncode == 2
    every = results(out)[1]
    assert len(every) == 4 * len(different) and {k: every[k] for k in some} == some


# ---- make estimate -------------------------------------------------------------------------------


def test_estimate_counts():
    """Calls, optimizer steps and prompt tokens follow from the settings."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("estimate", ROOT / "data" / "estimate.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    shape = {"tasks": {"train": 100, "seen": 10, "unseen": 20}, "solved": 0.9, "trajectory": 300.0, "steps": 4.0, "reply": 10.0,
             "plan": 50.0, "observation": 30.0, "planner_prompt": 200.0, "teacher_prompt": 400.0, "agent_prompt": 500.0, "pairs": 0.5}
    rate = {k: v for k, (v, _, _) in tool.RATES.items()} | {"load": 0.0, "generate": 1000.0, "prefill": 1e9, "train": 100.0}
    a = SimpleNamespace(env="sciworld", m=5, n=2, gpus=2, epochs=3, dpo_epochs=None, batch=32, limit=None, eval_limit=None,
                        seed_limit=None, sft_limit=None, cores=40)
    seed, sft, score_, dpo, evaluation = tool.estimate(shape, rate, a)
    assert seed["calls"] == 90 and seed["prompt"] == 90 * 700
    assert sft["steps"] == 3 * 3 and sft["gpu"] == pytest.approx(90 * 250 * 3 / 100 / 3600)
    assert score_["calls"] == 500 + 1000 * 4 and score_["generated"] == 500 * 50 + 4000 * 10
    assert score_["prompt"] == 500 * 200 + 1000 * (4 * 500 + 40 * 6) and score_["gpu"] == pytest.approx(65_000 / 1000 / 3600, rel=0.01)
    assert dpo["steps"] == 2 * 3 and evaluation["calls"] == 60 + 90 * 4
    assert dpo["gpu"] == pytest.approx(50 * 300 * (3 + 1 / 3) / 100 / 3600), "a pair: the prompt once, two plans"
    assert tool.hours(score_, a) == score_["gpu"] / 2 and tool.hours(seed, a) == 100 * 0.4 / 3600 / 40
    a.limit, a.n = 10, 4
    assert tool.estimate(shape, rate, a)[2]["calls"] == 50 + 200 * 4
