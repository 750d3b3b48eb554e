"""Stage 3 (paper 3.2): sample M meta plans per task, score each by the agent's success, pick pairs.

    python 03_sample_score.py --env NAME --planner runs/NAME/sft --agent MODEL --out runs/NAME

Files in --out:

plans.jsonl                   M sampled plans of each task
    task, m                   TYPE/VARIATION, and the number of the plan from 0 to M - 1
    plan                      null if none of three replies had a plan, or if the request was
                              refused: then there is a `reason`, "refused: ..."
    thinking_cut_off          replies that ended while the planner was thinking
    instruction               u
    planner                   the model that was asked
    fingerprint               hash of model, prompt, temperature, token limit, thinking and seed

rollouts.jsonl                N rollouts of each plan (equation 5)
    task, plan, rollout       the rollout's number from 0 to N - 1
    agent                     the model that played
    fingerprint               hash of model, prompts, temperature, thinking, seed, ...
    instruction, reward       u and r(u, e)
    success, end              whether the task was solved, and why the episode ended; "crash" and
                              "refused" have an `error` and do not count in a plan's score
    steps                     [[reply up to its action, observation], ...]
    format_errors             replies without an action
    thinking_cut_off          replies that ended while the agent was thinking
    prompt_tokens, completion_tokens, seconds   tokens: null if the server does not count

pairs.jsonl                   for 04_dpo.py: the best and the worst plan of each task (equation 7)
    task, prompt              u as the messages that the planner is asked with
    chosen, rejected          the two plans as the planner's replies
    q_chosen, q_rejected      their Q(p) (equation 6)

best_plans.jsonl              for 02_sft.py: the best plan of each task (RFT, paper table 3)
    task, q, plan, messages

Finished rows are kept: run it again to resume after a kill, or with a larger --m or --n.

    python 03_sample_score.py explore --agent runs/NAME/agent --out runs/NAME/eto1 \\
        --experts runs/NAME/trajectories.jsonl

lets a fine-tuned agent try the train tasks without a plan, and pairs its failures with the expert's
trajectories (ETO, Song et al. 2024; paper table 2). Files in --out:

explore.jsonl                 the agent's episodes, as in rollouts.jsonl
pairs.jsonl                   for 04_dpo.py, fields as above; the replies are whole conversations
won.jsonl                     for 02_sft.py: `task` and `messages` of the successful episodes (the
                              self-training of KnowAgent, Zhu et al. 2024)
"""

import asyncio
import itertools
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional

from tqdm import tqdm

import common
from common import InputError, arg, mean


@dataclass
class AgentArgs:
    """What scoring and exploring have in common: an agent that plays tasks of an environment."""

    env: str = arg("sciworld", "environment: a folder of data/, or a path")
    out: str = arg("runs/sciworld", "run folder")
    agent: str = arg(
        "meta-llama/Llama-3.1-8B-Instruct",
        "the agent that acts (paper 3.2): a local model, or one of an OpenAI-compatible API",
    )
    agent_url: Optional[str] = arg(None, "OpenAI-compatible servers of the agent, with commas")
    agent_temperature: float = arg(0.7, "temperature of the agent (paper: 0.7)")
    agent_tokens: int = arg(512, "token limit of an agent's reply")
    agent_thinking: Optional[str] = common.thinking_arg("the agent", "the token limit")
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
    n: int = arg(5, "N, rollouts per plan (paper: 5)")
    seed: int = arg(0, "random seed of plans and rollouts")
    check: bool = arg(False, "say whether this command can run here, a line each, and stop")


@dataclass
class Args(AgentArgs):
    planner: str = arg("runs/sciworld/sft", "the SFT meta planner")
    planner_url: Optional[str] = arg(None, "OpenAI-compatible server of the planner")
    m: int = arg(5, "M, plans per task (paper: 5)")
    plan_temperature: float = arg(0.7, "temperature of the planner (paper: 0.7)")
    plan_tokens: int = arg(512, "token limit of a plan")
    plan_thinking: Optional[str] = common.thinking_arg(
        "the planner (trained without)", "the token limit", "off"
    )
    tasks: List[str] = arg(
        [],
        "list of tasks: a JSON file, train=FILE, or a folder with train.json (data/README.md; "
        "default: the environment's train split)",
    )
    pairs: Optional[str] = arg(
        None,
        "write the pairs to this file; a smaller --m or --n reuses the rollouts (figure 5)",
    )
    adaptive: bool = arg(False, "play only rollouts that can change which plan is best or worst")


@dataclass
class ExploreArgs(AgentArgs):
    out: str = arg("runs/sciworld/eto1", "folder of this round")
    agent: str = arg("runs/sciworld/agent", "the agent that explores, and will be trained")
    experts: str = arg("runs/sciworld/trajectories.jsonl", "the expert's trajectories of the tasks")
    n: int = arg(1, "rollouts per task (ETO: 1)")
    agent_temperature: float = arg(
        0.0, "temperature of the agent (ETO: 0); above 0 for --n above 1"
    )


# ---- M plans of each task ------------------------------------------------------------------------

PLAN_ATTEMPTS = 3  # replies that are asked for, if they have no plan


async def sample_plan(
    planner, messages: list[dict], task: str, m: int, a: Args
) -> tuple[str | None, int]:
    """(p_m ~ pi_g(p|u), how many replies ended while the planner was thinking). After a reply
    without a plan the planner is asked again with another seed; None if no reply has one."""
    cut_off = 0
    for attempt in range(PLAN_ATTEMPTS):
        seed = common.seed_of(a.seed, task, m, attempt)
        reply = await planner.ask(messages, a.plan_temperature, a.plan_tokens, seed)
        if reply.cut_off:
            cut_off += 1
        plan = common.parse_plan(reply.text)
        if plan is not None:
            return plan, cut_off
    return None, cut_off


async def sample_plans(a: Args, tasks: list[str], prompts, pool) -> list[dict]:
    """Rows of plans.jsonl: p_1, ..., p_M ~ pi_g(p|u) for every task. The planner is asked only
    for plans that the file does not have."""
    path = Path(a.out) / "plans.jsonl"
    planner_id = common.model_fingerprint(a.planner, a.planner_url)
    parts = [planner_id, prompts.planner_text, a.plan_temperature, a.plan_tokens, a.seed]
    if a.plan_thinking != Args.plan_thinking:
        parts.append(a.plan_thinking)
    fingerprint = common.fingerprint(*parts)
    wanted = list(itertools.product(tasks, range(a.m)))
    with common.Appender(path) as append:
        sampled = {}
        for row in common.read_rows(path, ("task", "m", "plan", "instruction", "fingerprint")):
            if row["fingerprint"] == fingerprint:
                sampled[row["task"], row["m"]] = row
        todo = [key for key in wanted if key not in sampled]
        if todo:
            ids = {"planner": planner_id, "fingerprint": fingerprint}
            await sample_missing_plans(a, todo, sampled, ids, prompts, pool, append)
    plans = [sampled[key] for key in wanted if key in sampled]  # without tasks that cannot be reset
    print_missing(plans, path, a)
    return plans


def print_missing(plans: list[dict], path: Path, a: Args) -> None:
    """Say how many plans are missing, how many were refused, and how many replies ended while the
    planner was thinking."""
    missing = [row for row in plans if row["plan"] is None and not common.is_refused(row)]
    if missing:
        print(
            f"{len(missing)} of {len(plans)} plans are missing: {PLAN_ATTEMPTS} replies in a row "
            "had none"
        )
    common.print_refused("plans", plans, path)
    cut_off = sum(row.get("thinking_cut_off", 0) for row in plans)
    limit = f"--plan_tokens {a.plan_tokens}"
    common.print_cut_off(cut_off, "the planner", limit, "--plan_thinking")


async def sample_missing_plans(
    a: Args, todo: list[tuple], sampled: dict[tuple, dict], ids: dict, prompts, pool, append
) -> None:
    """Append the rows of all (task, m) in `todo`, and add them to `sampled`. `ids`: fields of every
    row. Tasks whose reset fails are left out."""
    tasks = list(dict.fromkeys(task for task, _ in todo))
    instructions = await pool.each(tasks, "reset", worked=len(sampled))
    todo = [(task, m) for task, m in todo if task in instructions]
    with (
        common.open_model(a.planner, a.planner_url, a, a.plan_thinking) as planner,
        tqdm(total=len(todo), desc="sample plans") as bar,
    ):
        planner.answers = len(sampled)
        keep = common.Refusals(append, planner, tasks)

        async def work(task, m):
            u = instructions[task]
            row = {"task": task, "m": m, "plan": None, "instruction": u, **ids}
            try:
                plan, cut_off = await sample_plan(planner, prompts.planner(u), task, m, a)
            except common.RequestRefused as e:
                row["reason"] = common.refusal_reason(e)
            else:
                row["plan"] = plan
                row["thinking_cut_off"] = cut_off
            sampled[task, m] = row
            keep(row)
            bar.update()

        await asyncio.gather(*[work(task, m) for task, m in todo])
        keep.finish()


# ---- N rollouts of each plan ---------------------------------------------------------------------


class FinishedRollouts:
    """The finished rollouts of `task_plans`, at most `n` of each (task, plan); plan is None where
    the agent plays without one."""

    def __init__(self, task_plans: list[tuple], n: int):
        self.n = n
        self.rows: dict[tuple, dict[int, dict]] = {task_plan: {} for task_plan in task_plans}

    def add(self, row: dict) -> None:
        """Keep a row of rollouts.jsonl, unless it is of another plan or beyond the first `n`."""
        task_plan = (row["task"], row["plan"])
        if task_plan in self.rows and row["rollout"] < self.n:
            self.rows[task_plan][row["rollout"]] = row

    def by_plan(self) -> dict[tuple, list[dict]]:
        """{(task, plan): its rollouts in the order of their numbers}"""
        ordered = {}
        for task_plan, rows in self.rows.items():
            ordered[task_plan] = sorted(rows.values(), key=lambda row: row["rollout"])
        return ordered

    def missing(self) -> list[dict]:
        """All {"task", "plan", "rollout"} that are not finished. Those of one plan are adjacent:
        their prompts share a prefix, which the server caches."""
        jobs = []
        for (task, plan), rows in self.rows.items():
            for number in range(self.n):
                if number not in rows:
                    jobs.append({"task": task, "plan": plan, "rollout": number})
        return jobs

    def next_round(self) -> list[dict]:
        """One more {"task", "plan", "rollout"} for each plan that is `undecided`. A failed rollout
        is one of the plan's N, but earns no reward: a plan whose N all failed is left out."""
        rewards: dict[str, dict[str, list[float]]] = {}
        most: dict[str, dict[str, int]] = {}
        for (task, plan), rows in self.by_plan().items():
            counted = not_failed(rows)
            failed = len(rows) - len(counted)
            if failed < self.n:
                rewards.setdefault(task, {})[plan] = [row["reward"] for row in counted]
                most.setdefault(task, {})[plan] = self.n - failed
        jobs = []
        for task, of_plans in rewards.items():
            for plan in undecided(of_plans, most[task]):
                finished = self.rows[task, plan]
                number = next(i for i in range(self.n) if i not in finished)
                jobs.append({"task": task, "plan": plan, "rollout": number})
        return jobs


def undecided(rewards: dict[str, list[float]], most: dict[str, int]) -> list[str]:
    """The plans of a task that get another rollout, given the rewards of each so far and the `most`
    that it can have: those that can still change which plan is best or worst.

    Every plan gets one reward. If all are the same, every plan gets a second one; if all are the
    same again, the task is a tie and ends. From then on `contenders` continue."""
    if len(rewards) < 2:
        return []
    all_rewards = itertools.chain.from_iterable(rewards.values())
    all_equal = len(set(all_rewards)) < 2
    required = 2 if all_equal else 1
    too_few = [plan for plan in rewards if len(rewards[plan]) < min(required, most[plan])]
    if too_few:
        return too_few
    if all_equal:
        return []
    return contenders(rewards, most)


def contenders(rewards: dict[str, list[float]], most: dict[str, int]) -> list[str]:
    """The plans with fewer than their `most` rewards that may yet become, or cease to be, the best
    or the worst (successive halving on intervals of Q).

    The best plan so far continues while the interval of another one overlaps its own. Any other
    plan continues while its interval reaches above the mean of the best: a plan that can only tie
    is dropped. The same holds for the worst plan, the other way round."""
    pooled = mean(itertools.chain.from_iterable(rewards.values()))
    means = {}
    low = {}
    high = {}
    for plan, seen in rewards.items():
        means[plan] = mean(seen)
        low[plan], high[plan] = q_interval(seen, most[plan], pooled)
    best = max(rewards, key=lambda plan: (means[plan], len(rewards[plan])))
    worst = min(rewards, key=lambda plan: (means[plan], -len(rewards[plan])))
    open_plans = set()
    for plan in rewards:
        if plan != best:
            if high[plan] > means[best]:
                open_plans.add(plan)
            if high[plan] > low[best]:
                open_plans.add(best)
        if plan != worst:
            if low[plan] < means[worst]:
                open_plans.add(plan)
            if low[plan] < high[worst]:
                open_plans.add(worst)
    return [plan for plan in rewards if plan in open_plans and len(rewards[plan]) < most[plan]]


def q_interval(rewards: list[float], n: int, pooled: float) -> tuple[float, float]:
    """The lowest and the highest Q(p) that a plan is likely to have after `n` rewards: one standard
    deviation around what is expected. `pooled`, the mean reward of all plans of the task,
    is a prior that counts as two rollouts of this plan."""
    seen = len(rewards)
    left = n - seen
    p = (sum(rewards) + 2 * pooled) / (seen + 2)
    # the variance of a beta-binomial distribution: p itself is uncertain
    deviation = (left * p * (1 - p) * (seen + 2 + left) / (seen + 3)) ** 0.5
    lowest = sum(rewards) + max(0.0, left * p - deviation)
    highest = sum(rewards) + min(left, left * p + deviation)
    return lowest / n, highest / n


async def play(
    a: AgentArgs, task_plans: list[tuple], prompts, pool, path: Path, adaptive: bool = False
) -> dict[tuple, list[dict]]:
    """{(task, plan): its rollouts} for all `task_plans` (equation 5): N each or, if `adaptive`, as
    many as it takes to find the best and the worst plan of each task. Rollouts that are in the file
    `path` are not played again, unless they crashed."""
    agent_id = common.model_fingerprint(a.agent, a.agent_url)
    fingerprint = common.agent_fingerprint(a, agent_id, prompts)
    finished = FinishedRollouts(task_plans, a.n)
    fields = ("task", "plan", "rollout", "fingerprint", "instruction", "reward", "success", "end")
    with common.Appender(path) as append:
        for row in common.read_rows(path, (*fields, "steps")):
            if row["fingerprint"] == fingerprint and row["end"] != "crash":
                finished.add(row)
        ids = {"agent": agent_id, "fingerprint": fingerprint}
        next_jobs = finished.next_round if adaptive else finished.missing
        if next_jobs():
            await play_missing(a, finished, next_jobs, ids, prompts, pool, append)
    return finished.by_plan()


async def play_missing(
    a: AgentArgs, finished: FinishedRollouts, next_jobs, ids: dict, prompts, pool, append
) -> None:
    """Play rollouts until `next_jobs()` has no more. Their rows, with the fields `ids`, are
    appended, and added to `finished`."""
    config = common.RolloutConfig(
        prompts,
        a.agent_temperature,
        a.agent_tokens,
        a.observation_chars,
        a.seed,
        max_steps=a.max_steps,
    )
    retries = 0
    with common.open_model(a.agent, a.agent_url, a, a.agent_thinking) as agent:
        agent.answers = sum(map(len, finished.rows.values()))

        def keep(row):
            append(row)
            finished.add(row)

        jobs = next_jobs()
        while jobs:
            for job in jobs:
                job.update(ids)
            retries += await common.rollouts(
                jobs, agent, pool, a.env, config, agent.concurrency, keep
            )
            jobs = next_jobs()
    if retries:
        print(f"{retries} retries of episodes whose environment worker died")


async def score_plans(a: Args, plans: list[dict], prompts, pool) -> dict[tuple, list[dict]]:
    """{(task, plan): its rollouts} for the rows of plans.jsonl. Equal plans of a task are scored
    once."""
    unique = list(dict.fromkeys((row["task"], row["plan"]) for row in plans if row["plan"]))
    path = Path(a.out) / "rollouts.jsonl"
    scored = await play(a, unique, prompts, pool, path, a.adaptive)
    rows = list(itertools.chain.from_iterable(scored.values()))
    line = f"rollouts: {len(rows)} of {len(unique)} plans"
    if a.adaptive:
        share = len(rows) / max(1, a.n * len(unique))
        line += f" ({share:.0%} of {a.n} each)"
    ends = Counter(row["end"] for row in rows)
    counts = ", ".join(f"{end} {count}" for end, count in ends.most_common())
    print(f"{line}, mean reward {mean_reward(rows):.3f}; ends: {counts}")
    common.print_refused("rollouts", rows, path)
    common.print_faults(rows)
    print_agent_cut_off(rows, a)
    return scored


def print_agent_cut_off(rollouts: list[dict], a: AgentArgs) -> None:
    """Say how many replies of the agent ended while it was thinking."""
    cut_off = sum(row.get("thinking_cut_off", 0) for row in rollouts)
    limit = f"--agent_tokens {a.agent_tokens}"
    common.print_cut_off(cut_off, "the agent", limit, "--agent_thinking")


def not_failed(rollouts: list[dict]) -> list[dict]:
    """The rollouts without those that failed three times, such as by a worker that died, and
    without those that the agent's server refused."""
    return [row for row in rollouts if row["end"] not in common.FAILED_ENDS]


def mean_reward(rollouts: list[dict]) -> float:
    """The mean reward of the rollouts that did not fail."""
    return mean(row["reward"] for row in not_failed(rollouts))


# ---- Q(p) and pairs ------------------------------------------------------------------------------


def quality(rollouts: list[dict]) -> float | None:
    """Q(p) = 1/N sum r(u, e_i) (equation 6) over a plan's rollouts that did not fail; None if there
    are none."""
    return mean_reward(rollouts) if not_failed(rollouts) else None


def qualities(scored: dict[tuple, list[dict]]) -> dict[tuple, float]:
    """{(task, plan): Q(p)} of the plans that have one; says how many have failed rollouts."""
    q = {}
    partial = 0
    failed = 0
    for task_plan, rollouts in scored.items():
        score = quality(rollouts)
        if score is not None:
            q[task_plan] = score
        if len(not_failed(rollouts)) < len(rollouts):
            if score is None:
                failed += 1
            else:
                partial += 1
    why = 'failed or were refused (see "error" in their rows)'
    if partial:
        print(f"{partial} plans have rollouts that {why}: they are scored by their other rollouts")
    if failed:
        print(f"{failed} plans are not compared: all their rollouts {why}")
    return q


def ranked_plans(plans: list[dict], q: dict[tuple, float]) -> dict[str, list[dict]]:
    """{task: its rows of plans.jsonl with their `q`}, highest Q(p) first; of equals the first
    sampled."""
    ranked: dict[str, list[dict]] = {}
    for row in plans:
        task_plan = (row["task"], row["plan"])
        if task_plan in q:
            ranked.setdefault(row["task"], []).append(row | {"q": q[task_plan]})
    for rows in ranked.values():
        rows.sort(key=lambda row: row["q"], reverse=True)
    return ranked


def contrastive_pairs(plans: list[dict], q: dict[tuple, float], prompts) -> list[dict]:
    """(u, p_w, p_l) of each task: its plans of highest and lowest Q(p), of equals the first sampled
    (equation 7). Tasks whose plans all have the same Q are skipped."""
    pairs = []
    for task, rows in ranked_plans(plans, q).items():
        best = rows[0]
        worst = min(rows, key=lambda row: row["q"])
        if best["q"] > worst["q"]:
            pairs.append(
                {
                    "task": task,
                    "prompt": prompts.planner(best["instruction"]),
                    "chosen": common.plan_messages(best["plan"]),
                    "rejected": common.plan_messages(worst["plan"]),
                    "q_chosen": best["q"],
                    "q_rejected": worst["q"],
                }
            )
    return pairs


def best_plans(plans: list[dict], q: dict[tuple, float], prompts) -> list[dict]:
    """SFT rows with each task's plan of highest Q(p), for rejection sampling (RFT, paper table 3).
    Tasks whose plans all earned nothing are skipped."""
    chosen = []
    for task, rows in ranked_plans(plans, q).items():
        best = rows[0]
        if best["q"] > 0:
            messages = prompts.planner(best["instruction"]) + common.plan_messages(best["plan"])
            chosen.append(
                {"task": task, "q": best["q"], "plan": best["plan"], "messages": messages}
            )
    return chosen


# ---- exploration by a fine-tuned agent (ETO) -----------------------------------------------------


EXTRA_TURNS = 5  # of a worse trajectory, beyond the length of the better one


def better_and_worse(expert: dict, episodes: list[dict]) -> list[tuple[dict, dict]]:
    """(better, worse) trajectories of one task: the expert's with every episode of another reward,
    and the best episode with the worst if they differ in reward."""
    couples = []
    if expert["solved"]:
        steps = common.expert_steps(expert["steps"], expert.get("thoughts"))
        own = {"reward": expert["reward"], "steps": steps}
        for row in episodes:
            if row["reward"] < expert["reward"]:
                couples.append((own, row))
            elif row["reward"] > expert["reward"]:
                couples.append((row, own))
    best = max(episodes, key=lambda row: row["reward"])
    worst = min(episodes, key=lambda row: row["reward"])
    if best["reward"] > worst["reward"]:
        couples.append((best, worst))
    return couples


def trajectory_pairs(
    experts: list[dict], explored: dict[str, list[dict]], prompts, observation_chars: int
) -> list[dict]:
    """(u, e_w, e_l) of the `experts`, rows of trajectories.jsonl that may have `thoughts`, and the
    `explored` episodes of each task. Failed and empty episodes are ignored. A worse trajectory is
    cut EXTRA_TURNS after the length of the better one."""
    pairs = []
    for expert in experts:
        task = expert["task"]
        episodes = [row for row in not_failed(explored.get(task, [])) if row["steps"]]
        if not episodes:
            continue
        u = expert["instruction"] or episodes[0]["instruction"]
        for better, worse in better_and_worse(expert, episodes):
            cut = worse["steps"][: len(better["steps"]) + EXTRA_TURNS]
            rejected = common.turns(cut, observation_chars)
            if not rejected:
                continue  # all replies are empty
            pairs.append(
                {
                    "task": task,
                    "prompt": prompts.agent(u, None, task),
                    "chosen": common.turns(better["steps"], observation_chars),
                    "rejected": rejected,
                    "q_chosen": better["reward"],
                    "q_rejected": worse["reward"],
                }
            )
    return pairs


def load_experts(a: ExploreArgs) -> list[dict]:
    """The rows of --experts, of --types, the first --limit of them, with their own `thoughts` or
    those that the teacher wrote for them, if it did."""
    experts = []
    fields = ("task", "instruction", "steps", "reward", "solved")
    for row in common.read_rows(a.experts, fields):
        if not a.types or common.task_type(row["task"]) in a.types:
            experts.append(row)
    experts = experts[: a.limit]
    if not experts:
        raise InputError(f"{a.experts} has no task of these --types")
    thoughts = {}
    path = Path(a.experts).with_name("thoughts.jsonl")
    for row in common.read_rows(path, ("task", "thoughts"), missing_ok=True):
        thoughts[row["task"]] = row["thoughts"]
    for expert in experts:
        expert.setdefault("thoughts", thoughts.get(expert["task"]))
    return experts


async def play_without_plan(a: ExploreArgs, experts: list[dict], prompts) -> dict[str, list[dict]]:
    """{task: its N rollouts}"""
    task_plans = [(expert["task"], None) for expert in experts]
    async with common.EnvPool(a.env, a.workers, a.concurrency, a.ray) as pool:
        scored = await play(a, task_plans, prompts, pool, Path(a.out) / "explore.jsonl")
    return {task: rollouts for (task, _), rollouts in scored.items()}


def won_conversations(episodes: list[dict], prompts, observation_chars: int) -> list[dict]:
    """SFT rows of the successful episodes."""
    rows = []
    for row in episodes:
        if row["success"]:
            prompt = prompts.agent(row["instruction"], None, row["task"])
            messages = prompt + common.turns(row["steps"], observation_chars)
            rows.append({"task": row["task"], "messages": messages})
    return rows


def explore(a: ExploreArgs) -> None:
    """Play the experts' tasks with the agent; write its successes and its pairs with the expert."""
    if a.n > 1 and a.agent_temperature == 0:
        raise InputError(
            f"--n {a.n}: at temperature 0 all rollouts of a task are the same: use "
            "--agent_temperature 0.7 as well, or leave out --n"
        )
    common.check_thinking(a)
    prompts = common.Prompts(a.env, a.prompts, a.examples)
    if a.check:
        check(a, [(a.agent, a.agent_url)], a.n)
        return
    common.check_model(a.agent, a.agent_url)
    experts = load_experts(a)
    common.check_data(a.env, a.out)

    explored = asyncio.run(play_without_plan(a, experts, prompts))
    pairs = trajectory_pairs(experts, explored, prompts, a.observation_chars)
    episodes = list(itertools.chain.from_iterable(explored.values()))
    won = won_conversations(episodes, prompts, a.observation_chars)
    common.write_rows(Path(a.out) / "won.jsonl", won)
    print(
        f"exploration: {len(episodes)} episodes, mean reward {mean_reward(episodes):.3f}, "
        f"{len(won)} successful; {len(pairs)} pairs"
    )
    common.print_refused("episodes", episodes, Path(a.out) / "explore.jsonl")
    common.print_faults(episodes)
    print_agent_cut_off(episodes, a)
    if not pairs:
        raise InputError(
            "the agent did as well as the expert on every task, so it has no failure "
            "to learn from: use more tasks, a larger --n or --agent_temperature"
        )
    common.write_rows(Path(a.out) / "pairs.jsonl", pairs)


# ---- the stage -----------------------------------------------------------------------------------


async def sample_and_score(a: Args, prompts) -> tuple[list[dict], dict[tuple, list[dict]]]:
    """Rows of plans.jsonl, and {(task, plan): its rollouts}."""
    async with common.EnvPool(a.env, a.workers, a.concurrency, a.ray) as pool:
        tasks = await common.list_tasks(pool, a.env, "train", a.tasks, a.types, a.limit)
        plans = await sample_plans(a, tasks, prompts, pool)
        scored = await score_plans(a, plans, prompts, pool)
    return plans, scored


def check(a: AgentArgs, models: list[tuple], times: int) -> None:
    """--check: what playing every train task `times` times needs, a line each. `models`: (name,
    URL) of those that are asked."""
    checks = common.Checks(a.out)
    checks.environment(a)
    for name, url in models:
        checks.asks(name, url, a)
    checks.episodes(a, ["train"], times)
    checks.finish()


def main(a: Args) -> None:
    if a.m < 2 or a.n < 1:
        raise InputError("--m must be at least 2 (a best and a worst plan) and --n at least 1")
    common.check_thinking(a)
    prompts = common.Prompts(a.env, a.prompts, a.examples)
    if a.check:
        check(a, [(a.planner, a.planner_url), (a.agent, a.agent_url)], a.m * a.n)
        return
    common.check_model(a.planner, a.planner_url)
    common.check_model(a.agent, a.agent_url)
    common.check_data(a.env, a.out)

    plans, scored = asyncio.run(sample_and_score(a, prompts))
    q = qualities(scored)
    preferences = contrastive_pairs(plans, q, prompts)
    if not a.pairs:
        if not preferences:
            raise InputError(
                "no task has a better and a worse plan, so DPO has nothing to learn: "
                "use more tasks, a larger --m or --n, or a higher --plan_temperature"
            )
        common.write_rows(Path(a.out) / "best_plans.jsonl", best_plans(plans, q, prompts))
    common.write_rows(a.pairs or Path(a.out) / "pairs.jsonl", preferences)
    tasks = {row["task"] for row in plans}
    gap = mean(pair["q_chosen"] - pair["q_rejected"] for pair in preferences)
    print(f"pairs: {len(preferences)} from {len(tasks)} tasks, mean Q gap {gap:.3f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["explore"]:
        del sys.argv[1]
        common.run_stage(explore, ExploreArgs)
    else:
        common.run_stage(main, Args)
