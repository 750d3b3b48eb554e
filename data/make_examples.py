"""Make a prompt folder's one-shot examples from expert trajectories of the train split.

    python data/make_examples.py sciworld        # writes data/sciworld/examples.json; or alfworld, webshop

One example per task type: of a few train tasks' trajectories the one of the best length, with a short thought before
the actions that begin a new sub-goal. Types whose shortest trajectory is long use the first example. WebShop's example
is bought in a small shop that is made up here.
"""

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

LONGEST, OBSERVATION_CHARS, TRIES = 22, 500, 6
BEST = {"sciworld": 0, "alfworld": 10, "webshop": 0}  # steps; in ALFWorld an example that had to search shows more than a lucky one

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
    "webshop": {
        "search": "I search for the kind of product together with what it should be like.",
        "product": "Its title has what I am looking for and its price is below the limit, so I look at it.",
        "option": "This is the right product. Before I buy it I choose the options that the task names.",
        "buy": "Everything the task asks for is chosen, so I buy it.",
    },
}

SHOP = [  # title, price, query, options
    ("Linen Table Runner with Tassels, 14 x 72 Inch", 12.5, "table runners", {}),
    ("Round Cotton Tablecloth, Machine Washable, Stain Resistant", 24.0, "tablecloths",
     {"color": ["ivory", "sage", "navy"], "size": ["60 inch", "70 inch"]}),
    ("Vinyl Tablecloth with Flannel Back, Wipe Clean", 15.99, "tablecloths", {"color": ["red", "blue"]}),
    ("Cotton Napkins, Set of 12, Machine Washable", 18.75, "napkins", {}),
    ("Round Placemats, Woven, Heat Resistant", 21.0, "placemats", {}),
    ("Machine Washable Bath Mat, Non Slip", 17.0, "bath mats", {}),
    ("Oak Serving Tray with Handles", 32.0, "serving trays", {}),
]


def made_up_shop(folder: str) -> None:
    """WebShop's files for `SHOP`; the goal is the second product."""
    products = [{"asin": f"B0EXAMPL{i:02}", "name": name, "pricing": f"${price}", "query": query,
                 "customization_options": {k: [{"value": v} for v in values] for k, values in options.items()}}
                for i, (name, price, query, options) in enumerate(SHOP)]
    wanted = {"attributes": ["machine washable", "stain resistant"], "instruction_attributes": ["machine washable", "stain resistant"],
              "instruction": "Find me a machine washable, stain resistant tablecloth"}
    for name, value in (("shuffle", products), ("ins_v2", {products[1]["asin"]: wanted})):
        common.write_text(Path(folder) / f"items_{name}.json", json.dumps(value))
    os.environ.update(WEBSHOP_DATA=folder, XDG_CACHE_HOME=folder)


def word_of(env: str, action: str) -> str:
    """What decides whether a thought is due: the verb; in WebShop what a click is for."""
    if env != "webshop":
        return action.split()[0]
    return ("search" if action.startswith("search") else "buy" if action == "click[buy now]" else
            "product" if action.startswith("click[b0") else "option")


def thought(env: str, action: str, before: str) -> str:
    word = word_of(env, action)
    if word == before or word not in THOUGHTS[env]:
        return ""
    return "Thought: " + THOUGHTS[env][word].format(action.removeprefix("teleport to ").removeprefix("go to ")) + "\n"


def render(env: str, e: dict) -> str:
    lines, before = [("Task: " if env != "alfworld" else "") + e["instruction"]], ""
    for action, observation in e["steps"]:
        lines.append(f"{thought(env, action, before)}Action: {action}")
        lines.append(common.observation_message(observation, 0 if env == "webshop" else OBSERVATION_CHARS)["content"])
        before = word_of(env, action)
    return "\n".join(lines)


async def main(env: str) -> None:
    async with common.EnvPool(env, 2) as pool:
        tasks = await common.list_tasks(pool, env, "train", None, None, None)
        examples, found = {}, {}
        kinds = {kind: [t for t in tasks if common.task_type(t) == kind][:TRIES] for kind in map(common.task_type, tasks)}
        await pool.each([t for some in kinds.values() for t in some], "expert", found.__setitem__)
        for kind, some in kinds.items():
            best = min((found[t] for t in some if found[t]), key=lambda e: abs(len(e["steps"]) - BEST[env]), default=None)
            if best and 4 <= len(best["steps"]) <= LONGEST:
                examples[kind] = render(env, best)
                print(kind, len(best["steps"]), "steps")
    first = {k: examples.pop(k) for k in ("find-plant", *examples) if k in examples}
    common.write_text(common.DATA / env / "examples.json", json.dumps(first, indent=1, ensure_ascii=False) + "\n")


with tempfile.TemporaryDirectory() as folder:
    if sys.argv[1] == "webshop":
        made_up_shop(folder)
    asyncio.run(main(sys.argv[1]))
