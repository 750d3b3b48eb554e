"""Stage 3 against eight model servers of a GPU's speed, simulated: `make bench-scale`.

Each server answers 40 requests at once, 30 tokens/s each, after a prompt latency by length; more
requests wait. The environment's reset and step wait as long as the real one's take (`SECONDS`), in
16 workers. All of stage 3 runs as users run it. Measured from the first moment with all slots in
use to the start of the last episode: the share of slots in use, and the main process's CPU time.
"""

import argparse
import asyncio
import functools
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
from stub_server import completion, serve_connection
from targets import Target, print_targets

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from common import mean, read_rows  # noqa: E402
from data.tools import estimate  # noqa: E402

SERVERS = 8
SLOTS = 40  # requests that a server answers at once
SPEED = 30.0  # generated tokens/s of a request
PREFILL = 4000.0  # new prompt tokens/s of a request
PLAN_TOKENS = 100
REPLY_TOKENS = 60  # a reply with a thought
STEPS = {"sciworld": (6, 24), "alfworld": (8, 30)}  # an episode's steps, drawn by task and plan
WORKERS = 16
ROLLOUTS = 25  # of a task: 5 plans, 5 rollouts each
TOO_SHORT = "the slots were never, or only for a moment, all in use: take more --tasks"


# ---- the servers ---------------------------------------------------------------------------------


def tokens_of(messages: list[dict]) -> float:
    return sum(len(m["content"]) for m in messages) / estimate.CHARACTERS


class Simulation:
    """The servers, and what was seen of their load."""

    def __init__(self, steps: tuple[int, int]):
        self.steps = steps
        self.slots = [asyncio.Semaphore(SLOTS) for _ in range(SERVERS)]
        self.busy = 0  # slots in use, of all servers
        self.load = []  # (time, slots in use) after each change
        self.requests = []  # the agent's: when they were answered
        self.last_start = 0.0  # when the first request of the last episode was answered
        self.plans = 0

    async def start(self) -> tuple[list, str]:
        """(servers, their URLs with commas between)."""
        servers = []
        for i in range(SERVERS):
            connection = functools.partial(self.connection, i)
            servers.append(await asyncio.start_server(connection, "127.0.0.1", 0))
        ports = [server.sockets[0].getsockname()[1] for server in servers]
        return servers, ",".join(f"http://127.0.0.1:{port}/v1" for port in ports)

    async def connection(self, server: int, reader, writer) -> None:
        await serve_connection(reader, writer, functools.partial(self.answer, server))

    async def answer(self, server: int, path: str, body: dict | None) -> dict:
        if body is None:
            return {"data": [{"id": "m", "owned_by": "simulation"}]}
        messages = body["messages"]
        is_planner = "Action" not in messages[0]["content"]
        written = PLAN_TOKENS if is_planner else REPLY_TOKENS
        async with self.slots[server]:
            self.count(1)
            new_tokens = tokens_of(messages[-2:])  # the server has cached all but the last turn
            await asyncio.sleep(new_tokens / PREFILL + written / SPEED)
            self.count(-1)
        text = self.plan() if is_planner else self.reply(messages)
        return completion(text, int(tokens_of(messages)), written)

    def count(self, change: int) -> None:
        self.busy += change
        self.load.append((time.time(), self.busy))

    def plan(self) -> str:
        self.plans += 1
        return f"<meta_plan>\nStep 1: walk {self.plans}\n</meta_plan>"

    def reply(self, messages: list[dict]) -> str:
        turns = len(messages) // 2
        self.requests.append(time.time())
        if turns == 0:
            self.last_start = time.time()
        low, high = self.steps
        first = messages[0]["content"]
        total = low + common.seed_of(first) % (2 * (high - low))  # half go on to the limit
        left = max(0, total - 1 - turns)
        return f"Thought: on.\nAction: walk on {left}"

    def first_full(self) -> float:
        """When all slots were in use for the first time after an agent's request."""
        for moment, busy in self.load:
            if busy == SERVERS * SLOTS and moment > self.requests[0]:
                return moment
        raise SystemExit(TOO_SHORT)

    def share_in_use(self, start: float, end: float) -> float:
        """The mean share of slots in use between two moments."""
        total = 0.0
        for (since, busy), (until, _) in itertools.pairwise(self.load):
            total += busy * max(0.0, min(until, end) - max(since, start))
        return total / (end - start) / (SERVERS * SLOTS)


# ---- the stages ----------------------------------------------------------------------------------


def make_environment(folder: Path, env: str, tasks: int) -> None:
    """An environment in `folder` that waits as long as `env` takes."""
    shutil.copytree(ROOT / "tests" / "bench" / "scale", folder)
    settings = {
        "seconds": common.environment(env).SECONDS,
        "tasks": tasks,
        "most_steps": STEPS[env][1],
    }
    (folder / "settings.json").write_text(json.dumps(settings))


def run_stage_1(env: Path, out: Path) -> None:
    command = [sys.executable, "01_seed_plans.py", "--env", env, "--out", out, "--teacher", "rules"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


async def run_stage_3(env: Path, out: Path, urls: str) -> list[tuple[float, float]]:
    """(time, CPU seconds of the main process until then), several times a second."""
    command = [sys.executable, "03_sample_score.py", "--env", env, "--out", out]
    command += ["--planner", "m", "--planner_url", urls, "--agent", "m", "--agent_url", urls]
    command += ["--workers", str(WORKERS)]
    stage = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    process = psutil.Process(stage.pid)
    samples = []
    while stage.poll() is None:
        used = process.cpu_times()
        samples.append((time.time(), used.user + used.system))
        await asyncio.sleep(0.2)
    if stage.returncode:
        raise SystemExit(f"stage 3 ended with status {stage.returncode}")
    return samples


# ---- the estimate --------------------------------------------------------------------------------


async def estimated_seconds(env: Path, run: Path, load: float) -> float:
    """What `make estimate` says of stage 3, if it knows the lengths in the run's rows and the
    servers' rates. `load`: seconds to start a server."""
    seed_plans = read_rows(run / "seed_plans.jsonl")
    plans = [row for row in read_rows(run / "plans.jsonl") if row["plan"]]
    episodes = [row for row in read_rows(run / "rollouts.jsonl") if row["steps"]]
    observations = []
    for row in episodes:
        observations += [estimate.tokens(observation) + 8 for _, observation in row["steps"]]
    steps = len(observations)
    reply = sum(row["completion_tokens"] for row in episodes) / steps
    # the server's token counts are exact: the first prompt is the rest without the conversation
    growth = reply + mean(observations)
    conversation = growth * mean((len(row["steps"]) - 1) / 2 for row in episodes)
    prompts = [estimate.tokens(row["messages"][0]["content"]) for row in seed_plans]

    rates = {name: value for name, (value, _, _) in estimate.RATES.items()}
    shape = await estimate.measure(
        SimpleNamespace(env=str(env), prompts=None, tasks=[], types=None, sample=8, expert=None),
        rates,
    )
    shape.observation = mean(observations)
    shape.planner_prompt = mean(prompts)
    shape.agent_prompt = sum(row["prompt_tokens"] for row in episodes) / steps - conversation
    rates |= {"generate": SLOTS * SPEED, "prefill": SLOTS * PREFILL, "load": load, "reply": reply}
    rates["plan"] = mean(estimate.tokens(row["plan"]) + 20 for row in plans)
    settings = SimpleNamespace(
        env=str(env), gpus=SERVERS, cores=WORKERS, m=5, n=5, limit=None, seed_limit=None
    )
    stage_3 = estimate.Estimate(shape, rates, settings)
    stage_3.steps = steps / len(episodes)
    row = stage_3.scoring()
    return 3600 * max(row.gpu / SERVERS, row.env / WORKERS)


# ---- the benchmark -------------------------------------------------------------------------------


async def bench(env: str, tasks: int) -> list[Target]:
    simulation = Simulation(STEPS[env])
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "scale"
        out = Path(folder) / "run"
        make_environment(place, env, tasks)
        servers, urls = await simulation.start()
        run_stage_1(place, out)
        began = time.time()
        cpu = await run_stage_3(place, out, urls)
        wall = time.time() - began
        load = (simulation.load[0][0] - began) / 2  # of two: planner and agent
        guess = await estimated_seconds(place, out, load)
        for server in servers:
            server.close()
    start = simulation.first_full()
    end = simulation.last_start
    share = simulation.share_in_use(start, end)
    samples = [sample for sample in cpu if start <= sample[0] <= end]
    if len(samples) < 2:
        raise SystemExit(TOO_SHORT)
    first_time, first_used = samples[0]
    last_time, last_used = samples[-1]
    cores = (last_used - first_used) / (last_time - first_time)
    requests = [t for t in simulation.requests if first_time <= t <= last_time]
    per_minute = 60 * len(requests) / (last_time - first_time)
    print(
        f"{env}: {len(simulation.requests)} requests of {tasks * ROLLOUTS} episodes in "
        f"{wall:.0f} s, estimated {guess:.0f} s\n"
        f"  slots in use {share:.1%} of {SERVERS * SLOTS}, for {end - start:.0f} s; "
        f"{per_minute:.0f} requests/min, main process {cores:.2f} cores",
        flush=True,
    )
    cores_per_1000 = 1000 * cores / per_minute
    off_percent = 100 * abs(guess / wall - 1)
    return [
        Target(f"scale_slots_percent_{env}", 100 * share, at_least=95),
        Target(f"scale_cores_per_1000_requests_a_minute_{env}", cores_per_1000, at_most=0.5),
        Target(f"scale_estimate_off_percent_{env}", off_percent, at_most=20),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=40, help=f"tasks, of {ROLLOUTS} episodes each")
    a = parser.parse_args()
    targets = []
    for env in STEPS:
        targets += asyncio.run(bench(env, a.tasks))
    print_targets(targets)


if __name__ == "__main__":
    main()
