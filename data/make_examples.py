"""Make a prompt folder's one-shot examples from expert trajectories of the train split.

    python data/make_examples.py sciworld        # writes data/sciworld/examples.json; or alfworld

One example per task type: of a few train tasks' trajectories the one of the best length, with a short thought before
the actions that begin a new sub-goal. Types whose shortest trajectory is long use the first example.
"""

import asyncio
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

LONGEST, OBSERVATION_CHARS, TRIES = 22, 500, 6
BEST = {"sciworld": 0, "alfworld": 10}  # steps; in ALFWorld an example that had to search shows more than a lucky one

THOUGHTS = {  # by the first word of the action; said when the word before it was another
    "sciworld": {
        "teleport": "What I need next should be in the {0}, so I go there.",
        "look": "I look at what is here before I choose.",
        "focus": "This is the object the task is about, so I focus on it.",
        "pick": "I take it with me, because I need it elsewhere.",
        "move": "Now I put it where the task wants it.",
        "connect": "The parts are at hand, so I build the circuit step by step.",
        "activate": "I switch the device on.",
        "use": "I have the tool in my hands and the object before me, so I use it.",
        "pour": "I bring the ingredients together.",
        "mix": "Everything is in one container, so I mix it.",
        "wait1": "The change takes time, so I wait.",
        "examine": "I check what has become of it.",
    },
    "alfworld": {
        "go": "Next I should be at the {0}.",
        "open": "It is closed, so I have to open it to see what is inside.",
        "take": "Here is what I was looking for, so I take it.",
        "put": "This is where the task wants it, so I put it down.",
        "clean": "I hold it and stand at the sink, so I clean it.",
        "heat": "I hold it and stand at the microwave, so I heat it.",
        "cool": "I hold it and stand at the fridge, so I cool it.",
        "toggle": "The lamp is here and the object is in my hand, so I switch the lamp on.",
    },
}


def thought(env: str, action: str, before: str) -> str:
    word = action.split()[0]
    if word == before or word not in THOUGHTS[env]:
        return ""
    return "Thought: " + THOUGHTS[env][word].format(action.removeprefix("teleport to ").removeprefix("go to ")) + "\n"


def render(env: str, e: dict) -> str:
    lines, before = [("Task: " if env == "sciworld" else "") + e["instruction"]], ""
    for action, observation in e["steps"]:
        lines.append(f"{thought(env, action, before)}Action: {action}")
        lines.append(common.observation_message(observation, OBSERVATION_CHARS)["content"])
        before = action.split()[0]
    return "\n".join(lines)


async def main(env: str) -> None:
    async with common.EnvPool(env, 2) as pool:
        tasks = await common.list_tasks(pool, env, "train", None, None, None)
        examples = {}
        for kind in dict.fromkeys(map(common.task_type, tasks)):
            found = []
            for task in [t for t in tasks if common.task_type(t) == kind][:TRIES]:
                async with pool.session() as session:
                    found.append(await session("expert", task, deadline=600))
            best = min((e for e in found if e), key=lambda e: abs(len(e["steps"]) - BEST[env]), default=None)
            if best and 4 <= len(best["steps"]) <= LONGEST:
                examples[kind] = render(env, best)
                print(kind, len(best["steps"]), "steps")
    first = {k: examples.pop(k) for k in ("find-plant", *examples) if k in examples}
    common.write_text(common.DATA / env / "examples.json", json.dumps(first, indent=1, ensure_ascii=False) + "\n")


asyncio.run(main(sys.argv[1]))
