"""The committed one-shot examples: their form. Each environment's tests play them again."""

import json
import re

import pytest

import common
from common import DATA, InputError


def examples_of(env: str) -> dict[str, str]:
    return json.loads((DATA / env / "examples.json").read_text())


def turns(example: str) -> tuple[str, list[tuple[str, str, str]]]:
    """(task, [(thought or "", action, observation), ...]); the example has nothing else."""
    task, *parts = re.split(r"\n(?=(?:Thought|Action|Observation): )", example)
    assert re.fullmatch("(T?AO)+", "".join(part[0] for part in parts)), "each part in its place"
    found = []
    thought = ""
    for part in parts:
        kind, text = part.split(": ", 1)
        if kind == "Thought":
            thought = text
        elif kind == "Action":
            action = text
        else:
            found.append((thought, action, text))
            thought = ""
    return task, found


COMMITTED = []
for path in sorted(DATA.glob("*/examples.json")):
    for kind in examples_of(path.parent.name):
        COMMITTED.append((path.parent.name, kind))


@pytest.mark.parametrize("env, kind", COMMITTED)
def test_committed_examples(env, kind):
    """Whole observations, replies that parse, a first thought, nothing said or done in vain."""
    example = examples_of(env)[kind]
    task, found = turns(example)
    assert task.startswith(("Task: ", "You are in the middle of a room.")) and " ..." not in example
    thoughts = []
    for thought, action, _ in found:
        reply = f"Action: {action}"
        if thought:
            thoughts.append(thought)
            reply = f"Thought: {thought}\n{reply}"
        assert common.parse_reply(reply) == (reply, action)
    assert found[0][0] and len(set(thoughts)) == len(thoughts) >= 2, "no phrase is repeated"
    steps = [turn[1:] for turn in found if not re.match("go to |wait|pour ", turn[1])]
    assert len(set(steps)) == len(steps), "nothing is done twice with the same result"
    try:
        cls = common.environment(env)
    except InputError as e:
        pytest.skip(str(e))
    assert kind == "*" or len(found) <= cls.MAX_STEPS[kind]
    assert not any(cls.failed(observation) for _, _, observation in found)
