"""The files of a report: which there are, and what goes into each.

Reads what stage 5 computed: `conditions` (rows of eval/conditions.jsonl with `texts`, {task: plan},
and `episodes`, {task: row}), `results` and `differences` (tables.py).
"""

import itertools
import json
import textwrap
from pathlib import Path

import common
from data.report import figures
from data.report.page import most_different, page, tasks_of
from data.report.tables import (
    TABLES,
    Table,
    gains,
    judged_table,
    overview,
    paper_tables,
    select,
    short,
    unique,
    where,
)


def write(
    folder: Path,
    conditions: list[dict],
    outdated: int,
    results: list[dict],
    differences: list[dict],
    judged: dict | None,
) -> str:
    """Write results.md, results.json, report.html and the paper's tables and figures for which
    there are results. `judged`: {"plans", "judge", "verdicts"}. Returns the tables in Markdown."""
    folder.mkdir(exist_ok=True)
    tables = paper_tables(results, differences)
    if judged:
        tables["fig6"] = judged_table(**judged)
    drawn = draw_figures(folder, tables, results, judged)
    conditions_table = overview(results, outdated)
    gains_table = gains(results, differences)

    envs = unique(conditions, "env")
    runs = unique(conditions, "run")
    write_paper_tables(folder, tables)
    all_tables = [conditions_table, gains_table, *tables.values()]
    text = write_markdown(folder, envs, runs, all_tables)
    write_json(folder, envs, runs, results, differences, judged)
    html = page(conditions, [*tables.values(), gains_table, conditions_table], drawn)
    common.write_text(folder / "report.html", html)
    return text


WIDTH = 38  # of each of two columns, for a terminal of 80


def what_was_learnt(conditions: list[dict]) -> str:
    """Text for a terminal: SFT's and MPO's plan side by side, with their rewards, for the task at
    which report.html opens; empty if there is none."""
    tasks = tasks_of(conditions)
    found = most_different(conditions, tasks)
    if found is None:
        return ""
    task = tasks[found.number]
    sft = plan_with_reward("SFT", task, found.sft)
    mpo = plan_with_reward("MPO", task, found.mpo)
    instruction = task["episodes"][found.sft]["instruction"].strip().split("\n\n")[-1]
    agent = short(found.agent, conditions)
    lines = [
        f"The task where SFT's and MPO's plan differ most in reward (agent: {agent}):",
        f"{task['task']} ({task['split']})",
        *textwrap.wrap(instruction, 2 * WIDTH + 3),
        "",
    ]
    for left, right in itertools.zip_longest(sft, mpo, fillvalue=""):
        lines.append(f"{left:{WIDTH}} | {right}".rstrip())
    return "\n".join(lines)


def plan_with_reward(name: str, task: dict, column: int) -> list[str]:
    """The lines of a text column: a plan under the reward that the agent earned with it."""
    reward = task["episodes"][column]["reward"]
    head = f"{name}, reward x 100: {100 * reward:.1f}"
    lines = [head, "-" * len(head)]
    plan = task["plans"][column] or "no plan"
    for step in plan.splitlines():
        lines += textwrap.wrap(step, WIDTH, subsequent_indent="  ")
    return lines


def write_paper_tables(folder: Path, tables: dict[str, Table]) -> None:
    """Write each table or figure of the paper as NAME.md."""
    for name, table in tables.items():
        text = f"{table.markdown()}\n```latex\n{table.latex()}```\n"
        common.write_text(folder / f"{name}.md", text)


def write_markdown(folder: Path, envs: list, runs: list, tables: list[Table]) -> str:
    """Write results.md: the tables in Markdown, which are returned, then in LaTeX."""
    text = f"# {', '.join(envs)}\n\n"
    if len(runs) > 1:
        text += f"Run folders: {', '.join(runs)}\n\n"
    text += "\n".join(table.markdown() for table in tables)
    latex = "\n".join(table.latex() for table in tables)
    markdown = f"{text}\n# The same in LaTeX\n\n```latex\n{latex}```\n"
    common.write_text(folder / "results.md", markdown)
    return text


def write_json(
    folder: Path,
    envs: list,
    runs: list,
    results: list[dict],
    differences: list[dict],
    judged: dict | None,
) -> None:
    """Write results.json: all numbers of the tables."""
    numbers = {"env": ", ".join(envs), "runs": runs, "results": results, "differences": differences}
    if judged:
        numbers["judged"] = {"plans": judged["plans"], **judged["verdicts"]}
    common.write_text(folder / "results.json", json.dumps(numbers, indent=1) + "\n")


def draw_figures(
    folder: Path, tables: dict[str, Table], results: list[dict], judged: dict | None
) -> dict[str, Path]:
    """Draw the figures for which there are complete results; {title: path}."""
    drawn = {}
    complete = [r for r in results if r["reward"]]
    shown = where(complete, plan_position="instruction")
    shown = [r for r in shown if not r["plans"].startswith("fig5/")]
    if shown:
        drawn["Average reward"] = folder / "results.png"
        figures.bars(shown, "reward", folder / "results.png")

    fig3 = select(complete, TABLES["fig3"])
    if fig3 and "fig3" in tables:
        drawn[tables["fig3"].title] = folder / "fig3.png"
        figures.bars(fig3, "reward_per_step", folder / "fig3.png")
    fig4 = select(complete, TABLES["fig4"])
    if fig4 and "fig4" in tables:
        drawn[tables["fig4"].title] = folder / "fig4.png"
        figures.agent_lines(fig4, folder / "fig4.png")
    if "fig5" in tables:
        of_fig5 = select(results, TABLES["fig5"])
        totals = where(of_fig5, total=True)
        split = totals[0]["split"] if totals else of_fig5[-1]["split"]
        fig5 = where(select(complete, TABLES["fig5"]), split=split)
        if fig5:
            drawn[tables["fig5"].title] = folder / "fig5.png"
            figures.sample_counts(fig5, folder / "fig5.png")
    if judged:
        drawn[tables["fig6"].title] = folder / "fig6.png"
        figures.judged_bars(judged["verdicts"], folder / "fig6.png")
    return drawn
