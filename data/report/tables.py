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
    "solved": ("solved", lambda r: float(r["success"])),
    "ended": ("ended", lambda r: float(r["end"] in ("success", "failure"))),
    "reward_per_step": ("reward per step", lambda r: r["reward"] / max(1, len(r["steps"]))),  # 5.3
}
ORDER = ("none", "mismatched", "sft", "gpt", "rft", "mpo", "oracle")  # of plan settings in tables
NAMES = {
    "none": "no plan",
    "sft": "SFT",
    "gpt": "teacher, asked directly",
    "rft": "RFT",
    "mpo": "MPO",
    "wkm": "WKM's knowledge",
    "mismatched": "mismatched (control)",
    "oracle": "oracle (control)",
}
FIG5 = re.compile(r"fig5/m(\d+)n(\d+)")
INSTRUCTION, GUIDED = ("instruction",), ("none", "mismatched", "mpo", "wkm", "oracle")
SUCCESS = (
    " Solved: the goal state was reached. Ended: the episode is done, also when the task "
    "can no longer be completed (the paper's success rate)."
)
REWARD = ("reward",)
# {name: (title, metrics, plan settings, insertions)}; tables with fewer than two rows are skipped
TABLES = {
    "table2": ("Average reward with and without meta plans", REWARD, GUIDED, INSTRUCTION),
    "table3": ("How the planner is trained", REWARD, ORDER, INSTRUCTION),
    "table4": ("Where the agent reads the plan", REWARD, ("mpo",), common.PLAN_POSITIONS),
    "table6": (
        "Success rate with and without meta plans",
        ("solved", "ended"),
        GUIDED,
        INSTRUCTION,
    ),
    "fig3": (
        "Average reward per step",
        ("reward_per_step",),
        ("none", "mismatched", "sft", "mpo", "oracle"),
        INSTRUCTION,
    ),
    "fig4": ("Agents of several sizes", REWARD, ("none", "mpo"), INSTRUCTION),
    "fig5": ("How many plans M and rollouts N", REWARD, FIG5, INSTRUCTION),
}


def rank(cell: dict) -> tuple:
    """The position of a cell or result in tables."""
    plans = cell["plans"]
    position = ORDER.index(plans) if plans in ORDER else len(ORDER)
    return position, plans, common.PLAN_POSITIONS.index(cell["plan_position"])


def select(results: list[dict], plans, plan_positions) -> list[dict]:
    """The results of these plan settings (names or a pattern) and insertions."""
    matches = plans.fullmatch if isinstance(plans, re.Pattern) else plans.__contains__
    return [r for r in results if matches(r["plans"]) and r["plan_position"] in plan_positions]


def unique(rows, *fields) -> list:
    """The distinct values of a field, or tuples of several, in order."""
    values = [tuple(r[f] for f in fields) if len(fields) > 1 else r[fields[0]] for r in rows]
    return list(dict.fromkeys(values))


def named(plans: str) -> str:
    return NAMES.get(plans, plans)


def short(agent: str, cells: list[dict]) -> str:
    """An agent's name with only the parent folders that distinguish it from other agents."""
    parts = Path(agent).parts
    same = [
        len(os.path.commonprefix([Path(other).parts[::-1], parts[::-1]]))
        for other in {c["agent"] for c in cells} - {agent}
    ]
    return str(Path(*parts[-1 - max(same, default=0) :]))


# ---- columns: the splits of one run folder or several, and their total --------------------------


def agent_names(agents: list[str], out, folders: list) -> dict[str, str]:
    """{agent: its name in the tables of several run folders}, for the agents of run folder `out`. A
    checkpoint in `out` is named by its path in there, so that such agents of all folders are one
    row; one in another of the `folders` as well, unless `out` has its own of that name."""
    names: dict[str, str] = {}
    for folder in map(Path, (out, *folders)):
        inside = {
            agent: str(path.relative_to(folder.resolve()))
            for agent in agents
            if (path := Path(agent).resolve()).is_relative_to(folder.resolve())
        }
        taken = set(names.values())
        names = {a: name for a, name in inside.items() if name not in taken} | names
    return {agent: names.get(agent, agent) for agent in agents}


def pooled(cells: list[dict]) -> list[dict]:
    """The cells of several run folders (`run`) for common tables. If there are several
    environments, `split` names the environment, too; `shown` is the split of a run, for the
    page."""
    runs = {c["run"]: Path(c["env"]).name for c in cells}
    found, agents = [], unique(cells, "agent")
    for c in cells:
        env = runs[c["run"]]
        split = f"{env} {c['split']}" if len(set(runs.values())) > 1 else c["split"]
        shown = f"{split}, {c['run']}" if list(runs.values()).count(env) > 1 else split
        found.append({**c, "env": env, "split": split, "shown": shown})
    return sorted(found, key=lambda c: (agents.index(c["agent"]), rank(c)))


def with_totals(conditions: list[dict], several: bool) -> list[dict]:
    """What there is a result of: {"agent", "plans", "plan_position", "split", "total", "conditions",
    "strata"}, `strata` as [{task: its episodes}]. Conditions of several run folders that have the
    same names are one. An agent, setting and insertion with more than one split has a total: "all" tasks, or, with
    `several` folders, the "average" over the splits, if it has all of them."""
    out, splits = [], unique(conditions, "split")
    for key in unique(conditions, "agent", "plans", "plan_position"):
        own = [c for c in conditions if (c["agent"], c["plans"], c["plan_position"]) == key]
        strata: dict[str, dict] = {s: {} for s in splits if s in unique(own, "split")}
        for c in own:
            for task, row in c["episodes"].items():
                strata[c["split"]].setdefault(task, []).append(row)
        names = dict(zip(("agent", "plans", "plan_position"), key, strict=True))
        out += [
            {
                **names,
                "split": s,
                "total": False,
                "strata": [episodes],
                "conditions": [c for c in own if c["split"] == s],
            }
            for s, episodes in strata.items()
        ]
        total = {**names, "total": True, "conditions": own}
        if several and len(strata) == len(splits) > 1:
            out.append({**total, "split": "average", "strata": list(strata.values())})
        elif not several and len(strata) > 1:
            every = {t: rows for s in strata.values() for t, rows in s.items()}
            out.append({**total, "split": "all", "strata": [every]})
    return out


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
        lines = [
            "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
            for row in table
        ]
        lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
        return f"## {self.title}\n\n" + "\n".join(lines) + f"\n\n{self.note}\n"

    def latex(self) -> str:
        head, *rows = [
            " & ".join(re.sub(r"([&%$#_{}])", r"\\\1", c) for c in row) + r" \\"
            for row in (self.head, *self.rows)
        ]
        return (
            "\n".join(
                [
                    f"% {self.title}",
                    rf"\begin{{tabular}}{{{'l' * len(self.head)}}}",
                    r"\toprule",
                    head,
                    r"\midrule",
                    *rows,
                    r"\bottomrule",
                    r"\end{tabular}",
                ]
            )
            + "\n"
        )

    def html(self) -> str:
        head, *rows = [
            "<tr>" + "".join(f"<t{tag}>{html.escape(c)}</t{tag}>" for c in row) + "</tr>"
            for tag, row in (("h", self.head), *(("d", r) for r in self.rows))
        ]
        return (
            f"<h3>{html.escape(self.title)}</h3><div class=wide><table><thead>{head}</thead>"
            f"<tbody>{''.join(rows)}</tbody></table></div>"
            f"<p class=note>{html.escape(self.note)}</p>"
        )


def with_interval(cell: dict, sign: str = "") -> str:
    low, high = cell["interval"]
    return f"{100 * cell['mean']:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def cell_text(result: dict | None, metric: str) -> str:
    """A mean with its interval; missing episodes are reported, not averaged away."""
    if result and result[metric]:
        return with_interval(result[metric])
    if result:
        return f"{result['missing']} of {result['missing'] + result['episodes']} missing"
    return "-"


def notes(results: list[dict]) -> str:
    """What a reader has to know of the cells behind a table, for its note."""
    cells = [r for r in results if not r["total"]]
    full, continued, own_turn = (
        sum(r[k] for r in cells) for k in ("context_overflows", "continued", "own_turn")
    )
    said = []
    if full:
        said.append(
            f"{full} of {sum(r['episodes'] for r in cells)} episodes ended because the "
            "agent's context was full."
        )
    if any(r["total"] and r["split"] == "average" for r in results):
        said.append(
            "Average: the mean over the columns, for rows that have all of them; tasks are "
            "resampled within each column."
        )
    runs = {
        s: sorted({r["runs"] for r in cells if r["split"] == s}) for s in unique(cells, "split")
    }
    if any(n[-1] > 1 for n in runs.values()):
        said.append(
            "A task's value is its mean over run folders: "
            + ", ".join(f"{s} {' or '.join(map(str, n))}" for s, n in runs.items())
            + "."
        )
    if continued or own_turn:
        kinds = (
            (continued, "the server continued a started assistant message"),
            (own_turn, "the plan was a turn of its own"),
        )
        said.append(
            "Insertion as thought: "
            + ", ".join(f"{what} in {count} episodes" for count, what in kinds if count)
            + "."
        )
    # all agents use the same plans
    untagged = {(r["plans"], r["split"]): r["untagged"] for r in cells}
    for plans in unique(cells, "plans"):
        if count := sum(n for (setting, _), n in untagged.items() if setting == plans):
            said.append(f"{count} plans of '{named(plans)}' are text without tags.")
    return "".join(f" {s}" for s in (*said, *dict.fromkeys(n for r in cells for n in r["notes"])))


def overview(results: list[dict], outdated: int) -> Table:
    """Every cell with all its counts."""
    table = Table(
        "All cells",
        [
            "agent",
            "plans",
            "insertion",
            "split",
            "tasks",
            "episodes",
            *(f"{label} (x100)" for label, _ in METRICS.values()),
            "steps",
            "format errors",
            "context overflows",
            "ends",
        ],
        note="Mean [95% bootstrap interval over tasks]."
        + SUCCESS
        + f" Left out: {outdated} cells of earlier agents or plans." * bool(outdated)
        + notes(results),
    )
    for r in results:
        ends = ", ".join(f"{k} {v}" for k, v in sorted(r["ends"].items()))
        plan_position = "" if r["plans"] == "none" else r["plan_position"]
        table.rows.append(
            [
                short(r["agent"], results),
                named(r["plans"]),
                plan_position,
                r["split"],
                str(r["tasks"]),
                str(r["episodes"]),
                *(cell_text(r, name) for name in METRICS),
                f"{r['steps']:.1f}",
                str(r["format_errors"]),
                str(r["context_overflows"]),
                ends,
            ]
        )
    return table


def gains(results: list[dict], differences: list[dict]) -> Table:
    """Every difference between two plan settings of an agent."""
    metrics = ("reward", "solved", "ended")
    compared = {
        (d["agent"], d["split"], c["plans"], c["plan_position"])
        for d in differences
        for c in (d, d["over"])
    }
    rows = [
        r for r in results if (r["agent"], r["split"], r["plans"], r["plan_position"]) in compared
    ]
    table = Table(
        "Differences on the same tasks",
        [
            "agent",
            "split",
            "plans",
            "over",
            "tasks",
            *(text for m in metrics for text in (f"{METRICS[m][0]} (x100)", "p")),
        ],
        note="Mean [95% bootstrap interval over tasks], two-sided p of a paired permutation test."
        + SUCCESS
        + notes(rows),
    )
    over_sft = {
        (d["agent"], d["split"], d["plans"]): d["reward"]
        for d in differences
        if d["plan_position"] == "instruction" and d["over"]["plans"] == "sft"
    }
    for (agent, split, plans), room in over_sft.items():
        mpo = over_sft.get((agent, split, "mpo"))
        if plans == "oracle" and mpo and room["interval"][0] > 0:  # else there is none to recover
            table.note += (
                f" {short(agent, results)}, {split}: MPO recovers "
                f"{mpo['mean'] / room['mean']:.0%} of the reward from SFT to oracle."
            )
    for d in differences:
        names = (
            named(c["plans"]) + f", {c['plan_position']}" * (c["plan_position"] != "instruction")
            for c in (d, d["over"])
        )
        table.rows.append(
            [short(d["agent"], results), d["split"], *names, str(d["tasks"])]
            + [text for m in metrics for text in (with_interval(d[m], "+"), f"{d[m]['p']:.4f}")]
        )
    return table


def paper_tables(results: list[dict], differences: list[dict]) -> dict[str, Table]:
    """{name: table} of the paper's tables and figures for which there are cells."""
    against = {
        (d["agent"], d["plans"], d["plan_position"], d["split"], *d["over"].values()): d
        for d in differences
    }
    tables = {}
    for name, (title, metrics, plans, plan_positions) in TABLES.items():
        rows = sorted(select(results, plans, plan_positions), key=lambda r: r["total"])
        splits, keys = unique(rows, "split"), unique(rows, "agent", "plans", "plan_position")
        if len({k[1:] for k in keys}) < 2 or (name == "fig4" and len({k[0] for k in keys}) < 2):
            continue
        by_insert = name == "table4"
        found = {(r["agent"], r["plans"], r["plan_position"], r["split"]): r for r in rows}
        base = {k: (k[1] if by_insert else "none", "instruction") for k in keys}
        gain = {
            k: against[*k, splits[-1], *base[k]]
            for k in keys
            if (*k, splits[-1], *base[k]) in against
        }
        second = "insertion" if by_insert else "plans"
        labels = {m: f", {METRICS[m][0]}" * (len(metrics) > 1) for m in metrics}
        label = " and ".join(METRICS[m][0] for m in metrics).capitalize()
        table = tables[name] = Table(
            title,
            ["agent", second, *(f"{s}{labels[m]} (x100)" for s in splits for m in metrics)],
            note=f"{label}, mean [95% bootstrap interval over tasks]."
            + SUCCESS * ("solved" in metrics)
            + notes(rows),
        )
        if gain:
            over = "over the instruction" if by_insert else "over no plan"
            table.head += [
                f"gain {over}" + f", {splits[-1]}" * (len(splits) > 1) + labels[m] for m in metrics
            ]
        for k in keys:
            row = [
                short(k[0], results),
                k[2] if by_insert else named(k[1]),
                *(cell_text(found.get((*k, s)), m) for s in splits for m in metrics),
            ]
            for m in metrics if gain else ():
                own = gain.get(k, {}).get(m)
                row.append(f"{with_interval(own, '+')}, p {own['p']:.4f}" if own else "")
            table.rows.append(row)
    return tables


def judged_table(plans: list[str], judge: str, verdicts: dict) -> Table:
    """Figure 6: wins, ties and losses of the second setting in each dimension."""
    counts = ("win", "tie", "loss", "invalid")
    rows = [[dimension, *(str(c[k]) for k in counts)] for dimension, c in verdicts.items()]
    return Table(
        f"{named(plans[1])} against {named(plans[0])} plans, judged by {judge}",
        ["dimension", *counts],
        rows,
        "Contradicting answers to both orders are a tie.",
    )
