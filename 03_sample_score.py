"""Stage 3 (paper 3.2): sample M meta plans per task, score each by the agent's success, pick the pairs.

    python 03_sample_score.py --env sciworld --planner runs/sciworld/sft --agent meta-llama/Llama-3.1-8B-Instruct \
        --out runs/sciworld

Writes to --out
    plans.jsonl      M sampled plans per task
    rollouts.jsonl   N rollouts per plan, each with its whole conversation (equation 5)
    best_plans.jsonl the best plan of each task as rows of SFT, to compare with (RFT, paper table 3)
    pairs.jsonl      the best and the worst plan of each task by Q(p) (equations 6 and 7): what 04_dpo.py reads

    python 03_sample_score.py explore --agent runs/sciworld/agent --experts runs/sciworld/trajectories.jsonl --out runs/sciworld/eto1

lets a trained agent try the train tasks without a plan and pairs what failed with the expert's trajectory (ETO, Song et al.
2024; paper table 2): explore.jsonl and pairs.jsonl in --out, for 04_dpo.py to train the agent on, and won.jsonl, the
conversations that succeeded, for 02_sft.py (the self-training of KnowAgent, Zhu et al. 2024).

Every finished plan and rollout is kept: run it again to go on after a kill, or with a larger --m or --n. With --shard i/n
it works on every n-th task and writes plans.IofN.jsonl, rollouts.IofN.jsonl and pairs.IofN.jsonl, which the next stage
reads together.
"""

import asyncio
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional

from tqdm import tqdm

import common
from common import InputError, arg, mean


@dataclass
class Args:
    env: str = arg("sciworld", "environment: a folder of data/, or a path")
    out: str = arg("runs/sciworld", "run folder")
    planner: str = arg("runs/sciworld/sft", "the SFT meta planner")
    agent: str = arg("meta-llama/Llama-3.1-8B-Instruct",
                     "the agent that tries the plans (paper 3.2), a local model or one of an OpenAI-compatible API")
    planner_url: Optional[str] = arg(None, "OpenAI-compatible server that already serves the planner")
    agent_url: Optional[str] = arg(None, "OpenAI-compatible server that already serves the agent; several with commas between")
    m: int = arg(5, "M, plans per task (paper: 5)")
    n: int = arg(5, "N, rollouts per plan (paper: 5)")
    plan_temperature: float = arg(0.7, "temperature of the planner (paper: 0.7)")
    agent_temperature: float = arg(0.7, "temperature of the agent (paper: 0.7)")
    plan_tokens: int = arg(512, "tokens of a plan at most")
    agent_tokens: int = arg(256, "tokens of an agent's reply at most")
    prompts: Optional[str] = arg(None, "prompt folder: one of the environment's, or a path (default: the environment's own)")
    observation_chars: int = arg(0, "cut observations at this length, 0: never")
    max_steps: Optional[int] = arg(None, "steps of an episode at most (default: the environment's; ALFWorld 30, ScienceWorld by task type)")
    tasks: Optional[str] = arg(None, "JSON file of tasks, [[type, variation], ...] (default: the train split by rule)")
    types: Optional[List[str]] = arg(None, "only tasks of these types")
    limit: Optional[int] = arg(None, "only the first N tasks")
    workers: int = arg(16, "environment worker processes")
    concurrency: int = arg(256, "episodes in flight")
    tensor_parallel: int = arg(1, "GPUs of one replica of a served model")
    max_model_len: int = arg(8192, "context of a served model, tokens; what a shorter one ended is played again")
    window: int = arg(0, "when a conversation passes the agent's context: turns to keep, with the task; 0: the episode ends")
    pairs: Optional[str] = arg(None, "another file for the pairs; with smaller --m and --n than were played: figure 5's, no new rollouts")
    adaptive: bool = arg(False, "spend rollouts only where they can still change which plan is best or worst")
    allow_partial: bool = arg(False, "compare plans that have fewer than N good rollouts, too")
    shard: Optional[str] = arg(None, "i/n: this job's part of the tasks, i from 0 to n - 1")
    ray: bool = arg(False, "environment workers as actors of a Ray cluster (RAY_ADDRESS), not as processes of this machine")
    seed: int = arg(0, "random seed of plans and rollouts")


@dataclass
class ExploreArgs:
    env: str = arg("sciworld", "environment: a folder of data/, or a path")
    out: str = arg("runs/sciworld/eto1", "folder of this round")
    agent: str = arg("runs/sciworld/agent", "the agent that explores, and is to be trained: a local model")
    agent_url: Optional[str] = arg(None, "OpenAI-compatible server that already serves the agent; several with commas between")
    experts: str = arg("runs/sciworld/trajectories.jsonl", "the expert's trajectories of the tasks to explore")
    n: int = arg(1, "rollouts per task (ETO: 1)")
    agent_temperature: float = arg(0.7, "temperature of the agent")
    agent_tokens: int = arg(256, "tokens of an agent's reply at most")
    prompts: Optional[str] = arg(None, "prompt folder: one of the environment's, or a path (default: the environment's own)")
    observation_chars: int = arg(0, "cut observations at this length, 0: never")
    max_steps: Optional[int] = arg(None, "steps of an episode at most (default: the environment's; ALFWorld 30, ScienceWorld by task type)")
    types: Optional[List[str]] = arg(None, "only tasks of these types")
    limit: Optional[int] = arg(None, "only the first N tasks")
    workers: int = arg(16, "environment worker processes")
    concurrency: int = arg(256, "episodes in flight")
    tensor_parallel: int = arg(1, "GPUs of one replica of a served model")
    max_model_len: int = arg(8192, "context of a served model, tokens; what a shorter one ended is played again")
    seed: int = arg(0, "random seed of the rollouts")


async def sample_plans(a: Args, tasks: list[str], prompts, pool) -> list[dict]:
    """{p_i | i = 1..M} ~ pi_g(p|u) for every task. A reply without a plan is asked for again with another
    seed; after three tries the row's plan is None and it takes no further part."""
    path, planner_id = Path(a.out) / "plans.jsonl", common.model_id(a.planner, a.planner_url)
    own = common.shard_path(path, a.shard)
    setting = common.digest(planner_id, prompts.planner_text, a.plan_temperature, a.plan_tokens, a.seed)
    rows = [r for r in common.read_shards(path, ("task", "m", "plan", "setting"), missing_ok=True) if r["setting"] == setting]
    done = common.finished(rows, "task", "m")
    todo = [(task, m) for task in tasks for m in range(a.m) if (task, m) not in done]
    if todo:
        u = await common.instructions(pool, list(dict.fromkeys(t for t, _ in todo)))
        with common.Appender(own) as append, common.open_model(a.planner, a.planner_url, a) as planner, \
                tqdm(total=len(todo), desc="sample plans") as bar:

            async def sample(task, m):
                for attempt in range(3):
                    seed = common.seed_of(a.seed, task, m, attempt)
                    reply = await planner.ask(prompts.planner(u[task]), a.plan_temperature, a.plan_tokens, seed)
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


async def play(a: Args | ExploreArgs, keys: list[tuple], prompts, pool, path: Path, shard: str | None = None, window: int = 0,
               choose=None) -> dict[tuple, list[dict]]:
    """{(task, plan): its rollouts} of these keys, N of them (equation 5). With `choose`, rounds of one more for each plan
    that choose({plan: its rewards so far}, N) names for a task, until it names none. Jobs of one task and plan stand
    together: their prompts share a prefix, which the server's cache and the environment's tables know."""
    agent_id = common.model_id(a.agent, a.agent_url)
    setting = common.digest(agent_id, prompts.agent_text, prompts.examples, a.agent_temperature, a.agent_tokens,
                            a.observation_chars, a.max_steps, window, a.seed)
    rows = common.read_shards(path, ("task", "plan", "rollout", "reward", "setting", "end"), missing_ok=True)
    done = common.finished((r for r in rows if r["setting"] == setting and common.is_whole(r, a.max_model_len)), "task", "plan", "rollout")

    def found() -> dict[tuple, list[dict]]:
        return {key: [done[*key, n] for n in range(a.n) if (*key, n) in done] for key in keys}

    def wanted() -> list[tuple]:
        """(task, plan, rollout) to play next."""
        if not choose:
            return [(*key, n) for key in keys for n in range(a.n) if (*key, n) not in done]
        rewards: dict[str, dict] = {}
        for (task, plan), rows in found().items():
            rewards.setdefault(task, {})[plan] = [r["reward"] for r in rows]
        return [(task, plan, next(n for n in range(a.n) if (task, plan, n) not in done))
                for task, of_plans in rewards.items() for plan in choose(of_plans, a.n)]

    retries = 0
    if todo := wanted():
        with common.Appender(common.shard_path(path, shard)) as append, common.open_model(a.agent, a.agent_url, a) as agent:
            c = common.RolloutConfig(prompts, a.agent_temperature, a.agent_tokens, a.observation_chars, a.seed,
                                     max_steps=a.max_steps, window=window)

            def keep(row):
                append(row)
                done[row["task"], row["plan"], row["rollout"]] = row

            while todo:
                jobs = [{"task": t, "plan": p, "rollout": n, "agent": agent_id, "max_model_len": a.max_model_len, "setting": setting}
                        for t, p, n in todo]
                retries += await common.rollouts(jobs, agent, pool, a.env, c, a.concurrency, keep)
                todo = wanted()
    if retries:
        print(f"{retries} episodes were started again because their environment worker ended")
    return found()


async def score_plans(a: Args, plans: list[dict], prompts, pool) -> dict[tuple, list[dict]]:
    """{(task, plan): its rollouts}, N of them or, with --adaptive, as many as it took. Equal plans of one task are
    scored once."""
    unique = list(dict.fromkeys((p["task"], p["plan"]) for p in plans if p["plan"]))
    found = await play(a, unique, prompts, pool, Path(a.out) / "rollouts.jsonl", a.shard, a.window, undecided if a.adaptive else None)
    ends = Counter(r["end"] for rs in found.values() for r in rs)
    print(f"rollouts: {sum(ends.values())} of {len(unique)} plans"
          + (f" ({sum(ends.values()) / max(1, a.n * len(unique)):.0%} of {a.n} each)" if a.adaptive else "")
          + f", mean reward {mean(r['reward'] for rs in found.values() for r in rs):.3f}; ends: "
          + ", ".join(f"{k} {v}" for k, v in ends.most_common()))
    return found


def undecided(rewards: dict[str, list[float]], n: int) -> list[str]:
    """Which plans of a task to try once more, given the rewards of each so far, at most `n` a plan: those
    that can still change which is best or worst (successive halving on an interval of Q).

    The interval of Q is what the mean of n rollouts can become: the rollouts to come are taken to be like
    those that were, of the plan and, as a prior worth two rollouts, of the task's plans together, within a
    standard deviation. The leader goes on while another's interval reaches into its own, another while its
    interval passes the leader's mean: what can only draw level is left alone. Everybody gets one rollout;
    a task whose plans have all had the same reward twice is given up, it is a tie."""
    if len(rewards) < 2:
        return []
    every = [x for r in rewards.values() for x in r]
    fewest = min(1 if every and min(every) < max(every) else 2, n)
    if any(len(r) < fewest for r in rewards.values()):
        return [plan for plan, r in rewards.items() if len(r) < fewest]
    if min(every) == max(every):
        return []
    pooled, low, high = mean(every), {}, {}
    for plan, r in rewards.items():
        left = n - len(r)
        p = (sum(r) + 2 * pooled) / (len(r) + 2)
        spread = (left * p * (1 - p) * (len(r) + 2 + left) / (len(r) + 3)) ** 0.5  # beta-binomial: p is not known
        low[plan] = (sum(r) + max(0.0, left * p - spread)) / n
        high[plan] = (sum(r) + min(left, left * p + spread)) / n
    best = max(rewards, key=lambda p: (mean(rewards[p]), len(rewards[p])))
    worst = min(rewards, key=lambda p: (mean(rewards[p]), -len(rewards[p])))
    open_plans = {p for p in rewards if (p != best and high[p] > mean(rewards[best])) or (p != worst and low[p] < mean(rewards[worst]))}
    if any(high[p] > low[best] for p in rewards if p != best):
        open_plans.add(best)
    if any(low[p] < high[worst] for p in rewards if p != worst):
        open_plans.add(worst)
    return [p for p in rewards if p in open_plans and len(rewards[p]) < n]


def quality(rows: list[dict], n: int, allow_partial: bool = False) -> float | None:
    """Q(p) = 1/N sum r(u, e_i) (equation 6) over the rollouts that did not crash; None when there are fewer
    than `n` of them and that is not allowed, so that the plan is not compared."""
    good = [r["reward"] for r in rows if r["end"] != "crash"]
    return mean(good) if good and (allow_partial or len(good) >= n) else None


def scored_plans(plans: list[dict], scores: dict[tuple, float | None]) -> dict[str, list[dict]]:
    """{task: its plans that have a Q(p)}"""
    out: dict[str, list[dict]] = {}
    for p in plans:
        if scores.get((p["task"], p["plan"])) is not None:
            out.setdefault(p["task"], []).append(p)
    return out


def contrastive_pairs(plans: list[dict], scores: dict[tuple, float | None], prompts) -> list[dict]:
    """(u, p_w, p_l) for each task: its plans of highest and lowest Q(p); tasks whose plans are all of one
    quality are skipped (equation 7). Among equals the plan sampled first is taken."""
    pairs = []
    for task, rows in scored_plans(plans, scores).items():
        best = max(rows, key=lambda p: scores[task, p["plan"]])
        worst = min(rows, key=lambda p: scores[task, p["plan"]])
        q_best, q_worst = scores[task, best["plan"]], scores[task, worst["plan"]]
        if q_best > q_worst:
            reply = {k: [{"role": "assistant", "content": common.plan_reply(p["plan"])}]
                     for k, p in (("chosen", best), ("rejected", worst))}
            pairs.append({"task": task, "prompt": prompts.planner(best["instruction"]), **reply,
                          "q_chosen": q_best, "q_rejected": q_worst})
    return pairs


def best_plans(plans: list[dict], scores: dict[tuple, float | None], prompts) -> list[dict]:
    """Rows of SFT on each task's plan of highest Q(p), for planners trained by rejection sampling (RFT, paper
    table 3); a task whose plans all earned nothing has no plan to imitate."""
    rows = []
    for task, own in scored_plans(plans, scores).items():
        best = max(own, key=lambda p: scores[task, p["plan"]])
        if scores[task, best["plan"]]:
            rows.append({"task": task, "q": scores[task, best["plan"]], "plan": best["plan"], "messages": [
                *prompts.planner(best["instruction"]), {"role": "assistant", "content": common.plan_reply(best["plan"])}]})
    return rows


def main(a: Args) -> None:
    if a.m < 2 or a.n < 1:
        raise InputError("--m must be at least 2 (a best and a worst plan) and --n at least 1")
    part, parts = common.shard_of(a.shard)
    prompts = common.Prompts(a.env, a.prompts)
    common.check_model(a.planner, a.planner_url)
    common.check_model(a.agent, a.agent_url)
    common.check_data(a.env, a.out)

    async def stage():
        async with common.EnvPool(a.env, a.workers, a.concurrency, a.ray) as pool:
            tasks = (await common.list_tasks(pool, a.env, "train", a.tasks, a.types, a.limit))[part::parts]
            if not tasks:
                raise InputError(f"--shard {a.shard}: there are fewer tasks than shards")
            plans = await sample_plans(a, tasks, prompts, pool)
            return plans, await score_plans(a, plans, prompts, pool)

    plans, scored = asyncio.run(stage())
    q = {key: quality(rows, len(rows) if a.adaptive else a.n, a.allow_partial) for key, rows in scored.items()}
    if partial := sum(any(r["end"] == "crash" for r in rows) for rows in scored.values()):
        print(f'{partial} plans have rollouts that failed three times (see "error" in their rows): '
              + ("they are compared by the others" if a.allow_partial else "they are left out; --allow_partial takes them in"))
    pairs = contrastive_pairs(plans, q, prompts)
    if not pairs and not a.shard and not a.pairs:
        raise InputError("no task has a better and a worse plan, so there is nothing for DPO to learn from: use more tasks, "
                         "a larger --m or --n, or a higher --plan_temperature")
    if not a.pairs:
        common.write_rows(common.shard_path(Path(a.out) / "best_plans.jsonl", a.shard), best_plans(plans, q, prompts))
    common.write_rows(common.shard_path(a.pairs or Path(a.out) / "pairs.jsonl", a.shard), pairs)
    gap = mean(p["q_chosen"] - p["q_rejected"] for p in pairs)
    print(f"pairs: {len(pairs)} of {len({p['task'] for p in plans})} tasks, mean Q gap {gap:.3f}")


# ---- exploration of an agent with training (ETO) -------------------------------------------------


def turns(steps: list, observation_chars: int) -> list[dict]:
    """What follows the first message of a conversation, from the agent's first reply to its last."""
    messages = []
    for reply, observation in steps:
        messages += [{"role": "assistant", "content": reply}, common.observation_message(observation, observation_chars)]
    return messages[:-1]


def trajectory_pairs(experts: list[dict], explored: dict[str, list[dict]], prompts, observation_chars: int) -> list[dict]:
    """(u, e_w, e_l): of each task the expert's trajectory against every explored one of lower reward, and the explored one
    of highest against that of lowest reward where they differ. Crashed and empty ones take no part."""
    pairs = []
    for e in experts:
        tried = [r for r in explored.get(e["task"], []) if r["end"] != "crash" and r["steps"]]
        expert = {"reward": e["reward"], "steps": [[f"Action: {action}", observation] for action, observation in e["steps"]]}
        couples = [(expert, r) for r in tried if e["solved"] and r["reward"] < e["reward"]]
        if tried:
            best, worst = max(tried, key=lambda r: r["reward"]), min(tried, key=lambda r: r["reward"])
            couples += [(best, worst)] if best["reward"] > worst["reward"] else []
        u = e["instruction"] or next((r["instruction"] for r in tried), "")
        pairs += [{"task": e["task"], "prompt": prompts.agent(u, None, e["task"]), "chosen": turns(won["steps"], observation_chars),
                   "rejected": turns(lost["steps"], observation_chars), "q_chosen": won["reward"], "q_rejected": lost["reward"]}
                  for won, lost in couples]
    return pairs


def explore(a: ExploreArgs) -> None:
    prompts = common.Prompts(a.env, a.prompts)
    common.check_model(a.agent, a.agent_url)
    experts = common.read_rows(a.experts, ("task", "instruction", "steps", "reward", "solved"))
    experts = [e for e in experts if not a.types or common.task_type(e["task"]) in a.types][: a.limit]
    if not experts:
        raise InputError(f"{a.experts} has no task of these --types")
    common.check_data(a.env, a.out)

    async def stage():
        async with common.EnvPool(a.env, a.workers, a.concurrency) as pool:
            return await play(a, [(e["task"], None) for e in experts], prompts, pool, Path(a.out) / "explore.jsonl")

    explored = {task: rows for (task, _), rows in asyncio.run(stage()).items()}
    pairs = trajectory_pairs(experts, explored, prompts, a.observation_chars)
    everything = [r for rs in explored.values() for r in rs]
    common.write_rows(Path(a.out) / "won.jsonl", [
        {"task": r["task"], "messages": prompts.agent(r["instruction"], None, r["task"]) + turns(r["steps"], a.observation_chars)}
        for r in everything if r["success"]])
    print(f"exploration: {len(everything)} episodes, mean reward {mean(r['reward'] for r in everything):.3f}, "
          f"{sum(r['success'] for r in everything)} won; {len(pairs)} pairs")
    if not pairs:
        raise InputError("the agent did as well as the expert on every task, so there is no failure to learn from: use more tasks, "
                         "a larger --n or a higher --agent_temperature")
    common.write_rows(Path(a.out) / "pairs.jsonl", pairs)


if __name__ == "__main__":
    exploring = sys.argv[1:2] == ["explore"] and sys.argv.pop(1)
    common.run_stage(*((explore, ExploreArgs) if exploring else (main, Args)))
