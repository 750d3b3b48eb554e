"""Make an environment's one-shot examples from expert trajectories of its train tasks.

    python data/make_examples.py NAME        # writes data/NAME/examples.json

One example per task type, with whole observations: the shortest text among the first trajectories
that are worth imitating; none without such a trajectory. data/NAME/thoughts.py says what is worth
imitating and what a person would think, in the environment's words:

    PREFIX              what the task instruction begins with
    FIXED               the task type whose example is for all types (key "*"), or None
    LONGEST             the most characters of an example
    REPEATED            pattern of the actions that may give the same observation twice: waiting
    cleaned(actions)    the expert's actions in the prompt's words, without those that are not
                        needed; they are played and have to succeed
    detour(u, steps)    why a trajectory is not worth imitating, or None
    thoughts(u, steps)  what a person would think before each action; "" for nothing new
"""

import argparse
import asyncio
import collections
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402

BATCH, TRIES = 12, 24  # trajectories per task type: played before one is chosen, played at most


def fault(u: str, steps: list, cls, words) -> str | None:
    """Why a trajectory is not worth imitating, or None. `words`: the module thoughts.py."""
    if failed := next((a for a, o in steps if cls.failed(o)), None):
        return f"an action fails: {failed}"
    counts = collections.Counter((a, o) for a, o in steps if not re.fullmatch(words.REPEATED, a))
    if again := next((a for (a, _), n in counts.items() if n > 1), None):
        return f"does the same twice and sees the same: {again}"
    if reason := words.detour(u, steps):
        return reason
    if not words.thoughts(u, steps)[0]:
        return "no thought for its first action"
    return "too long" if len(render(u, steps, words)) > words.LONGEST else None


def render(u: str, steps: list, words) -> str:
    """A trajectory as text, with thoughts."""
    lines = [words.PREFIX + u]
    for (action, observation), thought in zip(steps, words.thoughts(u, steps), strict=True):
        lines += [f"Thought: {thought}"] * bool(thought)
        lines += [f"Action: {action}", common.observation_message(observation, 0)["content"]]
    return "\n".join(lines)


async def trajectory(env, task: str, words) -> tuple[str, list] | None:
    """(u, [[action, observation], ...]) of the expert's cleaned actions; None if they fail."""
    e = await env("expert", task, deadline=600.0)
    if not e:
        return None
    u, steps = await env("reset", task), []
    for action in words.cleaned([action for action, _ in e["steps"]]):
        observation, _, done, success = await env("step", action)
        steps.append([action, observation])
        if done:
            return (u, steps) if success else None
    return None


async def example(pool, tasks: list[str], cls, words) -> tuple[str | None, collections.Counter]:
    """The best example for tasks of one type, or None, and why others were refused."""
    good, refused = [], collections.Counter()
    for number, task in enumerate(tasks[:TRIES], 1):
        found = await pool.use(task, lambda env, task=task: trajectory(env, task, words))
        if reason := fault(*found, cls, words) if found else "the actions do not succeed":
            refused[reason.split(":")[0]] += 1
        else:
            good.append(render(*found, words))
        if good and number % BATCH == 0:
            break
    return min(good, key=len, default=None), refused


async def main(env: str) -> None:
    folder, cls = common.environment_folder(env), common.environment(env)
    if not (folder / "thoughts.py").exists():
        raise common.InputError(f"{folder / 'thoughts.py'} does not exist: write it, see --help")
    words = common.load_module(folder / "thoughts.py", f"thoughts.{folder.name}")
    async with common.EnvPool(env, 1) as pool:  # one worker: the same file every time
        tasks = await common.list_tasks(pool, env, "train", [], None, None)
        kinds, examples = collections.defaultdict(list), {}
        for task in tasks:
            kinds[common.task_type(task)].append(task)
        for kind in sorted(kinds, key=lambda kind: kind != words.FIXED):
            text, refused = await example(pool, kinds[kind], cls, words)
            if text:
                examples["*" if kind == words.FIXED else kind] = text
            print(kind, f"{len(text)} characters" if text else "none", dict(refused), flush=True)
    if not examples:
        raise common.InputError(f"no trajectory of {env} is good enough for {folder}/examples.json")
    text = json.dumps(examples, indent=1, ensure_ascii=False)
    common.write_text(folder / "examples.json", text + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("env", metavar="NAME", help="a folder of data/, or a path")
    try:
        asyncio.run(main(parser.parse_args().env))
    except common.InputError as e:
        parser.exit(2, f"error: {e}\n")
