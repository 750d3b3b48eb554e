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

from stock_env import peak_mb

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from common import EnvPool, environment, mean  # noqa: E402


def play_ours(name: str, episodes: list[tuple[str, list[str]]], workers: int) -> dict:
    """Play (task, actions) in order, `workers` at a time; seconds of each reset and step."""
    found = {"resets": [], "steps": [], "tasks": []}

    async def main():
        async with EnvPool(name, workers, 8) as pool:
            await pool.each([task for task, _ in episodes[-workers:]], "reset")  # start the workers
            queue, start = iter(episodes), time.perf_counter()

            async def work():
                for task, actions in queue:
                    async with pool.session(task) as env:
                        began = time.perf_counter()
                        await env("reset", task)
                        found["resets"].append(time.perf_counter() - began)
                        steps = []
                        for action in actions:
                            began = time.perf_counter()
                            _, _, done, _ = await env("step", action)
                            steps.append(time.perf_counter() - began)
                            if done:
                                break
                        found["steps"].append(steps)
                        found["tasks"].append(task)

            await asyncio.gather(*[work() for _ in pool.workers])
            found["seconds"] = time.perf_counter() - start
            found["peak_mb"] = max(
                peak_mb(w.executor.process.pid) for w in pool.workers if w.executor
            )

    asyncio.run(main())
    return found


def play_stock(jobs: list[dict], workers: int) -> dict:
    """The same with the package's own environment; jobs of one game go to one process. The first
    job of each process is played once before the clock starts, to leave out its imports."""
    key = "game" if "game" in jobs[0] else "task"
    names = list(dict.fromkeys(j[key] for j in jobs))
    processes = []
    for i in range(workers):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "stock_env.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        process.stdin.write(json.dumps({key: names[i - 1], "actions": []}) + "\n")
        process.stdin.flush()
        processes.append((process, [j for j in jobs if names.index(j[key]) % workers == i]))
    for process, _ in processes:
        process.stdout.readline()
    found = {"resets": [], "loads": [], "steps": [], "tasks": [], "peak_mb": 0.0}
    start = time.perf_counter()
    for process, mine in processes:
        process.stdin.write("".join(json.dumps(j) + "\n" for j in mine))
        process.stdin.close()
    for process, _ in processes:
        for line in process.stdout:
            row = json.loads(line)
            for field, value in (
                ("loads", row["load"]),
                ("resets", row["seconds"][0]),
                ("steps", row["seconds"][1:]),
                ("tasks", row["name"]),
            ):
                found[field].append(value)
            found["peak_mb"] = max(found["peak_mb"], row["peak_mb"])
        process.wait()
    return found | {"seconds": time.perf_counter() - start}


def figures(runs: dict[int, dict]) -> dict[str, float]:
    """{name: value} of the runs with 1 and 2 workers."""
    one = runs[1]
    first = [one["tasks"].index(t) for t in dict.fromkeys(one["tasks"])]
    loads = one.get("loads") or [0.0] * len(one["tasks"])
    return {
        "reset, first, s": mean(one["resets"][i] + loads[i] for i in first),
        "reset, repeated, s": mean(r for i, r in enumerate(one["resets"]) if i not in first),
        "step, all episodes, ms": 1000 * mean(s for steps in one["steps"] for s in steps),
        **{
            f"episodes/min, {w} worker{'s' * (w > 1)}": 60 * len(r["tasks"]) / r["seconds"]
            for w, r in runs.items()
        },
        "peak memory of a worker, MB": max(r["peak_mb"] for r in runs.values()),
    }


def compare(title: str, env: str, jobs: list[dict], episodes: list[tuple]) -> float:
    """Print both sides; the ratio of episodes/min with one worker."""
    stock = figures({w: play_stock(jobs, w) for w in (1, 2)})
    ours = figures({w: play_ours(env, episodes, w) for w in (1, 2)})
    print(f"\n{title}\n{'':38}{'stock':>12}{'ours':>12}{'ratio':>9}")
    ratios = {
        k: ours[k] / v if k.startswith("episodes") else v / max(ours[k], 1e-9)
        for k, v in stock.items()
    }
    for k, ratio in ratios.items():
        print(f"{k:38}{stock[k]:12.4g}{ours[k]:12.4g}{ratio:8.1f}x")
    return ratios["episodes/min, 1 worker"]


def bench_alfworld(a) -> list[tuple]:
    cls, episodes = environment("alfworld"), []
    env = cls()
    tasks, folders = env.tasks("seen"), cls.games()["seen"]
    for task in tasks[: a.games]:
        for i in range(a.rollouts):
            draw, actions = random.Random(f"{task} {i}"), []
            env.reset(task)
            for _ in range(30):
                actions.append(draw.choice(env.state.admissible_commands))
                if env.step(actions[-1])[2]:
                    break
            episodes.append((task, actions))
    jobs = [
        {"game": str(folders[task] / "game.tw-pddl"), "actions": actions}
        for i, (task, actions) in enumerate(episodes)
        if i % a.rollouts < a.stock_rollouts
    ]
    ratio = compare(
        f"ALFWorld: {a.games} games, {a.rollouts} rollouts each (stock: "
        f"{a.stock_rollouts}), 30 random actions",
        "alfworld",
        jobs,
        episodes,
    )
    places = "cabinet drawer shelf countertop fridge desk bed dresser toilet sidetable".split()
    words = [
        f"{verb} {place} {i}" for verb in ("go to", "open") for i in (1, 2, 3) for place in places
    ]
    draw = random.Random(0)
    many = [(t, draw.choices(words, k=30)) for t in env.tasks("train")[: a.many] for _ in range(2)]
    peak = play_ours("alfworld", many, 1)["peak_mb"]
    return [
        ("alfworld_episode_ratio", ratio, 10),
        (f"alfworld_mb_after_{a.many}_games", peak, -1024),
    ]


def bench_sciworld() -> None:
    kinds = ("find-animal", "find-plant", "lifespan-longest-lived", "power-component")
    tasks = [f"{kind}/{i}" for kind in kinds for i in (0, 1)]

    async def experts():
        async with EnvPool("sciworld", 2) as pool:
            return await pool.each(tasks, "expert")

    actions = {t: [a for a, _ in e["steps"]] for t, e in asyncio.run(experts()).items()}
    jobs = [{"task": t, "actions": actions[t]} for t in tasks for _ in range(3)]
    compare(
        "ScienceWorld: 8 tasks, 3 rollouts each, the expert's actions",
        "sciworld",
        jobs,
        [(j["task"], j["actions"]) for j in jobs],
    )


def synthetic_catalogue(folder: Path, products: int) -> None:
    """WebShop's two files with this many products, as long as the hundred real ones on average:
    titles of 19 words, descriptions of 105, five features of 25, options; words by Zipf's law. A
    tenth of them have an instruction."""
    import numpy as np

    draw, choose = np.random.default_rng(0), random.Random(0)
    colours, sizes = "red blue black white grey green".split(), "small medium large x-large".split()

    def word(rank: int) -> str:
        letters = ""
        while rank:
            rank, k = divmod(rank, 26)
            letters += "etaoinshrdlcumwfgypbvkjxqz"[k]
        return "wor" + letters

    names = folder / "items_shuffle.json", folder / "items_ins_v2.json"
    with names[0].open("w") as f, names[1].open("w") as g:
        f.write("["), g.write("{")
        for i in range(products):
            words = list(map(word, draw.zipf(1.25, 249).clip(max=5_000_000).tolist()))
            options = {
                "Color": [{"value": v} for v in choose.sample(colours, 3)],
                "Size": [{"value": v} for v in sizes],
            }
            row = {
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
            known = {"attributes": [" ".join(words[:2]), words[3]]}
            if i % 10 == 0:
                known |= {
                    "instruction": f"Find me {words[0]} that is {words[3]}",
                    "instruction_attributes": [words[3]],
                }
            comma = ", " * (i > 0)
            f.write(comma + json.dumps(row))
            g.write(f'{comma}"{row["asin"]}": {json.dumps(known)}')
        f.write("]"), g.write("}")


def play_webshop() -> None:
    """100 episodes of random actions in this process; prints times and memory as JSON."""
    import resource

    start = time.perf_counter()
    env = environment("webshop")()
    opened = time.perf_counter() - start
    draw, tasks, steps, searches = random.Random(0), env.tasks("train"), [], []
    for _ in range(100):
        words = env.reset(draw.choice(tasks)).split()
        for _ in range(15):
            can = env.clickable()
            search = f"search[{' '.join(draw.sample(words, min(6, len(words))))}]"
            start = time.perf_counter()
            done = env.step(f"click[{draw.choice(can)}]" if can else search)[2]
            (steps if can else searches).append(1000 * (time.perf_counter() - start))
            if done:
                break
    status = dict(line.split(":", 1) for line in open("/proc/self/status") if line[:3] == "Rss")
    print(
        json.dumps(
            {
                "open": opened,
                "step": mean(steps + searches),
                "search": mean(searches),
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                **{k: int(v.split()[0]) / 1024 for k, v in status.items()},
            }
        )
    )


def bench_webshop(products: int) -> list[tuple]:
    with tempfile.TemporaryDirectory() as folder:
        synthetic_catalogue(Path(folder), products)
        env = {**os.environ, "WEBSHOP_DATA": folder, "XDG_CACHE_HOME": folder}

        def run() -> dict:
            return json.loads(
                subprocess.run(
                    [sys.executable, __file__, "--webshop"],
                    env=env,
                    stdout=subprocess.PIPE,
                    check=True,
                ).stdout
            )

        first, again = run(), run()
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
    return (
        [
            ("webshop_start_s", first["open"], -3),
            ("webshop_start_stored_s", again["open"], -1),
            ("webshop_step_ms", again["step"], -5),
        ]
        if products == 1000
        else []
    )


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
        return play_webshop()
    targets = bench_webshop(a.products or 1000)
    if not a.products:
        targets += bench_alfworld(a)
        bench_sciworld()
    print()
    for name, measured, goal in targets:
        ok = measured <= -goal if goal < 0 else measured >= goal
        print(f"target {name} measured {measured:.2f} goal {abs(goal)} {'ok' if ok else 'short'}")


if __name__ == "__main__":
    main()
