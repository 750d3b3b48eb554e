"""Stage 1 (paper 3.1, appendix C): expert trajectories of the train tasks, and a seed meta plan for each.

    python 01_seed_plans.py --env sciworld --out runs/sciworld --teacher gpt-4o

Writes to --out
    trajectories.jsonl          the expert's trajectory e of each task
    seed_plans.jsonl            (u, p) as conversations: what 02_sft.py trains the planner on (equation 3)
    teacher_plans.jsonl         all that the teacher wrote and a person edited, kept over runs with other tasks
    seed_plans.rejected.jsonl   plans that failed quality control, with the reason; edit a row's "plan" and
                                run this stage again: it is checked like any other and taken in
    agent_sft.jsonl             the trajectories as conversations in the agent's own prompt format: what
                                02_sft.py trains an agent on
"""

import asyncio
import contextlib
import random
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
    teacher: str = arg("gpt-4o", "who abstracts trajectories into plans (paper: gpt-4o): a model of an OpenAI-compatible "
                       "API, a local model to serve, or `rules`, which needs no model")
    teacher_url: Optional[str] = arg(None, "OpenAI-compatible server that already serves the teacher")
    prompts: Optional[str] = arg(None, "prompt folder: one of the environment's, or a path (default: the environment's own)")
    tasks: Optional[str] = arg(None, "JSON file of tasks, [[type, variation], ...] (default: the train split by rule)")
    types: Optional[List[str]] = arg(None, "only tasks of these types")
    limit: Optional[int] = arg(None, "only the first N tasks")
    temperatures: List[float] = arg([0.0, 0.7, 1.0], "a plan that fails quality control is asked for again at the next one")
    max_tokens: int = arg(512, "tokens of a teacher's reply")
    max_plan_steps: int = arg(20, "plans with more steps are too long")
    explored: Optional[str] = arg(None, "explore.jsonl of an agent: with --prompts ENV-wkm the teacher writes task knowledge from the "
                                  "expert's against the agent's trajectory, in place of plans (WKM, Qiao et al. 2024)")
    plan_share: float = arg(0.0, "share of agent_sft.jsonl rows with the seed plan in the prompt (paper: agents are "
                            "trained without)")
    observation_chars: int = arg(0, "cut observations in agent_sft.jsonl at this length, 0: never")
    workers: int = arg(2, "environment worker processes")
    concurrency: int = arg(32, "teacher requests at once")
    tensor_parallel: int = arg(1, "GPUs of one replica of a teacher that is served")
    max_model_len: int = arg(8192, "context of a teacher that is served, tokens")
    seed: int = arg(0, "random seed")


async def expert_trajectories(a: Args) -> list[dict]:
    """e for every task: made by the environment's expert, in the order of the tasks."""
    path = Path(a.out) / "trajectories.jsonl"
    done = common.finished(common.read_rows(path, ("task", "instruction", "steps"), missing_ok=True), "task")
    with common.Appender(path) as append:
        async with common.EnvPool(a.env, a.workers) as pool:
            tasks = await common.list_tasks(pool, a.env, "train", a.tasks, a.types, a.limit)
            todo = [t for t in tasks if (t,) not in done]
            with tqdm(total=len(tasks), initial=len(tasks) - len(todo), desc="expert trajectories") as bar:

                def keep(task, e):
                    row = {"task": task, "solved": e is not None, **(e or {"instruction": "", "steps": [], "reward": 0.0})}
                    append(row)
                    done[(task,)] = row
                    bar.update()

                await pool.each(todo, "expert", keep)
    rows = [done[(t,)] for t in tasks]
    unsolved = [r["task"] for r in rows if not r["solved"]]
    print(f"expert: {len(rows) - len(unsolved)} of {len(rows)} tasks solved" + (", by type:" if len(rows) > 1 else ""))
    for kind in dict.fromkeys(common.task_type(t) for t in tasks):
        ours = [r for r in rows if common.task_type(r["task"]) == kind]
        by = Counter(r.get("by") for r in ours if r["solved"])
        how = f" ({', '.join(f'{k} {n}' for k, n in by.most_common())})" if any(by) else ""
        print(f"  {kind} {by.total()} of {len(ours)}{how}")
    if unsolved:
        print(f"left out, not solved: {', '.join(unsolved[:5])}{' ...' if len(unsolved) > 5 else ''}")
    return [r for r in rows if r["solved"]]


def conversation(steps: list) -> str:
    return "\n".join(f"Action: {action}\nObservation: {observation}" for action, observation in steps)


KNOWLEDGE = {"when", "before", "after", "if", "never", "always", "do"}  # how task knowledge may begin, besides the verbs


def explored_trajectories(a: Args) -> dict[str, str]:
    """{task: the agent's trajectory of lowest reward}, of the tasks that it did not solve."""
    if not a.explored:
        return {}
    if a.teacher == "rules":
        raise InputError("--explored needs a teacher that can compare two trajectories: --teacher with a model")
    rows = common.read_rows(a.explored, ("task", "reward", "success", "steps", "setting"))
    rows = [r for r in rows if r["setting"] == rows[-1]["setting"] and not r["success"] and r["steps"]]  # of the agent as it is now
    rows.sort(key=lambda r: -r["reward"])
    return {r["task"]: "\n".join(f"{reply}\nObservation: {observation}" for reply, observation in r["steps"]) for r in rows}


async def ask_teacher(teacher, prompts, verbs, e: dict, explored: str, a: Args) -> tuple[str | None, str | None]:
    """(plan, None) or (last plan or reply, reason). Appendix C: a plan with too much detail or with
    verbs the environment lacks is asked for again at another temperature; a reply in the wrong format
    is first given back with the request to extract the plan from it."""
    messages = prompts.teacher(e["instruction"], conversation(e["steps"]), explored)
    reason = text = None
    for i, temperature in enumerate(a.temperatures):
        reply = await teacher.ask(messages, temperature, a.max_tokens, common.seed_of(a.seed, e["task"], i))
        text = reply.text
        plan = common.parse_plan(text)
        if plan is None and text.strip():
            extract = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content":
                       "Take the meta plan out of your reply and write it again as numbered steps, \"Step 1: ...\", one a "
                       "line, between <meta_plan> and </meta_plan>. Write nothing else."}]
            text = (await teacher.ask(extract, 0.0, a.max_tokens, a.seed)).text
            plan = common.parse_plan(text)
        reason = common.check_plan(plan, verbs, a.max_plan_steps)
        if reason is None:
            return plan, None
        text = plan or text
    return text, reason


async def seed_plans(a: Args, trajectories: list[dict], explored: dict[str, str], prompts) -> list[dict]:
    """Rows of seed_plans.jsonl for the trajectories whose plan passes quality control, with --explored of those the agent
    failed at; writes the rejected ones. What the teacher said and what a person edited is kept in teacher_plans.jsonl."""
    out, cls = Path(a.out), common.environment(a.env)
    log, rejected_path = out / "teacher_plans.jsonl", out / "seed_plans.rejected.jsonl"
    by_task = {e["task"]: e for e in trajectories if not a.explored or e["task"] in explored}
    verbs = cls.VERBS | (KNOWLEDGE if a.explored else set())
    maker = common.digest(common.model_id(a.teacher, a.teacher_url), prompts.teacher_text, a.max_plan_steps, explored)
    asked = common.digest(a.temperatures, a.max_tokens)  # asked otherwise, what was rejected may pass
    by = f"{Path(a.teacher).name} {maker} {asked}"

    def verdict(task, plan, teacher, reason=None) -> dict:
        return {"task": task, "plan": plan, "teacher": teacher, "reason": reason}

    def ours(teacher: str) -> bool:
        """Whether a plan is of this teacher, or a person's."""
        return teacher == "edited" or maker in teacher.split()[1:]

    history = common.read_rows(log, ("task", "plan", "teacher", "reason"), missing_ok=True)
    written = {(r["task"], r["teacher"]): r["plan"] for r in history}
    # {task: the verdict on its plan}
    found = {r["task"]: r for r in history if ours(r["teacher"]) and (r["reason"] is None or r["teacher"].endswith(asked))}
    edited = []
    for r in common.read_rows(out / "seed_plans.jsonl", ("task", "plan", "teacher"), missing_ok=True):
        if written.get((r["task"], r["teacher"]), r["plan"]) != r["plan"]:
            edited.append(verdict(r["task"], r["plan"], "edited"))
        elif ours(r["teacher"]):
            found.setdefault(r["task"], verdict(r["task"], r["plan"], r["teacher"]))
    for r in common.read_rows(rejected_path, ("task", "plan", "teacher", "reason"), missing_ok=True):
        if r["task"] not in found or found[r["task"]]["reason"]:
            plan = common.parse_plan(f"<meta_plan>\n{r['plan']}\n</meta_plan>")
            if common.check_plan(plan, verbs, a.max_plan_steps) is None:
                edited.append(verdict(r["task"], plan, "edited"))
            elif r["teacher"] == by:
                found[r["task"]] = r
    found |= {r["task"]: r for r in edited}

    if a.teacher == "rules":
        for task, e in by_task.items():
            if found.get(task, {}).get("teacher") != "edited":
                plan = common.number_steps(cls.abstract(e["instruction"], e["steps"]))
                found[task] = verdict(task, plan, by, common.check_plan(plan, verbs, a.max_plan_steps))
    todo = [e for task, e in by_task.items() if task not in found]
    if todo and not prompts.teacher_text:
        raise InputError(f"--prompts {a.prompts} has no teacher.txt, which --teacher {a.teacher} needs")
    with contextlib.ExitStack() as stack:
        if todo or edited:
            append = stack.enter_context(common.Appender(log))
            for r in edited:
                append(r)
        if todo:
            tokens = sum(len(prompts.teacher(e["instruction"], conversation(e["steps"]))[0]["content"]) for e in todo) // 4
            print(f"teacher {a.teacher}: {len(todo)} calls (up to {2 * len(a.temperatures)} each where a plan fails quality control), "
                  f"about {tokens:,} prompt tokens and {150 * len(todo):,} generated tokens for one call each")
            teacher = stack.enter_context(common.open_model(a.teacher, a.teacher_url, a))
            bar = stack.enter_context(tqdm(total=len(todo), desc="seed plans"))

            async def work(e):
                try:
                    plan, reason = await ask_teacher(teacher, prompts, verbs, e, explored.get(e["task"], ""), a)
                except common.ContextOverflow:
                    plan, reason = "", "the trajectory is longer than the teacher's context"
                found[e["task"]] = verdict(e["task"], plan, by, reason)
                append(found[e["task"]])
                bar.update()

            await asyncio.gather(*[work(e) for e in todo])

    kept = [found[task] for task in by_task if found[task]["reason"] is None]
    common.write_rows(rejected_path, [found[task] for task in by_task if found[task]["reason"]])
    print(f"seed plans: {len(kept)} kept, {len(by_task) - len(kept)} rejected"
          + (f" (see {rejected_path}; edit a row's plan and run this stage again)" if len(kept) < len(by_task) else ""))
    return [{"task": r["task"], "plan": r["plan"], "teacher": r["teacher"], "messages": [
        *prompts.planner(by_task[r["task"]]["instruction"]), {"role": "assistant", "content": common.plan_reply(r["plan"])}]} for r in kept]


def agent_conversations(a: Args, trajectories: list[dict], plans: dict[str, str], prompts) -> None:
    """The expert as the agent would have talked; a seeded `plan_share` of the rows has p in the prompt. There
    the expert acts as one who knows p, where the environment tells how ("guided")."""
    rows = []
    for e in trajectories:
        with_plan = e["task"] in plans and random.Random(f"{a.seed} {e['task']}").random() < a.plan_share
        messages = prompts.agent(e["instruction"], plans[e["task"]] if with_plan else None, e["task"])
        for action, observation in e.get("guided", e["steps"]) if with_plan and not a.explored else e["steps"]:
            messages += [{"role": "assistant", "content": f"Action: {action}"},
                         common.observation_message(observation, a.observation_chars)]
        rows.append({"task": e["task"], "with_plan": with_plan, "messages": messages[:-1]})
    common.write_rows(Path(a.out) / "agent_sft.jsonl", rows)


def main(a: Args) -> None:
    common.environment(a.env)
    prompts = common.Prompts(a.env, a.prompts)
    if a.teacher != "rules":
        common.check_model(a.teacher, a.teacher_url)
    explored = explored_trajectories(a)

    common.check_data(a.env, a.out)

    async def stage():
        trajectories = await expert_trajectories(a)
        rows = await seed_plans(a, trajectories, explored, prompts)
        if not rows:
            raise InputError("no seed plan passed quality control: see seed_plans.rejected.jsonl for the reasons")
        agent_conversations(a, trajectories, {r["task"]: r["plan"] for r in rows}, prompts)
        common.write_rows(Path(a.out) / "seed_plans.jsonl", rows)  # last: to make, the stage is done when this file is there

    asyncio.run(stage())


if __name__ == "__main__":
    common.run_stage(main, Args)
