"""The environments beside their own packages, in one run: `make bench-env`.

Both sides play the same actions, one episode at a time in every worker: ours through `EnvPool`, the
stock environment in processes of its own (`tests/stock_env.py`), with fewer rollouts. WebShop's own
server does not run with this Python, so there are only our times, on synthetic catalogues;
`--products 1180000` has the size of the whole one (minutes, 7 GB of disk).
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from stock_env import peak_mb  # noqa: E402
from targets import Target, print_targets  # noqa: E402

from common import EnvPool, environment, mean  # noqa: E402

STOCK = str(ROOT / "tests" / "stock_env.py")


class Played:
    """What one side played: a task, the seconds of its reset and of its steps per episode."""

    def __init__(self):
        self.tasks: list[str] = []
        self.loads: list[float] = []  # of the game or the simulator, if that is no part of a reset
        self.resets: list[float] = []
        self.steps: list[list[float]] = []
        self.seconds = 0.0  # of all
        self.peak_mb = 0.0  # of a worker

    def add(self, task: str, load: float, reset: float, steps: list[float]) -> None:
        self.tasks.append(task)
        self.loads.append(load)
        self.resets.append(reset)
        self.steps.append(steps)


def play_ours(name: str, episodes: list[tuple[str, list[str]]], workers: int) -> Played:
    """Play (task, actions) in order, `workers` at a time."""
    return asyncio.run(play_in_pool(name, episodes, workers))


async def play_in_pool(name: str, episodes: list[tuple], workers: int) -> Played:
    played = Played()
    async with EnvPool(name, workers, 8) as pool:
        await pool.each([task for task, _ in episodes[-workers:]], "reset")  # start the workers
        queue = iter(episodes)
        start = time.perf_counter()
        await asyncio.gather(*[play_queue(pool, queue, played) for _ in pool.workers])
        played.seconds = time.perf_counter() - start
        for worker in pool.workers:
            if worker.executor:
                played.peak_mb = max(played.peak_mb, peak_mb(worker.executor.process.pid))
    return played


async def play_queue(pool: EnvPool, queue, played: Played) -> None:
    """Play one episode of the queue after another, until it is empty."""
    for task, actions in queue:
        async with pool.session(task) as env:
            began = time.perf_counter()
            await env("reset", task)
            reset = time.perf_counter() - began
            steps = []
            for action in actions:
                began = time.perf_counter()
                _, _, done, _ = await env("step", action)
                steps.append(time.perf_counter() - began)
                if done:
                    break
            played.add(task, 0.0, reset, steps)


def play_stock(jobs: list[dict], workers: int) -> Played:
    """The same with the package's own environment; jobs of one game go to one process. The first
    job of each process is played once before the clock starts, to leave out its imports."""
    key = "game" if "game" in jobs[0] else "task"
    names = list(dict.fromkeys(job[key] for job in jobs))
    processes = [start_stock({key: names[i - 1], "actions": []}) for i in range(workers)]
    for process in processes:
        process.stdout.readline()
    played = Played()
    start = time.perf_counter()
    for i, process in enumerate(processes):
        for job in jobs:
            if names.index(job[key]) % workers == i:
                process.stdin.write(json.dumps(job) + "\n")
        process.stdin.close()
    for process in processes:
        for line in process.stdout:
            row = json.loads(line)
            reset, *steps = row["seconds"]
            played.add(row["name"], row["load"], reset, steps)
            played.peak_mb = max(played.peak_mb, row["peak_mb"])
        process.wait()
    played.seconds = time.perf_counter() - start
    return played


def start_stock(job: dict) -> subprocess.Popen:
    """A process that plays this job, then those written to it."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, STOCK], text=True, **pipes)
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    return process


def figures(one: Played, two: Played) -> dict[str, float]:
    """{name: value} of the runs with 1 and 2 workers."""
    first = []  # seconds of the first reset of each task
    repeated = []
    seen = set()
    for task, load, reset in zip(one.tasks, one.loads, one.resets, strict=True):
        if task in seen:
            repeated.append(reset)
        else:
            seen.add(task)
            first.append(load + reset)
    return {
        "reset, first, s": mean(first),
        "reset, repeated, s": mean(repeated),
        "step, all episodes, ms": 1000 * mean(sum(one.steps, [])),
        "episodes/min, 1 worker": 60 * len(one.tasks) / one.seconds,
        "episodes/min, 2 workers": 60 * len(two.tasks) / two.seconds,
        "peak memory of a worker, MB": max(one.peak_mb, two.peak_mb),
    }


def compare(title: str, env: str, jobs: list[dict], episodes: list[tuple]) -> float:
    """Print both sides; the ratio of episodes/min with one worker."""
    stock = figures(play_stock(jobs, 1), play_stock(jobs, 2))
    ours = figures(play_ours(env, episodes, 1), play_ours(env, episodes, 2))
    print(f"\n{title}\n{'':38}{'stock':>12}{'ours':>12}{'ratio':>9}")
    ratios = {}
    for name, theirs in stock.items():
        more_is_better = name.startswith("episodes")
        ratios[name] = ours[name] / theirs if more_is_better else theirs / max(ours[name], 1e-9)
        print(f"{name:38}{theirs:12.4g}{ours[name]:12.4g}{ratios[name]:8.1f}x")
    return ratios["episodes/min, 1 worker"]


def random_episode(env, task: str, draw: random.Random) -> list[str]:
    """30 random actions in an ALFWorld game, fewer if it ends."""
    actions = []
    env.reset(task)
    for _ in range(30):
        actions.append(draw.choice(env.state.admissible_commands))
        if env.step(actions[-1])[2]:
            break
    return actions


def bench_alfworld(a) -> list[Target]:
    cls = environment("alfworld")
    env = cls()
    folders = cls.games()["seen"]
    episodes = []
    jobs = []
    for task in env.tasks("seen")[: a.games]:
        for i in range(a.rollouts):
            actions = random_episode(env, task, random.Random(f"{task} {i}"))
            episodes.append((task, actions))
            if i < a.stock_rollouts:
                jobs.append({"game": str(folders[task] / "game.tw-pddl"), "actions": actions})
    title = (
        f"ALFWorld: {a.games} games, {a.rollouts} rollouts each (stock: "
        f"{a.stock_rollouts}), 30 random actions"
    )
    ratio = compare(title, "alfworld", jobs, episodes)
    peak = memory_after(env.tasks("train")[: a.many])
    return [
        Target("alfworld_episode_ratio", ratio, at_least=10),
        Target(f"alfworld_mb_after_{a.many}_games", peak, at_most=1024),
    ]


def memory_after(tasks: list[str]) -> float:
    """A worker's peak memory in MB after two episodes of each ALFWorld task."""
    words = []
    others = ["fridge", "countertop", "desk", "bed", "toilet"]
    for place in ["cabinet", "drawer", "shelf", "dresser", "sidetable", *others]:
        for i in (1, 2, 3):
            words += [f"go to {place} {i}", f"open {place} {i}"]
    draw = random.Random(0)
    episodes = []
    for task in tasks:
        for _ in range(2):
            episodes.append((task, draw.choices(words, k=30)))
    return play_ours("alfworld", episodes, 1).peak_mb


def bench_sciworld() -> None:
    tasks = []
    for kind in ("find-animal", "find-plant", "lifespan-longest-lived", "power-component"):
        tasks += [f"{kind}/0", f"{kind}/1"]

    async def experts():
        async with EnvPool("sciworld", 2) as pool:
            return await pool.each(tasks, "expert")

    found = asyncio.run(experts())
    episodes = []
    for task in tasks:
        actions = [action for action, _ in found[task]["steps"]]
        episodes += [(task, actions)] * 3
    jobs = [{"task": task, "actions": actions} for task, actions in episodes]
    title = "ScienceWorld: 8 tasks, 3 rollouts each, the expert's actions"
    compare(title, "sciworld", jobs, episodes)


def synthetic_catalogue(folder: Path, products: int) -> None:
    """WebShop's two files with this many products, as long as the hundred real ones on average:
    titles of 19 words, descriptions of 105, five features of 25, options; words by Zipf's law. A
    tenth of them have an instruction."""
    import numpy as np

    draw = np.random.default_rng(0)
    choose = random.Random(0)
    catalogue = folder / "items_shuffle.json"
    attributes = folder / "items_ins_v2.json"
    with catalogue.open("w") as f, attributes.open("w") as g:
        f.write("[")
        g.write("{")
        for i in range(products):
            ranks = draw.zipf(1.25, 249).clip(max=5_000_000).tolist()
            words = [word(rank) for rank in ranks]
            row = synthetic_product(i, words, choose)
            known = {"attributes": [" ".join(words[:2]), words[3]]}
            if i % 10 == 0:
                known["instruction"] = f"Find me {words[0]} that is {words[3]}"
                known["instruction_attributes"] = [words[3]]
            comma = ", " if i else ""
            f.write(comma + json.dumps(row))
            g.write(f'{comma}"{row["asin"]}": {json.dumps(known)}')
        f.write("]")
        g.write("}")


def word(rank: int) -> str:
    """The word of this rank by frequency: frequent words are short."""
    letters = ""
    while rank:
        rank, k = divmod(rank, 26)
        letters += "etaoinshrdlcumwfgypbvkjxqz"[k]
    return "wor" + letters


def synthetic_product(i: int, words: list[str], choose: random.Random) -> dict:
    colours = choose.sample(["red", "blue", "black", "white", "grey", "green"], 3)
    options = {
        "Color": [{"value": colour} for colour in colours],
        "Size": [{"value": size} for size in ("small", "medium", "large", "x-large")],
    }
    return {
        "asin": f"B{i:09}",
        "name": " ".join(words[:19]),
        "query": words[0],
        "full_description": " ".join(words[19:124]),
        "category": "garden",
        "small_description": [" ".join(words[k : k + 25]) for k in range(124, 249, 25)],
        "pricing": f"${choose.randint(5, 300)}.99",
        "average_rating": "4.5",
        "customization_options": options if i % 3 == 0 else "",
        "product_category": f"Home \u203a {words[1]} \u203a {words[2]}",
    }


def play_webshop() -> None:
    """100 episodes of random actions in this process; prints times and memory as JSON."""
    start = time.perf_counter()
    env = environment("webshop")()
    opened = time.perf_counter() - start
    draw = random.Random(0)
    tasks = env.tasks("train")
    clicks = []  # milliseconds
    searches = []
    for _ in range(100):
        words = env.reset(draw.choice(tasks)).split()
        for _ in range(15):
            clickable = env.clickable()
            if clickable:
                action = f"click[{draw.choice(clickable)}]"
            else:
                action = f"search[{' '.join(draw.sample(words, min(6, len(words))))}]"
            start = time.perf_counter()
            _, _, done, _ = env.step(action)
            milliseconds = 1000 * (time.perf_counter() - start)
            if clickable:
                clicks.append(milliseconds)
            else:
                searches.append(milliseconds)
            if done:
                break
    times = {"open": opened, "step": mean(clicks + searches), "search": mean(searches)}
    print(json.dumps(times | memory_mb()))


def memory_mb() -> dict[str, float]:
    """This process's memory: "peak", and the Rss lines of /proc (RssAnon, RssFile, ...)."""
    import resource

    measured = {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Rss"):
            name, value = line.split(":")
            measured[name] = int(value.split()[0]) / 1024
    return measured


def run_webshop(folder: str) -> dict:
    """`play_webshop` in a process of its own, on the catalogue in this folder."""
    env = {**os.environ, "WEBSHOP_DATA": folder, "XDG_CACHE_HOME": folder}
    command = [sys.executable, __file__, "--webshop"]
    return json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout)


def bench_webshop(products: int) -> list[Target]:
    with tempfile.TemporaryDirectory() as folder:
        synthetic_catalogue(Path(folder), products)
        first = run_webshop(folder)
        again = run_webshop(folder)
        disk = sum(f.stat().st_size for f in Path(folder).glob("mpo/**/*") if f.is_file()) / 2**20
    print(
        f"\nWebShop: {products} synthetic products, 100 episodes of random actions\n"
        f"start, with building the index {first['open']:.2f} s, at most {first['peak']:.0f} MB\n"
        f"start, index stored           {again['open']:.2f} s\n"
        f"step / search                 {again['step']:.2f} / {again['search']:.2f} ms\n"
        f"index on disk                 {disk:.0f} MB\n"
        f"memory of a worker            {again['RssAnon']:.0f} MB, and {again['RssFile']:.0f} MB "
        "shared with the others"
    )
    if products != 1000:
        return []
    return [
        Target("webshop_start_s", first["open"], at_most=3),
        Target("webshop_start_stored_s", again["open"], at_most=1),
        Target("webshop_step_ms", again["step"], at_most=5),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--games", type=int, default=8, help="ALFWorld games")
    parser.add_argument("--rollouts", type=int, default=25, help="our rollouts of each game")
    parser.add_argument("--stock_rollouts", type=int, default=2, help="stock rollouts of each game")
    parser.add_argument("--many", type=int, default=200, help="games of the memory measurement")
    parser.add_argument("--products", type=int, help="only WebShop, with a catalogue of this size")
    parser.add_argument("--webshop", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.webshop:
        play_webshop()
        return
    targets = bench_webshop(a.products or 1000)
    if not a.products:
        targets += bench_alfworld(a)
        bench_sciworld()
    print()
    print_targets(targets)


if __name__ == "__main__":
    main()
