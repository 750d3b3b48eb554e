"""What `--adaptive` would spend and find on recorded rollouts:

    python tests/bench_adaptive.py runs/NAME/rollouts.jsonl

Replays the adaptive choice on the rewards of all tasks with at least two plans of --n rollouts, in
--shuffles random orders, and compares its pair with that of all rollouts. They agree if its best
plan is one of the best and its worst one of the worst by all rollouts or, if all plans are equal,
if it finds no pair.
"""

import argparse
import importlib
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402

score = importlib.import_module("03_sample_score")


def replay(recorded: dict[str, list[float]]) -> dict[str, list[float]]:
    n = len(next(iter(recorded.values())))
    seen = {plan: [] for plan in recorded}
    while chosen := score.undecided(seen, n):
        for plan in chosen:
            seen[plan].append(recorded[plan][len(seen[plan])])
    return seen


def pair(rewards: dict[str, list[float]]) -> tuple[str, str] | None:
    """(best, worst) plan by mean reward; None for a tie."""
    q = {plan: common.mean(r) for plan, r in rewards.items()}
    best, worst = max(q, key=q.get), min(q, key=q.get)
    return (best, worst) if q[best] > q[worst] else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rollouts")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--shuffles", type=int, default=100)
    a = parser.parse_args()
    tasks: dict[str, dict[str, list[float]]] = {}
    for row in common.read_rows(a.rollouts, ("task", "plan", "reward", "end")):
        if row["end"] != "crash":
            tasks.setdefault(row["task"], {}).setdefault(row["plan"], []).append(row["reward"])
    tasks = {
        t: {p: r[: a.n] for p, r in plans.items() if len(r) >= a.n} for t, plans in tasks.items()
    }
    tasks = {t: plans for t, plans in tasks.items() if len(plans) > 1}
    draw, spent, total, agree, found, of = random.Random(0), 0, 0, 0, 0, 0
    for plans in tasks.values():
        q = {p: common.mean(r) for p, r in plans.items()}
        truth = pair(plans)
        for _ in range(a.shuffles):
            seen = replay({p: draw.sample(r, len(r)) for p, r in plans.items()})
            mine = pair(seen)
            spent += sum(map(len, seen.values()))
            total += sum(map(len, plans.values()))
            ends = mine and (q[mine[0]], q[mine[1]])
            right = ends == (max(q.values()), min(q.values())) if truth else mine is None
            agree += right
            of, found = of + (truth is not None), found + (right and truth is not None)
    runs = len(tasks) * a.shuffles
    plans = common.mean(len(p) for p in tasks.values())
    print(
        f"{len(tasks)} tasks with {plans:.1f} plans of {a.n} rollouts, {a.shuffles} orders each: "
        f"{spent / total:.0%} of the rollouts spent, the same answer for {agree / runs:.0%} of "
        f"the tasks; of the tasks with a pair ({of / runs:.0%}), the same for "
        f"{found / max(1, of):.0%}"
    )


if __name__ == "__main__":
    main()
