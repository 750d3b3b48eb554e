"""Stage 3 (paper 3.2): sample M meta plans per task, score each by the agent's success, pick pairs.

    python 03_sample_score.py --env NAME --planner runs/NAME/sft --agent MODEL --out runs/NAME

Files in --out
    plans.jsonl      M sampled plans per task: `task`, `m`, `plan` (null: three replies had
                     none), `instruction`, `planner`, `fingerprint`
    rollouts.jsonl   N rollouts per plan (equation 5): `task`, `plan`, `rollout`, `agent`,
                     `fingerprint`, `instruction`, `reward`, `success`, `end`, `steps` ([[reply up to
                     its action, observation], ...]), `format_errors`, `prompt_tokens`,
                     `completion_tokens`, `seconds`
    pairs.jsonl      the best and the worst plan of each task by Q(p) (equations 6 and 7), for
                     04_dpo.py: `task`, `prompt`, `chosen`, `rejected`, `q_chosen`, `q_rejected`
    best_plans.jsonl the best plan of each task, for 02_sft.py (RFT, paper table 3): `task`, `q`,
                     `plan`, `messages`

`fingerprint` is a hash of what made a row (model, prompts, temperature, context length, seed, ...).
Finished rows are kept: run it again to resume after a kill, or with a larger --m or --n.

    python 03_sample_score.py explore --agent runs/NAME/agent --out runs/NAME/eto1 \\
        --experts runs/NAME/trajectories.jsonl

lets a trained agent try the train tasks without a plan, and pairs its failures with the expert's
trajectories (ETO, Song et al. 2024; paper table 2). Files in --out: explore.jsonl (as
rollouts.jsonl), pairs.jsonl for 04_dpo.py, and won.jsonl, the successful conversations, for
02_sft.py (the self-training of KnowAgent, Zhu et al. 2024).

    python 03_sample_score.py filter --agents MODEL MODEL --seed_plans runs/NAME/seed_plans.jsonl \\
        --out runs/NAME

leaves out the seed plans with which one of the agents does worse than without a plan (the consensus
filter of EAGLET, arXiv 2510.05608). Files in --out: filtered_plans.jsonl for 02_sft.py, and
filter.jsonl (as rollouts.jsonl), where an agent's episodes without a plan serve all later plans.
"""

import asyncio
import itertools
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import List, Optional

from tqdm import tqdm

import common
from common import InputError, arg, mean


@dataclass
class EpisodeArgs:
    """What scoring, exploring and filtering have in common."""

    env: str = arg("sciworld", "environment: a folder of data/, or a path")
    out: str = arg("runs/sciworld", "run folder")
    agent_temperature: float = arg(0.7, "temperature of the agent (paper: 0.7)")
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
    types: Optional[List[str]] = arg(None, "only tasks of these types")
    limit: Optional[int] = arg(None, "only the first N tasks")
    workers: int = arg(16, "environment worker processes")
    concurrency: Optional[int] = arg(
        None, "episodes in flight (default: 64 a server, at least 256; 32 with an agent of an API)"
    )
    tensor_parallel: int = arg(1, "GPUs of one replica of a served model")
    max_model_len: int = arg(32768, "context of a served model, tokens, at most its own")
    ray: bool = arg(False, "environment workers on a Ray cluster (RAY_ADDRESS)")
    seed: int = arg(0, "random seed of plans and rollouts")


@dataclass
class AgentArgs(EpisodeArgs):
    agent: str = arg(
        "meta-llama/Llama-3.1-8B-Instruct",
        "the agent that acts (paper 3.2): a local model, or one of an OpenAI-compatible API",
    )
    agent_url: Optional[str] = arg(None, "OpenAI-compatible servers of the agent, with commas")


@dataclass
class Args(AgentArgs):
    planner: str = arg("runs/sciworld/sft", "the SFT meta planner")
    planner_url: Optional[str] = arg(None, "OpenAI-compatible server of the planner")
    m: int = arg(5, "M, plans per task (paper: 5)")
    n: int = arg(5, "N, rollouts per plan (paper: 5)")
    plan_temperature: float = arg(0.7, "temperature of the planner (paper: 0.7)")
    plan_tokens: int = arg(512, "token limit of a plan")
    tasks: List[str] = arg(
        [], "JSON file of tasks, [[type, variation], ...], or train=FILE (default: the train split)"
    )
    pairs: Optional[str] = arg(
        None,
        "write the pairs to this file; with a smaller --m or --n than "
        "were played, without new rollouts (figure 5)",
    )
    min_gap: float = arg(0.0, "leave out pairs whose Q differ by less than this (paper: none)")
    all_pairs: bool = arg(False, "pair any two plans of a task (paper: the best with the worst)")
    adaptive: bool = arg(False, "play only rollouts that can change which plan is best or worst")
    allow_partial: bool = arg(False, "also compare plans with less than N rollouts that worked")


@dataclass
class ExploreArgs(AgentArgs):
    out: str = arg("runs/sciworld/eto1", "folder of this round")
    agent: str = arg("runs/sciworld/agent", "the agent that explores, and will be trained")
    experts: str = arg("runs/sciworld/trajectories.jsonl", "the expert's trajectories of the tasks")
    n: int = arg(1, "rollouts per task (ETO: 1)")


@dataclass
class FilterArgs(EpisodeArgs):
    agents: List[str] = arg(
        [AgentArgs.agent], "the agents: local models, models of an API, or URLs of servers"
    )
    agent_temperature: float = arg(0.0, "temperature of the agents")
    seed_plans: str = arg("runs/sciworld/seed_plans.jsonl", "the plans, of 01_seed_plans.py")
    n: int = arg(1, "rollouts of each agent with a plan, and without")


async def sample_plans(a: Args, tasks: list[str], prompts, pool) -> list[dict]:
    """{p_i | i = 1..M} ~ pi_g(p|u) for every task. A reply without a plan is asked for again with
    another seed; after three attempts the row's plan is None and it is ignored."""
    path, planner_id = (
        Path(a.out) / "plans.jsonl",
        common.model_fingerprint(a.planner, a.planner_url),
    )
    fingerprint = common.fingerprint(
        planner_id, prompts.planner_text, a.plan_temperature, a.plan_tokens, a.seed
    )
    rows = common.read_rows(path, ("task", "m", "plan", "fingerprint"), missing_ok=True)
    done = common.finished((r for r in rows if r["fingerprint"] == fingerprint), "task", "m")
    todo = [(task, m) for task in tasks for m in range(a.m) if (task, m) not in done]
    if todo:
        u = await pool.each(list(dict.fromkeys(t for t, _ in todo)), "reset")
        with (
            common.Appender(path) as append,
            common.open_model(a.planner, a.planner_url, a) as planner,
            tqdm(total=len(todo), desc="sample plans") as bar,
        ):

            async def sample(task, m):
                for attempt in range(3):
                    seed = common.seed_of(a.seed, task, m, attempt)
                    reply = await planner.ask(
                        prompts.planner(u[task]), a.plan_temperature, a.plan_tokens, seed
                    )
                    if plan := common.parse_plan(reply.text):
                        break
                done[task, m] = {
                    "task": task,
                    "m": m,
                    "plan": plan,
                    "instruction": u[task],
                    "planner": planner_id,
                    "fingerprint": fingerprint,
                }
                append(done[task, m])
                bar.update()

            await asyncio.gather(*[sample(*key) for key in todo])
    plans = [done[task, m] for task in tasks for m in range(a.m)]
    if missing := sum(p["plan"] is None for p in plans):
        print(f"{missing} of {len(plans)} plans are missing: three replies in a row had none")
    return plans


async def play(
    a: AgentArgs | SimpleNamespace, keys: list[tuple], prompts, pool, path: Path, choose=None
) -> dict[tuple, list[dict]]:
    """{(task, plan): its N rollouts} (equation 5). With `choose`, rounds of one more rollout for
    each plan in choose({plan: its rewards so far}, N) of a task, until it returns no plan. Jobs of
    one task and plan are adjacent: their prompts share a prefix, which the server caches."""
    agent_id = common.model_fingerprint(a.agent, a.agent_url)
    fingerprint = common.fingerprint(
        agent_id,
        prompts.agent_text,
        prompts.examples,
        a.agent_temperature,
        a.agent_tokens,
        common.STOP,
        a.observation_chars,
        a.max_steps,
        a.max_model_len,
        a.seed,
    )
    fields = ("task", "plan", "rollout", "reward", "fingerprint", "end")
    done = common.finished(
        (
            r
            for r in common.read_rows(path, fields, missing_ok=True)
            if r["fingerprint"] == fingerprint and r["end"] != "crash"
        ),
        "task",
        "plan",
        "rollout",
    )

    def found() -> dict[tuple, list[dict]]:
        return {key: [done[*key, n] for n in range(a.n) if (*key, n) in done] for key in keys}

    def missing() -> list[tuple]:
        """(task, plan, rollout) to play next."""
        if not choose:
            return [(*key, n) for key in keys for n in range(a.n) if (*key, n) not in done]
        rewards: dict[str, dict] = {}
        for (task, plan), rows in found().items():
            rewards.setdefault(task, {})[plan] = [r["reward"] for r in rows]
        return [
            (task, plan, next(n for n in range(a.n) if (task, plan, n) not in done))
            for task, of_plans in rewards.items()
            for plan in choose(of_plans, a.n)
        ]

    retries = 0
    if todo := missing():
        with common.Appender(path) as append, common.open_model(a.agent, a.agent_url, a) as agent:
            c = common.RolloutConfig(
                prompts,
                a.agent_temperature,
                a.agent_tokens,
                a.observation_chars,
                a.seed,
                max_steps=a.max_steps,
            )

            def keep(row):
                append(row)
                done[row["task"], row["plan"], row["rollout"]] = row

            while todo:
                jobs = [
                    {
                        "task": task,
                        "plan": plan,
                        "rollout": n,
                        "agent": agent_id,
                        "fingerprint": fingerprint,
                    }
                    for task, plan, n in todo
                ]
                retries += await common.rollouts(
                    jobs, agent, pool, a.env, c, agent.concurrency, keep
                )
                todo = missing()
    if retries:
        print(f"{retries} episodes were retried because their environment worker died")
    return found()


async def score_plans(a: Args, plans: list[dict], prompts, pool) -> dict[tuple, list[dict]]:
    """{(task, plan): its rollouts}: N, or as many as --adaptive needed. Equal plans of a task are
    scored once."""
    unique = list(dict.fromkeys((p["task"], p["plan"]) for p in plans if p["plan"]))
    scored = await play(
        a, unique, prompts, pool, Path(a.out) / "rollouts.jsonl", undecided if a.adaptive else None
    )
    ends = Counter(r["end"] for rows in scored.values() for r in rows)
    share = ends.total() / max(1, a.n * len(unique))
    print(
        f"rollouts: {ends.total()} of {len(unique)} plans"
        + (f" ({share:.0%} of {a.n} each)" if a.adaptive else "")
        + f", mean reward {mean(r['reward'] for rows in scored.values() for r in rows):.3f}; "
        + "ends: "
        + ", ".join(f"{k} {v}" for k, v in ends.most_common())
    )
    return scored


def undecided(rewards: dict[str, list[float]], n: int) -> list[str]:
    """The plans of a task that get another rollout, of at most `n` each, given the rewards so far:
    those that can still change which plan is best or worst (successive halving on intervals of Q).

    The interval of Q is what the mean of n rollouts can become: future rollouts are taken to be
    like the plan's own and, as a prior worth two rollouts, like those of all plans of the task,
    within one standard deviation. The best plan continues while another's interval overlaps its
    own; any other plan while its interval passes the best one's mean (a plan that can only tie is
    dropped); the same for the worst. Every plan gets one rollout; a task whose plans all earned the
    same twice is a tie."""
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
        # beta-binomial: p itself is uncertain
        spread = (left * p * (1 - p) * (len(r) + 2 + left) / (len(r) + 3)) ** 0.5
        low[plan] = (sum(r) + max(0.0, left * p - spread)) / n
        high[plan] = (sum(r) + min(left, left * p + spread)) / n
    best = max(rewards, key=lambda p: (mean(rewards[p]), len(rewards[p])))
    worst = min(rewards, key=lambda p: (mean(rewards[p]), -len(rewards[p])))
    open_plans = {
        p
        for p in rewards
        if (p != best and high[p] > mean(rewards[best]))
        or (p != worst and low[p] < mean(rewards[worst]))
    }
    if any(high[p] > low[best] for p in rewards if p != best):
        open_plans.add(best)
    if any(low[p] < high[worst] for p in rewards if p != worst):
        open_plans.add(worst)
    return [p for p in rewards if p in open_plans and len(rewards[p]) < n]


def quality(rows: list[dict], n: int, allow_partial: bool = False) -> float | None:
    """Q(p) = 1/N sum r(u, e_i) (equation 6) over the rollouts that did not crash; None if there are
    fewer than `n` and not `allow_partial`: then the plan is not compared."""
    good = [r["reward"] for r in rows if r["end"] != "crash"]
    return mean(good) if good and (allow_partial or len(good) >= n) else None


def ranked_plans(plans: list[dict], q: dict[tuple, float | None]) -> dict[str, list[tuple]]:
    """{task: [(Q(p), row of plans.jsonl), ...]}, highest Q first; of equals the first sampled."""
    out: dict[str, list[tuple]] = {}
    for p in plans:
        if (score := q.get((p["task"], p["plan"]))) is not None:
            out.setdefault(p["task"], []).append((score, p))
    return {task: sorted(rows, key=lambda row: -row[0]) for task, rows in out.items()}


def assistant(plan: str) -> list[dict]:
    return [{"role": "assistant", "content": common.plan_reply(plan)}]


def contrastive_pairs(
    plans: list[dict],
    q: dict[tuple, float | None],
    prompts,
    min_gap: float = 0.0,
    all_pairs: bool = False,
) -> list[dict]:
    """(u, p_w, p_l) for each task: its plans of highest and lowest Q(p), of equals the first
    sampled (equation 7), or any two plans. Pairs of the same Q are skipped, and those that differ
    by less than `min_gap`."""
    pairs = []
    for task, rows in ranked_plans(plans, q).items():
        couples = [(rows[0], min(rows, key=lambda row: row[0]))]
        if all_pairs:
            different = {p["plan"]: (score, p) for score, p in rows}
            couples = itertools.combinations(different.values(), 2)
        pairs += [
            {
                "task": task,
                "prompt": prompts.planner(best["instruction"]),
                "chosen": assistant(best["plan"]),
                "rejected": assistant(worst["plan"]),
                "q_chosen": q_best,
                "q_rejected": q_worst,
            }
            for (q_best, best), (q_worst, worst) in couples
            if q_best > q_worst and q_best - q_worst >= min_gap
        ]
    return pairs


def best_plans(plans: list[dict], q: dict[tuple, float | None], prompts) -> list[dict]:
    """SFT rows with each task's plan of highest Q(p), for rejection sampling (RFT, paper table 3).
    Tasks whose plans all earned nothing are skipped."""
    best = {task: rows[0] for task, rows in ranked_plans(plans, q).items() if rows[0][0]}
    return [
        {
            "task": task,
            "q": score,
            "plan": p["plan"],
            "messages": prompts.planner(p["instruction"]) + assistant(p["plan"]),
        }
        for task, (score, p) in best.items()
    ]


def main(a: Args) -> None:
    if a.m < 2 or a.n < 1:
        raise InputError("--m must be at least 2 (a best and a worst plan) and --n at least 1")
    prompts = common.Prompts(a.env, a.prompts, a.examples)
    common.check_model(a.planner, a.planner_url)
    common.check_model(a.agent, a.agent_url)
    common.check_data(a.env, a.out)

    async def stage():
        async with common.EnvPool(a.env, a.workers, a.concurrency, a.ray) as pool:
            tasks = await common.list_tasks(pool, a.env, "train", a.tasks, a.types, a.limit)
            plans = await sample_plans(a, tasks, prompts, pool)
            return plans, await score_plans(a, plans, prompts, pool)

    plans, scored = asyncio.run(stage())
    q = {
        key: quality(rows, len(rows) if a.adaptive else a.n, a.allow_partial)
        for key, rows in scored.items()
    }
    if partial := sum(any(r["end"] == "crash" for r in rows) for rows in scored.values()):
        print(
            f'{partial} plans have rollouts that failed three times (see "error" in their rows): '
            + (
                "they are compared by the others"
                if a.allow_partial
                else "they are not compared; --allow_partial compares them by the others"
            )
        )
    pairs = contrastive_pairs(plans, q, prompts, a.min_gap, a.all_pairs)
    if not a.pairs:
        if not pairs:
            raise InputError(
                "no task has a better and a worse plan, so DPO has nothing to learn: "
                "use more tasks, a larger --m or --n, or a higher --plan_temperature"
            )
        common.write_rows(Path(a.out) / "best_plans.jsonl", best_plans(plans, q, prompts))
    common.write_rows(a.pairs or Path(a.out) / "pairs.jsonl", pairs)
    gap = mean(p["q_chosen"] - p["q_rejected"] for p in pairs)
    paired, tasks = (len({p["task"] for p in rows}) for rows in (pairs, plans))
    print(f"pairs: {len(pairs)} from {paired} of {tasks} tasks, mean Q gap {gap:.3f}")


# ---- exploration by an agent with training (ETO) -------------------------------------------------


def turns(steps: list, observation_chars: int) -> list[dict]:
    """The conversation after the first message, from the agent's first reply to its last."""
    messages = []
    for reply, observation in steps:
        messages += [
            {"role": "assistant", "content": reply},
            common.observation_message(observation, observation_chars),
        ]
    return messages[:-1]


def trajectory_pairs(
    experts: list[dict], explored: dict[str, list[dict]], prompts, observation_chars: int
) -> list[dict]:
    """(u, e_w, e_l): for each task the expert's trajectory against every explored one of lower
    reward, and the best explored one against the worst if they differ in reward. Crashed and empty
    ones are ignored. A worse trajectory is cut five turns after the length of the better one.
    `experts` may have `thoughts`, one for each step."""
    pairs = []
    for e in experts:
        tried = [r for r in explored.get(e["task"], []) if r["end"] != "crash" and r["steps"]]
        if not tried:
            continue
        said = common.expert_replies(e["steps"], e.get("thoughts"))
        expert = {
            "reward": e["reward"],
            "steps": [[reply, o] for reply, (_, o) in zip(said, e["steps"], strict=True)],
        }
        couples = [(expert, r) for r in tried if e["solved"] and r["reward"] < e["reward"]]
        best, worst = (f(tried, key=lambda r: r["reward"]) for f in (max, min))
        couples += [(best, worst)] if best["reward"] > worst["reward"] else []
        prompt = prompts.agent(e["instruction"] or tried[0]["instruction"], None, e["task"])
        pairs += [
            {
                "task": e["task"],
                "prompt": prompt,
                "chosen": turns(won["steps"], observation_chars),
                "rejected": turns(lost["steps"][: len(won["steps"]) + 5], observation_chars),
                "q_chosen": won["reward"],
                "q_rejected": lost["reward"],
            }
            for won, lost in couples
        ]
    return pairs


def explore(a: ExploreArgs) -> None:
    prompts = common.Prompts(a.env, a.prompts, a.examples)
    common.check_model(a.agent, a.agent_url)
    experts = common.read_rows(a.experts, ("task", "instruction", "steps", "reward", "solved"))
    experts = [e for e in experts if not a.types or common.task_type(e["task"]) in a.types]
    experts = experts[: a.limit]
    thoughts = common.read_rows(
        Path(a.experts).with_name("thoughts.jsonl"), ("task", "thoughts"), missing_ok=True
    )
    thoughts = {r["task"]: r["thoughts"] for r in thoughts}
    experts = [{**e, "thoughts": thoughts.get(e["task"])} for e in experts]
    if not experts:
        raise InputError(f"{a.experts} has no task of these --types")
    common.check_data(a.env, a.out)

    async def stage():
        async with common.EnvPool(a.env, a.workers, a.concurrency, a.ray) as pool:
            keys = [(e["task"], None) for e in experts]
            return await play(a, keys, prompts, pool, Path(a.out) / "explore.jsonl")

    explored = {task: rows for (task, _), rows in asyncio.run(stage()).items()}
    pairs = trajectory_pairs(experts, explored, prompts, a.observation_chars)
    every = [r for rows in explored.values() for r in rows]
    won = [r for r in every if r["success"]]
    common.write_rows(
        Path(a.out) / "won.jsonl",
        [
            {
                "task": r["task"],
                "messages": prompts.agent(r["instruction"], None, r["task"])
                + turns(r["steps"], a.observation_chars),
            }
            for r in won
        ],
    )
    print(
        f"exploration: {len(every)} episodes, mean reward "
        f"{mean(r['reward'] for r in every):.3f}, {len(won)} successful; {len(pairs)} pairs"
    )
    if not pairs:
        raise InputError(
            "the agent did as well as the expert on every task, so it has no failure "
            "to learn from: use more tasks, a larger --n or --agent_temperature"
        )
    common.write_rows(Path(a.out) / "pairs.jsonl", pairs)


# ---- filter of seed plans (EAGLET) ---------------------------------------------------------------


def filter_seed_plans(a: FilterArgs) -> None:
    """Write the seed plans p with Q(p) >= Q(no plan) on their own task for every agent. A plan
    whose rollouts failed is kept. Raises `InputError` if no plan is left."""
    prompts = common.Prompts(a.env, a.prompts, a.examples)
    rows = common.read_rows(a.seed_plans, ("task", "plan", "messages"))
    rows = [r for r in rows if not a.types or common.task_type(r["task"]) in a.types][: a.limit]
    agents = [common.name_and_url(agent) for agent in a.agents]
    for name, url in agents:
        common.check_model(name, url)
    common.check_data(a.env, a.out)

    async def stage():
        keys = list(dict.fromkeys((r["task"], p) for r in rows for p in (None, r["plan"])))
        async with common.EnvPool(a.env, a.workers, a.concurrency, a.ray) as pool:
            return {
                name: await play(
                    SimpleNamespace(**vars(a), agent=name, agent_url=url),
                    keys,
                    prompts,
                    pool,
                    Path(a.out) / "filter.jsonl",
                )
                for name, url in agents
            }

    kept = rows
    for agent, scored in asyncio.run(stage()).items():
        q = {key: quality(rollouts, a.n) for key, rollouts in scored.items()}
        gain = {
            key: q[key] - q[key[0], None]
            for key in q
            if key[1] and None not in (q[key], q[key[0], None])
        }
        kept = [r for r in kept if gain.get((r["task"], r["plan"]), 0) >= 0]
        print(
            f"{agent}: plans add {mean(gain.values()):+.3f} to the reward; "
            f"{sum(x < 0 for x in gain.values())} of {len(gain)} do worse than no plan"
        )
    print(f"seed plans: {len(kept)} of {len(rows)} kept")
    if not kept:
        raise InputError(
            f"{a.seed_plans}: no plan is left: check --types, and that agents that "
            "were trained know plans (01_seed_plans.py --plan_share)"
        )
    common.write_rows(Path(a.out) / "filtered_plans.jsonl", kept)


COMMANDS = {"explore": (explore, ExploreArgs), "filter": (filter_seed_plans, FilterArgs)}

if __name__ == "__main__":
    named = len(sys.argv) > 1 and sys.argv[1] in COMMANDS
    common.run_stage(*(COMMANDS[sys.argv.pop(1)] if named else (main, Args)))
