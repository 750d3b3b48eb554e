"""One-shot examples: the committed ones, and which trajectories are refused."""

import asyncio
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CORRIDOR

import common
from common import DATA, InputError, parse_reply

make_examples = common.load_module(DATA / "make_examples.py")


def hook(folder: Path):
    return common.load_module(folder / "thoughts.py", f"thoughts.{folder.name}")


def examples_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / "examples.json").read_text())


def turns(example: str) -> tuple[str, list]:
    """(task, [(thought or "", action, observation)]); every part must be in its place."""
    task, *parts = re.split(r"\n(?=(?:Thought|Action|Observation): )", example)
    found, thought = [], ""
    for part in parts:
        kind, text = part.split(": ", 1)
        if kind == "Thought":
            assert not thought, part
            thought = text
        elif kind == "Action":
            reply = f"Thought: {thought}\n{part}" if thought else part
            assert parse_reply(reply) == (reply, text)
            found.append([thought, text, None])
            thought = ""
        else:
            assert found[-1][2] is None, part
            found[-1][2] = text
    assert not thought and found[-1][2], "an example ends with an observation"
    return task, found


COMMITTED = [
    (path.parent, kind)
    for path in sorted(DATA.glob("*/examples.json"))
    for kind in examples_of(path.parent)
]


@pytest.mark.parametrize("folder, kind", COMMITTED, ids=lambda x: getattr(x, "name", x))
def test_committed_examples(folder, kind):
    """They parse, are whole, are what thoughts.py makes of them, and have no detour."""
    example, words = examples_of(folder)[kind], hook(folder)
    task, found = turns(example)
    assert task.startswith(words.PREFIX) and " ..." not in example
    steps = [[action, observation] for _, action, observation in found]
    u = task.removeprefix(words.PREFIX)
    assert make_examples.render(u, steps, words) == example
    said = [thought for thought, *_ in found if thought]
    assert said[0] == found[0][0] and len(set(said)) == len(said) >= 2, "no phrase is repeated"
    try:
        cls = common.environment(folder.name)
    except InputError as e:
        pytest.skip(str(e))
    assert make_examples.fault(u, steps, cls, words) is None
    assert len(steps) <= cls.MAX_STEPS[words.FIXED if kind == "*" else kind]


GOOD = [["walk on", "You see nothing."], ["walk on", "You see a key."], ["take key", "Done."]]
WORDS = SimpleNamespace(
    PREFIX="Task: ",
    LONGEST=500,
    REPEATED="wait",
    detour=lambda u, steps: "dances: jig" if "jig" in dict(steps) else None,
    thoughts=lambda u, steps: ["" if a == "stand" else f"I {a}." for a, _ in steps],
)


@pytest.mark.parametrize(
    "steps, reason",
    [
        (GOOD, None),
        ([["wait", "You wait."], ["wait", "You wait."], *GOOD], None),
        (
            [["walk on", "You see nothing."], *GOOD],
            "does the same twice and sees the same: walk on",
        ),
        ([["take key", "You cannot do that."], *GOOD], "an action fails: take key"),
        ([["jig", "You dance."], *GOOD], "dances: jig"),
        ([["stand", "You stand."], *GOOD], "no thought for its first action"),
        ([["walk on", "You see nothing" + 70 * " at all"], *GOOD], "too long"),
    ],
)
def test_faults(steps, reason):
    cls = common.environment(CORRIDOR)
    assert make_examples.fault("Find it.", steps, cls, WORDS) == reason


HOOK = """
PREFIX, FIXED, LONGEST, REPEATED = "Task: ", "find-key", 1000, "walk on"


def cleaned(actions):
    return actions


def detour(u, steps):
    return "is far: " + u if len(steps) > 3 else None


def thoughts(u, steps):
    return ["I look for the thing.", *[""] * (len(steps) - 1)]
"""


def test_make_examples(tmp_path, capsys):
    """Of the good trajectories the shortest; the fixed type's example is for all types."""
    folder = tmp_path / "hallway"
    shutil.copytree(CORRIDOR, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "thoughts.py").write_text(HOOK)
    asyncio.run(make_examples.main(str(folder)))
    examples = examples_of(folder)
    assert list(examples) == ["*", "find-lamp"]
    assert examples["*"] == (
        "Task: Find the key of corridor 0.\nThought: I look for the thing.\nAction: walk on\n"
        "Observation: You see a key.\nAction: take key\nObservation: You have the key."
    )
    assert "{'is far': 1}" in capsys.readouterr().out


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="corridor/thoughts.py does not exist"):
        asyncio.run(make_examples.main(CORRIDOR))
    folder = tmp_path / "gallery"
    shutil.copytree(CORRIDOR, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "thoughts.py").write_text(HOOK.replace("1000", "10"))
    with pytest.raises(InputError, match="no trajectory of .* is good enough for .*examples.json"):
        asyncio.run(make_examples.main(str(folder)))
    assert not (folder / "examples.json").exists()
