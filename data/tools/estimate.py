"""What `make all` will do and cost: `make estimate ENV=NAME GPUS=8`.

    python -m data.tools.estimate --env NAME --gpus 8 --m 5 --n 5

The numbers of tasks, plans and episodes are exact, except that equal plans of a task are scored
once. Lengths (tokens and steps) are measured on the trajectories of --sample tasks that the
environment's own expert plays; without such an expert those of steps are assumed, too. The rest
follows from these and from assumed rates, as printed; set your own.
"""

import argparse
import asyncio
import math
import os
import sys
from dataclasses import dataclass, fields

import common
from common import mean

CHARACTERS = 4.0  # of a token of English, with the tokenizers of current models
# name: (value, source, what it is). The rates of a GPU are assumptions for an 8B model on one H100.
RATES = {
    "generate": (2500.0, "assumed", "generated tokens/s of a GPU, many requests at once"),
    "prefill": (12000.0, "assumed", "new prompt tokens/s of a GPU"),
    "train": (6000.0, "assumed", "tokens/s of a GPU, full parameters, forward and backward"),
    "load": (120.0, "assumed", "seconds to start a server or load a model for training"),
    "success": (0.5, "assumed", "share of episodes that end early, with success"),
    "reply": (40.0, "assumed", "tokens of an agent's reply, thought and action"),
    "observation": (60.0, "assumed", "tokens of an observation, if there is no expert to measure"),
    "plan": (100.0, "assumed", "tokens of a plan"),
    "pairs": (0.6, "assumed", "share of the tasks that give a pair"),
    "teacher_in": (2.5, "assumed", "dollars for a million prompt tokens of an API's model"),
    "teacher_out": (10.0, "assumed", "dollars for a million generated tokens of it"),
    "parameters": (8.0, "the paper's model", "billion parameters of planner and agent"),
}


@dataclass
class Shape:
    """What trajectories of a few tasks look like; lengths in tokens, means."""

    tasks: dict[str, int]  # of each split
    solved: float  # share of the tasks that the expert solves
    trajectory: float  # actions and observations of a trajectory
    expert_steps: float  # steps of a trajectory
    step_limit: float  # step limit of an episode
    observation: float
    planner_prompt: float
    teacher_prompt: float  # without the trajectory
    agent_prompt: float  # the first one of an episode


@dataclass
class Row:
    """A stage, or all of them."""

    stage: str
    calls: float = 0.0  # of models
    steps: float = 0.0  # of the optimizer
    prompt: float = 0.0  # tokens
    generated: float = 0.0  # tokens
    env: float = 0.0  # core-hours of the environment
    gpu: float = 0.0  # GPU-hours
    hours: float = 0.0
    kept: float = 0.0  # bytes on disk
    meanwhile: float = 0.0  # bytes on disk while the stage runs


def tokens(text: str) -> float:
    return len(text) / CHARACTERS


async def measure(a, rate: dict[str, float]) -> Shape:
    """The shape of --sample tasks as the environment's own expert plays them, or as `rate` says."""
    cls = common.environment(a.env)
    prompts = common.Prompts(a.env, a.prompts)
    tasks = {}
    async with common.EnvPool(a.env, 2) as pool:
        for split in ("train", *common.evaluated_splits(a.env, a.tasks)):
            tasks[split] = await common.list_tasks(pool, a.env, split, a.tasks, a.types, None)
        sample = tasks["train"][: a.sample]
        if hasattr(cls, "expert"):
            found = await pool.each(sample, "expert")
        else:
            instructions = await pool.each(sample, "reset")
            found = {}
            for task, u in instructions.items():
                found[task] = {"instruction": u, "steps": assumed_steps(cls.max_steps(task), rate)}
    solved = {task: e for task, e in found.items() if e}
    trajectories = []
    observations = []
    prompt_lengths: dict[str, list[float]] = {"planner": [], "teacher": [], "agent": []}
    for task, e in solved.items():
        u = e["instruction"]
        trajectories.append(sum(tokens(action + seen) + 6 for action, seen in e["steps"]))
        observations += [tokens(seen) + 8 for _, seen in e["steps"]]
        asked = {
            "planner": prompts.planner(u),
            "teacher": prompts.teacher(u, ""),
            "agent": prompts.agent(u, None, task),
        }
        for who, messages in asked.items():
            prompt_lengths[who].append(tokens(messages[0]["content"]))
    return Shape(
        tasks={split: len(names) for split, names in tasks.items()},
        solved=rate["success"] if is_played(a.expert) else len(solved) / max(1, len(found)),
        trajectory=mean(trajectories),
        expert_steps=mean(len(e["steps"]) for e in solved.values()),
        step_limit=mean(cls.max_steps(task) for task in found),
        observation=mean(observations),
        planner_prompt=mean(prompt_lengths["planner"]),
        teacher_prompt=mean(prompt_lengths["teacher"]),
        agent_prompt=mean(prompt_lengths["agent"]),
    )


def is_played(expert: str | None) -> bool:
    """Whether the expert is a model, which plays the tasks, not a file or the environment's own."""
    return expert is not None and not expert.endswith(".jsonl")


def is_served(model: str) -> bool:
    """Whether a model is served on this machine, not behind an API or a server's URL."""
    name, url = common.split_url(model)
    return not url and common.is_local(name)


def assumed_steps(limit: int, rate: dict[str, float]) -> list:
    """The steps of a trajectory in an environment without an expert: half of the limit."""
    action = "x" * round(CHARACTERS * 4)
    observation = "x" * round(CHARACTERS * max(0, rate["observation"] - 8))
    return [[action, observation]] * max(1, limit // 2)


class Estimate:
    """The rows of all stages, from a shape, the rates and the settings `a`."""

    def __init__(self, shape: Shape, rate: dict[str, float], a):
        self.shape = shape
        self.rate = rate
        self.a = a
        self.cpu = common.environment(a.env).SECONDS
        self.train_tasks = at_most(a.limit, shape.tasks["train"])
        self.expert_tasks = at_most(a.seed_limit or a.limit, shape.tasks["train"])
        self.seed_plans = self.expert_tasks * shape.solved
        self.steps = rate["success"] * shape.expert_steps + (1 - rate["success"]) * shape.step_limit

    def rows(self) -> list[Row]:
        rows = [self.seed_stage(), self.sft(), self.scoring(), self.dpo(), self.evaluation()]
        if is_played(self.a.expert):
            rows.insert(0, self.expert())
        for row in rows:
            # of the GPUs or of the environment's cores, whichever takes longer
            row.hours = max(row.gpu / self.a.gpus, row.env / self.a.cores)
        return rows

    def expert(self) -> Row:
        """The episodes of the model --expert, --expert_tries of each task."""
        tries = self.a.expert_tries
        row = self._playing("1 expert", 0, 0, self.expert_tasks * tries, tries)
        if not is_served(self.a.expert):
            row.gpu = 0.0
        return row

    def seed_stage(self) -> Row:
        shape = self.shape
        seconds = 0.0 if self.a.expert else self.cpu["expert"]
        return Row(
            "1 seed plans",
            calls=self.seed_plans,
            prompt=self.seed_plans * (shape.teacher_prompt + shape.trajectory),
            generated=self.seed_plans * self.rate["plan"],
            env=self.expert_tasks * seconds / 3600,
            kept=self.expert_tasks * shape.trajectory * CHARACTERS * 3,
        )

    def sft(self) -> Row:
        examples = at_most(self.a.sft_limit, self.seed_plans)
        length = self.shape.planner_prompt + self.rate["plan"]
        return self._training("2 SFT", examples, length, self.a.epochs, self.a.epochs)

    def scoring(self) -> Row:
        plans = self.train_tasks * self.a.m
        return self._playing(
            "3 sample and score", plans, self.train_tasks, plans * self.a.n, self.a.n
        )

    def dpo(self) -> Row:
        pairs = self.train_tasks * self.rate["pairs"]
        # a pair is one sequence, with its prompt once
        length = self.shape.planner_prompt + 2 * self.rate["plan"]
        epochs = self.a.dpo_epochs or self.a.epochs
        # the reference's log-probabilities take a third of an epoch
        return self._training("4 DPO", pairs, length, epochs, epochs + 1 / 3)

    def evaluation(self) -> Row:
        """Greedy plans of two planners, and episodes with no plan and with theirs."""
        tests = 0
        for split, count in self.shape.tasks.items():
            if split != "train":
                tests += at_most(self.a.eval_limit, count)
        return self._playing("5 evaluation", 2 * tests, 2 * tests, 3 * tests, 1)

    def _training(
        self, stage: str, examples: float, length: float, epochs: int, passes: float
    ) -> Row:
        """A stage that trains for `epochs` and computes as much as `passes` epochs."""
        seconds = examples * length * passes / self.rate["train"] + self.a.gpus * self.rate["load"]
        kept, checkpoints = common.training_disk(self.rate["parameters"] * 1e9)
        return Row(
            stage,
            steps=math.ceil(examples / self.a.batch) * epochs,
            gpu=seconds / 3600,
            kept=kept,
            meanwhile=checkpoints,
        )

    def _playing(
        self, stage: str, plans: float, prompts: float, episodes: float, per_prefix: int
    ) -> Row:
        """A stage that asks for `plans` plans with `prompts` different prompts and plays
        `episodes`, of which `per_prefix` share a first prompt. The servers read what is sent,
        except for what they have in the cache."""
        shape = self.shape
        rate = self.rate
        first = shape.agent_prompt
        growth = rate["reply"] + shape.observation  # of an agent's prompt, each step
        calls = episodes * self.steps
        of_plans = plans * shape.planner_prompt
        conversation = growth * self.steps * (self.steps - 1) / 2
        sent = of_plans + episodes * (self.steps * first + conversation)
        new = prompts * shape.planner_prompt
        new += episodes * (first / per_prefix + self.steps * growth)
        generated = plans * rate["plan"] + calls * rate["reply"]
        seconds = new / rate["prefill"] + generated / rate["generate"]
        seconds += 2 * self.a.gpus * rate["load"]
        return Row(
            stage,
            calls=plans + calls,
            prompt=sent,
            generated=generated,
            env=(episodes * self.cpu["reset"] + calls * self.cpu["step"]) / 3600,
            gpu=seconds / 3600,
            kept=episodes * common.episode_bytes(self.steps, growth),
        )


def at_most(limit: int | None, count: float) -> float:
    return min(limit or count, count)


def show(rows: list[Row], shape: Shape, rate: dict, sources: dict, a) -> None:
    tasks = ", ".join(f"{n:,} {split} tasks" for split, n in shape.tasks.items())
    print(f"{a.env}: {tasks}; M = {a.m}, N = {a.n}, {a.gpus} GPUs\n")
    print_table(rows)
    most = common.most_disk([(row.kept, row.meanwhile) for row in rows])
    checkpoints = max(row.meanwhile for row in rows)
    bills = {row.stage: dollars(row, rate) for row in rows}
    print(f"\nteacher: about ${bills['1 seed plans']:,.0f}, with one call a plan", end="; ")
    if is_played(a.expert) and not is_served(a.expert):
        print(f"expert: about ${bills['1 expert']:,.0f}", end="; ")
    print(f"disk: at most {most / 1e9:,.0f} GB at once, in training,", end=" ")
    print(f"of which {checkpoints / 1e9:,.0f} GB are two checkpoints", end="; ")
    print("the models to download are extra")
    print("rates: " + "; ".join(f"{name} {rate[name]:g} ({sources[name]})" for name in RATES))
    seconds = common.environment(a.env).SECONDS
    print("environment, core-seconds: " + ", ".join(f"{k} {v:g}" for k, v in seconds.items()))


def dollars(row: Row, rate: dict[str, float]) -> float:
    """What the tokens of a stage cost if they are those of an API's model."""
    return (row.prompt * rate["teacher_in"] + row.generated * rate["teacher_out"]) / 1e6


def print_table(rows: list[Row]) -> None:
    """A line for each stage and one for their sum."""
    total = Row("all")
    for field in fields(Row)[1:]:
        setattr(total, field.name, sum(getattr(row, field.name) for row in rows))
    # field: (head, width, decimals, divided by)
    columns = {
        "calls": ("model calls", 14, 0, 1),
        "steps": ("optimizer steps", 17, 0, 1),
        "prompt": ("prompt tokens", 17, 0, 1),
        "generated": ("generated", 14, 0, 1),
        "env": ("env core-h", 12, 1, 1),
        "gpu": ("GPU-h", 9, 1, 1),
        "hours": ("hours", 8, 1, 1),
        "kept": ("GB", 8, 1, 1e9),
    }
    head = "".join(f"{name:>{width}}" for name, width, *_ in columns.values())
    print(f"{'stage':20}{head}")
    for row in [*rows, total]:
        line = f"{row.stage:20}"
        for field, (_, width, decimals, unit) in columns.items():
            value = getattr(row, field) / unit
            line += f"{value:{width},.{decimals}f}" if value else f"{'-':>{width}}"
        print(line)


def parse_arguments() -> argparse.Namespace:
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
    cores = "cores of the environment workers (default: this machine's)"
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help=cores)
    parser.add_argument("--limit", type=int, help="train tasks at most")
    parser.add_argument("--seed_limit", type=int, help="train tasks of stage 1 at most")
    parser.add_argument("--sft_limit", type=int, help="seed plans of stage 2 at most")
    parser.add_argument("--eval_limit", type=int, help="tasks of each test split at most")
    parser.add_argument("--tasks", nargs="+", default=[], help="lists of tasks, as of the stages")
    parser.add_argument("--expert", help="the model that is the expert, see 01_seed_plans.py")
    parser.add_argument("--expert_tries", type=int, default=4)
    parser.add_argument("--types", nargs="+")
    parser.add_argument("--prompts")
    parser.add_argument("--sample", type=int, default=24, help="expert trajectories to measure")
    for name, (value, source, text) in RATES.items():
        parser.add_argument(f"--{name}", type=float, help=f"{text} (default {value:g}, {source})")
    return parser.parse_args()


def main() -> None:
    a = parse_arguments()
    rate = {}
    sources = {}
    for name, (value, source, _) in RATES.items():
        given = getattr(a, name)
        rate[name] = value if given is None else given
        sources[name] = source if given is None else "given"
    try:
        shape = asyncio.run(measure(a, rate))
    except common.InputError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    rows = Estimate(shape, rate, a).rows()
    show(rows, shape, rate, sources, a)


if __name__ == "__main__":
    main()
