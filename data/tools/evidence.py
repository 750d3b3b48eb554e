"""Does MPO beat its own SFT planner? Table and picture of `make evidence`, over several seeds.

    python -m data.tools.evidence --runs runs/evidence-NAME/seed0 ... --to FILE.csv
    python -m data.tools.evidence --rows data/NAME/evidence.csv      # the table again
    python -m data.tools.evidence --readme                           # the README's tables
    python -m data.tools.evidence --picture data/report/evidence.png # the README's picture

The CSV file has a row for each seed and test task: `seed`, `task`, and for each plan setting (none,
mismatched, sft, per_type, per_type_adapted, mpo, oracle) that was played SETTING_reward,
SETTING_success (0 or 1) and, where it was kept, SETTING_plan. --readme and --picture read
data/*/evidence.csv. A demo.csv beside it has the same columns: `make demo` with three seeds.
"""

import csv
import importlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional

import common
from common import InputError, arg, mean
from data.report import figures, tables

ev = importlib.import_module("05_eval")


@dataclass
class Args:
    runs: List[str] = arg([], "evaluated run folders, whose names end in the seed")
    rows: Optional[str] = arg(None, "a CSV file of rows, in place of --runs")
    to: Optional[str] = arg(
        None,
        "where to write the rows of the test splits; without it the "
        "table is of the validation tasks (split train)",
    )
    readme: bool = arg(False, "print the README's rows of the demo and of the result")
    picture: Optional[str] = arg(None, "where to draw the README's picture")
    seed: int = arg(0, "random seed of the bootstrap")


# ---- rows ----------------------------------------------------------------------------------------


def rows_of(runs: list[str], validation: bool) -> list[dict]:
    """The rows of each run folder's newest conditions, of the validation tasks or the test tasks.
    Raises `InputError` if an episode is missing."""
    rows: dict[tuple, dict] = {}
    for run in runs:
        seed = int(re.search(r"\d*$", Path(run).name)[0] or 0)
        conditions, _ = ev.current_conditions(run)
        for condition in ev.load_episodes(run, conditions):
            if (condition["split"] == "train") != validation:
                continue
            setting = condition["plans"]
            missing = [task for task, episode in condition["episodes"].items() if not episode]
            if missing:
                raise InputError(
                    f"{run}: {setting} has no episode of {missing[0]} and "
                    f"{len(missing) - 1} other tasks: run make evidence again"
                )
            for task, episode in condition["episodes"].items():
                row = rows.setdefault((seed, task), {"seed": seed, "task": task})
                row[f"{setting}_reward"] = round(episode["reward"], 4)
                row[f"{setting}_success"] = int(episode["success"])
                if setting != "none":
                    row[f"{setting}_plan"] = condition["texts"][task]
    return list(rows.values())


def write_csv(path, rows: list[dict]) -> None:
    columns = ["seed", "task"]
    for setting in settings_of(rows):
        for name in ("reward", "success", "plan"):
            if any(f"{setting}_{name}" in row for row in rows):
                columns.append(f"{setting}_{name}")
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    common.write_text(path, text.getvalue())


def read_csv(path) -> list[dict]:
    """The rows of a CSV file, with or without plans; an empty cell is left out. Raises `InputError`
    with file and line for a row that is not complete or a number that is not one."""
    if not Path(path).exists():
        raise InputError(f"{path} does not exist: make evidence writes it")
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"seed", "task"} <= set(reader.fieldnames or []):
            raise InputError(f"{path}: the first line must name the columns, among them seed, task")
        for texts in reader:
            try:
                rows.append(_values(texts))
            except ValueError as e:
                raise InputError(f"{path}:{reader.line_num}: {e}; fix that line") from None
    return rows


def _values(texts: dict[str, str]) -> dict:
    if None in texts or not texts["seed"] or not texts["task"]:
        raise ValueError("a row has a seed, a task and at most one cell for each column")
    row = {}
    for column, text in texts.items():
        if not text:
            continue
        if column == "seed" or column.endswith("_success"):
            row[column] = int(text)
        elif column.endswith("_reward"):
            row[column] = float(text)
        else:
            row[column] = text
    return row


# ---- statistics ----------------------------------------------------------------------------------


def settings_of(rows: list[dict]) -> list[str]:
    """The plan settings in the order of tables."""
    settings = set()
    for row in rows:
        for column in row:
            if column.endswith("_reward"):
                settings.add(column.removesuffix("_reward"))
    return sorted(settings, key=lambda s: tables.rank({"plans": s, "plan_position": "instruction"}))


def complete_settings(rows: list[dict]) -> list[str]:
    """The plan settings that have an episode of each seed and task."""
    complete = []
    for setting in settings_of(rows):
        if all(f"{setting}_reward" in row for row in rows):
            complete.append(setting)
    return complete


def values(rows: list[dict], setting: str, metric: str) -> list[float]:
    """ "reward" or "success" of each task: the mean over the seeds. The seeds share the tasks, so
    what they do at one task is one value to the bootstrap and the permutation test."""
    by_task: dict[str, list[float]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row[f"{setting}_{metric}"])
    return [mean(of_seeds) for of_seeds in by_task.values()]


def average(rows: list[dict], setting: str, metric: str, seed: int) -> dict:
    """{"mean", "interval"}, the 95% bootstrap interval over tasks."""
    return ev.mean_and_interval([values(rows, setting, metric)], seed)


def gain(rows: list[dict], setting: str, base: str, metric: str, seed: int) -> dict:
    """{"mean", "interval", "p"} of the paired differences of a setting from another one."""
    pairs = zip(values(rows, setting, metric), values(rows, base, metric), strict=True)
    return ev.paired_test([[own - other for own, other in pairs]], seed)


def mean_reward(rows: list[dict], setting: str) -> float:
    """The mean over the tasks of the mean over the seeds."""
    return mean(values(rows, setting, "reward"))


def recovered(rows: list[dict], setting: str) -> str:
    """The share of the headroom, the reward from SFT's plans to the oracle's, that a trained
    planner or one plan per type recovers; empty where there is no headroom."""
    if setting in ("none", "mismatched", "sft", "oracle"):
        return ""
    if "oracle" not in complete_settings(rows):
        return ""
    sft = mean_reward(rows, "sft")
    headroom = mean_reward(rows, "oracle") - sft
    if headroom <= 0:
        return ""
    return f"{(mean_reward(rows, setting) - sft) / headroom:.0%}"


# ---- table, rows of the README, picture ----------------------------------------------------------


def with_p(difference: dict) -> str:
    return f"{tables.with_interval(difference, '+')}, p {difference['p']:.2g}"


def table(rows: list[dict], seed: int = 0) -> str:
    """Means x 100 over tasks and seeds, paired differences from SFT, the share of the headroom
    between SFT and the oracle that a setting recovers, and MPO's paired differences from one plan
    per type. A setting that some seed or task lacks is left out."""
    settings = complete_settings(rows)
    if "sft" not in settings:
        raise InputError("the table compares with sft's plans: there are none of every seed")
    lines = [
        "| plans | reward | success | reward over SFT | success over SFT | of the headroom |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for setting in settings:
        cells = [tables.named(setting)]
        for metric in ("reward", "success"):
            cells.append(tables.with_interval(average(rows, setting, metric, seed)))
        for metric in ("reward", "success"):
            over_sft = gain(rows, setting, "sft", metric, seed)
            cells.append("" if setting == "sft" else with_p(over_sft))
        cells.append(recovered(rows, setting))
        lines.append("| " + " | ".join(cells) + " |")
    counts = []
    for s in sorted(tables.unique(rows, "seed")):
        counts.append(f"{len(tables.where(rows, seed=s))} of seed {s}")
    lines += ["", f"Tasks: {', '.join(counts)}."]
    for base in ("per_type", "per_type_adapted"):
        if base in settings and "mpo" in settings:
            reward = with_p(gain(rows, "mpo", base, "reward", seed))
            success = with_p(gain(rows, "mpo", base, "success", seed))
            lines.append(f"MPO over '{tables.named(base)}': reward {reward}; success {success}.")
    return "\n".join(lines)


def committed() -> dict[str, list[dict]]:
    """{environment's name, as its README is headed: its rows} of all environments."""
    found = {}
    for path in sorted(common.DATA.glob("*/evidence.csv")):
        heading = path.with_name("README.md").read_text(encoding="utf-8").splitlines()[0]
        found[heading.removeprefix("# ")] = read_csv(path)
    return found


def readme_rows(seed: int = 0) -> list[str]:
    """The README's result table: average reward x 100, a line per environment."""
    lines = [
        "| environment | test tasks | no plan | SFT planner | MPO planner | MPO over SFT | "
        "oracle plan |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, rows in committed().items():
        cells = [name, str(len(tables.unique(rows, "task")))]
        cells.append(f"{100 * mean_reward(rows, 'none'):.1f}")
        cells.append(tables.with_interval(average(rows, "sft", "reward", seed)))
        cells.append(tables.with_interval(average(rows, "mpo", "reward", seed)))
        cells.append(with_p(gain(rows, "mpo", "sft", "reward", seed)))
        cells.append(f"{100 * mean_reward(rows, 'oracle'):.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def demo_rows(rows: list[dict], seed: int = 0) -> list[str]:
    """The README's table of the demo: average reward x 100, a line per seed of `make demo`."""
    settings = ("none", "sft", "per_type_adapted", "mpo", "oracle")
    names = ("no plan", "SFT", "adapted", "MPO", "oracle")
    lines = [
        f"| seed | {' | '.join(names)} | MPO over SFT |",
        "| --- |" + " --- |" * (len(names) + 1),
    ]
    parts = {}
    for s in sorted(tables.unique(rows, "seed")):
        parts[str(s)] = tables.where(rows, seed=s)
    parts["all"] = rows
    for name, own in parts.items():
        cells = [name]
        cells += [f"{100 * mean_reward(own, setting):.1f}" for setting in settings]
        cells.append(with_p(gain(own, "mpo", "sft", "reward", seed)))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw(path: Path, seed: int = 0) -> None:
    """The README's picture: the average reward with each plan setting, a panel per environment."""
    panels = {}
    for name, rows in committed().items():
        title = f"{name}, {len(tables.unique(rows, 'task'))} test tasks"
        panels[title] = {s: average(rows, s, "reward", seed) for s in complete_settings(rows)}
    figures.setting_bars(panels, path)


def main(a: Args) -> None:
    if a.readme:
        for path in common.DATA.glob("*/demo.csv"):
            print("\n".join([*demo_rows(read_csv(path), a.seed), ""]))
        print("\n".join(readme_rows(a.seed)))
        return
    if a.picture:
        draw(Path(a.picture), a.seed)
        return
    rows = read_csv(a.rows) if a.rows else rows_of(a.runs, validation=not a.to)
    if not rows:
        raise InputError("no evaluation in --runs or --rows: run make evidence")
    if a.to:
        write_csv(a.to, rows)
    print(table(rows, a.seed))


if __name__ == "__main__":
    common.run_stage(main, Args)
