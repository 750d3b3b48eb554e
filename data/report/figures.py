"""Draws the figures of an evaluation with matplotlib.

`results` are as in tables.py, without those that have no value because an episode is missing.
"""

from operator import itemgetter
from pathlib import Path

from data.report.tables import FIG5, METRICS, column, named, rank, short, unique, where

COLOURS = {
    "none": "#b8bfc9",
    "mismatched": "#c0625e",
    "sft": "#6aa5d8",
    "mpo": "#1f5fa8",
    "rft": "#e0a458",
    "gpt": "#8c6bb1",
    "per_type": "#c9a227",
    "per_type_adapted": "#8f6f13",
    "wkm": "#3d8f9e",
    "oracle": "#5aa469",
}
MORE_COLOURS = ["#a08a5b", "#c77bb0", "#4d4d8f", "#8a9a3d"]  # of agents and other plan settings
VERDICT_COLOURS = {"win": "#1f5fa8", "tie": "#b8bfc9", "loss": "#e0a458"}
ERROR_BARS = {"lw": 1, "ecolor": "#444"}


# ---- what figures share --------------------------------------------------------------------------


def new_figure(width: float, height: float = 3.8, columns: int = 1):
    """(a figure of this size in inches, its panels side by side)."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # two dollar signs in a name are no formula
    figure = Figure((width, height), layout="constrained")
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def save(figure, path: Path) -> None:
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=160)
    temporary.replace(path)


def colour(name: str, number: int) -> str:
    return COLOURS.get(name, MORE_COLOURS[number % len(MORE_COLOURS)])


def heights(values: list[dict]) -> list[float]:
    """Means x 100."""
    return [100 * value["mean"] for value in values]


def error_bars(values: list[dict]) -> list[list[float]]:
    """Lengths of the error bars below and above the means, x 100."""
    below = []
    above = []
    for value in values:
        low, high = value["interval"]
        below.append(max(0.0, 100 * (value["mean"] - low)))
        above.append(max(0.0, 100 * (high - value["mean"])))
    return [below, above]


def line(panel, x: list, values: list[dict], **options) -> None:
    """Means x 100 with their intervals, joined by a line."""
    panel.errorbar(x, heights(values), error_bars(values), fmt="o-", capsize=3, **options)


# ---- figures -------------------------------------------------------------------------------------


def bars(results: list[dict], metric: str, path: Path) -> None:
    """Bars of a metric for each agent and split, one colour per plan setting."""
    groups = unique(results, "agent", "split")
    settings = unique(sorted(results, key=rank), "plans")
    figure, [panel] = new_figure(max(1.5 + 2.2 * len(groups), 1.2 * len(settings)))
    width = 0.8 / len(settings)
    for i, setting in enumerate(settings):
        own = where(results, plans=setting)
        shift = (i - (len(settings) - 1) / 2) * width
        x = [groups.index((r["agent"], r["split"])) + shift for r in own]
        values = column(own, metric)
        panel.bar(
            x,
            heights(values),
            width * 0.92,
            yerr=error_bars(values),
            capsize=3,
            color=colour(setting, i),
            label=named(setting),
            error_kw=ERROR_BARS,
        )
        text_colour = "black" if setting == "none" else "white"
        for left, height in zip(x, heights(values), strict=True):
            panel.text(
                left, 0, f"{height:.3g}", fontsize=8, ha="center", va="bottom", color=text_colour
            )
    panel.set_xticks(range(len(groups)), [f"{short(a, results)}\n{split}" for a, split in groups])
    panel.set(ylabel=f"{METRICS[metric][0]} x 100", ylim=(0, None))
    panel.legend(
        frameon=False,
        ncols=len(settings),
        loc="upper center",
        fontsize=8,
        bbox_to_anchor=(0.5, 1.12),
    )
    save(figure, path)


def agent_lines(results: list[dict], path: Path) -> None:
    """Figure 4: average reward over the agents in the given order, a line per plan setting."""
    agents = unique(results, "agent")
    splits = unique(results, "split")
    settings = unique(sorted(results, key=rank), "plans")
    figure, panels = new_figure(4 * len(splits), columns=len(splits))
    for panel, split in zip(panels, splits, strict=True):
        for i, setting in enumerate(settings):
            own = where(results, plans=setting, split=split)
            x = [agents.index(r["agent"]) for r in own]
            line(panel, x, column(own, "reward"), color=colour(setting, i), label=named(setting))
        panel.set_xticks(range(len(agents)), [short(a, results) for a in agents], rotation=20)
        panel.set(title=split, ylabel="average reward x 100")
    panels[0].legend(frameon=False)
    save(figure, path)


def sample_counts(results: list[dict], path: Path) -> None:
    """Figure 5: average reward over M at the largest N, and over N at the largest M."""
    points = []
    for r in results:
        m, n = FIG5.fullmatch(r["plans"]).groups()
        agent = short(r["agent"], results)
        points.append({"agent": agent, "M": int(m), "N": int(n), "reward": r["reward"]})
    figure, [left, right] = new_figure(8, columns=2)
    reward_over(left, points, "M", fixed="N")
    reward_over(right, points, "N", fixed="M")
    left.legend(frameon=False)
    save(figure, path)


def reward_over(panel, points: list[dict], count: str, fixed: str) -> None:
    """Average reward over one count at the largest value of the other, a line per agent."""
    most = max(column(points, fixed))
    shown = sorted(where(points, **{fixed: most}), key=itemgetter(count))
    for i, agent in enumerate(unique(points, "agent")):
        own = where(shown, agent=agent)
        tint = MORE_COLOURS[i % len(MORE_COLOURS)]
        line(panel, column(own, count), column(own, "reward"), color=tint, label=agent)
    panel.set(
        xlabel=f"{count}, {fixed} = {most}",
        ylabel="average reward x 100",
        xticks=unique(shown, count),
    )


def judged_bars(verdicts: dict, path: Path) -> None:
    """Figure 6: shares of wins, ties and losses in each dimension, the first on top."""
    dimensions = list(reversed(verdicts))
    figure, [panel] = new_figure(6.5, 2.6)
    for y, dimension in enumerate(dimensions):
        counts = verdicts[dimension]
        total = max(1, sum(counts[name] for name in VERDICT_COLOURS))
        left = 0.0
        for name, tint in VERDICT_COLOURS.items():
            share = 100 * counts[name] / total
            panel.barh(y, share, left=left, color=tint, label=name if y == 0 else None)
            if share > 0:
                middle = left + share / 2
                panel.text(middle, y, f"{share:.0f}", ha="center", va="center", fontsize=8)
            left += share
    panel.set(xlabel="% of tasks", yticks=range(len(dimensions)), yticklabels=dimensions)
    panel.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.2), fontsize=8)
    save(figure, path)


def setting_bars(panels: dict[str, dict[str, dict]], path: Path) -> None:
    """Bars of the average reward of each plan setting, a panel per {title: {setting: value}}."""
    rows = max(map(len, panels.values()))
    figure, axes = new_figure(5.4 * len(panels), 0.6 + 0.42 * rows, len(panels))
    for panel, (title, by_setting) in zip(axes, panels.items(), strict=True):
        names = []
        for y, (setting, value) in enumerate(by_setting.items()):
            panel.barh(
                y,
                heights([value]),
                height=0.72,
                xerr=error_bars([value]),
                capsize=3,
                color=colour(setting, y),
                error_kw=ERROR_BARS,
            )
            right = 100 * value["interval"][1] + 2
            text = f"{100 * value['mean']:.1f}"
            panel.text(right, y, text, ha="left", va="center", fontweight="bold")
            names.append(named(setting).removesuffix(" (control)"))
        panel.set_yticks(range(len(names)), names)
        panel.invert_yaxis()  # the first setting is at the top
        panel.set(title=title, xlim=(0, 105), xticks=range(0, 101, 20))
        panel.set_xlabel("average reward x 100")
    save(figure, path)
