"""Tables of an evaluation, for Markdown, LaTeX and HTML.

A condition is an agent, a plan setting, a plan position and a split. An entry is what a table shows
values of: a condition, or a total over an agent's splits (`with_totals`). Its tasks are in strata,
groups that count the same however many tasks each has: an average over two splits has two, all
other entries have one.

Stage 5 computes what the tables show: `results`, one of each entry, and `differences`, each between
two results of one agent on the same tasks.
"""

import html
import os
import re
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import common


def reward(episode: dict) -> float:
    return episode["reward"]


def solved(episode: dict) -> float:
    return float(episode["success"])


def ended(episode: dict) -> float:
    return float(episode["end"] in ("success", "failure"))


def reward_per_step(episode: dict) -> float:
    """Paper 5.3."""
    return episode["reward"] / max(1, len(episode["steps"]))


METRICS = {  # name: (label, value of an episode)
    "reward": ("average reward", reward),
    "solved": ("solved", solved),
    "ended": ("ended", ended),
    "reward_per_step": ("reward per step", reward_per_step),
}
SUCCESS = (
    " Solved: the goal state was reached. Ended: the episode is done, also when the task "
    "can no longer be completed (what the paper's authors counted)."
)
# of plan settings in tables
ORDER = (
    "none",
    "mismatched",
    "sft",
    "gpt",
    "rft",
    "per_type",
    "per_type_adapted",
    "mpo",
    "mpo2",
    "mpo3",
    "wkm",
    "oracle",
)
NAMES = {
    "none": "no plan",
    "sft": "SFT",
    "gpt": "teacher, asked directly",
    "rft": "RFT",
    "per_type": "one plan per type",
    "per_type_adapted": "one per type, adapted",
    "mpo": "MPO",
    "wkm": "WKM's knowledge",
    "mismatched": "mismatched plan (control)",
    "oracle": "oracle (control)",
}
FIG5 = re.compile(r"fig5/m(\d+)n(\d+)")  # plan settings of figure 5: M plans, N rollouts


class PaperTable(NamedTuple):
    """What a table or figure of the paper shows."""

    title: str
    metrics: tuple[str, ...]
    plans: tuple[str, ...] | re.Pattern
    plan_positions: tuple[str, ...] = ("instruction",)

    def label(self, metric: str) -> str:
        """What a column's head adds to tell the table's metrics apart."""
        if len(self.metrics) == 1:
            return ""
        return f", {METRICS[metric][0]}"


GUIDED = ("none", "mismatched", "mpo", "wkm", "oracle")
TRAINED = (
    "none",
    "mismatched",
    "sft",
    "gpt",
    "rft",
    "per_type",
    "per_type_adapted",
    "mpo",
    "oracle",
)
TABLES = {  # those with fewer than two rows are left out
    "table2": PaperTable("Average reward with and without meta plans", ("reward",), GUIDED),
    "table3": PaperTable("How the planner is trained", ("reward",), TRAINED),
    "table4": PaperTable(
        "Where the agent reads the plan", ("reward",), ("mpo",), common.PLAN_POSITIONS
    ),
    "table6": PaperTable("Success rate with and without meta plans", ("solved", "ended"), GUIDED),
    "fig3": PaperTable(
        "Average reward per step",
        ("reward_per_step",),
        ("none", "mismatched", "sft", "mpo", "oracle"),
    ),
    "fig4": PaperTable("Agents of several sizes", ("reward",), ("none", "mpo")),
    "fig5": PaperTable("How many plans M and rollouts N", ("reward",), FIG5),
}


# ---- conditions ----------------------------------------------------------------------------------


def rank(condition: dict) -> tuple:
    """The position of a condition or result in tables."""
    plans = condition["plans"]
    position = ORDER.index(plans) if plans in ORDER else len(ORDER)
    return position, plans, common.PLAN_POSITIONS.index(condition["plan_position"])


def select(results: list[dict], paper: PaperTable) -> list[dict]:
    """The results that a table or figure of the paper shows."""
    selected = []
    for result in results:
        if isinstance(paper.plans, re.Pattern):
            shown = paper.plans.fullmatch(result["plans"])
        else:
            shown = result["plans"] in paper.plans
        if shown and result["plan_position"] in paper.plan_positions:
            selected.append(result)
    return selected


def unique(rows, *fields) -> list:
    """The distinct values of a field, or tuples of several, in order."""
    return list(dict.fromkeys(map(itemgetter(*fields), rows)))


def column(rows, name: str) -> list:
    return [row[name] for row in rows]


def where(rows, **values) -> list[dict]:
    """The rows whose fields have these values."""
    found = []
    for row in rows:
        if all(row[name] == value for name, value in values.items()):
            found.append(row)
    return found


def named(plans: str) -> str:
    return NAMES.get(plans, plans)


def short(agent: str, conditions: list[dict]) -> str:
    """An agent's name with only the parent folders that distinguish it from other agents."""
    parts = Path(agent).parts
    same = 0  # how many last parts another agent shares with it
    for other in unique(conditions, "agent"):
        if other != agent:
            common_end = os.path.commonprefix([Path(other).parts[::-1], parts[::-1]])
            same = max(same, len(common_end))
    return str(Path(*parts[-1 - same :]))


def agent_names(agents: list[str], out, folders: list) -> dict[str, str]:
    """{agent: its name in the tables of several run folders}, for the agents of run folder `out`.

    A checkpoint inside a run folder is named by its path in it, so that the seeds share a row. If
    two of the folders have one of that name, only `out`'s gets the short name."""
    names: dict[str, str] = {}
    for root in (out, *folders):
        folder = Path(root).resolve()
        taken = set(names.values())
        for agent in agents:
            path = Path(agent).resolve()
            if agent in names or not path.is_relative_to(folder):
                continue
            name = str(path.relative_to(folder))
            if name not in taken:
                names[agent] = name
    return {agent: names.get(agent, agent) for agent in agents}


def pooled(conditions: list[dict]) -> list[dict]:
    """The conditions of several run folders (`run`) for common tables. If there are several
    environments, `split` also names the environment; `shown` is the split of one run, for the
    page."""
    env_of = {}  # of each run folder
    for c in conditions:
        env_of[c["run"]] = Path(c["env"]).name
    envs = list(env_of.values())
    found = []
    for c in conditions:
        env = env_of[c["run"]]
        split = c["split"]
        if len(set(envs)) > 1:
            split = f"{env} {split}"
        shown = split
        if envs.count(env) > 1:
            shown = f"{split}, {c['run']}"
        found.append({**c, "env": env, "split": split, "shown": shown})
    agents = unique(conditions, "agent")
    return sorted(found, key=lambda c: (agents.index(c["agent"]), rank(c)))


def with_totals(conditions: list[dict], several: bool) -> list[dict]:
    """The entries: {"agent", "plans", "plan_position", "split", "total", "conditions", "strata"},
    `strata` as [{task: its episodes}]. Conditions of several run folders that have the same names
    are one entry. An agent, setting and plan position with more than one split has a total: "all"
    tasks, or, with `several` folders, the "average" over the splits, if it has all of them."""
    fields = ("agent", "plans", "plan_position")
    every_split = unique(conditions, "split")
    entries = []
    for key in unique(conditions, *fields):
        names = dict(zip(fields, key, strict=True))
        own = where(conditions, **names)
        by_split = _episodes_by_split(own, every_split)
        for split, episodes in by_split.items():
            single = {**names, "total": False, "conditions": where(own, split=split)}
            entries.append({**single, "split": split, "strata": [episodes]})
        if len(by_split) == 1:
            continue
        total = {**names, "total": True, "conditions": own}
        if not several:
            tasks: dict[str, list] = {}
            for episodes in by_split.values():
                tasks.update(episodes)
            entries.append({**total, "split": "all", "strata": [tasks]})
        elif len(by_split) == len(every_split):
            entries.append({**total, "split": "average", "strata": list(by_split.values())})
    return entries


def _episodes_by_split(conditions: list[dict], splits: list[str]) -> dict[str, dict]:
    """{split: {task: its episodes}} of conditions that differ in the split or the run folder."""
    by_split: dict[str, dict] = {}
    for split in splits:
        for c in where(conditions, split=split):
            tasks = by_split.setdefault(split, {})
            for task, episode in c["episodes"].items():
                tasks.setdefault(task, []).append(episode)
    return by_split


# ---- formats -------------------------------------------------------------------------------------


# {character: what is written for it}. A server chooses what its models are called.
LINE_ENDS = {"\n": " ", "\r": " "}
MARKDOWN = {**LINE_ENDS, "\\": r"\\", "|": r"\|", "<": "&lt;"}
LATEX = {
    **LINE_ENDS,
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


@dataclass
class Table:
    """Text cells under a head, for Markdown, LaTeX and HTML."""

    title: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""

    def markdown(self) -> str:
        rows = self._escaped(MARKDOWN)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            padded = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
            lines.append("| " + " | ".join(padded) + " |")
        rule = "|".join("-" * (width + 2) for width in widths)
        lines.insert(1, f"|{rule}|")
        return f"## {escaped(self.title, MARKDOWN)}\n\n" + "\n".join(lines) + f"\n\n{self.note}\n"

    def latex(self) -> str:
        head, *rows = [" & ".join(row) + r" \\" for row in self._escaped(LATEX)]
        lines = [
            f"% {escaped(self.title, LINE_ENDS)}",
            rf"\begin{{tabular}}{{{'l' * len(self.head)}}}",
            r"\toprule",
            head,
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
        ]
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        head = _html_row(self.head, "th")
        body = "".join(_html_row(row, "td") for row in self.rows)
        return (
            f"<h3>{html.escape(self.title)}</h3>"
            f"<div class=wide><table><thead>{head}</thead><tbody>{body}</tbody></table></div>"
            f"<p class=note>{html.escape(self.note)}</p>"
        )

    def _escaped(self, replacements: dict[str, str]) -> list[list[str]]:
        """Head and rows with these characters replaced."""
        rows = []
        for row in (self.head, *self.rows):
            rows.append([escaped(text, replacements) for text in row])
        return rows


def escaped(text: str, replacements: dict[str, str]) -> str:
    return text.translate(str.maketrans(replacements))


def _html_row(texts: list[str], tag: str) -> str:
    cells = "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)
    return f"<tr>{cells}</tr>"


def with_interval(value: dict, sign: str = "") -> str:
    """A mean x 100 with its interval. `sign` "+": differences, with their sign."""
    low, high = value["interval"]
    return f"{100 * value['mean']:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def cell_text(result: dict | None, metric: str) -> str:
    """A mean with its interval; missing episodes are reported, not averaged away."""
    if result is None:
        return "-"
    if result[metric] is None:
        return f"{result['missing']} of {result['missing'] + result['episodes']} missing"
    return with_interval(result[metric])


# ---- notes ---------------------------------------------------------------------------------------


def notes(results: list[dict]) -> str:
    """What a reader has to know of the conditions behind a table, for its note."""
    conditions = where(results, total=False)
    said = []
    full = sum(column(conditions, "context_overflows"))
    if full:
        episodes = sum(column(conditions, "episodes"))
        said.append(f"{full} of {episodes} episodes ended because the agent's context was full.")
    if where(results, total=True, split="average"):
        said.append(
            "Average: the mean over the columns, for rows that have all of them; tasks are "
            "resampled within each column."
        )
    said += _notes_on_runs(conditions)
    said += _notes_on_thoughts(conditions)
    said += _notes_on_tags(conditions)
    said += _notes_on_thinking(conditions)
    said += _notes_on_refusals(conditions)
    said += _notes_on_types(conditions)
    for r in conditions:
        said += r["notes"]
    return "".join(f" {sentence}" for sentence in dict.fromkeys(said))


def _notes_on_runs(conditions: list[dict]) -> list[str]:
    if max(column(conditions, "runs"), default=1) == 1:
        return []
    said = []
    for split in unique(conditions, "split"):
        counts = set(column(where(conditions, split=split), "runs"))
        said.append(f"{split} {' or '.join(map(str, sorted(counts)))}")
    return [f"A task's value is its mean over run folders: {', '.join(said)}."]


def _notes_on_thoughts(conditions: list[dict]) -> list[str]:
    continued = sum(column(conditions, "continued"))
    own_turn = sum(column(conditions, "own_turn"))
    said = []
    if continued:
        said.append(f"the server continued a started assistant message in {continued} episodes")
    if own_turn:
        said.append(f"the plan was a turn of its own in {own_turn} episodes")
    return [f"Plan position thought: {', '.join(said)}."] if said else []


def _count_plans(conditions: list[dict], name: str) -> dict[str, int]:
    """{plan setting: the sum of the count `name` of its plans}, without those of 0."""
    of_split = {}
    for r in conditions:  # all agents use the same plans: those of a split count once
        of_split[r["plans"], r["split"]] = r[name]
    counts = dict.fromkeys(unique(conditions, "plans"), 0)
    for (plans, _), count in of_split.items():
        counts[plans] += count
    return {plans: count for plans, count in counts.items() if count}


def _notes_on_tags(conditions: list[dict]) -> list[str]:
    said = []
    for plans, count in _count_plans(conditions, "untagged").items():
        said.append(f"{count} plans of '{named(plans)}' are text without tags.")
    return said


def _notes_on_refusals(conditions: list[dict]) -> list[str]:
    said = []
    refused = sum(column(conditions, "refused"))
    if refused:
        episodes = sum(column(conditions, "episodes"))
        said.append(
            f"{refused} of {episodes} episodes were refused by the agent's server and count with "
            "reward 0."
        )
    for plans, count in _count_plans(conditions, "refused_plans").items():
        said.append(
            f"{count} plans of '{named(plans)}' were refused by the planner's server: their tasks "
            "were played without a plan."
        )
    return said


def _notes_on_types(conditions: list[dict]) -> list[str]:
    said = []
    for plans, count in _count_plans(conditions, "no_plan_of_type").items():
        said.append(
            f"{count} tasks were played without a plan of '{named(plans)}': no plan of their type "
            "was sampled."
        )
    return said


def _notes_on_thinking(conditions: list[dict]) -> list[str]:
    cut_off = sum(column(conditions, "thinking_cut_off"))
    missing = sum(_count_plans(conditions, "plans_cut_off").values())
    said = []
    if cut_off:
        said.append(
            f"{cut_off} replies of agents ended while they were thinking: --agent_tokens was too "
            "small (these are format errors, too)."
        )
    if missing:
        said.append(
            f"{missing} plans are missing because planners were still thinking: --plan_tokens was "
            "too small."
        )
    return said


# ---- tables --------------------------------------------------------------------------------------


def overview(results: list[dict], outdated: int) -> Table:
    """Every condition with all its counts."""
    head = ["agent", "plans", "plan position", "split", "tasks", "episodes"]
    for label, _ in METRICS.values():
        head.append(f"{label} (x100)")
    head += ["steps", "format errors", "context overflows", "ends"]
    note = "Mean [95% bootstrap interval over tasks]." + SUCCESS
    if outdated:
        note += f" Left out: {outdated} conditions of earlier agents or plans."
    table = Table("All conditions", head, note=note + notes(results))
    for r in results:
        plan_position = "" if r["plans"] == "none" else r["plan_position"]
        row = [short(r["agent"], results), named(r["plans"]), plan_position, r["split"]]
        row += [str(r["tasks"]), str(r["episodes"])]
        for metric in METRICS:
            row.append(cell_text(r, metric))
        row += [f"{r['steps']:.1f}", str(r["format_errors"]), str(r["context_overflows"])]
        row.append(", ".join(f"{end} {count}" for end, count in sorted(r["ends"].items())))
        table.rows.append(row)
    return table


def gains(results: list[dict], differences: list[dict]) -> Table:
    """Every difference between two plan settings of an agent."""
    metrics = ("reward", "solved", "ended")
    head = ["agent", "split", "plans", "over", "tasks"]
    for metric in metrics:
        head += [f"{METRICS[metric][0]} (x100)", "p"]
    note = "Mean [95% bootstrap interval over tasks], two-sided p of a paired permutation test."
    note += SUCCESS + notes(_compared(results, differences)) + _recovered(results, differences)
    table = Table("Differences on the same tasks", head, note=note)
    for d in differences:
        row = [short(d["agent"], results), d["split"]]
        for side in (d, d["over"]):
            name = named(side["plans"])
            if side["plan_position"] != "instruction":
                name += f", {side['plan_position']}"
            row.append(name)
        row.append(str(d["tasks"]))
        for metric in metrics:
            row += [with_interval(d[metric], "+"), f"{d[metric]['p']:.4f}"]
        table.rows.append(row)
    return table


def _compared(results: list[dict], differences: list[dict]) -> list[dict]:
    """The results that a difference is of."""
    compared = set()
    for d in differences:
        for side in (d, d["over"]):
            compared.add((d["agent"], d["split"], side["plans"], side["plan_position"]))
    names = itemgetter("agent", "split", "plans", "plan_position")
    return [r for r in results if names(r) in compared]


def _recovered(results: list[dict], differences: list[dict]) -> str:
    """Which share of the headroom, the reward from SFT to oracle, MPO recovers, for each agent and
    split where the headroom's interval is above 0."""
    over_sft = {}
    for d in differences:
        if d["plan_position"] == "instruction" and d["over"]["plans"] == "sft":
            over_sft[d["agent"], d["split"], d["plans"]] = d["reward"]
    said = ""
    for (agent, split, plans), headroom in over_sft.items():
        mpo = over_sft.get((agent, split, "mpo"))
        if plans == "oracle" and mpo and headroom["interval"][0] > 0:
            share = mpo["mean"] / headroom["mean"]
            said += (
                f" {short(agent, results)}, {split}: MPO recovers {share:.0%} of the reward "
                "from SFT to oracle."
            )
    return said


def paper_tables(results: list[dict], differences: list[dict]) -> dict[str, Table]:
    """{name: table} of the paper's tables and figures for which there are results."""
    tables = {}
    for name, paper in TABLES.items():
        rows = sorted(select(results, paper), key=lambda r: r["total"])
        if len(unique(rows, "plans", "plan_position")) < 2:
            continue
        if name == "fig4" and len(unique(rows, "agent")) < 2:
            continue
        tables[name] = paper_table(paper, rows, results, differences)
    return tables


def paper_table(
    paper: PaperTable, rows: list[dict], results: list[dict], differences: list[dict]
) -> Table:
    """The results `rows` as a table: a row per agent and plan setting (table 4: plan position), a
    column per split and metric, then the gains."""
    by_position = len(paper.plan_positions) > 1
    splits = unique(rows, "split")
    head = ["agent", "plan position" if by_position else "plans"]
    for split in splits:
        for metric in paper.metrics:
            head.append(f"{split}{paper.label(metric)} (x100)")
    labels = " and ".join(METRICS[metric][0] for metric in paper.metrics)
    note = f"{labels.capitalize()}, mean [95% bootstrap interval over tasks]."
    if "solved" in paper.metrics:
        note += SUCCESS
    table = Table(paper.title, head, note=note + notes(rows))
    result_of = common.finished(rows, "agent", "plans", "plan_position", "split")
    for agent, plans, plan_position in unique(rows, "agent", "plans", "plan_position"):
        row = [short(agent, results), plan_position if by_position else named(plans)]
        for split in splits:
            result = result_of.get((agent, plans, plan_position, split))
            for metric in paper.metrics:
                row.append(cell_text(result, metric))
        table.rows.append(row)
    _add_gains(table, paper, rows, differences)
    return table


def _add_gains(table: Table, paper: PaperTable, rows: list[dict], differences: list[dict]) -> None:
    """Add to each row its gain on the last split over no plan, in table 4 over the same plan in the
    instruction; no column if no row has one."""
    by_position = len(paper.plan_positions) > 1
    splits = unique(rows, "split")
    sides = itemgetter("agent", "split", "plans", "plan_position")
    by_sides = {}
    for d in differences:
        by_sides[(*sides(d), d["over"]["plans"], d["over"]["plan_position"])] = d
    row_gains = []  # a difference or None for each row
    for agent, plans, plan_position in unique(rows, "agent", "plans", "plan_position"):
        base = plans if by_position else "none"
        gain = by_sides.get((agent, splits[-1], plans, plan_position, base, "instruction"))
        row_gains.append(gain)
    if not any(row_gains):
        return
    title = "gain over the instruction" if by_position else "gain over no plan"
    if len(splits) > 1:
        title += f", {splits[-1]}"
    for metric in paper.metrics:
        table.head.append(title + paper.label(metric))
        for row, gain in zip(table.rows, row_gains, strict=True):
            text = ""
            if gain:
                text = f"{with_interval(gain[metric], '+')}, p {gain[metric]['p']:.4f}"
            row.append(text)


def judged_table(plans: list[str], judge: str, verdicts: dict) -> Table:
    """Figure 6: wins, ties and losses of the second setting in each dimension."""
    counts = ("win", "tie", "loss", "invalid")
    table = Table(
        f"{named(plans[1])} against {named(plans[0])} plans, judged by {judge}",
        ["dimension", *counts],
        note="Contradicting answers to both orders are a tie.",
    )
    for dimension, verdict in verdicts.items():
        row = [dimension]
        for name in counts:
            row.append(str(verdict[name]))
        table.rows.append(row)
    return table
