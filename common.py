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


class Reply(NamedTuple):
    text: str
    prompt_tokens: int
    completion_tokens: int


class Model:
    """A chat model behind one or more OpenAI-compatible servers (`url`: addresses separated by
    commas; None: OpenAI or `OPENAI_BASE_URL`, with the key in `OPENAI_API_KEY`). The client retries
    429, 5xx, lost connections, timeouts and answers without a completion with growing pauses; then
    `InputError` is raised. A 429 that says how long to wait is waited for and is no try. A server
    that cannot be reached is left out from then on, as long as there are others. `concurrency`:
    requests in flight; None: 32 for an API, which has rate limits, else 64 a server and at least
    256."""

    TOO_LONG = re.compile(r"context.{0,20}length|maximum.{0,40}tokens|too (long|many tokens)", re.I)

    def __init__(
        self,
        name: str,
        url: str | None = None,
        concurrency: int | None = None,
        timeout: float = 300.0,
    ):
        import openai

        key = os.environ.get("OPENAI_API_KEY")
        if url is None and not key:
            raise InputError(
                f"asking {name} needs an API key: set OPENAI_API_KEY (and "
                "OPENAI_BASE_URL for a server other than OpenAI's)"
            )
        self.name = name
        self.where = f"the model server {url or os.environ.get('OPENAI_BASE_URL', 'OpenAI')}"
        servers = url.split(",") if url else [None]
        self.concurrency = concurrency or (max(256, 64 * len(servers)) if url else 32)
        self.slots = asyncio.Semaphore(self.concurrency)
        self.retries = int(os.environ.get("MPO_MAX_RETRIES", 16))  # 16: pauses of 80-100 s in all
        self.deadline = 3 * timeout  # seconds for one completion with its retries
        self.clients = [
            openai.AsyncOpenAI(
                base_url=u,
                api_key=key if url is None else "none",
                max_retries=self.retries,
                timeout=openai.Timeout(timeout, connect=10.0),
                http_client=patient_client(self.concurrency),
            )
            for u in servers
        ]
        self.in_flight, self.assigned = [0] * len(self.clients), [0] * len(self.clients)
        self.alive = set(range(len(self.clients)))
        self.completion_tokens = 0  # generated so far
        self.continues = False  # messages that were started; set by `open_model`

    def _choose(self, home: dict | None) -> int:
        """The server with the fewest requests in flight, or of those the fewest conversations. A
        conversation (`home` is its memory) stays with the server that has its prefix in the cache,
        unless that one is much busier."""
        home = {} if home is None else home
        least = min(self.alive, key=lambda i: (self.in_flight[i], self.assigned[i]))
        now = home.get("server")
        if now not in self.alive or self.in_flight[now] > 2 * self.in_flight[least] + 4:
            home["server"] = least
            self.assigned[least] += 1
        return home["server"]

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
        assistant's. Raises `ContextOverflow` if the prompt does not fit, `InputError` if the
        server refuses the key or the model, cannot be reached, or sends no completion."""
        while True:
            with contextlib.suppress(ServerLost):
                return await self._ask(messages, temperature, max_tokens, seed, home, stop)

    async def _ask(self, messages, temperature, max_tokens, seed, home, stop) -> Reply:
        import openai

        more = {"stop": stop} if stop else {}
        # the messages as they are: looking at each field of each one is half of the client's work
        body = {"messages": messages}
        if messages[-1]["role"] == "assistant":
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        malformed = (
            IndexError,
            TypeError,
            ValueError,
            AttributeError,
            openai.APIResponseValidationError,
        )
        async with self.slots:
            server = self._choose(home)
            self.in_flight[server] += 1
            try:
                async with asyncio.timeout(self.deadline) as limit:
                    LIMIT.set(limit)
                    for left in reversed(range(self.retries + 1)):
                        try:
                            answer = await self.clients[server].chat.completions.create(
                                model=self.name,
                                messages=[],
                                temperature=temperature,
                                max_tokens=max_tokens,
                                seed=seed,
                                extra_body=body,
                                **more,
                            )
                            text, usage = answer.choices[0].message.content or "", answer.usage
                            break
                        except malformed:  # which the client does not retry
                            if not left:
                                raise
                            await asyncio.sleep(min(8, 0.5 * 2 ** (self.retries - left)))
            except (TimeoutError, openai.OpenAIError, *malformed) as e:
                others = self.alive - {server}
                if others and isinstance(e, TimeoutError | openai.APIConnectionError):
                    if server in self.alive:
                        print(
                            f"{self.clients[server].base_url} cannot be reached or does not "
                            f"answer: {len(others)} other servers do its work",
                            file=sys.stderr,
                        )
                    self.alive = others
                    raise ServerLost from None
                status, said = getattr(e, "status_code", None), str(e)[:300]
                if status == 400 and self.TOO_LONG.search(said):
                    raise ContextOverflow(
                        f"a prompt exceeds the context of {self.where} (--max_model_len): {said}"
                    ) from None
                what = (
                    f"answers {status}: {said}"
                    if status and status >= 300
                    else "sends answers without a completion"
                    if isinstance(e, malformed)
                    else "cannot be reached or does not answer"
                )
                hint = {
                    401: "check OPENAI_API_KEY",
                    403: "check OPENAI_API_KEY",
                    400: "",
                    404: f"does it have a model {self.name!r}?",
                }.get(
                    status,
                    (
                        f"after {self.retries + 1} tries; finished rows are kept, run the same "
                        "command to resume"
                    ),
                )
                raise InputError(f"{self.where} {what}; {hint}") from None
            finally:
                self.in_flight[server] -= 1
        counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        self.completion_tokens += counts[1]
        return Reply(text, *counts)


class ServerLost(Exception):
    """One of several servers cannot be reached."""


LIMIT: ContextVar = ContextVar("the time limit of this task's request")


def patient_client(connections: int):
    """openai's HTTP client, which does what a 429 with `retry-after` (seconds) asks for: it waits,
    which extends the request's time limit, and sends the request again."""
    import openai

    class PatientClient(openai.DefaultAsyncHttpxClient):
        async def send(self, request, **options):
            while True:
                response = await super().send(request, **options)
                pause = response.headers.get("retry-after", "")
                if response.status_code != 429 or not re.fullmatch(r"\d+(\.\d+)?", pause):
                    return response
                await response.aclose()
                limit = LIMIT.get()
                limit.reschedule(limit.when() + float(pause))
                await asyncio.sleep(float(pause))

    limits = type(openai.DEFAULT_CONNECTION_LIMITS)
    return PatientClient(limits=limits(max_connections=None, max_keepalive_connections=connections))


def served(url: str) -> list[dict]:
    """The models that the (first) server at `url` lists, as it describes them."""
    server = url.split(",")[0].rstrip("/")
    try:
        with urllib.request.urlopen(f"{server}/models", timeout=30) as answer:
            return [m for m in json.load(answer)["data"] if isinstance(m["id"], str)]
    except (LookupError, TypeError):
        return []  # this server does not list its models
    except (OSError, ValueError) as e:
        raise InputError(
            f"the model server {server} cannot be reached ({e}): start it, or fix the URL"
        ) from None


def model_fingerprint(name: str, url: str | None = None) -> str:
    """Identifies a model in rows: `common.model_id`, or the model that the server at `url` serves
    (`name` if it has that, else its first)."""
    if not url:
        return weights_fingerprint(name)
    names = [m["id"] for m in served(url)]
    return name if name in names or not names else names[0]


def name_and_url(agent: str) -> tuple[str, str | None]:
    """(name, url) of an entry of --agents: a server is asked which model it serves."""
    is_url = agent.startswith(("http://", "https://"))
    return (model_fingerprint("", agent), agent) if is_url else (agent, None)


def is_local(name: str) -> bool:
    """Whether a model is a directory or a Hugging Face name `owner/model`; `api:` marks the name of
    an API's model that has a slash."""
    return Path(name).is_dir() or (os.sep in name and not name.startswith("api:"))


def check_model(name: str, url: str | None = None) -> None:
    """Raise `InputError` before any work if there is no key for an API's model, or if a local model
    directory is missing or incomplete."""
    path = Path(name)
    if url:
        return
    if not is_local(name):
        Model(name)
    elif path.is_dir():
        for file in ("config.json", "tokenizer_config.json"):
            if not (path / file).exists():
                raise InputError(f"{name} has no {file}: it must be a Hugging Face model directory")
        if not (
            list(path.glob("*chat_template*"))
            or '"chat_template"' in (path / "tokenizer_config.json").read_text()
        ):
            raise InputError(f"{name} has no chat template: use an instruction-tuned model")
    elif name.startswith((".", os.sep, "~")) or path.parts[0] in ("runs", "models"):
        raise InputError(f"model directory {name} does not exist: run the stage that makes it")


@contextlib.contextmanager
def open_model(name: str, url: str | None, a):
    """A `Model` to ask, with the settings of a stage's Args: behind `url` if given; served for the
    duration of the `with` if local; else of OpenAI or OPENAI_BASE_URL."""
    with contextlib.ExitStack() as stack:
        if url:
            name = model_fingerprint(name, url)
        elif is_local(name):
            check_model(name)
            url = stack.enter_context(
                serve(name, Path(a.out) / "logs", a.tensor_parallel, a.max_model_len)
            )
        model = Model(name.removeprefix("api:"), url, a.concurrency)
        with contextlib.suppress(InputError):  # a server that lists no models is not vLLM
            model.continues = bool(url) and any(m.get("owned_by") == "vllm" for m in served(url))
        yield model


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
    max_model_len, servers = min(max_model_len, context_of(model)), []
    try:
        for i in range(max(1, len(gpus) // tensor_parallel)):
            own = gpus[i * tensor_parallel : (i + 1) * tensor_parallel]
            servers.append(_start_server(model, own, max_model_len, Path(log_dir)))
        for server in servers:
            _wait_healthy(server, wait)
        yield ",".join(f"{server.url}/v1" for server in servers)
    finally:
        for server in servers:
            server.process.stdin.close()
        for server in servers:
            server.process.wait()


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


def visible_gpus() -> list[str]:
    """The GPUs' names in CUDA_VISIBLE_DEVICES."""
    import torch

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def server_command(model: str, port: int, gpus: list[str], max_model_len: int) -> list[str]:
    """The command line of a server: vLLM, or `transformers serve` if vLLM is not installed or
    MPO_SERVER=transformers."""
    address = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    if os.environ.get("MPO_SERVER", "vllm") != "vllm" or not importlib.util.find_spec("vllm"):
        return [str(Path(sys.executable).with_name("transformers")), "serve", model, *address]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--served-model-name",
        model,
        *address,
        "--max-model-len",
        str(max_model_len),
        "--generation-config",
        "vllm",
        "--enable-prefix-caching",
    ]
    if gpus:
        return [
            *command,
            "--tensor-parallel-size",
            str(len(gpus)),
            "--gpu-memory-utilization",
            "0.9",
        ]
    # no chunked prefill: vLLM's CPU engine crashes on a seeded request whose prompt is split
    # ("CPU Generator does not use offset", 0.32.0)
    # blocks of 32 tokens, not 128: an episode's next prompt finds more of it in the cache
    return [
        *command,
        "--enforce-eager",
        "--block-size",
        "32",
        "--no-enable-chunked-prefill",
        "--max-num-batched-tokens",
        str(max(8192, max_model_len)),
    ]


# runs a server and ends its whole process group when the input closes, that is when the parent ends
SUPERVISOR = """
import os, subprocess, sys, threading
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
def end():
    sys.stdin.read()
    server.terminate()
    try:
        server.wait(10)
    finally:
        os.killpg(0, 9)
threading.Thread(target=end, daemon=True).start()
server.wait()
os.killpg(0, 9)
"""


def _start_server(model: str, gpus: list[str], max_model_len: int, log_dir: Path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # vLLM keeps a core free for its engine, which would be half of a machine with two
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if os.cpu_count() < 4 else {}
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        **binding,
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
    }
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    log_dir.mkdir(parents=True, exist_ok=True)
    log = log_dir / f"server-{Path(model).name}-{port}.log"
    command = [sys.executable, "-c", SUPERVISOR, *server_command(model, port, gpus, max_model_len)]
    with log.open("w") as f:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=f, stderr=f, start_new_session=True
        )
    return SimpleNamespace(model=model, process=process, log=log, url=f"http://127.0.0.1:{port}")


def _wait_healthy(server, wait: float) -> None:
    start = time.time()
    with tqdm(
        desc=f"starting a server for {server.model}", bar_format="{desc}: {elapsed}", leave=False
    ) as bar:
        while True:
            with contextlib.suppress(OSError):
                with urllib.request.urlopen(f"{server.url}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            ended = server.process.poll() is not None
            if ended or time.time() - start > wait:
                tail = "\n".join(server.log.read_text(errors="replace").splitlines()[-15:])
                what = "ended" if ended else f"was not healthy after {wait:.0f} s"
                raise InputError(
                    f"the server of {server.model} {what}; the end of {server.log}:\n{tail}"
                )
            with contextlib.suppress(RuntimeError):  # without an event loop Ctrl-C raises by itself
                if asyncio.current_task().cancelling():
                    raise KeyboardInterrupt
            time.sleep(0.3)
            bar.update()


def weights_fingerprint(model: str) -> str:
    """Identifies a model, so that a retrained one is not taken for the old one: a local directory
    by its name and a digest of samples of its weights; any other model by its name."""
    path = Path(model)
    if not path.is_dir():
        return model
    h = hashlib.sha256()
    for file in sorted([*path.glob("*.safetensors"), path / "config.json"]):
        with file.open("rb") as f:
            for i in range(64):
                f.seek(file.stat().st_size * i // 64)
                h.update(f.read(4096))
    return f"{path.name}-{h.hexdigest()[:12]}"


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
    """What the agent reads after an action. An observation of more than `limit` characters is cut,
    unless `limit` is 0. With `plan`, the plan is repeated below the observation (paper 5.2)."""
    if limit and len(observation) > limit:
        observation = observation[:limit].rstrip() + " ..."
    content = f"Observation: {observation}"
    if plan:
        content += PLAN_LINE.format(plan=plan)
    return {"role": "user", "content": content}


class Episode:
    """One trajectory e ~ pi_theta(e|u, p) (paper equation 2) in one environment session.

    `env` is the session, `cls` the class of its environment, `job` has the "task", the "plan" (or
    None) and the number of the "rollout". `messages` is the conversation: the agent is asked with
    it, its reply is parsed, the action is executed, and reply and observation are appended."""

    def __init__(self, env, model, cls, job: dict, c: RolloutConfig):
        self.env = env
        self.model = model
        self.cls = cls
        self.task = job["task"]
        self.plan = job["plan"]
        self.rollout = job["rollout"]
        self.c = c
        self.messages: list[dict] = []
        self.opening = ""  # the text that every reply starts with
        self.home: dict = {}  # which model server has this conversation in its cache
        self.failures = 0  # failed steps in a row
        self.row = {
            "instruction": None,
            "reward": 0.0,
            "success": False,
            "end": "steps",
            "steps": [],
            "format_errors": 0,
            "prompt_tokens": 0,
            "completion_tokens": 0,
        }

    async def play(self) -> dict:
        """The episode as a row: {"instruction": u, "reward": r(u, e), "success", "end", "steps":
        [[reply, observation], ...], "format_errors", "prompt_tokens", "completion_tokens"}, and
        "continued" if the plan is in the thought.

        `end` is success, failure (the task can no longer be completed), steps (the step limit),
        errors (`MAX_FAILURES` failed steps in a row) or context (the prompt became too long)."""
        self.begin(await self.env("reset", self.task))
        for step in range(self.c.max_steps or self.cls.max_steps(self.task)):
            try:
                reply = await self.query(step)
            except ContextOverflow:
                self.row["end"] = "context"
                break
            said, action = parse_reply(reply)
            observation, done = await self.execute(action)
            self.row["steps"].append([said, observation])
            if done:
                self.row["end"] = "success" if self.row["success"] else "failure"
                break
            if self.failures == self.cls.MAX_FAILURES:
                self.row["end"] = "errors"
                break
            self.append(said, observation)
        return self.row

    def begin(self, u: str) -> None:
        """The first messages: the prompt, with the plan where it belongs.

        A plan in the thought (paper 5.2) starts every reply if the server can continue a message
        that was started; else it is a turn of its own."""
        self.row["instruction"] = u
        plan = self.plan
        if plan and self.c.plan_position == "thought":
            if self.model.continues:
                self.opening = f"{plan}\nThought:"
                plan = None
            self.row["continued"] = self.model.continues
        self.messages = self.c.prompts.agent(u, plan, self.task, self.c.plan_position)

    async def query(self, step: int) -> str:
        """The agent's reply, with its opening."""
        messages = self.messages
        if self.opening:
            messages = [*messages, {"role": "assistant", "content": self.opening}]
        seed = seed_of(self.c.seed, self.task, self.plan, self.rollout, step)
        reply = await self.model.ask(
            messages, self.c.temperature, self.c.max_tokens, seed, self.home, STOP
        )
        self.row["prompt_tokens"] += reply.prompt_tokens
        self.row["completion_tokens"] += reply.completion_tokens
        return self.opening + reply.text

    async def execute(self, action: str | None) -> tuple[str, bool]:
        """(observation, whether the episode is over). A reply without an action is a failed step,
        whose observation says so."""
        if action is None:
            self.row["format_errors"] += 1
            self.failures += 1
            return NO_ACTION, False
        observation, reward, done, success = await self.env("step", action)
        self.row["reward"] = reward
        self.row["success"] = success
        if self.cls.failed(observation):
            self.failures += 1
        else:
            self.failures = 0
        return observation, done

    def append(self, said: str, observation: str) -> None:
        repeated = self.plan if self.c.plan_position == "observation" else None
        self.messages.append({"role": "assistant", "content": said})
        self.messages.append(observation_message(observation, self.c.observation_chars, repeated))


class RolloutProgress:
    """The progress line of `rollouts`: speed, mean reward, failed episodes and retries."""

    def __init__(self, model, total: int, desc: str):
        self.model = model
        self.bar = tqdm(total=total, desc=desc, unit="ep", smoothing=0.05)
        self.start = time.time()
        self.reward = 0.0  # sum over the episodes that did not fail
        self.failed = 0
        self.retries = 0

    def retry(self) -> None:
        self.retries += 1

    def add(self, row: dict) -> None:
        """Count a finished episode."""
        self.reward += row["reward"]
        if row["end"] == "crash":
            self.failed += 1
        episodes = self.bar.n + 1
        seconds = time.time() - self.start
        self.bar.set_postfix_str(
            f"{60 * episodes / seconds:.0f} ep/min, "
            f"{self.model.completion_tokens / seconds:.0f} tok/s, "
            f"reward {self.reward / max(1, episodes - self.failed):.3f}, "
            f"{self.failed} failed, {self.retries} retries",
            refresh=False,
        )
        self.bar.update()


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
    """Play all jobs {"task", "plan", "rollout", ...}, `concurrency` at a time. Each finished one is
    appended as the job plus the row of its `Episode`. Jobs of one task and plan should be adjacent:
    their prompts share a prefix, which the server caches.

    An episode whose worker dies is retried. After `attempts` it is appended with end "crash" and
    its error. Returns the number of retries."""
    cls = environment(env)
    progress = RolloutProgress(model, len(jobs), desc)

    async def play(job: dict) -> None:
        began = time.time()
        try:
            row = await pool.use(
                job["task"],
                lambda session: Episode(session, model, cls, job, c).play(),
                attempts,
                progress.retry,
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
        progress.add(row)

    with progress.bar:
        await run_concurrently(play, jobs, min(concurrency, len(jobs)))
    return progress.retries


# ---- 6. training: what the SFT loop and the DPO loop share ---------------------------------------


class Sequence(NamedTuple):
    """A conversation as tokens. `mask` is true where the token is a target of training."""

    ids: list[int]
    mask: list[bool]


class Example(NamedTuple):
    """One row of the training data: the conversation of SFT, or the chosen and the rejected side of
    a DPO pair."""

    sequences: list[Sequence]
    task: str | int  # the row's task, or its line if it names none
    line: int


def load_model(name: str):
    """(model, tokenizer): the weights in the dtype they were saved in, without dropout.

    Only safetensors are read: the processes of a machine share their pages in memory, unless
    transformers has to convert them."""
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
        for rate in ("p", "attention_dropout"):
            if rate in vars(module):
                setattr(module, rate, 0.0)
    choose_packing(model)
    return model, tokenizer


def tokenize(messages: list[dict], tokenizer, where: str) -> Sequence:
    """A conversation as tokens. Targets are what the model itself writes: the text of each
    assistant message and the end token after it. `where` names file and line in errors."""
    check_conversation(messages, where)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = assistant_spans(messages, text, tokenizer, where)
    # the chat template has written the BOS token, if the model has one
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = []
    for begin, _ in tokens["offset_mapping"]:
        mask.append(any(first <= begin < last for first, last in spans))
    return Sequence(tokens["input_ids"], mask)


def check_conversation(messages, where: str) -> None:
    """Raise `InputError` if `messages` is not a list of {"role", "content"}, both strings."""
    if isinstance(messages, list) and messages and all(is_message(m) for m in messages):
        return
    raise InputError(
        f"{where}: a conversation must be a list of objects with `role` and `content`, both strings"
    )


def is_message(message) -> bool:
    if not isinstance(message, dict):
        return False
    return isinstance(message.get("role"), str) and isinstance(message.get("content"), str)


def assistant_spans(
    messages: list[dict], text: str, tokenizer, where: str
) -> list[tuple[int, int]]:
    """(begin, end) of what the assistant writes in `text`, the whole conversation: of each of its
    messages with the end token, without the header before and white space after."""
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(
            messages[:i], tokenize=False, add_generation_prompt=True
        )
        upto = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not (upto.startswith(before) and text.startswith(upto)):
            raise InputError(
                f"{where}: the chat template rewrites earlier turns, so the model "
                "would not see what it is trained on; use one that only appends"
            )
        spans.append((len(before), len(upto.rstrip())))
    return spans


def hold_out(examples: list[Example], a) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples. About `a.eval_share` of the tasks are held out, each with all
    its examples; whether a task is held out depends on its name alone."""
    train = []
    held_out = []
    for example in examples:
        if seed_of("held out", example.task) < a.eval_share * 2**31:
            held_out.append(example)
        else:
            train.append(example)
    if not train:
        raise InputError(
            f"{a.data} has no row to train on (--max_length {a.max_length}, "
            f"--eval_share {a.eval_share})"
        )
    return train, held_out


def lengths(examples: list[Example], share_prefix: bool = False) -> list[int]:
    """Tokens of each example; with `share_prefix`, what its sequences share counts once."""
    return [len(pack([example], share_prefix).ids) for example in examples]


def plan_training(tokens: list[int], a, processes: int) -> list[list[list[int]]]:
    """The batches of all epochs, one `plan_epoch` after the other."""
    plan = []
    for epoch in range(a.epochs):
        plan += plan_epoch(tokens, a.batch_size, a.micro_tokens, processes, a.seed, epoch)
    return plan


def plan_epoch(
    tokens: list[int], batch_size: int, micro_tokens: int, processes: int, seed: int, epoch: int
) -> list[list[list[int]]]:
    """The batches of one epoch: [optimizer step][micro-batch] -> indices of examples, from the
    number of tokens of each example.

    Examples are shuffled by (seed, epoch) alone and cut into batches; a batch is spread over
    micro-batches. Every process computes the same plan and runs the micro-batches rank,
    rank + processes, ..."""
    order = list(range(len(tokens)))
    random.Random(f"{seed} {epoch}").shuffle(order)
    plan = []
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        plan.append(micro_batches(batch, tokens, micro_tokens, processes))
    return plan


def micro_batches(
    batch: list[int], tokens: list[int], micro_tokens: int, processes: int
) -> list[list[int]]:
    """Spread a batch over as few micro-batches as it fits in, each of at most `micro_tokens` tokens
    or one example. Their number is a multiple of `processes`, so that all have as many; some may be
    empty."""
    longest_first = sorted(batch, key=lambda i: -tokens[i])
    count = processes
    while True:
        micros: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for i in longest_first:
            emptiest = filled.index(min(filled))
            micros[emptiest].append(i)
            filled[emptiest] += tokens[i]
        of_several = [n for micro, n in zip(micros, filled, strict=True) if len(micro) > 1]
        if all(n <= micro_tokens for n in of_several):
            return micros
        count += processes


class Pack(NamedTuple):
    """Sequences in a row, computed as one."""

    ids: list[int]
    positions: list[int]  # of each token in its sequence
    targets: list[tuple[int, int, int]]  # (index whose output predicts it, its id, sequence)
    segments: list[tuple[int, int]]  # of each sequence: (tokens shared with the first, own tokens)


def pack(examples: list[Example], share_prefix: bool = False) -> Pack:
    """The sequences of `examples` as one.

    With `share_prefix`, the second sequence of an example leaves out the tokens that it shares with
    the first (a pair's prompt). The others keep their positions. Targets in the shared prefix count
    for both sequences."""
    ids: list[int] = []
    positions = []
    targets = []
    segments = []
    for example in examples:
        begin = len(ids)
        first = example.sequences[0]
        for number, sequence in enumerate(example.sequences):
            shared = 0
            if share_prefix and number > 0:
                shared = shared_length(first.ids, sequence.ids)
            own = len(sequence.ids) - shared
            # where the sequence's tokens are in the pack
            places = [*range(begin, begin + shared), *range(len(ids), len(ids) + own)]
            for i in range(1, len(sequence.ids)):
                if sequence.mask[i]:
                    targets.append((places[i - 1], sequence.ids[i], len(segments)))
            ids += sequence.ids[shared:]
            positions += range(shared, len(sequence.ids))
            segments.append((shared, own))
    return Pack(ids, positions, targets, segments)


def shared_length(first: list[int], second: list[int]) -> int:
    """How many tokens both begin with. At least one token of `second` is left over."""
    shared = 0
    for one, other in zip(first, second[:-1], strict=False):
        if one != other:
            break
        shared += 1
    return shared


def choose_packing(model) -> None:
    """Set `model.packing`, how the sequences of a pack are kept apart, and the attention that does
    it. "rows": every layer is plain causal attention, computed by `row_attention`. "mask": windows,
    soft caps or sinks; transformers itself masks other sequences, by position ids that restart.
    Raises `InputError` for layers that are not attention, which would mix the sequences."""
    import torch
    from transformers import AttentionInterface

    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if (
        model._is_stateful
        or not model._supports_attention_backend
        or not layer_types <= {"full_attention", "sliding_attention"}
    ):
        raise InputError(
            f"{config.model_type} models have layers that are not attention: rows "
            "cannot be packed, choose another model"
        )
    window = "sliding_attention" in layer_types or getattr(config, "sliding_window", None)
    softcap = getattr(config, "attn_logit_softcapping", None)
    sinks = any(name.endswith("sinks") for name, _ in model.named_parameters())
    if window or softcap or sinks:
        model.packing = "mask"
        if softcap:
            model.set_attn_implementation("eager")  # SDPA ignores the soft cap
    else:
        model.packing = "rows"
        AttentionInterface.register("rows", torch.compiler.disable(row_attention))
        model.set_attn_implementation("rows")


def row_attention(module, query, key, value, attention_mask, *, layout, scaling=None, **_):
    """Causal attention, one sequence of a pack after the other: fused kernels run, and nothing is
    computed across sequences (a dense mask takes three times as long). An attention function of
    transformers.

    query (1, H, T, D), key and value (1, K, T, D) -> (1, T, H, D). `layout.segments` are those of
    `Pack`: a sequence attends to itself and to what it shares with its example's first."""
    import torch
    from torch.nn.attention.bias import causal_lower_right

    repeats = query.shape[1] // key.shape[1]  # grouped-query attention
    own_lengths = [own for _, own in layout.segments]
    queries = query.split(own_lengths, dim=2)
    keys = key.repeat_interleave(repeats, dim=1).split(own_lengths, dim=2)
    values = value.repeat_interleave(repeats, dim=1).split(own_lengths, dim=2)
    outputs = []
    for (shared, own), q, k, v in zip(layout.segments, queries, keys, values, strict=True):
        if shared == 0:
            first_k = k
            first_v = v
        else:
            k = torch.cat([first_k[:, :, :shared], k], dim=2)
            v = torch.cat([first_v[:, :, :shared], v], dim=2)
        mask = causal_lower_right(own, shared + own)
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def target_log_probs(model, examples: list[Example], share_prefix: bool = False):
    """(log-probability (N,), number of its sequence (N,)) of each target token in `examples`, given
    the tokens before it, in float32.

    An empty batch gives a single zero with a zero gradient: where another process still has
    examples, this one must run the model too, forward and backward, since FSDP gathers weights and
    gradients from all."""
    import torch

    if not examples:
        filler = Example([Sequence([0, 0], [False, True])], task="", line=0)
        log_probs, owners = target_log_probs(model, [filler])
        return log_probs * 0, owners
    packed = pack(examples, share_prefix)
    ids = torch.tensor(packed.ids, device=model.device)
    positions = torch.tensor(packed.positions, device=model.device)
    sources, labels, owners = torch.tensor(packed.targets, device=model.device).unbind(1)
    attention = {}
    if model.packing == "rows":
        # in an object: for other numbers in a list torch.compile would compile again
        attention["layout"] = SimpleNamespace(segments=packed.segments)
    logits = model(
        input_ids=ids[None],
        position_ids=positions[None],
        logits_to_keep=sources,
        use_cache=False,
        **attention,
    ).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = -torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return log_probs, owners


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float, shape="cosine") -> float:
    """Learning rate of optimizer step 0 .. total - 1: linear warm-up over the first `warmup_ratio`
    of all steps, then half a cosine to zero (paper 4.1), a line to zero, or constant."""
    if shape not in ("cosine", "linear", "constant"):
        raise InputError(f"unknown --lr_scheduler {shape!r}: one of cosine, linear, constant")
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if shape == "cosine":
        return peak * (0.5 * (1 + math.cos(math.pi * done)))
    if shape == "linear":
        return peak * (1 - done)
    return peak


def set_learning_rate(optimizer, step: int, total: int, a) -> float:
    """Give the optimizer the learning rate of `step`; returns it."""
    lr = learning_rate(step, total, a.lr, a.warmup_ratio, a.lr_scheduler)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


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
    """(model, optimizer), ready to train with the settings `a`."""
    import torch

    if a.lora_rank:
        model = add_adapters(model, a)
    if a.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers skips checkpointing in eval mode
    if a.compile:
        for layer in model.get_decoder().layers:
            layer.compile()
    shard(model, accelerator, a.precision)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=a.lr, weight_decay=a.weight_decay, fused=True)
    return model, optimizer


def add_adapters(model, a):
    """The model with adapters of rank `a.lora_rank` at all linear layers; the rest is frozen (Hu et
    al. 2021)."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(a.seed)  # every process and every run begins with the same adapters
    config = LoraConfig(
        r=a.lora_rank,
        lora_alpha=2 * a.lora_rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def shard(model, accelerator, precision: str) -> None:
    """Split the model over all processes, with FSDP2; a single process has a share of all.

    Each process holds its share of the float32 weights, gradients and AdamW averages of each
    decoder layer. While a layer runs, its weights are gathered, with `precision` bf16 in bf16.
    Gradients are summed in float32."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = accelerator.device.type
    if not dist.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.init_device_mesh(device, (accelerator.num_processes,))
    bf16 = precision == "bf16"
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
    for module in [*model.get_decoder().layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    # after sharding, so that a process never holds more than its share in float32
    for p in model.parameters():
        if p.requires_grad or not bf16:
            torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().float(), p.requires_grad))
    model.to(accelerator.device)


def clip_gradients(model, limit: float) -> float:
    """Scale all gradients together to at most this norm (0: no limit); returns the norm before."""
    import torch

    if limit == 0:
        limit = math.inf
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    if hasattr(norm, "full_tensor"):  # of a sharded model
        norm = norm.full_tensor()
    return float(norm)


class Training:
    """Checkpoints, metrics and the final model of one training run.

    Until it ends, all is in the folder `out`.partial: metrics.jsonl and the last checkpoint. A
    killed run resumes from there if data and settings are the same, else it starts over. The
    finished model replaces `out` in one rename."""

    # settings that may change when a run resumes: they change the results by rounding at most
    FREE = ("out", "log_with", "micro_tokens", "gradient_checkpointing", "compile", "save_steps")

    def __init__(self, a, accelerator, model, optimizer, tokenizer, total: int):
        self.a = a
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.tokenizer = tokenizer
        self.total = total  # optimizer steps
        self.out = Path(a.out)
        self.partial = self.out.with_name(f"{self.out.name}.partial")
        self.metrics = self.partial / "metrics.jsonl"
        self.start = 0  # optimizer steps that were done before
        self.log: list[dict] = []  # the rows of metrics.jsonl
        self.key = self._key()
        self._check_out()
        if accelerator.is_main_process:
            self.append = Appender(self.metrics)  # refuses a second run on the same folder
        accelerator.wait_for_everyone()
        self._resume()
        accelerator.wait_for_everyone()  # all have read what the main process deletes
        if accelerator.is_main_process:
            self._clean()
        if accelerator.log_with:
            settings = dataclasses.asdict(a)
            plain = {k: v for k, v in settings.items() if isinstance(v, int | float | str)}
            accelerator.init_trackers(self.out.name, plain)
        accelerator.wait_for_everyone()

    # ---- beginning and resuming

    def _key(self) -> str:
        """The fingerprint of what the result depends on: settings, base model, chat template, data.
        A checkpoint with another one is not resumed."""
        settings = dataclasses.asdict(self.a)
        settings["model"] = weights_fingerprint(self.a.model)
        for name in self.FREE:
            del settings[name]
        rows = read_rows(self.a.data)[: self.a.limit]
        return fingerprint(settings, self.tokenizer.chat_template, rows)

    def _check_out(self) -> None:
        """`out` may be a model, which is replaced, or an empty folder."""
        if not self.out.exists() or (self.out / "config.json").exists():
            return
        if not self.out.is_dir() or any(self.out.iterdir()):
            raise InputError(f"--out {self.a.out} exists and is not a model: choose another")

    def _resume(self) -> None:
        """Load the last checkpoint, if it is one of this run."""
        folders = self.partial.glob("step-*[0-9]")  # a kill may have left a step-N.tmp
        steps = [int(folder.name.removeprefix("step-")) for folder in folders]
        if not steps:
            return
        checkpoint = self.partial / f"step-{max(steps)}"
        if (checkpoint / "settings").read_text() != self.key:
            self.accelerator.print(f"starting over: {self.partial} has other settings or data")
            return
        self.start = max(steps)
        self.log = read_rows(self.metrics)[: self.start]
        self._load(checkpoint)
        self.accelerator.print(f"resuming from step {self.start} of {self.total} ({self.partial})")

    def _clean(self) -> None:
        """Remove what is not of this run: another run's files, metrics after the checkpoint."""
        if self.start == 0:
            for path in self.partial.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path != self.metrics:
                    path.unlink()
        self.append.keep(self.start)

    # ---- one optimizer step

    def progress_bar(self, desc: str):
        """The steps that are left, with a progress bar in the main process."""
        return tqdm(
            range(self.start, self.total),
            desc=desc,
            initial=self.start,
            total=self.total,
            disable=not self.accelerator.is_main_process,
        )

    def ends_epoch(self, done: int) -> bool:
        """Whether optimizer step `done` (from 1) is the last of an epoch."""
        return done % (self.total // self.a.epochs) == 0

    def stop_if_diverged(self, done: int, loss: float, norm: float, batch: list[Example]) -> None:
        """Raise `InputError`, before optimizer step `done` (from 1) updates the weights, if loss or
        gradient is not finite or the loss is 10 times the highest of the first ten steps."""
        early = [row["loss"] for row in self.log[:10]]
        exploded = len(early) == 10 and loss > 10 * max(early)
        if math.isfinite(loss + norm) and not exploded:
            return
        lines = sorted(example.line for example in batch)
        raise InputError(
            f"the loss is {loss:.4g} and the gradient norm {norm:.4g} at step {done}: lower "
            f"--lr, or look at lines {', '.join(map(str, lines))} of {self.a.data}; "
            f"the last checkpoint is in {self.partial}"
        )

    def end_step(self, done: int, metrics: dict) -> str:
        """Log optimizer step `done` (from 1) and save a checkpoint every --save_steps. Returns
        a line for the progress bar."""
        metrics["memory_gb"] = self._peak_memory() / 1e9
        row = {"step": done}
        for name, value in metrics.items():
            row[name] = float(f"{value:.6g}")
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

    def _peak_memory(self) -> int:
        """Bytes: of the GPU's allocator, or of this process on a CPU."""
        import resource

        import torch

        if self.accelerator.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    # ---- checkpoints

    def _state(self) -> dict:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model_state, optimizer_state = get_state_dict(self.model, self.optimizer)
        return {"model": model_state, "optimizer": optimizer_state}

    def _save(self, done: int) -> None:
        """Write a checkpoint, then delete the one before."""
        import torch.distributed.checkpoint as dcp

        folder = self.partial / f"step-{done}"
        temporary = self.partial / f"step-{done}.tmp"
        try:
            dcp.save(self._state(), checkpoint_id=temporary)
        except dcp.api.CheckpointException as e:
            for error, _ in e.failures.values():
                if isinstance(error, OSError):  # for example a full disk
                    raise error from None
            raise RuntimeError(str(e)) from None
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_text(temporary / "settings", self.key)
            temporary.rename(folder)
            for other in self.partial.glob("step-*"):
                if other != folder:
                    shutil.rmtree(other)
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

    # ---- the end

    def finish(self, method: str) -> None:
        """Write the model in Hugging Face format with tokenizer, chat template, metrics.jsonl and a
        model card, and put it in place of `out`."""
        model = self._final_model()
        if self.accelerator.is_main_process:
            folder = self.partial / "final"
            shutil.rmtree(folder, ignore_errors=True)
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            write_rows(folder / "metrics.jsonl", self.log)
            self._write_card(folder / "README.md", method)
            self._replace_out(folder)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def _final_model(self):
        """The base model, in its own dtype, with the trained weights, adapters merged into it: in
        the main process; None in the others."""
        from transformers import AutoModelForCausalLM

        if not self.accelerator.is_main_process:
            for _ in self._trained_weights():
                pass
            return None
        model = AutoModelForCausalLM.from_pretrained(self.a.model, dtype="auto")
        if self.a.lora_rank:
            model = add_adapters(model, self.a)
        parameters = dict(model.named_parameters())
        for name, weight in self._trained_weights():
            parameters[name].data.copy_(weight)
        if self.a.lora_rank:
            model = model.merge_and_unload()
        return model

    def _trained_weights(self):
        """Yield (name, weight) of each trained weight. All processes gather one at a time, so all
        must iterate to the end."""
        self.model.reshard()  # a pass without gradients leaves the root's weights whole
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                yield name, p.detach().full_tensor()

    def _write_card(self, path: Path, method: str) -> None:
        write_text(
            path,
            f"# {self.a.out}\n\n{self.a.model} after {method} on {self.a.data}.\n\n"
            f"Settings: `{json.dumps(dataclasses.asdict(self.a))}`\n\n"
            f"Last step: `{json.dumps(self.log[-1:])}`; all steps are in metrics.jsonl.\n",
        )

    def _replace_out(self, folder: Path) -> None:
        """Put the finished model in place of `out` and delete the partial run."""
        if self.out.is_symlink():
            self.out.unlink()
        elif self.out.exists():
            shutil.rmtree(self.out)
        folder.rename(self.out)
        self.append.__exit__()
        shutil.rmtree(self.partial)
