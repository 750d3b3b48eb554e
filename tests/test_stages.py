"""The five stages, one after the other, on the toy environment with a tiny model and a scripted
planner and agent; resume after a kill; the paid teacher."""

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from conftest import CORRIDOR, check_run, run_script, stage, start_script, write_jsonl

from common import Appender, InputError, parse_plan, plan_reply, read_rows

seed, score, ev = stage("01_seed_plans"), stage("03_sample_score"), stage("05_eval")
GOOD, BAD = "walk on until the task is done", "take what is there"
FILES = {
    1: ("trajectories.jsonl", "seed_plans.jsonl", "agent_sft.jsonl"),
    3: ("plans.jsonl", "rollouts.jsonl", "pairs.jsonl", "best_plans.jsonl"),
    5: (
        "eval/cells.jsonl",
        "eval/rollouts.jsonl",
        "results.md",
        "results.json",
        "results.png",
        "report.html",
    ),
}


@pytest.fixture(scope="module")
def seeded(tmp_path_factory) -> Path:
    """A run folder after stage 1 with the `rules` teacher, of four tasks."""
    out = tmp_path_factory.mktemp("runs") / "seeded"
    seed.main(
        seed.Args(env=CORRIDOR, out=str(out), teacher="rules", limit=4, plan_share=0.5, workers=1)
    )
    return out


@pytest.fixture
def run_folder(tmp_path, seeded) -> Path:
    return Path(shutil.copytree(seeded, tmp_path / "run"))


class Script:
    """Planner and agent. Every other plan of a task, told apart by the request's seed, is good. The
    agent acts as the expert if the plan in its prompt is good, else its actions are invalid."""

    def __init__(self, seeded):
        rows = read_rows(seeded / "trajectories.jsonl")
        self.gold = {r["instruction"]: [a for a, _ in r["steps"]] for r in rows}
        self.seeds, self.lock, self.pause = {}, threading.Lock(), 0.0
        self.planned, self.acted = [], []

    def __call__(self, messages, body):
        first = messages[0]["content"]
        u = max(self.gold, key=first.rfind)
        if "Action" not in first:
            with self.lock:
                self.planned.append(body)
                seeds = self.seeds.setdefault(u, [])
                seeds.append(body["seed"])
            plan = BAD if len(seeds) % 2 else GOOD
            return plan_reply(f"Step 1: {plan}\nStep 2: wait {body['seed']} steps")
        with self.lock:
            self.acted.append(body)
        time.sleep(self.pause)
        return f"Action: {self.gold[u][len(messages) // 2] if GOOD in first else 'dance'}"


def settings(out, url, **more) -> dict:
    return {
        "env": CORRIDOR,
        "out": str(out),
        "workers": 1,
        "planner": "scripted",
        "limit": 4,
        "agent": "scripted",
        "planner_url": url,
        "agent_url": url,
        "m": 2,
        "n": 1,
        "concurrency": 8,
        **more,
    }


def run_score(out, url, **more) -> None:
    score.main(score.Args(**settings(out, url, **more)))


def flags(values: dict) -> list[str]:
    return [str(x) for k, v in values.items() for x in (f"--{k}", v)]


def keys_of(out):
    rows = read_rows(out / "rollouts.jsonl", ("task", "plan", "rollout", "reward"))
    return [(r["task"], r["plan"], r["rollout"]) for r in rows]


def test_seed_plans_by_rules(seeded):
    rows = {name: read_rows(seeded / name) for name in FILES[1]}
    tasks = [r["task"] for r in rows["trajectories.jsonl"]]
    assert len(tasks) == 4 and all([r["task"] for r in rs] == tasks for rs in rows.values())
    for e, r, talk in zip(*rows.values(), strict=True):
        assert e["solved"] and e["reward"] == 1.0 and e["instruction"]
        user, assistant = r["messages"]
        assert user["role"] == "user" and e["instruction"] in user["content"]
        assert assistant == {"role": "assistant", "content": plan_reply(r["plan"])}
        said = [m["content"] for m in talk["messages"] if m["role"] == "assistant"]
        assert said == [f"Action: {a}" for a, _ in e["steps"]]
        assert talk["messages"][-1]["role"] == "assistant"
        assert (r["plan"] in talk["messages"][0]["content"]) == talk["with_plan"]
    assert 0 < sum(talk["with_plan"] for talk in rows["agent_sft.jsonl"]) < 4
    assert read_rows(seeded / "seed_plans.rejected.jsonl") == []


def test_the_whole_chain(run_folder, seeded, tiny_model, chat_server):
    """All five scripts as a user runs them."""
    out, script = run_folder, Script(seeded)
    server = chat_server(script)
    train = ["--epochs", 2, "--batch_size", 2, "--lr", 1e-3]
    check_run(
        "01_seed_plans.py",
        "--env",
        CORRIDOR,
        "--out",
        out,
        "--teacher",
        "rules",
        "--limit",
        4,
        "--workers",
        1,
    )
    check_run(
        "02_sft.py",
        "--model",
        tiny_model,
        "--data",
        out / "seed_plans.jsonl",
        "--out",
        out / "sft",
        *train,
    )

    arguments = flags(settings(out, server.url))
    printed = check_run("03_sample_score.py", *arguments)
    assert "pairs: 4 from 4 of 4 tasks, mean Q gap 1.000" in printed
    plans = read_rows(out / "plans.jsonl", ("task", "m", "plan"))
    assert len({(r["task"], r["m"]) for r in plans}) == len(plans) == 8
    assert len(set(keys_of(out))) == len(keys_of(out)) == 8
    for pair in read_rows(out / "pairs.jsonl", ("task", "prompt")):
        assert (pair["q_chosen"], pair["q_rejected"]) == (1.0, 0.0)
        assert GOOD in pair["chosen"][0]["content"] and BAD in pair["rejected"][0]["content"]
        roles = [m["role"] for m in pair["prompt"] + pair["chosen"] + pair["rejected"]]
        assert roles == ["user", "assistant", "assistant"]
    assert {b["temperature"] for b in script.planned + script.acted} == {0.7}
    asked = len(server.requests)
    check_run("03_sample_score.py", *arguments)
    assert len(server.requests) == asked, "all is finished: nothing is asked again"

    check_run(
        "04_dpo.py",
        "--model",
        out / "sft",
        "--data",
        out / "pairs.jsonl",
        "--out",
        out / "mpo",
        *train,
    )
    for file in ("config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl"):
        assert (out / "sft" / file).exists() and (out / "mpo" / file).exists()

    evaluate = [
        "--env",
        CORRIDOR,
        "--workers",
        1,
        "--out",
        out,
        "--agents",
        server.url,
        "--plans",
        "none",
        "--splits",
        "seen",
    ]
    assert "| no plan" in check_run("05_eval.py", *evaluate)
    assert all((out / name).stat().st_size for names in FILES.values() for name in names)
    [result] = json.loads((out / "results.json").read_text())["results"]
    assert result["tasks"] >= 4 and result["missing"] == 0
    assert result["ends"].keys() <= {"errors", "steps"} and result["reward"]["mean"] == 0.0
    asked = len(server.requests)
    assert server.requests[-1]["temperature"] == 0.0
    check_run("05_eval.py", *evaluate)
    assert len(server.requests) == asked


def test_more_rollouts_play_only_the_missing(run_folder, seeded, chat_server):
    script = Script(seeded)
    url = chat_server(script).url
    run_score(run_folder, url)
    first, planned, acted = keys_of(run_folder), len(script.planned), len(script.acted)
    run_score(run_folder, url, n=2)
    assert keys_of(run_folder)[: len(first)] == first and len(script.planned) == planned
    assert len(script.acted) == 2 * acted
    wanted = [(task, plan, n) for task, plan, _ in first for n in range(2)]
    assert sorted(keys_of(run_folder)) == sorted(wanted)
    run_score(run_folder, url, n=2, max_model_len=100)
    assert len(keys_of(run_folder)) == 2 * len(wanted), "the context length is a setting"


def kill_at(rows: int, file: Path, name: str, *args) -> None:
    """Start a stage, kill it when `file` has some rows; its workers end with it."""
    process = start_script(name, *args)
    try:
        end = time.time() + 60
        while not file.exists() or file.read_bytes().count(b"\n") < rows:
            assert time.time() < end and process.poll() is None
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(children, 20)
    assert children and not alive, "environment workers end with the stage"


def test_killed_scoring_resumes(run_folder, seeded, chat_server):
    script = Script(seeded)
    url, rollouts = chat_server(script).url, run_folder / "rollouts.jsonl"
    script.pause, more = 0.1, {"m": 4, "n": 2, "concurrency": 4}
    kill_at(5, rollouts, "03_sample_score.py", *flags(settings(run_folder, url, **more)))
    kept, plans = keys_of(run_folder), read_rows(run_folder / "plans.jsonl")
    assert 5 <= len(kept) < 32 and not (run_folder / "pairs.jsonl").exists()
    with rollouts.open("ab") as f:
        f.write(b'{"task": "find-lamp/0", "plan": "Step 1')  # a row cut off by a kill

    script.pause = 0.0
    run_score(run_folder, url, **more)
    keys = keys_of(run_folder)
    assert keys[: len(kept)] == kept and len(set(keys)) == len(keys) == 32
    assert read_rows(run_folder / "plans.jsonl")[: len(plans)] == plans
    assert len(read_rows(run_folder / "pairs.jsonl")) == 4


def test_killed_evaluation_resumes(run_folder, seeded, chat_server):
    script, rollouts = Script(seeded), run_folder / "eval" / "rollouts.jsonl"
    arguments = [
        "--env",
        CORRIDOR,
        "--out",
        run_folder,
        "--agents",
        chat_server(script).url,
        "--plans",
        "none",
        "--workers",
        1,
        "--concurrency",
        2,
    ]
    script.pause = 0.05
    kill_at(3, rollouts, "05_eval.py", *arguments)
    kept, script.pause = read_rows(rollouts), 0.0
    check_run("05_eval.py", *arguments)
    rows = read_rows(rollouts)
    assert rows[: len(kept)] == kept and 3 <= len(kept) < len(rows)
    assert len({r["task"] for r in rows}) == len(rows) == 16


def test_a_second_run_on_the_same_folder_is_refused(run_folder, seeded, chat_server):
    with Appender(run_folder / "plans.jsonl"):
        with pytest.raises(InputError, match=r"plans\.jsonl is being written by another run"):
            run_score(run_folder, chat_server(Script(seeded)).url)


def test_ties_are_skipped_and_equal_plans_scored_once(run_folder, seeded, chat_server):
    script = Script(seeded)

    def reply(messages, body):
        return plan_reply(f"Step 1: {BAD}") if "stop" not in body else script(messages, body)

    with pytest.raises(InputError, match="no task has a better and a worse plan"):
        run_score(run_folder, chat_server(reply).url)
    assert len(keys_of(run_folder)) == 4 and not (run_folder / "pairs.jsonl").exists()


def test_replies_without_a_plan_are_ignored(run_folder, seeded, chat_server, capsys):
    """Asked for three times each; the other plans of the task still make a pair."""
    script, attempts = Script(seeded), []
    task, u = next((r["task"], r["instruction"]) for r in read_rows(seeded / "trajectories.jsonl"))

    def reply(messages, body):
        if "stop" not in body and u in messages[0]["content"] and len(attempts) < 6:
            attempts.append(body["seed"])
            return "I have no plan."
        return script(messages, body)

    run_score(run_folder, chat_server(reply).url, m=2)
    assert len(set(attempts)) == 6
    printed = capsys.readouterr().out
    assert "2 of 8 plans are missing" in printed and "pairs: 3 from 3 of 4 tasks" in printed
    rows = read_rows(run_folder / "plans.jsonl")
    assert [r["plan"] for r in rows if r["task"] == task] == [None, None]


# ---- the paid teacher ----------------------------------------------------------------------------

PLAN = "Step 1: walk on until there is a lamp\nStep 2: take it"
KEY = "sk-test-0123456789"


@pytest.fixture
def teach(run_folder, monkeypatch, chat_server):
    """teach(reply) -> (server, run): `run()` is stage 1 with a teacher behind OPENAI_BASE_URL."""

    def start(reply):
        server = chat_server(reply)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("MPO_MAX_RETRIES", "1")

        def run(**more):
            seed.main(
                seed.Args(
                    **{
                        "env": CORRIDOR,
                        "out": str(run_folder),
                        "teacher": "gpt-test",
                        "limit": 4,
                        "workers": 1,
                        **more,
                    }
                )
            )

        return server, run

    return start


def test_teacher_and_quality_control(run_folder, seeded, teach, capsys):
    """Of four plans one is good, one is extracted from a reply in the wrong format, one stays too
    detailed, one passes at the third temperature."""
    u = [r["instruction"] for r in read_rows(seeded / "trajectories.jsonl")]
    tasks = [r["task"] for r in read_rows(seeded / "trajectories.jsonl")]

    def reply(messages, body):
        n = next(i for i, text in enumerate(u) if text in messages[0]["content"])
        if n == 1 and len(messages) == 1:
            return "First find it, then take it."
        if n == 2:
            return plan_reply("Step 1: take cupboard 4\nStep 2: take it")
        if n == 3 and body["temperature"] < 1:
            return plan_reply("Step 1: observe the room")
        return plan_reply(PLAN)

    server, run = teach(reply)
    run()
    printed = capsys.readouterr().out
    assert "gpt-test: 4 calls" in printed and "3 kept, 1 rejected" in printed
    kind = tasks[2].split("/")[0]
    total = sum(t.startswith(kind) for t in tasks)
    assert f"{kind}: {total - 1} of {total} kept" in printed
    assert "rejected 1: instance detail" in printed
    kept = read_rows(run_folder / "seed_plans.jsonl")
    rejected = read_rows(run_folder / "seed_plans.rejected.jsonl")
    assert [r["task"] for r in kept] == [tasks[0], tasks[1], tasks[3]]
    assert all((r["plan"], r["teacher"]) == (PLAN, "gpt-test") for r in kept)
    assert [r["task"] for r in rejected] == [tasks[2]] and "cupboard 4" in rejected[0]["reason"]
    extraction = [b["messages"] for b in server.requests if len(b["messages"]) > 1]
    assert [[m["role"] for m in ms] for ms in extraction] == [["user", "assistant", "user"]]
    asked = [b["temperature"] for b in server.requests if u[2] in b["messages"][0]["content"]]
    assert asked == [0.0, 0.7, 1.0] and len(server.requests) == 1 + 2 + 3 + 3
    assert server.keys == {f"Bearer {KEY}"} and KEY not in printed
    assert not any(KEY.encode() in p.read_bytes() for p in run_folder.rglob("*") if p.is_file())

    run()
    assert len(server.requests) == 9, "neither kept nor rejected plans are asked for again"
    assert read_rows(run_folder / "seed_plans.jsonl") == kept
    edits = write_jsonl(
        run_folder / "edited_plans.jsonl",
        [{"task": tasks[2], "plan": "Step 1: walk on\nStep 5: take it in cupboard 4"}],
    )
    run()
    [still] = read_rows(run_folder / "seed_plans.rejected.jsonl")
    assert still["teacher"] == "edited" and "cupboard 4" in still["reason"], "checked as others"
    write_jsonl(
        edits,
        [
            {"task": tasks[2], "plan": "Step 1: walk on\nStep 5: take it"},
            {"task": tasks[0], "plan": "1. take it"},
        ],
    )
    run()
    assert len(server.requests) == 9 and "4 kept, 0 rejected" in capsys.readouterr().out
    rows = read_rows(run_folder / "seed_plans.jsonl")
    plans = {r["task"]: (r["plan"], r["teacher"]) for r in rows}
    assert plans[tasks[2]] == ("Step 1: walk on\nStep 2: take it", "edited")
    assert plans[tasks[0]] == ("Step 1: take it", "edited") and plans[tasks[1]][0] == PLAN
    run(temperatures=[0.5])
    assert len(server.requests) == 9, "accepted plans are kept with other temperatures"


def test_thoughts(run_folder, seeded, teach, capsys):
    """One call a trajectory; a reply with another number of thoughts is asked for again."""
    count = {r["instruction"]: len(r["steps"]) for r in read_rows(seeded / "trajectories.jsonl")}
    u = list(count)

    def reply(messages, body):
        text = messages[0]["content"]
        if "Action 1:" not in text:
            return plan_reply(PLAN)
        n = next(n for n, task in enumerate(u) if task in text)
        lines = [f"{i}. It is thought {i} of {n}." for i in range(1, count[u[n]] + 1)]
        short = n == 1 or (n == 2 and body["temperature"] == 0)
        return "\n".join(lines[:-1] if short else lines)

    server, run = teach(reply)
    run(thoughts=True, plan_share=0.5)
    asked = [
        b["temperature"] for b in server.requests if "Action 1:" in b["messages"][0]["content"]
    ]
    assert sorted(asked) == [0.0] * 4 + [0.7] * 2 + [1.0]
    assert "3 trajectories have them, 1 have not" in capsys.readouterr().out
    for n, talk in enumerate(read_rows(run_folder / "agent_sft.jsonl")):
        said = [m["content"] for m in talk["messages"] if m["role"] == "assistant"]
        found = [
            re.fullmatch(r"Thought: It is thought (\d+) of (\d)\.\nAction: .+", x) for x in said
        ]
        numbers = [(int(m[1]), int(m[2])) for m in found if m]
        assert numbers == ([] if n == 1 else [(i, n) for i in range(1, len(said) + 1)])
    before = len(server.requests)
    run(thoughts=True)
    assert len(server.requests) == before, "nothing is asked twice"
    with pytest.raises(InputError, match="--thoughts needs a model as --teacher"):
        run(thoughts=True, teacher="rules")


def test_a_paid_plan_is_never_lost(run_folder, teach, chat_server):
    """Kill the stage during the teacher's work, resume it, run it with fewer tasks and by rules."""
    blocked = threading.Event()

    def reply(messages, body):
        if blocked.is_set() and not (run_folder / "go").exists():
            time.sleep(60)
        blocked.set()
        return plan_reply(PLAN)

    server, run = teach(reply)
    log = run_folder / "teacher_plans.jsonl"
    process = start_script(
        "01_seed_plans.py",
        "--env",
        CORRIDOR,
        "--out",
        run_folder,
        "--teacher",
        "gpt-test",
        "--limit",
        4,
        "--concurrency",
        1,
        OPENAI_API_KEY=KEY,
        OPENAI_BASE_URL=server.url,
    )
    try:
        end = time.time() + 60
        while not (log.exists() and read_rows(log)):
            assert process.poll() is None and time.time() < end
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert len(read_rows(log)) == 1
    (run_folder / "go").touch()
    run()
    asked, paid = len(server.requests), read_rows(log)
    assert len({r["task"] for r in paid}) == len(paid) == 4
    run(limit=2)
    run(teacher="rules")
    run()
    assert len(server.requests) == asked and read_rows(log) == paid
    assert all(parse_plan(plan_reply(r["plan"])) == PLAN for r in paid)


def test_one_line_and_exit_status_2(tmp_path):
    """Errors as a user sees them, with three commands; the rest is tested by the functions."""
    for command, said in [
        (["01_seed_plans.py", "--env", "nowhere"], "error: --env nowhere: "),
        (["03_sample_score.py", "--m", "1"], "error: --m must be at least 2"),
        (["05_eval.py", "--lerning_rate", "3"], "--lerning_rate"),
    ]:
        result = run_script(*command)
        errors = [line for line in result.stderr.splitlines() if "error: " in line]
        assert result.returncode == 2 and len(errors) == 1 and said in errors[0], result.stderr
        assert "Traceback" not in result.stderr
