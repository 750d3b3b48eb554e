"""Stage 5 (paper 4.1, 4.2, 5 and appendix B): do the plans help agents on tasks that nobody has seen?

    python 05_eval.py --env sciworld --agents meta-llama/Llama-3.1-8B-Instruct --out runs/sciworld
    python 05_eval.py --agents gpt-4o http://gpu:8000/v1 --plans none,mpo --insert instruction,observation ...
    python 05_eval.py judge --judge gpt-4o --plans sft mpo --out runs/sciworld      # figure 6
    python 05_eval.py report --out runs/sciworld              # tables, figures and report of all that was played
    python 05_eval.py plan --planner runs/sciworld/mpo --env sciworld "Your task is to ..."

Plans are made once per test task at temperature 0 and used by all agents; then every agent plays every
task with each plan setting. A cell is an agent, a plan setting, a place of insertion and a split. Writes to --out
    eval/cells.jsonl       the cells that were asked for
    eval/plans.jsonl       the greedy plans
    eval/rollouts.jsonl    every episode with its whole conversation
    eval/judgements.jsonl  what the judge said
    results.md, results.json, report.html, and table2.md ... fig6.png, for which there are cells

Every finished plan, episode and judgement is kept: run it again to go on, only what is missing is done.
"""

import asyncio
import base64
import gzip
import html
import json
import os
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import List, Optional

from tqdm import tqdm

import common
from common import InputError, arg, mean

ORDER = ("none", "sft", "gpt", "rft", "mpo")  # of plan settings in tables
NAMES = {"none": "no plan", "sft": "SFT", "gpt": "teacher, asked directly", "rft": "RFT", "mpo": "MPO", "wkm": "WKM's knowledge"}
DIMENSIONS = ("correctness", "followability", "standardization")  # paper 5.6


@dataclass
class Args:
    env: str = arg("sciworld", "environment: a folder of data/, or a path")
    out: str = arg("runs/sciworld", "run folder")
    agents: List[str] = arg(["meta-llama/Llama-3.1-8B-Instruct"], "the agents: local models, models of an OpenAI-compatible API, or "
                            "URLs of servers (http://...; several of one model with commas between)")
    plans: List[str] = arg(["none", "sft", "mpo"], "plan settings: none; the planner checkpoint of that name in --out (sft, rft, mpo); "
                           "gpt: --teacher asked directly; or a JSONL file with `task` and `plan`")
    splits: List[str] = arg([], "splits of the environment (default: its test splits, seen and unseen; of WebShop seen alone)")
    insert: List[str] = arg(["instruction"], "where the agent reads the plan: instruction (paper), thought, observation (paper 5.2)")
    teacher: str = arg("gpt-4o", "who writes the plans of --plans gpt (paper: gpt-4o)")
    plans_only: bool = arg(False, "make the plans, for other agents to use, and play nothing")
    agent_temperature: float = arg(0.0, "temperature of the agent (paper: 0; plans are greedy as well)")
    plan_tokens: int = arg(512, "tokens of a plan at most")
    agent_tokens: int = arg(256, "tokens of an agent's reply at most")
    prompts: Optional[str] = arg(None, "prompt folder: one of the environment's, or a path (default: the environment's own)")
    observation_chars: int = arg(0, "cut observations at this length, 0: never")
    max_steps: Optional[int] = arg(None, "steps of an episode at most (default: the environment's; ALFWorld 30, ScienceWorld by task type)")
    tasks: Optional[str] = arg(None, "JSON file of tasks, [[type, variation], ...], instead of the splits by rule")
    types: Optional[List[str]] = arg(None, "only tasks of these types")
    limit: Optional[int] = arg(None, "only the first N tasks of each split")
    workers: int = arg(16, "environment worker processes")
    concurrency: int = arg(256, "episodes in flight")
    window: int = arg(0, "when a conversation passes the agent's context: turns to keep, with the task; 0: the episode ends")
    ray: bool = arg(False, "environment workers as actors of a Ray cluster (RAY_ADDRESS), not as processes of this machine")
    tensor_parallel: int = arg(1, "GPUs of one replica of a served model")
    max_model_len: int = arg(8192, "context of a served model, tokens; what a shorter one ended is played again")
    seed: int = arg(0, "random seed of the bootstrap")


@dataclass
class JudgeArgs:
    out: str = arg("runs/sciworld", "run folder")
    judge: str = arg("gpt-4o", "who compares the plans: a model of an API (paper: gpt-4o), a local model, or a server's URL")
    plans: List[str] = arg(["sft", "mpo"], "the two plan settings to compare, both evaluated before")
    tokens: int = arg(1024, "tokens of a judgement at most")
    concurrency: int = arg(32, "requests in flight")
    tensor_parallel: int = arg(1, "GPUs of one replica of a served model")
    max_model_len: int = arg(8192, "context of a served model, tokens")
    seed: int = arg(0, "random seed of the bootstrap")


@dataclass
class ReportArgs:
    out: str = arg("runs/sciworld", "run folder")
    seed: int = arg(0, "random seed of the bootstrap")


@dataclass
class PlanArgs:
    planner: str = arg("runs/sciworld/mpo", "the planner: a local model, a model of an OpenAI-compatible API, or a server's URL")
    env: str = arg("sciworld", "environment: a folder of data/, or a path")
    text: str = arg("", "the task, as the environment words it; also without the flag")
    prompts: Optional[str] = arg(None, "prompt folder: one of the environment's, or a path (default: the environment's own)")
    plan_tokens: int = arg(512, "tokens of the plan at most")
    max_model_len: int = arg(8192, "context of a served model, tokens")


# ---- plans ---------------------------------------------------------------------------------------


def planner_of(a: Args, setting: str) -> str | None:
    """The model that writes the plans of a setting; None where they are in a file, or there are none."""
    if setting == "none" or setting.endswith(".jsonl"):
        return None
    return a.teacher if setting == "gpt" else str(Path(a.out) / setting)


def plans_id(a: Args, setting: str, prompts) -> str | None:
    """A digest of what makes a setting's plans."""
    if setting == "none":
        return None
    if setting.endswith(".jsonl"):
        return common.digest(Path(setting).read_text())
    return common.digest(common.model_id(planner_of(a, setting)), prompts.planner_text, a.plan_tokens)


async def greedy_plans(a: Args, tasks: list[str], pool) -> dict[str, str | None]:
    """Write the most likely plan of each setting's planner for each task, null where its reply holds none; returns
    {setting: plans_id}. The teacher gets the environment's own prompt, which explains the format; our planners know it."""
    path = Path(a.out) / "eval" / "plans.jsonl"
    prompts = {s: common.Prompts(a.env, None if s == "gpt" else a.prompts) for s in a.plans}
    ids = {s: plans_id(a, s, prompts[s]) for s in a.plans}
    done = common.finished(common.read_rows(path, ("setting_id", "task", "plan"), missing_ok=True), "setting_id", "task")
    todo = {s: missing for s in ids if s != "none" and (missing := [t for t in tasks if (ids[s], t) not in done])}
    if todo:
        u = await common.instructions(pool, list(dict.fromkeys(t for ts in todo.values() for t in ts)))
        with common.Appender(path) as append, tqdm(total=sum(map(len, todo.values())), desc="plans") as bar:

            def keep(setting, task, plan):
                row = {"setting": setting, "task": task, "plan": plan, "instruction": u[task], "setting_id": ids[setting]}
                append(row)
                done[ids[setting], task] = row
                bar.update()

            async def ask(model, setting, task):
                reply = await model.ask(prompts[setting].planner(u[task]), 0.0, a.plan_tokens)
                keep(setting, task, common.parse_plan(reply.text))

            for setting in [s for s in todo if s.endswith(".jsonl")]:
                rows = common.read_rows(setting, ("task", "plan"))
                written = common.finished(rows, "task")
                if several := [r["task"] for r in rows if written[r["task"],]["plan"] != r["plan"]]:
                    raise InputError(f"{setting} has several plans for {several[0]}: keep the one to be followed")
                if absent := [t for t in todo[setting] if (t,) not in written]:
                    raise InputError(f"{setting} has no plan for {absent[0]} and {len(absent) - 1} other tasks of --splits")
                for task in todo[setting]:
                    if not isinstance(plan := written[task,]["plan"], str | None):
                        raise InputError(f"{setting}: the plan for {task} must be text, or null for none")
                    keep(setting, task, plan)
            for setting in [s for s in todo if planner_of(a, s)]:
                with common.open_model(planner_of(a, setting), None, a) as model:
                    await asyncio.gather(*[ask(model, setting, t) for t in todo[setting]])
    for s in ids:
        if missing := s != "none" and sum(done[ids[s], t]["plan"] is None for t in tasks):
            print(f"{s}: {missing} of {len(tasks)} replies held no plan; the agents play those tasks without one")
    return ids


# ---- episodes ------------------------------------------------------------------------------------


def split_url(agent: str) -> tuple[str, str | None]:
    """(name, url) of an --agents entry: a server is asked for the model that it serves."""
    return (common.model_id("", agent), agent) if agent.startswith(("http://", "https://")) else (agent, None)


def cells_of(a: Args, ids: dict[str, str | None], splits: dict[str, list[str]]) -> list[dict]:
    """The cells of this run: every agent with every plan setting, insertion and split; without a plan there is
    nothing to insert. `agent_id` names all that makes an agent's episodes but the plan and where it stands."""
    cells, prompts = [], common.Prompts(a.env, a.prompts)
    names = {s: Path(s).name for s in a.plans if s.endswith(".jsonl")}
    names = {s: name if list(names.values()).count(name) == 1 else s for s, name in names.items()}
    for agent in a.agents:
        name, url = split_url(agent)
        agent_id = common.digest(common.model_id(name, url), prompts.agent_text, prompts.examples, a.agent_temperature, a.agent_tokens,
                                 a.observation_chars, a.max_steps, a.window, *([a.seed] if a.agent_temperature else []))
        cells += [{"env": a.env, "agent": name, "agent_id": agent_id, "insert": insert, "split": split, "tasks": tasks,
                   "plans": names.get(setting, setting), "plans_id": ids[setting],
                   "setting_id": common.digest(agent_id, insert)}
                  for setting in a.plans for insert in (a.insert if setting != "none" else ["instruction"])
                  for split, tasks in splits.items()]
    return cells


async def play(a: Args, cells: list[dict], pool) -> None:
    """Play the episodes that the cells lack. A task whose two settings have the same plan is played once: at
    temperature 0 it would be the same episode."""
    path, prompts = Path(a.out) / "eval" / "rollouts.jsonl", common.Prompts(a.env, a.prompts)
    wanted: dict[str, list] = {agent: [] for agent in a.agents}
    names = {split_url(agent)[0]: agent for agent in a.agents}
    seen = set()
    for cell in with_episodes(a.out, cells, a.max_model_len):
        for task, row in cell["episodes"].items():
            key = (cell["setting_id"], task, cell["texts"].get(task))
            if row is None and key not in seen:
                seen.add(key)
                wanted[names[cell["agent"]]].append((cell["insert"], {"task": task, "plan": key[2], "rollout": 0, "agent": cell["agent"],
                                                                      "insert": cell["insert"], "setting_id": cell["setting_id"],
                                                                      "max_model_len": a.max_model_len}))
    for agent, jobs in wanted.items():
        if not jobs:
            continue
        name, url = split_url(agent)
        with common.Appender(path) as append, common.open_model(name, url, a) as model:
            for insert in dict.fromkeys(i for i, _ in jobs):
                c = common.RolloutConfig(prompts, a.agent_temperature, a.agent_tokens, a.observation_chars, a.seed, max_steps=a.max_steps,
                                         window=a.window, insert=insert)
                await common.rollouts([job for i, job in jobs if i == insert], model, pool, a.env, c, a.concurrency, append,
                                      desc=f"evaluation, {Path(name).name}" + (f", {insert}" if insert != "instruction" else ""))


def with_episodes(out: str, cells: list[dict], max_model_len: int = 0) -> list[dict]:
    """Each cell with "texts", {task: its plan or None}, and "episodes", {task: its row, or None where it has not
    been played to its end or, in a context of `max_model_len` tokens, might go on}."""
    folder = Path(out) / "eval"
    plans = common.finished(common.read_rows(folder / "plans.jsonl", ("setting_id", "task", "plan"), missing_ok=True), "setting_id", "task")
    rows = common.read_rows(folder / "rollouts.jsonl", ("task", "plan", "reward", "setting_id"), missing_ok=True)
    played = common.finished((r for r in rows if common.is_whole(r, max_model_len)), "setting_id", "task", "plan")
    found = []
    for cell in cells:
        texts = {t: plans[cell["plans_id"], t]["plan"] for t in cell["tasks"] if (cell["plans_id"], t) in plans}
        known = {t: cell["plans"] == "none" or t in texts for t in cell["tasks"]}
        episodes = {t: played.get((cell["setting_id"], t, texts.get(t))) if known[t] else None for t in cell["tasks"]}
        found.append({**cell, "texts": texts, "episodes": episodes})
    return found


def asked_cells(out: str) -> tuple[list[dict], int]:
    """All cells that were ever asked for, of the same agent, plans, insertion and split the newest; and how many are left
    out because their agent or plans were trained again since, or are asked in another way now."""
    fields = ("agent", "agent_id", "plans", "plans_id", "insert", "split", "tasks")
    rows = common.read_rows(Path(out) / "eval" / "cells.jsonl", fields, missing_ok=True)
    agents, plans = {r["agent"]: r["agent_id"] for r in rows}, {r["plans"]: r["plans_id"] for r in rows}
    every = common.finished(rows, "agent", "plans", "insert", "split").values()
    cells = [r for r in every if r["agent_id"] == agents[r["agent"]] and r["plans_id"] == plans[r["plans"]]]
    return sorted(cells, key=lambda c: (list(agents).index(c["agent"]), rank(c))), len(every) - len(cells)


# ---- statistics ----------------------------------------------------------------------------------

METRICS = {
    "reward": ("average reward", lambda r: r["reward"]),
    "success": ("success rate", lambda r: float(r["success"])),
    "reward_per_step": ("reward per step", lambda r: r["reward"] / max(1, len(r["steps"]))),  # paper 5.3
}


def resampled_means(values, seed: int, samples: int = 10_000):
    """Means of `samples` bootstrap resamples of `values` (one a task): (samples,)."""
    import numpy as np

    values, draw = np.asarray(values, dtype=float), np.random.default_rng(seed)
    return np.concatenate([values[draw.integers(0, len(values), (100, len(values)))].mean(1) for _ in range(samples // 100)])


def bootstrap(values, seed: int) -> list[float]:
    """95% percentile bootstrap interval of the mean of `values` (one a task): [low, high]."""
    import numpy as np

    return np.percentile(resampled_means(values, seed), [2.5, 97.5]).tolist()


def paired_bootstrap(gains, seed: int) -> dict:
    """The mean of the differences `gains` (one a task), its 95% interval, and p: how often a resample of the
    differences, moved to mean 0, is at least as far from 0 (two-sided; Efron and Tibshirani 1993, chapter 16)."""
    import numpy as np

    means, found = resampled_means(gains, seed), mean(gains)
    far = np.abs(means - found) >= abs(found) - 1e-12
    return {"mean": found, "interval": np.percentile(means, [2.5, 97.5]).tolist(), "p": (1 + int(far.sum())) / (1 + len(means))}


def rank(cell: dict) -> tuple:
    """Where a cell stands in a table."""
    plans = cell["plans"]
    return (ORDER.index(plans) if plans in ORDER else len(ORDER), plans, common.INSERTS.index(cell["insert"]))


def group(cells: list[dict]) -> dict[tuple, dict]:
    """{(agent, plans, insert, split): cell}, with a cell of split "all" where there are several splits."""
    out = {}
    for cell in cells:
        key = cell["agent"], cell["plans"], cell["insert"]
        out[(*key, cell["split"])] = cell
        rest = [c for c in cells if (c["agent"], c["plans"], c["insert"]) == key]
        if len(rest) > 1 and cell is rest[-1]:
            out[(*key, "all")] = {**cell, "split": "all", "tasks": [t for c in rest for t in c["tasks"]],
                                  "episodes": {t: r for c in rest for t, r in c["episodes"].items()}}
    return out


def summarise(cells: list[dict], seed: int) -> tuple[list[dict], list[dict]]:
    """(results, differences). A result of every cell: the mean and interval of each metric, None where an episode
    is missing, and how the episodes ended. A difference of any two cells of an agent and split that differ in
    the plans or in the insertion only: the paired bootstrap of each metric on the tasks of both."""
    results, differences, grouped = [], [], group(cells)
    for (agent, plans, insert, split), cell in grouped.items():
        rows = [r for r in cell["episodes"].values() if r]
        result = {"agent": agent, "plans": plans, "insert": insert, "split": split, "tasks": len(cell["episodes"]), "episodes": len(rows),
                  "missing": len(cell["episodes"]) - len(rows), "ends": dict(Counter(r["end"] for r in rows)),
                  "format_errors": sum(r.get("format_errors", 0) for r in rows),
                  "context_overflows": sum(r["end"] == "context" for r in rows), "steps": mean(len(r["steps"]) for r in rows)}
        for name, (_, value) in METRICS.items():
            values = [value(r) for r in rows]
            result[name] = {"mean": mean(values), "interval": bootstrap(values, seed)} if rows and not result["missing"] else None
        results.append(result)
        for other in grouped.values():
            if ((other["agent"], other["split"]) != (agent, split) or rank(other) >= rank(cell)
                    or not (other["plans"] in ("none", plans) or other["insert"] == insert)):
                continue
            if result["missing"] or not all(other["episodes"].values()):
                continue
            if both := [(r, other["episodes"][t]) for t, r in cell["episodes"].items() if t in other["episodes"]]:
                differences.append({"agent": agent, "split": split, "plans": plans, "insert": insert, "tasks": len(both),
                                    "over": {"plans": other["plans"], "insert": other["insert"]},
                                    **{name: paired_bootstrap([value(r) - value(o) for r, o in both], seed)
                                       for name, (_, value) in METRICS.items()}})
    return results, differences


# ---- tables and figures --------------------------------------------------------------------------

# {name: (title, metric, which plan settings, which insertions)}; fewer than two rows make no table
TABLES = {
    "table2": ("Average reward with and without meta plans", "reward", ("none", "mpo", "wkm"), ("instruction",)),
    "table3": ("How the planner is trained", "reward", ORDER, ("instruction",)),
    "table4": ("Where the agent reads the plan", "reward", ("mpo",), common.INSERTS),
    "table6": ("Success rate with and without meta plans", "success", ("none", "mpo", "wkm"), ("instruction",)),
    "fig3": ("Average reward per step", "reward_per_step", ("none", "sft", "mpo"), ("instruction",)),
    "fig4": ("Agents of several sizes", "reward", ("none", "mpo"), ("instruction",)),
    "fig5": ("How many plans M and rollouts N", "reward", re.compile(r"fig5/m(\d+)n(\d+)"), ("instruction",)),
}


@dataclass
class Table:
    """Text cells under a head, for Markdown, LaTeX and HTML."""

    name: str
    title: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""

    def markdown(self) -> str:
        table = [[re.sub(r"([\\|])", r"\\\1", cell) for cell in row] for row in (self.head, *self.rows)]
        widths = [max(len(row[i]) for row in table) for i in range(len(self.head))]
        lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in table]
        lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
        return f"## {self.title}\n\n" + "\n".join(lines) + "\n" + (f"\n{self.note}\n" if self.note else "")

    def latex(self) -> str:
        def line(row):
            return " & ".join(re.sub(r"([&%$#_{}])", r"\\\1", c.replace("\\", r"\textbackslash ")) for c in row) + r" \\"

        return "\n".join([rf"% {self.title}", rf"\begin{{tabular}}{{{'l' * len(self.head)}}}", r"\toprule", line(self.head), r"\midrule",
                          *map(line, self.rows), r"\bottomrule", r"\end{tabular}"]) + "\n"

    def html(self) -> str:
        rows = ["<tr>" + "".join(f"<t{tag}>{html.escape(c)}</t{tag}>" for c in row) + "</tr>"
                for tag, row in (("h", self.head), *(("d", r) for r in self.rows))]
        return (f"<h3>{html.escape(self.title)}</h3><div class=wide><table><thead>{rows[0]}</thead>"
                f"<tbody>{''.join(rows[1:])}</tbody></table></div><p class=note>{html.escape(self.note)}</p>")


def show(cell: dict, sign: str = "") -> str:
    low, high = cell["interval"]
    return f"{100 * cell['mean']:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def cell_text(result: dict | None, metric: str) -> str:
    """A mean with its interval; what is missing is said instead of averaged away."""
    if result is None:
        return "-"
    return show(result[metric]) if result[metric] else f"{result['missing']} of {result['tasks']} missing"


def setting_name(plans: str) -> str:
    return NAMES.get(plans, plans)


def overview(results: list[dict], outdated: int) -> Table:
    """Every cell with all that was counted."""
    table = Table("results", "All cells", ["agent", "plans", "insertion", "split", "tasks", "episodes",
                                           *(f"{label} (x100)" for label, _ in METRICS.values()),
                                           "steps", "format errors", "context overflows", "ends"],
                  note="Mean [95% bootstrap interval over tasks]. Reward per step: reward over steps taken, per task, then averaged."
                       + (f" Left out: {outdated} cells of agents or plans as they were before they were made again." if outdated else ""))
    for r in results:
        ends = ", ".join(f"{k} {v}" for k, v in sorted(r["ends"].items()))
        table.rows.append([short(r["agent"], results), setting_name(r["plans"]), "" if r["plans"] == "none" else r["insert"], r["split"],
                           str(r["tasks"]), str(r["episodes"]), *(cell_text(r, name) for name in METRICS), f"{r['steps']:.1f}",
                           str(r["format_errors"]), str(r["context_overflows"]), ends])
    return table


def short(agent: str, cells: list[dict]) -> str:
    """An agent's name with no more of the folders before it than tell it from the other agents of `cells`."""
    others, parts = {c["agent"] for c in cells} - {agent}, Path(agent).parts
    same = [len(os.path.commonprefix([Path(other).parts[::-1], parts[::-1]])) for other in others]
    return str(Path(*parts[-1 - max(same, default=0) :]))


def gains(results: list[dict], differences: list[dict]) -> Table:
    """Every difference between two plan settings of an agent."""
    table = Table("gains", "Differences on the same tasks", ["agent", "split", "plans", "over", "tasks", "average reward (x100)", "p",
                                                            "success rate (x100)", "p"],
                  note="Paired bootstrap over tasks: mean [95% interval], two-sided p, not corrected for their number.")
    for d in differences:
        name, over = (setting_name(c["plans"]) + (f", {c['insert']}" if c["insert"] != "instruction" else "") for c in (d, d["over"]))
        table.rows.append([short(d["agent"], results), d["split"], name, over, str(d["tasks"])]
                          + [text for m in ("reward", "success") for text in (show(d[m], "+"), f"{d[m]['p']:.4f}")])
    return table


def chosen(results: list[dict], plans, inserts) -> list[dict]:
    """The results of these plan settings and insertions."""
    return [r for r in results if (plans.fullmatch(r["plans"]) if isinstance(plans, re.Pattern) else r["plans"] in plans)
            and r["insert"] in inserts]


def paper_tables(results: list[dict], differences: list[dict]) -> dict[str, Table]:
    """{name: the paper's table or a figure's numbers}, of those for which there are cells."""
    tables = {}
    for name, (title, metric, plans, inserts) in TABLES.items():
        rows = chosen(results, plans, inserts)
        splits = list(dict.fromkeys(r["split"] for r in rows))
        keys = list(dict.fromkeys((r["agent"], r["plans"], r["insert"]) for r in rows))
        agents = {k[0] for k in keys}
        if len({k[1:] for k in keys}) < 2 or (name == "fig4" and len(agents) < 2):
            continue
        found = {(r["agent"], r["plans"], r["insert"], r["split"]): r for r in rows}
        base = "over the instruction" if name == "table4" else "over no plan"
        table = Table(name, title, ["agent", "insertion" if name == "table4" else "plans", *(f"{s} (x100)" for s in splits)],
                      note=f"{METRICS[metric][0].capitalize()}, mean [95% bootstrap interval over tasks].")
        other = {"table4": lambda k: (k[1], "instruction")}.get(name, lambda k: ("none", "instruction"))
        against = {(d["agent"], d["plans"], d["insert"], d["split"], *d["over"].values()): d[metric] for d in differences}
        with_gain = any((*k, splits[-1], *other(k)) in against for k in keys)
        if with_gain:
            table.head.append(f"gain {base}, {splits[-1]}" if len(splits) > 1 else f"gain {base}")
        for k in keys:
            gain = against.get((*k, splits[-1], *other(k)))
            table.rows.append([short(k[0], results), k[2] if name == "table4" else setting_name(k[1]),
                               *(cell_text(found.get((*k, s)), metric) for s in splits),
                               *([f"{show(gain, '+')}, p {gain['p']:.4f}" if gain else ""] if with_gain else [])])
        tables[name] = table
    return tables


COLOURS = {"none": "#b8bfc9", "sft": "#6aa5d8", "mpo": "#1f5fa8", "rft": "#e0a458", "gpt": "#8c6bb1"}
MORE_COLOURS = ["#5aa469", "#c0625e", "#3d8f9e", "#a08a5b"]


def colours(names) -> dict[str, str]:
    """A colour for each of these settings or agents; a setting has the same one in every figure."""
    return {n: COLOURS.get(n, MORE_COLOURS[i % len(MORE_COLOURS)]) for i, n in enumerate(names)}


def axes(width: float, height: float = 3.8, columns: int = 1):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    for axis in all_axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(all_axes[0])


def save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    tmp = path.with_suffix(".tmp.png")
    figure.savefig(tmp, dpi=160)
    plt.close(figure)
    tmp.replace(path)


def errors(cells: list[dict]) -> list[list[float]]:
    """Lengths of the error bars below and above the means, x100."""
    return [[max(0.0, 100 * side * (c["interval"][i] - c["mean"])) for c in cells] for i, side in ((0, -1), (1, 1))]


def bars(results: list[dict], metric: str, path: Path) -> None:
    """Bars of a metric for each agent and split, one colour a plan setting, with intervals."""
    rows = [r for r in results if r[metric]]
    groups = list(dict.fromkeys((r["agent"], r["split"]) for r in rows))
    settings = list(dict.fromkeys(r["plans"] for r in sorted(rows, key=rank)))
    figure, [axis] = axes(1.5 + 2.2 * len(groups))
    width, colour = 0.8 / len(settings), colours(settings)
    for i, setting in enumerate(settings):
        own = [r for r in rows if r["plans"] == setting]
        x = [groups.index((r["agent"], r["split"])) + (i - (len(settings) - 1) / 2) * width for r in own]
        means = [100 * r[metric]["mean"] for r in own]
        axis.bar(x, means, width * 0.92, yerr=errors([r[metric] for r in own]), capsize=3, color=colour[setting],
                 label=setting_name(setting), error_kw={"lw": 1, "ecolor": "#444"})
        for xi, m in zip(x, means, strict=True):
            axis.text(xi, 0, f"{m:.0f}" if metric != "reward_per_step" else f"{m:.1f}", ha="center", va="bottom", fontsize=8,
                      color="black" if setting == "none" else "white")
    several = len({agent for agent, _ in groups}) > 1
    axis.set_xticks(range(len(groups)), [f"{short(agent, rows)}\n{split}" if several else split for agent, split in groups])
    axis.set_ylabel(f"{METRICS[metric][0]} x 100")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, ncols=len(settings), loc="upper center", bbox_to_anchor=(0.5, 1.12), fontsize=8)
    save(figure, path)


def lines(results: list[dict], path: Path) -> None:
    """Figure 4: average reward over the agents in the order in which they were given, a line a plan setting, a panel a split."""
    rows = [r for r in results if r["reward"]]
    agents, splits = (list(dict.fromkeys(r[k] for r in rows)) for k in ("agent", "split"))
    figure, panels = axes(4 * len(splits), columns=len(splits))
    for axis, split in zip(panels, splits, strict=True):
        for setting in dict.fromkeys(r["plans"] for r in sorted(rows, key=rank)):
            own = [r for r in rows if (r["plans"], r["split"]) == (setting, split)]
            axis.errorbar([agents.index(r["agent"]) for r in own], [100 * r["reward"]["mean"] for r in own],
                          yerr=errors([r["reward"] for r in own]), fmt="o-", capsize=3, color=colours([setting])[setting],
                          label=setting_name(setting))
        axis.set_xticks(range(len(agents)), [short(agent, rows) for agent in agents], rotation=20, ha="right")
        axis.set(title=split, ylabel="average reward x 100")
    panels[0].legend(frameon=False)
    save(figure, path)


def sample_counts(results: list[dict], path: Path) -> None:
    """Figure 5: average reward over M at the largest N, and over N at the largest M, of all splits together."""
    rows = [(tuple(map(int, TABLES["fig5"][2].fullmatch(r["plans"]).groups())), r) for r in results if r["reward"]]
    figure, panels = axes(8, columns=2)
    for fixed, axis in enumerate(reversed(panels)):  # fixed 0: M stays, N varies
        most = max(mn[fixed] for mn, _ in rows)
        for agent, colour in colours(dict.fromkeys(r["agent"] for _, r in rows)).items():
            own = sorted(((mn[1 - fixed], r["reward"]) for mn, r in rows if mn[fixed] == most and r["agent"] == agent), key=lambda v: v[0])
            axis.errorbar([x for x, _ in own], [100 * c["mean"] for _, c in own], yerr=errors([c for _, c in own]), fmt="o-", capsize=3,
                          color=colour, label=short(agent, results))
        axis.set(xlabel=f"{'NM'[fixed]}, {'MN'[fixed]} = {most}", ylabel="average reward x 100")
        axis.set_xticks(sorted({mn[1 - fixed] for mn, _ in rows if mn[fixed] == most}))
    panels[0].legend(frameon=False)
    save(figure, path)


# ---- the judge (paper 5.6, appendix E.3, figure 13) ----------------------------------------------


def parse_judgement(reply: str) -> dict | None:
    """{dimension: "first", "second" or "tie"} for the three dimensions and "overall", from the JSON object in a
    reply; None where there is none, or one of them is not among these."""
    for match in re.finditer(r"\{", reply):
        try:
            answer, _ = json.JSONDecoder().raw_decode(reply[match.start() :])
        except ValueError:
            continue
        said = {d: str(answer.get(f"{d}_better", "")).strip().lower() for d in (*DIMENSIONS, "overall")}
        return said if all(v in ("first", "second", "tie") for v in said.values()) else None
    return None


def verdicts(rows: list[dict], plans: list[str]) -> dict[str, Counter]:
    """{dimension: counts of "win", "tie", "loss" of the second of two settings, and "invalid"}. A task's plans were
    shown in both orders: where the two answers disagree it is a tie, where one is missing it is invalid."""
    by_task: dict[str, dict] = {}
    for row in rows:
        by_task.setdefault(row["task"], {})[row["first"]] = row["answer"]
    counts = {d: Counter(dict.fromkeys(("win", "tie", "loss", "invalid"), 0)) for d in (*DIMENSIONS, "overall")}
    for answers in by_task.values():
        for d, count in counts.items():
            if len(answers) < 2 or None in answers.values():
                count["invalid"] += 1
                continue
            won = {{"first": first, "second": plans[first == plans[0]], "tie": None}[answer[d]] for first, answer in answers.items()}
            count["tie" if len(won) > 1 or None in won else "win" if won == {plans[1]} else "loss"] += 1
    return counts


def judged(out: str) -> tuple[list[str], list[dict]]:
    """The settings compared last, and their judgements."""
    rows = common.read_rows(Path(out) / "eval" / "judgements.jsonl", ("task", "first", "answer", "plans", "setting_id"), missing_ok=True)
    return (rows[-1]["plans"], [r for r in rows if r["setting_id"] == rows[-1]["setting_id"]]) if rows else ([], [])


def judge(a: JudgeArgs) -> None:
    """Compare the plans of two settings on every task that has both, in both orders."""
    if len(a.plans) != 2 or a.plans[0] == a.plans[1]:
        raise InputError(f"--plans takes two settings to compare, not {' '.join(a.plans)}")
    texts: dict[str, dict] = {}
    for setting in a.plans:
        for cell in with_episodes(a.out, [c for c in asked_cells(a.out)[0] if c["plans"] == setting]):
            texts.setdefault(setting, {}).update({t: p for t, p in cell["texts"].items() if p})
        if not texts.get(setting):
            raise InputError(f"--plans {setting}: {a.out} has no plans of it; evaluate it first")
    u = {r["task"]: r["instruction"] for r in common.read_rows(Path(a.out) / "eval" / "plans.jsonl", ("task", "instruction"))}
    name, url = split_url(a.judge)
    common.check_model(name, url)
    prompt, path = (common.DATA / "judge.txt").read_text().strip(), Path(a.out) / "eval" / "judgements.jsonl"
    setting_id = common.digest(common.model_id(name, url), prompt, a.tokens, a.plans, texts)
    rows = [r for r in common.read_rows(path, ("task", "first", "answer", "setting_id"), missing_ok=True) if r["setting_id"] == setting_id]
    done = common.finished(rows, "task", "first")
    both = [t for t in texts[a.plans[0]] if t in texts[a.plans[1]]]
    todo = [(t, *order) for t in both for order in (a.plans, a.plans[::-1]) if (t, order[0]) not in done]

    async def ask_all() -> None:
        with common.Appender(path) as append, tqdm(total=len(todo), desc="judgements") as bar, common.open_model(name, url, a) as model:

            async def ask(task, first, second):
                text = common.fill(prompt, task=u[task], first=texts[first][task], second=texts[second][task])
                for attempt in range(3):  # again, a little less sure of itself, when the answer is not what was asked for
                    reply = await model.ask([{"role": "user", "content": text}], 0.3 * attempt, a.tokens,
                                            common.seed_of(task, first, attempt))
                    if answer := parse_judgement(reply.text):
                        break
                append({"task": task, "plans": a.plans, "first": first, "answer": answer, "reply": reply.text, "judge": name,
                        "setting_id": setting_id})
                bar.update()

            await asyncio.gather(*[ask(*key) for key in todo])

    if todo:
        asyncio.run(ask_all())
    write_report(a.out, a.seed)


def judged_table(plans: list[str], rows: list[dict]) -> Table:
    """Wins, ties and losses of the second setting in each dimension."""
    table = Table("fig6", f"{setting_name(plans[1])} against {setting_name(plans[0])} plans, judged by {rows[-1]['judge']}",
                  ["dimension", "win", "tie", "loss", "invalid"],
                  note="Each pair was judged in both orders; where the answers disagree it counts as a tie.")
    for dimension, count in verdicts(rows, plans).items():
        table.rows.append([dimension, *(str(count[k]) for k in ("win", "tie", "loss", "invalid"))])
    return table


def judged_bars(table: Table, path: Path) -> None:
    """Figure 6: shares of wins, ties and losses in each dimension."""
    figure, [axis] = axes(6.5, 2.6)
    for y, row in enumerate(reversed(table.rows)):
        counts, left = list(map(int, row[1:4])), 0.0
        for name, count, colour in zip(("win", "tie", "loss"), counts, ("#1f5fa8", "#b8bfc9", "#e0a458"), strict=True):
            share = 100 * count / max(1, sum(counts))
            axis.barh(y, share, left=left, color=colour, label=name if not y else None)
            if count:
                axis.text(left + share / 2, y, f"{share:.0f}", ha="center", va="center", fontsize=8)
            left += share
    axis.set_yticks(range(len(table.rows)), [row[0] for row in reversed(table.rows)])
    axis.set_xlabel("% of tasks")
    axis.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.2), fontsize=8)
    save(figure, path)


# ---- the report ----------------------------------------------------------------------------------


def packed(value) -> str:
    """JSON, compressed, as text that can stand anywhere in HTML."""
    return base64.b64encode(gzip.compress(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(), 6, mtime=0)).decode()


def report_html(cells: list[dict], tables: list[Table], figures: list[Path], chunk: int = 40) -> str:
    """One page that needs nothing else (data/report.html): an index of tasks with the reward under each cell, and the
    conversations in compressed blocks of `chunk` tasks, each opened when one of its tasks is looked at."""
    keys = [(c["agent"], c["plans"], c["insert"]) for c in cells]
    columns = list(dict.fromkeys(keys))
    names = [{"agent": short(agent, cells), "plans": setting_name(plans), "insert": insert} for agent, plans, insert in columns]
    by_task: dict[tuple, dict] = {}
    for cell, key in zip(cells, keys, strict=True):
        for task, row in cell["episodes"].items():
            by_task.setdefault((cell["env"], cell["split"], task), {})[columns.index(key)] = row, cell["texts"].get(task)
    index, blocks = [], []
    for start in range(0, len(by_task), chunk):
        block = []
        for (env, split, task), under in list(by_task.items())[start : start + chunk]:
            episodes = list({id(row): row for row, _ in under.values() if row}.values())
            index.append([env, task, split, {i: [row["reward"], int(row["success"])] for i, (row, _) in under.items() if row}])
            block.append({"instruction": next((e["instruction"] for e in episodes if e.get("instruction")), ""),
                          "plans": {i: text for i, (_, text) in under.items()},
                          "episodes": [{k: e[k] for k in ("reward", "end", "steps")} for e in episodes],
                          "played": {i: next(n for n, e in enumerate(episodes) if e is row) for i, (row, _) in under.items() if row}})
        blocks.append(packed(block))
    titles = {"results": "Average reward", "fig6": "Plans compared by a judge", **{name: title for name, (title, *_) in TABLES.items()}}
    pictures = "".join(f'<figure><img alt="{titles[f.stem]}" src="data:image/png;base64,{base64.b64encode(f.read_bytes()).decode()}">'
                       f"<figcaption>{titles[f.stem]}</figcaption></figure>" for f in figures)
    scripts = "".join(f'<script type="text/plain" id="block{i}">{b}</script>\n' for i, b in enumerate(blocks))
    title = " ".join(dict.fromkeys(c["env"] for c in cells))
    return common.fill((common.DATA / "report.html").read_text(), title=html.escape(title), tables="".join(t.html() for t in tables),
                       figures=pictures, index=packed({"columns": names, "tasks": index, "chunk": chunk}),
                       blocks=scripts)


def write_report(out: str, seed: int) -> str:
    """Tables, figures and report of all that was played; the text of results.md."""
    folder, (asked, outdated) = Path(out), asked_cells(out)
    cells = with_episodes(out, asked)
    if not cells:
        raise InputError(f"{out} has no evaluation to report: run 05_eval.py --out {out} first")
    results, differences = summarise(cells, seed)
    tables = paper_tables(results, differences)
    compared, judgements = judged(out)
    if judgements:
        tables["fig6"] = judged_table(compared, judgements)
    shown = {name: chosen(results, *TABLES[name][2:]) for name in ("fig3", "fig4", "fig5")}
    shown["fig5"] = [r for r in shown["fig5"] if r["split"] == shown["fig5"][-1]["split"]]
    shown["results"] = chosen(results, re.compile(r"(?!fig5/).*"), ("instruction",))
    pictures = {"results": lambda path: bars(shown["results"], "reward", path),
                "fig3": lambda path: bars(shown["fig3"], "reward_per_step", path),
                "fig4": lambda path: lines(shown["fig4"], path), "fig5": lambda path: sample_counts(shown["fig5"], path),
                "fig6": lambda path: judged_bars(tables["fig6"], path)}
    figures = []
    for name, draw in pictures.items():
        if (name in tables or name == "results") and (name == "fig6" or any(r["reward"] for r in shown[name])):
            draw(folder / f"{name}.png")
            figures.append(folder / f"{name}.png")
    every = [overview(results, outdated), gains(results, differences), *tables.values()]
    for name, table in tables.items():
        common.write_text(folder / f"{name}.md", f"{table.markdown()}\n```latex\n{table.latex()}```\n")
    text = f"# {cells[0]['env']}\n\n" + "\n".join(t.markdown() for t in every)
    common.write_text(folder / "results.md", text + "\n# The same in LaTeX\n\n```latex\n" + "\n".join(t.latex() for t in every) + "```\n")
    numbers = {"env": cells[0]["env"], "results": results, "differences": differences}
    if judgements:
        numbers["judged"] = {"plans": compared, **verdicts(judgements, compared)}
    common.write_text(folder / "results.json", json.dumps(numbers, indent=1) + "\n")
    common.write_text(folder / "report.html", report_html(cells, [*tables.values(), *every[1::-1]], figures))
    return text


def report(a: ReportArgs) -> None:
    print(write_report(a.out, a.seed))


# ---- the commands --------------------------------------------------------------------------------


def write_plan(a: PlanArgs) -> None:
    """Print the plan for one task in words."""
    if not a.text:
        raise InputError('say what the task is: python 05_eval.py plan --planner runs/sciworld/mpo "Your task is to ..."')
    common.environment(a.env)
    prompts, (name, url) = common.Prompts(a.env, a.prompts), split_url(a.planner)
    common.check_model(name, url)

    async def ask() -> str:
        with tempfile.TemporaryDirectory() as out, common.open_model(name, url, SimpleNamespace(
                out=out, concurrency=1, tensor_parallel=1, max_model_len=a.max_model_len)) as model:
            return (await model.ask(prompts.planner(a.text), 0.0, a.plan_tokens)).text

    reply = asyncio.run(ask())
    if not (plan := common.parse_plan(reply)):
        raise InputError(f"{a.planner} wrote no plan but: {reply[:300]}")
    print(plan)


def listed(values: list[str]) -> list[str]:
    """'a,b' 'c' -> a, b, c; a URL may have commas of its own."""
    return list(dict.fromkeys(part for v in values for part in ([v] if v.startswith("http") else v.split(",")) if part))


def main(a: Args) -> None:
    a.agents, a.plans, a.splits, a.insert = map(listed, (a.agents, a.plans, a.splits, a.insert))
    if wrong := [i for i in a.insert if i not in common.INSERTS]:
        raise InputError(f"--insert {wrong[0]}: one of {', '.join(common.INSERTS)}")
    common.Prompts(a.env, a.prompts)
    for setting in a.plans:
        if setting == "gpt":
            common.check_model(a.teacher, None)
        elif setting.endswith(".jsonl"):
            common.read_rows(setting, ("task", "plan"))
        elif setting != "none":
            planner = str(planner_of(a, setting))
            common.check_model_dir(planner)
            if not Path(planner).is_dir():
                raise InputError(f"--plans {setting}: there is no planner {planner}; run the stage that makes it, or leave it out")
    for agent in a.agents if not a.plans_only else []:
        if not agent.startswith("http"):
            common.check_model(agent, None)
    common.check_data(a.env, a.out)

    async def stage():
        async with common.EnvPool(a.env, a.workers, a.concurrency, a.ray) as pool:
            splits = {s: await common.list_tasks(pool, a.env, s, a.tasks, a.types, a.limit)
                      for s in (["tasks"] if a.tasks else a.splits or common.environment(a.env).tests())}
            ids = await greedy_plans(a, list(dict.fromkeys(t for ts in splits.values() for t in ts)), pool)
            if a.plans_only:
                return
            cells, (known, _) = cells_of(a, ids, splits), asked_cells(a.out)
            if new := [c for c in cells if c not in known]:
                with common.Appender(Path(a.out) / "eval" / "cells.jsonl") as append:
                    for cell in new:
                        append(cell)
            await play(a, cells, pool)

    asyncio.run(stage())
    if a.plans_only:
        print(f"written to {a.out}/eval/plans.jsonl")
        return
    text = write_report(a.out, a.seed)
    print(f"\n{text}\nwritten to {a.out}/results.md, results.json, results.png, report.html")


COMMANDS = {"judge": (judge, JudgeArgs), "report": (report, ReportArgs), "plan": (write_plan, PlanArgs, "text")}

if __name__ == "__main__":
    named = len(sys.argv) > 1 and sys.argv[1] in COMMANDS
    common.run_stage(*(COMMANDS[sys.argv.pop(1)] if named else (main, Args)))
