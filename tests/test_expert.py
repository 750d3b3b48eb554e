"""Stage 1 without the environment's own expert: a model that plays, or a file of trajectories; and
the README's smallest environment, which has none."""

import re
import shutil
import sys
from types import SimpleNamespace

import pytest
from conftest import CORRIDOR, ROOT, run_make, stage, write_jsonl

import common
from common import InputError, plan_reply, read_rows
from data.tools import estimate

ev = stage("05_eval")
score = stage("03_sample_score")
seed = stage("01_seed_plans")
Corridor = common.environment(CORRIDOR)
LAMPS = [f"find-lamp/{number}" for number in range(4)]


class Player:
    """A model that finds lamps, and touches the trap where it is to find a key.

    At temperature 0 it first does what cannot be done, at 0.3 it thinks and goes straight there, at
    0.6 its first reply has no action, and at higher temperatures it loses."""

    def __init__(self):
        self.temperatures = []

    def __call__(self, messages, body):
        self.temperatures.append(body["temperature"])
        seen = messages[-1]["content"]
        started = len(messages) > 1
        if "lamp" not in messages[0]["content"] or body["temperature"] > 0.6:
            return "Action: touch the trap"
        if not started and body["temperature"] == 0:
            return "Action: dance"
        if not started and body["temperature"] == 0.6:
            return "I do not know."
        if "You see a lamp" in seen:
            return "Action: take lamp"
        if body["temperature"] == 0.3:
            return "**Thought:** It is not here,\nso I go on.\n**Action:** walk on"
        return "Action: walk on"


def settings(out, **more) -> dict:
    return {"env": CORRIDOR, "out": str(out), "teacher": "rules", "workers": 1, **more}


def test_a_model_as_the_expert(tmp_path, chat_server, capsys):
    """The shortest success is the trajectory; a run goes on where the one before ended."""
    player = Player()
    server = chat_server(player)
    a = settings(tmp_path, expert=server.url, expert_tries=3, types=["find-lamp"], plan_share=0.0)
    seed.main(seed.Args(**a))
    said = capsys.readouterr().out
    assert "12 of 12 episodes successful; ends: success 12" in said
    assert "expert: 4 of 4 tasks solved" in said and "left out" not in said
    rows = read_rows(tmp_path / "trajectories.jsonl")
    assert [row["task"] for row in rows] == LAMPS
    for row in rows:
        e = Corridor().expert(row["task"])
        assert {field: row[field] for field in e} == e
        assert row["expert"] == "scripted" and row["by"] == "try 2", "of two equals the first"
        assert row["thoughts"] == ["It is not here, so I go on."] * (len(e["steps"]) - 1) + [""]
    talk = read_rows(tmp_path / "agent_sft.jsonl")[0]["messages"]
    assert talk[1]["content"] == "Thought: It is not here, so I go on.\nAction: walk on"
    assert talk[-1]["content"] == "Action: take lamp"
    assert set(player.temperatures) == {0.0, 0.3, 0.6}

    path = tmp_path / "expert_rollouts.jsonl"
    played = read_rows(path)
    crashed = {"end": "crash", "success": False, "steps": []}
    write_jsonl(path, [played[0] | crashed, *played[1:]])
    player.temperatures.clear()
    files = {file: (tmp_path / file).read_text() for file in ("trajectories.jsonl",)}
    seed.main(seed.Args(**a))
    assert set(player.temperatures) == {0.0}, "only the crashed episode is played again"
    a["expert_tries"] = 5
    player.temperatures.clear()
    seed.main(seed.Args(**a))
    assert player.temperatures == [0.9] * 4 + [1.0] * 4, "only the new tries are played"
    assert files == {file: (tmp_path / file).read_text() for file in files}


@pytest.mark.slow
def test_tasks_that_the_model_does_not_solve(tmp_path, chat_server, capsys):
    """They are left out. The environment's own expert does not take the model's trajectories."""
    a = settings(tmp_path)
    seed.main(seed.Args(**a, expert=chat_server(Player()).url, expert_tries=1))
    said = capsys.readouterr().out
    assert "expert: 4 of 8 tasks solved, 4 left out, by type:" in said
    assert "  find-lamp 4 of 4 (try 1 4)" in said and "  find-key 0 of 4" in said
    for file in ("seed_plans.jsonl", "agent_sft.jsonl"):
        assert [row["task"] for row in read_rows(tmp_path / file)] == LAMPS
    assert len(read_rows(tmp_path / "trajectories.jsonl")) == 8
    seed.main(seed.Args(**a))
    assert "expert: 8 of 8 tasks solved" in capsys.readouterr().out
    rows = read_rows(tmp_path / "trajectories.jsonl")
    assert len(rows) == 8 and not any("expert" in row for row in rows)
    with pytest.raises(InputError, match="the expert solved no task"):
        seed.main(seed.Args(**a, expert=chat_server(Player()).url, types=["find-key"]))


@pytest.mark.slow
def test_a_refused_expert_and_a_teacher_that_sees_other_trajectories(
    tmp_path, chat_server, capsys, monkeypatch
):
    """A refused episode is no success. A teacher's plan is asked for again if its trajectory is
    another one."""
    monkeypatch.setenv("MPO_MAX_RETRIES", "1")
    player = Player()
    asked = []

    def reply(messages, body):
        content = messages[0]["content"]
        if "Turn this trajectory" in content:
            asked.append(content)
            return plan_reply("Step 1: walk on\nStep 2: take the lamp")
        if "corridor 2." in content:
            return 400, '{"error": {"message": "filtered", "code": "content_filter"}}'
        return player(messages, body)

    url = chat_server(reply).url
    a = settings(tmp_path, expert=url, types=["find-lamp"], expert_tries=1)
    a["teacher"] = f"t@{url}"
    seed.main(seed.Args(**a))
    said = capsys.readouterr().out
    assert "1 of 4 episodes were refused, the first for find-lamp/2: " in said
    assert "expert: 3 of 4 tasks solved, 1 left out" in said and len(asked) == 3
    assert "Action: dance\nObservation: You cannot do that." in asked[0]
    a["expert_tries"] = 2
    seed.main(seed.Args(**a))
    assert len(asked) == 6 and "Thought: It is not here, so I go on.\nAction: walk on" in asked[-1]
    seed.main(seed.Args(**a))
    assert len(asked) == 6


def test_what_a_reply_says_before_its_action():
    for reply, thought in (
        ("Action: go", ""),
        ("Thought: I see.\nAction: go", "I see."),
        ("First, Action: is a word.\n\nI go.\n**Action**: go", "First, Action: is a word. I go."),
        ("<think>Hm.</think>*Thought*: I see. Action: go", "I see."),
        ("I go.\nAction:\ngo", "I go."),
    ):
        said, action = common.parse_reply(reply)
        assert action == "go" and common.parse_thought(said) == thought
    steps = [["a", "A"], ["b", "B"]]
    assert common.expert_steps(steps, ["", "I see."]) == [
        ["Action: a", "A"],
        ["Thought: I see.\nAction: b", "B"],
    ]


def test_a_file_of_trajectories(tmp_path):
    path = tmp_path / "mine.jsonl"
    own = {"task": LAMPS[0], "instruction": "Find it.", "steps": [["walk on", "You see a lamp."]]}
    write_jsonl(path, [own])
    a = seed.Args(**settings(tmp_path / "run", expert=str(path)))
    seed.check_expert(a)
    done, other = seed.trajectories_in_file(a, LAMPS[:2])
    assert done == {**own, "solved": True, "reward": 1.0, "expert": str(path)}
    assert other["task"] == LAMPS[1] and not other["solved"] and not other["steps"]
    for wrong in (
        {"steps": [["walk on"]]},
        {"steps": "walk on"},
        {"steps": [["walk on", None]]},
        {"thoughts": ["one", "two"]},
        {"thoughts": "one"},
    ):
        write_jsonl(path, [own, own | wrong])
        with pytest.raises(InputError, match="mine.jsonl:2: the field (steps|thoughts) must "):
            seed.check_expert(a)


def test_exploration_keeps_the_experts_thoughts(tmp_path):
    """Those of the trajectory, or else those that the teacher wrote."""
    row = {"instruction": "u", "steps": [["walk on", "o"]], "reward": 1.0, "solved": True}
    experts = write_jsonl(
        tmp_path / "trajectories.jsonl",
        [{**row, "task": LAMPS[0], "thoughts": ["own"]}, {**row, "task": LAMPS[1]}],
    )
    taught = [{"task": task, "thoughts": ["taught"]} for task in LAMPS[:2]]
    write_jsonl(tmp_path / "thoughts.jsonl", taught)
    found = score.load_experts(score.ExploreArgs(experts=str(experts)))
    assert [e["thoughts"] for e in found] == [["own"], ["taught"]]


# ---- an environment without an expert ------------------------------------------------------------


@pytest.fixture
def guess(tmp_path) -> str:
    """The README's environment, with the corridor's prompts."""
    folder = tmp_path / "guess"
    shutil.copytree(CORRIDOR, folder)
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (folder / "env.py").write_text(code)
    return str(folder)


def bisect(messages, body):
    """A player who halves the interval, a teacher, and `Hello` for a check."""
    if "Turn this trajectory" in messages[0]["content"]:
        return plan_reply("Step 1: Guess the number in the middle\nStep 2: repeat")
    low, high = 0, 99
    for said, seen in zip(messages[1::2], messages[2::2], strict=True):
        number = int(said["content"].split()[-1])
        if "Higher" in seen["content"]:
            low = number + 1
        else:
            high = number - 1
    return f"Action: {(low + high) // 2:02}"


@pytest.mark.slow
def test_the_smallest_environment(guess, tmp_path, chat_server, capsys, monkeypatch):
    """It is checked, and played by a model, which becomes its expert."""
    monkeypatch.setattr(common, "check_packages", lambda: "not imported")
    url = chat_server(bisect).url
    a = {"env": guess, "expert": url, "teacher": f"t@{url}", "limit": 5, "expert_tries": 1}
    seed.main(seed.Args(**a, out=str(tmp_path / "no"), check=True))
    said = capsys.readouterr().out
    assert "50 train tasks" in said and "WRONG" not in said and not (tmp_path / "no").exists()
    seed.main(seed.Args(**a, out=str(tmp_path / "run"), workers=1))
    said = capsys.readouterr().out
    assert "expert: 5 of 5 tasks solved" in said and "5 kept, 0 rejected" in said
    for row in read_rows(tmp_path / "run" / "trajectories.jsonl"):
        assert row["task"] == f"guess/{row['steps'][-1][0]}" and row["steps"][-1][1] == "Yes."


def test_what_needs_an_expert_says_so(guess, tmp_path, monkeypatch):
    a = {"env": guess, "out": str(tmp_path / "run")}
    for check in (False, True):
        with pytest.raises(
            InputError, match="needs `expert` in .*guess.* --expert MODEL, .*EXPERT="
        ):
            seed.main(seed.Args(**a, teacher="t@http://localhost:1/v1", check=check))
    with pytest.raises(InputError, match="--teacher rules needs `abstract` .*a model as --teacher"):
        seed.main(seed.Args(**a, teacher="rules", expert="m@http://localhost:1/v1"))
    with pytest.raises(InputError, match="--plans oracle needs `expert` .*leave it out"):
        ev.check_settings(ev.Args(**a, plans=["oracle"]))
    with pytest.raises(InputError, match="--expert_tries must be at least 1"):
        seed.main(seed.Args(**a, expert_tries=0))
    assert not (tmp_path / "run").exists()
    assert seed.check_plan("Step 1: juggle", set()) is None, "no VERBS: any verb"
    cls = common.environment(guess)
    assert cls.tests() == ["seen"] and cls.max_steps("guess/1") == 30


@pytest.mark.parametrize(
    "old, new, reply, said",
    [
        ("self.number\n", "self.nothing\n", "Action: 50", r"no attribute 'nothing' \(env.py:9\)"),
        (
            "",
            "",
            "I guess 50.",
            "30 of 30 replies hold no action: agent.txt has to",
        ),
    ],
    ids=["a step that raises", "no actions"],
)
def test_what_went_wrong_is_said(guess, tmp_path, chat_server, capsys, old, new, reply, said):
    """Also if no task is solved."""
    path = ROOT / guess / "env.py"
    path.write_text(path.read_text().replace(old, new))
    url = chat_server(lambda messages, body: reply).url
    a = {"env": guess, "expert": url, "teacher": f"t@{url}", "limit": 1, "expert_tries": 1}
    with pytest.raises(InputError, match="the expert solved no task"):
        seed.main(seed.Args(**a, out=str(tmp_path / "run"), workers=1))
    assert re.search(said, capsys.readouterr().out)


@pytest.mark.parametrize(
    "code, said",
    [
        ("class Guess(Environment)\n", r"env.py:1: expected ':'"),
        (
            "class Guess(Environment):\n    pass\n",
            r"env.py cannot be loaded: NameError: .*env.py:1\)",
        ),
    ],
)
def test_an_environment_that_cannot_be_loaded(guess, code, said):
    (ROOT / guess / "env.py").write_text(code)
    with pytest.raises(InputError, match=said):
        common.environment(guess)


@pytest.mark.parametrize(
    "file, text, said",
    [
        ("planner.txt", "", "and there is no planner.txt"),
        ("planner.txt", "Plan!", "planner.txt of .* has no {task}"),
        ("agent.txt", "{task}", "agent.txt of .* has no {plan_line}"),
        ("agent.txt", "{task}{plan_line}{exmaple}", "agent.txt has {exmaple}: write {example}"),
        ("teacher.txt", "{task}", "teacher.txt of .* has no {conversation}"),
    ],
)
def test_prompts_that_lack_something(guess, file, text, said):
    """A plan that the agent never reads would look like a plan that does not help."""
    (ROOT / guess / file).write_text(text)
    with pytest.raises(InputError, match=said):
        common.Prompts(guess)


def test_the_estimate_with_a_model_as_expert():
    """80 train tasks, 3 tries each: 240 episodes of (expert's steps + limit) / 2."""
    shape = estimate.Shape(
        tasks={"train": 80},
        solved=0.5,
        trajectory=100,
        expert_steps=4,
        step_limit=20,
        observation=10,
        planner_prompt=10,
        teacher_prompt=10,
        agent_prompt=10,
    )
    rate = {name: value for name, (value, _, _) in estimate.RATES.items()}
    a = SimpleNamespace(
        env=CORRIDOR, gpus=8, cores=1, m=2, n=1, epochs=1, dpo_epochs=None, batch=8, limit=None,
        seed_limit=None, sft_limit=None, eval_limit=None, expert="gpt-4o", expert_tries=3,
    )  # fmt: skip
    expert, seeds, *_ = estimate.Estimate(shape, rate, a).rows()
    assert expert.stage == "1 expert" and expert.calls == 240 * (4 + 20) / 2 and expert.gpu == 0
    assert seeds.stage == "1 seed plans" and seeds.calls == 40 and seeds.env == 0
    a.expert = "http://gpu:8000/v1"
    assert estimate.Estimate(shape, rate, a).rows()[0].gpu == 0
    a.expert = "owner/model"
    assert estimate.Estimate(shape, rate, a).rows()[0].gpu > 0
    a.expert = "runs/x/trajectories.jsonl"
    assert estimate.Estimate(shape, rate, a).rows()[0].stage == "1 seed plans"


@pytest.mark.slow
def test_make_passes_the_expert_on(guess, tmp_path, monkeypatch, capsys):
    told = "EXPERT=m@http://localhost:1/v1"
    commands = run_make("-n", "-B", "all", "agent-wkm", f"R={tmp_path}", told).stdout
    wkm, *others = sorted(
        (line for line in commands.replace("\\\n", " ").splitlines() if "01_seed_plans.py" in line),
        key=lambda line: "wkm" not in line,
    )
    assert others and all("--expert m@http://localhost:1/v1" in line for line in others)
    assert wkm.rstrip().endswith(f"--expert {tmp_path}/trajectories.jsonl")
    assert "--expert" not in run_make("-n", "-B", "all", f"R={tmp_path}").stdout

    checked = run_make("check", "WHAT=seed", f"ENV={guess}", f"R={tmp_path}/run")
    assert checked.returncode == 2 and "01_seed_plans.py: without --expert this" in checked.stdout
    monkeypatch.setattr(sys, "argv", ["estimate", "--env", guess, "--expert", "gpt-4o"])
    estimate.main()
    said = capsys.readouterr().out
    assert "1 expert" in said and re.search(r"; expert: about \$\d", said)
