"""Figures and the HTML page of an evaluation, and the curves of a training run; the files of both
and of the tables (tables.py).

Reads what stage 5 computed: `cells` (rows of eval/conditions.jsonl with `texts`, {task: plan}, and
`episodes`, {task: row}), `results` and `differences`."""

import base64
import gzip
import html
import json
import re
from pathlib import Path

import common

from .tables import (  # noqa: F401 (stage 5 finds agent_names, pooled and with_totals here)
    FIG5,
    INSTRUCTION,
    METRICS,
    TABLES,
    Table,
    agent_names,
    gains,
    judged_table,
    named,
    overview,
    paper_tables,
    pooled,
    rank,
    select,
    short,
    unique,
    with_totals,
)

COLOURS = dict(none="#b8bfc9", sft="#6aa5d8", mpo="#1f5fa8", rft="#e0a458", gpt="#8c6bb1")
MORE_COLOURS = ["#5aa469", "#c0625e", "#3d8f9e", "#a08a5b"]


# ---- figures -------------------------------------------------------------------------------------


def new_figure(width: float, height: float = 3.8, columns: int = 1):
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def save(figure, path: Path) -> None:
    figure.savefig(tmp := path.with_suffix(".tmp.png"), dpi=160)
    tmp.replace(path)


def colour(name: str, number: int) -> str:
    return COLOURS.get(name, MORE_COLOURS[number % len(MORE_COLOURS)])


def errors(cells: list[dict]) -> list[list[float]]:
    """Lengths of the error bars below and above the means, x 100."""
    return [
        [max(0.0, 100 * side * (c["interval"][i] - c["mean"])) for c in cells]
        for i, side in ((0, -1), (1, 1))
    ]


def line(axis, x, cells: list[dict], **options) -> None:
    """Means x 100 with their intervals, joined by a line."""
    means = [100 * c["mean"] for c in cells]
    axis.errorbar(x, means, errors(cells), fmt="o-", capsize=3, **options)


def bars(results: list[dict], metric: str, path: Path) -> None:
    """Bars of a metric for each agent and split, one colour per plan setting."""
    rows = [r for r in results if r[metric]]
    groups, settings = unique(rows, "agent", "split"), unique(sorted(rows, key=rank), "plans")
    figure, [axis] = new_figure(1.5 + 2.2 * len(groups))
    width = 0.8 / len(settings)
    for i, setting in enumerate(settings):
        own = [r for r in rows if r["plans"] == setting]
        shift = (i - (len(settings) - 1) / 2) * width
        x = [groups.index((r["agent"], r["split"])) + shift for r in own]
        cells = [r[metric] for r in own]
        axis.bar(
            x,
            [100 * c["mean"] for c in cells],
            width * 0.92,
            yerr=errors(cells),
            capsize=3,
            color=colour(setting, i),
            label=named(setting),
            error_kw={"lw": 1, "ecolor": "#444"},
        )
        for xi, c in zip(x, cells, strict=True):
            axis.text(
                xi,
                0,
                f"{100 * c['mean']:.3g}",
                fontsize=8,
                ha="center",
                va="bottom",
                color="black" if setting == "none" else "white",
            )
    axis.set_xticks(range(len(groups)), [f"{short(a, rows)}\n{split}" for a, split in groups])
    axis.set(ylabel=f"{METRICS[metric][0]} x 100", ylim=(0, None))
    axis.legend(
        frameon=False,
        ncols=len(settings),
        loc="upper center",
        fontsize=8,
        bbox_to_anchor=(0.5, 1.12),
    )
    save(figure, path)


def lines(results: list[dict], path: Path) -> None:
    """Figure 4: average reward over the agents in the given order, a line per plan setting."""
    rows = [r for r in results if r["reward"]]
    agents, splits = unique(rows, "agent"), unique(rows, "split")
    figure, panels = new_figure(4 * len(splits), columns=len(splits))
    for axis, split in zip(panels, splits, strict=True):
        for i, setting in enumerate(unique(sorted(rows, key=rank), "plans")):
            own = [r for r in rows if (r["plans"], r["split"]) == (setting, split)]
            line(
                axis,
                [agents.index(r["agent"]) for r in own],
                [r["reward"] for r in own],
                color=colour(setting, i),
                label=named(setting),
            )
        axis.set_xticks(range(len(agents)), [short(agent, rows) for agent in agents], rotation=20)
        axis.set(title=split, ylabel="average reward x 100")
    panels[0].legend(frameon=False)
    save(figure, path)


def sample_counts(results: list[dict], path: Path) -> None:
    """Figure 5: average reward over M at the largest N, and over N at the largest M."""
    rows = [r for r in results if r["reward"]]
    rows = [(tuple(map(int, FIG5.fullmatch(r["plans"]).groups())), r) for r in rows]
    figure, panels = new_figure(8, columns=2)
    for fixed, axis in enumerate(reversed(panels)):  # 0: M is fixed, N varies
        most = max(mn[fixed] for mn, _ in rows)
        for i, agent in enumerate(unique([r for _, r in rows], "agent")):
            own = sorted(
                (
                    (mn[1 - fixed], r["reward"])
                    for mn, r in rows
                    if mn[fixed] == most and r["agent"] == agent
                ),
                key=lambda v: v[0],
            )
            line(
                axis,
                [x for x, _ in own],
                [c for _, c in own],
                color=MORE_COLOURS[i % 4],
                label=short(agent, results),
            )
        axis.set(
            xlabel=f"{'NM'[fixed]}, {'MN'[fixed]} = {most}",
            ylabel="average reward x 100",
            xticks=sorted({mn[1 - fixed] for mn, _ in rows if mn[fixed] == most}),
        )
    panels[0].legend(frameon=False)
    save(figure, path)


def judged_bars(verdicts: dict, path: Path) -> None:
    """Figure 6: shares of wins, ties and losses in each dimension."""
    figure, [axis] = new_figure(6.5, 2.6)
    colours = {"win": "#1f5fa8", "tie": "#b8bfc9", "loss": "#e0a458"}
    for y, counts in enumerate(reversed(list(verdicts.values()))):
        total, left = max(1, sum(counts[k] for k in colours)), 0.0
        for name, tint in colours.items():
            share = 100 * counts[name] / total
            axis.barh(y, share, left=left, color=tint, label=name if not y else None)
            if share:
                axis.text(left + share / 2, y, f"{share:.0f}", ha="center", va="center", fontsize=8)
            left += share
    axis.set(xlabel="% of tasks", yticks=range(len(verdicts)), yticklabels=list(verdicts)[::-1])
    axis.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.2), fontsize=8)
    save(figure, path)


def plot_curves(log: list[dict], path: Path) -> None:
    """The metrics of a training run over its steps, training and held out."""
    names = ("loss", "reward_accuracy", "reward_margin", "lr", "grad_norm")
    names = [k for k in names if log and k in log[0]] or ["loss"]
    figure, axes = new_figure(4 * len(names), 3, len(names))
    for axis, name in zip(axes, names, strict=True):
        axis.plot([r["step"] for r in log], [r[name] for r in log], label="training")
        if held := [(r["step"], r[f"eval_{name}"]) for r in log if f"eval_{name}" in r]:
            axis.plot(*zip(*held, strict=True), "o-", label="held out")
            axis.legend()
        axis.set(title=name.replace("_", " "), xlabel="optimizer step")
    save(figure, path)


# ---- the files -----------------------------------------------------------------------------------


def compressed(value) -> str:
    """JSON as gzip in base64, which can stand anywhere in HTML."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(text, 6, mtime=0)).decode()


def page(cells: list[dict], tables: list[Table], figures: dict[str, Path], chunk: int = 40) -> str:
    """One self-contained page (report.html): an index of tasks with the reward of each cell, and
    the conversations in compressed blocks of `chunk` tasks, each opened when it is needed."""
    columns = unique(cells, "agent", "plans", "plan_position")
    by_task: dict[tuple, dict] = {}
    for cell in cells:
        column = columns.index((cell["agent"], cell["plans"], cell["plan_position"]))
        for task, row in cell["episodes"].items():
            key = cell["env"], cell.get("shown", cell["split"]), task
            by_task.setdefault(key, {})[column] = row, cell["texts"].get(task)
    index, blocks = [], []
    for start in range(0, len(by_task), chunk):
        block = []
        for (env, split, task), under in list(by_task.items())[start : start + chunk]:
            played = {i: row for i, (row, _) in under.items() if row}
            episodes = list({id(row): row for row in played.values()}.values())
            numbers = {id(row): n for n, row in enumerate(episodes)}
            index.append(
                [
                    env,
                    task,
                    split,
                    {i: [row["reward"], int(row["success"])] for i, row in played.items()},
                ]
            )
            block.append(
                {
                    "instruction": next(
                        (e["instruction"] for e in episodes if e["instruction"]), ""
                    ),
                    "plans": {i: text for i, (_, text) in under.items()},
                    "episodes": [{k: e[k] for k in ("reward", "end", "steps")} for e in episodes],
                    "played": {i: numbers[id(row)] for i, row in played.items()},
                }
            )
        blocks.append(compressed(block))
    names = [
        {"agent": short(agent, cells), "plans": named(plans), "plan_position": plan_position}
        for agent, plans, plan_position in columns
    ]
    images = {t: base64.b64encode(path.read_bytes()).decode() for t, path in figures.items()}
    pictures = "".join(
        f'<figure><img alt="{t}" src="data:image/png;base64,{image}"><figcaption>{t}</figcaption>'
        "</figure>"
        for t, image in images.items()
    )
    scripts = "".join(
        f'<script type="text/plain" id="block{i}">{b}</script>\n' for i, b in enumerate(blocks)
    )
    return common.fill(
        Path(__file__).with_name("report.html").read_text(),
        figures=pictures,
        blocks=scripts,
        title=html.escape(" ".join(unique(cells, "env"))),
        tables="".join(t.html() for t in tables),
        index=compressed({"columns": names, "tasks": index, "chunk": chunk}),
    )


def write(
    folder: Path,
    cells: list[dict],
    outdated: int,
    results: list[dict],
    differences: list[dict],
    judged: dict | None,
) -> str:
    """Write results.md, results.json, report.html and the paper's tables and figures for which
    there are cells. `judged`: {"plans", "judge", "verdicts"}. Returns the text of results.md."""
    folder.mkdir(exist_ok=True)
    tables = paper_tables(results, differences)
    if judged:
        tables["fig6"] = judged_table(**judged)
    rows = {name: select(results, *TABLES[name][2:]) for name in ("fig3", "fig4", "fig5")}
    rows["fig5"] = [r for r in rows["fig5"] if r["split"] == rows["fig5"][-1]["split"]]
    rows["results"] = select(results, re.compile(r"(?!fig5/).*"), INSTRUCTION)
    draw = {
        "results": lambda path: bars(rows["results"], "reward", path),
        "fig3": lambda path: bars(rows["fig3"], "reward_per_step", path),
        "fig4": lambda path: lines(rows["fig4"], path),
        "fig5": lambda path: sample_counts(rows["fig5"], path),
        "fig6": lambda path: judged_bars(judged["verdicts"], path),
    }
    figures = {}
    for name in ("results", *tables):
        if name in draw and (name == "fig6" or any(r["reward"] for r in rows[name])):
            title = tables[name].title if name in tables else "Average reward"
            figures[title] = folder / f"{name}.png"
            draw[name](figures[title])
    every = [overview(results, outdated), gains(results, differences), *tables.values()]
    for name, table in tables.items():
        common.write_text(
            folder / f"{name}.md", f"{table.markdown()}\n```latex\n{table.latex()}```\n"
        )
    env, runs = ", ".join(unique(cells, "env")), unique(cells, "run")
    text = f"# {env}\n\n" + f"Run folders: {', '.join(runs)}\n\n" * (len(runs) > 1)
    text += "\n".join(t.markdown() for t in every)
    latex = "```latex\n" + "\n".join(t.latex() for t in every) + "```\n"
    common.write_text(folder / "results.md", f"{text}\n# The same in LaTeX\n\n{latex}")
    numbers = {"env": env, "runs": runs, "results": results, "differences": differences}
    numbers |= {"judged": {"plans": judged["plans"], **judged["verdicts"]}} if judged else {}
    common.write_text(folder / "results.json", json.dumps(numbers, indent=1) + "\n")
    every = [*tables.values(), *every[1::-1]]
    common.write_text(folder / "report.html", page(cells, every, figures))
    return text
