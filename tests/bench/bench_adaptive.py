"""What `--adaptive` would spend and find on recorded rollouts:

    python tests/bench/bench_adaptive.py runs/NAME/rollouts.jsonl

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
    """{plan: the rewards that the adaptive choice would see} of one task's recorded rewards."""
    most = {plan: len(rewards) for plan, rewards in recorded.items()}
    seen = {plan: [] for plan in recorded}
    chosen = score.undecided(seen, most)
    while chosen:
        for plan in chosen:
            seen[plan].append(recorded[plan][len(seen[plan])])
        chosen = score.undecided(seen, most)
    return seen


def pair(rewards: dict[str, list[float]]) -> tuple[str, str] | None:
    """(best, worst) plan by mean reward; None for a tie."""
    q = {plan: common.mean(r) for plan, r in rewards.items()}
    best = max(q, key=q.get)
    worst = min(q, key=q.get)
    return (best, worst) if q[best] > q[worst] else None


def agrees(found: tuple[str, str] | None, recorded: dict[str, list[float]]) -> bool:
    """Whether the pair is a best and a worst plan by all recorded rewards."""
    q = {plan: common.mean(r) for plan, r in recorded.items()}
    highest = max(q.values())
    lowest = min(q.values())
    if highest == lowest:
        return found is None
    return found is not None and q[found[0]] == highest and q[found[1]] == lowest


def rewards_by_task(path: str, n: int) -> list[dict[str, list[float]]]:
    """{plan: its first `n` rewards} of each task that has two plans with as many."""
    tasks: dict[str, dict[str, list[float]]] = {}
    for row in common.read_rows(path, ("task", "plan", "reward", "end")):
        if row["end"] != "crash":
            plans = tasks.setdefault(row["task"], {})
            plans.setdefault(row["plan"], []).append(row["reward"])
    found = []
    for plans in tasks.values():
        complete = {plan: rewards[:n] for plan, rewards in plans.items() if len(rewards) >= n}
        if len(complete) > 1:
            found.append(complete)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rollouts")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--shuffles", type=int, default=100)
    a = parser.parse_args()
    tasks = rewards_by_task(a.rollouts, a.n)
    if not tasks:
        sys.exit(f"{a.rollouts} has no task with two plans of --n {a.n} rollouts")
    draw = random.Random(0)
    spent = 0  # rollouts that the adaptive choice plays
    total = 0
    agree = 0  # orders in which it has the same answer
    with_pair = 0  # orders of tasks that have a pair by all rollouts
    found = 0  # those of them in which the adaptive choice has it
    for plans in tasks:
        for _ in range(a.shuffles):
            seen = replay({plan: draw.sample(r, len(r)) for plan, r in plans.items()})
            right = agrees(pair(seen), plans)
            spent += sum(map(len, seen.values()))
            total += sum(map(len, plans.values()))
            has_pair = pair(plans) is not None
            if right:
                agree += 1
            if has_pair:
                with_pair += 1
            if has_pair and right:
                found += 1
    orders = len(tasks) * a.shuffles
    plans_per_task = common.mean(map(len, tasks))
    print(
        f"{len(tasks)} tasks with {plans_per_task:.1f} plans of {a.n} rollouts, {a.shuffles} "
        f"orders each: {spent / total:.0%} of the rollouts spent, the same answer for "
        f"{agree / orders:.0%} of the tasks; of the tasks with a pair ({with_pair / orders:.0%}), "
        f"the same for {found / max(1, with_pair):.0%}"
    )


if __name__ == "__main__":
    main()
