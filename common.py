"""What the five stage scripts share, in the order in which data passes through it.

    1. rows          JSONL files: read, append, resume
    2. prompts       messages for the planner and the agent; parsing of plans and actions
    3. environments  the protocol of data/NAME/env.py, and the pool of worker processes
    4. models        serve a local model; ask any model through the OpenAI chat protocol
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
import bisect
import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
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
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data"


class InputError(Exception):
    """An error that the user can fix, such as bad input: one line, exit status 2."""


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
    parser = HfArgumentParser(args_class, description=doc, allow_abbrev=False,
                              formatter_class=Formatter)
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
        if e.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EEXIST,
                           errno.ENOTDIR):
            raise
        parser.exit(2, f"error: cannot write {e.filename or 'the run folder'}: {e.strerror}. Free "
                       "some space or choose another --out; finished rows are kept.\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted: finished rows are kept, run the same command to resume\n")
    if training:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@functools.cache
def load_module(path: Path, name: str | None = None):
    """The Python file `path` as a module, imported once. Its folder is its package, so that it can
    import its neighbours (`from .shop import Shop`)."""
    name = name or f"{path.parent.name}.{path.stem}"
    spec = importlib.util.spec_from_file_location(
        name, path, submodule_search_locations=[str(path.parent)])
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
                    f"{path}:{number}: invalid JSON ({e}); fix or delete that line") from None
            if not isinstance(row, dict) or any(k not in row for k in required):
                raise InputError(f"{path}:{number}: each line must be a JSON object with the "
                                 f"fields {', '.join(required)}")
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
            raise InputError(f"{path} is being written by another run; wait for it or choose "
                             "another --out") from None
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


def digest(*parts) -> str:
    """A short stable identifier of any JSON-able content."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def seed_of(*parts) -> int:
    """A 31-bit random seed that depends on `parts` alone, never on the order of work."""
    return int(digest(*parts), 16) & 0x7FFFFFFF


def model_id(model: str, url: str | None = None) -> str:
    """Identifies a model in rows, so that a retrained one is not taken for the old one: a local
    directory by its name and a digest of samples of its weights; a server at `url` by the model it
    serves (`model` if it has that, else its first); any other model by its name."""
    if url:
        server = url.split(",")[0].rstrip("/")
        try:
            with urllib.request.urlopen(f"{server}/models", timeout=30) as answer:
                names = [m["id"] for m in json.loads(answer.read())["data"]]
                return model if model in names else names[0]
        except (KeyError, IndexError, TypeError):
            return model  # this server does not list its models
        except (OSError, ValueError) as e:
            raise InputError(f"the model server {server} cannot be reached ({e}): start it, or fix "
                             "the URL") from None
    path = Path(model)
    if not path.is_dir():
        return model
    h = hashlib.sha256()
    for file in sorted([*path.glob("*.safetensors"), path / "config.json"]):
        size = file.stat().st_size
        h.update(f"{file.name} {size}".encode())
        with file.open("rb") as f:
            for i in range(64):
                f.seek(size * i // 64)
                h.update(f.read(4096))
    return f"{path.name}-{h.hexdigest()[:12]}"


# ---- 2. prompts: messages for the planner and the agent, and parsing of their replies ------------

PLAN_LINE = "\n\nThis meta plan may help you with the task:\n{plan}"
INSERTS = ("instruction", "thought", "observation")  # where the agent reads the plan (paper 5.2)
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
    examples.json {task type: one-shot example}; without it {example} is empty"""

    def __init__(self, env: str, name: str | None = None):
        base = environment_folder(env)
        folder = base if not name else Path(name) if os.sep in name else base / name

        def text(file: str) -> str:
            files = (f / file for f in (folder, base))
            return next((f.read_text().strip() for f in files if f.exists()), "")

        if not folder.is_dir() or not text("agent.txt"):
            known = ", ".join(sorted(p.parent.name for p in base.glob("*/*.txt")))
            raise InputError(f"--prompts {name}: {folder} has no prompts; it must be a folder with "
                             f"planner.txt and agent.txt (folders of {env}: {known})")
        self.planner_text, self.agent_text, self.teacher_text = map(
            text, ("planner.txt", "agent.txt", "teacher.txt"))
        self.examples = json.loads(text("examples.json") or "{}")

    def planner(self, u: str) -> list[dict]:
        """Messages that ask the meta planner for p ~ pi_g(.|u)."""
        return [{"role": "user", "content": fill(self.planner_text, task=u)}]

    def teacher(self, u: str, conversation: str, explored: str = "") -> list[dict]:
        """Messages that ask the teacher to abstract the trajectory e of task u into a meta plan,
        or to compare it with the failed trajectory `explored` of an agent."""
        content = fill(self.teacher_text, task=u, conversation=conversation, explored=explored)
        return [{"role": "user", "content": content}]

    def agent(self, u: str, plan: str | None, task: str, insert: str = "instruction") -> list[dict]:
        """The first messages of an episode, a ~ pi_theta(.|u, p). The plan is part of the task
        instruction or the agent's first thought; or it is in every observation (paper 5.2)."""
        plan_line = PLAN_LINE.format(plan=plan) if plan and insert == "instruction" else ""
        example = self.examples.get(task_type(task), next(iter(self.examples.values()), ""))
        content = fill(self.agent_text, example=example, task=u, plan_line=plan_line)
        messages = [{"role": "user", "content": content}]
        if plan and insert == "thought":
            thought = f"Thought: I will go about the task by this meta plan:\n{plan}"
            messages += [{"role": "assistant", "content": thought},
                         {"role": "user", "content": "Observation: OK."}]
        return messages


def plan_reply(plan: str) -> str:
    """The planner's complete reply for a plan: SFT's target, DPO's chosen or rejected text."""
    return f"<meta_plan>\n{plan}\n</meta_plan>"


def parse_plan(reply: str) -> str | None:
    """The plan between the <meta_plan> tags of a reply, its steps renumbered from 1; None if there
    is none. The closing tag may be missing."""
    match = re.search(r"<meta[ _]plan>(.*?)(?:</meta[ _]plan>|\Z)", reply, re.S | re.I)
    if not match:
        return None
    steps = re.findall(r"^\s*(?:step\s*)?\d+\s*[:.)]\s*(\S.*?)\s*$", match[1], re.M | re.I)
    return number_steps(steps) if steps else None


def number_steps(steps: list[str]) -> str:
    return "\n".join(f"Step {i}: {s}" for i, s in enumerate(steps, 1))


def plan_steps(plan: str) -> list[str]:
    return [line.split(": ", 1)[-1] for line in plan.splitlines()]


def parse_action(reply: str) -> str | None:
    """The text after the first `Action:` of a reply, to the end of that line; None if missing."""
    match = re.search(r"^[ \t*]*action[ \t*]*:[ \t*]*(.+?)[ \t*]*$", reply, re.M | re.I)
    return match[1].strip().strip("`\"'").strip() or None if match else None


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
        raise InputError(f"--env {name}: {folder / 'env.py'} does not exist; --env is a folder of "
                         f"data/ ({known}) or a path")
    return folder


def environment(name: str) -> type[Environment]:
    """The environment of a folder of data/ or a path: the `Environment` subclass in its env.py."""
    folder = environment_folder(name)
    module = load_module(folder / "env.py", f"environments.{folder.name}")
    found = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Environment)
             and v.__module__ == module.__name__]
    if len(found) != 1:
        raise InputError(f"{folder / 'env.py'} must define one subclass of common.Environment, "
                         f"not {len(found)}")
    return found[0]


def check_data(env: str, out) -> None:
    """Refuse a run folder whose rows come from other data of the environment."""
    path, version = Path(out) / "data_version.txt", environment(env).version()
    if not version:
        return
    if path.exists() and path.read_text() != version:
        raise InputError(f"{out} has rows of other {env} data ({path}): use another run folder for "
                         "this data (make RUN=, --out)")
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
                    self.free.pop() if self.free else environment(self.env)(self.sessions))
            return getattr(self.live[session], method)(*args)
        except InputError:
            raise
        except Exception as e:
            self.live.pop(session, None)  # in an unknown state: not reused
            raise RuntimeError(f"{type(e).__name__}: {e}"[:2000]) from None


def _start_worker(env: str, sessions: int) -> None:
    """Set up a worker process: a process group of its own, which ends with the parent, however
    that ends."""
    global _sessions
    os.setsid()
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os.killpg(0, signal.SIGKILL)),
                     daemon=True).start()
    _sessions = Sessions(env, sessions)


def _call_session(*args):
    return _sessions.call(*args)


class Worker:
    """One worker process: an executor with a single process, started again after it has died."""

    died: tuple = (BrokenExecutor, TimeoutError)  # what a call raises then

    def __init__(self, env: str, sessions: int):
        self.env, self.sessions, self.live, self.executor = env, sessions, 0, None

    def start(self):
        """The executor, a new one if there is none alive."""
        if self.executor is None:
            spawn, args = multiprocessing.get_context("spawn"), (self.env, self.sessions)
            self.executor = ProcessPoolExecutor(1, spawn, _start_worker, args)
            self._pid = self.executor.submit(os.getpid)
        return self.executor

    @property
    def pid(self) -> int:
        return self._pid.result()

    def submit(self, *args):
        """A future of `Sessions.call(*args)`."""
        return self.executor.submit(_call_session, *args)

    def kill(self) -> None:
        executor, self.executor = self.executor, None
        if executor:
            if self._pid.done() and not self._pid.exception():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
            executor.shutdown(wait=False, cancel_futures=True)


class RayWorker(Worker):
    """The same as an actor on a Ray cluster: that of RAY_ADDRESS, or a new one on this machine. The
    repository, its packages and the environment's data must be at the same paths on all nodes."""

    def __init__(self, env: str, sessions: int):
        import ray

        super().__init__(env, sessions)
        self.ray, self.died = ray, (ray.exceptions.RayActorError, TimeoutError)
        if not ray.is_initialized():
            variables = {k: os.environ[k] for k in environment(env).VARIABLES if k in os.environ}
            ray.init(os.environ.get("RAY_ADDRESS") or "local", log_to_driver=False,
                     logging_level="ERROR", runtime_env={"env_vars": {
                         "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0", **variables}})

    def start(self):
        if self.executor is None:
            actor = self.ray.remote(num_cpus=1)(Sessions)
            self.executor = actor.remote(self.env, self.sessions)
        return self.executor

    def submit(self, *args):
        return self.executor.call.remote(*args).future()

    def kill(self) -> None:
        actor, self.executor = self.executor, None
        if actor:
            self.ray.kill(actor)


class EnvPool:
    """Environment workers, processes of this machine or (`ray`) actors of a Ray cluster. A session
    lives on one of them.

    async with EnvPool(env, workers=2) as pool:
        async with pool.session() as env:
            u = await env("reset", task)
            observation, reward, done, success = await env("step", action)
    """

    def __init__(self, env: str, workers: int, sessions: int = 64, ray: bool = False):
        if min(workers, sessions) < 1:
            raise InputError("--workers and --concurrency must be at least 1")
        os.environ["PYTHONHASHSEED"] = "0"  # of the workers: simulators iterate over sets
        cls = environment(env)
        cls.prepare()
        kind = RayWorker if ray else Worker
        self.workers = [kind(env, max(1, sessions // workers)) for _ in range(workers)]
        self.shares_tasks, self.homes, self.numbers = cls.shares_tasks, {}, itertools.count()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        for worker in self.workers:
            worker.kill()

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
        number, executor = next(self.numbers), worker.start()

        async def call(method, *args, deadline=120.0):
            try:
                if worker.executor is not executor:
                    raise BrokenExecutor
                future = asyncio.wrap_future(worker.submit(number, method, args))
                return await asyncio.wait_for(future, deadline)
            except (BrokenExecutor, *worker.died) as e:
                if worker.executor is executor:
                    worker.kill()
                what = (f"did not answer {method} within {deadline:.0f} s"
                        if isinstance(e, TimeoutError) else "died")
                raise WorkerDied(f"an environment worker {what}; finished rows are kept, run the "
                                 "same command to resume") from None

        try:
            yield call
        finally:
            worker.live -= 1
            if worker.executor is executor:
                with contextlib.suppress(BrokenExecutor):
                    worker.submit(number, "close", ())

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
        """{task: result} of a method, one task per worker at a time; `keep(task, result)` of
        each."""
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


async def list_tasks(pool: EnvPool, env: str, split: str, tasks_file: str | None,
                     types: list[str] | None, limit: int | None) -> list[str]:
    """The tasks of a stage: a split, or those of `tasks_file` (JSON: [[type, variation], ...]); of
    the given types only; the first `limit` of them."""
    cls = environment(env)
    if unknown := sorted(set(types or []) - set(cls.MAX_STEPS)):
        raise InputError(f"unknown task type {unknown[0]!r}: --types takes "
                         f"{', '.join(sorted(cls.MAX_STEPS))}")
    if limit is not None and limit < 1:
        raise InputError("--limit must be at least 1")
    if tasks_file:
        try:
            tasks = [f"{kind}/{v}" for kind, v in json.loads(Path(tasks_file).read_text())]
        except FileNotFoundError:
            raise InputError(f"--tasks {tasks_file} does not exist") from None
        except (ValueError, TypeError) as e:
            raise InputError(f"--tasks {tasks_file}: must be JSON of the form "
                             f'[["TYPE", VARIATION], ...] ({e})') from None
        for task in tasks:
            cls.check(task)
    else:
        async with pool.session() as session:
            tasks = await session("tasks", split, deadline=600)
    tasks = [t for t in dict.fromkeys(tasks) if not types or task_type(t) in types]
    if not tasks:
        raise InputError(f"no tasks left of the {split} split with these --tasks / --types")
    return tasks[:limit]


# ---- 4. models: every model, local or not, is asked through the OpenAI chat protocol -------------


class ContextOverflow(InputError):
    """The prompt is longer than the model's context."""


class Reply(NamedTuple):
    text: str
    prompt_tokens: int
    completion_tokens: int


class Model:
    """A chat model behind one or more OpenAI-compatible servers (`url`: addresses separated by
    commas).

    `url` None is OpenAI, or `OPENAI_BASE_URL`, with the key in `OPENAI_API_KEY`. The client retries
    429, 5xx, lost connections and timeouts with growing pauses; then `InputError` is raised."""

    def __init__(self, name: str, url: str | None = None, concurrency: int = 64,
                 timeout: float = 300.0):
        import httpx
        import openai

        key = os.environ.get("OPENAI_API_KEY")
        if url is None and not key:
            raise InputError(f"asking {name} needs an API key: set OPENAI_API_KEY (and "
                             "OPENAI_BASE_URL for a server other than OpenAI's)")
        self.name, self.where = name, (
            f"the model server {url or os.environ.get('OPENAI_BASE_URL', 'OpenAI')}")
        self.slots = asyncio.Semaphore(max(1, concurrency))
        self.retries = int(os.environ.get("MPO_MAX_RETRIES", 16))  # 16: pauses of 80-100 s in all
        self.deadline = 3 * timeout  # seconds for one completion with its retries
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=concurrency)
        self.clients = [openai.AsyncOpenAI(
            base_url=u, api_key=key if url is None else "none", max_retries=self.retries,
            timeout=openai.Timeout(timeout, connect=10.0),
            http_client=openai.DefaultAsyncHttpxClient(limits=limits))
            for u in (url.split(",") if url else [None])]
        self.in_flight, self.assigned = [0] * len(self.clients), [0] * len(self.clients)
        self.completion_tokens = 0  # generated so far

    def _choose(self, home: dict | None) -> int:
        """The server with the fewest requests in flight, or of those the fewest conversations. A
        conversation (`home` is its memory) stays with the server that has its prefix in the cache,
        unless that one is much busier."""
        home = {} if home is None else home
        least = min(range(len(self.clients)), key=lambda i: (self.in_flight[i], self.assigned[i]))
        if "server" not in home or self.in_flight[home["server"]] > 2 * self.in_flight[least] + 4:
            home["server"] = least
            self.assigned[least] += 1
        return home["server"]

    async def ask(self, messages: list[dict], temperature: float = 0.0, max_tokens: int = 256,
                  seed: int | None = None, home: dict | None = None) -> Reply:
        """One completion. Raises `ContextOverflow` if the prompt does not fit, `InputError` if the
        server refuses the key or the model, cannot be reached, or sends no completion."""
        import openai

        malformed = (IndexError, TypeError, ValueError, AttributeError,
                     openai.APIResponseValidationError)
        tries = f"({self.retries + 1} tries); finished rows are kept, run it again to resume"
        async with self.slots:
            server = self._choose(home)
            self.in_flight[server] += 1
            try:
                async with asyncio.timeout(self.deadline):
                    for left in reversed(range(self.retries + 1)):
                        try:
                            answer = await self.clients[server].chat.completions.create(
                                model=self.name, messages=messages, temperature=temperature,
                                max_tokens=max_tokens, seed=seed)
                            text, usage = answer.choices[0].message.content or "", answer.usage
                            break
                        except malformed as e:  # which the client does not retry
                            if not left:
                                raise InputError(f"{self.where} sends answers without a completion "
                                                 f"({type(e).__name__}) {tries}") from None
            except TimeoutError:
                raise InputError(
                    f"{self.where} did not answer within {self.deadline:.0f} s {tries}") from None
            except (openai.AuthenticationError, openai.PermissionDeniedError) as e:
                raise InputError(f"{self.where} refused the API key ({e.status_code}): check "
                                 "OPENAI_API_KEY") from None
            except openai.NotFoundError:
                raise InputError(f"{self.where} has no model {self.name!r}") from None
            except openai.BadRequestError as e:
                if re.search(r"context.{0,20}length|maximum.{0,40}tokens|too long|too many tokens",
                             str(e), re.I):
                    raise ContextOverflow(f"a prompt exceeds the context of {self.where} "
                                          f"(--max_model_len): {str(e)[:300]}") from None
                raise InputError(f"{self.where} refused a request: {str(e)[:300]}") from None
            except openai.APIConnectionError:
                raise InputError(f"{self.where} cannot be reached {tries}") from None
            except openai.APIStatusError as e:
                raise InputError(
                    f"{self.where} answers {e.status_code}: {str(e)[:200]} {tries}") from None
            finally:
                self.in_flight[server] -= 1
        counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        self.completion_tokens += counts[1]
        return Reply(text, *counts)


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
                raise InputError(f"{name} has no {file}: it must be a Hugging Face model directory "
                                 "with config and tokenizer")
        if ('"chat_template"' not in (path / "tokenizer_config.json").read_text()
                and not list(path.glob("*chat_template*"))):
            raise InputError(f"{name} has no chat template: use an instruction-tuned model")
    elif name.startswith((".", os.sep, "~")) or path.parts[0] in ("runs", "models"):
        raise InputError(f"model directory {name} does not exist: run the stage that makes it")


@contextlib.contextmanager
def open_model(name: str, url: str | None, a):
    """A `Model` to ask, with the settings of a stage's Args: behind `url` if given; served for the
    duration of the `with` if local; else of OpenAI or OPENAI_BASE_URL."""
    if not url and is_local(name):
        with serve(name, Path(a.out) / "logs", a.tensor_parallel, a.max_model_len) as served:
            yield Model(name, served, a.concurrency)
    else:
        name = model_id(name, url) if url else name.removeprefix("api:")
        yield Model(name, url, a.concurrency)


@contextlib.contextmanager
def serve(model: str, log_dir="logs", tensor_parallel: int = 1, max_model_len: int = 8192,
          wait: float = 900.0):
    """Serve a local model on loopback; yields the addresses, for `Model`. On GPUs there is one
    server for every `tensor_parallel` GPUs. Servers end with the `with`, or with this process.
    Raises `InputError` with the end of the log if a server ends early or is not healthy within
    `wait` seconds."""
    check_model(model)
    gpus = visible_gpus()
    if tensor_parallel < 1 or (gpus and tensor_parallel > len(gpus)):
        raise InputError(f"--tensor_parallel {tensor_parallel}: must be between 1 and the number "
                         f"of GPUs, {len(gpus)}")
    servers = []
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
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model,
               "--served-model-name", model, *address, "--max-model-len", str(max_model_len),
               "--generation-config", "vllm", "--enable-prefix-caching"]
    if gpus:
        return [*command, "--tensor-parallel-size", str(len(gpus)),
                "--gpu-memory-utilization", "0.9"]
    # no chunked prefill: vLLM's CPU engine crashes on a seeded request whose prompt is split
    # ("CPU Generator does not use offset", 0.32.0)
    return [*command, "--enforce-eager", "--no-enable-chunked-prefill",
            "--max-num-batched-tokens", str(max(8192, max_model_len))]


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
    env = {"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    log_dir.mkdir(parents=True, exist_ok=True)
    log = log_dir / f"server-{Path(model).name}-{port}.log"
    command = [sys.executable, "-c", SUPERVISOR, *server_command(model, port, gpus, max_model_len)]
    with log.open("w") as f:
        process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=f, stderr=f,
                                   start_new_session=True)
    return SimpleNamespace(model=model, process=process, log=log, url=f"http://127.0.0.1:{port}")


def _wait_healthy(server, wait: float) -> None:
    from tqdm import tqdm

    start = time.time()
    with tqdm(desc=f"starting a server for {server.model}", bar_format="{desc}: {elapsed}",
              leave=False) as bar:
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
                    f"the server of {server.model} {what}; the end of {server.log}:\n{tail}")
            with contextlib.suppress(RuntimeError):  # without an event loop Ctrl-C raises by itself
                if asyncio.current_task().cancelling():
                    raise KeyboardInterrupt
            time.sleep(0.3)
            bar.update()


# ---- 5. rollouts: the agent acts in the environment ----------------------------------------------


@dataclasses.dataclass
class RolloutConfig:
    """How the agent is asked and when an episode ends."""

    prompts: Prompts
    temperature: float
    max_tokens: int
    observation_chars: int  # longer observations are cut; 0: never
    seed: int
    max_failures: int = 10  # invalid actions in a row that end an episode
    max_steps: int | None = None  # step limit of an episode; None: the environment's
    insert: str = "instruction"  # where the agent reads the plan, one of INSERTS


def observation_message(observation: str, limit: int, plan: str | None = None) -> dict:
    if limit and len(observation) > limit:
        observation = observation[:limit].rstrip() + " ..."
    repeated = PLAN_LINE.format(plan=plan) if plan else ""
    return {"role": "user", "content": f"Observation: {observation}{repeated}"}


async def episode(env, model: Model, cls, task: str, plan: str | None, rollout: int,
                  c: RolloutConfig) -> dict:
    """One trajectory e ~ pi_theta(e|u, p) (paper equation 2) in one environment session.

    Returns {"instruction": u, "reward": r(u, e), "success", "end", "steps": [[reply, observation],
    ...], "format_errors", "prompt_tokens", "completion_tokens"}. `end` is success, failure (the
    task can no longer be completed), steps (the limit), errors (`max_failures`) or context. A reply
    without an action is a step whose observation says so."""
    u, home = await env("reset", task), {}
    messages = c.prompts.agent(u, plan, task, c.insert)
    repeated = plan if c.insert == "observation" else None
    row = {"instruction": u, "reward": 0.0, "success": False, "end": "steps", "steps": [],
           "format_errors": 0, "prompt_tokens": 0, "completion_tokens": 0}
    failures = 0
    for i in range(c.max_steps or cls.max_steps(task)):
        seed = seed_of(c.seed, task, plan, rollout, i)
        try:
            reply = await model.ask(messages, c.temperature, c.max_tokens, seed, home)
        except ContextOverflow:
            row["end"] = "context"
            break
        row["prompt_tokens"] += reply.prompt_tokens
        row["completion_tokens"] += reply.completion_tokens
        action, done = parse_action(reply.text), False
        if action is None:
            observation = NO_ACTION
            row["format_errors"] += 1
        else:
            observation, row["reward"], done, row["success"] = await env("step", action)
        row["steps"].append([reply.text, observation])
        if done:
            row["end"] = "success" if row["success"] else "failure"
            break
        failures = failures + 1 if action is None or cls.failed(observation) else 0
        if failures >= c.max_failures:
            row["end"] = "errors"
            break
        messages += [{"role": "assistant", "content": reply.text},
                     observation_message(observation, c.observation_chars, repeated)]
    return row


async def rollouts(jobs: list[dict], model: Model, pool: EnvPool, env: str, c: RolloutConfig,
                   concurrency: int, append, desc: str = "rollouts", attempts: int = 3) -> int:
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
                row = await pool.use(job["task"], lambda session: episode(
                    session, model, cls, job["task"], job["plan"], job["rollout"], c),
                    attempts, lambda: retries.append(job))
            except (WorkerDied, RuntimeError) as e:
                row = {"instruction": None, "reward": 0.0, "success": False, "end": "crash",
                       "steps": [], "error": str(e)}
            append({**job, **row, "seconds": round(time.time() - began, 2)})
            failed, total = failed + (row["end"] == "crash"), total + row["reward"]
            done, seconds = bar.n + 1, time.time() - start
            bar.set_postfix_str(
                f"{60 * done / seconds:.0f} ep/min, {model.completion_tokens / seconds:.0f} tok/s, "
                f"reward {total / max(1, done - failed):.3f}, {failed} failed, {len(retries)} "
                "retries", refresh=False)
            bar.update()

        await run_concurrently(work, jobs, min(concurrency, len(jobs)))
    return len(retries)


# ---- 6. training: what the SFT and the DPO loop share --------------------------------------------


def load_model(name: str):
    """(model, tokenizer): weights as they were saved, dropout off, safetensors only."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as e:
        raise InputError(f"cannot load {name}: {str(e).splitlines()[0]}") from None
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer of {name} has no chat template: training rows are conversations")
    model.config.use_cache = False
    for module in model.modules():  # dropout off in any mode
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    seen = []
    hook = model.get_decoder().register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state[0]))
    with torch.no_grad():
        whole = model.eval()(input_ids=torch.arange(8)[None]).logits[0].float()
        ours = logits_of(model, seen[0]).float()
    hook.remove()
    if not torch.allclose(whole, ours, rtol=0.05, atol=0.05 * whole.std().item(), equal_nan=True):
        raise InputError(f"{name}: {model.config.model_type} models do more to their logits than training knows; choose another model")
    return model, tokenizer


def tokenize(messages: list[dict], tokenizer, where: str) -> tuple[list[int], list[bool]]:
    """A conversation as (token ids, target mask). Targets are what the model itself writes: the
    text of every assistant message and the end token after it. The chat template writes the BOS, if
    there is one, so the tokenizer adds none."""
    if not isinstance(messages, list) or not messages or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages):
        raise InputError(f"{where}: a conversation must be a list of objects with `role` and `content`, both text")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            upto = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
            if not (upto.startswith(before) and text.startswith(upto)):
                raise InputError(f"{where}: the model's chat template rewrites earlier turns of a conversation, so what "
                                 "it is trained on is not what it will see; use a template that only appends")
            spans.append((len(before), len(upto.rstrip())))
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, mask, s = out["input_ids"], [], 0
    for begin, _ in out["offset_mapping"]:
        while s < len(spans) and begin >= spans[s][1]:
            s += 1
        mask.append(s < len(spans) and begin >= spans[s][0])
    return ids, mask


def held_out(tasks: list, share: float) -> list[bool]:
    """For each row's task whether it is kept for the evaluation loss: decided by the task alone,
    about `share` of all tasks."""
    return [seed_of("held out", task) < share * 2**31 for task in tasks]


SHARED = 16  # tokens of a trie's node: sequences have beginnings in common in steps of so many


def trie_paths(groups: list[list[tuple]], share_prefix: bool = True) -> list[list[tuple[list[int], int]]]:
    """Groups of sequences (ids, mask) as paths in one trie of `SHARED` tokens a node: ([node
    numbers], length) each. Sequences that begin alike have their first nodes in common; without
    `share_prefix` none has."""
    trie, roots = {}, itertools.count(-1, -1)

    def path(ids, node):
        for i in range(0, len(ids), SHARED):
            node = trie.setdefault((node, tuple(ids[i : i + SHARED])), len(trie))
            yield node

    return [[(list(path(ids, None if share_prefix else next(roots))), len(ids)) for ids, _ in group] for group in groups]


def shared_tokens(paths: list[tuple[list[int], int]], known) -> list[int]:
    """How many first tokens of each sequence a packed one with the nodes `known` and the sequences
    before it has already. A beginning of less than a fifth of a sequence is not counted: attention
    over one that is elsewhere cannot skip what is above the diagonal; a fifth is about where, by
    timings on a CPU, that is made up for."""
    out, own = [], set()
    for nodes, length in paths:
        first_new = bisect.bisect(nodes, False, key=lambda node: node not in known and node not in own)
        common = min(SHARED * first_new, length)
        out.append(common if 5 * common >= length else 0)
        own.update(nodes)
    return out


def plan_epoch(rows: list, batch_size: int, micro_tokens: int, processes: int, seed: int, epoch: int) -> list[list[list[int]]]:
    """The batches of one epoch: [optimizer step][micro-batch] -> row indices.

    Rows, each as its `trie_paths`, are shuffled by (seed, epoch) alone, cut into batches of
    `batch_size`, and each batch is spread over as few micro-batches as hold at most `micro_tokens`
    tokens each, evenly, with rows that begin alike together; a longer row is alone. Every process
    computes this same plan and takes micro-batches rank, rank + processes, ...; their number is a
    multiple of `processes`, some may be empty."""
    def tokens(row: int, known=()) -> int:
        return sum(length for _, length in rows[row]) - sum(shared_tokens(rows[row], known))

    def fill(batch: list[int], count: int, capacity: float) -> list[list[int]] | None:
        """Each row to where it adds least, of such places to the emptiest; None if it is nowhere
        within the capacity."""
        micros, filled, known = [[] for _ in range(count)], [0] * count, [set() for _ in range(count)]
        for row in batch:
            added = [tokens(row, nodes) for nodes in known]
            fits = [m for m in range(count) if not micros[m] or filled[m] + added[m] <= capacity]
            if not fits:
                return None
            m = min(fits, key=lambda m: (added[m], filled[m]))
            micros[m].append(row)
            filled[m] += added[m]
            known[m].update(node for nodes, _ in rows[row] for node in nodes)
        return micros

    order, steps = list(range(len(rows))), []
    random.Random(f"{seed} {epoch}").shuffle(order)
    for i in range(0, len(order), batch_size):
        batch, total, known = order[i : i + batch_size], 0, set()
        for row in batch:
            total += min(tokens(row, known), micro_tokens)
            known.update(node for nodes, _ in rows[row] for node in nodes)
        batch.sort(key=lambda row: -tokens(row))
        count, micros = -(-total // micro_tokens) if micro_tokens else len(batch), None
        while not micros:
            count += -count % processes
            capacity = total / count
            while not (micros := fill(batch, count, min(capacity, micro_tokens))) and capacity < micro_tokens:
                capacity = 1.05 * capacity
            count = max(count + 1, count * 21 // 20)
        while len(micros) > processes and not any(micros[-processes:]):
            del micros[-processes:]
        steps.append(micros)
    return steps


def pack(sequences: list[tuple], device, share_prefix: bool = True) -> dict:
    """Sequences (ids, mask) as one long sequence without padding. What a sequence begins with like
    one before it is not there again (`share_prefix`): its rest has the positions that it would have
    alone, and `packed_attention` shows it its beginning, where that is, and itself, so the result
    is that of single sequences, for the work of fewer tokens.

    {"ids", "positions": (1, T); "sources", "labels", "owners": (N,) for N targets: the index of the
    token whose output predicts it, its id, and its sequence's number; "segments": how T is
    divided}. A target in a common beginning is there once for each of its sequences."""
    import torch

    ids, positions, targets, places, starts = [], [], [], [], {}
    [paths] = trie_paths([sequences], share_prefix)
    for number, ((sequence, mask), (nodes, length)) in enumerate(zip(sequences, paths, strict=True)):
        [shared] = shared_tokens([(nodes, length)], starts)
        where = [starts[nodes[i // SHARED]] + i % SHARED for i in range(shared)] + list(range(len(ids), len(ids) + length - shared))
        starts.update((node, where[i * SHARED]) for i, node in enumerate(nodes) if i * SHARED >= shared)
        ids += sequence[shared:]
        positions += range(shared, length)
        targets += [(where[i - 1], sequence[i], number) for i in range(1, length) if mask[i]]
        places.append((where, length - shared))
    if not ids:  # a process without rows must still take part in the collectives
        ids, positions, places = [0], [0], [([0], 1)]
    sources, labels, owners = ([t[i] for t in targets] for i in range(3))
    out = {"ids": [ids], "positions": [positions], "sources": sources, "labels": labels, "owners": owners}
    return {k: torch.tensor(v, dtype=torch.long, device=device) for k, v in out.items()} | {"segments": Segments(places)}


class Segments:
    """How a packed sequence is divided, from the places of each sequence's tokens in it and how
    many of these it added: `own`, the lengths of what each added; `cuts`, the lengths of pieces
    that no sequence begins or ends within; `seen`, which of these each sequence is. Not a list, on
    whose length compiled layers would depend."""

    def __init__(self, places: list[tuple[list[int], int]]):
        places = [(where, own) for where, own in places if own]  # the others are there already, whole
        spans = []
        for where, _ in places:
            breaks = [0, *(i for i in range(1, len(where)) if where[i] != where[i - 1] + 1), len(where)]
            spans.append([(where[a], where[b - 1] + 1) for a, b in itertools.pairwise(breaks)])
        borders = sorted({border for span in spans for piece in span for border in piece})
        number = {border: i for i, border in enumerate(borders)}
        self.own = [own for _, own in places]
        self.cuts = [b - a for a, b in itertools.pairwise(borders)]
        self.seen = [[i for a, b in span for i in range(number[a], number[b])] for span in spans]
        self.first = [len(where) - own for where, own in places]  # the position of the first token that each added
        self.block_mask = functools.lru_cache(self._block_mask)  # of all layers

    def _block_mask(self, device, window: int | None):
        """The same for flex attention: a token sees those of its sequence's pieces that are not
        behind it, nor `window` before it."""
        import torch
        from torch.nn.attention.flex_attention import create_block_mask

        sees = torch.zeros(len(self.own), len(self.cuts), dtype=torch.bool)
        for row, pieces in zip(sees, self.seen, strict=True):
            row[pieces] = True
        position = torch.cat([torch.arange(first, first + own) for first, own in zip(self.first, self.own, strict=True)]).to(device)
        sequence, piece = (torch.arange(len(n)).repeat_interleave(torch.tensor(n)).to(device) for n in (self.own, self.cuts))
        sees = sees.to(device)

        def visible(batch, head, q, k):
            back = position[q] - position[k]
            return sees[sequence[q], piece[k]] & (back >= 0) & (back < (window or len(position)))

        return create_block_mask(visible, None, None, len(position), len(position), device=device, _compile=device.type == "cuda")


def packed_attention(module, query, key, value, attention_mask, scaling=None, segments=None, sliding_window=None, flex=False, **kwargs):
    """Causal attention of a packed sequence, query (1, H, T, D), key and value (1, K, T, D) -> (1,
    T, H, D): what a sequence added sees its common beginning and itself. One after the other, so
    that torch's fused kernels run and nothing is computed across sequences, or (`flex`) all in one
    of flex attention's. An attention function of transformers, by the names of "packed" and
    "packed_flex"."""
    import torch

    if unknown := [k for k in ("s_aux", "softcap", "position_bias", "indices", "block_indices") if kwargs.get(k) is not None]:
        raise InputError(f"this model's attention takes {unknown[0]}, which training does not know: choose another model")

    def attend(q, k, v):
        offset = k.shape[2] - q.shape[2]
        windowed = sliding_window and k.shape[2] > sliding_window
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape == v.shape and not windowed:
            return cpu_attention()(q, k, v, scaling or q.shape[-1] ** -0.5)
        groups = query.shape[1] // key.shape[1]
        k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
        mask = None
        if offset or windowed:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(offset)
            if windowed:
                mask = mask.triu(offset - sliding_window + 1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)

    segments = segments or Segments([(range(query.shape[2]), query.shape[2])])
    if flex:
        from transformers.integrations.flex_attention import flex_attention_forward

        return flex_attention_forward(module, query, key, value, segments.block_mask(query.device, sliding_window), scaling)[0], None
    keys, values = key.split(segments.cuts, dim=2), value.split(segments.cuts, dim=2)
    out = [attend(q, *(torch.cat([x[i] for i in seen], 2) if len(seen) > 1 else x[seen[0]] for x in (keys, values)))
           for q, seen in zip(query.split(segments.own, dim=2), segments.seen, strict=True)]
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


@functools.cache
def cpu_attention():
    """Causal attention on a CPU in bf16: (query (1, H, T, D), key and value (1, K, N, D), scale) ->
    (1, H, T, D), the queries those of the last T of N positions. Torch's forward pass, and a
    backward pass in about half of the time of torch's: all heads together, `BLOCK` queries at a
    time with what they see (Dao 2023, FlashAttention-2, algorithm 2), in matrix products of bf16.
    log P = scores - lse and dS / P = dP - delta are one product each, with lse and delta as two
    more columns: what is rounded to bf16 is the small difference, not its two sides."""
    import torch

    BLOCK, COLUMNS = 192, 16  # a multiple of 16 columns is a third faster than two

    def widened(x, column):
        """[x, column in two parts of bf16, zeros]."""
        first = column.bfloat16()
        return torch.cat([x, first, (column - first).bfloat16(), x.new_zeros(*x.shape[:-1], COLUMNS - 2)], -1)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, scale):
            offset, mask = k.shape[2] - q.shape[2], None
            if offset:
                mask = torch.full((q.shape[2], k.shape[2]), -math.inf, dtype=q.dtype).triu(1 + offset)
            heads = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, *heads, 0.0, mask is None, attn_mask=mask, scale=scale)
            ctx.save_for_backward(q, k, v, out, lse)
            ctx.scale = scale
            return out

        @staticmethod
        def backward(ctx, grad):
            q, k, v, out, lse = ctx.saved_tensors
            (H, T, D), (K, N, _) = q.shape[1:], k.shape[1:]

            def grouped(x, column):  # by the key's head: (K, H / K, T, D + COLUMNS)
                return widened(x[0], column).view(K, H // K, T, -1)

            minus = torch.zeros(K, N, COLUMNS, dtype=k.dtype)
            minus[..., :2] = -1
            keys, values = torch.cat([k[0], minus], -1), torch.cat([v[0], minus], -1)
            queries = grouped(q, lse[0, ..., None] / ctx.scale)
            grads = grouped(grad, (grad[0].float() * out[0]).sum(-1, keepdim=True))
            dq, (dk, dv) = torch.empty_like(queries[..., :D]), torch.zeros(2, K, N, D)
            count = -(-T // BLOCK)
            for first, last in itertools.pairwise(T * i // count for i in range(count + 1)):
                seen, size = N - T + last, last - first
                qs, gs = (x[:, :, first:last].flatten(1, 2) for x in (queries, grads))
                p = (qs @ keys[:, :seen].mT).mul_(ctx.scale).exp_()
                p.unflatten(1, (-1, size))[..., seen - size :].tril_()
                ds = (gs @ values[:, :seen].mT).mul_(p)
                dv[:, :seen] += p.mT @ gs[..., :D]
                dk[:, :seen] += ds.mT @ qs[..., :D]
                dq[:, :, first:last] = (ds @ keys[:, :seen, :D]).unflatten(1, (-1, size))
            return dq.view(1, H, T, D) * ctx.scale, (dk[None] * ctx.scale).to(k.dtype), dv[None].to(v.dtype), None

    return Attention.apply


def target_log_probs(model, packed: bool = True, flex: bool = False):
    """Wrap a causal language model: forward(**pack(...)) -> (N,) the log-probability of each target
    given what precedes it, in float32. The logits of `CHUNK` targets at a time are all that ever
    exists of the (T, vocabulary) tensor; they are computed again for backward.

    `packed` False, or a model that `can_pack` refuses: its own attention, one sequence at a time.
    `flex`: flex attention."""
    import torch
    from torch.utils.checkpoint import checkpoint
    from transformers import AttentionInterface

    CHUNK = 512
    packed = packed and can_pack(model)
    if packed:
        name = "packed_flex" if flex else "packed"
        AttentionInterface.register(name, torch.compiler.disable(functools.partial(packed_attention, flex=flex)))
        model.set_attn_implementation(name)

    class TargetLogProbs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.packed = model, packed
            self.log_probs = lambda h, y: -torch.nn.functional.cross_entropy(logits_of(model, h), y, reduction="none")
            self._no_split_modules, self.tie_weights = model._no_split_modules, model.tie_weights  # for a user's own FSDP

        def forward(self, ids, positions, sources, labels, segments, owners=None):
            assert packed or len(segments.own) == 1, "this model's sequences cannot be packed"
            hidden = model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False,
                                         **({"segments": segments} if packed else {})).last_hidden_state[0]

            if not len(labels):
                return self.log_probs(hidden[:1], ids[0, :1]) * 0
            return torch.cat([checkpoint(self.log_probs, hidden[s], y, use_reentrant=False)
                              for s, y in zip(sources.split(CHUNK), labels.split(CHUNK), strict=True)])

    return TargetLogProbs()


def logits_of(model, hidden):
    """The output layer: (T, hidden size) -> (T, vocabulary), float32 or more."""
    import torch

    logits, cap = model.get_output_embeddings()(hidden), getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.tanh(logits / cap) * cap if cap else logits


def can_pack(model) -> bool:
    """Whether all that mixes a model's tokens is attention that `packed_attention` can take the
    place of."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    state_space = any(hasattr(config, k) for k in ("ssm_state_size", "mamba_d_state", "state_size", "linear_num_value_heads"))
    sinks = any(hasattr(m, "sinks") for m in model.modules())
    return (kinds <= {"full_attention", "sliding_attention"} and model._supports_attention_backend and not state_space and not sinks
            and not getattr(config, "attn_logit_softcapping", None))


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float, shape: str = "cosine") -> float:
    """Learning rate of optimizer step 0 .. total - 1: linear warm-up over the first `warmup_ratio`
    of all steps, then half a cosine to zero (paper 4.1), a line to zero, or constant."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    shapes = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    if shape not in shapes:
        raise InputError(f"unknown --lr_scheduler {shape!r}: one of {', '.join(shapes)}")
    return peak * shapes[shape]


def own_accelerate_config() -> bool:
    """Whether the user's Accelerate configuration sets FSDP up: then it is left at that."""
    fsdp, *others = (os.environ.get(f"ACCELERATE_USE_{k}", "").lower() in ("true", "1") for k in ("FSDP", "DEEPSPEED", "MEGATRON_LM"))
    if any(others):
        raise InputError("this loop does not run under DeepSpeed or Megatron, it shards the model itself: take an Accelerate "
                         "configuration with FSDP, or without either (accelerate launch --config_file)")
    return fsdp


def make_accelerator(precision: str, log_with: str | None = None, out: str = ""):
    """Accelerate, for the processes, devices and trackers; precision itself is up to
    `distribute`."""
    from datetime import timedelta

    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import LoggerType

    if precision not in ("bf16", "fp32"):
        raise InputError(f"unknown --precision {precision!r}: bf16 or fp32")
    trackers = [t.value for t in LoggerType if t.value != "all"]
    if log_with and log_with not in trackers:
        raise InputError(f"unknown --log_with {log_with!r}: one of {', '.join(trackers)}")
    try:
        return Accelerator(mixed_precision="bf16" if precision == "bf16" and own_accelerate_config() else "no",
                           cpu=torch.backends.mps.is_available(),  # FSDP2 does not run on Apple's GPUs
                           kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],  # one process writes the model
                           log_with=log_with, project_dir=f"{Path(out)}.logs" if log_with else None)
    except (ImportError, ValueError) as e:
        raise InputError(f"--log_with {log_with}: {e}") from None


def distribute(wrapped, accelerator, a):
    """(wrapped, optimizer) for `a.precision`: with bf16, weights and optimizer state are float32
    and the computation is bf16.

    Every process holds its share of the float32 weights, gradients and AdamW's two averages (FSDP2,
    by decoder layer), and gathers bf16 copies of a layer while that layer runs; a process alone is
    the same with a share of all. Gradients are summed in float32. A user's own Accelerate
    configuration for FSDP or DeepSpeed wins."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if a.flex and accelerator.device.type != "cuda":
        raise InputError("--flex needs a GPU: flex attention has no training on other devices")
    model = wrapped.model
    if a.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # checkpointing is skipped in eval mode
    layers = model.get_decoder().layers
    if a.compile:
        for layer in layers:  # not with dynamic=True: a head's size would be open as well, which makes slow code
            layer.compile()
        wrapped.log_probs = torch.compile(wrapped.log_probs)
    optimizer = functools.partial(torch.optim.AdamW, lr=a.lr, weight_decay=a.weight_decay, fused=True)
    own = own_accelerate_config()
    if not own and not dist.is_initialized():
        dist.init_process_group("nccl" if accelerator.device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = None if own else dist.init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if a.precision == "bf16" else None, reduce_dtype=torch.float32)
    for module in [*layers, wrapped]:
        for p in module.parameters():
            if (p.requires_grad or a.precision == "fp32") and p.dtype != torch.float32:
                p.data = p.data.float()
        if not own:
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=None if accelerator.num_processes > 1 else False)
    if own:
        prepared, optimizer = accelerator.prepare(wrapped, optimizer([p for p in wrapped.parameters() if p.requires_grad]))
        prepared.packed = wrapped.packed
        return prepared, optimizer
    wrapped.to(accelerator.device)
    return wrapped, optimizer([p for p in wrapped.parameters() if p.requires_grad])


def micro_batches(wrapped, micros: list, accelerator):
    """The micro-batches of an optimizer step. A process alone keeps its bf16 weights from one to
    the next; where weights are shared out, that would take the memory of a whole model."""
    for i, micro in enumerate(micros, 1):
        if accelerator.num_processes == 1 and hasattr(wrapped, "set_reshard_after_backward"):
            wrapped.set_reshard_after_backward(i == len(micros))
        yield micro


def prepare_model(model, a):
    """The model with what `a.lora_rank` (Hu et al. 2021: adapters at all linear layers, the rest
    frozen) and `a.liger` ask for."""
    if a.lora_rank:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise InputError("--lora_rank needs peft: pip install peft") from None
        config = LoraConfig(r=a.lora_rank, lora_alpha=2 * a.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    if a.liger:
        try:
            from transformers.integrations.liger import apply_liger_kernel

            apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
        except ImportError:
            raise InputError("--liger needs a GPU and liger-kernel: pip install liger-kernel") from None
    used = {id(p) for module in (model.get_decoder(), model.get_output_embeddings()) for p in module.parameters()}
    for p in model.parameters():  # a vision tower has no part in this
        p.requires_grad_(p.requires_grad and id(p) in used)
    return model


def clip_gradients(wrapped, accelerator, limit: float) -> float:
    """Scale all gradients together to at most this norm (0: leave them); returns the norm
    before."""
    norm = accelerator.clip_grad_norm_(wrapped.parameters(), limit or math.inf)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


class Training:
    """Checkpoints, metrics and the final model of one training run, in `out`.partial/ until it is
    done.

    A run that was killed goes on at its last checkpoint if it has the same settings, but for the
    `FREE` ones, and data; else it starts over. The finished model replaces `out` in one rename."""

    # these change rounding at most
    FREE = ("out", "log_with", "micro_tokens", "share_prefix", "gradient_checkpointing", "compile", "flex", "liger", "save_steps")

    def __init__(self, out: str, accelerator, wrapped, optimizer, settings: dict, total: int, save_steps: int):
        from accelerate.utils import broadcast_object_list

        self.out = Path(out)
        self.partial = self.out.with_name(f"{self.out.name}.partial")
        self.accelerator, self.wrapped, self.optimizer, self.total, self.save_steps = accelerator, wrapped, optimizer, total, save_steps
        self.key, self.start, self.log = digest({k: v for k, v in settings.items() if k not in self.FREE}), 0, []
        if self.out.exists() and not (self.out.is_dir() and (list(self.out.glob("*config.json")) or not any(self.out.iterdir()))):
            raise InputError(f"--out {out} is there and is not a model, which the new one would take the place of: choose another")
        state, metrics = self.partial / "state.json", self.partial / "metrics.jsonl"
        if accelerator.is_main_process:
            self.append = Appender(metrics)  # from here on a second run on the same folder is refused
        [saved] = broadcast_object_list([json.loads(state.read_text()) if state.exists() else {}])
        if saved.get("settings") == self.key:
            self._load(self.partial / saved["checkpoint"])
            self.start = saved["step"]
            self.log = read_rows(metrics)[: self.start]
            accelerator.print(f"going on from step {self.start} of {total} ({self.partial})")
        elif saved:
            accelerator.print(f"starting over: {self.partial} is of other settings or data")
        accelerator.wait_for_everyone()  # all have read what the main process cuts off
        if accelerator.is_main_process:
            for path in self.partial.iterdir() if not self.start else []:
                if path != metrics:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.append.keep(self.start)
        if accelerator.log_with:
            accelerator.init_trackers(self.out.name, {k: v for k, v in settings.items() if isinstance(v, int | float | str)})
        accelerator.wait_for_everyone()

    def check(self, done: int, loss: float, norm: float, rows: list) -> None:
        """Raise `InputError` before the weights take a step that they would not come back from: a
        loss or gradient that is not finite, or a loss 10 times the highest of the first ten
        steps."""
        early = [row["loss"] for row in self.log[:10]]
        if not math.isfinite(loss + norm) or (len(early) == 10 and loss > 10 * max(early)):
            raise InputError(f"the loss is {loss:.4g} and the gradient's norm {norm:.4g} at step {done}: lower --lr, or look at "
                             f"rows {', '.join(map(str, sorted(rows)))} of the data, from 1; the last checkpoint is in {self.partial}")

    def step(self, done: int, metrics: dict) -> str:
        """Log optimizer step `done` (1-based), checkpoint every `save_steps`; returns a line for
        the bar."""
        import resource

        import torch

        gpu = self.accelerator.device.type == "cuda"
        metrics["memory_gb"] = (torch.cuda.max_memory_allocated() / 1e9 if gpu else
                                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
        row = {"step": done, **{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in metrics.items()}}
        self.log.append(row)
        if self.accelerator.is_main_process:
            self.append(row)
        if self.accelerator.log_with:
            self.accelerator.log(metrics, step=done)
        if self.save_steps and done % self.save_steps == 0 and done < self.total:
            folder = self.partial / f"step-{done}"
            temporary = folder.with_name(folder.name + ".tmp")
            self._save(temporary)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
                write_text(self.partial / "state.json", json.dumps({"settings": self.key, "step": done, "checkpoint": folder.name}))
                for old in self.partial.glob("step-*"):  # keep the last two
                    if not old.name.endswith(".tmp") and int(old.name.split("-")[1]) <= done - 2 * self.save_steps:
                        shutil.rmtree(old)
            self.accelerator.wait_for_everyone()
        return (f"loss {metrics['loss']:.3f}, lr {metrics['lr']:.1e}, {metrics['tokens_per_second']:.0f} tok/s, "
                f"{metrics['memory_gb']:.1f} GB")

    def _save(self, folder: Path) -> None:
        if own_accelerate_config():
            self.accelerator.save_state(str(folder))
            return
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.wrapped, self.optimizer)
        try:
            dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        except dcp.api.CheckpointException as e:  # a full disk, for one
            raise next((error for error, _ in e.failures.values() if isinstance(error, OSError)), RuntimeError(str(e))) from None

    def _load(self, folder: Path) -> None:
        if own_accelerate_config():
            self.accelerator.load_state(str(folder))
            return
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

        model, optimizer = get_state_dict(self.wrapped, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        set_state_dict(self.wrapped, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)

    def finish(self, base: str, tokenizer, merge: bool, card: str) -> None:
        """Write the model in Hugging Face format, in the dtype of `base`, with tokenizer, chat
        template, metrics.jsonl, curves.png and a model card, then put it in place of `out`.
        Adapters are merged into `base` with `merge`, else written alone."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
        from transformers import AutoModelForCausalLM

        if own_accelerate_config():
            weights = self.accelerator.get_state_dict(self.wrapped)
        else:
            weights = get_model_state_dict(self.wrapped, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if self.accelerator.is_main_process:
            final, model = self.partial / "final", self.accelerator.unwrap_model(self.wrapped).model
            shutil.rmtree(final, ignore_errors=True)
            weights = {k.removeprefix("model.").replace("_orig_mod.", ""): v for k, v in weights.items()}
            plain = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
            if hasattr(model, "peft_config"):
                from peft import PeftModel

                model.save_pretrained(final, state_dict=weights)
                if merge:
                    plain = PeftModel.from_pretrained(plain, final).merge_and_unload()
                    shutil.rmtree(final)
                    plain.save_pretrained(final)
            else:
                missing, unknown = plain.load_state_dict(weights, strict=False)
                plain.tie_weights()
                assert not unknown and set(missing) <= set(getattr(plain, "all_tied_weights_keys", None) or {}), (missing, unknown)
                plain.save_pretrained(final)
            tokenizer.save_pretrained(final)
            write_rows(final / "metrics.jsonl", self.log)
            plot_curves(self.log, final / "curves.png")
            write_text(final / "README.md", card)
            del plain, weights
            if self.out.is_symlink():
                self.out.unlink()
            elif self.out.exists():
                shutil.rmtree(self.out)
            final.rename(self.out)
            for file in self.out.glob("*config.json"):
                os.utime(file)  # the file Make looks at
            self.append.__exit__()
            shutil.rmtree(self.partial)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def plot_curves(log: list[dict], path) -> None:
    """A picture of the metrics over the steps: loss and, of DPO, accuracy and margin; the held-out
    rows' beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [k for k in ("loss", "reward_accuracy", "reward_margin", "lr", "grad_norm") if log and k in log[0]]
    figure, axes = pyplot.subplots(1, max(1, len(names)), figsize=(4 * max(1, len(names)), 3), squeeze=False)
    for ax, name in zip(axes[0], names, strict=False):
        ax.plot([r["step"] for r in log], [r[name] for r in log], label="training")
        if held := [(r["step"], r[f"eval_{name}"]) for r in log if f"eval_{name}" in r]:
            ax.plot(*zip(*held, strict=True), "o-", label="held out")
            ax.legend()
        ax.set(title=name.replace("_", " "), xlabel="optimizer step")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
