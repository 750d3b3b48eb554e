"""The five stages, one after the other, on the toy environment with a tiny model and a scripted
planner and agent; resume after a kill; the paid teacher."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from bench.stub_server import completion
from conftest import (
    CORRIDOR,
    ROOT,
    check_run,
    run_script,
    script_env,
    stage,
    start_script,
    write_jsonl,
)

from common import Appender, InputError, parse_plan, plan_reply, read_rows

seed = stage("01_seed_plans")
score = stage("03_sample_score")
GOOD = "walk on until the task is done"
BAD = "take what is there"
SEED_FILES = ("trajectories.jsonl", "seed_plans.jsonl", "agent_sft.jsonl")
SCORE_FILES = ("plans.jsonl", "rollouts.jsonl", "pairs.jsonl", "best_plans.jsonl")
EVAL_FILES = (
    "eval/conditions.jsonl",
    "eval/rollouts.jsonl",
    "results.md",
    "results.json",
    "results.png",
    "report.html",
)


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


@pytest.fixture
def script(seeded):
    return Script(read_rows(seeded / "trajectories.jsonl"))


class Script:
    """Planner and agent. Every other plan of a task, told apart by the request's seed, is good. The
    agent acts as the expert if the plan in its prompt is good, else its actions are invalid."""

    def __init__(self, trajectories):
        self.steps = {row["instruction"]: row["steps"] for row in trajectories}
        self.seeds = {}
        self.lock = threading.Lock()
        self.pause = 0.0  # seconds before each action
        self.planned = []
        self.acted = []

    def __call__(self, messages, body):
        first = messages[0]["content"]
        u = max(self.steps, key=first.rfind)
        if "Action" not in first:
            return self.plan(u, body)
        with self.lock:
            self.acted.append(body)
        time.sleep(self.pause)
        if GOOD not in first:
            return "Action: dance"
        action, _ = self.steps[u][len(messages) // 2]
        return f"Action: {action}"

    def plan(self, u, body):
        with self.lock:
            self.planned.append(body)
            seeds = self.seeds.setdefault(u, [])
            seeds.append(body["seed"])
        plan = BAD if len(seeds) % 2 else GOOD
        return plan_reply(f"Step 1: {plan}\nStep 2: wait {body['seed']} steps")


def settings(out, url, **more) -> dict:
    usual = {"env": CORRIDOR, "out": str(out), "workers": 1, "limit": 4, "m": 2, "n": 1}
    models = {"planner": "scripted", "agent": "scripted", "planner_url": url, "agent_url": url}
    return {**usual, **models, "concurrency": 8, **more}


def run_score(out, url, **more) -> None:
    score.main(score.Args(**settings(out, url, **more)))


def flags(**values) -> list[str]:
    words = []
    for name, value in values.items():
        words += [f"--{name}", str(value)]
    return words


def keys_of(out):
    rows = read_rows(out / "rollouts.jsonl", ("task", "plan", "rollout", "reward"))
    return [(row["task"], row["plan"], row["rollout"]) for row in rows]


def said_by_assistant(messages) -> list[str]:
    return [m["content"] for m in messages if m["role"] == "assistant"]


def test_seed_plans_by_rules(seeded):
    experts, plans, talks = [read_rows(seeded / file) for file in SEED_FILES]
    assert len(experts) == 4
    for e, row, talk in zip(experts, plans, talks, strict=True):
        assert e["task"] == row["task"] == talk["task"]
        assert e["solved"] and e["reward"] == 1.0 and e["instruction"]
        user, assistant = row["messages"]
        assert user["role"] == "user" and e["instruction"] in user["content"]
        assert assistant == {"role": "assistant", "content": plan_reply(row["plan"])}
        assert said_by_assistant(talk["messages"]) == [f"Action: {a}" for a, _ in e["steps"]]
        assert talk["messages"][-1]["role"] == "assistant"
        assert (row["plan"] in talk["messages"][0]["content"]) == talk["with_plan"]
    assert 0 < sum(talk["with_plan"] for talk in talks) < 4
    assert read_rows(seeded / "seed_plans.rejected.jsonl") == []


def test_the_whole_chain(run_folder, script, tiny_model, chat_server):
    """All five scripts as a user runs them."""
    out = run_folder
    server = chat_server(script)
    corridor = flags(env=CORRIDOR, out=out, workers=1)
    train = flags(epochs=2, batch_size=2, lr=1e-3)
    check_run("01_seed_plans.py", *corridor, *flags(teacher="rules", limit=4))
    sft = flags(model=tiny_model, data=out / "seed_plans.jsonl", out=out / "sft")
    check_run("02_sft.py", *sft, *train)

    scoring = flags(**settings(out, server.url))
    printed = check_run("03_sample_score.py", *scoring)
    assert "pairs: 4 from 4 tasks, mean Q gap 1.000" in printed
    plans = read_rows(out / "plans.jsonl", ("task", "m", "plan"))
    assert len({(row["task"], row["m"]) for row in plans}) == len(plans) == 8
    assert len(set(keys_of(out))) == len(keys_of(out)) == 8
    for pair in read_rows(out / "pairs.jsonl", ("task", "prompt")):
        assert (pair["q_chosen"], pair["q_rejected"]) == (1.0, 0.0)
        assert GOOD in pair["chosen"][0]["content"] and BAD in pair["rejected"][0]["content"]
        roles = [m["role"] for m in pair["prompt"] + pair["chosen"] + pair["rejected"]]
        assert roles == ["user", "assistant", "assistant"]
    assert {body["temperature"] for body in script.planned + script.acted} == {0.7}
    asked = len(server.requests)
    run_score(out, server.url)
    assert len(server.requests) == asked, "all is finished: nothing is asked again"

    dpo = flags(model=out / "sft", data=out / "pairs.jsonl", out=out / "mpo")
    check_run("04_dpo.py", *dpo, *train)
    for file in ("config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl"):
        assert (out / "sft" / file).exists() and (out / "mpo" / file).exists()

    evaluation = [*corridor, *flags(agents=server.url, plans="none", splits="seen")]
    assert "| no plan" in check_run("05_eval.py", *evaluation)
    for file in SEED_FILES + SCORE_FILES + EVAL_FILES:
        assert (out / file).stat().st_size, file
    [result] = json.loads((out / "results.json").read_text())["results"]
    assert result["tasks"] >= 4 and result["missing"] == 0
    assert result["ends"].keys() <= {"errors", "steps"} and result["reward"]["mean"] == 0.0
    assert server.requests[-1]["temperature"] == 0.0


def test_more_rollouts_play_only_the_missing(run_folder, script, chat_server):
    url = chat_server(script).url
    run_score(run_folder, url)
    first = keys_of(run_folder)
    planned = len(script.planned)
    acted = len(script.acted)
    run_score(run_folder, url, n=2)
    assert keys_of(run_folder)[: len(first)] == first and len(script.planned) == planned
    assert len(script.acted) == 2 * acted
    second = [(task, plan, 1) for task, plan, _ in first]
    assert sorted(keys_of(run_folder)) == sorted(first + second)
    run_score(run_folder, url, n=2, max_model_len=100)
    assert len(keys_of(run_folder)) == 4 * len(first), "the context length is a setting"


def test_a_failed_rollout_is_played_again(run_folder, script, chat_server):
    """By the next run."""
    url = chat_server(script).url
    run_score(run_folder, url)
    path = run_folder / "rollouts.jsonl"
    failed, *others = read_rows(path)
    write_jsonl(path, [failed | {"end": "crash", "reward": 0.0}, *others])
    run_score(run_folder, url)
    *_, again = read_rows(path)
    assert len(keys_of(run_folder)) == len(others) + 2
    assert again | {"seconds": 0} == failed | {"seconds": 0}


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


def test_killed_scoring_resumes(run_folder, script, chat_server):
    url = chat_server(script).url
    rollouts = run_folder / "rollouts.jsonl"
    script.pause = 0.1
    more = {"m": 4, "n": 2, "concurrency": 4}
    kill_at(5, rollouts, "03_sample_score.py", *flags(**settings(run_folder, url, **more)))
    kept = keys_of(run_folder)
    plans = read_rows(run_folder / "plans.jsonl")
    assert 5 <= len(kept) < 32 and not (run_folder / "pairs.jsonl").exists()
    with rollouts.open("ab") as f:
        f.write(b'{"task": "find-lamp/0", "plan": "Step 1')  # a row cut off by a kill

    script.pause = 0.0
    run_score(run_folder, url, **more)
    keys = keys_of(run_folder)
    assert keys[: len(kept)] == kept and len(set(keys)) == len(keys) == 32
    assert read_rows(run_folder / "plans.jsonl")[: len(plans)] == plans
    assert len(read_rows(run_folder / "pairs.jsonl")) == 4


@pytest.mark.parametrize(
    "number, status",
    [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGHUP, 129)],
)
def test_a_preempted_stage_ends_its_workers(run_folder, script, chat_server, number, status):
    """A signal to a stage and its process group, in the middle of its episodes."""
    script.pause = 0.1
    words = flags(**settings(run_folder, chat_server(script).url, n=4, concurrency=4))
    process = subprocess.Popen(
        [sys.executable, "03_sample_score.py", *words],
        cwd=ROOT,
        env=script_env(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    rollouts = run_folder / "rollouts.jsonl"
    end = time.time() + 60
    while not rollouts.exists() or rollouts.read_bytes().count(b"\n") < 3:
        assert time.time() < end and process.poll() is None
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status and "Traceback" not in err
    assert err.splitlines()[-1].startswith("interrupted: finished rows are kept")
    assert len(keys_of(run_folder)) >= 3 and rollouts.read_bytes().endswith(b"\n")
    _, alive = psutil.wait_procs(children, 5)
    assert children and not alive


@pytest.mark.slow
def test_killed_evaluation_resumes(run_folder, script, chat_server):
    rollouts = run_folder / "eval" / "rollouts.jsonl"
    evaluation = flags(env=CORRIDOR, out=run_folder, workers=1, concurrency=2, plans="none")
    evaluation += flags(agents=chat_server(script).url)
    script.pause = 0.05
    kill_at(3, rollouts, "05_eval.py", *evaluation)
    kept = read_rows(rollouts)
    script.pause = 0.0
    check_run("05_eval.py", *evaluation)
    rows = read_rows(rollouts)
    assert rows[: len(kept)] == kept and 3 <= len(kept) < len(rows)
    assert len({row["task"] for row in rows}) == len(rows) == 16


def test_a_second_run_on_the_same_folder_is_refused(run_folder, script, chat_server):
    url = chat_server(script).url
    refused = pytest.raises(InputError, match=r"plans\.jsonl is being written by another run")
    with Appender(run_folder / "plans.jsonl"), refused:
        run_score(run_folder, url)


def test_ties_are_skipped_and_equal_plans_scored_once(run_folder, script, chat_server):
    def reply(messages, body):
        return script(messages, body) if "stop" in body else plan_reply(f"Step 1: {BAD}")

    with pytest.raises(InputError, match="no task has a better and a worse plan"):
        run_score(run_folder, chat_server(reply).url)
    assert len(keys_of(run_folder)) == 4 and not (run_folder / "pairs.jsonl").exists()


def test_replies_without_a_plan_are_ignored(run_folder, seeded, script, chat_server, capsys):
    """Asked for three times each; the other plans of the task still make a pair."""
    attempts = []
    expert = read_rows(seeded / "trajectories.jsonl")[0]

    def reply(messages, body):
        asks_for_plan = "stop" not in body and expert["instruction"] in messages[0]["content"]
        if asks_for_plan and len(attempts) < 6:
            attempts.append(body["seed"])
            return "I have no plan."
        return script(messages, body)

    run_score(run_folder, chat_server(reply).url, m=2)
    assert len(set(attempts)) == 6
    printed = capsys.readouterr().out
    assert "2 of 8 plans are missing" in printed and "pairs: 3 from 4 tasks" in printed
    rows = read_rows(run_folder / "plans.jsonl")
    assert [row["plan"] for row in rows if row["task"] == expert["task"]] == [None, None]


def test_planner_and_agent_that_think(run_folder, script, chat_server, capsys):
    """Their thinking is ignored; replies that end in it are counted, with the token limit."""

    def reply(messages, body):
        plans = "Action" not in messages[0]["content"]
        if (plans and body["seed"] % 2) or len(messages) == 3:
            chat = completion("Let me see.\n<think>\nHm. Action: wait", 7, 3)
            chat["choices"][0]["finish_reason"] = "length"
            return 200, json.dumps(chat)
        if len(messages) > 3:
            messages = [messages[0], *messages[3:]]
        return f"<think>Action: wait</think>\n{script(messages, body)}"

    server = chat_server(reply)
    more = {"m": 3, "agent_thinking": "on:100", "plan_thinking": "low"}
    run_score(run_folder, server.url, **more)
    printed = capsys.readouterr().out
    plans = read_rows(run_folder / "plans.jsonl")
    cut_off = sum(row["thinking_cut_off"] for row in plans)
    assert f"{cut_off} replies of the planner ended while it was still" in printed and cut_off
    rows = read_rows(run_folder / "rollouts.jsonl")
    assert sum(row["thinking_cut_off"] for row in rows) == len(rows)
    assert f"{len(rows)} replies of the agent ended while it was still thinking" in printed
    assert "--plan_tokens 512 is too small" in printed
    assert "--agent_tokens 512 is too small" in printed
    assert {body["max_tokens"] for body in script.acted} == {612}
    assert {body["reasoning_effort"] for body in script.planned} == {"low"}
    assert "Hm" not in json.dumps(rows + plans)
    run_score(run_folder, server.url, **more | {"agent_thinking": "off"})
    assert len(read_rows(run_folder / "rollouts.jsonl")) == 2 * len(rows)
    assert len(read_rows(run_folder / "plans.jsonl")) == len(plans)


# ---- the paid teacher ----------------------------------------------------------------------------

PLAN = "Step 1: walk on until there is a lamp\nStep 2: take it"
KEY = "sk-test-0123456789"


@pytest.fixture
def teach(run_folder, monkeypatch, chat_server):
    """teach(reply) -> (server, run): `run()` is stage 1 with a teacher behind OPENAI_BASE_URL."""
    usual = {"env": CORRIDOR, "out": str(run_folder), "limit": 4, "workers": 1}

    def run(teacher="gpt-test", **more):
        seed.main(seed.Args(**{**usual, "teacher": teacher, **more}))

    def start(reply):
        server = chat_server(reply)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("MPO_MAX_RETRIES", "1")
        return server, run

    return start


@pytest.fixture
def four_replies(seeded):
    """A teacher. Of four plans one is good, one is extracted from a reply in the wrong format, one
    stays too detailed, one passes at the third temperature."""
    instructions = [row["instruction"] for row in read_rows(seeded / "trajectories.jsonl")]

    def reply(messages, body):
        [n] = [i for i, u in enumerate(instructions) if u in messages[0]["content"]]
        if n == 1 and len(messages) == 1:
            return "First find it, then take it."
        if n == 2:
            return plan_reply("Step 1: take cupboard 4\nStep 2: take it")
        if n == 3 and body["temperature"] < 1:
            return plan_reply("Step 1: observe the room")
        return plan_reply(PLAN)

    return reply


def test_teacher_and_quality_control(run_folder, seeded, teach, four_replies, capsys):
    experts = read_rows(seeded / "trajectories.jsonl")
    tasks = [e["task"] for e in experts]
    server, run = teach(four_replies)
    run()
    printed = capsys.readouterr().out
    assert "gpt-test: 4 calls" in printed and "3 kept, 1 rejected" in printed
    kind = tasks[2].split("/")[0]
    total = len([task for task in tasks if task.startswith(kind)])
    assert f"{kind}: {total - 1} of {total} kept" in printed
    assert "rejected 1: instance detail" in printed
    kept = read_rows(run_folder / "seed_plans.jsonl")
    [rejected] = read_rows(run_folder / "seed_plans.rejected.jsonl")
    assert [row["task"] for row in kept] == [tasks[0], tasks[1], tasks[3]]
    assert all((row["plan"], row["teacher"]) == (PLAN, "gpt-test") for row in kept)
    assert rejected["task"] == tasks[2] and "cupboard 4" in rejected["reason"]
    [extraction] = [body["messages"] for body in server.requests if len(body["messages"]) > 1]
    assert [m["role"] for m in extraction] == ["user", "assistant", "user"]
    temperatures = []
    for body in server.requests:
        if experts[2]["instruction"] in body["messages"][0]["content"]:
            temperatures.append(body["temperature"])
    assert temperatures == [0.0, 0.7, 1.0] and len(server.requests) == 1 + 2 + 3 + 3
    assert server.keys == {f"Bearer {KEY}"} and KEY not in printed
    files = [path for path in run_folder.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in path.read_bytes() for path in files)

    run()
    assert len(server.requests) == 9, "neither kept nor rejected plans are asked for again"
    assert read_rows(run_folder / "seed_plans.jsonl") == kept
    run(temperatures=[0.5])
    assert len(server.requests) == 10, "rejected plans are asked for at other temperatures"
    assert read_rows(run_folder / "seed_plans.jsonl") == kept


def test_edited_plans_replace_the_teachers(run_folder, seeded, teach, four_replies, capsys):
    """They are checked as the others, and nothing is asked for again."""
    tasks = [e["task"] for e in read_rows(seeded / "trajectories.jsonl")]
    server, run = teach(four_replies)
    run()
    path = run_folder / "edited_plans.jsonl"
    bad_edit = {"task": tasks[2], "plan": "Step 1: walk on\nStep 5: take it in cupboard 4"}
    write_jsonl(path, [bad_edit])
    run()
    [still] = read_rows(run_folder / "seed_plans.rejected.jsonl")
    assert still["teacher"] == "edited" and "cupboard 4" in still["reason"]
    edit = {"task": tasks[2], "plan": "Step 1: walk on\nStep 5: take it"}
    write_jsonl(path, [edit, {"task": tasks[0], "plan": "1. take it"}])
    run()
    assert len(server.requests) == 9 and "4 kept, 0 rejected" in capsys.readouterr().out
    rows = read_rows(run_folder / "seed_plans.jsonl")
    plans = {row["task"]: (row["plan"], row["teacher"]) for row in rows}
    assert plans[tasks[2]] == ("Step 1: walk on\nStep 2: take it", "edited")
    assert plans[tasks[0]] == ("Step 1: take it", "edited") and plans[tasks[1]][0] == PLAN
    write_jsonl(path, [edit, {"task": tasks[0], "plan": "take it"}])
    run()
    [rejected] = read_rows(run_folder / "seed_plans.rejected.jsonl")
    assert rejected["reason"].startswith("format: no numbered steps")
    assert rejected["plan"] == "take it" and len(server.requests) == 9
    write_jsonl(path, [edit])
    run(temperatures=[0.5])
    assert len(server.requests) == 9, "accepted plans are kept with other temperatures"


def test_earlier_plans_are_checked_again(run_folder, teach, four_replies, monkeypatch, capsys):
    """By the rules as they are now, without new requests."""
    server, run = teach(four_replies)
    run()
    before = read_rows(run_folder / "seed_plans.rejected.jsonl")
    with monkeypatch.context() as other_rules:
        other_rules.setattr(seed, "INSTANCE", re.compile("lamp"))
        run()
    assert "1 kept, 3 rejected" in capsys.readouterr().out
    assert len(server.requests) == 9
    [kept] = read_rows(run_folder / "seed_plans.jsonl")
    assert kept["plan"] == "Step 1: take cupboard 4\nStep 2: take it"
    run()
    assert read_rows(run_folder / "seed_plans.rejected.jsonl") == before


def test_a_reply_without_a_plan_stays_rejected(run_folder, teach):
    """It is no plan, whatever its lines look like."""
    server, run = teach(lambda messages, body: "Step 1: take it")
    for _ in range(2):
        with pytest.raises(InputError, match="no seed plan passed"):
            run(limit=1)
        [rejected] = read_rows(run_folder / "seed_plans.rejected.jsonl")
        assert rejected["reason"].startswith("format: ") and len(server.requests) == 6


def test_an_extraction_longer_than_the_context(run_folder, teach):
    """The first reply counts: it has no plan, so that the next temperature is tried."""

    def reply(messages, body):
        if len(messages) > 1:
            return 400, "This model's maximum context length is 64 tokens."
        return plan_reply(PLAN) if body["temperature"] else "Take it."

    server, run = teach(reply)
    run(limit=1)
    assert len(server.requests) == 3
    [row] = read_rows(run_folder / "seed_plans.jsonl")
    assert row["plan"] == PLAN


@pytest.mark.parametrize(
    "teacher_text, more, said",
    [
        (None, {}, "--env .*corridor --prompts .* has no teacher.txt"),
        (
            "{task}{conversation}",
            {"explored": "x.jsonl"},
            "--prompts .*{explored}, which --explored needs",
        ),
    ],
)
@pytest.mark.parametrize("check", [False, True])
def test_prompts_that_the_teacher_needs(tmp_path, monkeypatch, check, teacher_text, more, said):
    env = tmp_path / "corridor"
    shutil.copytree(CORRIDOR, env)
    (env / "teacher.txt").unlink()
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    if teacher_text:
        (prompts / "teacher.txt").write_text(teacher_text)
    a = {"env": str(env), "out": str(tmp_path / "run"), "prompts": str(prompts), "check": check}
    with pytest.raises(InputError, match=said):
        seed.main(seed.Args(**a, **more))
    assert not (tmp_path / "run").exists()


def test_thoughts(run_folder, seeded, teach, capsys):
    """One call a trajectory; a reply with another number of thoughts is asked for again."""
    experts = read_rows(seeded / "trajectories.jsonl")
    temperatures = []

    def reply(messages, body):
        text = messages[0]["content"]
        if "Action 1:" not in text:
            return plan_reply(PLAN)
        temperatures.append(body["temperature"])
        [n] = [n for n, e in enumerate(experts) if e["instruction"] in text]
        count = len(experts[n]["steps"])
        if n == 1 or (n == 2 and body["temperature"] == 0):
            count -= 1
        return "\n".join(f"{i}. It is thought {i} of {n}." for i in range(1, count + 1))

    server, run = teach(reply)
    run(thoughts=True, plan_share=0.5)
    assert sorted(temperatures) == [0.0] * 4 + [0.7] * 2 + [1.0]
    assert "3 trajectories have them, 1 have not" in capsys.readouterr().out
    for n, talk in enumerate(read_rows(run_folder / "agent_sft.jsonl")):
        for i, said in enumerate(said_by_assistant(talk["messages"]), 1):
            thought = "" if n == 1 else f"Thought: It is thought {i} of {n}.\n"
            assert re.fullmatch(re.escape(thought) + "Action: .+", said)
    before = len(server.requests)
    run(thoughts=True)
    assert len(server.requests) == before, "nothing is asked twice"
    with pytest.raises(InputError, match="--thoughts needs a model as --teacher"):
        run(thoughts=True, teacher="rules")


def test_a_paid_plan_is_never_lost(run_folder, teach):
    """Kill the stage during the teacher's work, resume it, run it with fewer tasks and by rules."""
    blocked = threading.Event()

    def reply(messages, body):
        if blocked.is_set() and not (run_folder / "go").exists():
            time.sleep(60)
        blocked.set()
        return plan_reply(PLAN)

    server, run = teach(reply)
    log = run_folder / "teacher_plans.jsonl"
    arguments = flags(env=CORRIDOR, out=run_folder, teacher="gpt-test", limit=4, concurrency=1)
    process = start_script(
        "01_seed_plans.py", *arguments, OPENAI_API_KEY=KEY, OPENAI_BASE_URL=server.url
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
    asked = len(server.requests)
    paid = read_rows(log)
    assert len({row["task"] for row in paid}) == len(paid) == 4
    run(limit=2)
    run(teacher="rules")
    run()
    assert len(server.requests) == asked and read_rows(log) == paid
    assert all(parse_plan(plan_reply(row["plan"])) == PLAN for row in paid)


@pytest.mark.parametrize(
    "command, said",
    [
        (["01_seed_plans.py", "--env", "nowhere"], "error: --env nowhere: "),
        (["03_sample_score.py", "--m", "1"], "error: --m must be at least 2"),
        (["05_eval.py", "--lerning_rate", "3"], "--lerning_rate"),
    ],
)
def test_one_line_and_exit_status_2(command, said):
    """Errors as a user sees them, with three commands; the rest is tested by the functions."""
    result = run_script(*command)
    errors = [line for line in result.stderr.splitlines() if "error: " in line]
    assert result.returncode == 2 and len(errors) == 1 and said in errors[0], result.stderr
    assert "Traceback" not in result.stderr
