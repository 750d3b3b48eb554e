"""Make an environment's one-shot examples from expert trajectories of its train tasks.

    python data/make_examples.py NAME        # writes data/NAME/examples.json

One example per task type: of a few trajectories the one with the best length, with a short thought
before the actions that begin a new sub-goal. Types without a trajectory of a suitable length use
the first example. The settings are in data/NAME/thoughts.json:

    best_steps, longest   the best length of a trajectory, and the longest to use
    observation_chars     observations are cut to this length; 0: never
    prefix                what the task instruction begins with
    first                 the task type whose example comes first
    thoughts              [[pattern, thought], ...]: the first pattern that matches an action
    decides
                          its thought ({0}: the pattern's group); it is written if the action before
                          had another one
"""

import asyncio
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402

TRIES = 6  # trajectories per task type


def render(e: dict, settings: dict) -> str:
    """A trajectory as text, with thoughts."""
    lines, before = [settings["prefix"] + e["instruction"]], None
    for action, observation in e["steps"]:
        patterns = [pattern for pattern, _ in settings["thoughts"]]
        found = ((n, re.match(pattern, action)) for n, pattern in enumerate(patterns))
        number, match = next(((n, m) for n, m in found if m), (action.split()[0], None))
        if match and number != before:
            lines.append("Thought: " + settings["thoughts"][number][1].format(*match.groups()))
        lines.append(f"Action: {action}")
        message = common.observation_message(observation, settings["observation_chars"])
        lines.append(message["content"])
        before = number
    return "\n".join(lines)


async def main(env: str) -> None:
    folder = common.environment_folder(env)
    settings = json.loads((folder / "thoughts.json").read_text())
    async with common.EnvPool(env, 2) as pool:
        tasks = await common.list_tasks(pool, env, "train", [], None, None)
        kinds: dict[str, list] = {}
        for task in tasks:
            kinds.setdefault(common.task_type(task), []).append(task)
        found = await pool.each([t for some in kinds.values() for t in some[:TRIES]], "expert")
    examples = {}
    for kind, some in kinds.items():
        best = min((found[t] for t in some[:TRIES] if found[t]), default=None,
                   key=lambda e: abs(len(e["steps"]) - settings["best_steps"]))
        if best and 4 <= len(best["steps"]) <= settings["longest"]:
            examples[kind] = render(best, settings)
            print(kind, len(best["steps"]), "steps")
    order = [k for k in (settings["first"], *examples) if k in examples]
    text = json.dumps({k: examples[k] for k in order}, indent=1, ensure_ascii=False)
    common.write_text(folder / "examples.json", text + "\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
