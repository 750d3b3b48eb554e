"""Stage 1 (paper 3.1, appendix C): expert trajectories of the train tasks, and their seed plans.

    python 01_seed_plans.py --env NAME --out runs/NAME --teacher gpt-4o
    python 01_seed_plans.py --env NAME --out runs/NAME --expert gpt-4o  # no expert of its own

Files in --out, each with one row a task:

trajectories.jsonl            the expert's trajectory e
    task                      TYPE/VARIATION
    solved                    whether the expert solved the task
    instruction, reward       u and r(u, e)
    steps                     [[action, observation], ...]
    ...                       what else the environment's expert says, such as `by`
    expert, by, thoughts      only with --expert: the model, which of its tries this is, and what it
                              thought before each action

expert_rollouts.jsonl         with --expert MODEL: its episodes, --expert_tries of each task, with
                              the fields of rollouts.jsonl, see 03_sample_score.py

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
import itertools
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
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
    expert: Optional[str] = arg(
        None,
        "where the trajectories come from: a model, which plays the train tasks, or a file with "
        "the fields of trajectories.jsonl (default: the environment's own expert)",
    )
    expert_tries: int = arg(
        4, "episodes of each task by the model in --expert; the shortest successful one is kept"
    )
    expert_tokens: int = arg(512, "token limit of its replies")
    expert_thinking: Optional[str] = common.thinking_arg("it", "that limit")
    max_steps: Optional[int] = arg(None, "step limit of its episodes (default: the environment's)")
    prompts: Optional[str] = arg(
        None, "prompt folder: one of the environment's, or a path (default: the environment's own)"
    )
    tasks: List[str] = arg(
        [],
        "list of tasks: a JSON file, train=FILE, or a folder with train.json (data/README.md; "
        "default: the environment's train split)",
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
    observation_chars: int = arg(
        0,
        "cut observations to this length in agent_sft.jsonl and for the model in --expert, "
        "0: never",
    )
    workers: int = arg(2, "environment worker processes")
    concurrency: int = arg(32, "requests in flight, to the teacher and to the expert")
    tensor_parallel: int = arg(1, "GPUs of one replica of a served model")
    max_model_len: int = arg(32768, "context of a served model, tokens, at most its own")
    seed: int = arg(0, "random seed")
    check: bool = arg(False, "say whether this command can run here, a line each, and stop")


# ---- expert trajectories -------------------------------------------------------------------------


TRAJECTORY_FIELDS = ("task", "instruction", "steps")


async def expert_trajectories(a: Args, prompts) -> list[dict]:
    """The trajectories e of the tasks that the expert solves, in the order of the tasks."""
    async with common.EnvPool(a.env, a.workers, a.concurrency) as pool:
        tasks = await common.list_tasks(pool, a.env, "train", a.tasks, a.types, a.limit)
        if a.expert is None:
            rows = await environments_trajectories(a, tasks, pool)
        else:
            if is_played(a):
                rows = await models_trajectories(a, tasks, prompts, pool)
            else:
                rows = trajectories_in_file(a, tasks)
            common.write_rows(Path(a.out) / "trajectories.jsonl", rows)
    print_solved(rows)
    return [row for row in rows if row["solved"]]


def trajectory_row(task: str, trajectory: dict | None) -> dict:
    """A row of trajectories.jsonl; `trajectory` is None if the expert failed."""
    if trajectory is None:
        trajectory = {"instruction": "", "steps": [], "reward": 0.0}
    return {"task": task, "solved": bool(trajectory["steps"]), **trajectory}


async def environments_trajectories(a: Args, tasks: list[str], pool) -> list[dict]:
    """A row for each task: the trajectory of the environment's own expert. It plays only tasks that
    are not yet in trajectories.jsonl."""
    path = Path(a.out) / "trajectories.jsonl"
    rows = common.read_rows(path, TRAJECTORY_FIELDS, missing_ok=True)
    if any("expert" in row for row in rows):  # a run with --expert made the file
        common.write_rows(path, [row for row in rows if "expert" not in row])
    with common.Appender(path) as append:
        found = {}
        for row in common.read_rows(path, (*TRAJECTORY_FIELDS, "solved", "reward")):
            found[row["task"]] = row
        todo = [task for task in tasks if task not in found]
        done = len(tasks) - len(todo)
        with tqdm(total=len(tasks), initial=done, desc="expert trajectories") as bar:

            def keep(task, trajectory):
                found[task] = trajectory_row(task, trajectory)
                append(found[task])
                bar.update()

            await pool.each(todo, "expert", keep, worked=done)
    return [found[task] for task in tasks if task in found]


def trajectories_in_file(a: Args, tasks: list[str]) -> list[dict]:
    """A row for each task: its trajectory in the file --expert; a task without one is not
    solved."""
    found = {}
    for row in read_trajectories(a.expert):
        given = {"reward": 1.0, "expert": a.expert, **row}
        found[row["task"]] = trajectory_row(row["task"], given)
    nothing = {"expert": a.expert}
    return [found.get(task) or trajectory_row(task, None) | nothing for task in tasks]


def read_trajectories(path: str) -> list[dict]:
    """The rows of a file of trajectories. Raises `InputError` if one is malformed."""
    rows = common.numbered_rows(path, TRAJECTORY_FIELDS)
    for number, row in rows.items():
        thoughts = row.get("thoughts")
        if thoughts is not None and not common.is_list_of_texts(thoughts):
            raise InputError(f"{path}:{number}: the field thoughts must be a list of texts")
        if thoughts and len(thoughts) != len(row["steps"]):
            raise InputError(
                f"{path}:{number}: the field thoughts must have one text for each step"
            )
    return list(rows.values())


# -- a model as the expert: rejection sampling


def try_temperature(number: int) -> float:
    """The temperature of a try, counted from 0: 0, 0.3, 0.6, 0.9, then 1."""
    return min(1.0, round(0.3 * number, 1))


async def models_trajectories(a: Args, tasks: list[str], prompts, pool) -> list[dict]:
    """A row for each task: of the tries of the model --expert, the successful one with the fewest
    steps."""
    expert = common.model_fingerprint(a.expert)
    episodes = await expert_episodes(a, expert, tasks, prompts, pool)
    rows = []
    for task in tasks:
        trajectories = []
        for episode in episodes[task]:
            if episode["success"]:
                trajectories.append(episode_trajectory(episode))
        e = min(trajectories, key=lambda e: len(e["steps"]), default=None)
        rows.append(trajectory_row(task, e) | {"expert": expert})
    return rows


def episode_trajectory(episode: dict) -> dict:
    """A successful episode as a trajectory, with its thoughts if there are any. A reply without an
    action is left out: the environment did not see it."""
    steps = []
    thoughts = []
    for said, observation in episode["steps"]:
        _, action = common.parse_reply(said)
        if action is not None:
            steps.append([action, observation])
            thoughts.append(common.parse_thought(said))
    trajectory = {
        "instruction": episode["instruction"],
        "steps": steps,
        "reward": episode["reward"],
        "by": f"try {episode['rollout'] + 1}",
    }
    if any(thoughts):
        trajectory["thoughts"] = thoughts
    return trajectory


async def expert_episodes(
    a: Args, expert: str, tasks: list[str], prompts, pool
) -> dict[str, list[dict]]:
    """{task: its --expert_tries episodes}. Those in expert_rollouts.jsonl are not played again,
    unless they crashed."""
    path = Path(a.out) / "expert_rollouts.jsonl"
    fingerprints = [try_fingerprint(a, expert, n, prompts) for n in range(a.expert_tries)]
    wanted = list(itertools.product(tasks, range(a.expert_tries)))
    with common.Appender(path) as append:
        found = earlier_tries(path, fingerprints)
        todo = [key for key in wanted if key not in found]
        if todo:
            await play_tries(a, expert, todo, fingerprints, found, prompts, pool, append)
    played = [found[key] for key in wanted if key in found]
    print_tries(a, played, path)
    by_task = {task: [] for task in tasks}
    for row in played:
        by_task[row["task"]].append(row)
    return by_task


def earlier_tries(path: Path, fingerprints: list[str]) -> dict[tuple, dict]:
    """{(task, number of the try): its episode} of those in the file that need not be played
    again."""
    found = {}
    fields = ("task", "rollout", "fingerprint", "end", "success", "steps")
    for row in common.read_rows(path, fields):
        number = row["rollout"]
        is_ours = number < len(fingerprints) and row["fingerprint"] == fingerprints[number]
        if is_ours and row["end"] != "crash":
            found[row["task"], number] = row
    return found


async def play_tries(
    a: Args,
    expert: str,
    todo: list[tuple],
    fingerprints: list[str],
    found: dict[tuple, dict],
    prompts,
    pool,
    append,
) -> None:
    """Play the tries `todo`, [(task, number), ...]. Their episodes are appended, and added to
    `found`."""
    with common.open_model(a.expert, None, a, a.expert_thinking) as model:
        model.answers = len(found)

        def keep(row):
            append(row)
            found[row["task"], row["rollout"]] = row

        for number, fingerprint in enumerate(fingerprints):
            ids = {"plan": None, "rollout": number, "agent": expert, "fingerprint": fingerprint}
            jobs = [{"task": task, **ids} for task, n in todo if n == number]
            if jobs:
                await play_try(a, number, jobs, model, prompts, pool, keep)


async def play_try(a: Args, number: int, jobs: list[dict], model, prompts, pool, keep) -> None:
    """Play one try of each of several tasks."""
    config = common.RolloutConfig(
        prompts,
        try_temperature(number),
        a.expert_tokens,
        a.observation_chars,
        a.seed,
        max_steps=a.max_steps,
    )
    name = f"expert, try {number + 1} of {a.expert_tries}"
    await common.rollouts(jobs, model, pool, a.env, config, model.concurrency, keep, name)


def try_fingerprint(a: Args, expert: str, number: int, prompts) -> str:
    """The fingerprint of all that decides how the expert's episodes go."""
    settings = SimpleNamespace(
        agent_temperature=try_temperature(number),
        agent_tokens=a.expert_tokens,
        agent_thinking=a.expert_thinking,
        observation_chars=a.observation_chars,
        max_steps=a.max_steps,
        max_model_len=a.max_model_len,
        seed=a.seed,
    )
    return common.agent_fingerprint(settings, expert, prompts)


def print_tries(a: Args, episodes: list[dict], path: Path) -> None:
    """Say how many of the expert's episodes are successful, refused, or cut off in thinking."""
    successes = sum(episode["success"] for episode in episodes)
    ends = Counter(episode["end"] for episode in episodes)
    counts = ", ".join(f"{end} {count}" for end, count in ends.most_common())
    print(f"expert {a.expert}: {successes} of {len(episodes)} episodes successful; ends: {counts}")
    common.print_refused("episodes", episodes, path)
    common.print_faults(episodes)
    cut_off = sum(episode.get("thinking_cut_off", 0) for episode in episodes)
    limit = f"--expert_tokens {a.expert_tokens}"
    common.print_cut_off(cut_off, "the expert", limit, "--expert_thinking")


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
    left_out = ""
    if solved.total() < len(rows):
        left_out = f", {len(rows) - solved.total()} left out"
    print(f"expert: {solved.total()} of {len(rows)} tasks solved{left_out}{by_type}")
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
    allowed = with_synonyms(verbs)  # empty: the environment does not say which
    for step in steps:
        if len(step.split()) > MAX_STEP_WORDS:
            return f"too long: a step of more than {MAX_STEP_WORDS} words: {step[:80]!r}"
        instance = INSTANCE.search(step)
        if instance:
            return f"instance detail: {instance[0]!r}"
        first_word = FIRST_WORD.match(step.lower())
        if allowed and (not first_word or first_word[1] not in allowed):
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


def trajectory_text(e: dict) -> str:
    """The expert's trajectory as the teacher reads it."""
    steps = common.expert_steps(e["steps"], e.get("thoughts"))
    return "\n".join(f"{reply}\nObservation: {seen}" for reply, seen in steps)


def with_trajectory(e: dict, parts: list) -> str:
    """The fingerprint of a request about the trajectory e: of `parts` and, if the expert is a model
    or a file and may have another trajectory next time, of e."""
    if "expert" in e:
        parts = [*parts, trajectory_text(e)]
    return common.fingerprint(*parts)


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
    path: Path, fingerprints: dict[str, str], request: str, verbs: set[str], a: Args
) -> dict[str, dict]:
    """{task: checked plan} of the plans that earlier runs asked the same teacher for, from the same
    trajectories; `fingerprints`: those of each task. The plans are
    checked again: the rules of quality control may have changed. A rejected plan is left out if it
    was asked for at other temperatures: it may pass at the new ones."""
    fields = ("task", "plan", "teacher", "reason", "fingerprint", "asked")
    plans = {}
    for row in common.read_rows(path, fields):
        same_teacher = row.pop("fingerprint") == fingerprints.get(row["task"])
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
    fingerprints = {e["task"]: with_trajectory(e, parts) for e in trajectories}
    request = common.fingerprint(a.temperatures, a.max_tokens + thinking.tokens)
    with common.Appender(path) as append:
        plans = earlier_plans(path, fingerprints, request, verbs, a)
        requests = {}
        more = {}
        for e in trajectories:
            task = e["task"]
            if task not in plans:
                text = trajectory_text(e)
                requests[task] = prompts.teacher(e["instruction"], text, explored.get(task, ""))
                more[task] = {"fingerprint": fingerprints[task], "asked": request}
        if requests:
            await ask_for_plans(a, requests, plans, verbs, append, more)
    return plans


async def ask_for_plans(
    a: Args,
    requests: dict[str, list[dict]],
    plans: dict[str, dict],
    verbs: set[str],
    append,
    more: dict[str, dict],
) -> None:
    """Ask the teacher for a plan of each task in `requests`. It is appended, with the fields
    `more` of its task, and added to `plans`."""
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
            keep(row | more[task])
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
        verbs = verbs | KNOWLEDGE if verbs else verbs
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
    first = {}  # of each kind of reason
    for e in trajectories:
        totals[common.task_type(e["task"])] += 1
    for row in rejected:
        losses[common.task_type(row["task"])] += 1
        kind = row["reason"].split(":")[0]
        reasons[kind] += 1
        first.setdefault(kind, row["reason"])
    for kind, lost in losses.items():
        print(f"  {kind}: {totals[kind] - lost} of {totals[kind]} kept")
    for reason, count in reasons.most_common():
        print(f"  rejected {count}: {first[reason]}")
    if NO_STEPS in first.values():
        print("  teacher.txt has to ask for the format: <meta_plan>, Step 1: ..., </meta_plan>")


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
    those that neither the trajectory nor thoughts.jsonl has."""
    trajectories = [e for e in trajectories if "thoughts" not in e]
    if not trajectories:
        return {}
    path = Path(a.out) / "thoughts.jsonl"
    teacher_id = common.model_fingerprint(a.teacher, a.teacher_url)
    parts = [teacher_id, THOUGHTS, a.temperatures]
    if a.thinking is not None:
        parts.append(a.thinking)
    fingerprints = {e["task"]: with_trajectory(e, parts) for e in trajectories}
    with common.Appender(path) as append:
        found = {}
        for row in common.read_rows(path, ("task", "thoughts", "fingerprint")):
            if row["fingerprint"] == fingerprints.get(row["task"]):
                found[row["task"]] = row
        todo = [e for e in trajectories if e["task"] not in found]
        if todo:
            await ask_for_all_thoughts(a, todo, found, append, fingerprints)
    rows = [found[e["task"]] for e in trajectories]
    print_thoughts(rows, path)
    return {row["task"]: row["thoughts"] for row in rows}


async def ask_for_all_thoughts(
    a: Args, todo: list[dict], found: dict[str, dict], append, fingerprints: dict[str, str]
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
            task = e["task"]
            row = {"task": task, "thoughts": None, "fingerprint": fingerprints[task]}
            try:
                row["thoughts"] = await ask_for_thoughts(teacher, e, a)
            except common.RequestRefused as error:
                row["reason"] = common.refusal_reason(error)
            found[task] = row
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
        steps = common.expert_steps(e["steps"], e.get("thoughts") or thoughts.get(task))
        messages = prompts.agent(e["instruction"], plan, task)
        messages += common.turns(steps, a.observation_chars)
        rows.append({"task": task, "with_plan": with_plan, "messages": messages})
    return rows


# ---- the stage -----------------------------------------------------------------------------------


async def write_files(a: Args, explored: dict[str, str], prompts) -> None:
    """Write the files of this stage. seed_plans.jsonl comes last: it is Make's target."""
    trajectories = await expert_trajectories(a, prompts)
    if not trajectories:
        raise InputError("the expert solved no task, so there is nothing to make plans of")
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


def check_expert(a: Args) -> None:
    """Raise `InputError` before any work if there is no expert, or none that can be asked."""
    if a.expert_tries < 1:
        raise InputError("--expert_tries must be at least 1")
    if a.expert is None:
        advice = "or give --expert MODEL, which plays the train tasks (make: EXPERT=MODEL)"
        common.require(a.env, ("expert",), "without --expert this stage", advice)
    elif not is_played(a):
        read_trajectories(a.expert)
    elif not a.check:
        common.check_model(a.expert)


def is_played(a: Args) -> bool:
    """Whether --expert is a model, which plays the tasks, not a file."""
    return a.expert is not None and not a.expert.endswith(".jsonl")


def check(a: Args) -> None:
    """--check: what this stage needs, a line each."""
    checks = common.Checks(a.out)
    checks.environment(a)
    if a.teacher != "rules":
        checks.asks(a.teacher, a.teacher_url, a)
    if is_played(a):
        checks.asks(a.expert, None, a)
    checks.episodes(a, ["train"], a.expert_tries if is_played(a) else 1)
    checks.finish()


def main(a: Args) -> None:
    common.check_thinking(a)
    prompts = common.Prompts(a.env, a.prompts, a.examples)
    check_expert(a)
    if a.teacher == "rules":
        advice = "or choose a model as --teacher"
        common.require(a.env, ("abstract",), "--teacher rules", advice)
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
