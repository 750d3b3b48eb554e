"""What `make all` will do and cost: `make estimate ENV=NAME GPUS=8`.

    python data/estimate.py --env NAME --gpus 8 --m 5 --n 5
    python data/estimate.py --env NAME --run runs/demo-NAME --check    # against a finished run

Counts (tasks, calls, episodes, optimizer steps) follow from the environment and the settings. They
are exact, except that equal plans of a task are scored once. Shapes (tokens and steps) are measured
on the expert's trajectories of --sample tasks or, with --run, on that run's rows. Rates are
measured or assumed, as printed; set your own.
"""

import argparse
import asyncio
import itertools
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import common

CHARACTERS = 4.0  # of a token of English, with the tokenizers of current models
# name: (value, source, what it is). The rates of a GPU are assumptions for an 8B model on one H100.
RATES = {
    "generate": (2500.0, "assumed", "generated tokens/s of a GPU, many requests at once"),
    "prefill": (12000.0, "assumed", "new prompt tokens/s of a GPU"),
    "train": (6000.0, "assumed", "tokens/s of a GPU, full parameters, forward and backward"),
    "load": (120.0, "assumed", "seconds to start a server or load a model for training"),
    "success": (0.5, "assumed", "share of episodes that end early, with success"),
    "reply": (40.0, "assumed", "tokens of an agent's reply, thought and action"),
    "plan": (100.0, "assumed", "tokens of a plan"),
    "pairs": (0.6, "assumed", "share of the tasks that give a pair"),
    "teacher_in": (2.5, "assumed", "dollars for a million prompt tokens"),
    "teacher_out": (10.0, "assumed", "dollars for a million generated tokens"),
    "parameters": (8.0, "the paper's model", "billion parameters of planner and agent"),
}


def tokens(text: str) -> float:
    return len(text) / CHARACTERS


# ---- disk and memory; `make check` compares them with what this machine has ----------------------

SAVED, CHECKPOINT = 2, 12  # bytes a parameter: bf16; float32 weights and AdamW's two averages


def episode_bytes(steps: float, growth: float = 250.0) -> float:
    """Bytes of an episode's row. `growth`: tokens of a reply and its observation; the default is
    above the means of the demos' rows, 13 to 190."""
    return 1000 + steps * growth * CHARACTERS


def training_disk(parameters: float, adapters: float = 0.0) -> tuple[float, float]:
    """(bytes of the model that a training run leaves, bytes of its checkpoints: one is kept while
    the next is written). `adapters`: parameters of LoRA; the others are frozen, in bf16."""
    checkpoint = CHECKPOINT * (adapters or parameters) + SAVED * parameters * bool(adapters)
    return SAVED * parameters, 2 * checkpoint


def most_disk(stages: list[tuple[float, float]]) -> float:
    """The most bytes at once, of (bytes that a stage leaves, bytes it needs only while it runs) of
    each stage in their order."""
    most = total = 0.0
    for left, meanwhile in stages:
        most, total = max(most, total + max(left, meanwhile)), total + left
    return most


def model_sizes(folder: Path) -> SimpleNamespace:
    """Sizes of the model whose config.json is in `folder`, without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    text, layers = config.get_text_config(), model.get_decoder().layers
    hidden, heads = text.hidden_size, text.num_attention_heads
    in_layers, every = (sum(p.numel() for p in m.parameters()) for m in (layers, model))
    return SimpleNamespace(
        model=model,
        parameters=every,
        layers=len(layers),
        hidden=hidden,
        heads=heads,
        vocabulary=text.vocab_size,
        context=getattr(text, "max_position_embeddings", math.inf),
        weights=(1 if hasattr(config, "quantization_config") else SAVED) * every,  # bytes to serve
        cached=4
        * len(layers)  # bytes of a token's keys and values
        * (getattr(text, "num_key_value_heads", None) or heads)
        * (getattr(text, "head_dim", None) or hidden // heads),
        # bytes of a token that a layer keeps for the backward pass
        kept=24 * hidden + 8 * getattr(text, "intermediate_size", 4 * hidden),
        gathered=every - in_layers + in_layers // len(layers),  # parameters whole at one time
        linear=sum(
            m.in_features + m.out_features
            for m in layers.modules()
            if isinstance(m, torch.nn.Linear)
        ),
    )


def training_memory(m, a) -> tuple[float, float]:
    """(bytes shared by all processes, bytes of each) of training the model of `model_sizes` with
    the settings `a` of 02_sft.py or 04_dpo.py. Shared: float32 weights, gradients and AdamW's
    averages, 16 bytes a parameter (with adapters, of these; frozen weights 2). Each: weights
    gathered in bf16 and their gradients, activations, logits of a third of the tokens (24 bytes
    each), 1 GB. SFT and DPO of 135M parameters on a CPU, with checkpointing and without, took 4.0
    to 8.4 GB: this -13% to +18%."""
    trained = a.lora_rank * m.linear if a.lora_rank else m.parameters
    shared = 16 * trained + 2 * m.parameters * bool(a.lora_rank)
    layers = m.kept + 2 * m.hidden * m.layers if a.gradient_checkpointing else m.kept * m.layers
    tokens_at_once = max(a.micro_tokens, a.max_length)
    return shared, 1e9 + 8 * m.gathered + tokens_at_once * (layers + 8 * m.vocabulary)


def serving_memory(m, length: int, gpus: int) -> float:
    """Bytes on each of the `gpus` of a replica, or of the host (0), of serving the model of
    `model_sizes`: bf16 weights, the cache of one context of `length` tokens, 2 GB of buffers."""
    return (m.weights + length * m.cached) / max(1, gpus) + 2e9


# ---- tokens, hours and cost ----------------------------------------------------------------------


async def measure(a) -> dict:
    """Tasks of each split, and the shapes of --sample of them as the expert plays."""
    cls, prompts = common.environment(a.env), common.Prompts(a.env, a.prompts)
    async with common.EnvPool(a.env, 2) as pool:
        splits = {
            s: await common.list_tasks(pool, a.env, s, [], a.types, None)
            for s in ("train", *cls.tests())
        }
        found = []
        await pool.each(splits["train"][: a.sample], "expert", lambda *result: found.append(result))
    solved = [(t, e) for t, e in found if e]
    mean = common.mean
    steps = [step for _, e in solved for step in e["steps"]]
    return {
        "tasks": {s: len(ts) for s, ts in splits.items()},
        "solved": len(solved) / max(1, len(found)),
        "trajectory": mean(sum(tokens(x + o) + 6 for x, o in e["steps"]) for _, e in solved),
        "expert_steps": mean(len(e["steps"]) for _, e in solved),
        "limit": mean(cls.max_steps(t) for t, _ in found),
        "observation": mean(tokens(o) + 8 for _, o in steps),
        "planner_prompt": mean(
            tokens(prompts.planner(e["instruction"])[0]["content"]) for _, e in solved
        ),
        "teacher_prompt": mean(
            tokens(prompts.teacher(e["instruction"], "")[0]["content"]) for _, e in solved
        ),
        "agent_prompt": mean(
            tokens(prompts.agent(e["instruction"], None, t)[0]["content"]) for t, e in solved
        ),
    }


def measure_run(run: Path) -> dict:
    """The shapes of a finished run, from its rows."""
    mean = common.mean
    episodes = [r for r in common.read_rows(run / "rollouts.jsonl") if r["steps"]]
    plans = [r for r in common.read_rows(run / "plans.jsonl") if r["plan"]]
    trajectories = [r for r in common.read_rows(run / "trajectories.jsonl") if r["solved"]]
    seeds = common.read_rows(run / "seed_plans.jsonl")
    tasks = {r["task"] for r in plans}
    steps = sum(len(r["steps"]) for r in episodes)
    out = {
        "steps": steps / len(episodes),
        "reply": sum(r["completion_tokens"] for r in episodes) / steps,
        "observation": sum(tokens(o) + 8 for r in episodes for _, o in r["steps"]) / steps,
        "plan": mean(tokens(p["plan"]) + 20 for p in plans),
        "planner_prompt": mean(tokens(r["messages"][0]["content"]) for r in seeds),
        "pairs": len(common.read_rows(run / "pairs.jsonl")) / len(tasks),
        "unique": len({(r["task"], r["plan"]) for r in plans}) / len(plans),
        "bytes": (run / "rollouts.jsonl").stat().st_size / len(episodes),
        "trajectory": mean(sum(tokens(x + o) + 6 for x, o in r["steps"]) for r in trajectories),
    }
    # the server's token counts are exact: the first prompt is the rest without the conversation
    growth = (out["reply"] + out["observation"]) * mean((len(r["steps"]) - 1) / 2 for r in episodes)
    out["agent_prompt"] = sum(r["prompt_tokens"] for r in episodes) / steps - growth
    return out


def estimate(shape: dict, rate: dict, a) -> list[dict]:
    """A row per stage: calls, tokens, core-hours of the environment, GPU-hours, disk."""
    tasks, cpu = shape["tasks"], common.environment(a.env).SECONDS
    train = min(a.limit or tasks["train"], tasks["train"])
    experts = min(a.seed_limit or train, tasks["train"])
    steps = shape.get("steps") or (
        rate["success"] * shape["expert_steps"] + (1 - rate["success"]) * shape["limit"]
    )
    reply, plan, pairs = (shape.get(k) or rate[k] for k in ("reply", "plan", "pairs"))
    unique, growth = shape.get("unique", 1.0), reply + shape["observation"]
    size = shape.get("bytes") or episode_bytes(steps, growth)
    model, checkpoints = training_disk(rate["parameters"] * 1e9)

    def train_hours(count, length, epochs):
        return (count * length * epochs / rate["train"] + a.gpus * rate["load"]) / 3600

    def serve_hours(new, written):
        seconds = new / rate["prefill"] + written / rate["generate"] + 2 * a.gpus * rate["load"]
        return seconds / 3600

    def play(stage, plans, prompts, episodes, per_prefix):
        """A stage that asks for `plans` plans of `prompts` tasks and plays `episodes`, `per_prefix`
        of which share a first prompt. The servers read what is sent, except what they cached."""
        calls, first = episodes * steps, shape["agent_prompt"]
        sent = plans * shape["planner_prompt"] + episodes * (
            steps * first + growth * steps * (steps - 1) / 2
        )
        new = prompts * shape["planner_prompt"] + episodes * (first / per_prefix + steps * growth)
        written = plans * plan + calls * reply
        return {
            "stage": stage,
            "calls": plans + calls,
            "prompt": sent,
            "generated": written,
            "gpu": serve_hours(new, written),
            "disk": episodes * size,
            "env": (episodes * cpu["reset"] + calls * cpu["step"]) / 3600,
        }

    seeds = experts * shape.get("solved", 1.0)
    rows = min(a.sft_limit or seeds, seeds)
    tests = sum(min(a.eval_limit or tasks[s], tasks[s]) for s in tasks if s != "train")
    row, dpo_epochs = shape["planner_prompt"] + plan, a.dpo_epochs or a.epochs
    return [
        {
            "stage": "1 seed plans",
            "calls": seeds,
            "generated": seeds * plan,
            "gpu": 0.0,
            "prompt": seeds * (shape.get("teacher_prompt", 0) + shape["trajectory"]),
            "env": experts * cpu["expert"] / 3600,
            "disk": experts * shape["trajectory"] * CHARACTERS * 3,
        },
        {
            "stage": "2 SFT",
            "steps": math.ceil(rows / a.batch) * a.epochs,
            "env": 0.0,
            "gpu": train_hours(rows, row, a.epochs),
            "disk": model,
            "meanwhile": checkpoints,
        },
        play("3 sample and score", train * a.m, train, train * a.m * unique * a.n, a.n),
        {
            "stage": "4 DPO",
            "steps": math.ceil(train * pairs / a.batch) * dpo_epochs,
            "env": 0.0,
            # a pair is one sequence, its prompt once; the reference takes a third of an epoch
            "gpu": train_hours(train * pairs, row + plan, dpo_epochs + 1 / 3),
            "disk": model,
            "meanwhile": checkpoints,
        },
        play("5 evaluation", 2 * tests, 2 * tests, 3 * tests, 1),
    ]


def hours(row: dict, a) -> float:
    """Wall time of a stage: that of the GPUs or of the environment's cores, the longer one."""
    return max(row["gpu"] / a.gpus, row["env"] / a.cores)


def show(rows: list[dict], shape: dict, rate: dict, sources: dict, a) -> None:
    tasks = ", ".join(f"{n:,} {s} tasks" for s, n in shape["tasks"].items())
    print(f"{a.env}: {tasks}; M = {a.m}, N = {a.n}, {a.gpus} GPUs\n")
    columns = {
        "calls": ("model calls", 14, 0),
        "steps": ("optimizer steps", 17, 0),
        "prompt": ("prompt tokens", 17, 0),
        "generated": ("generated", 14, 0),
        "env": ("env core-h", 12, 1),
        "gpu": ("GPU-h", 9, 1),
        "hours": ("hours", 8, 1),
        "GB": ("GB", 8, 1),
    }
    for r in rows:
        r["hours"], r["GB"] = hours(r, a), r["disk"] / 1e9
    total = {"stage": "all", **{k: sum(r.get(k, 0) for r in rows) for k in columns}}
    print(f"{'stage':20}" + "".join(f"{name:>{width}}" for name, width, _ in columns.values()))
    for r in [*rows, total]:
        print(
            f"{r['stage']:20}"
            + "".join(
                f"{r[k]:{w},.{d}f}" if r.get(k) else f"{'-':>{w}}"
                for k, (_, w, d) in columns.items()
            )
        )
    seed = rows[0]
    bill = (seed["prompt"] * rate["teacher_in"] + seed["generated"] * rate["teacher_out"]) / 1e6
    most = most_disk([(r["disk"], r.get("meanwhile", 0.0)) for r in rows]) / 1e9
    print(
        f"\nteacher: about ${bill:,.0f}, with one call a plan; disk: at most {most:,.0f} GB at "
        f"once, in training, of which {max(r.get('meanwhile', 0.0) for r in rows) / 1e9:,.0f} GB "
        "are two checkpoints; the models to download are extra"
    )
    print("rates: " + "; ".join(f"{k} {rate[k]:g} ({sources[k]})" for k in RATES))
    seconds = common.environment(a.env).SECONDS
    print("environment, core-seconds: " + ", ".join(f"{k} {v:g}" for k, v in seconds.items()))


def actual_hours(run: Path) -> dict[str, float]:
    """Wall time of a run's stages, from the times at which `make` finished their files."""
    order = [
        ("1 seed plans", "seed_plans.jsonl"),
        ("agent", "agent/config.json"),
        ("2 SFT", "sft/config.json"),
        ("3 sample and score", "pairs.jsonl"),
        ("4 DPO", "mpo/config.json"),
        ("5 evaluation", "results.md"),
    ]
    done = sorted((p.stat().st_mtime, stage) for stage, name in order if (p := run / name).exists())
    return {stage: (t - before) / 3600 for (before, _), (t, stage) in itertools.pairwise(done)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", default="sciworld")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--m", type=int, default=5, help="plans a task")
    parser.add_argument("--n", type=int, default=5, help="rollouts a plan")
    parser.add_argument("--epochs", type=int, default=3, help="of SFT, and of DPO by default")
    parser.add_argument("--dpo_epochs", type=int)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--cores",
        type=int,
        default=os.cpu_count(),
        help="cores of the environment workers (default: this machine's)",
    )
    parser.add_argument("--limit", type=int, help="train tasks at most")
    parser.add_argument("--seed_limit", type=int, help="train tasks of stage 1 at most")
    parser.add_argument("--sft_limit", type=int, help="seed plans of stage 2 at most")
    parser.add_argument("--eval_limit", type=int, help="tasks of each test split at most")
    parser.add_argument("--types", nargs="+")
    parser.add_argument("--prompts")
    parser.add_argument("--sample", type=int, default=24, help="expert trajectories to measure")
    parser.add_argument("--run", help="a finished run folder to take the shapes from")
    parser.add_argument("--check", action="store_true", help="compare with the times of --run")
    for name, (value, source, text) in RATES.items():
        parser.add_argument(f"--{name}", type=float, help=f"{text} (default {value:g}, {source})")
    a = parser.parse_args()
    try:
        shape = asyncio.run(measure(a)) | (measure_run(Path(a.run)) if a.run else {})
    except common.InputError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    given = {k: getattr(a, k) for k in RATES if getattr(a, k) is not None}
    rate = {k: v for k, (v, _, _) in RATES.items()} | given
    sources = {k: "given" if k in given else s for k, (_, s, _) in RATES.items()}
    rows = estimate(shape, rate, a)
    show(rows, shape, rate, sources, a)
    if a.check and a.run:
        actual = actual_hours(Path(a.run))
        both = [
            (r["stage"], 60 * hours(r, a), 60 * actual[r["stage"]])
            for r in rows
            if r["stage"] in actual
        ]
        print("\nstage                 estimated, min      actual, min   ratio")
        total = ("all of these", sum(b[1] for b in both), sum(b[2] for b in both))
        for stage, guess, was in [*both, total]:
            print(f"{stage:20}{guess:16.1f}{was:17.1f}{guess / was:8.2f}")


if __name__ == "__main__":
    main()
