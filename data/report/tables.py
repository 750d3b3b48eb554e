"""Tables of an evaluation, for Markdown, LaTeX and HTML.

Reads what stage 5 computed: `results`, one per cell and per total of an agent's splits, and
`differences`, each of two results of an agent."""

import html
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import common

METRICS = {  # name: (label, value of an episode)
    "reward": ("average reward", lambda r: r["reward"]),
    "success": ("success rate", lambda r: float(r["success"])),
    "reward_per_step": ("reward per step", lambda r: r["reward"] / max(1, len(r["steps"]))),  # 5.3
}
ORDER = ("none", "sft", "gpt", "rft", "mpo")  # of plan settings in tables
NAMES = {"none": "no plan", "sft": "SFT", "gpt": "teacher, asked directly", "rft": "RFT",
         "mpo": "MPO", "wkm": "WKM's knowledge"}
FIG5 = re.compile(r"fig5/m(\d+)n(\d+)")
INSTRUCTION, GUIDED = ("instruction",), ("none", "mpo", "wkm")
# {name: (title, metric, plan settings, insertions)}; tables with fewer than two rows are skipped
TABLES = {
    "table2": ("Average reward with and without meta plans", "reward", GUIDED, INSTRUCTION),
    "table3": ("How the planner is trained", "reward", ORDER, INSTRUCTION),
    "table4": ("Where the agent reads the plan", "reward", ("mpo",), common.INSERTS),
    "table6": ("Success rate with and without meta plans", "success", GUIDED, INSTRUCTION),
    "fig3": ("Average reward per step", "reward_per_step", ("none", "sft", "mpo"), INSTRUCTION),
    "fig4": ("Agents of several sizes", "reward", ("none", "mpo"), INSTRUCTION),
    "fig5": ("How many plans M and rollouts N", "reward", FIG5, INSTRUCTION),
}


def rank(cell: dict) -> tuple:
    """The position of a cell or result in tables."""
    plans = cell["plans"]
    position = ORDER.index(plans) if plans in ORDER else len(ORDER)
    return position, plans, common.INSERTS.index(cell["insert"])


def select(results: list[dict], plans, inserts) -> list[dict]:
    """The results of these plan settings (names or a pattern) and insertions."""
    matches = plans.fullmatch if isinstance(plans, re.Pattern) else plans.__contains__
    return [r for r in results if matches(r["plans"]) and r["insert"] in inserts]


def unique(rows, *fields) -> list:
    """The distinct values of a field, or tuples of several, in order."""
    values = [tuple(r[f] for f in fields) if len(fields) > 1 else r[fields[0]] for r in rows]
    return list(dict.fromkeys(values))


def named(plans: str) -> str:
    return NAMES.get(plans, plans)


def short(agent: str, cells: list[dict]) -> str:
    """An agent's name with only the parent folders that distinguish it from other agents."""
    parts = Path(agent).parts
    same = [len(os.path.commonprefix([Path(other).parts[::-1], parts[::-1]]))
            for other in {c["agent"] for c in cells} - {agent}]
    return str(Path(*parts[-1 - max(same, default=0) :]))


# ---- tables --------------------------------------------------------------------------------------


@dataclass
class Table:
    """Text cells under a head, for Markdown, LaTeX and HTML."""

    title: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""

    def markdown(self) -> str:
        table = [[re.sub(r"([\\|])", r"\\\1", c) for c in row] for row in (self.head, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
                 for row in table]
        lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
        return f"## {self.title}\n\n" + "\n".join(lines) + f"\n\n{self.note}\n"

    def latex(self) -> str:
        head, *rows = [" & ".join(re.sub(r"([&%$#_{}])", r"\\\1", c) for c in row) + r" \\"
                       for row in (self.head, *self.rows)]
        return "\n".join([f"% {self.title}", rf"\begin{{tabular}}{{{'l' * len(self.head)}}}",
                          r"\toprule", head, r"\midrule", *rows, r"\bottomrule",
                          r"\end{tabular}"]) + "\n"

    def html(self) -> str:
        head, *rows = ["<tr>" + "".join(f"<t{tag}>{html.escape(c)}</t{tag}>" for c in row) + "</tr>"
                       for tag, row in (("h", self.head), *(("d", r) for r in self.rows))]
        return (f"<h3>{html.escape(self.title)}</h3><div class=wide><table><thead>{head}</thead>"
                f"<tbody>{''.join(rows)}</tbody></table></div>"
                f"<p class=note>{html.escape(self.note)}</p>")


def with_interval(cell: dict, sign: str = "") -> str:
    low, high = cell["interval"]
    return f"{100 * cell['mean']:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def cell_text(result: dict | None, metric: str) -> str:
    """A mean with its interval; missing episodes are reported, not averaged away."""
    if result and result[metric]:
        return with_interval(result[metric])
    return f"{result['missing']} of {result['tasks']} missing" if result else "-"


def overview(results: list[dict], outdated: int) -> Table:
    """Every cell with all its counts."""
    table = Table(
        "All cells", ["agent", "plans", "insertion", "split", "tasks", "episodes",
                      *(f"{label} (x100)" for label, _ in METRICS.values()), "steps",
                      "format errors", "context overflows", "ends"],
        note="Mean [95% bootstrap interval over tasks]."
             + f" Left out: {outdated} cells of earlier agents or plans." * bool(outdated))
    for r in results:
        ends = ", ".join(f"{k} {v}" for k, v in sorted(r["ends"].items()))
        insert = "" if r["plans"] == "none" else r["insert"]
        table.rows.append([
            short(r["agent"], results), named(r["plans"]), insert, r["split"],
            str(r["tasks"]), str(r["episodes"]), *(cell_text(r, name) for name in METRICS),
            f"{r['steps']:.1f}", str(r["format_errors"]), str(r["context_overflows"]), ends])
    return table


def gains(results: list[dict], differences: list[dict]) -> Table:
    """Every difference between two plan settings of an agent."""
    table = Table(
        "Differences on the same tasks",
        ["agent", "split", "plans", "over", "tasks", "average reward (x100)", "p",
         "success rate (x100)", "p"],
        note="Mean [95% bootstrap interval over tasks], two-sided p of a paired permutation test.")
    for d in differences:
        names = (named(c["plans"]) + f", {c['insert']}" * (c["insert"] != "instruction")
                 for c in (d, d["over"]))
        table.rows.append([short(d["agent"], results), d["split"], *names, str(d["tasks"])] + [
            text for m in ("reward", "success")
            for text in (with_interval(d[m], "+"), f"{d[m]['p']:.4f}")])
    return table


def paper_tables(results: list[dict], differences: list[dict]) -> dict[str, Table]:
    """{name: table} of the paper's tables and figures for which there are cells."""
    against = {(d["agent"], d["plans"], d["insert"], d["split"], *d["over"].values()): d
               for d in differences}
    tables = {}
    for name, (title, metric, plans, inserts) in TABLES.items():
        rows = select(results, plans, inserts)
        splits, keys = unique(rows, "split"), unique(rows, "agent", "plans", "insert")
        if len({k[1:] for k in keys}) < 2 or (name == "fig4" and len({k[0] for k in keys}) < 2):
            continue
        by_insert = name == "table4"
        found = {(r["agent"], r["plans"], r["insert"], r["split"]): r for r in rows}
        base = {k: (k[1] if by_insert else "none", "instruction") for k in keys}
        gain = {k: against[*k, splits[-1], *base[k]][metric] for k in keys
                if (*k, splits[-1], *base[k]) in against}
        second = "insertion" if by_insert else "plans"
        table = tables[name] = Table(
            title, ["agent", second, *(f"{s} (x100)" for s in splits)],
            note=f"{METRICS[metric][0].capitalize()}, mean [95% bootstrap interval over tasks].")
        if gain:
            over = "over the instruction" if by_insert else "over no plan"
            table.head.append(f"gain {over}" + f", {splits[-1]}" * (len(splits) > 1))
        for k in keys:
            row = [short(k[0], results), k[2] if by_insert else named(k[1]),
                   *(cell_text(found.get((*k, s)), metric) for s in splits)]
            text = f"{with_interval(gain[k], '+')}, p {gain[k]['p']:.4f}" if k in gain else ""
            table.rows.append(row + [text] * bool(gain))
    return tables


def judged_table(plans: list[str], judge: str, verdicts: dict) -> Table:
    """Figure 6: wins, ties and losses of the second setting in each dimension."""
    counts = ("win", "tie", "loss", "invalid")
    rows = [[dimension, *(str(c[k]) for k in counts)] for dimension, c in verdicts.items()]
    return Table(f"{named(plans[1])} against {named(plans[0])} plans, judged by {judge}",
                 ["dimension", *counts], rows, "Contradicting answers to both orders are a tie.")
