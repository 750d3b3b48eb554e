"""Does MPO beat its own SFT planner? The table of `make evidence`, over several seeds.

    python data/evidence.py --runs runs/evidence-NAME/seed0 ... --to data/NAME/evidence.json
    python data/evidence.py --rows data/NAME/evidence.json       # the table again

The file has a row for each episode: `plans`, `seed`, `task`, `reward`, `success`.
"""

import importlib
import re
from dataclasses import dataclass
from typing import List, Optional

import common
from common import InputError, arg, mean
from data.report import tables

ev = importlib.import_module("05_eval")


@dataclass
class Args:
    runs: List[str] = arg([], "evaluated run folders, whose names end in the seed")
    rows: Optional[str] = arg(None, "a file of rows, in place of --runs")
    to: Optional[str] = arg(
        None,
        "where to write the rows of the test splits; without it the "
        "table is of the validation tasks (split train)",
    )
    seed: int = arg(0, "random seed of the bootstrap")


def rows_of(runs: list[str], validation: bool) -> list[dict]:
    """The episodes of each run folder's newest cells. Raises `InputError` if one is missing."""
    rows = []
    for run in runs:
        seed = int(re.search(r"\d*$", run)[0] or 0)
        for cell in ev.with_episodes(run, ev.asked_cells(run)[0]):
            if (cell["split"] == "train") != validation:
                continue
            if missing := [t for t, e in cell["episodes"].items() if not e]:
                raise InputError(
                    f"{run}: {cell['plans']} has no episode of {missing[0]} and "
                    f"{len(missing) - 1} other tasks: run make evidence again"
                )
            rows += [
                {
                    "plans": cell["plans"],
                    "seed": seed,
                    "task": task,
                    "reward": round(e["reward"], 4),
                    "success": bool(e["success"]),
                }
                for task, e in cell["episodes"].items()
            ]
    return rows


def table(rows: list[dict], seed: int = 0) -> str:
    """Means x 100 over tasks and seeds with 95% bootstrap intervals that resample each seed's tasks
    (seeds as strata), the paired differences from SFT, and the share of the room between SFT and
    the oracle (if that is better) that a trained planner recovers."""
    value = {(r["plans"], r["seed"], r["task"]): (r["reward"], float(r["success"])) for r in rows}
    strata = {s: {} for s in sorted(tables.unique(rows, "seed"))}
    for r in rows:
        strata[r["seed"]].setdefault(r["task"])
    settings = [
        s
        for s in tables.unique(rows, "plans")
        if all((s, seed, t) in value for seed, tasks in strata.items() for t in tasks)
    ]
    settings.sort(key=lambda s: tables.rank({"plans": s, "plan_position": "instruction"}))
    if "sft" not in settings:
        raise InputError("the table compares with sft's plans: there are none of every seed")

    def cell(found: dict, sign: str = "") -> str:
        low, high = (100 * x for x in found["interval"])
        p = f", p {found['p']:.2g}" if "p" in found else ""
        return f"{100 * found['mean']:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]{p}"

    def values(plans: str, metric: int) -> list[list[float]]:
        return [[value[plans, s, t][metric] for t in tasks] for s, tasks in strata.items()]

    def gain(plans: str, metric: int) -> dict:
        return ev.paired_test(
            [
                [x - y for x, y in zip(a, b, strict=True)]
                for a, b in zip(values(plans, metric), values("sft", metric), strict=True)
            ],
            seed,
        )

    lines = [
        "| plans | reward | success | reward over SFT | success over SFT | of the room |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    room = {s: mean(map(mean, values(s, 0))) - mean(map(mean, values("sft", 0))) for s in settings}
    for s in settings:
        cells = [cell(ev.mean_and_interval(values(s, m), seed)) for m in (0, 1)]
        cells += [cell(gain(s, m), "+") if s != "sft" else "" for m in (0, 1)]
        learnt = s not in ("none", "wrong", "sft", "oracle")
        cells += [f"{room[s] / room['oracle']:.0%}" if learnt and room.get("oracle", 0) > 0 else ""]
        lines.append(f"| {tables.named(s)} | " + " | ".join(cells) + " |")
    counts = ", ".join(f"{len(tasks)} of seed {s}" for s, tasks in strata.items())
    return "\n".join([*lines, "", f"Tasks: {counts}."])


def main(a: Args) -> None:
    if a.rows:
        rows = common.read_rows(a.rows, ("plans", "seed", "task", "reward", "success"))
    else:
        rows = rows_of(a.runs, not a.to)
        if not rows:
            raise InputError("no evaluation in --runs: run make evidence")
    if a.to:
        common.write_rows(a.to, rows)
    print(table(rows, a.seed))


if __name__ == "__main__":
    common.run_stage(main, Args)
