"""Stage 3 against eight model servers of a GPU's speed, simulated: `make bench-scale`.

Each server answers 40 requests at once, 30 tokens/s each, after a prompt latency by length; more
requests wait. The environment's reset and step wait as long as the real one's take (`SECONDS`), in
16 workers. All of stage 3 runs as users run it. Measured from the first moment with all slots in
use to the start of the last episode: the share of slots in use, and the main process's CPU time.
"""

import argparse
import asyncio
import importlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

estimate = importlib.import_module("data.tools.estimate")

SERVERS, SLOTS, SPEED, PREFILL = 8, 40, 30.0, 4000.0  # tokens/s of a request: written, read
PLAN_TOKENS, REPLY_TOKENS = 100, 60  # a reply with a thought
STEPS = {"sciworld": (6, 24), "alfworld": (8, 30)}  # an episode's steps, drawn by task and plan
ENVIRONMENT = '''
"""An environment that waits as long as a real one takes."""
import time
from common import Environment

SECONDS = {seconds}


class Scale(Environment):
    SPLITS, MAX_STEPS, VERBS = {{"train": {tasks}}}, {{"walk": {most}}}, {{"walk"}}
    FAILED, SECONDS = ("no",), SECONDS

    def columns(self, split):
        return [[f"walk/{{i}}" for i in range({tasks})]]

    def reset(self, task):
        time.sleep(SECONDS["reset"])
        return f"Task number {{task}}: " + "walk to the end of the road. " * 12

    def step(self, action):
        time.sleep(SECONDS["step"])
        left = int(action.split()[-1])
        return "You walk on. " * 20, 1 / (1 + left), left == 0, left == 0

    def expert(self, task):
        steps = [[f"walk on {{i}}", self.step(f"walk on {{i}}")[0]] for i in range(5, -1, -1)]
        return {{"instruction": self.reset(task), "steps": steps, "reward": 1.0}}

    @staticmethod
    def abstract(u, steps):
        return ["walk on", "walk to the end"]
'''


class Simulation:
    """The servers, and what was seen of their load."""

    def __init__(self, steps: tuple[int, int]):
        self.steps, self.busy = steps, [0] * SERVERS
        self.slots = [asyncio.Semaphore(SLOTS) for _ in range(SERVERS)]
        self.requests, self.last_start, self.plans = [], 0.0, 0
        self.load, self.since = [], time.time()  # (time, slots in use)

    def count(self, server: int, change: int) -> None:
        self.busy[server] += change
        self.load.append((time.time(), sum(self.busy)))

    async def answer(self, server: int, messages: list[dict]) -> tuple[str, int, int]:
        """(text, prompt tokens, written tokens); the server has cached all but the last turn."""
        first, turns = messages[0]["content"], len(messages) // 2
        planning = "Action" not in first
        async with self.slots[server]:
            self.count(server, 1)
            written = PLAN_TOKENS if planning else REPLY_TOKENS
            new = sum(len(m["content"]) for m in messages[-2:]) / estimate.CHARACTERS
            await asyncio.sleep(new / PREFILL + written / SPEED)
            self.count(server, -1)
        tokens = int(sum(len(m["content"]) for m in messages) / estimate.CHARACTERS)
        if planning:
            self.plans += 1
            return f"<meta_plan>\nStep 1: walk {self.plans}\n</meta_plan>", tokens, written
        self.requests.append(time.time())
        if not turns:
            self.last_start = time.time()
        low, high = self.steps
        total = low + common.seed_of(first) % (2 * (high - low))  # half go on to the limit
        return f"Thought: on.\nAction: walk on {max(0, total - 1 - turns)}", tokens, written

    async def connection(self, server: int, reader, writer) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lengths = [
                    int(line.split(b":")[1])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length")
                ]
                body = json.loads(await reader.readexactly(lengths[0])) if lengths else None
                if body:
                    text, read, written = await self.answer(server, body["messages"])
                    reply = {
                        "id": "0",
                        "object": "chat.completion",
                        "created": 0,
                        "model": "m",
                        "choices": [
                            {
                                "index": 0,
                                "finish_reason": "stop",
                                "message": {"role": "assistant", "content": text},
                            }
                        ],
                        "usage": {
                            "prompt_tokens": read,
                            "completion_tokens": written,
                            "total_tokens": read + written,
                        },
                    }
                else:
                    reply = {"data": [{"id": "m", "owned_by": "simulation"}]}
                content = json.dumps(reply).encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n" % len(content) + content
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def share_in_use(self, start: float, end: float) -> float:
        """The mean share of slots in use between two moments."""
        total = 0.0
        for (t, busy), (until, _) in zip(self.load, self.load[1:], strict=False):
            total += busy * max(0.0, min(until, end) - max(t, start))
        return total / (end - start) / (SERVERS * SLOTS)


async def run(env: str, a) -> list[tuple]:
    simulation = Simulation(STEPS[env])
    seconds = common.environment(env).SECONDS
    with tempfile.TemporaryDirectory() as folder:
        out, place = Path(folder) / "run", Path(folder) / "scale"
        place.mkdir()
        (place / "env.py").write_text(
            ENVIRONMENT.format(seconds=seconds, tasks=a.tasks, most=STEPS[env][1])
        )
        (place / "agent.txt").write_text("Reply with Action: and a walk.\n{task}{plan_line}\n")
        (place / "planner.txt").write_text("Write a plan.\n{task}\n")
        servers = [
            await asyncio.start_server(
                lambda r, w, i=i: simulation.connection(i, r, w), "127.0.0.1", 0
            )
            for i in range(SERVERS)
        ]
        urls = ",".join(f"http://127.0.0.1:{s.sockets[0].getsockname()[1]}/v1" for s in servers)
        subprocess.run(
            [
                sys.executable,
                "01_seed_plans.py",
                "--env",
                place,
                "--out",
                out,
                "--teacher",
                "rules",
            ],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        began = time.time()
        stage = subprocess.Popen(
            [
                sys.executable,
                "03_sample_score.py",
                "--env",
                place,
                "--out",
                out,
                "--planner",
                "m",
                "--agent",
                "m",
                "--planner_url",
                urls,
                "--agent_url",
                urls,
                "--workers",
                "16",
            ],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        cpu, watched = [], psutil.Process(stage.pid)

        def watch():
            while stage.poll() is None:
                used = watched.cpu_times()
                cpu.append((time.time(), used.user + used.system))
                time.sleep(0.5)

        threading.Thread(target=watch, daemon=True).start()
        status = await asyncio.to_thread(stage.wait)
        wall = time.time() - began
        assert status == 0, f"stage 3 ended with {status}"
        full = next(
            t
            for t, busy in simulation.load
            if busy == SERVERS * SLOTS and t > simulation.requests[0]
        )
        end = simulation.last_start
        share = simulation.share_in_use(full, end)
        inside = [(t, used) for t, used in cpu if full <= t <= end]
        (t0, used0), (t1, used1) = inside[0], inside[-1]
        per_minute = 60 * sum(t0 <= t <= t1 for t in simulation.requests) / (t1 - t0)
        cores = (used1 - used0) / (t1 - t0)
        shape = await estimate.measure(
            SimpleNamespace(env=str(place), prompts=None, types=None, sample=8)
        ) | estimate.measure_run(out)
        rate = {k: v for k, (v, *_) in estimate.RATES.items()} | {
            "generate": SLOTS * SPEED,
            "prefill": SLOTS * PREFILL,
            "load": (simulation.load[0][0] - began) / 2,
        }  # of two: planner and agent
        settings = SimpleNamespace(
            env=str(place),
            gpus=SERVERS,
            cores=16,
            m=5,
            n=5,
            limit=None,
            seed_limit=None,
            sft_limit=None,
            eval_limit=None,
            batch=32,
            epochs=3,
            dpo_epochs=None,
        )
        row = estimate.estimate(shape, rate, settings)[2]
        guess = 3600 * estimate.hours(row, settings)
        for server in servers:
            server.close()
    print(
        f"{env}: {len(simulation.requests)} requests of {a.tasks * 25} episodes in {wall:.0f} s, "
        f"estimated {guess:.0f} s\n  slots in use {share:.1%} of {SERVERS * SLOTS}, for "
        f"{end - full:.0f} s; {per_minute:.0f} requests/min, main process {cores:.2f} cores",
        flush=True,
    )
    return [
        (f"scale_slots_percent_{env}", 100 * share, 95),
        (f"scale_cores_per_1000_requests_a_minute_{env}", 1000 * cores / per_minute, -0.5),
        (f"scale_estimate_off_percent_{env}", 100 * abs(guess / wall - 1), -20),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=40, help="tasks, of 25 episodes each")
    a = parser.parse_args()
    targets = [target for env in STEPS for target in asyncio.run(run(env, a))]
    for name, measured, goal in targets:
        ok = measured <= -goal if goal < 0 else measured >= goal
        print(f"target {name} measured {measured:.2f} goal {abs(goal)} {'ok' if ok else 'short'}")


if __name__ == "__main__":
    main()
