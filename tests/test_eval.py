"""Stage 5: statistics, tables, insertion, plan sources, the judge."""

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
SEEN, UNSEEN = ["boil/1", "boil/2"], ["melt/1", "melt/2"]


# ---- rows with known answers ---------------------------------------------------------------------


def episode(
    task, plan, reward, steps, agent="a", plan_position="instruction", end=None, **more
) -> dict:
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
        "end": end or ("success" if reward == 1.0 else "steps"),
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
    """A run folder of `conditions`, {(setting, task): plan} and episodes."""
    (out / "eval").mkdir(parents=True)
    write_jsonl(out / "eval" / "conditions.jsonl", conditions)
    write_jsonl(
        out / "eval" / "plans.jsonl",
        [
            {
                "setting": s,
                "task": t,
                "plan": p,
                "instruction": f"Your task is {t}.",
                "plans_id": f"id of {s}",
            }
            for (s, t), p in plans.items()
        ],
    )
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
    return [
        [c.strip().split(" [")[0] for c in line.split("|")[1:-1]]
        for line in table.read_text().splitlines()
        if line.startswith("| ")
    ]


@pytest.fixture
def known(tmp_path) -> Path:
    """Two splits of two tasks; without a plan 0, 0.5 | 0, 1, with mpo's 1, 1 | 0.5, 1, where 0.5
    is of an episode that could not be completed."""
    plans = {("mpo", t): f"Step 1: do {t}" for t in SEEN + UNSEEN}
    rewards = {"none": [0.0, 0.5, 0.0, 1.0], "mpo": [1.0, 1.0, 0.5, 1.0]}
    rollouts = [
        episode(t, plans.get((s, t)), r, 4, end="failure" if r == 0.5 else None)
        for s, rs in rewards.items()
        for t, r in zip(SEEN + UNSEEN, rs, strict=True)
    ]
    conditions = [
        condition(s, split, tasks)
        for s in rewards
        for split, tasks in (("seen", SEEN), ("unseen", UNSEEN))
    ]
    return write_run(tmp_path / "run", conditions, plans, rollouts)


def test_known_table(known):
    write_report(known)
    found = by_setting(known)
    means = {
        key: tuple(r[m]["mean"] for m in ("reward", "solved", "ended", "reward_per_step"))
        for key, r in found.items()
    }
    assert means == {
        ("none", "seen"): (0.25, 0.0, 0.5, 0.0625),
        ("none", "unseen"): (0.5, 0.5, 0.5, 0.125),
        ("none", "all"): (0.375, 0.25, 0.5, 0.09375),
        ("mpo", "seen"): (1.0, 1.0, 1.0, 0.25),
        ("mpo", "unseen"): (0.75, 0.5, 1.0, 0.1875),
        ("mpo", "all"): (0.875, 0.75, 1.0, 0.21875),
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
    assert rows_of(known / "table6.md") == [
        [
            "agent",
            "plans",
            *(f"{s}, {m} (x100)" for s in ("seen", "unseen", "all") for m in ("solved", "ended")),
            "gain over no plan, all, solved",
            "gain over no plan, all, ended",
        ],
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
    settings = ("fig5/m2n1", "fig5/m4n1")
    plans = {(s, t): f"Step 1: do {t} {s}" for s in settings for t in SEEN + UNSEEN}
    rows = [episode(t, plan, 1.0, 2) for (s, t), plan in plans.items()]
    conditions = [
        condition(s, split, tasks)
        for s in settings
        for split, tasks in (("seen", SEEN), ("unseen", UNSEEN))
    ]
    out = write_run(
        tmp_path / "run", conditions, plans, [r for r in rows if r["task"] != UNSEEN[1]]
    )
    write_report(out)
    assert (out / "fig5.md").exists() and not (out / "fig5.png").exists()
    write_jsonl(out / "eval" / "rollouts.jsonl", rows)
    write_report(out)
    assert (out / "fig5.png").exists()


@pytest.mark.parametrize("retrained", ["planner", "agent"])
def test_cells_of_earlier_versions_are_left_out(known, retrained):
    new = {
        "planner": condition("mpo", "seen", SEEN) | {"plans_id": "new"},
        "agent": condition("none", "seen", SEEN) | {"agent_id": "new"},
    }[retrained]
    with (known / "eval" / "conditions.jsonl").open("a") as f:
        f.write(json.dumps(new) + "\n")
    text = write_report(known)
    found = by_setting(known)
    key = (new["plans"], "seen")
    assert found[key]["missing"] == 2
    if retrained == "planner":
        assert {("mpo", "unseen"), ("mpo", "all")}.isdisjoint(found) and "out: 1 conditions" in text
    else:
        assert set(found) == {key} and not numbers(known)["differences"]


def test_results_recomputed_from_the_rows(tmp_path):
    """All means and counts from the raw rows by another way, to 1e-9."""
    draw = random.Random(1)
    tasks = {"seen": [f"boil/{i}" for i in range(9)], "unseen": [f"melt/{i}" for i in range(7)]}
    agents, settings = ["a", "b"], ["none", "sft", "mpo"]
    plans = {
        (s, t): f"Step 1: {s if draw.random() < 0.7 else 'both'} {t}"
        for s in settings[1:]
        for ts in tasks.values()
        for t in ts
    }
    conditions, rows = [], {}
    for agent in agents:
        for s in settings:
            for plan_position in common.PLAN_POSITIONS if s == "mpo" else ["instruction"]:
                for split, ts in tasks.items():
                    conditions.append(condition(s, split, ts, agent, plan_position))
                    for t in ts:
                        key = agent, plan_position, t, plans.get((s, t))
                        rows.setdefault(
                            key,
                            episode(
                                t,
                                key[3],
                                round(draw.random(), 3),
                                draw.randint(0, 9),
                                agent,
                                plan_position,
                                format_errors=draw.randint(0, 2),
                                end=draw.choice(["steps", "context", "errors", "failure"]),
                            ),
                        )
    out = write_run(tmp_path / "run", conditions, plans, list(rows.values()))
    write_report(out)
    results = numbers(out)["results"]
    assert len(results) == len(agents) * (2 + len(common.PLAN_POSITIONS)) * 3
    for name in ("results.png", "fig3.png", "fig4.png", "fig4.md", "table4.md"):
        assert (out / name).stat().st_size > 300
    for r in results:
        ts = [t for split in tasks for t in tasks[split] if r["split"] in (split, "all")]
        mine = [rows[r["agent"], r["plan_position"], t, plans.get((r["plans"], t))] for t in ts]
        assert r["tasks"] == r["episodes"] == len(ts) and not r["missing"]
        per_step = [e["reward"] / (len(e["steps"]) or 1) for e in mine]
        for metric, values in (
            ("reward", [e["reward"] for e in mine]),
            ("solved", [e["success"] for e in mine]),
            ("ended", [e["end"] == "failure" for e in mine]),
            ("reward_per_step", per_step),
        ):
            assert r[metric]["mean"] == pytest.approx(sum(values) / len(ts), abs=1e-9)
        assert r["ends"] == Counter(e["end"] for e in mine)
        assert r["format_errors"] == sum(e["format_errors"] for e in mine)
        assert r["context_overflows"] == sum(e["end"] == "context" for e in mine)
    by_key = {(r["agent"], r["plans"], r["plan_position"], r["split"]): r for r in results}
    differences = numbers(out)["differences"]
    for d in differences:
        a = by_key[d["agent"], d["plans"], d["plan_position"], d["split"]]
        b = by_key[d["agent"], *d["over"].values(), d["split"]]
        gain = a["reward"]["mean"] - b["reward"]["mean"]
        assert d["reward"]["mean"] == pytest.approx(gain, abs=1e-9)
    first, second, third = common.PLAN_POSITIONS
    assert {(d["plans"], d["plan_position"], *d["over"].values()) for d in differences} == {
        ("sft", first, "none", first),
        ("mpo", first, "none", first),
        ("mpo", first, "sft", first),
        ("mpo", second, "none", first),
        ("mpo", third, "none", first),
        ("mpo", second, "mpo", first),
        ("mpo", third, "mpo", first),
        ("mpo", third, "mpo", second),
    }


def test_statistics():
    found = ev.paired_test([[1.0] * 5], 0)
    assert found == {"mean": 1.0, "interval": [1.0, 1.0], "p": 2 / 2**5}, "exact: all signs"
    assert ev.paired_test([[0.0] * 20], 0) == {"mean": 0.0, "interval": [0.0, 0.0], "p": 1.0}
    assert ev.paired_test([[0.5]], 0) == {"mean": 0.5, "interval": [0.5, 0.5], "p": 1.0}
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

    draw, covered, small = np.random.default_rng(3), 0, 0
    for i in range(300):
        base = draw.random(60)
        gain = (draw.random(60) < 0.2 + 0.5 * base) * 1.0 - (draw.random(60) < 0.1 + 0.5 * base)
        low, high = ev.mean_and_interval([gain], i)["interval"]
        covered += low <= 0.1 <= high
        null = (draw.random(60) < 0.5) * 1.0 - (draw.random(60) < 0.5)
        small += ev.paired_test([null], i)["p"] < 0.05
    assert 0.91 <= covered / 300 <= 0.985 and 0.015 <= small / 300 <= 0.09


# ---- the judge -----------------------------------------------------------------------------------


def verdict(*better: str) -> str:
    names = (f"{d}_better" for d in (*ev.DIMENSIONS, "overall"))
    return json.dumps({"correctness_reason": "{not}", **dict(zip(names, better, strict=True))})


def test_parse_judgement():
    reply = f"Here it is:\n```json\n{verdict('First', 'tie', 'second', 'first')}\n```"
    assert ev.parse_judgement(reply) == {
        "correctness": "first",
        "followability": "tie",
        "standardization": "second",
        "overall": "first",
    }
    cut = verdict(*["tie"] * 4)[:-5]
    wrong = verdict("both", "tie", "tie", "tie")
    for reply in ("", "first", "{", '{"correctness_better": "first"}', wrong, "[1]", cut):
        assert ev.parse_judgement(reply) is None, reply


def test_judge(tmp_path, chat_server):
    """boil/0 prefers mpo in either order, boil/1 the first plan; boil/2 has no answer in one order;
    boil/3 is first invalid, then a tie; boil/4 prefers sft, except for followability."""
    tasks = [f"boil/{i}" for i in range(5)]
    plans = {(s, t): f"Step 1: {s} plan" for s in ("sft", "mpo") for t in tasks}
    conditions = [condition(s, "seen", tasks) for s in ("sft", "mpo")]
    out, asked = write_run(tmp_path / "run", conditions, plans, []), Counter()

    def reply(messages, body):
        text = messages[0]["content"]
        task = re.search(r"boil/\d", text)[0]
        order = "mpo" if text.index("mpo plan") < text.index("sft plan") else "sft"
        asked[task, order] += 1
        mpo, sft = ("first", "second") if order == "mpo" else ("second", "first")
        ties = verdict(*["tie"] * 4)
        again = ties if asked[task, order] > 1 else '{"correctness_better": "mpo"}'
        return {
            "boil/0": "I think:\n" + verdict(mpo, mpo, mpo, mpo),
            "boil/1": verdict(*["first"] * 4),
            "boil/2": ties if order == "mpo" else "They are both fine.",
            "boil/3": again,
            "boil/4": verdict(sft, mpo, sft, sft),
        }[task]

    server = chat_server(reply)
    a = ev.JudgeArgs(out=str(out), judge=server.url)
    ev.judge(a)
    judged = numbers(out)["judged"]
    assert judged.pop("plans") == ["sft", "mpo"]
    usual = {"win": 1, "tie": 2, "loss": 1, "invalid": 1}
    assert judged == {
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
    for wrong, says in ((["sft", "sft"], "two settings"), (["sft", "gpt"], "no plans of it")):
        with pytest.raises(InputError, match=says):
            ev.judge(ev.JudgeArgs(out=str(out), judge=server.url, plans=wrong))


# ---- insertion and plan sources ------------------------------------------------------------------

TASKS = common.environment(CORRIDOR)().tasks("seen")[:3]


@pytest.fixture
def evaluate(tmp_path):
    """evaluate(**settings): stage 5 on three tasks of the toy environment, in tmp_path / "run"."""
    listed = tmp_path / "tasks.json"
    listed.write_text(json.dumps([t.split("/") for t in TASKS]))

    def run(**settings):
        ev.main(
            ev.Args(
                **{
                    "env": CORRIDOR,
                    "workers": 1,
                    "out": str(tmp_path / "run"),
                    "tasks": [str(listed)],
                    **settings,
                }
            )
        )

    return run


def test_the_three_insertions_differ_where_they_should(tmp_path, evaluate, chat_server):
    """Table 4: complete conversations, one of them as in tests/golden/plan_position.json."""

    def plan_for(task):
        return f"Step 1: walk on for {task}\nStep 2: take it"

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
        ("mine.jsonl", i) for i in common.PLAN_POSITIONS
    ]
    u = {r["task"]: r["instruction"] for r in read_rows(out / "eval" / "plans.jsonl")}
    talks: dict[str, dict] = {t: {} for t in TASKS}
    for body in server.requests:
        messages = body["messages"]
        [task] = [t for t in TASKS if u[t] in messages[0]["content"]]
        held = [plan_for(task) in m["content"] for m in messages]
        plan_position = (
            "instruction" if held[0] else "observation" if not any(held[:2]) else "thought"
        )
        if len(messages) > len(talks[task].get(plan_position, [])):
            talks[task][plan_position] = messages
    for task, by_insert in talks.items():
        line, plan = common.PLAN_LINE.format(plan=plan_for(task)), plan_for(task)
        instruction, thought, observation = (by_insert[i] for i in common.PLAN_POSITIONS)
        plain = [m | {"content": m["content"].replace(line, "")} for m in instruction]
        assert sum(plan in m["content"] for m in instruction) == 1
        assert instruction[0]["content"] == plain[0]["content"] + line
        assert thought[1]["role"] == "assistant" and thought[1]["content"].endswith(plan)
        assert thought[2] == {"role": "user", "content": "Observation: OK."}
        assert len(thought) == len(plain) + 2 and thought[0] == plain[0]
        assert [m | {"content": m["content"].removesuffix(line)} for m in observation] == plain
        assert [m["content"].endswith(line) for m in observation] == [
            i > 0 and m["role"] == "user" for i, m in enumerate(observation)
        ]
    golden = json.loads(GOLDEN.read_text())
    assert talks[TASKS[0]] == golden, "after an intended change, write this file again and read it"


def test_plans_of_the_teacher_and_of_files(tmp_path, evaluate, chat_server, monkeypatch, capsys):
    """--plans gpt asks the teacher with the environment's own prompt; plans are made once and used
    by all agents."""

    def reply(messages, body):
        if body["model"] == "gpt-4o":
            return plan_reply(f"Step 1: {len(messages[0]['content'])}")
        return "Action: walk on"

    server, out = chat_server(reply), tmp_path / "run"
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    more = {"limit": 2, "max_steps": 2, "agents": ["small", "large"], "prompts": "brief"}
    evaluate(**more, plans=["none,gpt"], plans_only=True)
    plans = read_rows(out / "eval" / "plans.jsonl")
    assert sorted(r["task"] for r in plans) == sorted(TASKS[:2])
    assert {r["setting"] for r in plans} == {"gpt"} and not (out / "results.md").exists()
    assert len(server.requests) == 2
    evaluate(**more, plans=["none,gpt"])
    rows = read_rows(out / "eval" / "rollouts.jsonl")
    assert Counter((r["agent"], r["plan"] is None) for r in rows) == {
        (a, p): 2 for a in ("small", "large") for p in (True, False)
    }
    assert sum(b["model"] == "gpt-4o" for b in server.requests) == 2
    assert (out / "table3.md").exists() and not (out / "fig4.png").exists()
    before = len(server.requests)
    evaluate(**more, plans=["none"])
    assert len(server.requests) == before
    bad = tmp_path / "bad.jsonl"
    for written, says in (
        ([{"task": TASKS[0], "plan": "x"}], f"no plan for {TASKS[1]}"),
        ([{"task": t, "plan": p} for t in TASKS for p in "xy"], "several plans"),
        ([{"task": t, "plan": 3} for t in TASKS], "must be text"),
    ):
        write_jsonl(bad, written)
        with pytest.raises(InputError, match=f"bad.jsonl.*{says}"):
            evaluate(**more, plans=[str(bad)])
    with pytest.raises(InputError, match="--plan_positions prompt: one of instruction, thought"):
        evaluate(**more, plans=["none"], plan_positions=["prompt"])
    with pytest.raises(InputError, match="has no evaluation"):
        write_report(tmp_path / "none")


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
