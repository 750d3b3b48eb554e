"""Faults of environments and their workers: one line that names the thing, and the rest goes on."""

import asyncio
import concurrent.futures
import errno
import math
import os
import shutil
import signal
from pathlib import Path

import numpy
import pytest
from conftest import CORRIDOR, stage

import common
from common import EnvPool, InputError, WorkerDied, WorkerSessions, read_rows

seed = stage("01_seed_plans")
score = stage("03_sample_score")
ev = stage("05_eval")
TASK = "find-lamp/0"
EXPERT = {"instruction": "Find it.", "steps": [["take", "You have it."]], "reward": 1.0}


def call(monkeypatch, method: str, result, *args):
    """What a worker makes of an environment whose method returns `result`, or raises it."""

    def replaced(self, *_):
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(common.environment(CORRIDOR), method, replaced)
    return WorkerSessions(CORRIDOR, 1).call(0, method, args)


# ---- what an environment returns -----------------------------------------------------------------


@pytest.mark.parametrize(
    "method, result, says",
    [
        ("step", ("seen", math.nan, False, False), "nan.*reward must be a number from 0 to 1"),
        ("step", ("seen", math.inf, False, False), "reward must be"),
        ("step", ("seen", 7, False, False), "reward must be"),
        ("step", ("seen", -0.2, False, False), "reward must be"),
        ("step", ("seen", "0.5", False, False), "reward must be"),
        ("step", ("seen", None, False, False), "reward must be"),
        ("step", (b"seen", 0.5, False, False), "observation must be a text"),
        ("step", (None, 0.5, False, False), "observation must be a text"),
        ("step", ("seen", 0.5, "no", False), "done and success must be True or False"),
        ("step", ("seen", 0.5, False, None), "done and success must be"),
        ("step", ("seen", 0.5, False), "must be .observation, reward, done, success"),
        ("step", None, "must be .observation, reward, done, success"),
        ("step", "seen", "must be .observation, reward, done, success"),
        ("reset", None, "instruction must be a text"),
        ("reset", ("Find it.", {}), "instruction must be a text"),
        ("tasks", [TASK, 3], "a task must be a text"),
        ("tasks", None, "not iterable"),
        ("expert", [["take", "You have it."]], "dictionary with instruction, steps and reward"),
        ("expert", {"steps": []}, "dictionary with instruction, steps and reward"),
        ("expert", {**EXPERT, "reward": 2}, "reward must be"),
        ("expert", {**EXPERT, "steps": ["take"]}, "list of .action, observation"),
        ("expert", {**EXPERT, "steps": [["take", None]]}, "must be a text"),
        ("expert", {**EXPERT, "steps": 5}, "not iterable"),
        ("expert", {**EXPERT, "by": {1, 2}}, "not JSON serializable"),
    ],
)
def test_what_an_environment_may_not_return(monkeypatch, method, result, says):
    """The error names method, argument and value."""
    with pytest.raises(InputError, match=f"(?s)^{method}.*x.* of the environment.*{says}"):
        call(monkeypatch, method, result, "x")


@pytest.mark.parametrize(
    "method, result, kept",
    [
        ("step", ("seen", 1, True, True), ("seen", 1, True, True)),
        ("step", ["seen", 1 + 1e-9, True, True], ("seen", 1.0, True, True)),
        ("step", ("seen", -1e-12, True, False), ("seen", 0.0, True, False)),
        ("step", ("a \ud83d b", 0.25, False, False), ("a \ufffd b", 0.25, False, False)),
        (
            "step",
            ("seen", numpy.float32(0.5), numpy.bool_(True), numpy.bool_(False)),
            ("seen", 0.5, True, False),
        ),
        ("reset", "Find it.", "Find it."),
        ("tasks", (TASK,), [TASK]),
        ("expert", None, None),
        ("expert", {**EXPERT, "steps": [("take", "on")]}, {**EXPERT, "steps": [["take", "on"]]}),
        ("expert", {**EXPERT, "by": "search"}, {**EXPERT, "by": "search"}),
    ],
)
def test_what_an_environment_may_return(monkeypatch, method, result, kept):
    """It is made of Python's own types, which JSON has."""
    found = call(monkeypatch, method, result, "x")
    assert found == kept and repr(found) == repr(kept)


# ---- what an environment raises ------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, raised, says",
    [
        (SystemExit(0), RuntimeError, "SystemExit: 0"),
        (KeyboardInterrupt(), RuntimeError, "KeyboardInterrupt"),
        (GeneratorExit(), RuntimeError, "GeneratorExit"),
        (asyncio.CancelledError(), RuntimeError, "CancelledError"),
        (ZeroDivisionError("x / 0"), RuntimeError, "ZeroDivisionError: x / 0"),
        (MemoryError("of 8 GB"), MemoryError, "^$"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError, "^$"),
        (InputError("no such task"), InputError, "no such task"),
        (type("OwnError", (InputError,), {})("no such task"), InputError, "no such task"),
    ],
)
def test_what_an_environment_raises(monkeypatch, error, raised, says):
    """Nothing that ends a process, and only what any process can unpickle."""
    with pytest.raises(raised, match=says) as caught:
        call(monkeypatch, "step", error, "x")
    assert type(caught.value) is raised


def test_a_wrapped_error_of_memory(monkeypatch):
    error = RuntimeError("the simulator failed")
    error.__cause__ = MemoryError()
    with pytest.raises(MemoryError):
        call(monkeypatch, "step", error, "x")


class Executor:
    """An executor whose calls end as the test says."""

    died = (concurrent.futures.BrokenExecutor, TimeoutError)

    def __init__(self, *_):
        self.futures = []
        self.killed = False

    def submit(self, *_):
        self.futures.append(concurrent.futures.Future())
        return self.futures[-1]

    def kill(self):
        self.killed = True
        for future in self.futures:
            future.cancel()


def test_calls_in_the_queue_of_a_worker_that_is_killed():
    """They are as those of a worker that died. A call is cancelled only with its episode."""

    async def main():
        worker = common.Worker(Executor, CORRIDOR, 8)
        sessions = [common.Session(worker, number) for number in range(3)]
        first, *queued = [asyncio.create_task(s("step", "x", deadline=0.05)) for s in sessions]
        ended = await asyncio.gather(first, *queued, return_exceptions=True)
        assert all(type(error) is WorkerDied for error in ended), ended
        running = asyncio.create_task(common.Session(worker, 9)("step", "x"))
        await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not worker.executor.killed

    asyncio.run(main())


def test_a_worker_without_memory_is_killed():
    async def main():
        worker = common.Worker(Executor, CORRIDOR, 8)
        session = common.Session(worker, 0)
        executor = worker.executor
        running = asyncio.create_task(session("step", "x"))
        await asyncio.sleep(0)
        executor.futures[0].set_exception(MemoryError())
        with pytest.raises(WorkerDied, match="ran out of memory"):
            await running
        assert executor.killed and worker.executor is None

    asyncio.run(main())


# ---- a method that fails on some tasks -----------------------------------------------------------


def each(tasks, failing, worked: int = 0) -> dict:
    """The results of `EnvPool.each`, where the method fails on some of the tasks."""

    async def use(task, _):
        if task in failing:
            raise RuntimeError("no such game")
        return f"u of {task}"

    async def main():
        pool = EnvPool(CORRIDOR, 1)
        pool.use = use
        return await pool.each(tasks, "reset", worked=worked)

    return asyncio.run(main())


def test_a_task_that_always_fails_is_left_out(capsys):
    tasks = [f"find-lamp/{number}" for number in range(40)]
    assert list(each(tasks, {TASK, "find-lamp/7"})) == [*tasks[1:7], *tasks[8:]]
    said = capsys.readouterr().out
    assert "2 of 40 tasks are left out" in said
    assert f"reset of {TASK} failed three times: no such game" in said
    assert each([TASK], {TASK}, worked=1) == {}, "it is tried again, and does not stop the stage"
    for most, worked in ((5, 0), (30, 1)):
        with pytest.raises(InputError, match=f"reset of {tasks[most - 1]} failed three times"):
            each(tasks, tasks, worked)
    with pytest.raises(InputError, match="failed three times: no such game"):
        each([TASK], {TASK})


# an environment with faults in some tasks
FAULTY = f"""
import os, time
import common

Corridor = common.environment({CORRIDOR!r})

class Faulty(Corridor):
    def reset(self, task):
        if task == os.environ.get("RESET_FAILS"):
            raise ValueError("no such game")
        return super().reset(task)

    def expert(self, task):
        if task == os.environ.get("EXPERT_EXITS"):
            raise SystemExit(0)
        return super().expert(task)
"""


@pytest.fixture
def faulty(tmp_path) -> str:
    """The folder of an environment with faults."""
    folder = tmp_path / "faulty"
    folder.mkdir()
    (folder / "env.py").write_text(FAULTY)
    for prompt in Path(CORRIDOR).glob("*.txt"):
        (folder / prompt.name).write_text(prompt.read_text())
    return str(folder)


def reply(messages, body):
    """A planner with two plans, and an agent for which one of them is better."""
    if "Action" not in messages[0]["content"]:
        return common.plan_reply(f"Step 1: walk on {body.get('seed', 0) % 2}")
    return "Action: walk on" if "on 0" in messages[0]["content"] else "Action: touch the trap"


@pytest.mark.slow
def test_stages_go_on_without_such_a_task(tmp_path, faulty, chat_server, monkeypatch, capsys):
    """Stage 1 without a trajectory of it, stages 3 and 5 without its plan; in the tables its
    episode is missing. Once the fault is mended, the same command does it, too."""
    run = tmp_path / "run"
    usual = {"env": faulty, "out": str(run), "workers": 2}
    seed_args = {**usual, "teacher": "rules", "limit": 4}
    monkeypatch.setenv("EXPERT_EXITS", TASK)
    for _ in range(2):
        seed.main(seed.Args(**seed_args))
        said = capsys.readouterr().out
        assert f"expert of {TASK} failed three times: SystemExit: 0" in said
        assert len(read_rows(run / "seed_plans.jsonl")) == 3
    monkeypatch.delenv("EXPERT_EXITS")
    seed.main(seed.Args(**seed_args))
    assert len(read_rows(run / "seed_plans.jsonl")) == 4

    url = chat_server(reply).url
    models = {"planner": "p", "agent": "a", "planner_url": url, "agent_url": url}
    score_args = score.Args(**usual, **models, limit=4, m=6, n=1)
    monkeypatch.setenv("RESET_FAILS", TASK)
    score.main(score_args)
    assert f"reset of {TASK} failed three times: ValueError: no such" in capsys.readouterr().out
    assert len(read_rows(run / "plans.jsonl")) == 3 * 6
    monkeypatch.delenv("RESET_FAILS")
    score.main(score_args)
    assert len(read_rows(run / "plans.jsonl")) == 4 * 6

    ev_args = {**usual, "teacher": url, "plans": ["none", "gpt"], "splits": ["seen"], "limit": 2}
    monkeypatch.setenv("RESET_FAILS", "find-lamp/10")
    ev.main(ev.Args(**ev_args, agents=[url]))
    assert "1 of 2 missing" in capsys.readouterr().out
    episodes = read_rows(run / "eval" / "rollouts.jsonl")
    assert [row["end"] for row in episodes if row["task"] == "find-lamp/10"] == ["crash"]
    monkeypatch.delenv("RESET_FAILS")
    ev.main(ev.Args(**ev_args, agents=[url]))
    assert "of 2 missing" not in capsys.readouterr().out


@pytest.mark.slow
def test_what_another_run_has_written_before_the_lock(tmp_path, chat_server, monkeypatch):
    """It is read, and not done again: no key has two rows."""
    server = chat_server(reply)
    models = {"planner": "p", "agent": "a", "planner_url": server.url, "agent_url": server.url}
    usual = {"env": CORRIDOR, "workers": 1, "limit": 2, "m": 6, "n": 1, **models}
    first = tmp_path / "first"
    second = tmp_path / "second"
    score.main(score.Args(**usual, out=str(first)))
    asked = len(server.requests)
    lock = common.Appender._lock

    def another_run_ends(self, path):
        shutil.copy(first / path.name, path)
        lock(self, path)

    monkeypatch.setattr(common.Appender, "_lock", another_run_ends)
    score.main(score.Args(**usual, out=str(second)))
    assert len(server.requests) == asked
    for name in ("plans.jsonl", "rollouts.jsonl", "pairs.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.slow
def test_a_worker_that_hangs_with_a_queue(monkeypatch):
    """All its calls fail as those of a dead worker do, whatever their deadlines."""

    async def main():
        async with EnvPool(CORRIDOR, 1) as pool:
            sessions = []
            for number in range(6):
                sessions.append(common.Session(pool.workers[0], number))
            await sessions[0]("reset", TASK)
            os.kill(pool.workers[0].executor.process.pid, signal.SIGSTOP)
            calls = [session("reset", TASK, deadline=1.0 + i) for i, session in enumerate(sessions)]
            ended = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(error) for error in ended] == [WorkerDied] * 6, ended

    asyncio.run(main())
