"""report.html: tables, figures, and each task's plans and conversations in one self-contained page.

The page's script (report.html) shows an index of the tasks with the reward under each column, and
opens a task's conversations from compressed blocks when they are needed. A column is an agent, a
plan setting and a plan position. The page opens at the task where SFT's and MPO's plan differ most
in reward."""

import base64
import gzip
import html
import json
from pathlib import Path
from typing import NamedTuple

import common
from data.report.tables import Table, named, short, unique

BLOCK_SIZE = 40  # tasks in a compressed block


def page(conditions: list[dict], tables: list[Table], figures: dict[str, Path]) -> str:
    """The page's HTML. `conditions` with `texts`, {task: plan}, and `episodes`, {task: row};
    `figures`: {title: path}."""
    columns = []
    for agent, plans, plan_position in unique(conditions, "agent", "plans", "plan_position"):
        names = {"agent": short(agent, conditions), "plans": named(plans)}
        columns.append({**names, "plan_position": plan_position})
    tasks = tasks_of(conditions)
    first = most_different(conditions, tasks)
    index = {
        "columns": columns,
        "tasks": list(map(summary, tasks)),
        "block_size": BLOCK_SIZE,
        "first": first.number if first else None,
    }
    blocks = ""
    for number, start in enumerate(range(0, len(tasks), BLOCK_SIZE)):
        block = compressed(list(map(conversations, tasks[start : start + BLOCK_SIZE])))
        blocks += f'<script type="text/plain" id="block{number}">{block}</script>\n'
    return common.fill(
        Path(__file__).with_name("report.html").read_text(),
        figures="".join(picture(title, path) for title, path in figures.items()),
        blocks=blocks,
        title=html.escape(" ".join(unique(conditions, "env"))),
        tables="".join(table.html() for table in tables),
        index=compressed(index),
    )


def tasks_of(conditions: list[dict]) -> list[dict]:
    """The tasks of each environment and split: {"env", "split", "task", "plans", "episodes"}, the
    last two by number of column."""
    columns = unique(conditions, "agent", "plans", "plan_position")
    found: dict[tuple, dict] = {}
    for c in conditions:
        column = columns.index((c["agent"], c["plans"], c["plan_position"]))
        split = c.get("shown", c["split"])
        for task_name, episode in c["episodes"].items():
            key = (c["env"], split, task_name)
            if key not in found:
                names = {"env": c["env"], "split": split, "task": task_name}
                found[key] = {**names, "plans": {}, "episodes": {}}
            task = found[key]
            task["plans"][column] = c["texts"].get(task_name)
            task["episodes"][column] = episode
    return list(found.values())


class Contrast(NamedTuple):
    """A task's number on the page, an agent, and its columns with two plan settings."""

    number: int
    agent: str
    sft: int
    mpo: int


def most_different(conditions: list[dict], tasks: list[dict]) -> Contrast | None:
    """The task of `tasks_of(conditions)` where an agent's rewards with SFT's and with MPO's plan
    differ most, whichever is higher; of equals the first. None if they are equal everywhere, or if
    one of the two was not played."""
    columns = unique(conditions, "agent", "plans", "plan_position")
    found = None
    largest = 0.0
    for number, task in enumerate(tasks):
        for agent, plans, plan_position in columns:
            if plans != "sft" or (agent, "mpo", plan_position) not in columns:
                continue
            sft = columns.index((agent, "sft", plan_position))
            mpo = columns.index((agent, "mpo", plan_position))
            with_sft = task["episodes"].get(sft)
            with_mpo = task["episodes"].get(mpo)
            if not with_sft or not with_mpo:
                continue
            difference = abs(with_mpo["reward"] - with_sft["reward"])
            if difference > largest:
                largest = difference
                found = Contrast(number, agent, sft, mpo)
    return found


def summary(task: dict) -> list:
    """A task in the index: [env, task, split, {column: [reward, 1 if successful else 0]}]."""
    results = {}
    for column, episode in task["episodes"].items():
        if episode:
            results[column] = [episode["reward"], int(episode["success"])]
    return [task["env"], task["task"], task["split"], results]


def conversations(task: dict) -> dict:
    """A task in a block. An episode that several columns share (two settings with the same plan)
    stands there once; `played` is {column: number of its episode}."""
    instruction = ""
    episodes = []
    played = {}
    numbers: dict[int, int] = {}
    for column, episode in task["episodes"].items():
        if not episode:
            continue
        if id(episode) not in numbers:
            numbers[id(episode)] = len(episodes)
            episodes.append({key: episode[key] for key in ("reward", "end", "steps")})
        played[column] = numbers[id(episode)]
        if not instruction:
            instruction = episode["instruction"]
    return {
        "instruction": instruction,
        "plans": task["plans"],
        "episodes": episodes,
        "played": played,
    }


def compressed(value) -> str:
    """JSON as gzip in base64, which can stand anywhere in HTML."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def picture(title: str, path: Path) -> str:
    image = base64.b64encode(path.read_bytes()).decode()
    title = html.escape(title)
    return (
        f'<figure><img alt="{title}" src="data:image/png;base64,{image}">'
        f"<figcaption>{title}</figcaption></figure>"
    )
