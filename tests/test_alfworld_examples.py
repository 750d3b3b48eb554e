"""ALFWorld's one-shot examples: what a detour is, and how the expert's search is shortened."""

import json
import re

import pytest

import common

FOLDER = common.DATA / "alfworld"
if not FOLDER.is_dir():
    pytest.skip("data/alfworld was removed", allow_module_level=True)
words = common.load_module(FOLDER / "thoughts.py", "thoughts.alfworld")
U = (
    "You are in the middle of a room. Looking quickly around you, you see a bed 1, a desk 1, a "
    "drawer 1, a garbagecan 1, and a shelf 1.\n\nYour task is to: "
)
LOOK, PUT = U + "examine the cd with the desklamp.", U + "put some cd in drawer."
SHELF = ["go to shelf 1", "On the shelf 1, you see a desklamp 1, and a keychain 1."]
DESK = ["go to desk 1", "On the desk 1, you see a book 1, and a cd 3."]
BED = ["go to bed 1", "On the bed 1, you see nothing."]
TAKE = ["take cd 3 from desk 1", "You pick up the cd 3 from the desk 1."]
LAMP = ["toggle desklamp 1", "You turn on the desklamp 1."]
DRAWER = ["go to drawer 1", "The drawer 1 is closed."]
OPEN = ["open drawer 1", "You open the drawer 1. The drawer 1 is open. In it, you see nothing."]
DOWN = ["put cd 3 in/on drawer 1", "You move the cd 3 to the drawer 1."]
KEYCHAIN = [
    ["take keychain 1 from shelf 1", "You pick up the keychain 1 from the shelf 1."],
    BED,
    ["put keychain 1 in/on bed 1", "You move the keychain 1 to the bed 1."],
]


@pytest.mark.parametrize(
    "u, steps, reason",
    [
        (LOOK, [SHELF, DESK, TAKE, SHELF, LAMP], None),
        (PUT, [SHELF, DESK, TAKE, DRAWER, OPEN, DOWN], None),
        (
            LOOK,
            [SHELF, *KEYCHAIN, DESK, TAKE, SHELF, LAMP],
            "takes an object that the task does not name: keychain 1",
        ),
        (
            PUT,
            [SHELF, DESK, TAKE, BED, ["put cd 3 in/on bed 1", "You move it."]],
            "puts an object where the task does not want it: bed 1",
        ),
        (
            PUT,
            [SHELF, DESK, TAKE, DRAWER, OPEN, ["close drawer 1", "You close it."], DOWN],
            "does something that the task does not need: close drawer 1",
        ),
        (
            LOOK,
            [SHELF, DRAWER, OPEN, SHELF, DESK, TAKE, SHELF, LAMP],
            "walks back and forth: shelf 1",
        ),
        (PUT, [SHELF, DESK, TAKE, BED, DRAWER, OPEN, DOWN], "walks back and forth: bed 1"),
        (
            PUT,
            [SHELF, BED, DESK, TAKE, DRAWER, OPEN, DOWN],
            "looks for an object where it should not be: cd on the bed 1",
        ),
        (
            LOOK,
            [DRAWER, SHELF, DESK, TAKE, SHELF, LAMP],
            "leaves a place that has or may have what it needs: drawer 1",
        ),
        (PUT, [DESK, TAKE, DRAWER, OPEN, DOWN], "finds everything at the first place"),
        (
            LOOK,
            [SHELF, DESK, TAKE],
            "ends before what the task asks for last: take cd 3 from desk 1",
        ),
    ],
)
def test_detours(u, steps, reason):
    assert words.detour(u, steps) == reason


def test_thoughts_say_why():
    assert words.thoughts(LOOK, [SHELF, DESK, TAKE, SHELF, LAMP]) == [
        "First I need a cd. A cd is usually on a shelf or a desk, or in a drawer. I start with the "
        "shelf 1.",
        "There is no cd on the shelf 1, so I look on the desk 1 next.",
        "There is a cd on the desk 1, so I take it.",
        "I have the cd. Now I need a desklamp to look at it. I saw desklamp 1 on the shelf 1, so I "
        "go back there.",
        "The desklamp 1 is here, so I switch it on to look at the cd in its light.",
    ]
    assert words.thoughts(PUT, [SHELF, DESK, TAKE, DRAWER, OPEN, DOWN])[3:] == [
        "I have the cd. What is left is to put it in the drawer 1.",
        "The drawer 1 is closed, so I open it to put the cd in.",
        "",
    ]


def test_cleaned():
    """The search keeps the usual places only; what comes after it stays as it is."""
    kept = [
        "go to shelf 1",
        "go to desk 1",
        "take cd 3 from desk 1",
        "go to drawer 1",
        "open drawer 1",
        "put cd 3 in/on drawer 1",
    ]
    actions = ["go to bed 1", kept[0], "go to garbagecan 1", *kept[1:5], kept[5], "close drawer 1"]
    assert words.cleaned(actions) == kept


def test_the_examples_take_what_the_task_names():
    for kind, example in json.loads((FOLDER / "examples.json").read_text()).items():
        task = re.search(r"Your task is to: (.*)", example)[1]
        taken = re.findall(r"^Action: take (\w+) \d+ from", example, re.M)
        assert len(taken) == 1 + (" two " in task), kind
        assert all(re.search(rf"\b{thing}\b", task) for thing in taken), kind
