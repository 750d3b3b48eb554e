"""How fast the environments are, beside their own packages, in one run: `make bench-env`.

Both sides play the same actions. Ours is measured where it is used, through the worker processes of
`common.EnvPool`; the stock one in processes of its own (`tests/stock_env.py`), with fewer rollouts, because each of its
episodes costs the same. One episode at a time in every worker. WebShop's own server does not run with this Python: there
are only our times, on made-up catalogues; `--products 1180000` is the size of the whole one (8 minutes, 7 GB of disk).
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import ALFWorld, EnvPool, mean  # noqa: E402


def play_ours(name: str, episodes: list[tuple[str, list[str]]], workers: int) -> dict:
    """Play (task, actions) in order, `workers` at a time. Seconds of each reset and step, per episode."""
    found = {"resets": [], "steps": [], "tasks": []}

    async def main():
        async with EnvPool(name, workers, 8) as pool:
            await asyncio.gather(*[w.start() for w in pool.workers])
            async with pool.session() as env:  # imports are not what is measured
                await env("reset", episodes[-1][0])
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
            found["peak_mb"] = max(peak_mb(w.process.pid) for w in pool.workers)

    asyncio.run(main())
    return found


def play_stock(jobs: list[dict], workers: int) -> dict:
    """The same with the package's own environment: jobs of one game go to one process. The time that the
    processes take to import is left out (the first job of each is played once before the clock starts)."""
    key = "game" if "game" in jobs[0] else "task"
    names = list(dict.fromkeys(j[key] for j in jobs))
    processes = []
    for i in range(workers):
        process = subprocess.Popen([sys.executable, str(ROOT / "tests" / "stock_env.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, text=True)
        mine = [j for j in jobs if names.index(j[key]) % workers == i]
        process.stdin.write(json.dumps({key: names[i - 1], "actions": []}) + "\n")
        process.stdin.flush()
        processes.append((process, mine))
    for process, _ in processes:
        process.stdout.readline()
    start, found = time.perf_counter(), {"resets": [], "loads": [], "steps": [], "tasks": [], "peak_mb": 0.0}
    for process, mine in processes:
        process.stdin.write("".join(json.dumps(j) + "\n" for j in mine))
        process.stdin.close()
    for process, _ in processes:
        for line in process.stdout:
            row = json.loads(line)
            found["loads"].append(row["load"])
            found["resets"].append(row["seconds"][0])
            found["steps"].append(row["seconds"][1:])
            found["tasks"].append(row["name"])
            found["peak_mb"] = max(found["peak_mb"], row["peak_mb"])
        process.wait()
    found["seconds"] = time.perf_counter() - start
    return found


def firsts(found: dict) -> list[int]:
    """Index of the first episode of each task."""
    return [found["tasks"].index(t) for t in dict.fromkeys(found["tasks"])]


def report(title: str, stock: dict[int, dict], ours: dict[int, dict]) -> dict[str, float]:
    """Print both sides; the ratios."""

    def figures(runs, is_stock):
        one, first = runs[1], firsts(runs[1])
        first_reset = mean(one["resets"][i] + (one["loads"][i] if is_stock else 0) for i in first)
        again = [r for i, r in enumerate(one["resets"]) if i not in first]
        return {
            "reset, first, s": first_reset, "reset, repeated, s": mean(again),
            "step in a task's first episode, ms": 1000 * mean(s for i in first for s in one["steps"][i]),
            "step, all episodes, ms": 1000 * mean(s for steps in one["steps"] for s in steps),
            **{f"episodes/min, {w} worker{'s' * (w > 1)}": 60 * len(r["tasks"]) / r["seconds"] for w, r in runs.items()},
            "peak memory of a worker, MB": max(r["peak_mb"] for r in runs.values())}

    a, b = figures(stock, True), figures(ours, False)
    print(f"\n{title}\n{'':38}{'stock':>12}{'ours':>12}{'ratio':>9}")
    ratios = {}
    for k in a:
        ratios[k] = b[k] / a[k] if k.startswith("episodes/min") else a[k] / max(b[k], 1e-9)
        print(f"{k:38}{a[k]:12.4g}{b[k]:12.4g}{ratios[k]:8.1f}x")
    return ratios


def bench_alfworld(games: int, rollouts: int, stock_rollouts: int, many: int) -> list[tuple]:
    env, episodes = ALFWorld(), []
    tasks = env.tasks("seen")
    folders = ALFWorld.games()["seen"]
    for task in tasks[:games]:
        for i in range(rollouts):  # random admissible actions: harder on a table of what was seen than an agent is
            draw, actions = random.Random(f"{task} {i}"), []
            env.reset(task)
            for _ in range(30):
                actions.append(draw.choice(sorted(env.game.commands(env.here))))
                if env.step(actions[-1])[2]:
                    break
            episodes.append((task, actions))
    jobs = [{"game": str(folders[task] / "game.tw-pddl"), "actions": actions}
            for i, (task, actions) in enumerate(episodes) if i % rollouts < stock_rollouts]
    stock = {w: play_stock(jobs, w) for w in (1, 2)}
    ours = {w: play_ours("alfworld", episodes, w) for w in (1, 2)}
    ratios = report(f"ALFWorld: {games} games, {rollouts} rollouts each (stock: {stock_rollouts}), 30 random actions", stock, ours)
    words = [f"{verb} {place} {i}" for verb in ("go to", "open") for i in (1, 2, 3)
             for place in ("cabinet", "drawer", "shelf", "countertop", "fridge", "desk", "bed", "dresser", "toilet", "sidetable")]
    draw, train = random.Random(0), env.tasks("train")[:many]
    peak = play_ours("alfworld", [(t, draw.choices(words, k=30)) for t in train for _ in range(5)], 1)["peak_mb"]
    return [("alfworld_episode_ratio", ratios["episodes/min, 1 worker"], 10),
            ("alfworld_step_ratio", ratios["step in a task's first episode, ms"], 4),
            (f"alfworld_mb_after_{many}_games", peak, -1024)]


def bench_sciworld() -> None:
    tasks = [f"{kind}/{i}" for kind in ("find-animal", "find-plant", "lifespan-longest-lived", "power-component") for i in (0, 1)]

    async def gold():
        async with EnvPool("sciworld", 2) as pool:
            async with pool.session() as env:
                return {t: [a for a, _ in (await env("expert", t, deadline=300))["steps"]] for t in tasks}

    actions = asyncio.run(gold())
    jobs = [{"task": t, "actions": actions[t]} for t in tasks for _ in range(3)]
    stock = {w: play_stock(jobs, w) for w in (1, 2)}
    ours = {w: play_ours("sciworld", [(j["task"], j["actions"]) for j in jobs], w) for w in (1, 2)}
    report("ScienceWorld: 8 tasks, 3 rollouts each, the expert's actions", stock, ours)


def made_up_catalogue(folder: Path, products: int) -> None:
    """WebShop's two files with this many products, as long as the hundred real ones are on average: titles of 19 words,
    descriptions of 105, five features of 25, options; words by Zipf's law. A tenth of them have an instruction."""
    import numpy as np

    draw, choose = np.random.default_rng(0), random.Random(0)
    colours, sizes = "red blue black white grey green".split(), "small medium large x-large".split()

    def word(rank: int) -> str:
        letters = ""
        while rank:
            rank, k = divmod(rank, 26)
            letters += "etaoinshrdlcumwfgypbvkjxqz"[k]
        return "wor" + letters

    with (folder / "items_shuffle.json").open("w") as f, (folder / "items_ins_v2.json").open("w") as g:
        f.write("["), g.write("{")
        for i in range(products):
            words = list(map(word, draw.zipf(1.25, 249).clip(max=5_000_000).tolist()))
            features = [" ".join(words[k : k + 25]) for k in range(124, 249, 25)]
            options = {"Color": [{"value": v} for v in choose.sample(colours, 3)], "Size": [{"value": v} for v in sizes]}
            row = {"asin": f"B{i:09}", "name": " ".join(words[:19]), "full_description": " ".join(words[19:124]), "query": words[0],
                   "small_description": features, "pricing": f"${choose.randint(5, 300)}.99", "images": ["https://example.com/1.jpg"] * 5,
                   "customization_options": options if i % 3 == 0 else "", "category": "garden", "average_rating": "4.5",
                   "product_category": f"Home \u203a {words[1]} \u203a {words[2]}"}
            known = {"attributes": [" ".join(words[:2]), words[3]]}
            if i % 10 == 0:
                known |= {"instruction": f"Find me {words[0]} that is {words[3]}", "instruction_attributes": [words[3]]}
            comma = ", " * (i > 0)
            f.write(f"{comma}{json.dumps(row)}"), g.write(f'{comma}"{row["asin"]}": {json.dumps(known)}')
        f.write("]"), g.write("}")


OPEN = """
import json, resource, sys, time
start = time.perf_counter()
import common
env = common.WebShop()
opened = time.perf_counter() - start
import random
draw, tasks, steps, searches = random.Random(0), env.tasks("train"), [], []
for _ in range(100):
    words, done = env.reset(draw.choice(tasks)).split(), False
    for _ in range(15):
        can = env.clickable()
        action = f"click[{draw.choice(can)}]" if can else f"search[{' '.join(draw.sample(words, min(6, len(words))))}]"
        start = time.perf_counter()
        done = env.step(action)[2]
        (steps if can else searches).append(1000 * (time.perf_counter() - start))
        if done:
            break
status = dict(line.split(":", 1) for line in open("/proc/self/status") if line.startswith("Rss"))
print(json.dumps({"open": opened, "step": sum(steps + searches) / len(steps + searches), "search": sum(searches) / len(searches),
                  "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                  **{k: int(v.split()[0]) / 1024 for k, v in status.items()}}))
"""


def bench_webshop(products: int) -> list[tuple]:
    with tempfile.TemporaryDirectory() as folder:
        made_up_catalogue(Path(folder), products)
        env = {**os.environ, "WEBSHOP_DATA": folder, "XDG_CACHE_HOME": folder}

        def run() -> dict:
            return json.loads(subprocess.run([sys.executable, "-c", OPEN], cwd=ROOT, env=env, stdout=subprocess.PIPE, check=True).stdout)

        first, again = run(), run()
        disk = sum(f.stat().st_size for f in Path(folder).glob("mpo/**/*") if f.is_file()) / 2**20
    print(f"\nWebShop: {products} made-up products, 100 episodes of random actions\n"
          f"start, index not built yet    {first['open']:.2f} s, at most {first['peak']:.0f} MB\n"
          f"start, index stored           {again['open']:.2f} s\n"
          f"step / search                 {again['step']:.2f} / {again['search']:.2f} ms\n"
          f"index on disk                 {disk:.0f} MB\n"
          f"memory of a worker            {again['RssAnon']:.0f} MB of its own, {again['RssFile']:.0f} MB shared with the others")
    if products != 1000:
        return []
    return [("webshop_start_s", first["open"], -3), ("webshop_start_stored_s", again["open"], -1), ("webshop_step_ms", again["step"], -5)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", type=int, default=8, help="ALFWorld games")
    parser.add_argument("--rollouts", type=int, default=25, help="rollouts of each game (M x N = 25 is what scoring does)")
    parser.add_argument("--stock_rollouts", type=int, default=2, help="rollouts of each game with the stock environment")
    parser.add_argument("--many", type=int, default=200, help="games that the worker whose memory is measured has played")
    parser.add_argument("--products", type=int, help="measure WebShop alone, on a made-up catalogue of this size")
    a = parser.parse_args()
    targets = bench_webshop(a.products or 1000)
    if not a.products:
        targets += bench_alfworld(a.games, a.rollouts, a.stock_rollouts, a.many)
        bench_sciworld()
    print()
    for name, measured, goal in targets:
        ok = measured <= -goal if goal < 0 else measured >= goal
        print(f"target {name} measured {measured:.2f} goal {abs(goal)} {'ok' if ok else 'short'}")


if __name__ == "__main__":
    main()
