"""Stage 5 (paper 4.1 Evaluation): does the plan help the agent on tasks it has not seen?

    python 05_eval.py --env sciworld --agent meta-llama/Llama-3.1-8B-Instruct --out runs/sciworld

Greedy plans are made once per task and planner and reused for all agents; then the agent plays every
task with each plan setting at temperature 0. Writes to --out
    eval/plans.jsonl       the greedy plans
    eval/rollouts.jsonl    every episode with its whole conversation
    results.md, results.json, results.png

Every finished plan and episode is kept: run it again to go on, it plays only what is missing.
"""

import asyncio
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional

from tqdm import tqdm

import common
from common import InputError, arg

LABELS = {"none": "no plan", "sft": "SFT planner", "mpo": "MPO planner"}


@dataclass
class Args:
    env: str = arg("sciworld", "environment: " + ", ".join(common.ENVIRONMENTS))
    out: str = arg("runs/sciworld", "run folder")
    agent: str = arg("meta-llama/Llama-3.1-8B-Instruct", "the agent: a local model, or a model of an OpenAI-compatible API")
    agent_url: Optional[str] = arg(None, "OpenAI-compatible server that already serves the agent; several with commas between")
    plans: List[str] = arg(["none", "sft", "mpo"], "plan settings: none, or the planner checkpoint of that name in --out")
    splits: List[str] = arg(["seen", "unseen"], "splits of the environment")
    agent_temperature: float = arg(0.0, "temperature of the agent (paper: 0; plans are greedy as well)")
    plan_tokens: int = arg(512, "tokens of a plan at most")
    agent_tokens: int = arg(256, "tokens of an agent's reply at most")
    prompts: Optional[str] = arg(None, "folder of prompt texts in data/ (default: the environment's name)")
    observation_chars: int = arg(0, "cut observations at this length, 0: never")
    max_steps: Optional[int] = arg(None, "steps of an episode at most (default: the environment's; ALFWorld 30, ScienceWorld by task type)")
    tasks: Optional[str] = arg(None, "JSON file of tasks, [[type, variation], ...], instead of the splits by rule")
    types: Optional[List[str]] = arg(None, "only tasks of these types")
    limit: Optional[int] = arg(None, "only the first N tasks of each split")
    workers: int = arg(16, "environment worker processes")
    concurrency: int = arg(256, "episodes in flight")
    window: int = arg(0, "when a conversation passes the agent's context: turns to keep, with the task; 0: the episode ends")
    ray: bool = arg(False, "environment workers as actors of a Ray cluster (RAY_ADDRESS), not as processes of this machine")
    tensor_parallel: int = arg(1, "GPUs of one replica of a served model")
    max_model_len: int = arg(8192, "context of a served model, tokens")
    seed: int = arg(0, "random seed of the bootstrap")


async def greedy_plans(a: Args, tasks: list[str], prompts, pool) -> dict[tuple, str | None]:
    """{(setting, task): p}: the most likely plan of each setting's planner, None without one."""
    path = Path(a.out) / "eval" / "plans.jsonl"
    planners = {s: str(Path(a.out) / s) for s in a.plans if s != "none"}
    ids = {s: common.digest(common.model_id(p), prompts.planner_text, a.plan_tokens) for s, p in planners.items()}
    done = common.finished(common.read_rows(path, ("setting_id", "task", "plan"), missing_ok=True), "setting_id", "task")
    todo = [(s, t) for s in planners for t in tasks if (ids[s], t) not in done]
    if todo:
        needed = list(dict.fromkeys(s for s, _ in todo))
        u = await common.instructions(pool, list(dict.fromkeys(t for _, t in todo)))
        with common.Appender(path) as append, \
                common.serve([planners[s] for s in needed], Path(a.out) / "logs", a.tensor_parallel, a.max_model_len) as urls, \
                tqdm(total=len(todo), desc="greedy plans") as bar:
            models = {s: common.Model(planners[s], url, a.concurrency) for s, url in zip(needed, urls, strict=True)}

            async def ask(setting, task):
                try:
                    reply = await models[setting].ask(prompts.planner(u[task]), 0.0, a.plan_tokens)
                except common.ContextOverflow:
                    raise InputError(f"the planner's prompt for {task} is longer than its context "
                                     f"(--max_model_len {a.max_model_len})") from None
                row = {"setting": setting, "task": task, "plan": common.parse_plan(reply.text), "setting_id": ids[setting]}
                append(row)
                done[ids[setting], task] = row
                bar.update()

            await asyncio.gather(*[ask(*key) for key in todo])
    plans = {(s, t): done[ids[s], t]["plan"] for s in planners for t in tasks}
    for s in planners:
        if missing := sum(plans[s, t] is None for t in tasks):
            print(f"{s}: {missing} of {len(tasks)} replies held no plan; the agent plays those tasks without one")
    return plans


async def play(a: Args, tasks: list[str], plans: dict[tuple, str | None], prompts, pool) -> dict[tuple, dict]:
    """{(setting, task): episode row}; only episodes that are not there yet are played. A task whose two
    settings have the same plan is played once: at temperature 0 it would be the same episode."""
    path, agent_id = Path(a.out) / "eval" / "rollouts.jsonl", common.model_id(a.agent, a.agent_url)
    setting_id = common.digest(agent_id, prompts.agent_text, prompts.examples, a.agent_temperature, a.agent_tokens, a.observation_chars,
                               a.max_steps, a.window)
    rows = [r for r in common.read_rows(path, ("task", "plan", "reward", "setting_id"), missing_ok=True)
            if r["setting_id"] == setting_id and r["end"] != "crash"]
    done = common.finished(rows, "task", "plan")
    wanted = dict.fromkeys((t, plans.get((s, t))) for t in tasks for s in a.plans)
    jobs = [{"task": t, "plan": p, "rollout": 0, "agent": agent_id, "setting_id": setting_id} for t, p in wanted if (t, p) not in done]
    if jobs:
        with common.Appender(path) as append, common.open_model(
                a.agent, a.agent_url, a.concurrency, Path(a.out) / "logs", a.tensor_parallel, a.max_model_len) as agent:
            c = common.RolloutConfig(prompts, a.agent_temperature, a.agent_tokens, a.observation_chars, a.seed, max_steps=a.max_steps,
                                     window=a.window)

            def keep(row):
                append(row)
                done[row["task"], row["plan"]] = row

            await common.rollouts(jobs, agent, pool, a.env, c, a.concurrency, keep, desc="evaluation")
    return {(s, t): done[t, plans.get((s, t))] for s in a.plans for t in tasks}


METRICS = {
    "reward": ("average reward", lambda r: r["reward"]),
    "success": ("success rate", lambda r: float(r["success"])),
    "reward_per_step": ("reward per step", lambda r: r["reward"] / max(1, len(r["steps"]))),  # paper 5.3
}


def bootstrap(values, seed: int, samples: int = 10_000) -> list[float]:
    """95% percentile bootstrap interval of the mean of `values` (one a task): [low, high]."""
    import numpy as np

    values = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(values), (samples, len(values)))
    return np.percentile(values[draws].mean(1), [2.5, 97.5]).tolist()


def summarise(a: Args, splits: dict[str, list[str]], played: dict[tuple, dict]) -> list[dict]:
    """One result a split and plan setting: each metric's mean and interval, how episodes ended, and the
    paired difference in reward to the setting before it (on the same tasks)."""
    results = []
    groups = {**splits, **({"all": [t for ts in splits.values() for t in ts]} if len(splits) > 1 else {})}
    for split, tasks in groups.items():
        for i, setting in enumerate(a.plans):
            rows = {t: played[setting, t] for t in tasks}
            good = {t: r for t, r in rows.items() if r["end"] != "crash"}
            result = {"split": split, "plans": setting, "tasks": len(tasks), "missing": len(tasks) - len(good),
                      "ends": dict(Counter(r["end"] for r in rows.values())),
                      "format_errors": sum(r.get("format_errors", 0) for r in rows.values()),
                      "steps": common.mean(len(r["steps"]) for r in good.values())}
            for name, (_, value) in METRICS.items():
                values = [value(r) for r in good.values()]
                result[name] = {"mean": common.mean(values), "interval": bootstrap(values, a.seed) if values else None}
            if i:
                before = a.plans[i - 1]
                gain = [r["reward"] - played[before, t]["reward"] for t, r in good.items() if played[before, t]["end"] != "crash"]
                result["gain"] = {"over": before, "mean": common.mean(gain), "interval": bootstrap(gain, a.seed) if gain else None}
            results.append(result)
    return results


def show(cell: dict, scale: float = 100.0, sign: str = "") -> str:
    if not cell["interval"]:
        return "-"
    low, high = cell["interval"]
    return f"{scale * cell['mean']:{sign}.1f} [{scale * low:{sign}.1f}, {scale * high:{sign}.1f}]"


def markdown(a: Args, results: list[dict]) -> str:
    head = ["split", "plans", "tasks", *(f"{label} (x100)" for label, _ in METRICS.values()),
            "gain in reward", "steps", "format errors", "ends"]
    table = [head]
    for r in results:
        gain = f"{show(r['gain'], sign='+')} over {r['gain']['over']}" if "gain" in r else ""
        table.append([r["split"], r["plans"], f"{r['tasks'] - r['missing']}" + (f" ({r['missing']} missing)" if r["missing"] else ""),
                      *(show(r[name]) for name in METRICS), gain, f"{r['steps']:.1f}", str(r["format_errors"]),
                      ", ".join(f"{k} {v}" for k, v in sorted(r["ends"].items()))])
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return (f"# {a.env}: agent {a.agent}\n\n" + "\n".join(lines) + "\n\nMean [95% bootstrap interval over tasks]. Reward per step: "
            "reward over steps taken, per task, then averaged. Gain: paired on the same tasks.\n")


def picture(a: Args, results: list[dict], path: Path) -> None:
    """Bars of average reward per split and plan setting, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    splits = list(dict.fromkeys(r["split"] for r in results))
    fig, axis = plt.subplots(figsize=(1.5 + 2.2 * len(splits), 3.8), layout="constrained")
    width, colours = 0.8 / len(a.plans), ["#b8bfc9", "#6aa5d8", "#1f5fa8", "#e0a458", "#8c6bb1"]
    for i, setting in enumerate(a.plans):
        rows = [r for r in results if r["plans"] == setting]
        x = [splits.index(r["split"]) + (i - (len(a.plans) - 1) / 2) * width for r in rows]
        means = [100 * r["reward"]["mean"] for r in rows]
        errors = [[max(0.0, m - 100 * (r["reward"]["interval"] or [0, 0])[0]) for m, r in zip(means, rows, strict=True)],
                  [max(0.0, 100 * (r["reward"]["interval"] or [0, 0])[1] - m) for m, r in zip(means, rows, strict=True)]]
        axis.bar(x, means, width * 0.92, yerr=errors, capsize=3, color=colours[i % len(colours)], label=LABELS.get(setting, setting),
                 error_kw={"lw": 1, "ecolor": "#444"})
        for xi, m in zip(x, means, strict=True):
            axis.text(xi, 1.5, f"{m:.0f}", ha="center", va="bottom", fontsize=8, color="black" if i == 0 else "white")
    axis.set_xticks(range(len(splits)), [f"{s}\n({next(r['tasks'] for r in results if r['split'] == s)} tasks)" for s in splits])
    axis.set_ylabel("average reward x 100")
    axis.set_ylim(0, 105)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=len(a.plans), loc="upper center", bbox_to_anchor=(0.5, 1.12), fontsize=8)
    tmp = path.with_suffix(".tmp.png")
    fig.savefig(tmp, dpi=160)
    tmp.replace(path)


def main(a: Args) -> None:
    prompts, out = common.Prompts(a.prompts or a.env), Path(a.out)
    for setting in a.plans:
        if setting != "none":
            common.check_model_dir(str(out / setting))
            if not (out / setting).is_dir():
                raise InputError(f"--plans {setting}: there is no planner {out / setting}; run the stage that makes it, or leave it out")
    common.check_model(a.agent, a.agent_url)

    async def stage():
        async with common.EnvPool(a.env, a.workers, a.concurrency, a.ray) as pool:
            splits = {s: await common.list_tasks(pool, a.env, s, a.tasks, a.types, a.limit)
                      for s in (["tasks"] if a.tasks else a.splits)}
            tasks = list(dict.fromkeys(t for ts in splits.values() for t in ts))
            plans = await greedy_plans(a, tasks, prompts, pool)
            return splits, await play(a, tasks, plans, prompts, pool)

    splits, played = asyncio.run(stage())
    results = summarise(a, splits, played)
    text = markdown(a, results)
    common.write_text(out / "results.md", text)
    picture(a, results, out / "results.png")
    report = {"env": a.env, "agent": common.model_id(a.agent, a.agent_url), "results": results}
    common.write_text(out / "results.json", json.dumps(report, indent=1) + "\n")
    print(f"\n{text}\nwritten to {out}/results.md, results.json, results.png")


if __name__ == "__main__":
    common.run_stage(main, Args)
