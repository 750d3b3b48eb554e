"""`make estimate`: its numbers for the corridor, worked out by hand."""

import sys

import pytest
from conftest import CORRIDOR, flags

import common
from data.tools import estimate

# A run with 8 train tasks and two test splits of 8. To generate a token, to train on one and to
# load a model each take a GPU an hour; prompts take no time.
TOKEN_AN_HOUR = 1 / 3600
SETTINGS = flags(
    env=CORRIDOR,
    gpus=2,
    cores=4,
    m=2,
    n=3,
    batch=3,
    epochs=2,
    success=0.5,
    pairs=0.5,
    plan=10,
    reply=5,
    generate=TOKEN_AN_HOUR,
    train=TOKEN_AN_HOUR,
    prefill="inf",
    load=3600,
    teacher_in=1e6,  # a dollar for a token
    teacher_out=2e6,
)
# of the expert, on the 4 lamps and the 4 keys, where the thing is 1, 2, 3 or 1 rooms away
EXPERT_STEPS = (2 + 3 + 4 + 2) / 4
STEP_LIMIT = (6 + 8) / 2
STEPS = 0.5 * EXPERT_STEPS + 0.5 * STEP_LIMIT  # half of the episodes end early
INSTRUCTION = (len("Find the lamp of corridor 0.") + len("Find the key of corridor 0.")) / 2
PLANNER_PROMPT = (len("Write a plan for a task in a corridor.\n") + INSTRUCTION) / 4
TEACHER_PROMPT = (len("Turn this trajectory into a plan.\n\n\n") + INSTRUCTION) / 4
FIRST_STEPS = 0.75 * len("walk onYou see nothing.")
LAMP = FIRST_STEPS + len("walk onYou see a lamp." + "take lampYou have the lamp.")
KEY = FIRST_STEPS + len("walk onYou see a key." + "take keyYou have the key.")
TRAJECTORY = (LAMP + KEY) / 2 / 4 + 6 * EXPERT_STEPS  # 4 characters a token, 6 tokens around a step


@pytest.fixture
def table(monkeypatch, capsys) -> dict[str, list[str]]:
    """The lines of the estimate: {stage: its columns}, and {"teacher": its words}."""
    seconds = {"expert": 3600, "reset": 0, "step": 0}
    monkeypatch.setattr(common.environment(CORRIDOR), "SECONDS", seconds)
    monkeypatch.setattr(sys, "argv", ["estimate", *SETTINGS])
    estimate.main()
    lines = {}
    for line in capsys.readouterr().out.splitlines():
        lines[line[:20].strip()] = line[20:].replace(",", "").split()
        if line.startswith("teacher: "):
            lines["teacher"] = line.split()
    return lines


@pytest.mark.slow
def test_the_tasks_of_a_list(monkeypatch, capsys, tmp_path):
    (tmp_path / "train.json").write_text('[["find-lamp", 1], ["find-key", 1], ["find-key", 2]]')
    (tmp_path / "dev.json").write_text('[["find-key", 11]]')
    monkeypatch.setattr(sys, "argv", ["estimate", *SETTINGS, "--tasks", str(tmp_path)])
    estimate.main()
    assert f"{CORRIDOR}: 3 train tasks, 1 seen tasks; M = 2" in capsys.readouterr().out


def test_estimate(table):
    stages = ("1 seed plans", "2 SFT", "3 sample and score", "4 DPO", "5 evaluation", "all")
    calls, steps, _, generated, env, gpu, hours, _ = zip(*[table[s] for s in stages], strict=True)
    # a seed plan of each of 8 tasks; 16 plans and 48 episodes; 2 plans and 3 episodes of 16 tasks
    played = 48 * STEPS
    assert played == 234
    assert calls == ("8", "-", f"{16 + 234}", "-", f"{32 + 234}", f"{8 + 250 + 266}")
    # 8 seed plans and 4 pairs, in batches of 3, twice
    assert steps == ("-", "6", "-", "4", "-", "10")
    asked = [10 * 8, 0, 10 * 16 + 5 * 234, 0, 10 * 32 + 5 * 234]
    assert generated == ("80", "-", "1330", "-", "1490", f"{sum(asked)}")
    assert env == ("8.0", "-", "-", "-", "-", "8.0")
    # two GPUs load one model to train and two to play; DPO has its reference in a third of an epoch
    sft = 8 * (PLANNER_PROMPT + 10) * 2 + 2
    dpo = 4 * (PLANNER_PROMPT + 2 * 10) * (2 + 1 / 3) + 2
    gpus = [0, sft, 1330 + 4, dpo, 1490 + 4]
    assert gpu == ("-", *[f"{n:.1f}" for n in gpus[1:]], f"{sum(gpus):.1f}")
    # two GPUs; the expert has four cores
    wall = [8 / 4, *[n / 2 for n in gpus[1:]]]
    assert hours == (*[f"{n:.1f}" for n in wall], f"{sum(wall):.1f}")
    bill = 8 * (TEACHER_PROMPT + TRAJECTORY + 2 * 10)
    assert table["teacher"][:3] == ["teacher:", "about", f"${bill:,.0f},"]
