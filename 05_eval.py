"""Stage 5 (paper 4.1, 4.2, 5, appendix B): do the plans help agents on held-out tasks?

    python 05_eval.py --env NAME --agents MODEL --out runs/NAME
    python 05_eval.py --agents gpt-4o http://gpu:8000/v1 --plan_positions instruction thought
    python 05_eval.py judge --judge gpt-4o --plans sft mpo --out runs/NAME       # figure 6
    python 05_eval.py report --out runs/NAME      # all tables and figures again, from the rows
    python 05_eval.py report --out runs/A runs/B  # of several environments or seeds together
    python 05_eval.py plan --planner runs/NAME/mpo --env NAME "Your task is to ..."

Plans are made once per test task at temperature 0 and used by all agents; then every agent plays
every task with each plan setting. A cell is an agent, a plan setting, an insertion and a split.
Files in --out
    eval/conditions.jsonl       the cells that were asked for: `env`, `agent`, `agent_id`, `plans`,
                           `plans_id`, `plan_position`, `split`, `tasks`, `note` (of the environment);
                           of equal ones the newest counts
    eval/plans.jsonl       greedy plans: `setting`, `task`, `plan`, `instruction`, `plans_id`,
                           `untagged` (the reply had no tags and is the plan as a whole)
    eval/rollouts.jsonl    episodes: as rollouts.jsonl of stage 3, with `plan_position` and `agent_id`
    eval/judgements.jsonl  `task`, `plans`, `first` (the setting shown first), `answer` (per
                           dimension first, second or tie; null: invalid), `reply`, `judge`,
                           `judge_id`
    results.md, results.json, report.html, and table2.md ... fig6.png, as far as there are cells
`agent_id`, `plans_id` and `judge_id` are digests of what made a row. Finished plans, episodes and
judgements are kept: run it again to resume; only what is missing is done.

The report of several run folders is written to `pooled/` in the first. It has the splits of each
environment and, as table 2, the average over them. Runs of one environment share its columns: the
value of a task is its mean over them. Figure 6 is of a single run only.
"""

import asyncio
import json
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import List, Optional

from tqdm import tqdm

import common
from common import InputError, arg, mean
from data.report import report, tables

DIMENSIONS = ("correctness", "followability", "standardization")  # paper 5.6


@dataclass
class Args:
    env: str = arg("sciworld", "environment: a folder of data/, or a path")
    out: str = arg("runs/sciworld", "run folder")
    agents: List[str] = arg(
        ["meta-llama/Llama-3.1-8B-Instruct"],
        "local models, models of an "
        "OpenAI-compatible API, or URLs of servers (http://...; several of "
        "one model with commas)",
    )
    plans: List[str] = arg(
        ["none", "sft", "mpo"],
        "plan settings: none; the planner checkpoint of "
        "that name in --out (sft, rft, mpo); gpt: --teacher asked directly; "
        "a JSONL file with `task` and `plan`; or a control: mismatched, mpo's plan "
        "for a task of another type; oracle, the plan that --teacher rules "
        "makes of the test task's own expert trajectory",
    )
    splits: List[str] = arg([], "splits of the environment (default: its test splits)")
    plan_positions: List[str] = arg(
        ["instruction"],
        "where the agent reads the plan: instruction (paper), thought, observation (paper 5.2)",
    )
    teacher: str = arg("gpt-4o", "the planner of --plans gpt (paper: gpt-4o)")
    plans_only: bool = arg(False, "make the plans, for other agents to use, and play nothing")
    agent_temperature: float = arg(0.0, "temperature of the agent (paper: 0, as of the planner)")
    plan_tokens: int = arg(512, "token limit of a plan")
    agent_tokens: int = arg(512, "token limit of an agent's reply")
    prompts: Optional[str] = arg(
        None, "prompt folder: one of the environment's, or a path (default: the environment's own)"
    )
    examples: Optional[str] = arg(
        None,
        "type: a one-shot example of each task's type, also where "
        "the environment has one for all (paper)",
    )
    observation_chars: int = arg(0, "cut observations to this length, 0: never")
    max_steps: Optional[int] = arg(None, "step limit of an episode (default: the environment's)")
    tasks: List[str] = arg(
        [],
        "JSON files of tasks, [[type, variation], ...], SPLIT=FILE each, in "
        "place of the environment's splits",
    )
    types: Optional[List[str]] = arg(None, "only tasks of these types")
    limit: Optional[int] = arg(None, "only the first N tasks of each split")
    skip: int = arg(
        0,
        "leave out the first N tasks of each split, before --limit: --splits train "
        "--skip N has validation tasks if the other stages used the first N",
    )
    workers: int = arg(16, "environment worker processes")
    concurrency: Optional[int] = arg(
        None, "episodes in flight (default: 64 a server, at least 256; 32 with an agent of an API)"
    )
    ray: bool = arg(False, "environment workers on a Ray cluster (RAY_ADDRESS)")
    tensor_parallel: int = arg(1, "GPUs of one replica of a served model")
    max_model_len: int = arg(32768, "context of a served model, tokens, at most its own")
    seed: int = arg(0, "random seed of the bootstrap")


@dataclass
class JudgeArgs:
    out: str = arg("runs/sciworld", "run folder")
    judge: str = arg(
        "gpt-4o",
        "who compares the plans: a model of an API (paper: gpt-4o), a local "
        "model, or a server's URL",
    )
    plans: List[str] = arg(["sft", "mpo"], "the two plan settings to compare, evaluated before")
    tokens: int = arg(1024, "token limit of a judgement")
    concurrency: int = arg(32, "requests in flight")
    tensor_parallel: int = arg(1, "GPUs of one replica of a served model")
    max_model_len: int = arg(32768, "context of a served model, tokens, at most its own")
    seed: int = arg(0, "random seed of the bootstrap")


@dataclass
class ReportArgs:
    out: List[str] = arg(
        [Args.out],
        "run folder; several: environments or seeds to report "
        "together, in the first one's subfolder pooled/",
    )
    seed: int = arg(0, "random seed of the bootstrap")


@dataclass
class PlanArgs:
    planner: str = arg("runs/sciworld/mpo", "a local model, a model of an API, or a server's URL")
    env: str = arg("sciworld", "environment: a folder of data/, or a path")
    text: str = arg("", "the task, as the environment words it; also without the flag")
    prompts: Optional[str] = arg(None, "prompt folder: one of the environment's, or a path")
    plan_tokens: int = arg(512, "token limit of the plan")
    max_model_len: int = arg(32768, "context of a served model, tokens, at most its own")


# ---- plans ---------------------------------------------------------------------------------------


def planner_of(a: Args, setting: str) -> str | None:
    """The model that makes the plans of a setting; None if there are none, or another source."""
    if setting in ("none", "oracle") or setting.endswith(".jsonl"):
        return None
    return (
        a.teacher
        if setting == "gpt"
        else str(Path(a.out) / {"mismatched": "mpo"}.get(setting, setting))
    )


def digest_of_plans(a: Args, setting: str, prompts) -> str | None:
    """`plans_id`: a digest of what makes a setting's plans."""
    if setting == "none":
        return None
    if setting == "oracle":
        return common.fingerprint(setting, a.env)
    if setting.endswith(".jsonl"):
        return common.fingerprint(Path(setting).read_text())
    planner_id = common.model_fingerprint(planner_of(a, setting))
    return common.fingerprint(
        planner_id,
        prompts.planner_text,
        a.plan_tokens,
        *([setting, a.seed] if setting == "mismatched" else []),
    )


def of_another_type(a: Args, task: str, tasks: list[str]) -> str:
    """A task of another type, drawn by seed; another task where all are of one type (WebShop)."""
    others = [t for t in tasks if common.task_type(t) != common.task_type(task)] or [
        t for t in tasks if t != task
    ]
    if not others:
        raise InputError("--plans mismatched needs two test tasks")
    return others[common.seed_of(a.seed, "wrong", task) % len(others)]


def plans_in_file(path: str, tasks: list[str]) -> dict[str, str | None]:
    """{task: plan} of a JSONL file. Raises `InputError` if a task has no plan, or two."""
    plans: dict[str, str | None] = {}
    for row in common.read_rows(path, ("task", "plan")):
        task, plan = row["task"], row["plan"]
        if plans.setdefault(task, plan) != plan:
            raise InputError(f"{path} has several plans for {task}: keep one")
        if not isinstance(plan, str | None):
            raise InputError(f"{path}: the plan for {task} must be text, or null for none")
    if absent := [t for t in tasks if t not in plans]:
        raise InputError(
            f"{path} has no plan for {absent[0]} and {len(absent) - 1} other tasks of --splits"
        )
    return {t: plans[t] for t in tasks}


async def greedy_plans(a: Args, tasks: list[str], pool) -> dict[str, str | None]:
    """Write the most likely plan of each setting's planner for each task; returns {setting:
    plans_id}. A reply without tags is the plan itself (`untagged`), an empty one is none (null).
    The teacher gets the environment's own prompt, which explains the format; our planners know
    it."""
    path = Path(a.out) / "eval" / "plans.jsonl"
    settings = list(dict.fromkeys([*a.plans, *(["mpo"] if "mismatched" in a.plans else [])]))
    prompts = {s: common.Prompts(a.env, None if s == "gpt" else a.prompts) for s in settings}
    ids = {s: digest_of_plans(a, s, prompts[s]) for s in settings}
    rows = common.read_rows(path, ("plans_id", "task", "plan"), missing_ok=True)
    done = common.finished(rows, "plans_id", "task")
    todo = {
        s: missing
        for s in sorted(ids, key="mismatched".__eq__)
        if s != "none"  # mismatched: last
        and (missing := [t for t in tasks if (ids[s], t) not in done])
    }
    source = {t: of_another_type(a, t, tasks) for t in todo.get("mismatched", ())}
    if todo:
        u = await pool.each(list(dict.fromkeys(t for ts in todo.values() for t in ts)), "reset")
        with (
            common.Appender(path) as append,
            tqdm(total=sum(map(len, todo.values())), desc="plans") as bar,
        ):

            def keep(setting, task, plan, **more):
                row = {
                    "setting": setting,
                    "task": task,
                    "plan": plan,
                    "instruction": u[task],
                    "plans_id": ids[setting],
                    **more,
                }
                append(row)
                done[ids[setting], task] = row
                bar.update()

            async def ask(model, setting, task):
                messages = prompts[setting].planner(u[task])
                reply = (await model.ask(messages, 0.0, a.plan_tokens)).text.strip()
                plan = common.parse_plan(reply)
                keep(setting, task, plan or reply or None, untagged=bool(reply and not plan))

            for setting, missing in todo.items():
                if setting == "mismatched":
                    for task in missing:
                        keep(setting, task, done[ids["mpo"], source[task]]["plan"])
                elif planner := planner_of(a, setting):
                    with common.open_model(planner, None, a) as model:
                        await asyncio.gather(*[ask(model, setting, t) for t in missing])
                elif setting == "oracle":
                    found = await pool.each(missing, "expert")
                    for task, e in found.items():
                        keep(
                            setting,
                            task,
                            e
                            and common.number_steps(
                                common.environment(a.env).abstract(e["instruction"], e["steps"])
                            ),
                        )
                else:
                    for task, plan in plans_in_file(setting, missing).items():
                        keep(setting, task, plan)
    for s in ids:
        if untagged := s != "none" and sum(done[ids[s], t].get("untagged", 0) for t in tasks):
            print(f"{s}: {untagged} of {len(tasks)} replies have no tags; their text is the plan")
    return ids


# ---- episodes ------------------------------------------------------------------------------------


def cells_of(a: Args, plans_ids: dict[str, str | None], splits: dict[str, list[str]]) -> list[dict]:
    """The cells of this run: every agent with every plan setting, insertion and split; without a
    plan there is no plan position. `agent_id` identifies all that makes an agent's episodes,
    except the plan and its insertion."""
    cells, prompts = [], common.Prompts(a.env, a.prompts, a.examples)
    files = [s for s in a.plans if s.endswith(".jsonl")]
    names = {s: Path(s).name for s in files}
    for agent in a.agents:
        name, url = common.name_and_url(agent)
        agent_id = common.fingerprint(
            common.model_fingerprint(name, url),
            prompts.agent_text,
            prompts.examples,
            a.agent_temperature,
            a.agent_tokens,
            common.STOP,
            a.observation_chars,
            a.max_steps,
            a.max_model_len,
            *([a.seed] if a.agent_temperature else []),
        )
        for setting in a.plans:
            shown = names.get(setting, setting)
            if list(names.values()).count(shown) > 1:
                shown = setting
            for plan_position in a.plan_positions if setting != "none" else ["instruction"]:
                cells += [
                    {
                        "env": a.env,
                        "agent": name,
                        "agent_id": agent_id,
                        "plan_position": plan_position,
                        "split": split,
                        "tasks": tasks,
                        "plans": shown,
                        "plans_id": plans_ids[setting],
                        "note": common.environment(a.env).note(),
                    }
                    for split, tasks in splits.items()
                ]
    return cells


async def play_missing(a: Args, cells: list[dict], pool) -> None:
    """Play the episodes that the cells lack. If two settings have the same plan for a task, it is
    played once: at temperature 0 the episodes are the same."""
    prompts = common.Prompts(a.env, a.prompts, a.examples)
    path = Path(a.out) / "eval" / "rollouts.jsonl"
    jobs: dict[tuple, dict] = {}
    for cell in with_episodes(a.out, cells):
        for task, row in cell["episodes"].items():
            if row is None:
                key = cell["agent_id"], cell["plan_position"], task, cell["texts"].get(task)
                jobs[key] = {
                    "task": task,
                    "plan": key[3],
                    "rollout": 0,
                    "agent": cell["agent"],
                    "plan_position": cell["plan_position"],
                    "agent_id": cell["agent_id"],
                }
    for agent in a.agents:
        name, url = common.name_and_url(agent)
        own = [job for job in jobs.values() if job["agent"] == name]
        if not own:
            continue
        with common.Appender(path) as append, common.open_model(name, url, a) as model:
            for plan_position in tables.unique(own, "plan_position"):
                c = common.RolloutConfig(
                    prompts,
                    a.agent_temperature,
                    a.agent_tokens,
                    a.observation_chars,
                    a.seed,
                    max_steps=a.max_steps,
                    plan_position=plan_position,
                )
                await common.rollouts(
                    [job for job in own if job["plan_position"] == plan_position],
                    model,
                    pool,
                    a.env,
                    c,
                    model.concurrency,
                    append,
                    desc=f"evaluation, {Path(name).name}, {plan_position}",
                )


def with_episodes(out: str, cells: list[dict]) -> list[dict]:
    """Each cell with "texts", {task: its plan or None}, "untagged", the number of plans that are
    replies without tags, "episodes", {task: its row, or None if it is missing or crashed}, and
    "run", its run folder."""
    folder = Path(out) / "eval"
    fields = ("task", "plan", "reward", "agent_id", "plan_position", "end")
    plans = common.finished(
        common.read_rows(folder / "plans.jsonl", ("plans_id", "task", "plan"), missing_ok=True),
        "plans_id",
        "task",
    )
    rows = common.read_rows(folder / "rollouts.jsonl", fields, missing_ok=True)
    played = common.finished(
        (r for r in rows if r["end"] != "crash"), "agent_id", "plan_position", "task", "plan"
    )
    found = []
    for cell in cells:
        own = {
            t: plans[cell["plans_id"], t] for t in cell["tasks"] if (cell["plans_id"], t) in plans
        }
        texts = {t: row["plan"] for t, row in own.items()}
        episodes = {
            t: played.get((cell["agent_id"], cell["plan_position"], t, texts.get(t)))
            if t in texts or cell["plans"] == "none"
            else None
            for t in cell["tasks"]
        }
        found.append(
            {
                **cell,
                "texts": texts,
                "episodes": episodes,
                "run": out,
                "untagged": sum(row.get("untagged", False) for row in own.values()),
            }
        )
    return found


def asked_conditions(out: str, folders=()) -> tuple[list[dict], int]:
    """(cells, outdated): all cells that were ever asked for, of the same agent, plans, insertion
    and split the newest; and the number left out because their agent or plans are from an earlier
    version (retrained, or asked with other settings). Agents have their names across `folders`."""
    fields = ("agent", "agent_id", "plans", "plans_id", "plan_position", "split", "tasks")
    rows = common.read_rows(Path(out) / "eval" / "conditions.jsonl", fields, missing_ok=True)
    if folders:
        names = tables.agent_names(tables.unique(rows, "agent"), out, folders)
        rows = [r | {"agent": names[r["agent"]]} for r in rows]
    agents = {r["agent"]: r["agent_id"] for r in rows}
    plans = {r["plans"]: r["plans_id"] for r in rows}
    every = common.finished(rows, "agent", "plans", "plan_position", "split").values()
    cells = [
        r
        for r in every
        if r["agent_id"] == agents[r["agent"]] and r["plans_id"] == plans[r["plans"]]
    ]
    cells.sort(key=lambda c: (list(agents).index(c["agent"]), tables.rank(c)))
    return cells, len(every) - len(cells)


# ---- statistics ----------------------------------------------------------------------------------


def mean_and_interval(strata: list, seed: int) -> dict:
    """{"mean", "interval"} of the mean over `strata` of their means, with a 95% percentile
    bootstrap interval that resamples each stratum's values (one per task) on their own."""
    import numpy as np
    from scipy.stats import bootstrap

    average, strata = mean(map(mean, strata)), [np.asarray(s, dtype=float) for s in strata]
    if all(s.min() == s.max() for s in strata):
        return {"mean": average, "interval": [average] * 2}
    pairs = [s.repeat(2) if len(s) == 1 else s for s in strata]  # SciPy wants two values or more
    found = bootstrap(
        pairs,
        lambda *xs, axis: np.mean([x.mean(axis) for x in xs], 0),
        n_resamples=10_000,
        batch=500,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return {"mean": average, "interval": [float(found.low), float(found.high)]}


def paired_test(strata: list, seed: int) -> dict:
    """`mean_and_interval` of differences (one per task) and "p": two-sided, of a permutation test
    that flips their signs."""
    import numpy as np
    from scipy.stats import permutation_test

    gains, p = np.concatenate([np.asarray(s, dtype=float) for s in strata]), 1.0
    weights = np.concatenate([[len(gains) / len(strata) / len(s)] * len(s) for s in strata])
    if len(gains) > 1 and gains.any():
        p = permutation_test(
            (gains,),
            lambda x, axis: (x * weights).mean(axis),
            rng=seed,
            permutation_type="samples",
            n_resamples=9_999,
            batch=500,
            vectorized=True,
        ).pvalue
    return {**mean_and_interval(strata, seed), "p": float(p)}


def summarise(cells: list[dict], seed: int, several: bool) -> tuple[list[dict], list[dict]]:
    """(results, differences). A result per cell or total: mean and interval of each metric (None if
    an episode is missing) and counts. A difference for any two complete ones of an agent and split
    that differ in the plans or in the insertion only: the paired test on the tasks of both."""
    results, differences = [], []
    cells = tables.with_totals(cells, several)
    for cell in cells:
        every = [r for s in cell["strata"] for rs in s.values() for r in rs]
        rows = [r for r in every if r]
        names = {k: cell[k] for k in ("agent", "plans", "plan_position", "split")}
        thoughts = [
            r["continued"]
            for r in rows
            if r["plan_position"] == "thought" and r.get("continued") is not None
        ]
        result = {
            **names,
            "total": cell["total"],
            "tasks": sum(map(len, cell["strata"])),
            "runs": len(tables.unique(cell["conditions"], "run")),
            "episodes": len(rows),
            "missing": len(every) - len(rows),
            "ends": dict(Counter(r["end"] for r in rows)),
            "format_errors": sum(r.get("format_errors", 0) for r in rows),
            "context_overflows": sum(r["end"] == "context" for r in rows),
            "continued": sum(thoughts),
            "own_turn": len(thoughts) - sum(thoughts),
            "untagged": sum(c["untagged"] for c in cell["conditions"]),
            "notes": list(dict.fromkeys(c["note"] for c in cell["conditions"] if c.get("note"))),
            "steps": mean(len(r["steps"]) for r in rows),
        }
        complete = bool(rows) and not result["missing"]
        for name, (_, value) in tables.METRICS.items():
            result[name] = (
                mean_and_interval(
                    [[mean(map(value, rs)) for rs in s.values()] for s in cell["strata"]], seed
                )
                if complete
                else None
            )
        results.append(result)
        for other in cells if complete else []:
            same = all(other[k] == cell[k] for k in ("agent", "split", "total"))
            comparable = (
                other["plans"] in ("none", cell["plans"])
                or other["plan_position"] == cell["plan_position"]
            )
            if not (
                same
                and comparable
                and tables.rank(other) < tables.rank(cell)
                and all(r for s in other["strata"] for rs in s.values() for r in rs)
            ):
                continue
            both = [
                [(rs, o[t]) for t, rs in s.items() if t in o]
                for s, o in zip(cell["strata"], other["strata"], strict=True)
            ]
            if all(both):
                differences.append(
                    {
                        **names,
                        "tasks": sum(map(len, both)),
                        "over": {"plans": other["plans"], "plan_position": other["plan_position"]},
                        **{
                            name: paired_test(
                                [
                                    [mean(map(value, rs)) - mean(map(value, o)) for rs, o in pairs]
                                    for pairs in both
                                ],
                                seed,
                            )
                            for name, (_, value) in tables.METRICS.items()
                        },
                    }
                )
    return results, differences


# ---- the judge (paper 5.6, appendix E.3, figure 13) ----------------------------------------------


def parse_judgement(reply: str) -> dict | None:
    """{dimension: "first", "second" or "tie"} for the three dimensions and "overall", from the JSON
    object in a reply; None if there is none or an answer is not one of these."""
    for match in re.finditer(r"\{", reply):
        try:
            answer, _ = json.JSONDecoder().raw_decode(reply[match.start() :])
        except ValueError:
            continue
        said = {
            d: str(answer.get(f"{d}_better", "")).strip().lower() for d in (*DIMENSIONS, "overall")
        }
        return said if all(v in ("first", "second", "tie") for v in said.values()) else None
    return None


def count_verdicts(rows: list[dict], plans: list[str]) -> dict[str, Counter]:
    """{dimension: counts of "win", "tie", "loss" of the second of two settings, and "invalid"}.
    Each task's plans are shown in both orders: contradicting answers are a tie; if one is missing,
    the task is invalid."""
    by_task: dict[str, dict] = {}
    for row in rows:
        by_task.setdefault(row["task"], {})[row["first"]] = row["answer"]
    zero = dict.fromkeys(("win", "tie", "loss", "invalid"), 0)
    counts = {d: Counter(zero) for d in (*DIMENSIONS, "overall")}
    for answers in by_task.values():
        for d, count in counts.items():
            if len(answers) < 2 or None in answers.values():
                count["invalid"] += 1
                continue
            won = {
                {"first": first, "second": plans[first == plans[0]], "tie": None}[answer[d]]
                for first, answer in answers.items()
            }
            tie = len(won) > 1 or None in won
            count["tie" if tie else "win" if won == {plans[1]} else "loss"] += 1
    return counts


def judged(out: str) -> dict | None:
    """{"plans", "judge", "verdicts"} of the settings compared last."""
    path = Path(out) / "eval" / "judgements.jsonl"
    rows = common.read_rows(path, ("task", "first", "answer", "plans", "judge_id"), missing_ok=True)
    if not rows:
        return None
    last = rows[-1]
    verdicts = count_verdicts([r for r in rows if r["judge_id"] == last["judge_id"]], last["plans"])
    return {"plans": last["plans"], "judge": last["judge"], "verdicts": verdicts}


def judge(a: JudgeArgs) -> None:
    """Compare the plans of two settings on every task that has both, in both orders."""
    if len(a.plans) != 2 or a.plans[0] == a.plans[1]:
        raise InputError(f"--plans takes two settings to compare, not {' '.join(a.plans)}")
    texts: dict[str, dict] = {setting: {} for setting in a.plans}
    for cell in with_episodes(a.out, asked_conditions(a.out)[0]):
        texts.get(cell["plans"], {}).update({t: p for t, p in cell["texts"].items() if p})
    for setting in a.plans:
        if not texts[setting]:
            raise InputError(f"--plans {setting}: {a.out} has no plans of it; evaluate it first")
    folder = Path(a.out) / "eval"
    rows = common.read_rows(folder / "plans.jsonl", ("task", "instruction"))
    u = {r["task"]: r["instruction"] for r in rows}
    name, url = common.name_and_url(a.judge)
    common.check_model(name, url)
    prompt = (common.DATA / "report" / "judge.txt").read_text().strip()
    path, judge_id = (
        folder / "judgements.jsonl",
        common.fingerprint(common.model_fingerprint(name, url), prompt, a.tokens, a.plans, texts),
    )
    rows = common.read_rows(path, ("task", "first", "answer", "judge_id"), missing_ok=True)
    done = common.finished((r for r in rows if r["judge_id"] == judge_id), "task", "first")
    todo = [
        (t, *order)
        for t in texts[a.plans[0]]
        if t in texts[a.plans[1]]
        for order in (a.plans, a.plans[::-1])
        if (t, order[0]) not in done
    ]

    async def ask_all() -> None:
        with (
            common.Appender(path) as append,
            tqdm(total=len(todo), desc="judgements") as bar,
            common.open_model(name, url, a) as model,
        ):

            async def ask(task, first, second):
                text = common.fill(
                    prompt, task=u[task], first=texts[first][task], second=texts[second][task]
                )
                for attempt in range(3):  # an invalid answer is asked for again, less greedily
                    reply = await model.ask(
                        [{"role": "user", "content": text}],
                        0.3 * attempt,
                        a.tokens,
                        common.seed_of(task, first, attempt),
                    )
                    if answer := parse_judgement(reply.text):
                        break
                append(
                    {
                        "task": task,
                        "plans": a.plans,
                        "first": first,
                        "answer": answer,
                        "reply": reply.text,
                        "judge": name,
                        "judge_id": judge_id,
                    }
                )
                bar.update()

            await asyncio.gather(*[ask(*key) for key in todo])

    if todo:
        asyncio.run(ask_all())
    write_report(ReportArgs([a.out], a.seed))


# ---- the commands --------------------------------------------------------------------------------


def write_report(a: ReportArgs) -> str:
    """Write and print tables, figures and report of all that was played."""
    folders = list({Path(out).resolve(): str(Path(out)) for out in a.out}.values())
    several, cells, outdated = len(folders) > 1, [], 0
    for out in folders:
        asked, old = asked_conditions(out, folders if several else ())
        if not asked:
            raise InputError(f"{out} has no evaluation: run 05_eval.py --out {out} first")
        cells, outdated = cells + with_episodes(out, asked), outdated + old
    cells = tables.pooled(cells) if several else cells
    results, differences = summarise(cells, a.seed, several)
    to = Path(folders[0], "pooled" if several else "")
    verdicts = None if several else judged(folders[0])
    text = report.write(to, cells, outdated, results, differences, verdicts)
    print(f"\n{text}\nwritten to {to}/results.md, results.json, results.png, report.html")
    return text


def write_plan(a: PlanArgs) -> None:
    """Print the plan for one task in words."""
    if not a.text:
        raise InputError('name the task: python 05_eval.py plan --planner MODEL "Your task is ..."')
    prompts, (name, url) = common.Prompts(a.env, a.prompts), common.name_and_url(a.planner)
    common.check_model(name, url)

    async def ask() -> str:
        with (
            tempfile.TemporaryDirectory() as out,
            common.open_model(
                name,
                url,
                SimpleNamespace(
                    out=out, concurrency=1, tensor_parallel=1, max_model_len=a.max_model_len
                ),
            ) as model,
        ):
            return (await model.ask(prompts.planner(a.text), 0.0, a.plan_tokens)).text

    reply = asyncio.run(ask())
    if not (plan := common.parse_plan(reply)):
        raise InputError(f"{a.planner} wrote no plan but: {reply[:300]}")
    print(plan)


def split_commas(values: list[str]) -> list[str]:
    """'a,b' 'c' -> a, b, c; a URL may have commas of its own."""
    return list(
        dict.fromkeys(
            part for v in values for part in ([v] if v.startswith("http") else v.split(",")) if part
        )
    )


def main(a: Args) -> None:
    for name in ("agents", "plans", "splits", "plan_positions"):
        setattr(a, name, split_commas(getattr(a, name)))
    if wrong := [i for i in a.plan_positions if i not in common.PLAN_POSITIONS]:
        raise InputError(f"--plan_positions {wrong[0]}: one of {', '.join(common.PLAN_POSITIONS)}")
    common.Prompts(a.env, a.prompts, a.examples)
    for setting in a.plans:
        planner = planner_of(a, setting)
        if setting.endswith(".jsonl"):
            common.read_rows(setting, ("task", "plan"))
        elif planner:
            common.check_model(planner)
            if setting != "gpt" and not Path(planner).is_dir():
                raise InputError(
                    f"--plans {setting}: there is no planner {planner}; run the stage "
                    "that makes it, or leave it out"
                )
    for agent in a.agents if not a.plans_only else []:
        if not agent.startswith("http"):
            common.check_model(agent)
    common.check_data(a.env, a.out)

    async def stage():
        async with common.EnvPool(a.env, a.workers, a.concurrency, a.ray) as pool:
            named = [s for s in common.task_files(a.tasks) if s != "train"]
            names = a.splits or named or common.environment(a.env).tests()
            splits = {
                s: (
                    await common.list_tasks(
                        pool, a.env, s, a.tasks, a.types, a.limit and a.skip + a.limit
                    )
                )[a.skip :]
                for s in names
            }
            if empty := [s for s in splits if not splits[s] or a.skip < 0]:
                raise InputError(f"--skip {a.skip} is negative or leaves no task of {empty[0]}")
            every = list(dict.fromkeys(t for tasks in splits.values() for t in tasks))
            plans_ids = await greedy_plans(a, every, pool)
            if a.plans_only:
                return
            cells, (known, _) = cells_of(a, plans_ids, splits), asked_conditions(a.out)
            if new := [c for c in cells if c not in known]:
                with common.Appender(Path(a.out) / "eval" / "conditions.jsonl") as append:
                    for cell in new:
                        append(cell)
            await play_missing(a, cells, pool)

    asyncio.run(stage())
    if a.plans_only:
        print(f"written to {a.out}/eval/plans.jsonl")
    else:
        write_report(ReportArgs([a.out], a.seed))


COMMANDS = {
    "judge": (judge, JudgeArgs),
    "report": (write_report, ReportArgs),
    "plan": (write_plan, PlanArgs, "text"),
}

if __name__ == "__main__":
    named = len(sys.argv) > 1 and sys.argv[1] in COMMANDS
    common.run_stage(*(COMMANDS[sys.argv.pop(1)] if named else (main, Args)))
