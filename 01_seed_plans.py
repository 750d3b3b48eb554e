"""Stage 1 (paper 3.1, appendix C): expert trajectories of the train tasks, and their seed plans.

    python 01_seed_plans.py --env NAME --out runs/NAME --teacher gpt-4o

Files in --out
    trajectories.jsonl          the expert's trajectory e of each task: `task` (TYPE/VARIATION),
                                `solved`, `instruction` (u), `steps` ([[action, observation], ...]),
                                `reward`, and what else the environment's expert says
    seed_plans.jsonl            (u, p) as conversations: what 02_sft.py trains the planner on
                                (equation 3): `task`, `plan`, `teacher`, `messages`
    teacher_plans.jsonl         every plan of the teacher: `task`, `plan`, `reason` (null if it
                                passed), `teacher`, `fingerprint` and `asked` (hashes of what made it);
                                kept whatever tasks a later run has
    seed_plans.rejected.jsonl   plans that failed quality control: `task`, `plan`, `teacher`,
                                `reason`
    edited_plans.jsonl          yours, not written by this stage: `task` and `plan` of plans edited
                                by hand; they replace the teacher's and are checked like them
    thoughts.jsonl              with --thoughts: `task`, `thoughts` (the teacher's, one for each
                                step; null: no reply had that many), `fingerprint`
    agent_sft.jsonl             the trajectories as conversations in the agent's prompt format: what
                                02_sft.py trains an agent on: `task`, `with_plan`, `messages`
"""

import asyncio
import contextlib
import random
import re
from collections import Counter
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
    max_plan_steps: int = arg(20, "step limit of a plan")
    thoughts: bool = arg(
        False,
        "agent_sft.jsonl has a thought before each action, by the teacher: "
        "one more call a trajectory",
    )
    explored: Optional[str] = arg(
        None,
        "explore.jsonl of an agent: with --prompts wkm the teacher "
        "writes task knowledge from the expert's and the agent's "
        "trajectories, not plans (WKM, Qiao et al. 2024)",
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


# ---- expert trajectories -------------------------------------------------------------------------


async def expert_trajectories(a: Args) -> list[dict]:
    """The trajectories e of all tasks that the environment's expert solves, in the tasks' order."""
    path = Path(a.out) / "trajectories.jsonl"
    rows = common.read_rows(path, ("task", "instruction", "steps"), missing_ok=True)
    done = common.finished(rows, "task")
    with common.Appender(path) as append:
        async with common.EnvPool(a.env, a.workers) as pool:
            tasks = await common.list_tasks(pool, a.env, "train", a.tasks, a.types, a.limit)
            todo = [t for t in tasks if (t,) not in done]
            with tqdm(
                total=len(tasks), initial=len(tasks) - len(todo), desc="expert trajectories"
            ) as bar:

                def keep(task, e):
                    e = e or {"instruction": "", "steps": [], "reward": 0.0}
                    done[(task,)] = {"task": task, "solved": bool(e["steps"]), **e}
                    append(done[(task,)])
                    bar.update()

                await pool.each(todo, "expert", keep)
    rows = [done[(t,)] for t in tasks]
    solved = [r for r in rows if r["solved"]]
    print(f"expert: {len(solved)} of {len(rows)} tasks solved" + ", by type:" * (len(rows) > 1))
    for kind, total in Counter(common.task_type(t) for t in tasks).items():
        by = Counter(r.get("by") for r in solved if common.task_type(r["task"]) == kind)
        how = f" ({', '.join(f'{k} {n}' for k, n in by.most_common())})" if any(by) else ""
        print(f"  {kind} {by.total()} of {total}{how}")
    return solved


# ---- seed plans ----------------------------------------------------------------------------------

# a name with an instance number, `cabinet 4`; not a quantity, `wait 10 steps`, `above 50 degrees`
INSTANCE = re.compile(
    r"\b(?!(?:steps?|for|wait|above|below|least|most|than|about|of|to|at|and|or|the)\b)"
    r"[a-z]+ \(?\d+\b(?!\.?\d*\s*(?:degrees|steps|times|°))",
    re.I,
)
SYNONYMS = [
    set(words.split())
    for words in (
        "go navigate walk head travel return proceed visit enter",
        "use apply employ operate utilize",
        "find identify locate search discover determine seek",
        "put place drop position insert",
        "check ensure verify confirm inspect examine observe look read",
        "take pick grab get collect retrieve obtain acquire gather",
        "choose select pick decide",
        "activate toggle turn switch start",
        "wait allow let monitor",
        "heat warm cook",
        "cool chill",
        "clean wash rinse",
        "buy purchase",
        "mix combine stir",
        "focus concentrate",
    )
]
KNOWLEDGE = {"when", "before", "after", "if", "never", "always", "do"}  # first words of WKM's rules


def check_plan(plan: str | None, verbs: set, max_steps: int = 20) -> str | None:
    """Quality control of seed plans (paper appendix C): why the plan is rejected, or None.

    The paper names three faults: too detailed to generalise (instance numbers such as `cabinet 4`,
    too many steps), actions that the environment does not have, and a wrong format. A step starts
    with one of `verbs`, or with a synonym of one."""
    if not plan:
        return "format: no numbered steps between <meta_plan> and </meta_plan>"
    steps = common.plan_steps(plan)
    verbs = verbs.union(*(group for group in SYNONYMS if group & verbs))
    if len(steps) > max_steps:
        return f"too long: {len(steps)} steps, at most {max_steps}"
    for step in steps:
        if len(step.split()) > 40:
            return f"too long: a step of more than 40 words: {step[:80]!r}"
        if found := INSTANCE.search(step):
            return f"instance detail: {found[0]!r}"
        verb = re.match(r"[^a-z]*([a-z]+)", step.lower())
        if not verb or verb[1] not in verbs:
            return f"verb the environment does not have: {step[:60]!r}"
    return None


def conversation(steps: list) -> str:
    return "\n".join(f"Action: {a}\nObservation: {o}" for a, o in steps)


def explored_trajectories(a: Args) -> dict[str, str]:
    """{task: the agent's trajectory of lowest reward}, for the tasks that it did not solve."""
    if not a.explored:
        return {}
    if a.teacher == "rules":
        raise InputError("--explored needs a model as --teacher: it compares two trajectories")
    rows = common.read_rows(a.explored, ("task", "reward", "success", "steps", "fingerprint"))
    rows = [
        r
        for r in rows  # of the agent as it is now
        if r["fingerprint"] == rows[-1]["fingerprint"] and not r["success"] and r["steps"]
    ]
    rows.sort(key=lambda r: -r["reward"])
    return {
        r["task"]: "\n".join(
            f"{reply}\nObservation: {observation}" for reply, observation in r["steps"]
        )
        for r in rows
    }


async def ask_teacher(
    teacher, prompts, check, e: dict, explored: str, a: Args
) -> tuple[str | None, str | None]:
    """(plan, None) or (last plan or reply, reason). Appendix C: a plan with too much detail or with
    verbs the environment lacks is asked for again at another temperature; for a reply in the wrong
    format, the teacher is first asked to extract the plan from it."""
    messages = prompts.teacher(e["instruction"], conversation(e["steps"]), explored)
    reason = text = None
    for i, temperature in enumerate(a.temperatures):
        seed = common.seed_of(a.seed, e["task"], i)
        text = (await teacher.ask(messages, temperature, a.max_tokens, seed)).text
        plan = common.parse_plan(text)
        if plan is None and text.strip():
            extract = [
                *messages,
                {"role": "assistant", "content": text},
                {
                    "role": "user",
                    "content": "Take the meta plan out of your reply and write it again as numbered steps, "
                    '"Step 1: ...", one a line, between <meta_plan> and </meta_plan>. Write nothing '
                    "else.",
                },
            ]
            text = (await teacher.ask(extract, 0.0, a.max_tokens, a.seed)).text
            plan = common.parse_plan(text)
        reason = check(plan)
        if reason is None:
            return plan, None
        text = plan or text
    return text, reason


async def seed_plans(
    a: Args, trajectories: list[dict], explored: dict[str, str], prompts
) -> list[dict]:
    """Rows of seed_plans.jsonl for the trajectories whose plan passes quality control (with
    --explored, of those the agent failed at); writes the rejected plans."""
    out, cls = Path(a.out), common.environment(a.env)
    by_task = {e["task"]: e for e in trajectories if not a.explored or e["task"] in explored}
    verbs = cls.VERBS | (KNOWLEDGE if a.explored else set())
    teacher_id = common.model_fingerprint(a.teacher, a.teacher_url)
    fingerprint = common.fingerprint(teacher_id, prompts.teacher_text, a.max_plan_steps, explored)
    asked = common.fingerprint(a.temperatures, a.max_tokens)

    def check(plan):
        return check_plan(plan, verbs, a.max_plan_steps)

    def verdict(task, plan, teacher, reason) -> dict:
        return {"task": task, "plan": plan, "teacher": teacher, "reason": reason}

    found = {}  # {task: the verdict on its plan}
    for r in common.read_rows(out / "edited_plans.jsonl", ("task", "plan"), missing_ok=True):
        plan = common.parse_plan(f"<meta_plan>\n{r['plan']}\n</meta_plan>")
        found[r["task"]] = verdict(r["task"], plan or r["plan"], "edited", check(plan))
    if a.teacher == "rules":
        for task in by_task.keys() - found:
            e = by_task[task]
            plan = common.number_steps(cls.abstract(e["instruction"], e["steps"]))
            found[task] = verdict(task, plan, "rules", check(plan))
    else:
        fields = ("task", "plan", "teacher", "reason", "fingerprint", "asked")
        rows = common.read_rows(out / "teacher_plans.jsonl", fields, missing_ok=True)
        # a plan that was rejected may pass when it is asked for with other temperatures
        found = {
            r["task"]: r
            for r in rows
            if r["fingerprint"] == fingerprint and (r["reason"] is None or r["asked"] == asked)
        } | found
    if todo := [e for task, e in by_task.items() if task not in found]:
        if not prompts.teacher_text:
            raise InputError(
                f"--prompts {a.prompts} has no teacher.txt, which --teacher {a.teacher} needs"
            )
        texts = [prompts.teacher(e["instruction"], conversation(e["steps"])) for e in todo]
        tokens = sum(len(messages[0]["content"]) for messages in texts) // 4
        print(
            f"teacher {a.teacher}: {len(todo)} calls (up to {2 * len(a.temperatures)} each if "
            f"plans fail quality control), about {tokens:,} prompt tokens and "
            f"{150 * len(todo):,} generated tokens for one call each"
        )
        with (
            common.Appender(out / "teacher_plans.jsonl") as append,
            common.open_model(a.teacher, a.teacher_url, a) as teacher,
            tqdm(total=len(todo), desc="seed plans") as bar,
        ):

            async def work(e):
                try:
                    plan, reason = await ask_teacher(
                        teacher, prompts, check, e, explored.get(e["task"], ""), a
                    )
                except common.ContextOverflow:
                    plan, reason = "", "the trajectory is longer than the teacher's context"
                row = verdict(e["task"], plan, Path(a.teacher).name, reason)
                found[e["task"]] = row | {"fingerprint": fingerprint, "asked": asked}
                append(found[e["task"]])
                bar.update()

            await asyncio.gather(*[work(e) for e in todo])

    kept = [found[task] for task in by_task if found[task]["reason"] is None]
    rejected = [
        verdict(*(found[task][k] for k in ("task", "plan", "teacher", "reason")))
        for task in by_task
        if found[task]["reason"]
    ]
    path = out / "seed_plans.rejected.jsonl"
    common.write_rows(path, rejected)
    print(
        f"seed plans: {len(kept)} kept, {len(rejected)} rejected"
        + (
            f" (see {path}; copy rows into edited_plans.jsonl, edit their plans and run this "
            "stage again)"
            if rejected
            else ""
        )
    )
    types = Counter(map(common.task_type, by_task))
    for kind, n in Counter(common.task_type(r["task"]) for r in rejected).items():
        print(f"  {kind}: {types[kind] - n} of {types[kind]} kept")
    for reason, n in Counter(r["reason"].split(":")[0] for r in rejected).most_common():
        print(f"  rejected {n}: {reason}")
    return [
        {
            "task": r["task"],
            "plan": r["plan"],
            "teacher": r["teacher"],
            "messages": [
                *prompts.planner(by_task[r["task"]]["instruction"]),
                {"role": "assistant", "content": common.plan_reply(r["plan"])},
            ],
        }
        for r in kept
    ]


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


def parse_thoughts(reply: str, count: int) -> list[str] | None:
    """The thoughts of a reply, numbered 1 to `count`, one a line; None if there are not as many."""
    found = re.findall(r"^\s*(\d+)[.):]\s*(?:Thought:\s*)?(\S.*?)\s*$", reply, re.M)
    numbers = [int(number) for number, _ in found]
    return [text for _, text in found] if numbers == list(range(1, count + 1)) else None


async def teacher_thoughts(a: Args, trajectories: list[dict]) -> dict[str, list[str] | None]:
    """{task: a thought for each action of its trajectory}, asked of the teacher at one temperature
    after the other until there are as many; None if there never are."""
    path = Path(a.out) / "thoughts.jsonl"
    fingerprint = common.fingerprint(
        common.model_fingerprint(a.teacher, a.teacher_url), THOUGHTS, a.temperatures
    )
    rows = common.read_rows(path, ("task", "thoughts", "fingerprint"), missing_ok=True)
    found = {r["task"]: r["thoughts"] for r in rows if r["fingerprint"] == fingerprint}
    todo = [e for e in trajectories if e["task"] not in found]
    if todo:
        with (
            common.Appender(path) as append,
            common.open_model(a.teacher, a.teacher_url, a) as teacher,
            tqdm(total=len(todo), desc="thoughts") as bar,
        ):

            async def work(e):
                steps = "\n".join(
                    f"Action {i}: {action}\nObservation: {observation}"
                    for i, (action, observation) in enumerate(e["steps"], 1)
                )
                text = common.fill(
                    THOUGHTS, task=e["instruction"], conversation=steps, count=str(len(e["steps"]))
                )
                thoughts, messages = None, [{"role": "user", "content": text}]
                for i, temperature in enumerate(a.temperatures):
                    seed = common.seed_of(a.seed, e["task"], "thoughts", i)
                    with contextlib.suppress(common.ContextOverflow):
                        reply = await teacher.ask(messages, temperature, 64 * len(e["steps"]), seed)
                        thoughts = parse_thoughts(reply.text, len(e["steps"]))
                    if thoughts:
                        break
                found[e["task"]] = thoughts
                append({"task": e["task"], "thoughts": thoughts, "fingerprint": fingerprint})
                bar.update()

            await asyncio.gather(*[work(e) for e in todo])
    missing = sum(found[e["task"]] is None for e in trajectories)
    print(
        f"thoughts: {len(trajectories) - missing} trajectories have them, {missing} have not: no "
        "reply had as many thoughts as actions"
    )
    return found


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
        draw = random.Random(f"{a.seed} {e['task']}").random()
        with_plan = e["task"] in plans and draw < a.plan_share
        plan = plans[e["task"]] if with_plan else None
        messages = prompts.agent(e["instruction"], plan, e["task"])
        said = common.expert_replies(e["steps"], thoughts.get(e["task"]))
        for reply, (_, observation) in zip(said, e["steps"], strict=True):
            messages += [
                {"role": "assistant", "content": reply},
                common.observation_message(observation, a.observation_chars),
            ]
        rows.append({"task": e["task"], "with_plan": with_plan, "messages": messages[:-1]})
    return rows


def main(a: Args) -> None:
    prompts = common.Prompts(a.env, a.prompts, a.examples)
    if a.teacher != "rules":
        common.check_model(a.teacher, a.teacher_url)
    elif a.thoughts:
        raise InputError("--thoughts needs a model as --teacher")
    explored = explored_trajectories(a)
    common.check_data(a.env, a.out)

    async def stage():
        trajectories = await expert_trajectories(a)
        rows = await seed_plans(a, trajectories, explored, prompts)
        if not rows:
            raise InputError("no seed plan passed quality control: see seed_plans.rejected.jsonl")
        plans = {r["task"]: r["plan"] for r in rows}
        thoughts = await teacher_thoughts(a, trajectories) if a.thoughts else {}
        conversations = agent_conversations(a, trajectories, plans, thoughts, prompts)
        common.write_rows(Path(a.out) / "agent_sft.jsonl", conversations)
        common.write_rows(Path(a.out) / "seed_plans.jsonl", rows)  # last: Make's target

    asyncio.run(stage())


if __name__ == "__main__":
    common.run_stage(main, Args)
