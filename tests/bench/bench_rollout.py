"""Rollouts beside the paper's loop, in one run: `make bench-rollout`.

The paper's loop is rebuilt faithfully: 25 processes, each with one environment of the stock
package, each asking for one action at a time. Both sides play the same tasks with the same actions,
which a stub server returns after 50 ms at any load. Then our rollouts play with a real model on
vLLM, and the share of time without any request in the server is measured.
"""

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import os
import resource
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from stub_server import completion, serve_connection
from targets import Target, print_targets

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from common import EnvPool, Prompts, RolloutConfig  # noqa: E402

DELAY = 0.05  # seconds of a stub's reply
TASK = "This is your task:\n"  # precedes the task's instruction in the agent's prompt
SCIWORLD_TYPES = (
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
SCIWORLD = []  # two tasks of each type
for kind in SCIWORLD_TYPES:
    SCIWORLD += [f"{kind}/0", f"{kind}/1"]


# ---- the stub server -----------------------------------------------------------------------------


class Stub:
    """An OpenAI-compatible server that answers every chat after DELAY with the expert's next
    action. GET /stats: its counts since the last GET."""

    def __init__(self, actions: dict[str, list[str]]):
        self.actions = actions  # of the expert, by the task's instruction
        self.in_flight = 0
        self.most = 0  # requests in flight at once
        self.served = 0
        self.idle = 0.0  # seconds without a request
        self.since = time.time()  # up to when `idle` is counted

    def count(self, change: int) -> None:
        """`change` of the requests in flight."""
        now = time.time()
        if self.in_flight == 0:
            self.idle += now - self.since
        self.since = now
        self.in_flight += change
        self.most = max(self.most, self.in_flight)

    async def connection(self, reader, writer) -> None:
        await serve_connection(reader, writer, self.answer)

    async def answer(self, path: str, body: dict | None) -> dict:
        if path == "/stats":
            return self.stats()
        self.count(1)
        await asyncio.sleep(DELAY)
        reply = self.reply(body["messages"])
        self.count(-1)
        self.served += 1
        return reply

    def stats(self) -> dict:
        self.count(0)
        counts = {"served": self.served, "idle": self.idle, "most": self.most}
        self.served = 0
        self.idle = 0.0
        self.most = self.in_flight
        return counts

    def reply(self, messages: list[dict]) -> dict:
        u = messages[0]["content"].rsplit(TASK, 1)[1].split("\n\nThis meta plan")[0]
        action = self.actions[u][len(messages) // 2]
        return completion(f"Action: {action}", prompt_tokens=1, completion_tokens=8)


async def stub_main(actions: dict) -> None:
    """Serve until killed; prints the port."""
    server = await asyncio.start_server(
        Stub(actions).connection, "127.0.0.1", 0, limit=2**24, backlog=4096
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def stub_server(actions: dict):
    """Start a stub in a process of its own; yields its URL."""
    with subprocess.Popen(
        [sys.executable, __file__, "--stub"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as stub:
        try:
            stub.stdin.write(json.dumps(actions))
            stub.stdin.close()
            port = int(stub.stdout.readline())
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            stub.kill()


def get(url: str, path: str) -> str:
    """What the server of `url`, which ends with /v1, answers at /path."""
    with urllib.request.urlopen(url.removesuffix("/v1") + path, timeout=10) as answer:
        return answer.read().decode()


# ---- the paper's loop ----------------------------------------------------------------------------


class StockALFWorld:
    """ALFWorld's own environment, with actions and instructions as in our prompts."""

    def __init__(self, game: str):
        from stock_env import ALFWorld

        self.env = ALFWorld(game)

    def reset(self) -> str:
        return self.env.reset().split("\n\n", 1)[1]

    def step(self, action: str) -> tuple[str, bool]:
        command = common.environment("alfworld").meanings(action)[0]
        observation, _, done, _ = self.env.step(command)
        return observation, done


class StockScienceWorld:
    """ScienceWorld's own environment, with instructions as in our prompts."""

    def __init__(self, task: str):
        from stock_env import ScienceWorld

        self.env = ScienceWorld(task)

    def reset(self) -> str:
        return " ".join(self.env.reset().replace("Task Description:\n", "").split())

    def step(self, action: str) -> tuple[str, bool]:
        observation, _, done, _ = self.env.step(action)
        return observation, done


def paper_loop(url: str, tasks: list[str], games: dict[str, str], i: int) -> None:
    """Process `i` of the loop: plays the tasks from the i-th on, over and over, and prints a line
    for each finished episode. `games`: ALFWorld's file of each task; empty: ScienceWorld."""
    import openai

    out = sys.stdout
    sys.stdout = sys.stderr  # the environments print
    client = openai.OpenAI(base_url=url, api_key="none")
    prompts = Prompts("alfworld" if games else "sciworld")
    for task in itertools.islice(itertools.cycle(tasks), i, None):
        env = StockALFWorld(games[task]) if games else StockScienceWorld(task)
        messages = prompts.agent(env.reset(), None, task)
        for _ in range(100):
            reply = client.chat.completions.create(
                model="stub", messages=messages, temperature=0.7, max_tokens=256
            )
            text = reply.choices[0].message.content
            _, action = common.parse_reply(text)
            observation, done = env.step(action)
            messages.append({"role": "assistant", "content": text})
            messages.append({"role": "user", "content": f"Observation: {observation}"})
            if done:
                break
        print(len(messages) // 2, file=out, flush=True)


def measure_paper(url: str, tasks: list[str], games: dict, processes: int, seconds: float) -> float:
    """Episodes per minute of `processes` loops, after each has finished an episode."""
    running = [start_loop(i) for i in range(processes)]
    try:
        job = json.dumps({"url": url, "tasks": tasks, "games": games})
        for process in running:
            process.stdin.write(job.encode())
            process.stdin.close()
        for process in running:
            process.stdout.readline()
            os.set_blocking(process.stdout.fileno(), False)
        time.sleep(5)
        finished_episodes(running)  # those before the start do not count
        start = time.time()
        count = 0
        while time.time() - start < seconds:
            time.sleep(0.5)
            count += finished_episodes(running)
        return 60 * count / (time.time() - start)
    finally:
        for process in running:
            os.killpg(process.pid, 9)
            process.wait()


def start_loop(i: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__, "--loop", str(i)],
        stdin=subprocess.PIPE,
        env={**os.environ, "JAVA_TOOL_OPTIONS": "-Xmx512m"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def finished_episodes(processes: list[subprocess.Popen]) -> int:
    """The lines that the loops have printed since the last call."""
    count = 0
    for process in processes:
        lines = process.stdout.read()
        if lines:  # None: nothing new
            count += lines.count(b"\n")
    return count


# ---- ours ----------------------------------------------------------------------------------------


async def play(
    env: str,
    agent,
    tasks: list[str],
    rollouts: int,
    workers: int,
    config: RolloutConfig,
    on_start=lambda: None,
) -> tuple[list, float]:
    """(rows, seconds) of `rollouts` rollouts of each task. `on_start()` is called when the workers
    have started, before the first rollout."""
    jobs = []
    for task in tasks:
        jobs += [{"task": task, "plan": None, "rollout": i} for i in range(rollouts)]
    rows = []
    concurrency = agent.concurrency
    async with EnvPool(env, workers, concurrency) as pool:
        await pool.each(tasks[: 2 * workers], "reset")  # start the workers first
        on_start()
        start = time.time()
        await common.rollouts(
            jobs, agent, pool, env, config, concurrency, rows.append, desc=f"ours, {env}"
        )
        return rows, time.time() - start


async def expert_trajectories(env: str, tasks: list[str]) -> dict:
    async with EnvPool(env, 2) as pool:
        return await pool.each(tasks, "expert")


def tasks_and_games(env: str) -> tuple[list[str], dict[str, str]]:
    """The tasks to play, and for ALFWorld the file of each."""
    if env == "sciworld":
        return SCIWORLD, {}
    cls = common.environment("alfworld")
    tasks = cls().tasks("seen")[:20]
    folders = cls.games()["seen"]
    return tasks, {task: str(folders[task] / "game.tw-pddl") for task in tasks}


def bench_stub(env: str, a) -> Target:
    """Both sides with a stub server: episodes per minute of ours over the paper's."""
    tasks, games = tasks_and_games(env)
    experts = asyncio.run(expert_trajectories(env, tasks))
    # the stub knows a task by its instruction: only the first task of each instruction is played
    task_of = {}
    actions = {}
    for task in reversed(tasks):
        expert = experts[task]
        if expert:
            task_of[expert["instruction"]] = task
            actions[expert["instruction"]] = [action for action, _ in expert["steps"]]
    tasks = list(task_of.values())
    config = RolloutConfig(Prompts(env), 0.7, 256, 0, 0)
    with stub_server(actions) as url:
        paper = measure_paper(url, tasks, games, a.processes, a.seconds)
        agent = common.Model("stub", url, a.concurrency)
        reset_counts = functools.partial(get, url, "/stats")
        rows, seconds = asyncio.run(
            play(env, agent, tasks, a.rollouts, a.workers, config, reset_counts)
        )
        server = json.loads(get(url, "/stats"))
    failed = sum(row["end"] != "success" for row in rows)
    ours = 60 * len(rows) / seconds
    steps = common.mean(len(row["steps"]) for row in rows)
    print(
        f"{env}: {len(tasks)} tasks, mean {steps:.1f} steps\n"
        f"  the paper's loop, {a.processes} processes: {paper:.0f} episodes/min\n"
        f"  ours, {a.workers} workers, {a.concurrency} in flight: {ours:.0f} episodes/min "
        f"({len(rows)}, {failed} failed), {server['served'] / seconds:.0f} requests/s\n"
        f"  server idle {server['idle'] / seconds:.1%}, at most {server['most']} requests at "
        f"once; ratio {ours / paper:.1f}",
        flush=True,
    )
    return Target(f"rollout_ratio_{env}", ours / paper, at_least=10)


# ---- vLLM ----------------------------------------------------------------------------------------


def requests_in_server(url: str) -> float | None:
    """Requests that vLLM answers or queues now, by its own metrics; None: too busy to say."""
    try:
        lines = get(url, "/metrics").splitlines()
    except OSError:
        return None
    counts = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(counts))


async def watch(url: str, samples: list) -> None:
    """Sample `requests_in_server` until cancelled."""
    while True:
        samples.append(await asyncio.to_thread(requests_in_server, url))
        await asyncio.sleep(0.1)


async def play_watched(url: str, model: str) -> tuple[list, float, list]:
    """(rows, seconds, samples of the requests in the server)."""
    samples = []
    watcher = asyncio.create_task(watch(url, samples))
    config = RolloutConfig(Prompts("sciworld", "brief"), 0.7, 32, 0, 0, max_steps=12)
    agent = common.Model(model, url, 32)
    rows, seconds = await play("sciworld", agent, SCIWORLD[:10], 4, 2, config)
    watcher.cancel()
    return rows, seconds, samples


def bench_vllm(a) -> Target:
    """Share of the time in which vLLM had no request while episodes were played."""
    with common.serve(a.model, ROOT / "logs", max_model_len=4096) as url:
        rows, seconds, samples = asyncio.run(play_watched(url, a.model))
    idle = samples.count(0) / len(samples)
    print(
        f"vLLM with {Path(a.model).name}: {len(rows)} episodes in {seconds:.0f} s, "
        f"{60 * len(rows) / seconds:.0f} episodes/min\n"
        f"  the server had no request in {idle:.1%} of {len(samples)} samples",
        flush=True,
    )
    return Target("vllm_idle_percent", 100 * idle, at_most=10)


# ---- memory --------------------------------------------------------------------------------------


class WordyEnvPool:
    """A pool whose environment waits and says much, and never ends an episode."""

    async def use(self, task, play, attempts, on_retry):
        return await play(self.env)

    async def env(self, method, *args, deadline=0):
        await asyncio.sleep(0.01)
        if method == "reset":
            return "u " * 500
        return "observation " * 60, 0.0, False, False


class WordyModel:
    completion_tokens = 0
    answers = 0
    word = "well "

    async def ask(self, *args):
        await asyncio.sleep(0.05)
        text = "Thought: " + 100 * self.word + "\nAction: look around"  # each in memory of its own
        return common.Reply(text, 1, 100)


def memory_main() -> None:
    """Play the episodes in this process; prints its peak memory in GB."""
    jobs = [{"task": f"find-plant/{i}", "plan": None, "rollout": 0} for i in range(1000)]
    config = RolloutConfig(Prompts("sciworld"), 0.7, 256, 0, 0, max_steps=50)
    asyncio.run(
        common.rollouts(
            jobs, WordyModel(), WordyEnvPool(), "sciworld", config, 1000, lambda row: None
        )
    )
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def bench_memory() -> Target:
    """A thousand episodes in flight: memory of the main process."""
    command = [sys.executable, __file__, "--memory"]
    result = subprocess.run(command, text=True, check=True, capture_output=True)
    gigabytes = float(result.stdout)
    print(f"1,000 episodes of 50 steps in flight: {gigabytes:.2f} GB in the main process")
    return Target("gb_for_1000_episodes", gigabytes, at_most=4)


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
    # what the benchmark starts of itself in other processes
    parser.add_argument("--loop", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stub", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.stub:
        return asyncio.run(stub_main(json.load(sys.stdin)))
    if a.loop is not None:
        return paper_loop(i=a.loop, **json.load(sys.stdin))
    if a.memory:
        return memory_main()
    targets = [bench_stub("sciworld", a), bench_stub("alfworld", a), bench_memory()]
    if a.model:
        targets.append(bench_vllm(a))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of this process {peak:.0f} MB\n")
    print_targets(targets)
    return None


if __name__ == "__main__":
    main()
