"""Stage 5: statistics, tables, plan positions, plan sources, the judge."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import CORRIDOR, stage, write_jsonl

import common
from common import InputError, plan_reply, read_rows

ev = stage("05_eval")
GOLDEN = Path(__file__).parent / "golden" / "plan_position.json"
SEEN = ["boil/1", "boil/2"]
UNSEEN = ["melt/1", "melt/2"]
SPLITS = {"seen": SEEN, "unseen": UNSEEN}


# ---- rows with known answers ---------------------------------------------------------------------


def episode(
    task, plan, reward, steps, agent="a", plan_position="instruction", end=None, **more
) -> dict:
    if end is None:
        end = "success" if reward == 1.0 else "steps"
    return {
        "task": task,
        "plan": plan,
        "rollout": 0,
        "agent": agent,
        "plan_position": plan_position,
        "agent_id": f"id of {agent}",
        "instruction": f"Your task is {task}.",
        "reward": reward,
        "success": reward == 1.0,
        "end": end,
        "format_errors": 0,
        "steps": [[f"Action: go {i}", f"You went {i}."] for i in range(steps)],
        **more,
    }


def condition(plans, split, tasks, agent="a", plan_position="instruction", **more) -> dict:
    return {
        "env": "lab",
        "agent": agent,
        "agent_id": f"id of {agent}",
        "plans": plans,
        "plan_position": plan_position,
        "split": split,
        "tasks": tasks,
        "plans_id": None if plans == "none" else f"id of {plans}",
        **more,
    }


def write_run(out: Path, conditions: list[dict], plans: dict, rollouts: list[dict]) -> Path:
    """A run folder of conditions, {(setting, task): plan} and episodes."""
    (out / "eval").mkdir(parents=True)
    rows = []
    for (setting, task), plan in plans.items():
        row = {
            "setting": setting,
            "task": task,
            "plan": plan,
            "instruction": f"Your task is {task}.",
            "plans_id": f"id of {setting}",
        }
        rows.append(row)
    write_jsonl(out / "eval" / "conditions.jsonl", conditions)
    write_jsonl(out / "eval" / "plans.jsonl", rows)
    write_jsonl(out / "eval" / "rollouts.jsonl", rollouts)
    return out


def write_report(*out) -> str:
    return ev.write_report(ev.ReportArgs([*map(str, out)]))


def numbers(out) -> dict:
    return json.loads((out / "results.json").read_text())


def by_setting(out) -> dict:
    return {(r["plans"], r["split"]): r for r in numbers(out)["results"]}


def rows_of(table: Path) -> list[list[str]]:
    """The head and the rows of a Markdown table, without the intervals."""
    rows = []
    for line in table.read_text().splitlines():
        if line.startswith("| "):
            rows.append([text.strip().split(" [")[0] for text in line.split("|")[1:-1]])
    return rows


@pytest.fixture
def known(tmp_path) -> Path:
    """Two splits of two tasks; without a plan 0, 0.5 | 0, 1, with mpo's 1, 1 | 0.5, 1, where 0.5
    is of an episode that could not be completed."""
    plans = {("mpo", task): f"Step 1: do {task}" for task in SEEN + UNSEEN}
    rollouts = []
    conditions = []
    for setting, rewards in (("none", [0.0, 0.5, 0.0, 1.0]), ("mpo", [1.0, 1.0, 0.5, 1.0])):
        for task, reward in zip(SEEN + UNSEEN, rewards, strict=True):
            end = "failure" if reward == 0.5 else None
            rollouts.append(episode(task, plans.get((setting, task)), reward, 4, end=end))
        for split, tasks in SPLITS.items():
            conditions.append(condition(setting, split, tasks))
    return write_run(tmp_path / "run", conditions, plans, rollouts)


def test_known_table(known):
    write_report(known)
    found = by_setting(known)
    metrics = ("reward", "solved", "ended", "reward_per_step")
    means = {key: [result[m]["mean"] for m in metrics] for key, result in found.items()}
    assert means == {
        ("none", "seen"): [0.25, 0.0, 0.5, 0.0625],
        ("none", "unseen"): [0.5, 0.5, 0.5, 0.125],
        ("none", "all"): [0.375, 0.25, 0.5, 0.09375],
        ("mpo", "seen"): [1.0, 1.0, 1.0, 0.25],
        ("mpo", "unseen"): [0.75, 0.5, 1.0, 0.1875],
        ("mpo", "all"): [0.875, 0.75, 1.0, 0.21875],
    }
    assert found["mpo", "seen"]["reward"]["interval"] == [1.0, 1.0]
    assert found["none", "seen"]["reward"]["interval"] == [0.0, 0.5]
    assert found["none", "all"]["ends"] == {"steps": 2, "failure": 1, "success": 1}
    table = (known / "table2.md").read_text()
    assert rows_of(known / "table2.md") == [
        ["agent", "plans", "seen (x100)", "unseen (x100)", "all (x100)", "gain over no plan, all"],
        ["a", "no plan", "25.0", "50.0", "37.5", ""],
        ["a", "MPO", "100.0", "75.0", "87.5", "+50.0"],
    ]
    assert "| +50.0 [+12.5, +87.5], p " in table
    assert r"a & MPO & 100.0 [100.0, 100.0] & 75.0" in table and r"\begin{tabular}" in table
    head, *rows = rows_of(known / "table6.md")
    assert head == [
        "agent",
        "plans",
        "seen, solved (x100)",
        "seen, ended (x100)",
        "unseen, solved (x100)",
        "unseen, ended (x100)",
        "all, solved (x100)",
        "all, ended (x100)",
        "gain over no plan, all, solved",
        "gain over no plan, all, ended",
    ]
    assert rows == [
        ["a", "no plan", "0.0", "50.0", "50.0", "50.0", "25.0", "50.0", "", ""],
        ["a", "MPO", "100.0", "100.0", "50.0", "100.0", "75.0", "100.0", "+50.0", "+50.0"],
    ]
    assert "Ended: the episode is done" in (known / "table6.md").read_text()
    assert (known / "fig3.png").stat().st_size > 1000
    assert not (known / "table4.md").exists() and not (known / "fig4.png").exists()


def test_missing_episodes_are_reported_not_averaged(known):
    rows = read_rows(known / "eval" / "rollouts.jsonl")
    rows[4] |= {"end": "crash", "reward": 0.0}  # mpo on boil/1
    write_jsonl(known / "eval" / "rollouts.jsonl", rows)
    text = write_report(known)
    found = by_setting(known)
    assert found["mpo", "seen"]["reward"] is None and found["mpo", "seen"]["missing"] == 1
    assert found["mpo", "all"]["missing"] == 1
    assert found["mpo", "unseen"]["reward"]["mean"] == 0.75
    assert "1 of 2 missing" in text and "1 of 4 missing" in text
    assert [d["split"] for d in numbers(known)["differences"]] == ["unseen"]


def test_figure_5_waits_for_all_its_episodes(tmp_path):
    plans = {}
    conditions = []
    for setting in ("fig5/m2n1", "fig5/m4n1"):
        for split, tasks in SPLITS.items():
            conditions.append(condition(setting, split, tasks))
            for task in tasks:
                plans[setting, task] = f"Step 1: do {task} {setting}"
    rows = [episode(task, plan, 1.0, 2) for (_, task), plan in plans.items()]
    all_but_one = [r for r in rows if r["task"] != UNSEEN[1]]
    out = write_run(tmp_path / "run", conditions, plans, all_but_one)
    write_report(out)
    assert (out / "fig5.md").exists() and not (out / "fig5.png").exists()
    write_jsonl(out / "eval" / "rollouts.jsonl", rows)
    write_report(out)
    assert (out / "fig5.png").exists()


def ask_again(run: Path, new: dict) -> str:
    """Append a condition to a run folder; the report of it."""
    with (run / "eval" / "conditions.jsonl").open("a") as f:
        f.write(json.dumps(new) + "\n")
    return write_report(run)


def test_conditions_of_an_earlier_planner_are_left_out(known):
    text = ask_again(known, condition("mpo", "seen", SEEN) | {"plans_id": "new"})
    found = by_setting(known)
    assert found["mpo", "seen"]["missing"] == 2
    assert {("mpo", "unseen"), ("mpo", "all")}.isdisjoint(found)
    assert "Left out: 1 " in text


def test_conditions_of_an_earlier_agent_are_left_out(known):
    ask_again(known, condition("none", "seen", SEEN) | {"agent_id": "new"})
    found = by_setting(known)
    assert found["none", "seen"]["missing"] == 2
    assert set(found) == {("none", "seen")} and not numbers(known)["differences"]


# ---- results recomputed from the rows ------------------------------------------------------------

TASKS_OF = {
    "seen": [f"boil/{i}" for i in range(9)],
    "unseen": [f"melt/{i}" for i in range(7)],
}
TASKS_OF["all"] = TASKS_OF["seen"] + TASKS_OF["unseen"]


@pytest.fixture(scope="module")
def random_run(tmp_path_factory) -> tuple[Path, dict, dict]:
    """(run folder, plans, episodes) of two agents; some plans of sft and mpo are equal."""
    draw = random.Random(1)
    plans = {}
    for setting in ("sft", "mpo"):
        for task in TASKS_OF["all"]:
            plans[setting, task] = f"Step 1: {setting if draw.random() < 0.7 else 'both'} {task}"
    columns = [("none", "instruction"), ("sft", "instruction")]
    columns += [("mpo", plan_position) for plan_position in common.PLAN_POSITIONS]
    conditions = []
    episodes = {}
    for agent in ("a", "b"):
        for setting, plan_position in columns:
            for split in ("seen", "unseen"):
                tasks = TASKS_OF[split]
                conditions.append(condition(setting, split, tasks, agent, plan_position))
            for task in TASKS_OF["all"]:
                plan = plans.get((setting, task))
                row = episode(
                    task,
                    plan,
                    round(draw.random(), 3),
                    draw.randint(0, 9),
                    agent,
                    plan_position,
                    format_errors=draw.randint(0, 2),
                    end=draw.choice(["steps", "context", "errors", "failure"]),
                )
                episodes.setdefault((agent, plan_position, task, plan), row)
    folder = tmp_path_factory.mktemp("random") / "run"
    write_run(folder, conditions, plans, list(episodes.values()))
    write_report(folder)
    return folder, plans, episodes


def test_results_recomputed_from_the_rows(random_run):
    """All means and counts from the raw rows by another way, to 1e-9."""
    out, plans, episodes = random_run
    results = numbers(out)["results"]
    assert len(results) == 2 * (2 + len(common.PLAN_POSITIONS)) * 3
    for name in ("results.png", "fig3.png", "fig4.png", "fig4.md", "table4.md"):
        assert (out / name).stat().st_size > 300
    for r in results:
        own = []
        for task in TASKS_OF[r["split"]]:
            plan = plans.get((r["plans"], task))
            own.append(episodes[r["agent"], r["plan_position"], task, plan])
        assert r["tasks"] == r["episodes"] == len(own) and not r["missing"]
        values = {
            "reward": [e["reward"] for e in own],
            "solved": [e["success"] for e in own],
            "ended": [e["end"] == "failure" for e in own],
            "reward_per_step": [e["reward"] / max(1, len(e["steps"])) for e in own],
        }
        for metric, found in values.items():
            assert r[metric]["mean"] == pytest.approx(sum(found) / len(own), abs=1e-9)
        assert r["ends"] == Counter(e["end"] for e in own)
        assert r["format_errors"] == sum(e["format_errors"] for e in own)
        assert r["context_overflows"] == sum(e["end"] == "context" for e in own)


def test_differences_are_those_of_the_results(random_run):
    out, _, _ = random_run
    rewards = {}
    for r in numbers(out)["results"]:
        rewards[r["agent"], r["plans"], r["plan_position"], r["split"]] = r["reward"]["mean"]
    compared = set()
    for d in numbers(out)["differences"]:
        over = d["over"]["plans"], d["over"]["plan_position"]
        own = rewards[d["agent"], d["plans"], d["plan_position"], d["split"]]
        base = rewards[d["agent"], *over, d["split"]]
        assert d["reward"]["mean"] == pytest.approx(own - base, abs=1e-9)
        compared.add((d["plans"], d["plan_position"], *over))
    first, second, third = common.PLAN_POSITIONS
    assert compared == {
        ("sft", first, "none", first),
        ("mpo", first, "none", first),
        ("mpo", first, "sft", first),
        ("mpo", second, "none", first),
        ("mpo", third, "none", first),
        ("mpo", second, "mpo", first),
        ("mpo", third, "mpo", first),
        ("mpo", third, "mpo", second),
    }


# ---- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gains", "mean", "p"),
    [
        ([1.0] * 5, 1.0, 2 / 2**5),  # exact: all signs
        ([0.0] * 20, 0.0, 1.0),
        ([0.5], 0.5, 1.0),
    ],
)
def test_gains_that_do_not_vary(gains, mean, p):
    assert ev.paired_test([gains], 0) == {"mean": mean, "interval": [mean, mean], "p": p}


def test_intervals():
    low, high = ev.mean_and_interval([[0.0, 1.0] * 50], 0)["interval"]  # standard error 0.05
    assert low == pytest.approx(0.4, abs=0.015) and high == pytest.approx(0.6, abs=0.015)
    found = ev.mean_and_interval([[0.0, 1.0] * 50, [1.0] * 9, [0.0]], 0)
    low, high = found["interval"]  # a third of the standard error
    assert found["mean"] == 0.5
    assert low == pytest.approx(0.467, abs=0.005) and high == pytest.approx(0.533, abs=0.005)


@pytest.mark.slow
def test_intervals_cover_and_p_values_are_level():
    """Of 300 samples of 60 tasks, about 95% of the intervals hold the true difference, and about 5%
    of the p-values without a difference are below 0.05."""
    import numpy as np

    draw = np.random.default_rng(3)
    covered = 0
    small = 0
    for i in range(300):
        base = draw.random(60)
        gain = (draw.random(60) < 0.2 + 0.5 * base) * 1.0 - (draw.random(60) < 0.1 + 0.5 * base)
        low, high = ev.mean_and_interval([gain], i)["interval"]
        covered += low <= 0.1 <= high
        null = (draw.random(60) < 0.5) * 1.0 - (draw.random(60) < 0.5)
        small += ev.paired_test([null], i)["p"] < 0.05
    assert 0.91 <= covered / 300 <= 0.985 and 0.015 <= small / 300 <= 0.09


# ---- the judge -----------------------------------------------------------------------------------


def judgement(correctness, followability, standardization, overall) -> str:
    """A judge's reply."""
    return json.dumps(
        {
            "correctness_reason": "{not}",
            "correctness_better": correctness,
            "followability_better": followability,
            "standardization_better": standardization,
            "overall_better": overall,
        }
    )


TIES = judgement("tie", "tie", "tie", "tie")


def test_parse_judgement():
    reply = f"Here it is:\n```json\n{judgement('First', 'tie', 'second', 'first')}\n```"
    assert ev.parse_judgement(reply) == {
        "correctness": "first",
        "followability": "tie",
        "standardization": "second",
        "overall": "first",
    }


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "first",
        "{",
        "[1]",
        '{"correctness_better": "first"}',
        judgement("both", "tie", "tie", "tie"),
        TIES[:-5],
        f"<think>{TIES}</think>",
        f"<think>\n{TIES}",
    ],
)
def test_replies_that_are_no_judgement(reply):
    assert ev.parse_judgement(reply) is None


def test_judge(tmp_path, chat_server):
    """boil/0 prefers mpo in either order, after some thinking, boil/1 the first plan; boil/2 has no
    answer in one order; boil/3 is first invalid, then a tie; boil/4 prefers sft, except for
    followability."""
    tasks = [f"boil/{i}" for i in range(5)]
    plans = {}
    for setting in ("sft", "mpo"):
        for task in tasks:
            plans[setting, task] = f"Step 1: {setting} plan"
    conditions = [condition(setting, "seen", tasks) for setting in ("sft", "mpo")]
    out = write_run(tmp_path / "run", conditions, plans, [])
    asked = Counter()

    def reply(messages, body):
        text = messages[0]["content"]
        task = re.search(r"boil/\d", text)[0]
        if text.index("mpo plan") < text.index("sft plan"):
            shown_first, mpo, sft = "mpo", "first", "second"
        else:
            shown_first, mpo, sft = "sft", "second", "first"
        asked[task, shown_first] += 1
        again = TIES if asked[task, shown_first] > 1 else '{"correctness_better": "mpo"}'
        return {
            "boil/0": f"<think>{judgement(sft, sft, sft, sft)}</think>\nI think:\n"
            + judgement(mpo, mpo, mpo, mpo),
            "boil/1": judgement("first", "first", "first", "first"),
            "boil/2": TIES if shown_first == "mpo" else "They are both fine.",
            "boil/3": again,
            "boil/4": judgement(sft, mpo, sft, sft),
        }[task]

    server = chat_server(reply)
    a = ev.JudgeArgs(out=str(out), judge=server.url)
    ev.judge(a)
    usual = {"win": 1, "tie": 2, "loss": 1, "invalid": 1}
    assert numbers(out)["judged"] == {
        "plans": ["sft", "mpo"],
        "correctness": usual,
        "followability": usual | {"win": 2, "loss": 0},
        "standardization": usual,
        "overall": usual,
    }
    assert asked["boil/2", "sft"] == 3 and asked["boil/3", "mpo"] == 2
    assert asked["boil/0", "mpo"] == 1
    assert (out / "fig6.png").stat().st_size > 1000
    assert "| correctness " in (out / "fig6.md").read_text()
    before = len(server.requests)
    ev.judge(a)
    assert len(server.requests) == before, "nothing is judged twice"


@pytest.fixture
def judged(known, chat_server, monkeypatch) -> Path:
    """The run folder `known` with plans of sft, too, and all four tasks judged: all ties."""
    server = chat_server(lambda messages, body: TIES)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    plans = known / "eval" / "plans.jsonl"
    rows = read_rows(plans)
    for row in list(rows):
        rows.append(row | {"setting": "sft", "plan": "Step 1: wait", "plans_id": "id of sft"})
    write_jsonl(plans, rows)
    ask_again(known, condition("sft", "seen", SEEN))
    ask_again(known, condition("sft", "unseen", UNSEEN))
    ev.judge(ev.JudgeArgs(out=str(known)))
    assert len(server.requests) == 2 * 4
    return known


def ties(out: Path) -> int:
    write_report(out)
    return numbers(out)["judged"]["overall"]["tie"]


def test_one_more_task_is_two_more_questions(judged):
    path = judged / "eval" / "judgements.jsonl"
    rows = read_rows(path)
    plans = read_rows(judged / "eval" / "plans.jsonl")
    more = [row | {"task": "melt/3"} for row in plans if row["task"] == "melt/2"]
    write_jsonl(judged / "eval" / "plans.jsonl", plans + more)
    for setting in ("sft", "mpo"):
        ask_again(judged, condition(setting, "unseen", [*UNSEEN, "melt/3"]))
    ev.judge(ev.JudgeArgs(out=str(judged)))
    first, second = read_rows(path)[len(rows) :]
    assert first["task"] == second["task"] == "melt/3" and first["question"] == second["question"]
    assert {first["first"], second["first"]} == {"sft", "mpo"}
    assert ties(judged) == 5


def test_judgements_of_an_earlier_plan_do_not_count(judged):
    path = judged / "eval" / "judgements.jsonl"
    rows = read_rows(path)
    plans = read_rows(judged / "eval" / "plans.jsonl")
    plans[0] |= {"plan": "Step 1: another plan"}
    write_jsonl(judged / "eval" / "plans.jsonl", plans)
    assert ties(judged) == 3
    ev.judge(ev.JudgeArgs(out=str(judged)))
    assert len(read_rows(path)) == len(rows) + 2 and ties(judged) == 4


@pytest.mark.parametrize("fields", [{}, {"question": "q"}])
def test_judgements_of_an_earlier_version_are_left_out(judged, fields, capsys):
    path = judged / "eval" / "judgements.jsonl"
    old = []
    for row in read_rows(path):
        row.pop("question")
        old.append(row | {"answer": {"correctness": "tie", "overall": "tie"}} | fields)
    write_jsonl(path, old)
    write_report(judged)
    assert "judged" not in numbers(judged)
    assert "judgements.jsonl: judgements with other fields" in capsys.readouterr().out
    ev.judge(ev.JudgeArgs(out=str(judged)))
    assert ties(judged) == 4 and len(read_rows(path)) == 2 * len(old)


@pytest.mark.parametrize(
    ("plans", "says"),
    [(["sft", "sft"], "two settings"), (["mpo", "gpt"], "gpt: .* no plans of it")],
)
def test_settings_that_cannot_be_judged(known, plans, says):
    with pytest.raises(InputError, match=says):
        ev.judge(ev.JudgeArgs(out=str(known), plans=plans))


# ---- plan positions and plan sources -------------------------------------------------------------

TASKS = common.environment(CORRIDOR)().tasks("seen")[:3]


@pytest.fixture
def evaluate(tmp_path):
    """evaluate(**settings): stage 5 on three tasks of the toy environment, in tmp_path / "run"."""
    listed = tmp_path / "tasks.json"
    listed.write_text(json.dumps([t.split("/") for t in TASKS]))
    usual = {
        "env": CORRIDOR,
        "workers": 1,
        "out": str(tmp_path / "run"),
        "tasks": [str(listed)],
    }

    def run(**settings):
        ev.main(ev.Args(**{**usual, **settings}))

    return run


def plan_for(task: str) -> str:
    return f"Step 1: walk on for {task}\nStep 2: take it"


def position_of(messages: list[dict], plan: str) -> str:
    """The plan position of a conversation, from the messages in which the plan stands."""
    if plan in messages[0]["content"]:
        return "instruction"
    return "thought" if messages[-1]["content"] == "Observation: OK." else "observation"


def test_the_plan_positions_differ_where_they_should(tmp_path, evaluate, chat_server):
    """Table 4: complete conversations, one of them as in tests/golden/plan_position.json."""
    server = chat_server(lambda m, body: f"Thought: {len(m)} messages.\nAction: walk on")
    plans = write_jsonl(tmp_path / "mine.jsonl", [{"task": t, "plan": plan_for(t)} for t in TASKS])
    evaluate(
        agents=[server.url],
        plans=[str(plans)],
        max_steps=3,
        plan_positions=["instruction,thought", "observation"],
    )
    out = tmp_path / "run"
    assert [(r["plans"], r["plan_position"]) for r in numbers(out)["results"]] == [
        ("mine.jsonl", plan_position) for plan_position in common.PLAN_POSITIONS
    ]
    instructions = {r["task"]: r["instruction"] for r in read_rows(out / "eval" / "plans.jsonl")}
    talks: dict[str, dict] = {t: {} for t in TASKS}  # the longest conversations
    for body in server.requests:
        messages = body["messages"]
        [task] = [t for t in TASKS if instructions[t] in messages[0]["content"]]
        plan_position = position_of(messages, plan_for(task))
        if len(messages) > len(talks[task].get(plan_position, [])):
            talks[task][plan_position] = messages
    for task, by_position in talks.items():
        plan = plan_for(task)
        line = common.PLAN_LINE.format(plan=plan)
        instruction, thought, observation = (by_position[i] for i in common.PLAN_POSITIONS)
        plain = [m | {"content": m["content"].replace(line, "")} for m in instruction]
        assert sum(plan in m["content"] for m in instruction) == 1
        assert instruction[0]["content"] == plain[0]["content"] + line
        *before, own_turn, answer = thought  # each request ends with the plan, in a turn of its own
        assert own_turn["role"] == "assistant" and own_turn["content"].endswith(plan)
        assert answer == {"role": "user", "content": "Observation: OK."}
        assert before[::2] == plain[::2] and len(before) == len(plain)
        assert not any(plan in message["content"] for message in before)
        assert [m | {"content": m["content"].removesuffix(line)} for m in observation] == plain
        assert observation[0] == plain[0]
        for message in observation[1:]:
            assert message["content"].endswith(line) == (message["role"] == "user")
    golden = json.loads(GOLDEN.read_text())
    assert talks[TASKS[0]] == golden, "after an intended change, write this file again and read it"


def test_plans_of_the_teacher(tmp_path, evaluate, chat_server, monkeypatch):
    """--plans gpt asks the teacher, a model of an API or a server, with the environment's own
    prompt; plans are made once and used by all agents."""

    def reply(messages, body):
        if body["model"] == "gpt-4o":
            return plan_reply(f"Step 1: {len(messages[0]['content'])}")
        return "Action: walk on"

    server = chat_server(reply)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    out = tmp_path / "run"
    usual = {"limit": 2, "max_steps": 2, "prompts": "brief"}
    evaluate(**usual, agents=["small"], plans=["gpt"])
    evaluate(**usual, agents=["small", "large"], plans=["none,gpt"])
    plans = read_rows(out / "eval" / "plans.jsonl")
    assert sorted(r["task"] for r in plans) == sorted(TASKS[:2])
    assert {r["setting"] for r in plans} == {"gpt"}
    assert sum(b["model"] == "gpt-4o" for b in server.requests) == 2
    played = Counter()
    for row in read_rows(out / "eval" / "rollouts.jsonl"):
        played[row["agent"], "none" if row["plan"] is None else "gpt"] += 1
    assert played == {
        ("small", "none"): 2,
        ("small", "gpt"): 2,
        ("large", "none"): 2,
        ("large", "gpt"): 2,
    }
    assert (out / "table3.md").exists() and not (out / "fig4.png").exists()
    before = len(server.requests)
    evaluate(**usual, agents=["small", "large"], plans=["none"])
    assert len(server.requests) == before
    teacher = chat_server(lambda messages, body: plan_reply("Step 1: wait"))
    evaluate(**usual, agents=["small"], plans=["gpt"], teacher=teacher.url)
    assert len(teacher.requests) == 2


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"task": TASKS[0], "plan": "x"}], f"no plan for {TASKS[1]}"),
        ([{"task": TASKS[0], "plan": plan} for plan in "xy"], "several plans"),
        ([{"task": TASKS[0], "plan": 3}], "must be a text"),
    ],
)
def test_files_of_plans_that_cannot_be_used(tmp_path, evaluate, chat_server, rows, says):
    server = chat_server(lambda messages, body: "Action: walk on")
    bad = write_jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(InputError, match=f"bad.jsonl.*{says}"):
        evaluate(agents=[server.url], plans=[str(bad)])
    assert not server.requests


def test_settings_that_cannot_be_used(tmp_path, evaluate):
    with pytest.raises(InputError, match="--plan_positions prompt: one of instruction, thought"):
        evaluate(agents=["http://localhost:1"], plans=["none"], plan_positions=["prompt"])
    with pytest.raises(InputError, match="has no evaluation"):
        write_report(tmp_path / "none")
    with pytest.raises(InputError, match="--plans mismatched: there is no planner .*run/mpo; run"):
        evaluate(agents=["http://localhost:1"], plans=["none", "mismatched"])


def test_an_agent_that_is_given_twice(evaluate, chat_server):
    urls = [chat_server(lambda messages, body: "Action: walk on").url for _ in range(2)]
    with pytest.raises(InputError, match=f"--agents {urls[0]} {urls[1]}: both are .*with commas"):
        evaluate(agents=urls, plans=["none"])


def test_agents_of_a_server_with_several_models(tmp_path, evaluate, chat_server):
    server = chat_server(lambda messages, body: "Action: walk on")
    server.models = (200, '{"data": [{"id": "qwen:7b"}, {"id": "llama3.1:latest"}]}')
    usual = {"limit": 1, "max_steps": 1, "plans": ["none"]}
    evaluate(**usual, agents=[f"llama3.1@{server.url}", f"qwen:7b@{server.url}"])
    rows = read_rows(tmp_path / "run" / "eval" / "rollouts.jsonl")
    assert [row["agent"] for row in rows] == ["llama3.1:latest", "qwen:7b"]
    assert [body["model"] for body in server.requests] == ["llama3.1:latest", "qwen:7b"]
    evaluate(**usual, agents=[f"llama3.1:latest@{server.url}"])
    assert len(server.requests) == 2, "the same agent"


def test_a_plan_for_a_task_in_words(chat_server, monkeypatch, capsys):
    server = chat_server(lambda m, body: plan_reply("Step 1: " + m[0]["content"].splitlines()[-1]))
    ev.write_plan(ev.PlanArgs(planner=server.url, env=CORRIDOR, text="Find the lamp."))
    assert capsys.readouterr().out == "Step 1: Find the lamp.\n"
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    ev.write_plan(ev.PlanArgs(planner="api:vendor/model", env=CORRIDOR, text="Wait."))
    assert server.requests[-1]["model"] == "vendor/model", "not taken for a local model"
    with pytest.raises(InputError, match="name the task"):
        ev.write_plan(ev.PlanArgs(planner=server.url, env=CORRIDOR))
    capsys.readouterr()
    untagged = chat_server(lambda m, body: " Look around. ")
    ev.write_plan(ev.PlanArgs(planner=untagged.url, env=CORRIDOR, text="Wait."))
    assert capsys.readouterr().out == "Look around.\n"
    silent = chat_server(lambda m, body: "")
    with pytest.raises(InputError, match="wrote no plan"):
        ev.write_plan(ev.PlanArgs(planner=silent.url, env=CORRIDOR, text="Wait."))
