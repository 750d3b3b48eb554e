"""Stage 5 (paper 4.1, 4.2, 5, appendix B): do the plans help agents on held-out tasks?

    python 05_eval.py --env NAME --agents MODEL --out runs/NAME
    python 05_eval.py --agents gpt-4o http://gpu:8000/v1 --plan_positions instruction thought
    python 05_eval.py judge --judge gpt-4o --plans sft mpo --out runs/NAME       # figure 6
    python 05_eval.py report --out runs/NAME      # all tables and figures again, from the rows
    python 05_eval.py report --out runs/A runs/B  # of several environments or seeds together
    python 05_eval.py plan --planner runs/NAME/mpo --env NAME "Your task is to ..."

A plan setting, such as `mpo`, says where the plans come from. Its plan for a task is made once, at
temperature 0, and read by all agents. Then every agent plays every task with the plan of every
setting. A condition is an agent, a plan setting, a plan position and a split.

The setting `per_type` asks whether a planner has to be trained at all: every task of a type gets
the same plan, the one of stage 3's that did best. Such a plan may name what its own task names, a
box or a room. `per_type_adapted` replaces these words by those of the task that is played.

Files in --out, and the fields of their rows
    eval/conditions.jsonl    a row for each condition; if one occurs twice, the last row counts
        env, agent, plans (the setting), plan_position, split, tasks
        note                 the environment's remark about its data
        agent_id, plans_id   fingerprints of what makes the agent's episodes and the plans
    eval/plans.jsonl         a row for each plan
        setting, task, instruction, plan, plans_id
        untagged             true: the reply had no tags, and all of it is the plan
        thinking_cut_off     true: no plan, the reply ended while the planner was thinking
        reason               why plan is null: "refused: ..." if the request was refused, or
                             "no plan of its type" (plan setting per_type)
    eval/rollouts.jsonl      a row for each episode
        plan_position, agent_id, and the fields of stage 3's rollouts.jsonl; an episode that was
        refused counts, with reward 0
    eval/judgements.jsonl    a row for each answer of the judge
        task, plans (the two settings), first (the one shown first), reply, judge
        answer               first, second or tie in each dimension; null: not understood, or the
                             request was refused: then there is a `reason`, "refused: ..."
        thinking_cut_off     replies that ended while the judge was thinking
        judge_id             fingerprint of the judge, its prompt and the two settings
        question             fingerprint of the task and its two plans; both orders have the same
    results.md, results.json, report.html
    table2.md ... fig6.png   only those whose conditions were evaluated
Finished plans, episodes and judgements are kept. Run a command again to resume it: it does only
what is missing.

The report of several run folders is written to `pooled/` in the first one. It has a column for each
split of each environment and one for their average. Run folders of one environment share its
columns: a task's value is its mean over them. Figure 6 is of a single run folder only.
"""

import asyncio
import difflib
import itertools
import json
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import List, NamedTuple, Optional

from tqdm import tqdm

import common
from common import InputError, arg, mean
from data.report import report, tables

# what the judge compares (paper 5.6); data/report/judge.txt asks for each as {name}_better
DIMENSIONS = ("correctness", "followability", "standardization")
# the judge is asked again after an invalid answer, each time less greedily
JUDGE_TEMPERATURES = (0.0, 0.3, 0.6)


@dataclass
class Args:
    env: str = arg("sciworld", "environment: a folder of data/, or a path")
    out: str = arg("runs/sciworld", "run folder")
    agents: List[str] = arg(
        ["meta-llama/Llama-3.1-8B-Instruct"],
        "local models, models of an OpenAI-compatible API, or servers: http://..., with several of "
        "one model with commas, NAME@http://... if they have other models, too",
    )
    plans: List[str] = arg(
        ["none", "sft", "mpo"],
        "plan settings: none; the planner checkpoint of that name in --out (sft, rft, mpo); "
        "gpt: --teacher asked directly; a JSONL file with `task` and `plan`; "
        "mismatched: mpo's plan for a task of another type or, where all are of one type, for "
        "another task (control); per_type: the best of stage "
        "3's plans of the task's type; per_type_adapted: the same plan with what its own task "
        "names replaced by the words of this one; oracle: the plan that stage 1's rules make of "
        "the test task's own expert trajectory (control)",
    )
    splits: List[str] = arg([], "splits of the environment (default: its test splits)")
    plan_positions: List[str] = arg(
        ["instruction"],
        "where the agent reads the plan: instruction (paper), thought, observation (paper 5.2)",
    )
    teacher: str = arg(
        "gpt-4o", "the planner of --plans gpt (paper: gpt-4o): a model, or a server's URL"
    )
    agent_temperature: float = arg(0.0, "temperature of the agent (paper: 0, as of the planner)")
    plan_tokens: int = arg(512, "token limit of a plan")
    plan_thinking: Optional[str] = common.thinking_arg(
        "our planners (trained without)", "the token limit", "off"
    )
    teacher_thinking: Optional[str] = common.thinking_arg("--teacher", "the token limit")
    agent_tokens: int = arg(512, "token limit of an agent's reply")
    agent_thinking: Optional[str] = common.thinking_arg("an agent", "the token limit")
    prompts: Optional[str] = arg(
        None, "prompt folder: one of the environment's, or a path (default: the environment's own)"
    )
    examples: Optional[str] = arg(
        None,
        "type: a one-shot example of each task's type, also where the environment has one for all "
        "(paper)",
    )
    observation_chars: int = arg(0, "cut observations to this length, 0: never")
    max_steps: Optional[int] = arg(None, "step limit of an episode (default: the environment's)")
    tasks: List[str] = arg(
        [],
        "lists of tasks in place of the environment's splits: SPLIT=FILE each, or a folder of "
        "them (data/README.md)",
    )
    types: Optional[List[str]] = arg(None, "only tasks of these types")
    limit: Optional[int] = arg(None, "only the first N tasks of each split")
    skip: int = arg(
        0,
        "leave out the first N tasks of each split, before --limit. To validate on train tasks: "
        "the other stages with --limit N, then --splits train --skip N",
    )
    workers: int = arg(16, "environment worker processes")
    concurrency: Optional[int] = arg(
        None, "episodes in flight (default: 64 a server, at least 256; 32 with an agent of an API)"
    )
    ray: bool = arg(False, "environment workers on a Ray cluster (RAY_ADDRESS)")
    tensor_parallel: int = arg(1, "GPUs of one replica of a served model")
    max_model_len: int = arg(32768, "context of a served model, tokens, at most its own")
    seed: int = arg(
        0,
        "random seed of the bootstrap, of mismatched plans, and of episodes at an "
        "--agent_temperature above 0",
    )
    check: bool = arg(False, "say whether this command can run here, a line each, and stop")


@dataclass
class JudgeArgs:
    out: str = arg("runs/sciworld", "run folder")
    judge: str = arg(
        "gpt-4o",
        "who compares the plans: a model of an API (paper: gpt-4o), a local model, or a server, "
        "http://... or NAME@http://...",
    )
    plans: List[str] = arg(["sft", "mpo"], "the two plan settings to compare, evaluated before")
    tokens: int = arg(1024, "token limit of a judgement")
    thinking: Optional[str] = common.thinking_arg("the judge", "the token limit")
    concurrency: int = arg(32, "requests in flight")
    tensor_parallel: int = arg(1, "GPUs of one replica of a served model")
    max_model_len: int = arg(32768, "context of a served model, tokens, at most its own")
    seed: int = arg(0, "random seed of the bootstrap")
    check: bool = arg(False, "say whether this command can run here, a line each, and stop")


@dataclass
class ReportArgs:
    out: List[str] = arg(
        [Args.out],
        "run folder; several: environments or seeds to report together, in the first one's "
        "subfolder pooled/",
    )
    seed: int = arg(0, "random seed of the bootstrap")


@dataclass
class PlanArgs:
    planner: str = arg(
        "runs/sciworld/mpo",
        "a local model, a model of an API, or a server, http://... or NAME@http://...",
    )
    env: str = arg("sciworld", "environment: a folder of data/, or a path")
    text: str = arg("", "the task, as the environment words it; or the positional argument")
    prompts: Optional[str] = arg(None, "prompt folder: one of the environment's, or a path")
    plan_tokens: int = arg(512, "token limit of the plan")
    plan_thinking: Optional[str] = common.thinking_arg(
        "the planner (trained without)", "the token limit", "off"
    )
    max_model_len: int = arg(32768, "context of a served model, tokens, at most its own")


# ---- plans ---------------------------------------------------------------------------------------


PER_TYPE = ("per_type", "per_type_adapted")  # the plan settings with one plan per task type

# A new plan setting needs: planner_of, plans_fingerprint, make_plans_of_setting, and tables.ORDER
# and NAMES.


def planner_of(a: Args, setting: str) -> str | None:
    """The model (or a server's URL) that makes the plans of a setting; None if no model does."""
    if setting in ("none", "oracle", *PER_TYPE) or setting.endswith(".jsonl"):
        return None
    if setting == "gpt":
        return a.teacher
    if setting == "mismatched":
        setting = "mpo"
    return str(Path(a.out) / setting)


def planner_prompts(a: Args, setting: str) -> common.Prompts:
    """The prompts of a setting's planner. The teacher gets the environment's own, which explain the
    format of a plan: our planners have learned it."""
    return common.Prompts(a.env, None if setting == "gpt" else a.prompts)


def planner_thinking(a: Args, setting: str) -> str | None:
    """How much a setting's planner may think."""
    return a.teacher_thinking if setting == "gpt" else a.plan_thinking


def plans_fingerprint(a: Args, setting: str) -> str | None:
    """`plans_id`: the fingerprint of what makes a setting's plans; None without plans."""
    if setting == "none":
        return None
    if setting == "oracle":
        return common.fingerprint(setting, a.env)
    if setting in PER_TYPE:
        return common.fingerprint(setting, best_of_types(a.out))
    if setting.endswith(".jsonl"):
        return common.fingerprint(Path(setting).read_text())
    name, url = common.name_and_url(planner_of(a, setting))
    model = common.model_fingerprint(name, url)
    prompt = planner_prompts(a, setting).planner_text
    parts = [model, prompt, a.plan_tokens]
    if setting == "mismatched":
        parts += [setting, a.seed]
    thinking = planner_thinking(a, setting)
    if thinking != planner_thinking(Args(), setting):
        parts.append(thinking)
    return common.fingerprint(*parts)


@dataclass
class PlanKeeper:
    """Keeps every plan as soon as it is made: in eval/plans.jsonl and in `done`."""

    ids: dict[str, str | None]  # {setting: plans_id}
    instructions: dict[str, str]  # {task: instruction}
    done: dict[tuple, dict]  # {(plans_id, task): row}
    append: common.Appender
    bar: tqdm

    def keep(self, setting: str, task: str, plan: str | None, **more) -> None:
        row = {
            "setting": setting,
            "task": task,
            "plan": plan,
            "instruction": self.instructions[task],
            "plans_id": self.ids[setting],
            **more,
        }
        self.append(row)
        self.done[self.ids[setting], task] = row
        self.bar.update()


def settings_in_order(a: Args) -> list[str]:
    """The plan settings of --plans, each once. Mismatched plans are plans of mpo: these are made
    first, also if mpo is not in --plans."""
    settings = list(dict.fromkeys(a.plans))
    if "mismatched" in settings:
        settings.remove("mismatched")
        settings = list(dict.fromkeys([*settings, "mpo", "mismatched"]))
    return settings


def missing_plans(
    ids: dict[str, str | None], tasks: list[str], done: dict[tuple, dict]
) -> dict[str, list[str]]:
    """{setting: the tasks that have no plan of it yet}. `ids`: {setting: plans_id}."""
    missing = {}
    for setting, plans_id in ids.items():
        without_plan = [t for t in tasks if (plans_id, t) not in done]
        if without_plan and setting != "none":
            missing[setting] = without_plan
    return missing


async def make_missing_plans(a: Args, tasks: list[str], pool) -> dict[str, str | None]:
    """Make the plans that are missing, for every setting and task. Returns {setting: plans_id}."""
    path = Path(a.out) / "eval" / "plans.jsonl"
    ids = {setting: plans_fingerprint(a, setting) for setting in settings_in_order(a)}
    with common.Appender(path) as append:
        rows = common.read_rows(path, ("plans_id", "task", "plan", "instruction"))
        done = common.finished(rows, "plans_id", "task")
        missing = missing_plans(ids, tasks, done)
        if "mismatched" in missing and len(tasks) < 2:
            raise InputError("--plans mismatched needs two test tasks")
        if missing:
            instructions = await pool.each(distinct(missing.values()), "reset", worked=len(done))
            total = sum(map(len, missing.values()))
            with tqdm(total=total, desc="plans") as bar:
                keeper = PlanKeeper(ids, instructions, done, append, bar)
                for setting, without_plan in missing.items():
                    # a task that cannot be reset stays without a plan, and its episode is missing
                    possible = [task for task in without_plan if task in instructions]
                    if possible:
                        await make_plans_of_setting(a, setting, possible, tasks, pool, keeper)
    print_plan_problems(a, ids, tasks, done, path)
    return ids


def distinct(lists) -> list:
    """The items of several lists, each once, in order."""
    return list(dict.fromkeys(itertools.chain.from_iterable(lists)))


async def make_plans_of_setting(
    a: Args, setting: str, tasks: list[str], all_tasks: list[str], pool, keeper: PlanKeeper
) -> None:
    """Make a setting's plans for `tasks`. Mismatched plans are those for others of `all_tasks`."""
    if setting.endswith(".jsonl"):
        plan_of = plans_in_file(setting, tasks)
        for task in tasks:
            keeper.keep(setting, task, plan_of[task])
    elif setting == "oracle":
        await keep_oracle_plans(a, tasks, pool, keeper)
    elif setting in PER_TYPE:
        keep_plans_of_types(a, setting, tasks, keeper)
    elif setting == "mismatched":
        mpo = keeper.ids["mpo"]
        for task in tasks:
            other = task_of_another_type(a, task, all_tasks)
            if (mpo, other) in keeper.done:
                keeper.keep(setting, task, keeper.done[mpo, other]["plan"])
    else:
        await ask_planner(a, setting, tasks, keeper)


async def ask_planner(a: Args, setting: str, tasks: list[str], keeper: PlanKeeper) -> None:
    """Ask a setting's planner for a plan of each task."""
    prompts = planner_prompts(a, setting)
    name, url = common.name_and_url(planner_of(a, setting))
    with common.open_model(name, url, a, planner_thinking(a, setting)) as model:
        earlier = [key for key in keeper.done if key[0] == keeper.ids[setting]]
        model.answers = len(earlier)
        refusals = common.Refusals(keeper.append, model, tasks)
        keeper = replace(keeper, append=refusals)

        async def ask(task: str) -> None:
            messages = prompts.planner(keeper.instructions[task])
            try:
                answer = await ask_for_plan(model, messages, a.plan_tokens)
            except common.RequestRefused as e:
                answer = {"plan": None, "reason": common.refusal_reason(e)}
            keeper.keep(setting, task, **answer)

        await asyncio.gather(*[ask(task) for task in tasks])
        refusals.finish()


async def ask_for_plan(model: common.Model, messages: list[dict], tokens: int) -> dict:
    """{"plan", "untagged", "thinking_cut_off"} of the planner's most likely reply. A reply without
    tags is the plan itself (`untagged`). One that is empty or that ended while the planner was
    thinking is no plan."""
    reply = await model.ask(messages, 0.0, tokens)
    text = reply.text.strip()
    plan = common.parse_plan(text)
    cut_off = plan is None and reply.cut_off
    untagged = plan is None and text != "" and not cut_off
    if untagged:
        plan = text
    return {"plan": plan, "untagged": untagged, "thinking_cut_off": cut_off}


def plans_in_file(path: str, tasks: list[str]) -> dict[str, str | None]:
    """{task: plan} of a JSONL file. Raises `InputError` if one of `tasks` has no plan, or if any
    task has two."""
    plan_of: dict[str, str | None] = {}
    for row in common.read_rows(path, ("task", "plan"), appended=False):
        task = row["task"]
        plan = row["plan"]
        if task in plan_of and plan_of[task] != plan:
            raise InputError(f"{path} has several plans for {task}: keep one")
        plan_of[task] = plan
    absent = [t for t in tasks if t not in plan_of]
    if absent:
        raise InputError(
            f"{path} has no plan for {absent[0]} and {len(absent) - 1} other tasks of --splits"
        )
    return plan_of


async def keep_oracle_plans(a: Args, tasks: list[str], pool, keeper: PlanKeeper) -> None:
    """Abstract each task's own expert trajectory into a plan, as --teacher rules does in stage 1. A
    task without an expert trajectory has no plan."""
    env = common.environment(a.env)
    experts = await pool.each(tasks, "expert", worked=len(keeper.done))
    for task, expert in experts.items():
        plan = None
        if expert:
            plan = common.number_steps(env.abstract(expert["instruction"], expert["steps"]))
        keeper.keep("oracle", task, plan)


def task_of_another_type(a: Args, task: str, tasks: list[str]) -> str:
    """A task of another type, drawn by seed; another task where all are of one type (WebShop)."""
    own_type = common.task_type(task)
    others = [t for t in tasks if common.task_type(t) != own_type]
    if not others:
        others = [t for t in tasks if t != task]
    # mismatched plans were once called "wrong"; another word here would draw other tasks
    return others[common.seed_of(a.seed, "wrong", task) % len(others)]


def print_plan_problems(
    a: Args, ids: dict[str, str | None], tasks: list[str], done: dict[tuple, dict], path: Path
) -> None:
    """Say how many plans of each setting are replies without tags, how many were refused, and how
    many are missing because the planner was still thinking, or because no plan of the type was
    scored. Also say where mismatched plans are of the same type."""
    for setting, plans_id in ids.items():
        if setting == "none":
            continue
        if setting == "mismatched" and len({common.task_type(task) for task in tasks}) == 1:
            print(
                "mismatched: all test tasks are of one type, so the plans are those of other tasks "
                "of this type"
            )
        rows = [done[plans_id, t] for t in tasks if (plans_id, t) in done]
        untagged = [row for row in rows if row.get("untagged")]
        if untagged:
            replies = f"{len(untagged)} of {len(tasks)} replies"
            print(f"{setting}: {replies} have no tags; their text is the plan")
        without = [row for row in rows if row.get("reason") == NO_PLAN_OF_TYPE]
        if without:
            print(
                f"{setting}: {len(without)} of {len(tasks)} tasks are played without a plan: no "
                "plan of their type was scored in stage 3"
            )
        common.print_refused(f"plans of {setting}", rows, path)
        cut_off = [row for row in rows if row.get("thinking_cut_off")]
        flag = "--teacher_thinking" if setting == "gpt" else "--plan_thinking"
        who = f"the planner of {setting}"
        common.print_cut_off(len(cut_off), who, f"--plan_tokens {a.plan_tokens}", flag)


# ---- one plan per task type ----------------------------------------------------------------------

NO_PLAN_OF_TYPE = "no plan of its type"  # the `reason` of such a row
FUNCTION_WORDS = {"a", "an", "the", "some", "it", "and", "in", "on"}
GAP = "|"  # in place of a function word


class TypePlan(NamedTuple):
    """The plan of a task type."""

    plan: str
    instruction: str  # of the task of stage 3 from which it is taken


def scored_plans(out: str) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """({task: {plan: Q(p)}}, {task: instruction}) of the plans that stage 3 sampled and scored last
    in a run folder. Q(p) is the mean reward of the rollouts that did not fail (equation 6)."""
    sampled = newest_rows(Path(out) / "plans.jsonl", "task", "plan", "instruction")
    played = newest_rows(Path(out) / "rollouts.jsonl", "task", "plan", "reward", "end")
    rewards: dict[tuple, list[float]] = {}
    for row in played:
        if row["end"] not in common.FAILED_ENDS:
            rewards.setdefault((row["task"], row["plan"]), []).append(row["reward"])
    q: dict[str, dict[str, float]] = {}
    for row in sampled:
        task = row["task"]
        plan = row["plan"]
        if (task, plan) in rewards:
            q.setdefault(task, {})[plan] = mean(rewards[task, plan])
    return q, {row["task"]: row["instruction"] for row in sampled}


def newest_rows(path: Path, *fields: str) -> list[dict]:
    """The rows of a file of stage 3 that have the fingerprint of its last row."""
    rows = common.read_rows(path, (*fields, "fingerprint"), missing_ok=True)
    return [row for row in rows if row["fingerprint"] == rows[-1]["fingerprint"]]


def best_of_types(out: str) -> dict[str, TypePlan]:
    """{task type: its best plan of stage 3}, that with the highest mean over its tasks of Q(p)
    minus the mean Q of the task's plans, among those sampled for two or more tasks if there are
    any; of equals the last in the alphabet. It is taken from the task where it gained most. Raises
    `InputError` if no plan is scored."""
    q, instructions = scored_plans(out)
    if not q:
        raise InputError(
            f"--plans per_type: {out} has no plans with scores; run stage 3 (make score), or leave "
            "it out"
        )
    gains: dict[tuple, dict[str, float]] = {}  # {(task type, plan): {task: gain}}
    for task in sorted(q):
        for plan, quality in q[task].items():
            gain = quality - mean(q[task].values())
            gains.setdefault((common.task_type(task), plan), {})[task] = gain
    ranked = []
    for (kind, plan), of_tasks in gains.items():
        several = len(of_tasks) > 1
        average = round(mean(of_tasks.values()), 9)  # equal gains are equal, in any order
        source = max(of_tasks, key=of_tasks.get)
        ranked.append((several, average, plan, kind, instructions[source]))
    best = {}
    for _, _, plan, kind, instruction in sorted(ranked):  # a better one replaces the one before
        best[kind] = TypePlan(plan, instruction)
    return best


def keep_plans_of_types(a: Args, setting: str, tasks: list[str], keeper: PlanKeeper) -> None:
    """Give every task the plan of its type. A task of a type without one has no plan."""
    best = best_of_types(a.out)
    for task in tasks:
        chosen = best.get(common.task_type(task))
        if chosen is None:
            keeper.keep(setting, task, None, reason=NO_PLAN_OF_TYPE)
            continue
        plan = chosen.plan
        if setting == "per_type_adapted":
            plan = adapted(plan, chosen.instruction, keeper.instructions[task])
        keeper.keep(setting, task, plan)


def adapted(plan: str, source: str, target: str) -> str:
    """The plan for the task `source` with what this task names (box, room, object) replaced by what
    the task `target` names: instructions of two tasks of one type. If one names more than the
    other, it is not known which words correspond: the plan stays as it is."""
    first = last_paragraph(source)
    second = last_paragraph(target)
    # words that only one of the two has, or has in another place
    from_source = []
    from_target = []
    aligned = difflib.SequenceMatcher(None, first, second, autojunk=False)
    for tag, i, j, k, m in aligned.get_opcodes():
        if tag != "equal":
            from_source += [*first[i:j], GAP]
            from_target += [*second[k:m], GAP]
    old = names_in(from_source)
    new = names_in(from_target)
    if len(old) != len(new):  # without words that only moved
        old = names_in(from_source, from_target)
        new = names_in(from_target, from_source)
    if not old or len(old) != len(new):
        return plan
    replacement = dict(zip(old, new, strict=True))
    longest_first = sorted(old, key=len, reverse=True)
    pattern = "|".join(re.escape(name) for name in longest_first)
    return re.sub(
        rf"\b(?:{pattern})\b", lambda found: replacement[found[0].lower()], plan, flags=re.I
    )


def last_paragraph(instruction: str) -> list[str]:
    """The words and marks of the last paragraph, which says the task: ALFWorld's first one lists
    what is in the room. Function words are gaps: "put a cup in ..." is as "put some cup on ..."."""
    text = instruction.strip().split("\n\n")[-1].lower()
    words = re.findall(r"[\w-]+|[^\w\s]", text)
    return [GAP if word in FUNCTION_WORDS else word for word in words]


def names_in(words: list[str], others=()) -> list[str]:
    """The runs of words between gaps, without words that `others` has, too."""
    own = [word for word in words if word == GAP or word not in others]
    runs = " ".join(own).split(GAP)
    return [run.strip() for run in runs if run.strip()]


# ---- episodes ------------------------------------------------------------------------------------


def conditions_of(
    a: Args, plans_ids: dict[str, str | None], splits: dict[str, list[str]]
) -> list[dict]:
    """The conditions of this run: every agent with every plan setting, plan position and split.
    Without a plan there is one plan position only."""
    prompts = common.Prompts(a.env, a.prompts, a.examples)
    note = common.environment(a.env).note()
    shown = shown_settings(a.plans)
    conditions = []
    for agent in a.agents:
        name, url = common.name_and_url(agent)
        model_id = common.model_fingerprint(name, url)
        agent_id = common.agent_fingerprint(a, model_id, prompts)
        for setting in a.plans:
            positions = ["instruction"] if setting == "none" else a.plan_positions
            for plan_position in positions:
                for split, tasks in splits.items():
                    condition = {
                        "env": a.env,
                        "agent": name,
                        "agent_id": agent_id,
                        "plan_position": plan_position,
                        "split": split,
                        "tasks": tasks,
                        "plans": shown[setting],
                        "plans_id": plans_ids[setting],
                        "note": note,
                    }
                    conditions.append(condition)
    return conditions


def shown_settings(settings: list[str]) -> dict[str, str]:
    """{plan setting: its name in tables}. A file is shown without its folder, unless two files then
    have the same name."""
    file_names = [Path(s).name for s in settings if s.endswith(".jsonl")]
    shown = {}
    for setting in settings:
        name = Path(setting).name
        shown[setting] = name if file_names.count(name) == 1 else setting
    return shown


async def play_missing(a: Args, conditions: list[dict], pool) -> None:
    """Play the episodes that the conditions lack, agent by agent."""
    prompts = common.Prompts(a.env, a.prompts, a.examples)
    path = Path(a.out) / "eval" / "rollouts.jsonl"
    with common.Appender(path) as append:
        jobs = missing_episodes(a.out, conditions)
        for agent in a.agents:
            name, url = common.name_and_url(agent)
            own = [job for job in jobs if job["agent"] == name]
            if own:
                await play_with(a, name, url, own, prompts, pool, append)
    for agent_id in tables.unique(conditions, "agent_id"):
        common.print_refused("episodes", complete_episodes(a.out, agent_id), path)


async def play_with(
    a: Args, name: str, url: str | None, jobs: list[dict], prompts, pool, append
) -> None:
    """Play the jobs of one agent, one plan position after the other."""
    with common.open_model(name, url, a, a.agent_thinking) as model:
        model.answers = len(complete_episodes(a.out, jobs[0]["agent_id"]))
        for plan_position in tables.unique(jobs, "plan_position"):
            config = common.RolloutConfig(
                prompts,
                temperature=a.agent_temperature,
                max_tokens=a.agent_tokens,
                observation_chars=a.observation_chars,
                seed=a.seed,
                max_steps=a.max_steps,
                plan_position=plan_position,
            )
            await common.rollouts(
                [job for job in jobs if job["plan_position"] == plan_position],
                model,
                pool,
                a.env,
                config,
                model.concurrency,
                append,
                desc=f"evaluation, {Path(name).name}, {plan_position}",
            )
    limit = f"--agent_tokens {a.agent_tokens}"
    common.print_cut_off(model.cut_off_replies, name, limit, "--agent_thinking")


def complete_episodes(out: str, agent_id: str | None = None) -> list[dict]:
    """The rows of eval/rollouts.jsonl, of one agent or of all, that are not crashed."""
    path = Path(out) / "eval" / "rollouts.jsonl"
    fields = ("task", "plan", "reward", "success", "steps", "agent_id", "plan_position", "end")
    found = []
    for row in common.read_rows(path, fields, missing_ok=True):
        if row["end"] != "crash" and agent_id in (None, row["agent_id"]):
            found.append(row)
    return found


def missing_episodes(out: str, conditions: list[dict]) -> list[dict]:
    """A job for each episode that the conditions lack, but not where the plan is missing, because
    the task cannot be reset. If two settings have the same plan for a
    task, it is played once: the episodes are the same, also at a temperature above 0, as an
    episode's seed depends on the plan and not on the setting."""
    jobs: dict[tuple, dict] = {}
    for condition in load_episodes(out, conditions):
        for task, row in condition["episodes"].items():
            if row is not None or (task not in condition["texts"] and condition["plans"] != "none"):
                continue
            job = {
                "task": task,
                "plan": condition["texts"].get(task),
                "rollout": 0,
                "agent": condition["agent"],
                "plan_position": condition["plan_position"],
                "agent_id": condition["agent_id"],
            }
            jobs[job["agent_id"], job["plan_position"], task, job["plan"]] = job
    return list(jobs.values())


def load_episodes(out: str, conditions: list[dict]) -> list[dict]:
    """The conditions of a run folder with their plans and episodes. Each gets "texts", {task: its
    plan or None}; "episodes", {task: its row, or None if it is missing or crashed}; "run", the run
    folder; and the counts of `plan_problems`."""
    folder = Path(out) / "eval"
    fields = ("plans_id", "task", "plan")
    rows = common.read_rows(folder / "plans.jsonl", fields, missing_ok=True)
    plan_rows = common.finished(rows, "plans_id", "task")
    played = common.finished(complete_episodes(out), "agent_id", "plan_position", "task", "plan")

    found = []
    for condition in conditions:
        texts = {}
        episodes = {}
        for task in condition["tasks"]:
            episodes[task] = None
            plan_row = plan_rows.get((condition["plans_id"], task))
            if plan_row:
                texts[task] = plan_row["plan"]
            if plan_row or condition["plans"] == "none":
                key = condition["agent_id"], condition["plan_position"], task, texts.get(task)
                episodes[task] = played.get(key)
        problems = plan_problems([plan_rows[condition["plans_id"], task] for task in texts])
        more = {"texts": texts, "episodes": episodes, "run": out}
        found.append({**condition, **more, **problems})
    return found


def plan_problems(rows: list[dict]) -> dict[str, int]:
    """Of a condition's rows of eval/plans.jsonl: "untagged", how many are replies without tags;
    "cut_off", how many have no plan because the planner was still thinking; "refused_plans", how
    many were refused; "no_plan_of_type", how many have none because none of the type was scored."""
    count = Counter({"untagged": 0, "cut_off": 0, "refused_plans": 0, "no_plan_of_type": 0})
    for row in rows:
        if row.get("untagged"):
            count["untagged"] += 1
        if row.get("thinking_cut_off"):
            count["cut_off"] += 1
        if common.is_refused(row):
            count["refused_plans"] += 1
        if row.get("reason") == NO_PLAN_OF_TYPE:
            count["no_plan_of_type"] += 1
    return dict(count)


def current_conditions(out: str, folders=()) -> tuple[list[dict], int]:
    """(conditions, outdated) of a run folder. If a condition (agent, plan setting, plan position,
    split) occurs twice, its last row counts. `outdated`: how many are left out because the agent or
    the planner has changed since (retrained, or asked with other settings). With `folders`, an
    agent has the name that it has in a report of all of them."""
    fields = ("agent", "agent_id", "plans", "plans_id", "plan_position", "split", "tasks")
    rows = common.read_rows(Path(out) / "eval" / "conditions.jsonl", fields, missing_ok=True)
    if folders:
        names = tables.agent_names(tables.unique(rows, "agent"), out, folders)
        for row in rows:
            row["agent"] = names[row["agent"]]
    agent_ids: dict[str, str] = {}  # {agent: its newest agent_id}
    plans_ids: dict[str, str | None] = {}
    for row in rows:
        agent_ids[row["agent"]] = row["agent_id"]
        plans_ids[row["plans"]] = row["plans_id"]
    newest = common.finished(rows, "agent", "plans", "plan_position", "split")
    conditions = []
    for row in newest.values():
        same_agent = row["agent_id"] == agent_ids[row["agent"]]
        same_plans = row["plans_id"] == plans_ids[row["plans"]]
        if same_agent and same_plans:
            conditions.append(row)
    agents = list(agent_ids)
    conditions.sort(key=lambda c: (agents.index(c["agent"]), tables.rank(c)))
    return conditions, len(newest) - len(conditions)


# ---- statistics ----------------------------------------------------------------------------------
# Strata are groups of tasks, given as a list of values for each group. Every group counts the same,
# however many tasks it has: in an average over two environments, each environment is a stratum.


def mean_and_interval(strata: list, seed: int) -> dict:
    """{"mean", "interval"}: the mean over the strata of their means, and its 95% interval by a
    percentile bootstrap. Each resample draws as many values of each stratum as it has, from that
    stratum only."""
    import numpy as np
    from scipy.stats import bootstrap

    average = mean(map(mean, strata))
    samples = []
    for values in strata:
        sample = np.asarray(values, dtype=float)
        if len(sample) == 1:
            sample = sample.repeat(2)  # SciPy wants two values or more; the resamples are the same
        samples.append(sample)
    if all(sample.min() == sample.max() for sample in samples):
        return {"mean": average, "interval": [average, average]}

    def mean_of_means(*resamples, axis):
        return np.mean([r.mean(axis) for r in resamples], 0)

    found = bootstrap(
        samples,
        mean_of_means,
        n_resamples=10_000,
        batch=500,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return {"mean": average, "interval": [float(found.low), float(found.high)]}


def paired_test(strata: list, seed: int) -> dict:
    """`mean_and_interval` of differences, one per task, and "p", two-sided, of a permutation test:
    how often the mean is as far from 0 if the sign of each difference is drawn at random."""
    import numpy as np
    from scipy.stats import permutation_test

    gains = np.concatenate(strata, dtype=float)
    weights = []  # with these, the mean over all tasks is the mean over the strata of their means
    for values in strata:
        weight = len(gains) / len(strata) / len(values)
        weights.extend([weight] * len(values))
    weights = np.array(weights)

    def weighted_mean(flipped, axis):
        return (flipped * weights).mean(axis)

    p = 1.0
    if len(gains) > 1 and gains.any():
        p = permutation_test(
            (gains,),
            weighted_mean,
            rng=seed,
            permutation_type="samples",
            n_resamples=9_999,
            batch=500,
            vectorized=True,
        ).pvalue
    return {**mean_and_interval(strata, seed), "p": float(p)}


def summarise(conditions: list[dict], seed: int, several: bool) -> tuple[list[dict], list[dict]]:
    """(results, differences). There is a result for each condition and each total of conditions
    (`tables.with_totals`), and a difference for any two comparable ones that are complete."""
    entries = tables.with_totals(conditions, several)
    results = [result_of(entry, seed) for entry in entries]
    differences = []
    for entry in entries:
        for base in entries:
            if comparable(entry, base) and is_complete(entry) and is_complete(base):
                difference = difference_of(entry, base, seed)
                if difference:
                    differences.append(difference)
    return results, differences


def episodes_of(entry: dict) -> list[dict | None]:
    """All episodes of a condition or total, of every task and run folder; None: missing."""
    found = []
    for by_task in entry["strata"]:
        for episodes in by_task.values():
            found.extend(episodes)
    return found


def is_complete(entry: dict) -> bool:
    episodes = episodes_of(entry)
    return len(episodes) > 0 and all(episodes)


def task_value(episodes: list[dict], metric: str) -> float:
    """A task's value of a metric: the mean over its episodes, one of each run folder."""
    _, value = tables.METRICS[metric]
    return mean(map(value, episodes))


def result_of(entry: dict, seed: int) -> dict:
    """Counts, and mean and interval of each metric: None if an episode is missing."""
    episodes = episodes_of(entry)
    played = [e for e in episodes if e]
    ends = Counter(e["end"] for e in played)
    # only episodes with a plan in the thought have `continued`
    continued = [e for e in played if e.get("continued") is True]
    own_turn = [e for e in played if e.get("continued") is False]
    notes = [c["note"] for c in entry["conditions"] if c.get("note")]
    result = {
        "agent": entry["agent"],
        "plans": entry["plans"],
        "plan_position": entry["plan_position"],
        "split": entry["split"],
        "total": entry["total"],
        "tasks": sum(map(len, entry["strata"])),
        "runs": len(tables.unique(entry["conditions"], "run")),
        "episodes": len(played),
        "missing": len(episodes) - len(played),
        "ends": dict(ends),
        "format_errors": sum(e.get("format_errors", 0) for e in played),
        "thinking_cut_off": sum(e.get("thinking_cut_off", 0) for e in played),
        "context_overflows": ends["context"],
        "refused": ends[common.REFUSED],
        "continued": len(continued),
        "own_turn": len(own_turn),
        "untagged": sum(c["untagged"] for c in entry["conditions"]),
        "plans_cut_off": sum(c["cut_off"] for c in entry["conditions"]),
        "refused_plans": sum(c["refused_plans"] for c in entry["conditions"]),
        "no_plan_of_type": sum(c["no_plan_of_type"] for c in entry["conditions"]),
        "notes": list(dict.fromkeys(notes)),
        "steps": mean(len(e["steps"]) for e in played),
    }
    complete = is_complete(entry)
    for metric in tables.METRICS:
        result[metric] = None
        if complete:
            strata = []
            for by_task in entry["strata"]:
                strata.append([task_value(of_task, metric) for of_task in by_task.values()])
            result[metric] = mean_and_interval(strata, seed)
    return result


def comparable(entry: dict, base: dict) -> bool:
    """Whether there is a difference of `entry` over `base`: they are of the same agent and split,
    `base` stands above in the tables, and they differ in one thing only."""
    if any(entry[name] != base[name] for name in ("agent", "split", "total")):
        return False
    if tables.rank(base) >= tables.rank(entry):
        return False
    # another plan setting, the same plan position; no plan has no position and is the base of all
    if base["plan_position"] == entry["plan_position"] or base["plans"] == "none":
        return True
    # another plan position, the same plan setting
    return base["plans"] == entry["plans"]


def difference_of(entry: dict, base: dict, seed: int) -> dict | None:
    """The paired test of each metric on the tasks that both have; None if a stratum has none."""
    pairs = []  # for each stratum: [(a task's episodes, its episodes of `base`), ...]
    for own, of_base in zip(entry["strata"], base["strata"], strict=True):
        both = [(own[task], of_base[task]) for task in own if task in of_base]
        if not both:
            return None
        pairs.append(both)
    difference = {
        "agent": entry["agent"],
        "plans": entry["plans"],
        "plan_position": entry["plan_position"],
        "split": entry["split"],
        "tasks": sum(map(len, pairs)),
        "over": {"plans": base["plans"], "plan_position": base["plan_position"]},
    }
    for metric in tables.METRICS:
        strata = []
        for both in pairs:
            strata.append([task_value(x, metric) - task_value(y, metric) for x, y in both])
        difference[metric] = paired_test(strata, seed)
    return difference


# ---- the judge (paper 5.6, appendix E.3, figure 13) ----------------------------------------------


def judge(a: JudgeArgs) -> None:
    """Compare the plans of two settings on every task that has both, in both orders."""
    common.check_thinking(a)
    if a.check:
        checks = common.Checks(a.out)
        checks.asks(a.judge, None, a)
        checks.finish()
        return
    by_setting = plans_to_judge(a)
    name, url = common.name_and_url(a.judge)
    common.check_model(name, url)
    prompt = (common.DATA / "report" / "judge.txt").read_text().strip()
    model_id = common.model_fingerprint(name, url)
    parts = [model_id, prompt, a.tokens, DIMENSIONS, a.plans]
    if a.thinking is not None:
        parts.append(a.thinking)
    judge_id = common.fingerprint(*parts)
    path = Path(a.out) / "eval" / "judgements.jsonl"
    with common.Appender(path) as append:
        questions = open_questions(a, by_setting, prompt, judge_id)
        if questions:
            asyncio.run(ask_judge(a, name, url, judge_id, questions, append))
    rows = common.read_rows(path, ("judge_id",), missing_ok=True)
    common.print_refused("judgements", [r for r in rows if r["judge_id"] == judge_id], path)
    write_report(ReportArgs([a.out], a.seed))


def plans_to_judge(a: JudgeArgs) -> dict[str, dict]:
    """{setting: {task: plan}} of the two settings."""
    if len(a.plans) != 2 or a.plans[0] == a.plans[1]:
        raise InputError(f"--plans takes two settings to compare, not {' '.join(a.plans)}")
    conditions, _ = current_conditions(a.out)
    by_setting = plans_of_settings(load_episodes(a.out, conditions), a.plans)
    for setting in a.plans:
        if not by_setting[setting]:
            raise InputError(f"--plans {setting}: {a.out} has no plans of it; evaluate it first")
    return by_setting


def plans_of_settings(conditions: list[dict], settings: list[str]) -> dict[str, dict]:
    """{setting: {task: plan}} of conditions with their plans, without tasks that have none."""
    by_setting: dict[str, dict] = {setting: {} for setting in settings}
    for condition in conditions:
        setting = condition["plans"]
        if setting not in settings:
            continue
        for task, plan in condition["texts"].items():
            if plan:
                by_setting[setting][task] = plan
    return by_setting


def question_ids(by_setting: dict[str, dict], settings: list[str]) -> dict[str, str]:
    """{task: `question`} of the tasks that have plans of both settings."""
    first, second = settings
    question_of = {}
    for task, plan in by_setting[first].items():
        if task in by_setting[second]:
            question_of[task] = common.fingerprint(task, plan, by_setting[second][task])
    return question_of


class Question(NamedTuple):
    """A task's two plans for the judge, in one of the two orders."""

    task: str
    first: str  # the setting shown first
    text: str
    id: str  # `question` in the row


def open_questions(
    a: JudgeArgs, by_setting: dict[str, dict], prompt: str, judge_id: str
) -> list[Question]:
    """The questions that this judge has not answered yet."""
    plans_file = Path(a.out) / "eval" / "plans.jsonl"
    rows = common.read_rows(plans_file, ("task", "instruction"))
    instructions = {row["task"]: row["instruction"] for row in rows}
    done = common.finished(read_judgements(a.out), "judge_id", "question", "first")
    questions = []
    for task, question_id in question_ids(by_setting, a.plans).items():
        for first, second in (a.plans, a.plans[::-1]):
            if (judge_id, question_id, first) in done:
                continue
            text = common.fill(
                prompt,
                task=instructions[task],
                first=by_setting[first][task],
                second=by_setting[second][task],
            )
            questions.append(Question(task, first, text, question_id))
    return questions


async def ask_judge(
    a: JudgeArgs, name: str, url: str | None, judge_id: str, questions: list[Question], append
) -> None:
    """Ask all questions and append the answers to eval/judgements.jsonl."""
    path = Path(a.out) / "eval" / "judgements.jsonl"
    rows = common.read_rows(path, ("judge_id",), missing_ok=True)
    with (
        tqdm(total=len(questions), desc="judgements") as bar,
        common.open_model(name, url, a, a.thinking) as model,
    ):
        model.answers = len([row for row in rows if row["judge_id"] == judge_id])
        keep = common.Refusals(append, model, [question.task for question in questions])

        async def ask(question: Question) -> None:
            row = {
                "task": question.task,
                "plans": a.plans,
                "first": question.first,
                "answer": None,
                "reply": "",
                "thinking_cut_off": 0,
                "judge": name,
                "judge_id": judge_id,
                "question": question.id,
            }
            try:
                answer, reply, cut_off = await judgement_of(model, question, a.tokens)
            except common.RequestRefused as e:
                row["reason"] = common.refusal_reason(e)
            else:
                row.update(answer=answer, reply=reply, thinking_cut_off=cut_off)
            keep(row)
            bar.update()

        await asyncio.gather(*[ask(question) for question in questions])
        keep.finish()
    common.print_cut_off(model.cut_off_replies, name, f"--tokens {a.tokens}", "--thinking")


async def judgement_of(
    model: common.Model, question: Question, tokens: int
) -> tuple[dict | None, str, int]:
    """(answer, reply, how many replies ended while the judge was thinking); the last of several
    invalid replies, with None."""
    messages = [{"role": "user", "content": question.text}]
    cut_off = 0
    for attempt, temperature in enumerate(JUDGE_TEMPERATURES):
        seed = common.seed_of(question.task, question.first, attempt)
        reply = await model.ask(messages, temperature, tokens, seed)
        if reply.cut_off:
            cut_off += 1
        answer = parse_judgement(reply.text)
        if answer:
            break
    return answer, reply.text, cut_off


def parse_judgement(reply: str) -> dict | None:
    """{dimension: "first", "second" or "tie"} for the three dimensions and "overall", from the JSON
    object in a reply, after any thinking; None if there is none, or if an answer is none of
    these."""
    text, _ = common.split_thinking(reply)
    said = first_json_object(text)
    if said is None:
        return None
    answer = {}
    for dimension in (*DIMENSIONS, "overall"):
        answer[dimension] = str(said.get(f"{dimension}_better", "")).strip().lower()
        if answer[dimension] not in ("first", "second", "tie"):
            return None
    return answer


def first_json_object(text: str) -> dict | None:
    for brace in re.finditer(r"\{", text):
        try:
            found, _ = json.JSONDecoder().raw_decode(text[brace.start() :])
        except (ValueError, RecursionError):
            continue
        return found
    return None


def read_judgements(out: str) -> list[dict]:
    """The rows of eval/judgements.jsonl, without those of an earlier version, which have other
    fields or other dimensions."""
    path = Path(out) / "eval" / "judgements.jsonl"
    fields = ("task", "plans", "first", "answer", "judge", "judge_id")
    rows = common.read_rows(path, fields, missing_ok=True)
    dimensions = {*DIMENSIONS, "overall"}
    usable = []
    for row in rows:
        same_dimensions = row["answer"] is None or set(row["answer"]) == dimensions
        if "question" in row and same_dimensions:
            usable.append(row)
    if rows and not usable:
        print(f"{path}: judgements with other fields or dimensions are left out: judge again")
    return usable


def verdict_of(answers: dict[str, dict | None], dimension: str, settings: list[str]) -> str:
    """How the second of the two `settings` did on a task: "win", "tie", "loss", or "invalid" if an
    answer is missing. `answers`: {the setting shown first: the answer}. Answers that contradict
    each other are a tie."""
    if len(answers) < 2 or None in answers.values():
        return "invalid"
    winners = set()
    for first, answer in answers.items():
        if answer[dimension] == "first":
            winners.add(first)
        elif answer[dimension] == "second":
            winners.add(settings[1] if first == settings[0] else settings[0])
        else:
            winners.add(None)
    if winners == {settings[1]}:
        return "win"
    if winners == {settings[0]}:
        return "loss"
    return "tie"


def count_verdicts(rows: list[dict], settings: list[str]) -> dict[str, Counter]:
    """{dimension: counts of "win", "tie", "loss" and "invalid"} over the tasks, each of which was
    shown in both orders."""
    by_task: dict[str, dict] = {}
    for row in rows:
        by_task.setdefault(row["task"], {})[row["first"]] = row["answer"]
    counts = {}
    for dimension in (*DIMENSIONS, "overall"):
        count = Counter({"win": 0, "tie": 0, "loss": 0, "invalid": 0})
        for answers in by_task.values():
            count[verdict_of(answers, dimension, settings)] += 1
        counts[dimension] = count
    return counts


def last_comparison(out: str, conditions: list[dict]) -> dict | None:
    """{"plans": the two settings, "judge", "verdicts"} of the settings that were compared last, on
    the plans that the conditions have now; None if there is no judgement of these."""
    rows = read_judgements(out)
    if not rows:
        return None
    last = rows[-1]
    settings = last["plans"]
    question_of = question_ids(plans_of_settings(conditions, settings), settings)
    counted = []
    for row in rows:
        if row["judge_id"] == last["judge_id"] and row["question"] == question_of.get(row["task"]):
            counted.append(row)
    if not counted:
        return None
    verdicts = count_verdicts(counted, settings)
    return {"plans": settings, "judge": last["judge"], "verdicts": verdicts}


# ---- the commands --------------------------------------------------------------------------------


def write_report(a: ReportArgs) -> str:
    """Write tables, figures and report of all that was played. Print the tables, then what MPO's
    planner has learnt: a task's plans before and after, and the table of the planners."""
    by_path = {Path(out).resolve(): str(Path(out)) for out in a.out}
    folders = list(by_path.values())  # each once
    several = len(folders) > 1
    conditions = []
    outdated = 0
    for out in folders:
        current, left_out = current_conditions(out, folders if several else ())
        if not current:
            raise InputError(f"{out} has no evaluation: run 05_eval.py --out {out} first")
        conditions.extend(load_episodes(out, current))
        outdated += left_out
    if several:
        folder = Path(folders[0]) / "pooled"
        conditions = tables.pooled(conditions)
        judged = None
    else:
        folder = Path(folders[0])
        judged = last_comparison(folders[0], conditions)
    results, differences = summarise(conditions, a.seed, several)
    text = report.write(folder, conditions, outdated, results, differences, judged)
    print(f"\n{text}")
    learnt = report.what_was_learnt(conditions)
    if learnt:
        print(f"{learnt}\n")
        table = tables.paper_tables(results, differences).get("table3")
        if table:
            print(table.markdown())
    print(f"tables:  {folder}/results.md, results.json")
    print(f"picture: {folder}/results.png")
    print(f"report:  {folder}/report.html")
    return text


def write_plan(a: PlanArgs) -> None:
    """Print the plan for one task in words."""
    if not a.text:
        raise InputError('name the task: python 05_eval.py plan --planner MODEL "Your task is ..."')
    common.check_thinking(a)
    messages = common.Prompts(a.env, a.prompts).planner(a.text)
    name, url = common.name_and_url(a.planner)
    common.check_model(name, url)
    with tempfile.TemporaryDirectory() as logs:
        # what open_model reads of a stage's Args; a server's logs are deleted after the plan
        serving = SimpleNamespace(
            out=logs, concurrency=1, tensor_parallel=1, max_model_len=a.max_model_len
        )
        with common.open_model(name, url, serving, a.plan_thinking) as model:
            answer = asyncio.run(ask_for_plan(model, messages, a.plan_tokens))
    if answer["thinking_cut_off"]:
        raise InputError(
            f"{a.planner} wrote no plan, it was still thinking: raise --plan_tokens {a.plan_tokens}"
        )
    if not answer["plan"]:
        raise InputError(f"{a.planner} wrote no plan: its reply is empty")
    print(answer["plan"])


def split_commas(values: list[str]) -> list[str]:
    """'a,b' 'c' -> a, b, c, without duplicates; a URL may have commas of its own."""
    parts = []
    for value in values:
        _, url = common.split_url(value)
        if url:
            parts.append(value)
        else:
            parts.extend(filter(None, value.split(",")))
    return list(dict.fromkeys(parts))


def check_settings(a: Args) -> None:
    """Raise `InputError` for settings that cannot work."""
    common.check_thinking(a)
    for plan_position in a.plan_positions:
        if plan_position not in common.PLAN_POSITIONS:
            known = ", ".join(common.PLAN_POSITIONS)
            raise InputError(f"--plan_positions {plan_position}: one of {known}")
    common.Prompts(a.env, a.prompts, a.examples)  # raises InputError if there are none
    for setting in a.plans:
        if setting == "oracle":
            common.require(a.env, ("expert", "abstract"), "--plans oracle", "or leave it out")
        if setting.endswith(".jsonl"):
            common.read_rows(setting, ("task", "plan"), appended=False)  # raises InputError


def check_models(a: Args) -> None:
    """Raise `InputError` before any work if a planner, an agent or stage 3's plans are missing, or
    if an agent is given twice."""
    for setting in a.plans:
        if setting in PER_TYPE:
            best_of_types(a.out)
        planner = planner_of(a, setting)
        if planner is None:
            continue
        if setting != "gpt" and not Path(planner).is_dir():
            raise InputError(
                f"--plans {setting}: there is no planner {planner}; run the stage that makes it, "
                "or leave it out"
            )
        common.check_model(*common.name_and_url(planner))
    entry_of: dict[str, str] = {}  # {model's name: entry of --agents}
    for agent in a.agents:
        name, url = common.name_and_url(agent)
        common.check_model(name, url)
        if name in entry_of:
            raise InputError(
                f"--agents {entry_of[name]} {agent}: both are {name}; join the URLs of its servers "
                "with commas"
            )
        entry_of[name] = agent


def check(a: Args) -> None:
    """--check: what the evaluation needs, a line each."""
    checks = common.Checks(a.out)
    checks.environment(a)
    for setting in a.plans:
        planner = planner_of(a, setting)
        if planner:
            checks.asks(planner, None, a)
    for agent in a.agents:
        checks.asks(agent, None, a)
    conditions = len(a.agents) * len(a.plans) * len(a.plan_positions)
    checks.episodes(a, a.splits or common.evaluated_splits(a.env, a.tasks), conditions)
    checks.finish()


async def list_splits(a: Args, pool) -> dict[str, list[str]]:
    """{split: its tasks}: of --splits, else of the files in --tasks, else the test splits."""
    if a.skip < 0:
        raise InputError(f"--skip {a.skip} is negative")
    if a.limit is not None and a.limit < 1:
        raise InputError("--limit must be at least 1")
    names = a.splits or common.evaluated_splits(a.env, a.tasks)
    end = None
    if a.limit is not None:
        end = a.skip + a.limit
    splits = {}
    for split in names:
        tasks = await common.list_tasks(pool, a.env, split, a.tasks, a.types, end)
        splits[split] = tasks[a.skip :]
        if not splits[split]:
            raise InputError(f"--skip {a.skip} leaves no task of {split}")
    return splits


async def evaluate(a: Args) -> None:
    """Make the plans and play the episodes that are missing."""
    async with common.EnvPool(a.env, a.workers, a.concurrency, a.ray) as pool:
        splits = await list_splits(a, pool)
        plans_ids = await make_missing_plans(a, distinct(splits.values()), pool)
        conditions = conditions_of(a, plans_ids, splits)
        with common.Appender(Path(a.out) / "eval" / "conditions.jsonl") as append:
            known, _ = current_conditions(a.out)
            for condition in conditions:
                if condition not in known:
                    append(condition)
        await play_missing(a, conditions, pool)


def main(a: Args) -> None:
    a.agents = split_commas(a.agents)
    a.plans = split_commas(a.plans)
    a.splits = split_commas(a.splits)
    a.plan_positions = split_commas(a.plan_positions)
    check_settings(a)
    if a.check:
        check(a)
        return
    check_models(a)
    common.check_data(a.env, a.out)
    asyncio.run(evaluate(a))
    write_report(ReportArgs([a.out], a.seed))


if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("judge", "report", "plan"):
        sys.argv.pop(1)
    if command == "judge":
        common.run_stage(judge, JudgeArgs)
    elif command == "report":
        common.run_stage(write_report, ReportArgs)
    elif command == "plan":
        common.run_stage(write_plan, PlanArgs, "text")
    else:
        common.run_stage(main, Args)
