"""Stage 3 (paper 3.2): sample M meta plans per task, score each by the agent's success, pick the pairs.

    python 03_sample_score.py --env sciworld --planner runs/sciworld/sft --agent meta-llama/Llama-3.1-8B-Instruct \
        --out runs/sciworld

Writes to --out
    plans.jsonl      M sampled plans per task
    rollouts.jsonl   N rollouts per plan, each with its whole conversation (equation 5)
    pairs.jsonl      the best and the worst plan of each task by Q(p) (equations 6 and 7): what 04_dpo.py reads

Every finished plan and rollout is kept: run it again to go on after a kill, or with a larger --m or --n.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional

from tqdm import tqdm

import common
from common import InputError, arg


@dataclass
class Args:
    env: str = arg("sciworld", "environment: " + ", ".join(common.ENVIRONMENTS))
    out: str = arg("runs/sciworld", "run folder")
    planner: str = arg("runs/sciworld/sft", "the SFT meta planner")
    agent: str = arg("meta-llama/Llama-3.1-8B-Instruct",
                     "the agent that tries the plans (paper 3.2), a local model or one of an OpenAI-compatible API")
    planner_url: Optional[str] = arg(None, "OpenAI-compatible server that already serves the planner")
    agent_url: Optional[str] = arg(None, "OpenAI-compatible server that already serves the agent")
    m: int = arg(5, "M, plans per task (paper: 5)")
    n: int = arg(5, "N, rollouts per plan (paper: 5)")
    plan_temperature: float = arg(0.7, "temperature of the planner (paper: 0.7)")
    agent_temperature: float = arg(0.7, "temperature of the agent (paper: 0.7)")
    plan_tokens: int = arg(512, "tokens of a plan at most")
    agent_tokens: int = arg(256, "tokens of an agent's reply at most")
    prompts: Optional[str] = arg(None, "folder of prompt texts in data/ (default: the environment's name)")
    observation_chars: int = arg(0, "cut observations at this length, 0: never")
    max_steps: Optional[int] = arg(None, "steps of an episode at most (default: the environment's; ALFWorld 30, ScienceWorld by task type)")
    tasks: Optional[str] = arg(None, "JSON file of tasks, [[type, variation], ...] (default: the train split by rule)")
    types: Optional[List[str]] = arg(None, "only tasks of these types")
    limit: Optional[int] = arg(None, "only the first N tasks")
    workers: int = arg(16, "environment worker processes")
    concurrency: int = arg(256, "episodes in flight")
    tensor_parallel: int = arg(1, "GPUs of one replica of a served model")
    max_model_len: int = arg(8192, "context of a served model, tokens")
    seed: int = arg(0, "random seed of plans and rollouts")


async def sample_plans(a: Args, tasks: list[str], prompts, pool) -> list[dict]:
    """{p_i | i = 1..M} ~ pi_g(p|u) for every task. A reply without a plan is asked for again with another
    seed; after three tries the row's plan is None and it takes no further part."""
    path, planner_id = Path(a.out) / "plans.jsonl", common.model_id(a.planner, a.planner_url)
    setting = common.digest(planner_id, prompts.planner_text, a.plan_temperature, a.plan_tokens, a.seed)
    rows = [r for r in common.read_rows(path, ("task", "m", "plan", "setting"), missing_ok=True) if r["setting"] == setting]
    done = common.finished(rows, "task", "m")
    todo = [(task, m) for task in tasks for m in range(a.m) if (task, m) not in done]
    if todo:
        u = await common.instructions(pool, list(dict.fromkeys(t for t, _ in todo)))
        with common.Appender(path) as append, \
                common.open_model(a.planner, a.planner_url, a.concurrency, Path(a.out) / "logs", a.tensor_parallel,
                                  a.max_model_len) as planner, tqdm(total=len(todo), desc="sample plans") as bar:

            async def sample(task, m):
                for attempt in range(3):
                    seed = common.seed_of(a.seed, task, m, attempt)
                    try:
                        reply = await planner.ask(prompts.planner(u[task]), a.plan_temperature, a.plan_tokens, seed)
                    except common.ContextOverflow:
                        raise InputError(f"the planner's prompt for {task} is longer than its context "
                                         f"(--max_model_len {a.max_model_len})") from None
                    if plan := common.parse_plan(reply.text):
                        break
                done[task, m] = {"task": task, "m": m, "plan": plan, "instruction": u[task], "planner": planner_id, "setting": setting}
                append(done[task, m])
                bar.update()

            await asyncio.gather(*[sample(*key) for key in todo])
    plans = [done[task, m] for task in tasks for m in range(a.m)]
    if missing := sum(p["plan"] is None for p in plans):
        print(f"{missing} of {len(plans)} replies held no plan, three times over: left out")
    return plans


async def score_plans(a: Args, plans: list[dict], prompts, pool) -> dict[tuple, list[dict]]:
    """{(task, plan): its N rollouts}, equation 5. Equal plans of one task are scored once."""
    path, agent_id = Path(a.out) / "rollouts.jsonl", common.model_id(a.agent, a.agent_url)
    setting = common.digest(agent_id, prompts.agent_text, prompts.examples, a.agent_temperature, a.agent_tokens,
                            a.observation_chars, a.max_steps, a.seed)
    rows = [r for r in common.read_rows(path, ("task", "plan", "rollout", "reward", "setting"), missing_ok=True)
            if r["setting"] == setting]
    done = common.finished(rows, "task", "plan", "rollout")
    unique = list(dict.fromkeys((p["task"], p["plan"]) for p in plans if p["plan"]))
    jobs = [{"task": task, "plan": plan, "rollout": n, "agent": agent_id, "setting": setting}
            for task, plan in unique for n in range(a.n) if (task, plan, n) not in done]
    if jobs:
        with common.Appender(path) as append, common.open_model(
                a.agent, a.agent_url, a.concurrency, Path(a.out) / "logs", a.tensor_parallel, a.max_model_len) as agent:
            c = common.RolloutConfig(prompts, a.agent_temperature, a.agent_tokens, a.observation_chars, a.seed, max_steps=a.max_steps)

            def keep(row):
                append(row)
                done[row["task"], row["plan"], row["rollout"]] = row

            retries = await common.rollouts(jobs, agent, pool, a.env, c, a.concurrency, keep)
            if retries:
                print(f"{retries} episodes were started again because their environment worker ended")
    scored = {key: [done[*key, n] for n in range(a.n)] for key in unique}
    ends = Counter(r["end"] for rs in scored.values() for r in rs)
    print(f"rollouts: {sum(ends.values())} of {len(unique)} plans, mean reward "
          f"{common.mean(r['reward'] for rs in scored.values() for r in rs):.3f}; ends: "
          + ", ".join(f"{k} {v}" for k, v in ends.most_common()))
    return scored


def quality(rows: list[dict]) -> float | None:
    """Q(p) = 1/N sum r(u, e_i) (equation 6); None when a rollout crashed, so that it is not compared."""
    return None if any(r["end"] == "crash" for r in rows) else common.mean(r["reward"] for r in rows)


def contrastive_pairs(plans: list[dict], scores: dict[tuple, float | None], prompts) -> list[dict]:
    """(u, p_w, p_l) for each task: its plans of highest and lowest Q(p); tasks whose plans are all of one
    quality are skipped (equation 7). Among equals the plan sampled first is taken."""
    pairs = []
    for task in dict.fromkeys(p["task"] for p in plans):
        rows = [p for p in plans if p["task"] == task and scores.get((task, p["plan"])) is not None]
        if not rows:
            continue
        best = max(rows, key=lambda p: scores[task, p["plan"]])
        worst = min(rows, key=lambda p: scores[task, p["plan"]])
        q_best, q_worst = scores[task, best["plan"]], scores[task, worst["plan"]]
        if q_best > q_worst:
            reply = {k: [{"role": "assistant", "content": common.plan_reply(p["plan"])}]
                     for k, p in (("chosen", best), ("rejected", worst))}
            pairs.append({"task": task, "prompt": prompts.planner(best["instruction"]), **reply,
                          "q_chosen": q_best, "q_rejected": q_worst})
    return pairs


def main(a: Args) -> None:
    if a.m < 2 or a.n < 1:
        raise InputError("--m must be at least 2 (a best and a worst plan) and --n at least 1")
    prompts = common.Prompts(a.prompts or a.env)
    common.check_model(a.planner, a.planner_url)
    common.check_model(a.agent, a.agent_url)

    async def stage():
        async with common.EnvPool(a.env, a.workers, a.concurrency) as pool:
            tasks = await common.list_tasks(pool, a.env, "train", a.tasks, a.types, a.limit)
            plans = await sample_plans(a, tasks, prompts, pool)
            return plans, await score_plans(a, plans, prompts, pool)

    plans, scored = asyncio.run(stage())
    pairs = contrastive_pairs(plans, {key: quality(rows) for key, rows in scored.items()}, prompts)
    if not pairs:
        raise InputError("no task has a better and a worse plan, so there is nothing for DPO to learn from: use more tasks, "
                         "a larger --m or --n, or a higher --plan_temperature")
    common.write_rows(Path(a.out) / "pairs.jsonl", pairs)
    gap = common.mean(p["q_chosen"] - p["q_rejected"] for p in pairs)
    print(f"pairs: {len(pairs)} of {len({p['task'] for p in plans})} tasks, mean Q gap {gap:.3f}")


if __name__ == "__main__":
    common.run_stage(main, Args)
