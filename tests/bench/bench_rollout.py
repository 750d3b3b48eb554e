"""Rollouts beside the paper's loop, in one run: `make bench-rollout`.

The paper's loop is rebuilt faithfully: 25 processes, each with one environment of the stock
package, each asking for one action at a time. Both sides play the same tasks with the same actions,
which a stub server returns after 50 ms at any load. Then our rollouts play with a real model on
vLLM, and the share of time without any request in the server is measured.
"""

import argparse
import asyncio
import itertools
import json
import os
import resource
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from common import EnvPool, Prompts, RolloutConfig  # noqa: E402

DELAY = 0.05  # seconds of a stub's reply
TASK = "This is your task:\n"
SCIWORLD = [
    f"{kind}/{i}"
    for kind in (
        "find-animal",
        "find-living-thing",
        "find-plant",
        "find-non-living-thing",
        "lifespan-longest-lived",
        "lifespan-shortest-lived",
        "power-component",
        "identify-life-stages-2",
        "use-thermometer",
        "chemistry-mix-paint-secondary-color",
    )
    for i in (0, 1)
]


# ---- the stub server -----------------------------------------------------------------------------


class Stub:
    """An OpenAI-compatible server that answers every chat after DELAY with the expert's next
    action."""

    def __init__(self, actions: dict[str, list[str]]):
        self.actions, self.alive, self.served, self.most = actions, 0, 0, 0
        self.idle, self.since = 0.0, time.time()

    def count(self, change: int) -> None:
        now = time.time()
        self.idle += (now - self.since) * (self.alive == 0)
        self.since, self.alive = now, self.alive + change
        self.most = max(self.most, self.alive)

    async def connection(self, reader, writer) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lengths = [
                    int(line.split(b":")[1])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length")
                ]
                body = await reader.readexactly(sum(lengths))
                if head.startswith(b"GET /stats"):
                    self.count(0)
                    answer = {"served": self.served, "idle": self.idle, "most": self.most}
                    self.served, self.idle, self.most = 0, 0.0, self.alive
                else:
                    self.count(1)
                    await asyncio.sleep(DELAY)
                    answer = self.reply(json.loads(body)["messages"])
                    self.count(-1)
                    self.served += 1
                text = json.dumps(answer).encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n" % len(text) + text
                )
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def reply(self, messages: list[dict]) -> dict:
        u = messages[0]["content"].rsplit(TASK, 1)[1].split("\n\nThis meta plan")[0]
        action = self.actions[u][len(messages) // 2]
        message = {"role": "assistant", "content": f"Action: {action}"}
        return {
            "id": "0",
            "object": "chat.completion",
            "created": 0,
            "model": "stub",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 8, "total_tokens": 9},
        }


async def stub_main(actions: dict) -> None:
    server = await asyncio.start_server(
        Stub(actions).connection, "127.0.0.1", 0, limit=2**24, backlog=4096
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# ---- the paper's loop ----------------------------------------------------------------------------


def paper_loop(url: str, tasks: list[str], games: dict[str, str], i: int) -> None:
    """One of its processes: prints a line for each finished episode."""
    import openai
    from stock_env import ALFWorld, ScienceWorld

    out, sys.stdout = sys.stdout, sys.stderr
    client = openai.OpenAI(base_url=url, api_key="none")
    prompts = Prompts("alfworld" if games else "sciworld")
    meanings = common.environment("alfworld").meanings if games else lambda action: [action]
    for task in itertools.islice(itertools.cycle(tasks), i, None):
        env = ALFWorld(games[task]) if games else ScienceWorld(task)
        u = env.reset()
        u = (
            u.split("\n\n", 1)[1]
            if games
            else " ".join(u.replace("Task Description:\n", "").split())
        )
        messages = prompts.agent(u, None, task)
        for _ in range(100):
            reply = client.chat.completions.create(
                model="stub", messages=messages, temperature=0.7, max_tokens=256
            )
            text = reply.choices[0].message.content
            observation, _, done, _ = env.step(meanings(common.parse_reply(text)[1])[0])
            messages += [
                {"role": "assistant", "content": text},
                {"role": "user", "content": f"Observation: {observation}"},
            ]
            if done:
                break
        print(len(messages) // 2, file=out, flush=True)


def measure_paper(url: str, tasks: list[str], games: dict, processes: int, seconds: float) -> float:
    """Episodes per minute of `processes` loops, after each has finished an episode."""
    job = json.dumps({"url": url, "tasks": tasks, "games": games})
    env = {**os.environ, "JAVA_TOOL_OPTIONS": "-Xmx512m"}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, "--loop", str(i)],
            stdin=subprocess.PIPE,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for i in range(processes)
    ]
    try:
        for process in running:
            process.stdin.write(job.encode())
            process.stdin.close()
        for process in running:
            process.stdout.readline()
            os.set_blocking(process.stdout.fileno(), False)
        time.sleep(5)
        start = time.time()
        for process in running:
            process.stdout.read()
        count = 0
        while time.time() - start < seconds:
            time.sleep(0.5)
            count += sum((p.stdout.read() or b"").count(b"\n") for p in running)
        return 60 * count / (time.time() - start)
    finally:
        for process in running:
            os.killpg(process.pid, 9)
            process.wait()


# ---- ours ----------------------------------------------------------------------------------------


async def play(
    env: str,
    url: str,
    tasks: list[str],
    rollouts: int,
    workers: int,
    concurrency: int,
    prompts=None,
    model: str = "stub",
    tokens: int = 256,
    **settings,
) -> tuple[list, float]:
    rows = []
    c = RolloutConfig(prompts or Prompts(env), 0.7, tokens, 0, 0, **settings)
    async with EnvPool(env, workers, concurrency) as pool:
        await pool.each(tasks[: 2 * workers], "reset")  # start the workers first
        jobs = [{"task": t, "plan": None, "rollout": i} for t in tasks for i in range(rollouts)]
        start = time.time()
        agent = common.Model(model, url, concurrency)
        await common.rollouts(
            jobs, agent, pool, env, c, concurrency, rows.append, desc=f"ours, {env}"
        )
        return rows, time.time() - start


def stats(url: str) -> dict:
    with urllib.request.urlopen(url.removesuffix("/v1") + "/stats") as answer:
        return json.loads(answer.read())


def bench_stub(env: str, a) -> tuple:
    async def experts(tasks):
        found = {}
        async with EnvPool(env, 2) as pool:
            return await pool.each(tasks, "expert")
        return found

    cls, games, tasks = common.environment(env), {}, SCIWORLD
    if env == "alfworld":
        tasks = cls().tasks("seen")[:20]
        games = {t: str(cls.games()["seen"][t] / "game.tw-pddl") for t in tasks}
    found = asyncio.run(experts(tasks))
    # the stub knows a task by its instruction
    tasks = list({found[t]["instruction"]: t for t in reversed(tasks) if found[t]}.values())
    actions = {found[t]["instruction"]: [action for action, _ in found[t]["steps"]] for t in tasks}
    with subprocess.Popen(
        [sys.executable, __file__, "--stub"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as stub:
        try:
            stub.stdin.write(json.dumps(actions))
            stub.stdin.close()
            url = f"http://127.0.0.1:{int(stub.stdout.readline())}/v1"
            paper = measure_paper(url, tasks, games, a.processes, a.seconds)
            stats(url)
            rows, seconds = asyncio.run(play(env, url, tasks, a.rollouts, a.workers, a.concurrency))
            server = stats(url)
        finally:
            stub.kill()
    wrong = sum(r["end"] != "success" for r in rows)
    ours = 60 * len(rows) / seconds
    steps = common.mean(len(r["steps"]) for r in rows)
    print(
        f"{env}: {len(tasks)} tasks, mean {steps:.1f} steps\n"
        f"  the paper's loop, {a.processes} processes: {paper:.0f} episodes/min\n"
        f"  ours, {a.workers} workers, {a.concurrency} in flight: {ours:.0f} episodes/min "
        f"({len(rows)}, {wrong} failed), {server['served'] / seconds:.0f} requests/s\n"
        f"  server idle {server['idle'] / seconds:.1%}, at most {server['most']} requests at "
        f"once; ratio {ours / paper:.1f}",
        flush=True,
    )
    return f"rollout_ratio_{env}", ours / paper, 10


def bench_vllm(a) -> tuple:
    """Share of the time in which vLLM had no request while episodes were played."""
    counts = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")

    def requests(url) -> float | None:
        try:
            with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=10) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:
            return None  # too busy to answer
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(counts))

    async def watch(url, seen):
        while True:
            seen.append(await asyncio.to_thread(requests, url))
            await asyncio.sleep(0.1)

    async def main(url):
        seen = []
        task = asyncio.create_task(watch(url, seen))
        rows, seconds = await play(
            "sciworld",
            url,
            SCIWORLD[:10],
            4,
            2,
            32,
            model=a.model,
            prompts=Prompts("sciworld", "brief"),
            tokens=32,
            max_steps=12,
        )
        task.cancel()
        return rows, seconds, seen

    with common.serve(a.model, ROOT / "logs", max_model_len=4096) as url:
        rows, seconds, seen = asyncio.run(main(url))
    idle = sum(x == 0 for x in seen) / len(seen)
    print(
        f"vLLM with {Path(a.model).name}: {len(rows)} episodes in {seconds:.0f} s, "
        f"{60 * len(rows) / seconds:.0f} episodes/min\n"
        f"  the server had no request in {idle:.1%} of {len(seen)} samples",
        flush=True,
    )
    return "vllm_idle_percent", 100 * idle, -10


def bench_memory(a) -> tuple:
    """A thousand stub episodes in flight: memory of the main process."""
    code = """
import asyncio, resource, sys
sys.path.insert(0, {root!r})
from types import SimpleNamespace
from common import Prompts, RolloutConfig, rollouts

async def env(method, *args, deadline=0):
    await asyncio.sleep(0.01)
    return "u " * 500 if method == "reset" else ("observation " * 60, 0.0, False, False)

class Pool:
    async def use(self, task, play, attempts, on_retry):
        return await play(env)

class Model:
    completion_tokens = 0
    async def ask(self, *args):
        await asyncio.sleep(0.05)
        text = "Thought: " + "well " * 100 + chr(10) + "Action: look around"
        return SimpleNamespace(text=text, prompt_tokens=1, completion_tokens=100)

jobs = [{{"task": f"find-plant/{{i}}", "plan": None, "rollout": 0}} for i in range(1000)]
c = RolloutConfig(Prompts("sciworld"), 0.7, 256, 0, 0, max_steps=50)
asyncio.run(rollouts(jobs, Model(), Pool(), "sciworld", c, 1000, lambda row: None))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    out = subprocess.run(
        [sys.executable, "-c", code.format(root=str(ROOT))],
        text=True,
        check=True,
        capture_output=True,
    ).stdout
    print(f"1,000 episodes of 50 steps in flight: {float(out):.2f} GB in the main process")
    return "gb_for_1000_episodes", float(out), -4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=25, help="processes of the paper's loop")
    parser.add_argument("--seconds", type=float, default=60, help="measured time of that loop")
    parser.add_argument("--rollouts", type=int, default=25, help="our rollouts of each task")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument(
        "--model",
        default=str(ROOT / "models" / "SmolLM2-135M-Instruct"),
        help="model for vLLM; empty: skip that part",
    )
    parser.add_argument("--loop", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stub", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.stub:
        return asyncio.run(stub_main(json.load(sys.stdin)))
    if a.loop is not None:
        return paper_loop(i=a.loop, **json.load(sys.stdin))
    targets = [bench_stub("sciworld", a), bench_stub("alfworld", a), bench_memory(a)]
    if a.model:
        targets.append(bench_vllm(a))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of this process {peak:.0f} MB\n")
    for name, measured, goal in targets:
        ok = measured <= -goal if goal < 0 else measured >= goal
        print(f"target {name} measured {measured:.1f} goal {abs(goal)} {'ok' if ok else 'short'}")


if __name__ == "__main__":
    main()
