"""The five stages, one after the other, on ScienceWorld with a tiny model and scripted planner and agent."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from conftest import check_run, run_script, start_script, write_jsonl

from common import plan_reply, read_rows

TASKS = [["find-plant", 0], ["find-animal", 1], ["power-component", 0], ["lifespan-longest-lived", 0]]
GOOD, BAD = "focus on what the task asks for", "focus on the agent"
ENV = ["--env", "sciworld", "--workers", 1]
CLAIMS = {"01": ("seed_plans.jsonl", "trajectories.jsonl", "agent_sft.jsonl"), "03": ("plans.jsonl", "rollouts.jsonl", "pairs.jsonl"),
          "05": ("eval/cells.jsonl", "eval/rollouts.jsonl", "results.md", "results.json", "results.png", "report.html")}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "tasks.json"
    path.write_text(json.dumps(TASKS))
    return path


@pytest.fixture(scope="module")
def seeded(tmp_path_factory, tasks) -> Path:
    """A run folder after stage 1 with the `rules` teacher."""
    out = tmp_path_factory.mktemp("runs") / "seeded"
    check_run("01_seed_plans.py", *ENV, "--out", out, "--teacher", "rules", "--tasks", tasks, "--plan_share", 0.5)
    return out


@pytest.fixture
def run_folder(tmp_path, seeded) -> Path:
    return Path(shutil.copytree(seeded, tmp_path / "run"))


class Script:
    """Planner and agent: of a task's plans, told apart by the request's seed, every other is good, and the agent acts as the
    expert when the plan in its prompt is good, else, or without a plan, loses at once."""

    def __init__(self, seeded):
        self.gold = {r["instruction"]: [a for a, _ in r["steps"]] for r in read_rows(seeded / "trajectories.jsonl")}
        self.seeds, self.lock, self.pause = {}, threading.Lock(), 0.0
        self.planned, self.acted = [], []

    def __call__(self, messages, body):
        first = messages[0]["content"]
        u = max(self.gold, key=first.rfind)
        if "<meta_plan>" in first:
            with self.lock:
                self.planned.append(body)
                seeds = self.seeds.setdefault(u, [])
                seeds.append(body["seed"])
            return plan_reply(f"Step 1: look around\nStep 2: {BAD if len(seeds) % 2 else GOOD}\nStep 3: wait {body['seed']} steps")
        with self.lock:
            self.acted.append(body)
        time.sleep(self.pause)
        return f"Action: {self.gold[u][len(messages) // 2] if GOOD in first else 'focus on agent'}"


def score_args(out, tasks, url, **more):
    settings = {"out": out, "tasks": tasks, "planner": "scripted", "agent": "scripted", "planner_url": url, "agent_url": url, "m": 2,
                "n": 1, "concurrency": 8, **more}
    return ["03_sample_score.py", *ENV, *[x for k, v in settings.items() for x in (f"--{k}", v)]]


def keys_of(out):
    return [(r["task"], r["plan"], r["rollout"]) for r in read_rows(out / "rollouts.jsonl", ("task", "plan", "rollout", "reward"))]


def test_seed_plans_by_rules(seeded):
    names = [f"{kind}/{v}" for kind, v in TASKS]
    rows = {name: read_rows(seeded / name) for name in CLAIMS["01"]}
    for name in CLAIMS["01"]:
        assert [r["task"] for r in rows[name]] == names, name
    for r, e, talk in zip(*(rows[name] for name in CLAIMS["01"]), strict=True):
        assert e["solved"] and e["reward"] == 1.0 and e["instruction"]
        assert [m["role"] for m in r["messages"]] == ["user", "assistant"] and r["messages"][1]["content"] == plan_reply(r["plan"])
        assert e["instruction"] in r["messages"][0]["content"]
        said = [m["content"] for m in talk["messages"] if m["role"] == "assistant"]
        assert said == [f"Action: {a}" for a, _ in e["steps"]] and talk["messages"][-1]["role"] == "assistant"
        assert (r["plan"] in talk["messages"][0]["content"]) == talk["with_plan"]
    assert 0 < sum(talk["with_plan"] for talk in rows["agent_sft.jsonl"]) < len(TASKS)
    assert read_rows(seeded / "seed_plans.rejected.jsonl") == []


def test_the_whole_chain(run_folder, tasks, seeded, tiny_model, chat_server):
    out, script = run_folder, Script(seeded)
    server = chat_server(script)
    train = ["--epochs", 2, "--batch_size", 2, "--lr", 1e-3]
    check_run("02_sft.py", "--model", tiny_model, "--data", out / "seed_plans.jsonl", "--out", out / "sft", *train)

    printed = check_run(*score_args(out, tasks, server.url))
    assert f"pairs: {len(TASKS)} of {len(TASKS)} tasks, mean Q gap 1.000" in printed
    plans, pairs = read_rows(out / "plans.jsonl", ("task", "m", "plan")), read_rows(out / "pairs.jsonl", ("task", "prompt"))
    assert sorted((r["task"], r["m"]) for r in plans) == sorted((f"{kind}/{v}", m) for kind, v in TASKS for m in range(2))
    assert len(set(keys_of(out))) == len(keys_of(out)) == len(plans)
    for pair in pairs:
        assert (pair["q_chosen"], pair["q_rejected"]) == (1.0, 0.0)
        assert GOOD in pair["chosen"][0]["content"] and BAD in pair["rejected"][0]["content"]
        assert [m["role"] for m in pair["prompt"] + pair["chosen"] + pair["rejected"]] == ["user", "assistant", "assistant"]
    assert {b["temperature"] for b in script.planned + script.acted} == {0.7}

    before = len(server.requests)
    check_run(*score_args(out, tasks, server.url))
    assert len(server.requests) == before, "all is finished: nothing is asked again"

    check_run("04_dpo.py", "--model", out / "sft", "--data", out / "pairs.jsonl", "--out", out / "mpo", *train)
    for name in ("sft", "mpo"):
        assert all((out / name / f).exists() for f in ("config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl"))

    evaluate = ["05_eval.py", *ENV, "--out", out, "--tasks", tasks, "--agents", server.url, "--plans", "none"]
    printed = check_run(*evaluate)
    for stage in CLAIMS.values():
        assert all((out / name).stat().st_size for name in stage)
    [result] = json.loads((out / "results.json").read_text())["results"]
    assert result["tasks"] == len(TASKS) and result["missing"] == 0 and result["ends"] == {"failure": len(TASKS)}
    for metric in ("reward", "success", "reward_per_step"):
        assert result[metric] == {"mean": 0.0, "interval": [0.0, 0.0]}
    assert (out / "results.md").read_text().split("\n# The same in LaTeX")[0] in printed and "| no plan" in printed
    before = len(server.requests)
    assert {b["temperature"] for b in server.requests[-len(TASKS):]} == {0.0}
    check_run(*evaluate)
    assert len(server.requests) == before


def test_more_rollouts_play_only_the_missing(run_folder, tasks, seeded, chat_server):
    script = Script(seeded)
    server = chat_server(script)
    check_run(*score_args(run_folder, tasks, server.url))
    first, planned, acted = keys_of(run_folder), len(script.planned), len(script.acted)
    check_run(*score_args(run_folder, tasks, server.url, n=2))
    assert keys_of(run_folder)[: len(first)] == first and len(script.planned) == planned
    assert len(script.acted) == 2 * acted
    assert sorted(keys_of(run_folder)) == sorted((task, plan, n) for task, plan, _ in first for n in range(2))


def test_scoring_killed_in_the_middle_goes_on(run_folder, tasks, seeded, chat_server):
    script = Script(seeded)
    server, rollouts = chat_server(script), run_folder / "rollouts.jsonl"
    script.pause = 0.1
    args = score_args(run_folder, tasks, server.url, m=4, n=2, concurrency=4)
    process = start_script(*args)
    try:
        end = time.time() + 120
        while (not rollouts.exists() or rollouts.read_bytes().count(b"\n") < 5) and time.time() < end and process.poll() is None:
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(children, 20)
    assert children and not alive, "environment workers and their JVMs end with the stage"
    kept, plans = keys_of(run_folder), read_rows(run_folder / "plans.jsonl")
    total = len(TASKS) * 4 * 2
    assert 5 <= len(kept) < total and not (run_folder / "pairs.jsonl").exists()
    with rollouts.open("ab") as f:
        f.write(b'{"task": "find-plant/0", "plan": "Step 1')  # what a kill in the middle of a row leaves

    script.pause = 0.0
    assert f"pairs: {len(TASKS)}" in check_run(*args)
    assert keys_of(run_folder)[: len(kept)] == kept and read_rows(run_folder / "plans.jsonl")[: len(plans)] == plans
    keys = keys_of(run_folder)
    assert len(set(keys)) == len(keys) == total
    assert {k[:2] for k in keys} == {(r["task"], r["plan"]) for r in read_rows(run_folder / "plans.jsonl")}


def test_a_second_run_on_the_same_folder_is_refused(run_folder, tasks, seeded, chat_server):
    from common import Appender

    with Appender(run_folder / "plans.jsonl"):
        result = run_script(*score_args(run_folder, tasks, chat_server(Script(seeded)).url))
    assert result.returncode == 2 and "plans.jsonl is being written by another run" in result.stderr


def test_ties_are_skipped(run_folder, tasks, seeded, chat_server):
    script = Script(seeded)
    server = chat_server(lambda messages, body: script(messages, body).replace(GOOD, BAD))
    result = run_script(*score_args(run_folder, tasks, server.url))
    assert result.returncode == 2 and "no task has a better and a worse plan" in result.stderr
    assert len(keys_of(run_folder)) == 2 * len(TASKS) and not (run_folder / "pairs.jsonl").exists()


def test_replies_without_a_plan_take_no_part(run_folder, tasks, seeded, chat_server):
    """Asked for three times over, then left out; the task's other plans still make a pair."""
    script, tries = Script(seeded), []

    def reply(messages, body):
        u = max(script.gold, key=messages[0]["content"].rfind)
        if "<meta_plan>" in messages[0]["content"] and "animal. First" in u:
            tries.append(body["seed"])
            return "I have no plan."
        return script(messages, body)

    printed = check_run(*score_args(run_folder, tasks, chat_server(reply).url))
    assert len(set(tries)) == len(tries) == 6 and "2 of 8 replies held no plan" in printed
    assert "pairs: 3 of 4 tasks" in printed
    assert [r["plan"] for r in read_rows(run_folder / "plans.jsonl") if r["task"] == "find-animal/1"] == [None, None]


# ---- the paid teacher ----------------------------------------------------------------------------

PLAN = "Step 1: find what the task asks for\nStep 2: focus on it"
KEY = "sk-test-0123456789"


def test_paid_teacher(run_folder, tasks, chat_server):
    """One plan is good, one must be extracted from a reply in the wrong format, one stays too detailed, one has foreign verbs."""
    def reply(messages, body):
        first = messages[0]["content"]
        if "(n) plant" in first:
            return plan_reply(PLAN)
        if "(n) animal" in first:
            return plan_reply(PLAN) if len(messages) > 1 else "First find the animal, then focus on it."
        if "light bulb" in first:
            return plan_reply("Step 1: open cupboard 4\nStep 2: focus on the thing")
        return plan_reply("Step 1: observe the animals") if body["temperature"] < 1 else plan_reply(PLAN)

    server, out = chat_server(reply), run_folder
    env = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.url}
    args = ["01_seed_plans.py", *ENV, "--out", out, "--teacher", "gpt-test", "--tasks", tasks]
    result = run_script(*args, env=env)
    assert result.returncode == 0, result.stderr
    assert "gpt-test: 4 calls" in result.stdout and "prompt tokens" in result.stdout
    kept, rejected = read_rows(out / "seed_plans.jsonl"), read_rows(out / "seed_plans.rejected.jsonl")
    assert [r["task"] for r in kept] == ["find-plant/0", "find-animal/1", "lifespan-longest-lived/0"]
    assert all(r["plan"] == PLAN and r["teacher"].startswith("gpt-test") for r in kept)
    assert [(r["task"], r["plan"].splitlines()[0]) for r in rejected] == [("power-component/0", "Step 1: open cupboard 4")]
    assert "instance detail" in rejected[0]["reason"] and "cupboard 4" in rejected[0]["reason"]
    assert "3 kept, 1 rejected" in result.stdout
    extraction = [b for b in server.requests if len(b["messages"]) > 1]
    assert len(extraction) == 1 and [m["role"] for m in extraction[0]["messages"]] == ["user", "assistant", "user"]
    temperatures = [b["temperature"] for b in server.requests if "light bulb" in b["messages"][0]["content"]]
    assert temperatures == [0.0, 0.7, 1.0] and len(server.requests) == 1 + 2 + 3 + 3
    assert server.keys == {f"Bearer {KEY}"} and KEY not in result.stdout + result.stderr
    assert not any(KEY.encode() in p.read_bytes() for p in out.rglob("*") if p.is_file()), "a key never reaches a file"

    asked = len(server.requests)
    check_run(*args, env=env)
    assert len(server.requests) == asked, "neither kept nor rejected plans are asked for again"
    assert read_rows(out / "seed_plans.jsonl") == kept and read_rows(out / "seed_plans.rejected.jsonl") == rejected

    path = out / "seed_plans.rejected.jsonl"
    path.write_text(path.read_text().replace("open cupboard 4", "open heat the cupboard 5"))
    check_run(*args, env=env)
    assert len(read_rows(path)) == 1, "an edited plan is checked like any other"

    path.write_text(path.read_text().replace("open heat the cupboard 5", "open the cupboard"))
    printed = check_run(*args, env=env)
    assert len(server.requests) == asked and "4 kept, 0 rejected" in printed and read_rows(path) == []
    edited = read_rows(out / "seed_plans.jsonl")[2]
    assert edited["task"] == "power-component/0" and edited["teacher"] == "edited"
    assert edited["plan"] == "Step 1: open the cupboard\nStep 2: focus on the thing"
    assert edited["messages"][1]["content"] == plan_reply(edited["plan"])
    check_run(*args, env=env)
    assert len(server.requests) == asked and read_rows(out / "seed_plans.jsonl")[2] == edited


def test_a_paid_plan_is_never_lost(run_folder, tasks, chat_server):
    """Killed in the middle of the teacher's work, the stage is not done, and goes on; a run with fewer tasks or by rules forgets
    nothing of what was paid for or edited."""
    answered = threading.Event()

    def reply(messages, body):
        if answered.is_set() and not (out / "second").exists():
            time.sleep(60)
        answered.set()
        return plan_reply(PLAN)

    server, out = chat_server(reply), run_folder
    (out / "seed_plans.jsonl").unlink()
    env = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.url}
    args = ["01_seed_plans.py", *ENV, "--out", out, "--teacher", "gpt-test", "--tasks", tasks]
    process = start_script(*args, "--concurrency", 1, **env)
    try:
        end = time.time() + 60
        while not (out / "teacher_plans.jsonl").exists() or not read_rows(out / "teacher_plans.jsonl"):
            assert process.poll() is None and time.time() < end
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    paid = read_rows(out / "teacher_plans.jsonl")
    assert len(paid) == 1 and not (out / "seed_plans.jsonl").exists(), "to make, the stage is not done"
    (out / "second").touch()
    check_run(*args, env=env)
    plans, before = read_rows(out / "seed_plans.jsonl"), len(server.requests)
    [u] = [r["instruction"] for r in read_rows(out / "trajectories.jsonl") if r["task"] == paid[0]["task"]]
    assert len(plans) == len(TASKS) and sum(u in b["messages"][0]["content"] for b in server.requests) == 1, "asked for once"
    write_jsonl(out / "seed_plans.jsonl", [*plans[:-1], {**plans[-1], "plan": "Step 1: wait"}])
    for fewer in (["--limit", 1], ["--limit", 2, "--teacher", "rules"], []):
        check_run(*args, *fewer, env=env)
    assert len(server.requests) == before
    again = read_rows(out / "seed_plans.jsonl")
    assert [r["plan"] for r in again] == [PLAN] * (len(TASKS) - 1) + ["Step 1: wait"] and again[-1]["teacher"] == "edited"


def test_teacher_whose_context_is_too_short(run_folder, tasks, chat_server):
    """Its rows are rejected with that reason, the others go on."""
    def reply(messages, body):
        return (400, "maximum context length is 5 tokens") if "(n) plant" in messages[0]["content"] else plan_reply(PLAN)

    check_run("01_seed_plans.py", *ENV, "--out", run_folder, "--teacher", "t", "--teacher_url", chat_server(reply).url, "--tasks", tasks)
    [row] = read_rows(run_folder / "seed_plans.rejected.jsonl")
    assert row["task"] == "find-plant/0" and "context" in row["reason"] and len(read_rows(run_folder / "seed_plans.jsonl")) == 3
