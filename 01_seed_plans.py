"""Stage 1 (paper 3.1, appendix C): expert trajectories of the train tasks, and their seed plans.

    python 01_seed_plans.py --env NAME --out runs/NAME --teacher gpt-4o

Files in --out, each with one row a task:

trajectories.jsonl            the expert's trajectory e
    task                      TYPE/VARIATION
    solved                    whether the expert solved the task
    instruction, reward       u and r(u, e)
    steps                     [[action, observation], ...]
    ...                       what else the environment's expert says, such as `by`

seed_plans.jsonl              the seed plan p, on which 02_sft.py trains the planner (equation 3)
    task, plan, teacher
    messages                  u and p as a conversation

seed_plans.rejected.jsonl     the plan, if it failed quality control
    task, plan, teacher
    reason                    why it failed

teacher_plans.jsonl           every plan of the teacher, also those of earlier runs with other tasks
    task, plan, teacher
    reason                    why the plan failed quality control, null if it passed; earlier plans
                              are checked again in each run. "refused: ..." if the teacher's server
                              refused the request: plan is null
    fingerprint               hash of teacher, prompt, step limit, --explored and --thinking
    asked                     hash of temperatures and token limit

edited_plans.jsonl            plans that you edited by hand; this stage only reads them
    task, plan                replaces the teacher's plan and is checked like it

thoughts.jsonl                with --thoughts: the teacher's thoughts for the expert's actions
    task
    thoughts                  one for each step; null if no reply had that many
    reason                    only if the request was refused: "refused: ..."
    fingerprint               hash of teacher, prompt, temperatures and --thinking

agent_sft.jsonl               the trajectory in the agent's prompt format, for 02_sft.py
    task, messages
    with_plan                 whether the seed plan is in the prompt
"""

import asyncio
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional

from tqdm import tqdm

import common
from common import InputError, arg


@dataclass
class Args:
    env: str = arg("sciworld", "environment: a folder of data/, or a path")
    out: str = arg("runs/sciworld", "run folder")
    teacher: str = arg(
        "gpt-4o",
        "the model that turns trajectories into plans (paper: gpt-4o): "
        "a model of an OpenAI-compatible API, a local model, or `rules`, no model",
    )
    teacher_url: Optional[str] = arg(None, "OpenAI-compatible server of the teacher")
    prompts: Optional[str] = arg(
        None, "prompt folder: one of the environment's, or a path (default: the environment's own)"
    )
    tasks: List[str] = arg(
        [], "JSON file of tasks, [[type, variation], ...], or train=FILE (default: the train split)"
    )
    types: Optional[List[str]] = arg(None, "only tasks of these types")
    limit: Optional[int] = arg(None, "only the first N tasks")
    temperatures: List[float] = arg(
        [0.0, 0.7, 1.0],
        "a plan that fails quality control is asked for again at the next of these temperatures",
    )
    max_tokens: int = arg(512, "token limit of a teacher's reply")
    thinking: Optional[str] = common.thinking_arg("the teacher", "the token limit")
    max_plan_steps: int = arg(20, "step limit of a plan")
    thoughts: bool = arg(
        False,
        "agent_sft.jsonl has a thought before each action, by the teacher: "
        "one more call a trajectory",
    )
    explored: Optional[str] = arg(
        None,
        "explore.jsonl of an agent: with --prompts wkm the teacher writes task knowledge from the "
        "expert's and the agent's trajectories, not plans (WKM, Qiao et al. 2024)",
    )
    plan_share: float = arg(
        0.0,
        "share of agent_sft.jsonl rows with the seed plan in the prompt "
        "(paper: agents are trained without)",
    )
    examples: Optional[str] = arg(
        None,
        "type: a one-shot example of each task's type, also where "
        "the environment has one for all (paper)",
    )
    observation_chars: int = arg(0, "cut observations in agent_sft.jsonl to this length, 0: never")
    workers: int = arg(2, "environment worker processes")
    concurrency: int = arg(32, "teacher requests in flight")
    tensor_parallel: int = arg(1, "GPUs of one replica of a served teacher")
    max_model_len: int = arg(32768, "context of a served teacher, tokens, at most its own")
    seed: int = arg(0, "random seed")
    check: bool = arg(False, "say whether this command can run here, a line each, and stop")


# ---- expert trajectories -------------------------------------------------------------------------


async def expert_trajectories(a: Args) -> list[dict]:
    """The trajectories e of the tasks that the environment's expert solves, in the order of the
    tasks. The expert plays only tasks that are not yet in trajectories.jsonl."""
    path = Path(a.out) / "trajectories.jsonl"
    found = {}
    with common.Appender(path) as append:
        for row in common.read_rows(path, ("task", "solved", "instruction", "reward", "steps")):
            found[row["task"]] = row
        async with common.EnvPool(a.env, a.workers) as pool:
            tasks = await common.list_tasks(pool, a.env, "train", a.tasks, a.types, a.limit)
            todo = [task for task in tasks if task not in found]
            done = len(tasks) - len(todo)
            with tqdm(total=len(tasks), initial=done, desc="expert trajectories") as bar:

                def keep(task, trajectory):
                    found[task] = trajectory_row(task, trajectory)
                    append(found[task])
                    bar.update()

                await pool.each(todo, "expert", keep, worked=done)
    rows = [found[task] for task in tasks if task in found]
    print_solved(rows)
    return [row for row in rows if row["solved"]]


def trajectory_row(task: str, trajectory: dict | None) -> dict:
    """A row of trajectories.jsonl; `trajectory` is None if the expert failed."""
    if trajectory is None:
        trajectory = {"instruction": "", "steps": [], "reward": 0.0}
    return {"task": task, "solved": bool(trajectory["steps"]), **trajectory}


def print_solved(rows: list[dict]) -> None:
    """Say how many tasks of each type the expert solved and, if the environment tells, by what."""
    totals = Counter()
    solved = Counter()
    ways = defaultdict(Counter)  # {task type: {way: number of tasks}}
    for row in rows:
        kind = common.task_type(row["task"])
        totals[kind] += 1
        if row["solved"]:
            solved[kind] += 1
            if "by" in row:
                ways[kind][row["by"]] += 1
    by_type = ", by type:" if len(rows) > 1 else ""
    print(f"expert: {solved.total()} of {len(rows)} tasks solved{by_type}")
    for kind, total in totals.items():
        line = f"  {kind} {solved[kind]} of {total}"
        if ways[kind]:
            counts = [f"{way} {count}" for way, count in ways[kind].most_common()]
            line += f" ({', '.join(counts)})"
        print(line)


# ---- quality control -----------------------------------------------------------------------------

# A name with an instance number, `cabinet 4`; not a quantity, `wait 10 steps`, `above 50 degrees`.
INSTANCE = re.compile(
    r"""
    \b
    (?!(?:steps?|for|wait|above|below|least|most|than|about|of|to|at|and|or|the)\b)
    [a-z]+ [ ] \(? \d+ \b
    (?!\.?\d*\s*(?:degrees|steps|times|°))
    """,
    re.IGNORECASE | re.VERBOSE,
)
FIRST_WORD = re.compile(r"[^a-z]*([a-z]+)")
MAX_STEP_WORDS = 40
SYNONYMS = """
    go navigate walk head travel return proceed visit enter
    use apply employ operate utilize
    find identify locate search discover determine seek
    put place drop position insert
    check ensure verify confirm inspect examine observe look read
    take pick grab get collect retrieve obtain acquire gather
    choose select pick decide
    activate toggle turn switch start
    wait allow let monitor
    heat warm cook
    cool chill
    clean wash rinse
    buy purchase
    mix combine stir
    focus concentrate
"""
KNOWLEDGE = {"when", "before", "after", "if", "never", "always", "do"}  # first words of WKM's rules

# reasons to reject a reply that is no plan
NO_STEPS = "format: no numbered steps between <meta_plan> and </meta_plan>"
TOO_LONG = "the trajectory is longer than the teacher's context"
CUT_OFF = "the reply ended while the teacher was thinking (--max_tokens is too small)"


def with_synonyms(verbs: set[str]) -> set[str]:
    """The verbs, and all words of the lines of SYNONYMS that one of them is in."""
    allowed = set(verbs)
    for line in SYNONYMS.splitlines():
        group = set(line.split())
        if group & verbs:
            allowed |= group
    return allowed


def check_plan(plan: str | None, verbs: set[str], max_steps: int = 20) -> str | None:
    """Quality control of seed plans (paper appendix C): why the plan is rejected, or None.

    The paper names three faults. The plan is too detailed to generalise: it has instance numbers
    such as `cabinet 4`, or too many steps. It has actions that the environment does not have: each
    step must start with one of `verbs` or with a synonym of one. Or its format is wrong."""
    if not plan:
        return NO_STEPS
    steps = common.plan_steps(plan)
    if len(steps) > max_steps:
        return f"too long: {len(steps)} steps, at most {max_steps}"
    allowed = with_synonyms(verbs)
    for step in steps:
        if len(step.split()) > MAX_STEP_WORDS:
            return f"too long: a step of more than {MAX_STEP_WORDS} words: {step[:80]!r}"
        instance = INSTANCE.search(step)
        if instance:
            return f"instance detail: {instance[0]!r}"
        first_word = FIRST_WORD.match(step.lower())
        if not first_word or first_word[1] not in allowed:
            return f"verb the environment does not have: {step[:60]!r}"
    return None


def checked_plan(task: str, plan: str | None, teacher: str, verbs: set[str], a: Args) -> dict:
    """A plan with the `reason` why quality control rejects it, None if it passes."""
    reason = check_plan(plan, verbs, a.max_plan_steps)
    return {"task": task, "plan": plan, "teacher": teacher, "reason": reason}


# ---- seed plans ----------------------------------------------------------------------------------

EXTRACT = (
    "Take the meta plan out of your reply and write it again as numbered steps, "
    '"Step 1: ...", one a line, between <meta_plan> and </meta_plan>. Write nothing else.'
)


def trajectory_text(steps: list) -> str:
    """The expert's trajectory as the teacher reads it."""
    return "\n".join(f"Action: {action}\nObservation: {seen}" for action, seen in steps)


def explored_trajectories(a: Args) -> dict[str, str]:
    """{task: the agent's failed trajectory of lowest reward}, for each task that it failed at
    least once.

    The agent may have been trained again since --explored was begun: then the file has rows of the
    earlier agent, too. The last row is of the newest agent, and only its rows count."""
    if not a.explored:
        return {}
    rows = common.read_rows(a.explored, ("task", "reward", "success", "steps", "fingerprint"))
    lowest = {}
    for row in rows:
        newest = row["fingerprint"] == rows[-1]["fingerprint"]
        if not newest or row["success"] or not row["steps"]:
            continue
        task = row["task"]
        if task not in lowest or row["reward"] <= lowest[task]["reward"]:
            lowest[task] = row
    texts = {}
    for task, row in lowest.items():
        lines = [f"{reply}\nObservation: {observation}" for reply, observation in row["steps"]]
        texts[task] = "\n".join(lines)
    return texts


def edited_plans(a: Args, verbs: set[str]) -> dict[str, dict]:
    """{task: checked plan} of the plans that a user edited by hand."""
    path = Path(a.out) / "edited_plans.jsonl"
    if not path.exists():
        return {}
    checked = {}
    for line, row in common.numbered_rows(path, ("task", "plan"), appended=False).items():
        task = row["task"]
        if row["plan"] is None:
            raise InputError(f"{path}:{line}: the plan is null: write one, or delete the line")
        plan = common.parse_plan(common.plan_reply(row["plan"]))
        checked[task] = checked_plan(task, plan, "edited", verbs, a)
        if plan is None:
            checked[task]["plan"] = row["plan"]  # rejected, but the user sees it
    return checked


def rule_plans(a: Args, trajectories: list[dict], verbs: set[str]) -> dict[str, dict]:
    """{task: checked plan} of the plans that the environment's rules make of trajectories."""
    abstract = common.environment(a.env).abstract
    checked = {}
    for e in trajectories:
        plan = common.number_steps(abstract(e["instruction"], e["steps"]))
        checked[e["task"]] = checked_plan(e["task"], plan, "rules", verbs, a)
    return checked


def earlier_plans(
    path: Path, fingerprint: str, request: str, verbs: set[str], a: Args
) -> dict[str, dict]:
    """{task: checked plan} of the plans that earlier runs asked the same teacher for. They are
    checked again: the rules of quality control may have changed. A rejected plan is left out if it
    was asked for at other temperatures: it may pass at the new ones."""
    fields = ("task", "plan", "teacher", "reason", "fingerprint", "asked")
    plans = {}
    for row in common.read_rows(path, fields):
        same_teacher = row.pop("fingerprint") == fingerprint
        same_request = row.pop("asked") == request
        no_plan = row["reason"] in (NO_STEPS, TOO_LONG, CUT_OFF) or common.is_refused(row)
        if not no_plan:
            row["reason"] = check_plan(row["plan"], verbs, a.max_plan_steps)
        if same_teacher and (same_request or row["reason"] is None):
            plans[row["task"]] = row
    return plans


async def extraction(teacher, messages: list[dict], text: str, a: Args) -> str:
    """The teacher's reply when it is asked to take the plan out of its reply `text`; `text` if that
    request is longer than its context, or refused."""
    said = {"role": "assistant", "content": text}
    request = {"role": "user", "content": EXTRACT}
    try:
        reply = await teacher.ask([*messages, said, request], 0.0, a.max_tokens, a.seed)
    except (common.ContextOverflow, common.RequestRefused):
        return text
    return reply.text


async def ask_teacher(
    teacher, messages: list[dict], task: str, verbs: set[str], a: Args
) -> tuple[str | None, str | None]:
    """(plan, None), or (last plan or reply, why quality control rejects it), or (None, why the
    request was refused).

    Appendix C: a rejected plan is asked for again at another temperature. If a reply has the wrong
    format, the teacher is first asked to extract the plan from it."""
    for attempt, temperature in enumerate(a.temperatures):
        seed = common.seed_of(a.seed, task, attempt)
        try:
            reply = await teacher.ask(messages, temperature, a.max_tokens, seed)
        except common.ContextOverflow:
            return "", TOO_LONG
        except common.RequestRefused as e:
            return None, common.refusal_reason(e)
        text = reply.text
        plan = common.parse_plan(text)
        if plan is None and text.strip():
            text = await extraction(teacher, messages, text, a)
            plan = common.parse_plan(text)
        reason = check_plan(plan, verbs, a.max_plan_steps)
        if reason is None:
            break
        if plan is None and reply.cut_off:
            reason = CUT_OFF
    return plan or text, reason


CHARACTERS_PER_TOKEN = 4  # about, in English
TOKENS_OF_A_PLAN = 150  # about


def print_cost(a: Args, requests: dict[str, list[dict]]) -> None:
    """Say what the teacher's work costs, before it starts."""
    characters = sum(len(messages[0]["content"]) for messages in requests.values())
    calls = len(requests)
    most = 2 * len(a.temperatures)  # a plan and its extraction at each temperature
    print(
        f"teacher {a.teacher}: {calls} calls (up to {most} each if plans fail quality control), "
        f"about {characters // CHARACTERS_PER_TOKEN:,} prompt tokens and "
        f"{TOKENS_OF_A_PLAN * calls:,} generated tokens for one call each"
    )


async def teacher_plans(
    a: Args, trajectories: list[dict], explored: dict[str, str], prompts, verbs: set[str]
) -> dict[str, dict]:
    """{task: checked plan} of the plans that the teacher makes of trajectories. It is asked only
    for those that teacher_plans.jsonl does not have."""
    path = Path(a.out) / "teacher_plans.jsonl"
    teacher_id = common.model_fingerprint(a.teacher, a.teacher_url)
    thinking = common.parse_thinking(a.thinking)
    parts = [teacher_id, prompts.teacher_text, a.max_plan_steps, explored]
    if thinking.effort is not None:
        parts.append(thinking.effort)
    fingerprint = common.fingerprint(*parts)
    request = common.fingerprint(a.temperatures, a.max_tokens + thinking.tokens)
    with common.Appender(path) as append:
        plans = earlier_plans(path, fingerprint, request, verbs, a)
        requests = {}
        for e in trajectories:
            task = e["task"]
            if task not in plans:
                text = trajectory_text(e["steps"])
                requests[task] = prompts.teacher(e["instruction"], text, explored.get(task, ""))
        if requests:
            more = {"fingerprint": fingerprint, "asked": request}
            await ask_for_plans(a, requests, plans, verbs, append, more)
    return plans


async def ask_for_plans(
    a: Args, requests: dict[str, list[dict]], plans: dict[str, dict], verbs: set[str], append, more
) -> None:
    """Ask the teacher for a plan of each task in `requests`. It is appended, with the fields
    `more`, and added to `plans`."""
    print_cost(a, requests)
    name, _ = common.name_and_url(a.teacher)
    with (
        common.open_model(a.teacher, a.teacher_url, a, a.thinking) as teacher,
        tqdm(total=len(requests), desc="seed plans") as bar,
    ):
        teacher.answers = len(plans)
        keep = common.Refusals(append, teacher, requests)

        async def work(task):
            plan, reason = await ask_teacher(teacher, requests[task], task, verbs, a)
            row = {"task": task, "plan": plan, "teacher": Path(name).name, "reason": reason}
            plans[task] = row
            keep(row | more)
            bar.update()

        await asyncio.gather(*[work(task) for task in requests])
        keep.finish()
    common.print_cut_off(
        teacher.cut_off_replies, "the teacher", f"--max_tokens {a.max_tokens}", "--thinking"
    )


async def seed_plans(
    a: Args, trajectories: list[dict], explored: dict[str, str], prompts
) -> list[dict]:
    """Rows of seed_plans.jsonl: the plans that pass quality control. Writes the rejected plans.
    With --explored, only tasks that the agent failed at least once get a plan."""
    verbs = common.environment(a.env).VERBS
    if a.explored:
        verbs = verbs | KNOWLEDGE
        trajectories = [e for e in trajectories if e["task"] in explored]
    edited = edited_plans(a, verbs)
    others = [e for e in trajectories if e["task"] not in edited]
    if a.teacher == "rules":
        plans = rule_plans(a, others, verbs)
    else:
        plans = await teacher_plans(a, others, explored, prompts, verbs)
    plans |= edited

    kept = []
    rejected = []
    for e in trajectories:
        row = plans[e["task"]]
        if row["reason"] is None:
            kept.append(seed_plan_row(e["instruction"], row, prompts))
        else:
            rejected.append(row)
    path = Path(a.out) / "seed_plans.rejected.jsonl"
    common.write_rows(path, rejected)
    print_quality_control(trajectories, rejected, path)
    checked = [plans[e["task"]] for e in trajectories]
    common.print_refused("plans", checked, path.with_name("teacher_plans.jsonl"))
    return kept


def seed_plan_row(u: str, checked: dict, prompts) -> dict:
    """(u, p) as the conversation that the planner is trained on (equation 3)."""
    return {
        "task": checked["task"],
        "plan": checked["plan"],
        "teacher": checked["teacher"],
        "messages": prompts.planner(u) + common.plan_messages(checked["plan"]),
    }


def print_quality_control(trajectories: list[dict], rejected: list[dict], path: Path) -> None:
    """Say how many plans were kept and rejected, then by task type, then the reasons."""
    line = f"seed plans: {len(trajectories) - len(rejected)} kept, {len(rejected)} rejected"
    if rejected:
        line += (
            f" (see {path}; copy rows into edited_plans.jsonl, edit their plans and run this "
            "stage again)"
        )
    print(line)
    totals = Counter()
    losses = Counter()
    reasons = Counter()
    for e in trajectories:
        totals[common.task_type(e["task"])] += 1
    for row in rejected:
        losses[common.task_type(row["task"])] += 1
        reasons[row["reason"].split(":")[0]] += 1
    for kind, lost in losses.items():
        print(f"  {kind}: {totals[kind] - lost} of {totals[kind]} kept")
    for reason, count in reasons.most_common():
        print(f"  rejected {count}: {reason}")


# ---- what an agent learns from -------------------------------------------------------------------

THOUGHTS = """An expert solved this task:
<task>
{task}
</task>

These are the expert's actions, with numbers, and what each led to:
<conversation>
{conversation}
</conversation>

Write what the expert thinks just before each action: one sentence that says why this action comes \
now, from the task and from what was seen so far, never from what is seen only later. Write \
{count} lines, one for each action, with its number: "1. ...". Write nothing else."""
TOKENS_OF_A_THOUGHT = 64  # limit, for one sentence


def parse_thoughts(reply: str, count: int) -> list[str] | None:
    """The thoughts of a reply, numbered 1 to `count`, one a line; None if there are not as many."""
    line = r"^\s*(\d+)[.):]\s*(?:Thought:\s*)?(\S.*?)\s*$"
    thoughts = []
    for number, thought in re.findall(line, reply, re.MULTILINE):
        thoughts.append(thought)
        if int(number) != len(thoughts):
            return None
    return thoughts if len(thoughts) == count else None


async def ask_for_thoughts(teacher, e: dict, a: Args) -> list[str] | None:
    """A thought for each action of the trajectory e. Asks at each temperature until a reply has one
    thought per action; None if none does."""
    count = len(e["steps"])
    lines = []
    for number, (action, observation) in enumerate(e["steps"], 1):
        lines.append(f"Action {number}: {action}\nObservation: {observation}")
    text = common.fill(
        THOUGHTS, task=e["instruction"], conversation="\n".join(lines), count=str(count)
    )
    for attempt, temperature in enumerate(a.temperatures):
        seed = common.seed_of(a.seed, e["task"], "thoughts", attempt)
        messages = [{"role": "user", "content": text}]
        try:
            reply = await teacher.ask(messages, temperature, TOKENS_OF_A_THOUGHT * count, seed)
        except common.ContextOverflow:
            return None
        thoughts = parse_thoughts(reply.text, count)
        if thoughts:
            return thoughts
    return None


async def teacher_thoughts(a: Args, trajectories: list[dict]) -> dict[str, list[str] | None]:
    """{task: a thought for each action of its trajectory, or None}. The teacher is asked only for
    those that thoughts.jsonl does not have."""
    path = Path(a.out) / "thoughts.jsonl"
    teacher_id = common.model_fingerprint(a.teacher, a.teacher_url)
    parts = [teacher_id, THOUGHTS, a.temperatures]
    if a.thinking is not None:
        parts.append(a.thinking)
    fingerprint = common.fingerprint(*parts)
    with common.Appender(path) as append:
        found = {}
        for row in common.read_rows(path, ("task", "thoughts", "fingerprint")):
            if row["fingerprint"] == fingerprint:
                found[row["task"]] = row
        todo = [e for e in trajectories if e["task"] not in found]
        if todo:
            await ask_for_all_thoughts(a, todo, found, append, fingerprint)
    rows = [found[e["task"]] for e in trajectories]
    print_thoughts(rows, path)
    return {row["task"]: row["thoughts"] for row in rows}


async def ask_for_all_thoughts(
    a: Args, todo: list[dict], found: dict[str, dict], append, fingerprint: str
) -> None:
    """Ask the teacher for the thoughts of the trajectories `todo`. Their rows are appended, and
    added to `found`."""
    with (
        common.open_model(a.teacher, a.teacher_url, a, a.thinking) as teacher,
        tqdm(total=len(todo), desc="thoughts") as bar,
    ):
        teacher.answers = len(found)
        keep = common.Refusals(append, teacher, [e["task"] for e in todo])

        async def work(e):
            row = {"task": e["task"], "thoughts": None, "fingerprint": fingerprint}
            try:
                row["thoughts"] = await ask_for_thoughts(teacher, e, a)
            except common.RequestRefused as error:
                row["reason"] = common.refusal_reason(error)
            found[e["task"]] = row
            keep(row)
            bar.update()

        await asyncio.gather(*[work(e) for e in todo])
        keep.finish()
    limit = f"the limit of {TOKENS_OF_A_THOUGHT} tokens a thought"
    common.print_cut_off(teacher.cut_off_replies, "the teacher", limit, "--thinking")


def print_thoughts(rows: list[dict], path: Path) -> None:
    """Say how many of the rows of thoughts.jsonl have thoughts, and how many were refused."""
    missing = [row for row in rows if row["thoughts"] is None and not common.is_refused(row)]
    have = [row for row in rows if row["thoughts"] is not None]
    print(
        f"thoughts: {len(have)} trajectories have them, {len(missing)} have "
        "not: no reply had as many thoughts as actions"
    )
    common.print_refused("requests for thoughts", rows, path)


def agent_conversations(
    a: Args,
    trajectories: list[dict],
    plans: dict[str, str],
    thoughts: dict[str, list[str] | None],
    prompts,
) -> list[dict]:
    """Rows of agent_sft.jsonl: the expert's trajectories as the agent's conversations. A seeded
    share of `plan_share` has p in the prompt."""
    rows = []
    for e in trajectories:
        task = e["task"]
        draw = random.Random(f"{a.seed} {task}").random()
        with_plan = task in plans and draw < a.plan_share
        plan = plans[task] if with_plan else None
        steps = common.expert_steps(e["steps"], thoughts.get(task))
        messages = prompts.agent(e["instruction"], plan, task)
        messages += common.turns(steps, a.observation_chars)
        rows.append({"task": task, "with_plan": with_plan, "messages": messages})
    return rows


# ---- the stage -----------------------------------------------------------------------------------


async def write_files(a: Args, explored: dict[str, str], prompts) -> None:
    """Write the files of this stage. seed_plans.jsonl comes last: it is Make's target."""
    trajectories = await expert_trajectories(a)
    rows = await seed_plans(a, trajectories, explored, prompts)
    if not rows:
        raise InputError("no seed plan passed quality control: see seed_plans.rejected.jsonl")
    plans = {row["task"]: row["plan"] for row in rows}
    thoughts = await teacher_thoughts(a, trajectories) if a.thoughts else {}
    conversations = agent_conversations(a, trajectories, plans, thoughts, prompts)
    common.write_rows(Path(a.out) / "agent_sft.jsonl", conversations)
    common.write_rows(Path(a.out) / "seed_plans.jsonl", rows)


def check_teacher_prompt(a: Args, prompts) -> None:
    """Raise `InputError` if there is no prompt for the teacher, or none for --explored."""
    prompt = f"--env {a.env}"
    if a.prompts:
        prompt += f" --prompts {a.prompts}"
    if not prompts.teacher_text:
        raise InputError(f"{prompt} has no teacher.txt, which --teacher {a.teacher} needs")
    if a.explored and "{explored}" not in prompts.teacher_text:
        raise InputError(
            f"{prompt}: teacher.txt has no {{explored}}, which --explored needs: use --prompts wkm"
        )


def check(a: Args) -> None:
    """--check: what this stage needs, a line each."""
    checks = common.Checks(a.out)
    checks.environment(a)
    if a.teacher != "rules":
        checks.asks(a.teacher, a.teacher_url, a)
    checks.episodes(a, ["train"], 1)
    checks.finish()


def main(a: Args) -> None:
    common.check_thinking(a)
    prompts = common.Prompts(a.env, a.prompts, a.examples)
    if a.teacher == "rules" and a.thoughts:
        raise InputError("--thoughts needs a model as --teacher")
    if a.teacher == "rules" and a.explored:
        raise InputError("--explored needs a model as --teacher: it compares two trajectories")
    if a.teacher != "rules":
        check_teacher_prompt(a, prompts)
    if a.check:
        check(a)
        return
    if a.teacher != "rules":
        common.check_model(a.teacher, a.teacher_url)
    explored = explored_trajectories(a)
    common.check_data(a.env, a.out)
    asyncio.run(write_files(a, explored, prompts))


if __name__ == "__main__":
    common.run_stage(main, Args)
