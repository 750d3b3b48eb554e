"""What the five stage scripts share, in the order in which data passes through it.

    1. rows          JSONL files: read, append, resume
    2. prompts       messages for the planner and the agent; parsing of plans and actions
    3. environments  the protocol of data/NAME/env.py, and the pool of worker processes
    4. models        asking models, and serving local ones
    5. rollouts      one episode; many episodes at once
    6. training      what the SFT loop and the DPO loop share

Symbols follow the paper: u a task instruction, p a meta plan, e a trajectory, r its reward in
[0, 1], Q(p) the mean reward of N rollouts with plan p, M plans per task.

Heavy packages (torch, transformers, openai) are imported inside functions, so that `--help` and the
environment workers start fast.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import importlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data"


class InputError(Exception):
    """An error that the user can fix, such as bad input: one line, exit status 2."""


class ContextOverflow(InputError):
    """A prompt is longer than the model's context."""


def arg(default, text: str):
    """A field of a stage's `Args` dataclass: its default value and its `--help` text."""
    metadata = {"help": text.replace("%", "%%")}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def run_stage(main, args_class, positional: str | None = None, training: bool = False):
    """Parse the command line into `args_class` and call `main(args)`. Errors that the user can fix
    become one line and an exit status. `positional`: the field that takes words without a flag.
    `training`: skip the interpreter's shutdown, where a thread of gloo can abort the process
    (pytorch#179291)."""
    from transformers import HfArgumentParser

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    doc = sys.modules[args_class.__module__].__doc__
    parser = HfArgumentParser(
        args_class, description=doc, allow_abbrev=False, formatter_class=Formatter
    )
    args, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if positional and unknown and not unknown[0].startswith("-"):
        setattr(args, positional, " ".join(unknown))
    elif unknown:
        parser.error(f"unknown argument {unknown[0]}; see --help")
    try:
        main(args)
    except InputError as e:
        parser.exit(2, f"error: {e}\n")
    except OSError as e:
        if e.errno not in (
            errno.ENOSPC,
            errno.EROFS,
            errno.EACCES,
            errno.EDQUOT,
            errno.EEXIST,
            errno.ENOTDIR,
        ):
            raise
        parser.exit(
            2,
            f"error: cannot write {e.filename or 'the run folder'}: {e.strerror}. Free "
            "some space or choose another --out; finished rows are kept.\n",
        )
    except KeyboardInterrupt:
        parser.exit(130, "interrupted: finished rows are kept, run the same command to resume\n")
    if training:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values) if values else 0.0  # exact: independent of the order


# ---- 1. rows: every file between stages is JSONL, one complete row a line ------------------------


def read_rows(path, required: tuple = (), missing_ok: bool = False) -> list[dict]:
    """All rows of a JSONL file. An incomplete last line, left by a kill, is dropped; any other line
    that is not a JSON object with the `required` fields raises `InputError` with file and line."""
    path = Path(path)
    if not path.exists():
        if missing_ok:
            return []
        raise InputError(f"{path} does not exist: run the stage that writes it first (`make help`)")
    rows = []
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as e:  # bad JSON or bad UTF-8
                if not line.endswith(b"\n"):
                    break
                raise InputError(
                    f"{path}:{number}: invalid JSON ({e}); fix or delete that line"
                ) from None
            if not isinstance(row, dict) or any(k not in row for k in required):
                raise InputError(
                    f"{path}:{number}: each line must be a JSON object with the "
                    f"fields {', '.join(required)}"
                )
            rows.append(row)
    return rows


def write_rows(path, rows) -> None:
    """Write a JSONL file atomically: readers see the old file or the new one."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path, text: str) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text, encoding="utf-8")
    tmp.replace(path)


class Appender:
    """Append rows to a JSONL file, flushing each one. An incomplete last line is removed first. The
    file is locked: a second run on the same file raises `InputError`."""

    def __init__(self, path):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"{path} is being written by another run; wait for it or choose another --out"
            ) from None
        self.file.seek(0)
        content = self.file.read()
        if tail := content[content.rfind(b"\n") + 1 :]:
            try:
                json.loads(tail)
                self(None)  # a complete row that lacks only its newline
            except ValueError:
                self.file.truncate(len(content) - len(tail))

    def keep(self, rows: int) -> None:
        """Truncate the file after its first `rows` rows."""
        self.file.seek(0)
        self.file.truncate(sum(len(self.file.readline()) for _ in range(rows)))

    def __call__(self, row: dict | None) -> None:
        self.file.write((json.dumps(row, ensure_ascii=False) if row else "").encode() + b"\n")
        self.file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def finished(rows, *fields) -> dict[tuple, dict]:
    """{(row[field], ...): row}: the work that a resumed stage skips. Later rows win."""
    return {tuple(row[f] for f in fields): row for row in rows}


def fingerprint(*parts) -> str:
    """A short stable identifier of any JSON-able content."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def seed_of(*parts) -> int:
    """A 31-bit random seed that depends on `parts` alone, never on the order of work."""
    return int(fingerprint(*parts), 16) & 0x7FFFFFFF


# ---- 2. prompts: messages for the planner and the agent, and parsing of their replies ------------

PLAN_LINE = "\n\nThis meta plan may help you with the task:\n{plan}"
PLAN_POSITIONS = (
    "instruction",
    "thought",
    "observation",
)  # where the agent reads the plan (paper 5.2)
STOP = ["\nObservation:", "\nTask:", "\n---"]  # where an agent's reply ends at the latest
NO_ACTION = 'Your reply holds no action. Write a line that starts with "Action:".'


def fill(text: str, **values: str) -> str:
    """Replace each {name} in `text` by its value, all at once: braces inside values stay."""
    return re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), text)


class Prompts:
    """The prompt texts of an environment, from its folder or from the prompt folder `name`: a
    subfolder of it (`brief`) or a path. Files that a prompt folder lacks are the environment's.

    planner.txt   {task} -> plan, zero-shot (paper 4.1 Evaluation; figures 7-9, no trajectory)
    teacher.txt   {task}, {conversation} -> plan (figures 7-9)
    agent.txt     {example}, {task}, {plan_line} (figures 10-12)
    examples.json {task type: one-shot example}, the first for types without one; "*", if it is
                  there, for all types unless `examples` is "type"; no file: {example} is empty"""

    def __init__(self, env: str, name: str | None = None, examples: str | None = None):
        base = environment_folder(env)
        folder = base if not name else Path(name) if os.sep in name else base / name

        def text(file: str) -> str:
            files = (f / file for f in (folder, base))
            return next((f.read_text().strip() for f in files if f.exists()), "")

        if not folder.is_dir() or not text("agent.txt"):
            known = ", ".join(sorted(p.parent.name for p in base.glob("*/*.txt")))
            raise InputError(
                f"--prompts {name}: {folder} has no prompts; it must be a folder with "
                f"planner.txt and agent.txt (folders of {env}: {known})"
            )
        self.planner_text, self.agent_text, self.teacher_text = map(
            text, ("planner.txt", "agent.txt", "teacher.txt")
        )
        self.examples = json.loads(text("examples.json") or "{}")
        if examples not in (None, "type"):
            raise InputError(f"--examples {examples}: the only value is `type`")
        if "*" in self.examples and not examples:
            self.examples = {"*": self.examples["*"]}

    def planner(self, u: str) -> list[dict]:
        """Messages that ask the meta planner for p ~ pi_g(.|u)."""
        return [{"role": "user", "content": fill(self.planner_text, task=u)}]

    def teacher(self, u: str, conversation: str, explored: str = "") -> list[dict]:
        """Messages that ask the teacher to abstract the trajectory e of task u into a meta plan,
        or to compare it with the failed trajectory `explored` of an agent."""
        content = fill(self.teacher_text, task=u, conversation=conversation, explored=explored)
        return [{"role": "user", "content": content}]

    def agent(
        self, u: str, plan: str | None, task: str, plan_position: str = "instruction"
    ) -> list[dict]:
        """The first messages of an episode, a ~ pi_theta(.|u, p). The plan is part of the task
        instruction or the agent's first thought; or it is in every observation (paper 5.2)."""
        plan_line = PLAN_LINE.format(plan=plan) if plan and plan_position == "instruction" else ""
        example = self.examples.get(task_type(task), next(iter(self.examples.values()), ""))
        content = fill(self.agent_text, example=example, task=u, plan_line=plan_line)
        messages = [{"role": "user", "content": content}]
        if plan and plan_position == "thought":
            thought = f"Thought: I will go about the task by this meta plan:\n{plan}"
            messages += [
                {"role": "assistant", "content": thought},
                {"role": "user", "content": "Observation: OK."},
            ]
        return messages


def plan_reply(plan: str) -> str:
    """The planner's complete reply for a plan: SFT's target, DPO's chosen or rejected text."""
    return f"<meta_plan>\n{plan}\n</meta_plan>"


def parse_plan(reply: str) -> str | None:
    """The plan between the <meta_plan> tags of a reply, its steps renumbered from 1; None if there
    is none. The closing tag may be missing. Lines below a step, up to an empty one, continue it."""
    match = re.search(r"<meta[ _]plan>(.*?)(?:</meta[ _]plan>|\Z)", reply, re.S | re.I)
    _, *steps = re.split(
        r"^[ \t]*(?:step\s*)?\d+\s*[:.)][ \t]*(?=\S)", match[1] if match else "", flags=re.M | re.I
    )
    steps = [" ".join(re.split(r"\n\s*\n", step)[0].split()) for step in steps]
    return number_steps(steps) if steps else None


def number_steps(steps: list[str]) -> str:
    return "\n".join(f"Step {i}: {s}" for i, s in enumerate(steps, 1))


def plan_steps(plan: str) -> list[str]:
    return [line.split(": ", 1)[-1] for line in plan.splitlines()]


def parse_reply(reply: str) -> tuple[str, str | None]:
    """(thought and action, action): a reply up to the end of its first line `Action: ...`, and the
    text after the colon. (reply, None) if it has no action."""
    match = re.search(r"^[ \t*]*action[ \t*]*:[ \t*]*(.+?)[ \t*]*$", reply, re.M | re.I)
    action = match and match[1].strip().strip("`\"'").strip()
    return (reply[: match.end()].strip(), action) if action else (reply.strip(), None)


def expert_replies(steps: list, thoughts: list[str] | None) -> list[str]:
    """The expert's [[action, observation], ...] as replies, with a thought each or none."""
    before = [f"Thought: {t}\n" for t in thoughts] if thoughts else [""] * len(steps)
    return [f"{t}Action: {a}" for t, (a, _) in zip(before, steps, strict=True)]


def task_type(task: str) -> str:
    """'find-plant/12' -> 'find-plant'."""
    return task.rsplit("/", 1)[0]


# ---- 3. environments: the protocol of data/NAME/env.py, and the worker processes that run it -----


class Environment:
    """What the pipeline needs of an environment. One object is one session; a worker process holds
    many. A task is named 'TYPE/VARIATION'.

    reset(task) -> u
    step(action) -> (observation, reward so far in [0, 1], done, success)
    columns(split)       the tasks of a split, one list per task type
    expert(task)         {"instruction", "steps": [[action, observation], ...], "reward"}, or None
                         if the expert fails (paper 3.1)
    check(task)          class method: raises `InputError` if there is no such task
    abstract(u, steps)   static method: expert steps -> plan steps, for `--teacher rules`"""

    SPLITS: dict  # names of train and the test splits (paper appendix A)
    MAX_STEPS: dict[str, int]  # step limit of an episode, by task type
    VERBS: set[str]  # first words that quality control allows in a plan step
    FAILED: tuple[str, ...]  # prefixes of observations of invalid actions
    MAX_FAILURES: int | None = None  # invalid actions in a row that end an episode
    VARIABLES: tuple[str, ...] = ()  # environment variables that workers on other machines need
    SECONDS = {"expert": 1.0, "reset": 0.1, "step": 0.02}  # core-seconds, for `make estimate`
    shares_tasks = False  # whether sessions of one process share work on the same task

    def __init__(self, sessions: int = 8):
        """A session, in a process that holds at most `sessions`."""

    @classmethod
    def prepare(cls) -> None:
        """Called once per machine before the workers start."""

    @classmethod
    def version(cls) -> str:
        """Identifies the data, if a task can differ with the data installed."""
        return ""

    @classmethod
    def note(cls) -> str:
        """What the reader of a table has to know of this installation, if anything."""
        return ""

    @classmethod
    def named(cls, kind: str, variation) -> str:
        """The task of a row [kind, variation] of a task file."""
        return f"{kind}/{variation}"

    def tasks(self, split: str) -> list[str]:
        """The tasks of a split in a fixed order. Types alternate: any first n are a fair sample."""
        if split not in self.SPLITS:
            raise InputError(f"unknown split {split!r}: one of {', '.join(self.SPLITS)}")
        return interleaved(self.columns(split))

    @classmethod
    def tests(cls) -> list[str]:
        return [split for split in cls.SPLITS if split != "train"]

    @classmethod
    def max_steps(cls, task: str) -> int:
        return cls.MAX_STEPS[task_type(task)]

    @classmethod
    def failed(cls, observation: str) -> bool:
        """Whether the observation says that the action was invalid."""
        return observation.startswith(cls.FAILED)


def interleaved(columns: list[list]) -> list:
    """The first of each column, the second of each, ..."""
    rows = itertools.zip_longest(*columns)
    return [x for row in rows for x in row if x is not None]


def environment_folder(name: str) -> Path:
    """`data/NAME`, or a path. Raises `InputError` if it has no env.py."""
    folder = Path(name).resolve() if os.sep in name else DATA / name
    if not (folder / "env.py").exists():
        known = ", ".join(sorted(p.parent.name for p in DATA.glob("*/env.py")))
        raise InputError(
            f"--env {name}: {folder / 'env.py'} does not exist; --env is a folder of "
            f"data/ ({known}) or a path"
        )
    return folder


@functools.cache
def load_environment_file(path: Path):
    """The env.py of a folder outside `data/` as a module, imported once. Its folder is its package,
    so that it can import its neighbours (`from .shop import Shop`)."""
    name = f"environments.{path.parent.name}"
    spec = importlib.util.spec_from_file_location(
        name, path, submodule_search_locations=[str(path.parent)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def environment(name: str) -> type[Environment]:
    """The environment of a folder of data/ or a path: the `Environment` subclass in its env.py."""
    folder = environment_folder(name)
    try:
        if folder.parent == DATA:
            module = importlib.import_module(f"data.{folder.name}.env")
        else:
            module = load_environment_file(folder / "env.py")
    except ImportError as e:
        raise InputError(
            f"--env {name} needs the package {e.name}: pip install -r {folder / 'requirements.txt'}"
        ) from None
    found = [
        v
        for v in vars(module).values()
        if isinstance(v, type) and issubclass(v, Environment) and v.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise InputError(
            f"{folder / 'env.py'} must define one subclass of common.Environment, not {len(found)}"
        )
    return found[0]


def check_data(env: str, out) -> None:
    """Refuse a run folder whose rows come from other data of the environment."""
    path, version = Path(out) / "data_version.txt", environment(env).version()
    if not version:
        return
    if path.exists() and path.read_text() != version:
        raise InputError(
            f"{out} has rows of other {env} data ({path}): use another run folder for "
            "this data (make RUN=, --out)"
        )
    write_text(path, version)


class WorkerDied(InputError):
    """The process of a session ended or hangs; the episode can be retried on another."""


class Sessions:
    """The sessions of one environment in a worker process."""

    def __init__(self, env: str, sessions: int):
        self.env, self.sessions, self.live, self.free = env, sessions, {}, []

    def call(self, session: int, method: str, args: tuple):
        """Call a method of a session's environment. Environments of closed sessions are reused.
        Exceptions but `InputError` become `RuntimeError`, which any process can unpickle."""
        if method == "close":
            self.free += [self.live.pop(session)] if session in self.live else []
            return None
        try:
            if session not in self.live:
                self.live[session] = (
                    self.free.pop() if self.free else environment(self.env)(self.sessions)
                )
            return getattr(self.live[session], method)(*args)
        except InputError:
            raise
        except Exception as e:
            self.live.pop(session, None)  # in an unknown state: not reused
            raise RuntimeError(f"{type(e).__name__}: {e}"[:2000]) from None


def _start_worker(env: str, sessions: int) -> None:
    """Set up a worker: a process group of its own that ends with its parent, however that ends."""
    global _sessions
    os.setsid()
    parent = multiprocessing.parent_process()
    threading.Thread(
        target=lambda: (parent.join(), os.killpg(0, signal.SIGKILL)), daemon=True
    ).start()
    _sessions = Sessions(env, sessions)


def _call_session(*args):
    return _sessions.call(*args)


class RayExecutor:
    """An actor on a Ray cluster as an executor of `Sessions.call`. The cluster is that of
    RAY_ADDRESS, or a new one on this machine. The repository, its packages and the environment's
    data must be at the same paths on all nodes."""

    def __init__(self, env: str, sessions: int):
        import ray

        if not ray.is_initialized():
            variables = {k: os.environ[k] for k in environment(env).VARIABLES if k in os.environ}
            ray.init(
                os.environ.get("RAY_ADDRESS") or "local",
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={
                    "env_vars": {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0", **variables}
                },
            )
        self.ray, self.died = ray, (ray.exceptions.RayActorError, TimeoutError)
        self.actor = ray.remote(num_cpus=1)(Sessions).remote(env, sessions)

    def submit(self, *args):
        return self.actor.call.remote(*args).future()

    def kill(self) -> None:
        self.ray.kill(self.actor)


class ProcessExecutor:
    """A process of this machine as an executor of `Sessions.call`."""

    died = (BrokenExecutor, TimeoutError)  # errors of a call when the process died or hangs

    def __init__(self, env: str, sessions: int):
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, spawn, _start_worker, (env, sessions))
        others = multiprocessing.active_children()
        self.pool.submit(os.getpid)  # starts the process
        (self.process,) = set(multiprocessing.active_children()) - set(others)

    def submit(self, *args):
        return self.pool.submit(_call_session, *args)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has no group yet
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.pool.shutdown(cancel_futures=True)


class EnvPool(contextlib.AbstractAsyncContextManager):
    """Environment workers, processes of this machine or (`ray`) actors of a Ray cluster. A session
    lives on one of them.

    async with EnvPool(env, workers=2) as pool:
        async with pool.session() as env:
            u = await env("reset", task)
            observation, reward, done, success = await env("step", action)
    """

    def __init__(self, env: str, workers: int, sessions: int | None = 64, ray: bool = False):
        if min(workers, 1 if sessions is None else sessions) < 1:
            raise InputError("--workers and --concurrency must be at least 1")
        os.environ["PYTHONHASHSEED"] = "0"  # of the workers: simulators iterate over sets
        cls = environment(env)
        cls.prepare()
        kind = RayExecutor if ray else ProcessExecutor
        self.start = functools.partial(kind, env, max(1, (sessions or 512) // workers))
        # `executor` is None before it starts and after it died; `live` counts its sessions
        self.workers = [SimpleNamespace(executor=None, live=0) for _ in range(workers)]
        self.shares_tasks, self.homes, self.numbers = cls.shares_tasks, {}, itertools.count()

    async def __aexit__(self, *_):
        for worker in self.workers:
            self._kill(worker)

    @staticmethod
    def _kill(worker) -> None:
        executor, worker.executor = worker.executor, None
        if executor:
            executor.kill()

    @contextlib.asynccontextmanager
    async def session(self, task: str | None = None):
        """A session to play `task` in, on the least busy worker. If the sessions of a process share
        work on a task, the task's worker is preferred unless it is much busier."""
        worker = min(self.workers, key=lambda w: w.live)
        if task and self.shares_tasks:
            home = self.homes.get(task, worker)
            worker = home if home.live <= 2 * worker.live + 8 else worker
            self.homes[task] = worker
        worker.live += 1
        number, worker.executor = next(self.numbers), worker.executor or self.start()
        executor = worker.executor

        async def call(method, *args, deadline=120.0):
            try:
                if worker.executor is not executor:
                    raise BrokenExecutor
                future = asyncio.wrap_future(executor.submit(number, method, args))
                return await asyncio.wait_for(future, deadline)
            except (BrokenExecutor, *executor.died) as e:
                if worker.executor is executor:
                    self._kill(worker)
                what = (
                    f"did not answer {method} within {deadline:.0f} s"
                    if isinstance(e, TimeoutError)
                    else "died"
                )
                raise WorkerDied(
                    f"an environment worker {what}; finished rows are kept, run the "
                    "same command to resume"
                ) from None

        try:
            yield call
        finally:
            worker.live -= 1
            if worker.executor is executor:
                with contextlib.suppress(BrokenExecutor):
                    executor.submit(number, "close", ())

    async def use(self, task: str, play, attempts: int = 3, on_retry=lambda: None):
        """`play(session)` in a session for the task. If its worker dies, `on_retry()` and another
        session; the last attempt's error is raised."""
        for left in reversed(range(attempts)):
            try:
                async with self.session(task) as env:
                    return await play(env)
            except (WorkerDied, RuntimeError):
                if not left:
                    raise
                on_retry()

    async def each(self, tasks: list[str], method: str, keep=lambda *_: None) -> dict:
        """{task: result} of a method, one task per worker at a time; calls `keep(task, result)`."""
        results = {}

        async def work(task):
            try:
                results[task] = await self.use(task, lambda env: env(method, task, deadline=600.0))
            except (WorkerDied, RuntimeError) as e:
                raise InputError(f"{method} of {task} failed three times: {e}") from None
            keep(task, results[task])

        await run_concurrently(work, tasks, len(self.workers))
        return results


async def run_concurrently(work, items, limit: int) -> None:
    """`work(item)` for all items in order, `limit` at a time. An error cancels the others."""
    queue = iter(items)

    async def lane():
        for item in queue:
            await work(item)

    lanes = [asyncio.create_task(lane()) for _ in range(limit)]
    try:
        await asyncio.gather(*lanes)
    finally:
        for task in lanes:
            task.cancel()


def task_files(values: list[str]) -> dict[str, str]:
    """--tasks as {split: file}; a file without `SPLIT=` is under "tasks"."""
    return dict(v.split("=", 1) if "=" in v else ("tasks", v) for v in values)


async def list_tasks(
    pool: EnvPool,
    env: str,
    split: str,
    tasks: list[str],
    types: list[str] | None,
    limit: int | None,
) -> list[str]:
    """The tasks of a split, from its file in --tasks (JSON: [[type, variation], ...]) if there is
    one; of the given types only; the first `limit` of them."""
    cls = environment(env)
    if unknown := sorted(set(types or []) - set(cls.MAX_STEPS)):
        raise InputError(
            f"unknown task type {unknown[0]!r}: --types takes {', '.join(sorted(cls.MAX_STEPS))}"
        )
    if limit is not None and limit < 1:
        raise InputError("--limit must be at least 1")
    files = task_files(tasks)
    if file := files.get(split) or files.get("tasks"):
        try:
            tasks = [cls.named(kind, v) for kind, v in json.loads(Path(file).read_text())]
        except (OSError, ValueError, TypeError) as e:
            raise InputError(
                f'--tasks {file}: must be a JSON file of the form [["TYPE", VARIATION], ...] ({e})'
            ) from None
        for task in tasks:
            cls.check(task)
    else:
        async with pool.session() as session:
            tasks = await session("tasks", split, deadline=600)
    tasks = [t for t in dict.fromkeys(tasks) if not types or task_type(t) in types]
    if not tasks:
        raise InputError(f"no tasks left of the {split} split with these --tasks / --types")
    return tasks[:limit]


# ---- 4. models: all are asked through the OpenAI chat protocol; local ones are served ------------
#
# A model is a name and a URL. With a URL (or several, separated by commas) it is behind these
# servers. Without one, a local name is served on this machine, any other is an API's model.
#
#     with open_model(name, url, args) as model:
#         reply = await model.ask(messages)


@contextlib.contextmanager
def open_model(name: str, url: str | None, a):
    """A `Model` to ask, with the settings of a stage's Args: behind `url` if given; served for the
    duration of the `with` if local; else of OpenAI or OPENAI_BASE_URL."""
    with contextlib.ExitStack() as stack:
        if url:
            name = model_fingerprint(name, url)
        elif is_local(name):
            check_model(name)
            server = serve(name, Path(a.out) / "logs", a.tensor_parallel, a.max_model_len)
            url = stack.enter_context(server)
        model = Model(name.removeprefix("api:"), url, a.concurrency)
        if url:
            model.continues = is_vllm(url)
        yield model


def check_model(name: str, url: str | None = None) -> None:
    """Raise `InputError` before any work if there is no key for an API's model, or if a local model
    directory is missing or incomplete."""
    if url:
        return
    path = Path(name)
    if not is_local(name):
        Model(name)  # needs a key
    elif path.is_dir():
        _check_directory(name)
    elif name.startswith((".", os.sep, "~")) or path.parts[0] in ("runs", "models"):
        raise InputError(f"model directory {name} does not exist: run the stage that makes it")


def _check_directory(name: str) -> None:
    folder = Path(name)
    for file in ("config.json", "tokenizer_config.json"):
        if not (folder / file).exists():
            raise InputError(f"{name} has no {file}: it must be a Hugging Face model directory")
    in_own_file = any(folder.glob("*chat_template*"))
    in_config = '"chat_template"' in (folder / "tokenizer_config.json").read_text()
    if not in_own_file and not in_config:
        raise InputError(f"{name} has no chat template: use an instruction-tuned model")


def is_local(name: str) -> bool:
    """Whether a model is a directory or a Hugging Face name `owner/model`; `api:` marks the name of
    an API's model that has a slash."""
    return Path(name).is_dir() or (os.sep in name and not name.startswith("api:"))


def name_and_url(agent: str) -> tuple[str, str | None]:
    """(name, url) of an entry of --agents: a server is asked which model it serves."""
    if agent.startswith(("http://", "https://")):
        return model_fingerprint("", agent), agent
    return agent, None


def model_fingerprint(name: str, url: str | None = None) -> str:
    """Identifies a model in rows: `weights_fingerprint`, or the model that the server at `url`
    serves (`name` if it has that, else its first)."""
    if not url:
        return weights_fingerprint(name)
    names = [model["id"] for model in served(url)]
    if not names or name in names:
        return name
    return names[0]


def weights_fingerprint(model: str) -> str:
    """Identifies a model by its weights, so that a retrained one is not taken for the old one: a
    local directory by its name and a hash of samples of its files; any other model by its name."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    sha256 = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        size = path.stat().st_size
        with path.open("rb") as file:
            for i in range(64):
                file.seek(size * i // 64)
                sha256.update(file.read(4096))
    return f"{folder.name}-{sha256.hexdigest()[:12]}"


def served(url: str) -> list[dict]:
    """The models that the (first) server at `url` lists, as it describes them."""
    server = url.split(",")[0].rstrip("/")
    try:
        with urllib.request.urlopen(f"{server}/models", timeout=30) as answer:
            return [model for model in json.load(answer)["data"] if isinstance(model["id"], str)]
    except (LookupError, TypeError):
        return []  # this server does not list its models
    except (OSError, ValueError) as e:
        raise InputError(
            f"the model server {server} cannot be reached ({e}): start it, or fix the URL"
        ) from None


def is_vllm(url: str) -> bool:
    """Whether the server at `url` is vLLM, which can continue a message that was started."""
    try:
        return any(model.get("owned_by") == "vllm" for model in served(url))
    except InputError:
        return False


# -- asking


class Reply(NamedTuple):
    text: str
    prompt_tokens: int
    completion_tokens: int


class Endpoint:
    """The client of one model server, and the server's load."""

    def __init__(self, client):
        self.client = client
        self.in_flight = 0  # requests that wait for its answer
        self.conversations = 0  # conversations that were ever assigned to it


class Model:
    """A chat model behind one or more OpenAI-compatible servers.

    `url`: their addresses, separated by commas; None: OpenAI or `OPENAI_BASE_URL`, with the key in
    `OPENAI_API_KEY`.
    `concurrency`: requests in flight; None: 32 for an API, which has rate limits, else 64 a server
    and at least 256.
    `timeout`: seconds for one request; a completion with its retries may take three times as long.

    429, 5xx, lost connections, timeouts and answers without a completion are retried with growing
    pauses; then `InputError` is raised. `Retry-After` is honoured, extends the time limit and does
    not count as a retry. A server that cannot be reached is left out from then on, as long as
    there are others."""

    TOO_LONG = re.compile(r"context.{0,20}length|maximum.{0,40}tokens|too (long|many tokens)", re.I)

    def __init__(
        self,
        name: str,
        url: str | None = None,
        concurrency: int | None = None,
        timeout: float = 300.0,
    ):
        import openai

        if not url and not os.environ.get("OPENAI_API_KEY"):
            raise InputError(
                f"asking {name} needs an API key: set OPENAI_API_KEY (and "
                "OPENAI_BASE_URL for a server other than OpenAI's)"
            )
        self.name = name
        self.where = f"the model server {url or os.environ.get('OPENAI_BASE_URL', 'OpenAI')}"
        addresses = url.split(",") if url else [None]
        if not concurrency:
            concurrency = max(256, 64 * len(addresses)) if url else 32
        self.concurrency = concurrency
        self.slots = asyncio.Semaphore(concurrency)
        self.retries = int(os.environ.get("MPO_MAX_RETRIES", 16))  # 16: pauses of 80-100 s in all
        self.timeout = timeout
        self.alive = [Endpoint(self._client(address)) for address in addresses]
        self.completion_tokens = 0  # generated so far
        self.continues = False  # can continue a message that was started; set by `open_model`
        # what `_complete` raises if an answer holds no completion
        self.malformed = (
            IndexError,
            TypeError,
            ValueError,
            AttributeError,
            openai.APIResponseValidationError,
        )

    def _client(self, address: str | None):
        """The client of one server. By itself it retries 429, 5xx, lost connections and
        timeouts."""
        import openai

        return openai.AsyncOpenAI(
            base_url=address,
            api_key=os.environ["OPENAI_API_KEY"] if address is None else "none",
            max_retries=self.retries,
            timeout=openai.Timeout(self.timeout, connect=10.0),
            http_client=patient_client(self.concurrency),
        )

    async def ask(
        self,
        messages: list[dict],
        temperature: float = 0.0,
        max_tokens: int = 256,
        seed: int | None = None,
        home: dict | None = None,
        stop: list[str] | None = None,
    ) -> Reply:
        """One completion, up to a `stop` string; it continues the last message if that is the
        assistant's. `home`: an empty dict that a conversation passes with each of its requests;
        here its server is remembered. Raises `ContextOverflow` if the prompt does not fit,
        `InputError` if the server refuses the key or the model, cannot be reached, or sends no
        completion."""
        import openai

        parameters = self._parameters(messages, temperature, max_tokens, seed, stop)
        while True:
            async with self.slots:
                endpoint = self._choose_endpoint(home)
                endpoint.in_flight += 1
                try:
                    reply = await self._complete(endpoint, parameters)
                    self.completion_tokens += reply.completion_tokens
                    return reply
                except (TimeoutError, openai.OpenAIError, *self.malformed) as e:
                    unreachable = isinstance(e, TimeoutError | openai.APIConnectionError)
                    if not unreachable or self.alive == [endpoint]:
                        raise self._error_of(e) from None
                    self._leave_out(endpoint)
                finally:
                    endpoint.in_flight -= 1

    def _parameters(self, messages, temperature, max_tokens, seed, stop) -> dict:
        """The arguments of the client's `create`.

        The client walks through every field of every message of its argument `messages`, to
        convert values that need it. Ours need none, and in a long conversation that walk is half of
        the client's work. So `messages` is empty there, and the conversation is in `extra_body`,
        which the client sends as it is, in place of arguments of the same name."""
        body = {"messages": messages}
        if messages[-1]["role"] == "assistant":
            body["continue_final_message"] = True
            body["add_generation_prompt"] = False
        parameters = {
            "model": self.name,
            "messages": [],
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": seed,
            "extra_body": body,
        }
        if stop:
            parameters["stop"] = stop
        return parameters

    def _choose_endpoint(self, home: dict | None) -> Endpoint:
        """The server with the fewest requests in flight, or of those the fewest conversations. A
        conversation stays with the server that has its prefix in the cache, unless that one is much
        busier."""
        least = min(self.alive, key=lambda e: (e.in_flight, e.conversations))
        current = home.get("endpoint") if home else None
        if current in self.alive and current.in_flight <= 2 * least.in_flight + 4:
            return current
        least.conversations += 1
        if home is not None:
            home["endpoint"] = least
        return least

    async def _complete(self, endpoint: Endpoint, parameters: dict) -> Reply:
        """One completion from one server. Answers without a completion are retried here, all else
        by the client. All retries share one time limit."""
        async with asyncio.timeout(3 * self.timeout) as limit:
            TIME_LIMIT.set(limit)
            retry = 0
            while True:
                try:
                    answer = await endpoint.client.chat.completions.create(**parameters)
                    text = answer.choices[0].message.content or ""
                    usage = answer.usage
                    break
                except self.malformed:
                    if retry == self.retries:
                        raise
                await asyncio.sleep(min(8, 0.5 * 2**retry))
                retry += 1
        if not usage:
            return Reply(text, 0, 0)
        return Reply(text, usage.prompt_tokens, usage.completion_tokens)

    def _leave_out(self, endpoint: Endpoint) -> None:
        """Ask only the other servers from now on. Requests that were in flight come here one by
        one: only the first says so."""
        if endpoint not in self.alive:
            return
        self.alive.remove(endpoint)
        print(
            f"{endpoint.client.base_url} cannot be reached or does not answer: "
            f"{len(self.alive)} other servers do its work",
            file=sys.stderr,
        )

    def _error_of(self, e: Exception) -> InputError:
        """What to tell the user of an exception of the client, in one line."""
        status = getattr(e, "status_code", None)
        said = str(e)[:300]
        if status == 400 and self.TOO_LONG.search(said):
            return ContextOverflow(
                f"a prompt exceeds the context of {self.where} (--max_model_len): {said}"
            )
        if status and status >= 300:
            what = f"answers {status}: {said}"
        elif isinstance(e, self.malformed):
            what = "sends answers without a completion"
        else:
            what = "cannot be reached or does not answer"
        if status == 400:  # a request that is wrong in itself: what the server said must do
            return InputError(f"{self.where} {what}")
        hints = {
            401: "check OPENAI_API_KEY",
            403: "check OPENAI_API_KEY",
            404: f"does it have a model {self.name!r}?",
        }
        tries = f"after {self.retries + 1} tries"
        gave_up = f"{tries}; finished rows are kept, run the same command to resume"
        return InputError(f"{self.where} {what}; {hints.get(status, gave_up)}")


# The `asyncio.timeout` of the request that the current task is making. `Model._complete` sets it,
# and the HTTP client below, which gets only the request, extends it.
TIME_LIMIT: ContextVar[asyncio.Timeout] = ContextVar("TIME_LIMIT")


def patient_client(connections: int):
    """openai's HTTP client, but one that honours `Retry-After`.

    A 429 with a number of seconds in `Retry-After` says when the server will take the request. The
    client waits until then and sends the request again, as often as it is told to. The wait extends
    the request's time limit and does not count as a retry. A 429 without a number of seconds is an
    error to openai's client, which retries it `Model.retries` times."""
    import openai

    class PatientClient(openai.DefaultAsyncHttpxClient):
        async def send(self, request, **options):
            while True:
                response = await super().send(request, **options)
                pause = response.headers.get("retry-after", "")
                if response.status_code != 429 or not re.fullmatch(r"\d+(\.\d+)?", pause):
                    return response
                await response.aclose()
                seconds = float(pause)
                limit = TIME_LIMIT.get()
                limit.reschedule(limit.when() + seconds)
                await asyncio.sleep(seconds)

    # openai is built on httpx or, in new releases, on httpx2: take the class that it uses
    limits_class = type(openai.DEFAULT_CONNECTION_LIMITS)
    limits = limits_class(max_connections=None, max_keepalive_connections=connections)
    return PatientClient(limits=limits)


# -- serving


class LocalServer(NamedTuple):
    """A server that this process started."""

    model: str
    url: str
    process: subprocess.Popen
    log: Path


@contextlib.contextmanager
def serve(
    model: str,
    log_dir="logs",
    tensor_parallel: int = 1,
    max_model_len: int = 8192,
    wait: float = 900.0,
):
    """Serve a local model on loopback, downloaded first if need be; yields the addresses, for
    `Model`. On GPUs there is one server for every `tensor_parallel` GPUs. Servers end with the
    `with`, or with this process. Raises `InputError` with the end of the log if a server ends early
    or is not healthy within `wait` seconds."""
    gpus = visible_gpus()
    if tensor_parallel < 1 or (gpus and tensor_parallel > len(gpus)):
        raise InputError(
            f"--tensor_parallel {tensor_parallel}: must be between 1 and the number "
            f"of GPUs, {len(gpus)}"
        )
    download(model)
    max_model_len = min(max_model_len, context_of(model))
    servers = []
    try:
        for i in range(max(1, len(gpus) // tensor_parallel)):
            own_gpus = gpus[i * tensor_parallel : (i + 1) * tensor_parallel]
            servers.append(_start_server(model, own_gpus, max_model_len, Path(log_dir)))
        for server in servers:
            _wait_healthy(server, wait)
        yield ",".join(f"{server.url}/v1" for server in servers)
    finally:
        for server in servers:
            server.process.stdin.close()  # which the supervisor waits for
        for server in servers:
            server.process.wait()


def visible_gpus() -> list[str]:
    """The GPUs' names in CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names:
        return names.split(",")[:count]
    return [str(i) for i in range(count)]


def download(model: str) -> None:
    """Fetch a model of the Hub before servers start, so that they neither fetch it one each nor
    time out."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if Path(model).is_dir():
        return
    try:
        snapshot_download(
            model,
            allow_patterns=["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"],
            ignore_patterns="original/*",
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        raise InputError(
            f"cannot download {model} ({str(e).splitlines()[0]}): if it is gated, "
            f"accept its licence at https://huggingface.co/{model} and set HF_TOKEN"
        ) from None


def context_of(model: str) -> float:
    """The longest context of a model, tokens."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    return getattr(config, "max_position_embeddings", math.inf)


# Runs a server. When its input closes, that is when this process closes it or ends in whatever way,
# it ends the server and then its whole process group, in which are the server's own workers.
SUPERVISOR = """
import os, signal, subprocess, sys, threading

def end_with_input():
    sys.stdin.read()
    server.terminate()
    try:
        server.wait(10)
    finally:
        os.killpg(0, signal.SIGKILL)

server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
threading.Thread(target=end_with_input, daemon=True).start()
server.wait()
os.killpg(0, signal.SIGKILL)
"""


def _start_server(model: str, gpus: list[str], max_model_len: int, log_dir: Path) -> LocalServer:
    port = _free_port()
    log_dir.mkdir(parents=True, exist_ok=True)
    log = log_dir / f"server-{Path(model).name}-{port}.log"
    command = [sys.executable, "-c", SUPERVISOR, *server_command(model, port, gpus, max_model_len)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=_server_environment(gpus),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    return LocalServer(model, f"http://127.0.0.1:{port}", process, log)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def server_command(model: str, port: int, gpus: list[str], max_model_len: int) -> list[str]:
    """The command line of a server: vLLM, or `transformers serve` if vLLM is not installed or
    MPO_SERVER=transformers."""
    address = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    if os.environ.get("MPO_SERVER", "vllm") != "vllm" or not importlib.util.find_spec("vllm"):
        transformers = Path(sys.executable).with_name("transformers")
        return [str(transformers), "serve", model, *address]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model, "--served-model-name", model, *address]
    command += ["--max-model-len", str(max_model_len), "--generation-config", "vllm"]
    command += ["--enable-prefix-caching"]
    if gpus:
        command += ["--tensor-parallel-size", str(len(gpus)), "--gpu-memory-utilization", "0.9"]
    else:
        # blocks of 32 tokens, not 128: an episode's next prompt finds more of it in the cache
        command += ["--enforce-eager", "--block-size", "32"]
        # no chunked prefill: vLLM's CPU engine crashes on a seeded request whose prompt is split
        # ("CPU Generator does not use offset", 0.32.0)
        command += ["--no-enable-chunked-prefill"]
        command += ["--max-num-batched-tokens", str(max(8192, max_model_len))]
    return command


def _server_environment(gpus: list[str]) -> dict:
    """The environment variables of a server: defaults, the user's own, what must be."""
    env = {"VLLM_CPU_KVCACHE_SPACE": "2"}
    if os.cpu_count() < 4:
        # vLLM keeps a core free for its engine, which would be half of a machine with two
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    env.update(os.environ)
    env["TOKENIZERS_PARALLELISM"] = "false"
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return env


def _wait_healthy(server: LocalServer, wait: float) -> None:
    """Return when the server answers; raise `InputError` if it ends or takes too long."""
    start = time.time()
    what = f"starting a server for {server.model}"
    with tqdm(desc=what, bar_format="{desc}: {elapsed}", leave=False) as bar:
        while not _is_healthy(server):
            if server.process.poll() is not None:
                raise _start_error(server, "ended")
            if time.time() - start > wait:
                raise _start_error(server, f"was not healthy after {wait:.0f} s")
            _raise_on_ctrl_c()
            time.sleep(0.3)
            bar.update()


def _is_healthy(server: LocalServer) -> bool:
    try:
        with urllib.request.urlopen(f"{server.url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _start_error(server: LocalServer, what: str) -> InputError:
    lines = server.log.read_text(errors="replace").splitlines()
    tail = "\n".join(lines[-15:])
    return InputError(f"the server of {server.model} {what}; the end of {server.log}:\n{tail}")


def _raise_on_ctrl_c() -> None:
    """In an event loop, Ctrl-C only cancels the current task, which sees it at its next `await`:
    too late for a wait without one. Without a loop, Ctrl-C raises by itself."""
    with contextlib.suppress(RuntimeError):  # no event loop
        if asyncio.current_task().cancelling():
            raise KeyboardInterrupt


# ---- 5. rollouts: the agent acts in the environment ----------------------------------------------


@dataclasses.dataclass
class RolloutConfig:
    """How the agent is asked and when an episode ends."""

    prompts: Prompts
    temperature: float
    max_tokens: int
    observation_chars: int  # longer observations are cut; 0: never
    seed: int
    max_steps: int | None = None  # step limit of an episode; None: the environment's
    plan_position: str = "instruction"  # where the agent reads the plan, one of PLAN_POSITIONS


def observation_message(observation: str, limit: int, plan: str | None = None) -> dict:
    if limit and len(observation) > limit:
        observation = observation[:limit].rstrip() + " ..."
    repeated = PLAN_LINE.format(plan=plan) if plan else ""
    return {"role": "user", "content": f"Observation: {observation}{repeated}"}


async def episode(
    env, model, cls, task: str, plan: str | None, rollout: int, c: RolloutConfig
) -> dict:
    """One trajectory e ~ pi_theta(e|u, p) (paper equation 2) in one environment session.

    Returns {"instruction": u, "reward": r(u, e), "success", "end", "steps": [[reply, observation],
    ...], "format_errors", "prompt_tokens", "completion_tokens"}, and "continued" if the plan is in
    the thought. `end` is success, failure (the task can no longer be completed), steps (the limit),
    errors (`MAX_FAILURES` of the environment) or context. A reply is kept up to its action; one
    without an action is a step whose observation says so.

    A plan in the thought (paper 5.2) starts every reply, if the server can continue a message that
    was started; else it is a turn of its own."""
    u, home = await env("reset", task), {}
    started = (
        f"{plan}\nThought:" if plan and c.plan_position == "thought" and model.continues else ""
    )
    messages = c.prompts.agent(u, None if started else plan, task, c.plan_position)
    repeated = plan if c.plan_position == "observation" else None
    row = {
        "instruction": u,
        "reward": 0.0,
        "success": False,
        "end": "steps",
        "steps": [],
        "format_errors": 0,
        "prompt_tokens": 0,
        "completion_tokens": 0,
    }
    row |= {"continued": bool(started)} if plan and c.plan_position == "thought" else {}
    failures = 0
    for i in range(c.max_steps or cls.max_steps(task)):
        seed = seed_of(c.seed, task, plan, rollout, i)
        opened = [*messages, {"role": "assistant", "content": started}] if started else messages
        try:
            reply = await model.ask(opened, c.temperature, c.max_tokens, seed, home, STOP)
        except ContextOverflow:
            row["end"] = "context"
            break
        row["prompt_tokens"] += reply.prompt_tokens
        row["completion_tokens"] += reply.completion_tokens
        (said, action), done = parse_reply(started + reply.text), False
        if action is None:
            observation = NO_ACTION
            row["format_errors"] += 1
        else:
            observation, row["reward"], done, row["success"] = await env("step", action)
        row["steps"].append([said, observation])
        if done:
            row["end"] = "success" if row["success"] else "failure"
            break
        failures = failures + 1 if action is None or cls.failed(observation) else 0
        if failures == cls.MAX_FAILURES:
            row["end"] = "errors"
            break
        messages += [
            {"role": "assistant", "content": said},
            observation_message(observation, c.observation_chars, repeated),
        ]
    return row


async def rollouts(
    jobs: list[dict],
    model,
    pool: EnvPool,
    env: str,
    c: RolloutConfig,
    concurrency: int,
    append,
    desc: str = "rollouts",
    attempts: int = 3,
) -> int:
    """Play all jobs {"task", "plan", "rollout", ...}, `concurrency` at a time; each finished one is
    appended as the job plus the result of `episode`. Jobs of one task and plan should be adjacent:
    their prompts share a prefix, which the server caches. An episode whose worker dies is retried;
    after `attempts` it is appended with end "crash" and its error. Returns the number of
    retries."""
    from tqdm import tqdm

    cls, start, retries = environment(env), time.time(), []
    failed, total = 0, 0.0  # the total reward of the episodes that did not fail

    with tqdm(total=len(jobs), desc=desc, unit="ep", smoothing=0.05) as bar:

        async def work(job):
            nonlocal failed, total
            began = time.time()
            try:
                row = await pool.use(
                    job["task"],
                    lambda session: episode(
                        session, model, cls, job["task"], job["plan"], job["rollout"], c
                    ),
                    attempts,
                    lambda: retries.append(job),
                )
            except (WorkerDied, RuntimeError) as e:
                row = {
                    "instruction": None,
                    "reward": 0.0,
                    "success": False,
                    "end": "crash",
                    "steps": [],
                    "error": str(e),
                }
            append({**job, **row, "seconds": round(time.time() - began, 2)})
            failed, total = failed + (row["end"] == "crash"), total + row["reward"]
            done, seconds = bar.n + 1, time.time() - start
            bar.set_postfix_str(
                f"{60 * done / seconds:.0f} ep/min, {model.completion_tokens / seconds:.0f} tok/s, "
                f"reward {total / max(1, done - failed):.3f}, {failed} failed, {len(retries)} "
                "retries",
                refresh=False,
            )
            bar.update()

        await run_concurrently(work, jobs, min(concurrency, len(jobs)))
    return len(retries)


# ---- 6. training: what the SFT loop and the DPO loop share ---------------------------------------


def load_model(name: str):
    """(model, tokenizer): weights in the dtype they were saved in, dropout off, safetensors only:
    the files' pages, shared by a machine's processes unless transformers has to convert them."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as e:
        raise InputError(
            f"cannot load {name}, as a model directory or from the Hub: {str(e).splitlines()[0]}"
        ) from None
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer of {name} has no chat template: training needs one")
    for module in model.modules():  # no dropout in train mode either
        vars(module).update({k: 0.0 for k in ("p", "attention_dropout") if k in vars(module)})
    choose_packing(model)
    return model, tokenizer


def tokenize(messages: list[dict], tokenizer, where: str) -> tuple[list[int], list[bool]]:
    """A conversation as (token ids, target mask). Targets are what the model itself writes: the
    text of each assistant message and the end token after it. The chat template writes the BOS
    token, if any, so the tokenizer adds none. `where` names file and line in errors."""
    if (
        not isinstance(messages, list)
        or not messages
        or not all(
            isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))
            for m in messages
        )
    ):
        raise InputError(
            f"{where}: a conversation must be a list of objects with `role` and "
            "`content`, both strings"
        )
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    text, spans = render(messages), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(messages[:i], add_generation_prompt=True)
            upto = render(messages[: i + 1])
            if not (upto.startswith(before) and text.startswith(upto)):
                raise InputError(
                    f"{where}: the chat template rewrites earlier turns, so the model "
                    "would not see what it is trained on; use one that only appends"
                )
            spans.append((len(before), len(upto.rstrip())))
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [
        any(first <= begin < last for first, last in spans) for begin, _ in out["offset_mapping"]
    ]
    return out["input_ids"], mask


def hold_out(rows: list[tuple], a) -> tuple[list[tuple], list[tuple]]:
    """(training, held-out) rows of (sequences, task, line): the rows of about `a.eval_share` of the
    tasks are held out, each task by its name alone."""
    out = [seed_of("held out", task) < a.eval_share * 2**31 for _, task, _ in rows]
    train, held = (
        [row for row, is_out in zip(rows, out, strict=True) if is_out == side]
        for side in (False, True)
    )
    if not train:
        raise InputError(
            f"{a.data} has no row to train on (--max_length {a.max_length}, "
            f"--eval_share {a.eval_share})"
        )
    return train, held


def lengths(rows: list[tuple], share_prefix: bool = False) -> list[int]:
    """Tokens of each row of (sequences, task, line), with what its sequences share once."""
    return [len(pack([sequences], share_prefix)[0]) for sequences, *_ in rows]


def plan_epoch(
    lengths: list[int], batch_size: int, micro_tokens: int, processes: int, seed: int, epoch: int
) -> list[list[list[int]]]:
    """The batches of one epoch: [optimizer step][micro-batch] -> row indices.

    Rows are shuffled by (seed, epoch) alone and cut into batches. Each batch is spread over as few
    micro-batches of at most `micro_tokens` tokens (or one row) as it fits in, the longest row first
    into the emptiest one. Every process computes the same plan and runs micro-batches rank,
    rank + processes, ...: their number is a multiple of `processes`; some may be empty."""

    def split(batch: list[int]) -> list[list[int]]:
        for count in range(processes, len(batch) + processes, processes):
            micros, filled = [[] for _ in range(count)], [0] * count
            for row in sorted(batch, key=lambda row: -lengths[row]):
                emptiest = filled.index(min(filled))
                micros[emptiest].append(row)
                filled[emptiest] += lengths[row]
            if all(n <= micro_tokens or len(m) == 1 for m, n in zip(micros, filled, strict=True)):
                break
        return micros

    order = list(range(len(lengths)))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return [split(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]


def pack(groups: list, share_prefix: bool = False):
    """Groups of sequences (ids, mask), SFT rows or the sides of DPO pairs, as one sequence.

    With `share_prefix`, a group's later sequences leave out the tokens they share with its first
    (a pair's prompt); the rest keep their positions. Returns (ids, positions, targets, rows).
    `targets` has (index of the token whose output predicts it, its id, its sequence's number) for
    each target of each sequence, in a shared prefix too; `rows` has (tokens shared with the first,
    own tokens) for each sequence."""
    ids, positions, targets, rows = [], [], [], []
    for group in groups:
        begin, first = len(ids), group[0][0]
        for number, (sequence, mask) in enumerate(group):
            shared = len(os.path.commonprefix([first, sequence])) if number and share_prefix else 0
            shared = min(shared, len(sequence) - 1)
            own = len(sequence) - shared
            places = [*range(begin, begin + shared), *range(len(ids), len(ids) + own)]
            targets += [
                (places[i - 1], sequence[i], len(rows)) for i in range(1, len(sequence)) if mask[i]
            ]
            ids += sequence[shared:]
            positions += range(shared, len(sequence))
            rows.append((shared, own))
    return ids, positions, targets, rows


def choose_packing(model) -> None:
    """Set `model.packing`, how rows share a forward pass, and the attention that does it. "rows":
    every layer is plain causal attention, computed by `row_attention`. "mask": windows, soft caps
    or sinks; transformers masks other rows itself, by position ids that restart. Raises
    `InputError` for layers that are not attention, which would mix the rows."""
    import torch
    from transformers import AttentionInterface

    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    softcap = getattr(config, "attn_logit_softcapping", None)
    sinks = any(name.endswith("sinks") for name, _ in model.named_parameters())
    if (
        model._is_stateful
        or not model._supports_attention_backend
        or not kinds <= {"full_attention", "sliding_attention"}
    ):
        raise InputError(
            f"{config.model_type} models have layers that are not attention: rows "
            "cannot be packed, choose another model"
        )
    if "sliding_attention" in kinds or getattr(config, "sliding_window", None) or softcap or sinks:
        model.packing = "mask"
        if softcap:
            model.set_attn_implementation("eager")  # SDPA ignores the soft cap
    else:
        model.packing = "rows"
        AttentionInterface.register("rows", torch.compiler.disable(row_attention))
        model.set_attn_implementation("rows")


def row_attention(module, query, key, value, attention_mask, *, rows, scaling=None, **_):
    """Causal attention row by row inside a pack, so that fused kernels run and nothing is computed
    across rows (a dense mask takes three times as long). query (1, H, T, D), key and value
    (1, K, T, D) -> (1, T, H, D). `rows.lengths` is `rows` of `pack`: a row attends to itself and
    to what it shares with its group's first. An attention function of transformers."""
    import torch
    from torch.nn.attention.bias import causal_lower_right

    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    split, out = [x.split([own for _, own in rows.lengths], 2) for x in (query, key, value)], []
    for (shared, own), q, k, v in zip(rows.lengths, *split, strict=True):
        if not shared:
            keys, values = k, v
        else:
            k, v = torch.cat([keys[:, :, :shared], k], 2), torch.cat([values[:, :, :shared], v], 2)
        out.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=causal_lower_right(own, shared + own), scale=scaling
            )
        )
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


def target_log_probs(model, groups: list, share_prefix: bool = False):
    """(log-probability (N,), number of its sequence (N,)) of each target in `groups` given what
    precedes it, in float32. Without rows, one of value and gradient zero: a process without rows
    must still take part in the collectives."""
    import torch

    *packed, rows = pack(groups or [[([0, 0], [False, True])]], share_prefix)
    ids, positions, targets = (torch.tensor(x, device=model.device) for x in packed)
    sources, labels, owners = targets.unbind(1)
    more = {"rows": SimpleNamespace(lengths=rows)} if model.packing == "rows" else {}
    logits = model(
        input_ids=ids[None],
        position_ids=positions[None],
        logits_to_keep=sources,
        use_cache=False,
        **more,
    ).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = -torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return log_probs * bool(groups), owners


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float, shape="cosine") -> float:
    """Learning rate of optimizer step 0 .. total - 1: linear warm-up over the first `warmup_ratio`
    of all steps, then half a cosine to zero (paper 4.1), a line to zero, or constant."""
    warmup = math.ceil(total * warmup_ratio)
    done = (step - warmup) / max(1, total - warmup)
    shapes = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    if shape not in shapes:
        raise InputError(f"unknown --lr_scheduler {shape!r}: one of {', '.join(shapes)}")
    return peak * (step + 1) / warmup if step < warmup else peak * shapes[shape]


def make_accelerator(a):
    """Accelerate, for processes, devices and trackers only: `prepare_model` shards the model."""
    from datetime import timedelta

    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    if a.precision not in ("bf16", "fp32"):
        raise InputError(f"unknown --precision {a.precision!r}: bf16 or fp32")
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() in ("true", "1"):
            raise InputError(
                f"the Accelerate configuration turns on {kind}, but training shards "
                "the model itself: launch with a configuration without it"
            )
    wait = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # while one process writes the model
    try:
        return Accelerator(
            cpu=torch.backends.mps.is_available(),  # FSDP2 needs CUDA or a CPU
            kwargs_handlers=[wait],
            log_with=a.log_with,
            project_dir=f"{Path(a.out)}.logs" if a.log_with else None,
        )
    except (ImportError, ValueError) as e:
        raise InputError(f"--log_with {a.log_with}: {e}") from None


def prepare_model(model, accelerator, a):
    """(model, optimizer), ready to train with the settings `a`: attention, adapters, FSDP2.

    With `a.lora_rank`, adapters at all linear layers are trained and the rest is frozen (Hu et al.
    2021). Each process holds its share of the float32 weights, gradients and AdamW averages of each
    decoder layer; with `a.precision` bf16 it gathers a layer's weights, while it runs, in bf16.
    Gradients are summed in float32. A single process does the same with a share of all. Sharding
    comes before the cast to float32: a process never holds more in float32 than its share."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if a.lora_rank:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(a.seed)  # every process and every run begins with the same adapters
        model = get_peft_model(
            model,
            LoraConfig(
                r=a.lora_rank,
                lora_alpha=2 * a.lora_rank,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
    if a.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers skips checkpointing in eval mode
    layers, processes = model.get_decoder().layers, accelerator.num_processes
    if a.compile:
        for layer in layers:
            layer.compile()
    device = accelerator.device.type
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
        )
    bf16 = a.precision == "bf16"
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
    for module in [*layers, model]:
        fully_shard(module, mesh=dist.init_device_mesh(device, (processes,)), mp_policy=policy)
    for p in model.parameters():
        if p.requires_grad or not bf16:
            torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().float(), p.requires_grad))
    model.to(accelerator.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=a.lr, weight_decay=a.weight_decay, fused=True)


def clip_gradients(model, limit: float) -> float:
    """Scale all gradients together to at most this norm (0: no limit); returns the norm before."""
    import torch

    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


class Training:
    """Checkpoints, metrics and the final model of one training run, in `out`.partial/ until it
    ends.

    A killed run resumes from its last checkpoint if data and settings are the same, except for the
    settings in `FREE`; else it starts over. The finished model replaces `out` in one rename."""

    # these change results by rounding at most
    FREE = {
        "out",
        "log_with",
        "micro_tokens",
        "share_prefix",
        "gradient_checkpointing",
        "compile",
        "save_steps",
    }

    def __init__(self, a, accelerator, model, optimizer, tokenizer, total: int):
        self.a, self.out, self.accelerator, self.model = a, Path(a.out), accelerator, model
        self.optimizer, self.tokenizer, self.total = optimizer, tokenizer, total
        self.partial = self.out.with_name(f"{self.out.name}.partial")
        settings = {**dataclasses.asdict(a), "model": weights_fingerprint(a.model)}
        self.key = fingerprint(
            {k: v for k, v in settings.items() if k not in self.FREE},
            tokenizer.chat_template,
            read_rows(a.data)[: a.limit],
        )
        if self.out.exists() and not (
            self.out.is_dir()
            and (list(self.out.glob("*config.json")) or not any(self.out.iterdir()))
        ):
            raise InputError(f"--out {a.out} exists and is not a model: choose another")
        self.start, self.log, metrics = 0, [], self.partial / "metrics.jsonl"
        if accelerator.is_main_process:
            self.append = Appender(metrics)  # refuses a second run on the same folder
        accelerator.wait_for_everyone()
        saved = {int(f.name[5:]): f for f in self.partial.glob("step-*") if f.name[5:].isdigit()}
        if saved and (saved[max(saved)] / "settings").read_text() == self.key:
            self.start = max(saved)
            self._load(saved[self.start])
            self.log = read_rows(metrics)[: self.start]
            accelerator.print(f"resuming from step {self.start} of {total} ({self.partial})")
        elif saved:
            accelerator.print(f"starting over: {self.partial} has other settings or data")
        accelerator.wait_for_everyone()  # all have read what the main process deletes
        if accelerator.is_main_process:
            for path in set(self.partial.iterdir()) - {metrics} if not self.start else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.append.keep(self.start)
        if accelerator.log_with:
            accelerator.init_trackers(
                self.out.name,
                {k: v for k, v in settings.items() if isinstance(v, int | float | str)},
            )
        accelerator.wait_for_everyone()

    def check(self, done: int, loss: float, norm: float, lines: list) -> None:
        """Raise `InputError`, before the weights are updated, if loss or gradient is not finite or
        the loss is 10 times the highest of the first ten steps. `lines`: the batch's in the
        data."""
        early = [row["loss"] for row in self.log[:10]]
        if not math.isfinite(loss + norm) or (len(early) == 10 and loss > 10 * max(early)):
            raise InputError(
                f"the loss is {loss:.4g} and the gradient norm {norm:.4g} at step {done}: lower "
                f"--lr, or look at lines {', '.join(map(str, sorted(lines)))} of {self.a.data}; "
                f"the last checkpoint is in {self.partial}"
            )

    def step(self, done: int, metrics: dict) -> str:
        """Log optimizer step `done` (from 1), save a checkpoint every --save_steps steps; returns a
        line for the progress bar."""
        import resource

        import torch

        peak = (
            torch.cuda.max_memory_allocated()
            if self.accelerator.device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        metrics["memory_gb"] = peak / 1e9
        row = {"step": done, **{k: float(f"{v:.6g}") for k, v in metrics.items()}}
        self.log.append(row)
        if self.accelerator.is_main_process:
            self.append(row)
        if self.accelerator.log_with:
            self.accelerator.log(metrics, step=done)
        if self.a.save_steps and done % self.a.save_steps == 0 and done < self.total:
            self._save(done)
        return (
            f"loss {metrics['loss']:.3f}, lr {metrics['lr']:.1e}, "
            f"{metrics['tokens_per_second']:.0f} tok/s, {metrics['memory_gb']:.1f} GB"
        )

    def _state(self) -> dict:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        return dict(
            zip(("model", "optimizer"), get_state_dict(self.model, self.optimizer), strict=True)
        )

    def _save(self, done: int) -> None:
        """Write a checkpoint, then delete the one before."""
        import torch.distributed.checkpoint as dcp

        folder, temporary = (self.partial / f"step-{done}{end}" for end in ("", ".tmp"))
        try:
            dcp.save(self._state(), checkpoint_id=temporary)
        except dcp.api.CheckpointException as e:  # for example a full disk
            raise next(
                (error for error, _ in e.failures.values() if isinstance(error, OSError)),
                RuntimeError(str(e)),
            ) from None
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_text(temporary / "settings", self.key)
            temporary.rename(folder)
            for old in set(self.partial.glob("step-*")) - {folder}:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _load(self, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict

        state = self._state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def finish(self, method: str) -> None:
        """Write the model in Hugging Face format, in the base model's dtype, with tokenizer, chat
        template, metrics.jsonl, curves.png and a model card, then put it in place of `out`.
        Adapters are merged into the base model with --lora_merge, else written alone."""
        from transformers import AutoModelForCausalLM

        a, final, main = self.a, self.partial / "final", self.accelerator.is_main_process
        base = AutoModelForCausalLM.from_pretrained(a.model, dtype="auto") if main else None
        weights = dict(base.named_parameters()) if main and not a.lora_rank else {}
        self.model.reshard()  # a pass without gradients leaves the root's weights whole
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                full = p.detach().full_tensor()  # all processes gather one weight at a time
                if main:
                    weights.setdefault(name, full.cpu()).data.copy_(full)
        if main:
            shutil.rmtree(final, ignore_errors=True)
            if a.lora_rank:
                from peft import PeftModel

                self.model.save_pretrained(final, state_dict=weights)
                base = PeftModel.from_pretrained(base, final)
                if a.lora_merge:
                    shutil.rmtree(final)
                    base = base.merge_and_unload()
            base.save_pretrained(final)
            self.tokenizer.save_pretrained(final)
            write_rows(final / "metrics.jsonl", self.log)
            write_text(
                final / "README.md",
                f"# {a.out}\n\n{a.model} after {method} on {a.data}.\n\n"
                f"Settings: `{json.dumps(dataclasses.asdict(a))}`\n\n"
                f"Last step: `{json.dumps(self.log[-1:])}`; all steps in metrics.jsonl and "
                "curves.png.\n",
            )
            if self.out.is_symlink():
                self.out.unlink()
            elif self.out.exists():
                shutil.rmtree(self.out)
            final.rename(self.out)
            self.append.__exit__()
            shutil.rmtree(self.partial)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
