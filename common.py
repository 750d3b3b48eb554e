"""What the five stage scripts share, in the order data meets it.

    1. rows          JSONL in and out; which keys are already finished
    2. prompts       the planner's and the agent's messages; parse a plan, parse an action
    3. environments  one small protocol, and the pool of worker processes that runs it
    4. models        serve a local model, ask any model through the OpenAI chat protocol
    5. rollouts      one episode; many episodes at once
    6. training      what the two training loops share

Symbols follow the paper: u a task instruction, p a meta plan, e a trajectory, r its reward in
[0, 1], Q(p) the mean reward of N rollouts with plan p, M plans per task.

Heavy packages (torch, transformers, openai) are imported where they are used, so `--help` and the
environment workers start at once.
"""

from __future__ import annotations

import asyncio
import bisect
import collections
import contextlib
import copy
import dataclasses
import errno
import fcntl
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data"


class InputError(Exception):
    """Something the user can mend: bad input, a missing server, a full disk. One line, exit status 2."""


def arg(default, text: str):
    """A setting of a stage's `Args` dataclass: its default value and its `--help` line."""
    text = text.replace("%", "%%")
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


def run_stage(main, args_class, words: str | None = None, training: bool = False):
    """Parse the command line into `args_class`, call `main(args)`, and turn what the user can mend
    (`InputError`, a full or read-only disk, Ctrl-C) into one line and an exit status. `words`: the setting
    that takes what is said without a flag. `training`: leave without the interpreter's own end, where a
    thread of gloo that still lets go of a finished collective's tensors aborts the process (pytorch#179291)."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(args_class, description=sys.modules[args_class.__module__].__doc__, allow_abbrev=False)
    args, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if words and unknown and not unknown[0].startswith("-"):
        setattr(args, words, " ".join(unknown))
    elif unknown:
        parser.error(f"unknown argument {unknown[0]}; see --help")
    try:
        main(args)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.ENOTDIR):
            raise
        print(f"error: cannot write {e.filename or 'the run folder'}: {e.strerror}. "
              "Make room or choose another --out; finished rows are kept.", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted: finished rows are kept, run the same command to go on", file=sys.stderr)
        raise SystemExit(130) from None
    if training:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


# ------------------------------------------------------------------------------------------------
# 1. rows: every file between stages is JSONL, one whole row a line
# ------------------------------------------------------------------------------------------------


def read_rows(path, required: tuple = (), missing_ok: bool = False) -> list[dict]:
    """All rows of a JSONL file. A last line without a newline that is not JSON is what a kill left
    behind and is dropped; any other line that is not a JSON object with the `required` fields raises
    `InputError` naming file and line."""
    path = Path(path)
    if not path.exists():
        if missing_ok:
            return []
        raise InputError(f"{path} does not exist: run the stage that writes it first (see `make help`)")
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
                raise InputError(f"{path}:{number}: not valid JSON ({e}); mend or delete that line") from None
            missing = [k for k in required if not isinstance(row, dict) or k not in row]
            if missing or not isinstance(row, dict):
                raise InputError(f"{path}:{number}: each line must be a JSON object with {', '.join(required)}")
            rows.append(row)
    return rows


def write_rows(path, rows) -> None:
    """Write a whole JSONL file: a reader sees the old file or the new one, never a half."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path, text: str) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text, encoding="utf-8")
    tmp.replace(path)


class Appender:
    """Append rows to a JSONL file, each one whole and flushed. What a kill left of a last line is cut
    off first. The file is locked: a second run on the same file raises `InputError`."""

    def __init__(self, path):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{path} is being written by another run; wait for it or choose another --out") from None
        self.file.seek(0)
        content = self.file.read()
        tail = content[content.rfind(b"\n") + 1 :]
        if tail:
            try:
                json.loads(tail)
                self.file.write(b"\n")  # a whole row that only lacks its newline
            except ValueError:
                self.file.truncate(len(content) - len(tail))
        self.file.flush()

    def keep(self, rows: int) -> None:
        """Cut the file off after its first `rows` rows."""
        self.file.seek(0)
        self.file.truncate(sum(len(self.file.readline()) for _ in range(rows)))

    def __call__(self, row: dict) -> None:
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def shard_of(shard: str | None) -> tuple[int, int]:
    """'1/4' -> (1, 4): the second of four parts of a run."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard or "0/1")
    if not match or int(match[1]) >= int(match[2]):
        raise InputError(f"--shard {shard}: must be i/n with i from 0 to n - 1, for example 0/4")
    return int(match[1]), int(match[2])


def shard_path(path, shard: str | None) -> Path:
    """The file that one shard of a run writes instead of `path`: rollouts.jsonl -> rollouts.1of4.jsonl."""
    path, (i, n) = Path(path), shard_of(shard)
    return path.with_name(f"{path.stem}.{i}of{n}{path.suffix}") if shard else path


def read_shards(path, required: tuple = (), missing_ok: bool = False) -> list[dict]:
    """Rows of `path` and of all shards of it that are there, whatever their number."""
    shards = [p for ps in shards_of(path).values() for p in ps.values()]
    rows = read_rows(path, required, missing_ok or bool(shards))
    for shard in shards:
        rows += read_rows(shard, required)
    return rows


def read_merged(path, required: tuple = ()) -> list[dict]:
    """Rows of `path` or, where only shards of it are there, of all of them; one must not be missing."""
    path, shards = Path(path), shards_of(path)
    if path.exists() or not shards:
        if newer := [p for ps in shards.values() for p in ps.values() if p.stat().st_mtime > path.stat().st_mtime]:
            raise InputError(f"{newer[0]} is newer than {path}: delete what is out of date")
        return read_rows(path, required)
    n, found = max(shards.items())
    if missing := [i for i in range(n) if i not in found]:
        raise InputError(f"{shard_path(path, f'{missing[0]}/{n}')} is missing: run that shard ({len(found)} of {n} are there)")
    return [row for i in range(n) for row in read_rows(found[i], required)]


def shards_of(path) -> dict[int, dict[int, Path]]:
    """{n: {i: the file of shard i/n}} of the shards of `path` that are there."""
    path, out = Path(path), {}
    for p in sorted(path.parent.glob(f"{path.stem}.*of*{path.suffix}")):
        if match := re.fullmatch(r"(\d+)of(\d+)", p.name.removeprefix(path.stem + ".").removesuffix(path.suffix)):
            out.setdefault(int(match[2]), {})[int(match[1])] = p
    return out


def finished(rows, *fields) -> dict[tuple, dict]:
    """{(row[field], ...): row}: what a resumed stage need not do again."""
    return {tuple(row[f] for f in fields): row for row in rows}


def digest(*parts) -> str:
    """A short stable name for any JSON-able content."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:12]


def seed_of(*parts) -> int:
    """A 31-bit random seed that depends on `parts` alone, never on the order of work."""
    return int(digest(*parts), 16) & 0x7FFFFFFF


def model_id(model: str, url: str | None = None) -> str:
    """Names a model in result rows, so that rows of a retrained checkpoint are not taken for the old
    one's: a local directory by name and by a digest of samples of its weights, what a server at `url`
    serves by the name it gives (that of `model` where it has it, else of its first), else the name itself."""
    if url:
        import urllib.request

        try:
            with urllib.request.urlopen(f"{url.split(',')[0].rstrip('/')}/models", timeout=30) as answer:
                names = [m["id"] for m in json.loads(answer.read())["data"]]
                return model if model in names else names[0]
        except (KeyError, IndexError, TypeError):
            return model  # a server that does not say
        except (OSError, ValueError) as e:
            raise InputError(f"the model server {url.split(',')[0]} cannot be reached ({e}): start it, or mend the URL") from None
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


# ------------------------------------------------------------------------------------------------
# 2. prompts: messages for the planner and the agent, and what their replies mean
# ------------------------------------------------------------------------------------------------

PLAN_FORMAT = "<meta_plan>\n{plan}\n</meta_plan>"
PLAN_LINE = "\n\nThis meta plan may help you with the task:\n{plan}"
INSERTS = ("instruction", "thought", "observation")  # where the agent reads the plan (paper 5.2)
NO_ACTION = 'Your reply holds no action. Write a line that starts with "Action:".'


def fill(text: str, **values: str) -> str:
    """Put values in place of {names}, all at once: braces inside a value stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), text)


class Prompts:
    """The prompt texts of one environment: the files of `data/NAME/`, or of any folder of that shape.

    planner.txt   zero-shot: {task} -> plan (paper 4.1 Evaluation; figures 7-9 without the trajectory)
    teacher.txt   {task} and {conversation} -> plan (figures 7-9)
    agent.txt     {example}, {task}, {plan_line} (figures 10-12)
    examples.json {task type: one-shot example text}; without it {example} is empty

    What a folder lacks is taken from that of its name's first part: sciworld for sciworld-brief.
    """

    def __init__(self, env: str, name: str | None = None):
        base = environment_folder(env)
        folder = base if not name else Path(name) if os.sep in name else base / name

        def text(file: str) -> str:
            return next(((f / file).read_text().strip() for f in (folder, base) if (f / file).exists()), "")

        if not folder.is_dir() or not text("agent.txt"):
            known = sorted({p.parent.name for p in base.glob("*/*.txt")})
            raise InputError(f"no prompts in {folder}: --prompts names a folder with planner.txt and agent.txt "
                             f"({env} has {', '.join(known)})")
        self.planner_text, self.agent_text, self.teacher_text = map(text, ("planner.txt", "agent.txt", "teacher.txt"))
        self.examples = json.loads(text("examples.json") or "{}")

    def planner(self, u: str) -> list[dict]:
        """Messages that ask the meta planner for p ~ pi_g(.|u)."""
        return [{"role": "user", "content": fill(self.planner_text, task=u)}]

    def teacher(self, u: str, conversation: str, explored: str = "") -> list[dict]:
        """Messages that ask the teacher to abstract the trajectory e of task u into a meta plan, or to say what
        tells it from what an agent `explored`."""
        return [{"role": "user", "content": fill(self.teacher_text, task=u, conversation=conversation, explored=explored)}]

    def agent(self, u: str, plan: str | None, task: str, insert: str = "instruction") -> list[dict]:
        """How an episode begins, a ~ pi_theta(.|u, p): the plan goes into the task instruction, or becomes the
        agent's first thought, or (`insert` "observation") comes later, with every observation (paper 5.2)."""
        plan_line = PLAN_LINE.format(plan=plan) if plan and insert == "instruction" else ""
        example = self.examples.get(task_type(task), next(iter(self.examples.values()), ""))
        messages = [{"role": "user", "content": fill(self.agent_text, example=example, task=u, plan_line=plan_line)}]
        if plan and insert == "thought":
            messages += [{"role": "assistant", "content": f"Thought: I will go about the task by this meta plan:\n{plan}"},
                         {"role": "user", "content": "Observation: OK."}]
        return messages


def plan_reply(plan: str) -> str:
    """The planner's whole reply for a plan: the target of SFT, the chosen or rejected text of DPO."""
    return PLAN_FORMAT.format(plan=plan)


def parse_plan(reply: str) -> str | None:
    """The plan in a planner's reply, its steps renumbered from 1: text between the <meta_plan> tags
    (a missing closing tag is forgiven when the steps before it are whole) or None where there is none."""
    match = re.search(r"<meta[ _]plan>(.*?)(?:</meta[ _]plan>|\Z)", reply, re.S | re.I)
    if not match:
        return None
    steps = re.findall(r"^\s*(?:step\s*)?\d+\s*[:.)]\s*(\S.*?)\s*$", match.group(1), re.M | re.I)
    return number_steps(steps) if steps else None


def number_steps(steps: list[str]) -> str:
    return "\n".join(f"Step {i}: {s}" for i, s in enumerate(steps, 1))


def plan_steps(plan: str) -> list[str]:
    return [line.split(": ", 1)[-1] for line in plan.splitlines()]


def parse_action(reply: str) -> str | None:
    """What the agent wrote after its first `Action:`, to the end of that line; None if there is none."""
    match = re.search(r"^[ \t*]*action[ \t*]*:[ \t*]*(.+?)[ \t*]*$", reply, re.M | re.I)
    return match.group(1).strip().strip("`\"'").strip() or None if match else None


def task_type(task: str) -> str:
    """'find-plant/12' -> 'find-plant'."""
    return task.rsplit("/", 1)[0]


# a name with an instance number, `cabinet 4`; not a quantity, `wait 10 steps`, `above 50 degrees`
INSTANCE = re.compile(r"\b(?!(?:steps?|for|wait|above|below|least|most|than|about|of|to|at|and|or|the)\b)[a-z]+ \(?\d+\b"
                      r"(?!\.?\d*\s*(?:degrees|steps|times|°))", re.I)


def check_plan(plan: str | None, verbs: set, max_steps: int = 20) -> str | None:
    """Quality control of seed plans (paper appendix C). Returns why the plan is refused, or None.

    The three faults the paper names: too detailed to generalise (instance numbers such as
    `cabinet 4`, too many steps), manipulations the environment does not have, and a wrong format."""
    if not plan:
        return "format: no numbered steps between <meta_plan> and </meta_plan>"
    steps = plan_steps(plan)
    if len(steps) > max_steps:
        return f"too long: {len(steps)} steps, at most {max_steps}"
    for step in steps:
        if len(step.split()) > 40:
            return f"too long: a step of more than 40 words: {step[:80]!r}"
        if found := INSTANCE.search(step):
            return f"instance detail: {found.group(0)!r}"
        verb = re.match(r"[^a-z]*([a-z]+)", step.lower())
        if not verb or verb.group(1) not in verbs:
            return f"verb the environment does not have: {step[:60]!r}"
    return None


# ------------------------------------------------------------------------------------------------
# 3. environments: reset(task) -> instruction, step(action) -> (observation, reward, done, success)
# ------------------------------------------------------------------------------------------------


class Environment:
    """What the pipeline asks of an environment, and what all have in common. One object is a session; a process has any
    number of them. A task is named 'TYPE/VARIATION'.

    reset(task) -> u; step(action) -> (observation, reward so far, done, success)
    columns(split)        the split's tasks, a list for each type
    expert(task)          {"instruction", "steps": [[action, observation], ...], "reward"} or None (paper 3.1)
    check(task)           class method: raises `InputError` where there is no such task
    abstract(u, steps)    static method: expert actions -> plan steps, for `--teacher rules`"""

    SPLITS: dict  # train and the test splits (paper appendix A), with what the environment makes them from
    MAX_STEPS: dict[str, int]  # of an episode, for each task type
    VERBS: set[str]  # that a step of a plan may begin with
    FAILED: tuple[str, ...]  # how an observation begins that says that the action was not understood
    VARIABLES: tuple[str, ...] = ()  # names of environment variables that a worker on another machine needs
    SECONDS: dict[str, float]  # measured time of one core for "expert", "reset" and "step", for `make estimate`
    shares_tasks = False  # whether sessions of one process share what they know of a task

    def __init__(self, sessions: int = 8):
        """A session, in a process that holds at most so many at once."""

    @classmethod
    def prepare(cls) -> None:
        """What is done once on a machine, before workers start."""

    @classmethod
    def version(cls) -> str:
        """Names the data at hand, where the same task may be another with other data."""
        return ""

    def tasks(self, split: str) -> list[str]:
        """The split's tasks in a fixed order, the types interleaved so that the first n are a fair sample at any n."""
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
        """Whether the observation says that the action was not understood (nothing happened)."""
        return observation.startswith(cls.FAILED)


def check_data(env: str, out) -> None:
    """Refuse a run folder whose rows are of other data of the environment."""
    path, version = Path(out) / "data_version.txt", environment(env).version()
    if not version:
        return
    if path.exists() and path.read_text() != version:
        raise InputError(f"{out} has rows of other {env} data ({path}): with other data, take another run folder (make RUN=, --out)")
    write_text(path, version)


def interleaved(columns: list[list]) -> list:
    """The first of each column, the second of each, ..."""
    return [c[i] for i in range(max(map(len, columns), default=0)) for c in columns if i < len(c)]


def environment_folder(name: str) -> Path:
    """`data/NAME`, or a path. Raises `InputError` where there is no env.py."""
    folder = Path(name).resolve() if os.sep in name else DATA / name
    if not (folder / "env.py").exists():
        known = ", ".join(sorted(p.parent.name for p in DATA.glob("*/env.py")))
        raise InputError(f"--env {name}: {folder}/env.py does not exist; --env is a folder of data/ ({known}) or a path")
    return folder


@functools.cache
def environment(name: str) -> type[Environment]:
    """The environment class of the folder `data/NAME`, or of a path: the one subclass of `Environment`
    in its env.py. Raises `InputError` where there is none."""
    folder = environment_folder(name)
    module_name = f"environments.{folder.name}"
    spec = importlib.util.spec_from_file_location(
        module_name, folder / "env.py", submodule_search_locations=[str(folder)])
    sys.modules[module_name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    classes = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Environment)
               and v.__module__ == module_name]
    if len(classes) != 1:
        raise InputError(f"{folder}/env.py must have one subclass of common.Environment, not {len(classes)}")
    return classes[0]


WORKER_ENDED = "an environment worker ended; finished rows are kept, run the same command to go on"


class WorkerDied(InputError):
    """The worker process of a session ended; the episode can be started again on another."""


class Sessions:
    """What a worker holds: an environment and any number of its sessions."""

    def __init__(self, env: str, sessions: int):
        self.env, self.sessions, self.live, self.free = env, sessions, {}, []

    def call(self, session: int, method: str, args: list) -> tuple:
        """(result, None) or (None, [kind, text]). Sessions that end are used again: to start over costs
        nothing. Ends the process when the simulator in it is gone; a new worker takes over."""
        if method == "close":
            self.free += [self.live.pop(session)] if session in self.live else []
            return None, None
        try:
            if session not in self.live:
                self.live[session] = self.free.pop() if self.free else environment(self.env)(self.sessions)
            return getattr(self.live[session], method)(*args), None
        except InputError as e:
            return None, ["InputError", str(e)]
        except Exception as e:
            self.live.pop(session, None)  # in an unknown state: not used again
            text = f"{type(e).__name__}: {e}"[:2000]
            if "OutOfMemory" in text or "Py4JNetwork" in text:
                print(f"environment worker: {text}", file=sys.stderr, flush=True)
                os._exit(1)
            return None, [type(e).__name__, text]


def result_of(result, error):
    if error:
        raise InputError(error[1]) if error[0] == "InputError" else RuntimeError(error[1])
    return result


class Worker:
    """One child process with `Sessions`. Requests and answers are JSON lines."""

    def __init__(self, env: str, sessions: int):
        self.env, self.sessions = env, sessions
        self.live, self.number, self.waiting, self.process = 0, 0, {}, None
        self.starting = asyncio.Lock()

    async def start(self):
        """The worker's process, started if there is none alive."""
        async with self.starting:
            if self.process is None or self.process.returncode is not None:
                self.process = await asyncio.create_subprocess_exec(
                    sys.executable, str(ROOT / "common.py"), self.env, str(self.sessions), limit=2**26,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, env={**os.environ, "PYTHONHASHSEED": "0"})
                self.reader = asyncio.create_task(self._read(self.process))
            return self.process

    async def call(self, process, session: int, method: str, *args, deadline: float = 120.0):
        """Call a method of the session's environment. Raises `WorkerDied` when `process`, where the
        session lives, has ended or does not answer within `deadline` seconds (it is then killed)."""
        if process is not self.process or process.returncode is not None:
            raise WorkerDied(WORKER_ENDED)
        self.number += 1
        number, future = self.number, asyncio.get_running_loop().create_future()
        self.waiting[number] = future
        try:
            self.process.stdin.write(json.dumps([number, session, method, args]).encode() + b"\n")
            return await asyncio.wait_for(future, deadline)
        except (TimeoutError, ConnectionError):
            self.kill()
            raise WorkerDied(f"an environment worker did not answer {method} within {deadline:.0f} s") from None
        finally:
            self.waiting.pop(number, None)

    async def _read(self, process):
        while (line := await process.stdout.readline()).endswith(b"\n"):  # half a line: it was killed while it wrote
            number, result, error = json.loads(line)
            future = self.waiting.get(number)
            if future and not future.done():
                try:
                    future.set_result(result_of(result, error))
                except Exception as e:
                    future.set_exception(e)
        await process.wait()
        for future in self.waiting.values():
            if not future.done():
                future.set_exception(WorkerDied(WORKER_ENDED))

    def close(self, process, session: int) -> None:
        """The session's environment may be used for another."""
        if process is self.process and process.returncode is None:
            process.stdin.write(json.dumps([0, session, "close", []]).encode() + b"\n")

    def kill(self) -> None:
        if self.process and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # the worker and its JVM

    async def end(self) -> None:
        self.kill()
        if self.process:
            await asyncio.gather(self.reader, return_exceptions=True)


class RayWorker:
    """The same as an actor on a Ray cluster, that of RAY_ADDRESS or one started on this machine. The
    repository and its packages must be at the same path on every machine."""

    def __init__(self, env: str, sessions: int):
        self.env, self.sessions, self.live, self.actor = env, sessions, 0, None

    @staticmethod
    def connect(workers: int) -> None:
        """Join the cluster, or start one; a CPU a worker."""
        try:
            import aiohttp_cors  # noqa: F401  without it a cluster that starts here does not come up
            import ray
        except ImportError:
            raise InputError("--ray needs the package ray: pip install 'ray[default]'") from None
        if not ray.is_initialized():
            env = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"} | {
                k: os.environ[k] for k in ("ALFWORLD_DATA", "WEBSHOP_DATA", "WEBSHOP_GOALS", "XDG_CACHE_HOME") if k in os.environ}
            ray.init(os.environ.get("RAY_ADDRESS") or "local", log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": env})
        if workers > (cpus := int(ray.cluster_resources().get("CPU", 0))):
            raise InputError(f"--workers {workers}: the Ray cluster has {cpus} CPUs, and a worker takes one")

    async def start(self):
        if self.actor is None:
            import ray

            from common import Sessions  # by its module's name, for the actors to import

            self.actor = ray.remote(num_cpus=1)(Sessions).remote(self.env, self.sessions)
        return self.actor

    async def call(self, actor, session: int, method: str, *args, deadline: float = 120.0):
        import ray

        if actor is not self.actor:
            raise WorkerDied(WORKER_ENDED)
        try:
            return result_of(*await asyncio.wait_for(asyncio.wrap_future(actor.call.remote(session, method, args).future()), deadline))
        except (TimeoutError, ray.exceptions.RayActorError) as e:
            if actor is self.actor:
                self.kill()
            raise WorkerDied(f"an environment worker ended, or did not answer {method} within {deadline:.0f} s "
                             f"({type(e).__name__})") from None

    def close(self, actor, session: int) -> None:
        if actor is self.actor:
            actor.call.remote(session, "close", [])

    def kill(self) -> None:
        import ray

        if self.actor is not None:
            ray.kill(self.actor)
            self.actor = None

    async def end(self) -> None:
        self.kill()


class EnvPool:
    """Environment workers, processes of this machine or (`ray`) of a cluster; a session lives on one of them.

    async with EnvPool("sciworld", workers=2) as pool:
        async with pool.session() as env:
            u = await env("reset", task)
            observation, reward, done, success = await env("step", action)
    """

    def __init__(self, env: str, workers: int, sessions: int = 64, ray: bool = False):
        self.shares_tasks, self.homes = environment(env).shares_tasks, {}
        if min(workers, sessions) < 1:
            raise InputError("--workers and --concurrency must be at least 1")
        environment(env).prepare()
        self.workers = [(RayWorker if ray else Worker)(env, max(1, sessions // workers)) for _ in range(workers)]
        self.count = 0
        if ray:
            RayWorker.connect(workers)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await asyncio.gather(*[w.end() for w in self.workers])

    @contextlib.asynccontextmanager
    async def session(self, task: str | None = None):
        """A session to play `task` in, on the least busy worker. Where sessions of a process share what they
        know of a task, those of one task go to one worker, unless it is much busier than another."""
        worker = min(self.workers, key=lambda w: w.live)
        if task and self.shares_tasks:
            home = self.homes.get(task, worker)
            worker = home if home.live <= 2 * worker.live + 8 else worker
            self.homes[task] = worker
        worker.live += 1
        self.count += 1
        number, process = self.count, None
        try:
            process = await worker.start()

            async def call(method, *args, deadline=120.0):
                return await worker.call(process, number, method, *args, deadline=deadline)

            yield call
        finally:
            worker.live -= 1
            if process:
                worker.close(process, number)

    async def use(self, task: str, play, attempts: int = 3, again=lambda: None):
        """What `play(session)` returns, a session for the task given; where its worker ends, `again()` and on another one.
        Raises what ended the last of the attempts."""
        for left in reversed(range(attempts)):
            try:
                async with self.session(task) as env:
                    return await play(env)
            except (WorkerDied, RuntimeError):
                if not left:
                    raise
                again()

    async def each(self, tasks: list[str], method: str, keep, deadline: float = 600.0) -> None:
        """`keep(task, result)` of a method of the environment for every task, as many at a time as there are workers."""
        async def work(task):
            try:
                keep(task, await self.use(task, lambda env: env(method, task, deadline=deadline)))
            except (WorkerDied, RuntimeError) as e:
                raise InputError(f"{method} of {task} failed three times: {e}") from None

        await side_by_side(work, tasks, len(self.workers))


async def side_by_side(work, items, most: int) -> None:
    """`work(item)` for all items in order, `most` at a time; when one fails the others end."""
    queue = iter(items)

    async def lane():
        for item in queue:
            await work(item)

    lanes = [asyncio.create_task(lane()) for _ in range(most)]
    try:
        await asyncio.gather(*lanes)
    finally:
        for task in lanes:
            task.cancel()


def worker_main(env: str, sessions: str) -> None:
    """A worker's whole life: read a request, call the session's environment, write the answer. Ends
    when its input ends, that is when the parent does."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a simulator prints must not mix with the answers
    held = Sessions(env, int(sessions))
    for line in sys.stdin:
        number, session, method, args = json.loads(line)
        answer = held.call(session, method, args)
        if method == "close":
            continue
        try:
            out.write(json.dumps([number, *answer]) + "\n")
            out.flush()
        except BrokenPipeError:
            os._exit(0)  # the parent was killed


async def list_tasks(pool: EnvPool, env: str, split: str, tasks_file: str | None, types: list[str] | None,
                     limit: int | None) -> list[str]:
    """The tasks a stage works on: a split by rule, or those of `tasks_file` (JSON: [[type, variation],
    ...]); of the given types only; the first `limit` of them."""
    cls = environment(env)
    if unknown := sorted(set(types or []) - set(cls.MAX_STEPS)):
        raise InputError(f"unknown task type {unknown[0]!r}: --types takes {', '.join(sorted(cls.MAX_STEPS))}")
    if tasks_file:
        try:
            listed = json.loads(Path(tasks_file).read_text())
            tasks = [f"{kind}/{variation}" for kind, variation in listed]
        except FileNotFoundError:
            raise InputError(f"--tasks {tasks_file} does not exist") from None
        except (ValueError, TypeError) as e:
            raise InputError(f"--tasks {tasks_file}: must be JSON of the form [[\"find-plant\", 3], ...] ({e})") from None
        for task in tasks:
            cls.check(task)
    else:
        async with pool.session() as session:
            tasks = await session("tasks", split, deadline=600)
    if types:
        tasks = [t for t in tasks if task_type(t) in types]
    if limit is not None and limit < 1:
        raise InputError("--limit must be at least 1")
    if not tasks:
        raise InputError(f"no tasks left of the {split} split with these --tasks / --types")
    return list(dict.fromkeys(tasks))[:limit]


async def instructions(pool: EnvPool, tasks: list[str]) -> dict[str, str]:
    """{task: u}, what the planner is asked with."""
    out = {}
    await pool.each(tasks, "reset", out.__setitem__)
    return out


# ------------------------------------------------------------------------------------------------
# 4. models: every model, local or not, is asked through the OpenAI chat protocol
# ------------------------------------------------------------------------------------------------


class ContextOverflow(InputError):
    """The prompt is longer than the model's context."""


@dataclasses.dataclass
class Reply:
    text: str
    prompt_tokens: int
    completion_tokens: int


class Model:
    """One chat model behind one or more OpenAI-compatible servers (`url`: addresses with commas between; `name` None: the
    first that they have).

    `url` None is OpenAI itself, or `OPENAI_BASE_URL`; the key comes from `OPENAI_API_KEY`. A server
    of ours on loopback needs none. Retries (429, 5xx, lost connections, silence) with growing pauses
    are the client's own: a server may be gone for a minute; one that stays away raises `InputError`."""

    def __init__(self, name: str | None, url: str | None = None, concurrency: int = 64, timeout: float = 300.0):
        import httpx
        import openai

        key = os.environ.get("OPENAI_API_KEY")
        if url is None and not key:
            raise InputError(f"asking {name} needs an API key: set OPENAI_API_KEY (and OPENAI_BASE_URL for a server "
                             "other than OpenAI's)")
        self.name, self.url, self.slots = name, url, asyncio.Semaphore(max(1, concurrency))
        self.retries = int(os.environ.get("MPO_MAX_RETRIES", 16))  # 16: pauses of 80 to 100 s in all
        self.deadline = 3 * timeout  # seconds for one completion, retries and all
        self.clients = [openai.AsyncOpenAI(
            base_url=u, api_key=key if url is None else "none", timeout=openai.Timeout(timeout, connect=10.0), max_retries=self.retries,
            http_client=openai.DefaultAsyncHttpxClient(limits=httpx.Limits(max_connections=None, max_keepalive_connections=concurrency)))
            for u in (url.split(",") if url else [None])]
        self.in_flight, self.assigned = [0] * len(self.clients), [0] * len(self.clients)
        self.completion_tokens = 0  # generated so far

    def _client(self, home: dict | None) -> int:
        """The server with the fewest requests in flight, or of those the fewest conversations so far. A
        conversation (`home` is its memory) stays with the server that has its prefix in the cache, unless
        that one is much busier."""
        home = {} if home is None else home
        least = min(range(len(self.clients)), key=lambda i: (self.in_flight[i], self.assigned[i]))
        if "server" not in home or self.in_flight[home["server"]] > 2 * self.in_flight[least] + 4:
            home["server"] = least
            self.assigned[least] += 1
        return home["server"]

    async def ask(self, messages: list[dict], temperature: float = 0.0, max_tokens: int = 256,
                  seed: int | None = None, home: dict | None = None) -> Reply:
        """One completion. Raises `ContextOverflow` when the prompt does not fit, `InputError` when the
        server refuses the key or the model, cannot be reached, or keeps sending what is no completion."""
        import openai

        async with self.slots:
            server = self._client(home)
            self.in_flight[server] += 1
            try:
                async with asyncio.timeout(self.deadline):
                    text, usage = await self._complete(self.clients[server], messages, temperature, max_tokens, seed)
            except TimeoutError:
                raise InputError(f"{self.where()} did not answer within {self.deadline:.0f} s; finished rows are kept, run the same "
                                 "command when it works again") from None
            except (openai.AuthenticationError, openai.PermissionDeniedError) as e:
                raise InputError(f"{self.where()} refused the API key ({e.status_code}): check OPENAI_API_KEY") from None
            except openai.NotFoundError:
                raise InputError(f"{self.where()} has no model {self.name!r}") from None
            except openai.BadRequestError as e:
                if re.search(r"context.{0,20}length|maximum.{0,40}tokens|too long|too many tokens", str(e), re.I):
                    raise ContextOverflow(f"a prompt does not fit into the context of {self.where()} (--max_model_len): "
                                          f"{str(e)[:300]}") from None
                raise InputError(f"{self.where()} refused a request: {str(e)[:300]}") from None
            except openai.APIConnectionError:
                raise InputError(f"{self.where()} cannot be reached (gave up after {self.retries + 1} tries); finished rows are kept, "
                                 "run the same command when it is back") from None
            except openai.APIStatusError as e:
                raise InputError(f"{self.where()} answers {e.status_code} (gave up after {self.retries + 1} tries): "
                                 f"{str(e)[:200]}") from None
            finally:
                self.in_flight[server] -= 1
        self.completion_tokens += usage.completion_tokens if usage else 0
        return Reply(text, usage.prompt_tokens if usage else 0, usage.completion_tokens if usage else 0)

    async def _complete(self, client, messages, temperature, max_tokens, seed):
        import openai

        if self.name is None:
            self.name = (await client.models.list()).data[0].id
        for left in reversed(range(self.retries + 1)):
            try:
                answer = await client.chat.completions.create(
                    model=self.name, messages=messages, temperature=temperature, max_tokens=max_tokens, seed=seed)
                return answer.choices[0].message.content or "", answer.usage
            except (IndexError, TypeError, ValueError, AttributeError, openai.APIResponseValidationError) as e:
                if not left:  # half an answer, or one without choices, which the client does not retry
                    raise InputError(f"{self.where()} sent an answer without a completion {self.retries + 1} times "
                                     f"({type(e).__name__}: {str(e)[:100]})") from None

    def where(self) -> str:
        return f"the model server {self.url or os.environ.get('OPENAI_BASE_URL', 'OpenAI')}"


def check_model_dir(model: str) -> None:
    """A local model directory must be complete before minutes are spent on it."""
    path = Path(model)
    if path.is_dir():
        for file, what in (("config.json", "a config"), ("tokenizer_config.json", "a tokenizer")):
            if not (path / file).exists():
                raise InputError(f"{model} has no {file}: it must be a Hugging Face model directory with {what}")
        if '"chat_template"' not in (path / "tokenizer_config.json").read_text() and not list(path.glob("*chat_template*")):
            raise InputError(f"{model} has no chat template: take an instruction-tuned model, whose tokenizer has one")
    elif os.sep in model and (model.startswith((".", os.sep, "~")) or model.split(os.sep)[0] in ("runs", "models")):
        raise InputError(f"model directory {model} does not exist: run the stage that makes it first")


@contextlib.contextmanager
def serve(model: str, log_dir="logs", tensor_parallel: int = 1, max_model_len: int = 8192, wait: float = 900.0):
    """Serve a local model on loopback with OpenAI's protocol; yields its address, for `Model`.

    vLLM where it is installed (prefix caching on; on GPUs as many replicas of `tensor_parallel` GPUs each as there is
    room for, each with an address, so that a conversation can stay where its prefix is cached), else `transformers
    serve`. Their process groups are ended in any case: at exit, on an error, on Ctrl-C, and by a watchdog when this
    process is killed. Raises `InputError` with the end of the server's log when one ends early or is not healthy within
    `wait` seconds."""
    from importlib.util import find_spec

    check_model_dir(model)
    vllm = bool(find_spec("vllm")) and os.environ.get("MPO_SERVER", "vllm") == "vllm"  # MPO_SERVER=transformers: the other one
    gpus = visible_gpus() if vllm else []
    if tensor_parallel < 1 or (gpus and tensor_parallel > len(gpus)):
        raise InputError(f"--tensor_parallel {tensor_parallel}: must be from 1 to the number of GPUs, which is {len(gpus)}")
    servers = []
    try:
        for i in range(max(1, len(gpus) // tensor_parallel)):
            own = gpus[i * tensor_parallel : (i + 1) * tensor_parallel]
            servers.append(_start_server(model, vllm, own, max_model_len, Path(log_dir)))
        for server in servers:
            _wait_healthy(server, wait)
        yield ",".join(server.url for server in servers)
    finally:
        for server in servers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGTERM)
        for server in servers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()
            server.watchdog.kill()
            server.watchdog.wait()


@contextlib.contextmanager
def open_model(name: str, url: str | None, a):
    """A `Model` to ask, with the settings of a stage's Args: behind `url` where one is given, served for the time of
    the `with` where `name` is local (a directory or a Hugging Face name `owner/model`), else one of OpenAI or
    OPENAI_BASE_URL; there `api:` marks a name with a slash."""
    if not url and is_local(name):
        with serve(name, Path(a.out) / "logs", a.tensor_parallel, a.max_model_len) as served:
            yield Model(name, served, a.concurrency)
    else:
        yield Model(model_id(name, url) if url else name.removeprefix("api:"), url, a.concurrency)


def is_local(name: str) -> bool:
    return Path(name).is_dir() or (os.sep in name and not name.startswith("api:"))


def check_model(name: str, url: str | None) -> None:
    """Say what is wrong with a model before work is spent on it: a directory that is not complete, or
    no key for an API."""
    if not url and is_local(name):
        check_model_dir(name)
    elif not url:
        Model(name)


# ends the server's process group when the pipe to this process closes, however it closes
WATCHDOG = "import os,sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), 9)"


def visible_gpus() -> list[str]:
    """The names by which CUDA_VISIBLE_DEVICES knows the GPUs."""
    import torch

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def _start_server(model, vllm, gpus, max_model_len, log_dir):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = dict(os.environ, TOKENIZERS_PARALLELISM="false")
    if vllm:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name",
                   model, "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--max-model-len",
                   str(max_model_len), "--generation-config", "vllm", "--enable-prefix-caching"]
        if gpus:
            command += ["--tensor-parallel-size", str(len(gpus)), "--gpu-memory-utilization", "0.9"]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        else:
            # without chunks: a seeded request whose prompt is split ends vLLM's CPU engine
            # ("CPU Generator does not use offset", seen with 0.32.0)
            command += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(8192, max_model_len))]
            env.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    else:
        command = [str(Path(sys.executable).with_name("transformers")), "serve", model, "--host", "127.0.0.1", "--port",
                   str(port), "--dtype", "bfloat16"]
    log_dir.mkdir(parents=True, exist_ok=True)
    log = log_dir / f"server-{Path(model).name}-{port}.log"
    with log.open("w") as f:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=f, stderr=f, env=env, start_new_session=True)
    watchdog = subprocess.Popen([sys.executable, "-c", WATCHDOG, str(process.pid)], stdin=subprocess.PIPE,
                                start_new_session=True)
    return SimpleNamespace(model=model, process=process, watchdog=watchdog, log=log, root=f"http://127.0.0.1:{port}",
                           url=f"http://127.0.0.1:{port}/v1")


def _wait_healthy(server, wait: float) -> None:
    import urllib.error
    import urllib.request

    from tqdm import tqdm

    start = time.time()
    with tqdm(desc=f"starting a server for {server.model}", bar_format="{desc}: {elapsed}", leave=False) as bar:
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError):
                with urllib.request.urlopen(f"{server.root}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            ended = server.process.poll() is not None
            if ended or time.time() - start > wait:
                tail = "\n".join(server.log.read_text(errors="replace").splitlines()[-15:])
                raise InputError(f"the server of {server.model} "
                                 f"{'ended' if ended else f'was not healthy after {wait:.0f} s'}; the end of {server.log}:\n{tail}")
            with contextlib.suppress(RuntimeError):  # no event loop: Ctrl-C arrives by itself
                if asyncio.current_task().cancelling():
                    raise KeyboardInterrupt
            time.sleep(0.3)
            bar.update()


# ------------------------------------------------------------------------------------------------
# 5. rollouts: the agent acts in the environment
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class RolloutConfig:
    """How the agent is asked and when an episode ends."""

    prompts: Prompts
    temperature: float
    max_tokens: int
    observation_chars: int  # longer observations are cut; 0: never
    seed: int
    max_failures: int = 10  # failing actions in a row that end an episode
    max_steps: int | None = None  # of an episode; None: the environment's own limit
    window: int = 0  # turns to keep, with the task, of a conversation that passes the model's context; 0: the episode ends
    insert: str = "instruction"  # where the agent reads the plan, one of INSERTS


def observation_message(observation: str, limit: int, plan: str | None = None) -> dict:
    cut = observation[:limit].rstrip() + " ..." if limit and len(observation) > limit else observation
    return {"role": "user", "content": f"Observation: {cut}" + (PLAN_LINE.format(plan=plan) if plan else "")}


async def episode(env, model: Model, cls, task: str, plan: str | None, rollout: int, c: RolloutConfig) -> dict:
    """One trajectory e ~ pi_theta(e|u, p) (paper equation 2) in one environment session.

    Returns {"instruction": u, "reward": r(u, e), "success", "end", "steps": [[reply, observation], ...],
    "format_errors", "prompt_tokens", "completion_tokens"}; `end` is success, failure (the task is over, lost), steps,
    errors or context. A reply without an action is told so and counts as a step."""
    u = await env("reset", task)
    messages, home = c.prompts.agent(u, plan, task, c.insert), {}
    opening, repeated = len(messages), plan if c.insert == "observation" else None
    steps, reward, success, failures, format_errors, tokens_in, tokens_out = [], 0.0, False, 0, 0, 0, 0
    end = "steps"
    for i in range(c.max_steps or cls.max_steps(task)):
        seed = seed_of(c.seed, task, plan, rollout, i)
        try:
            try:
                reply = await model.ask(messages, c.temperature, c.max_tokens, seed, home)
            except ContextOverflow:
                if not c.window or len(messages) <= opening + 2 * c.window:
                    raise
                messages = messages[:opening] + messages[-2 * c.window :]
                reply = await model.ask(messages, c.temperature, c.max_tokens, seed, home)
        except ContextOverflow:
            end = "context"
            break
        tokens_in, tokens_out = tokens_in + reply.prompt_tokens, tokens_out + reply.completion_tokens
        action, done = parse_action(reply.text), False
        if action is None:
            observation, format_errors = NO_ACTION, format_errors + 1
        else:
            observation, reward, done, success = await env("step", action)
        steps.append([reply.text, observation])
        if done:
            end = "success" if success else "failure"
            break
        failures = failures + 1 if action is None or cls.failed(observation) else 0
        if failures >= c.max_failures:
            end = "errors"
            break
        messages += [{"role": "assistant", "content": reply.text}, observation_message(observation, c.observation_chars, repeated)]
    return {"instruction": u, "reward": reward, "success": success, "end": end, "steps": steps, "format_errors": format_errors,
            "prompt_tokens": tokens_in, "completion_tokens": tokens_out}


def is_whole(row: dict, max_model_len: int) -> bool:
    """Whether an episode need not be played again: it did not crash, and no context shorter than `max_model_len` ended it."""
    return row["end"] != "crash" and (row["end"] != "context" or row.get("max_model_len", max_model_len) >= max_model_len)


async def rollouts(jobs: list[dict], model: Model, pool: EnvPool, env: str, c: RolloutConfig, concurrency: int,
                   append, desc: str = "rollouts", attempts: int = 3) -> int:
    """Play every job {"task", "plan", "rollout", ...}, `concurrency` episodes at a time, and append each
    finished one as the job plus what `episode` returns. Jobs of one task and plan should stand together:
    their prompts share a prefix, which the server caches.

    An episode whose worker dies starts again on another; after `attempts` it is appended with end
    "crash" and its error. Returns the number of retries."""
    from tqdm import tqdm

    cls, start, again = environment(env), time.time(), []
    failed, total = 0, 0.0  # reward of all that did not fail

    with tqdm(total=len(jobs), desc=desc, unit="ep", smoothing=0.05) as bar:

        async def work(job):
            nonlocal failed, total
            began = time.time()
            try:
                row = await pool.use(job["task"], lambda session: episode(
                    session, model, cls, job["task"], job["plan"], job["rollout"], c), attempts, lambda: again.append(job))
            except (WorkerDied, RuntimeError) as e:
                row = {"instruction": None, "reward": 0.0, "success": False, "end": "crash", "steps": [], "error": str(e)}
            append({**job, **row, "seconds": round(time.time() - began, 2)})
            failed, total = failed + (row["end"] == "crash"), total + row["reward"]
            done, seconds = bar.n + 1, time.time() - start
            bar.set_postfix_str(
                f"{60 * done / seconds:.0f} ep/min, {model.completion_tokens / seconds:.0f} tok/s, reward "
                f"{total / max(1, done - failed):.3f}, {failed} failed" + (f", {len(again)} retries" if again else ""), refresh=False)
            bar.update()

        await side_by_side(work, jobs, min(concurrency, len(jobs)))
    return len(again)


def mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values) if values else 0.0  # exact: the order of equal rewards makes no difference


# ------------------------------------------------------------------------------------------------
# 6. training: what the SFT and the DPO loop share
# ------------------------------------------------------------------------------------------------


def load_model(name: str):
    """(model, tokenizer): weights in the dtype they were saved in, dropout off, safetensors only."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_model_dir(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as e:
        raise InputError(f"cannot load {name}: {str(e).splitlines()[0]}") from None
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer of {name} has no chat template: training needs one")
    for module in model.modules():  # no dropout in train mode either
        vars(module).update({k: 0.0 for k in ("p", "attention_dropout") if k in vars(module)})
    choose_packing(model)
    return model, tokenizer


def tokenize(messages: list[dict], tokenizer, where: str) -> tuple[list[int], list[bool]]:
    """A conversation as (token ids, target mask). Targets are what the model itself writes: the text
    of each assistant message and the end token after it. The chat template writes the BOS token, if
    any, so the tokenizer adds none. `where` names file and line in errors."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and all(
            isinstance(m.get(k), str) for k in ("role", "content")) for m in messages):
        raise InputError(f"{where}: a conversation must be a list of objects with `role` and "
                         "`content`, both strings")
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    text, spans = render(messages), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(messages[:i], add_generation_prompt=True)
            upto = render(messages[: i + 1])
            if not (upto.startswith(before) and text.startswith(upto)):
                raise InputError(f"{where}: the chat template rewrites earlier turns, so the model "
                                 "would not see what it is trained on; use one that only appends")
            spans.append((len(before), len(upto.rstrip())))
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [any(first <= begin < last for first, last in spans)
            for begin, _ in out["offset_mapping"]]
    return out["input_ids"], mask


def hold_out(rows: list[tuple], a) -> tuple[list[tuple], list[tuple]]:
    """(training, held-out) rows of (sequences, task, line): the rows of about `a.eval_share` of the
    tasks are held out, each task by its name alone."""
    out = [seed_of("held out", task) < a.eval_share * 2**31 for _, task, _ in rows]
    train, held = ([row for row, is_out in zip(rows, out, strict=True) if is_out == side]
                   for side in (False, True))
    if not train:
        raise InputError(f"{a.data} has no row to train on (--max_length {a.max_length}, "
                         f"--eval_share {a.eval_share})")
    return train, held


def lengths(rows: list[tuple], share_prefix: bool = False) -> list[int]:
    """Tokens of each row of (sequences, task, line), with what its sequences share once."""
    return [len(pack([sequences], share_prefix)[0]) for sequences, *_ in rows]


def plan_epoch(lengths: list[int], batch_size: int, micro_tokens: int, processes: int, seed: int,
               epoch: int) -> list[list[list[int]]]:
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


def pack(groups: list, share_prefix: bool = False, width: int = 1):
    """Groups of sequences (ids, mask), SFT rows or the sides of DPO pairs, as one sequence.

    With `share_prefix`, a group's later sequences leave out the tokens they share with its first
    (a pair's prompt); the rest keep their positions. `width`: pad sequences to a multiple of it.
    Returns (ids, positions, targets, rows). `targets` has (index of the token whose output predicts
    it, its id, its sequence's number) for each target of each sequence, in a shared prefix too;
    `rows` has (tokens shared with the first, own tokens) for each sequence."""
    ids, positions, targets, rows = [], [], [], []
    for group in groups:
        begin, first = len(ids), group[0][0]
        for number, (sequence, mask) in enumerate(group):
            shared = len(os.path.commonprefix([first, sequence])) if number and share_prefix else 0
            shared = min(shared, len(sequence) - 1)
            own = len(sequence) - shared
            places = [*range(begin, begin + shared), *range(len(ids), len(ids) + own)]
            targets += [(places[i - 1], sequence[i], len(rows))
                        for i in range(1, len(sequence)) if mask[i]]
            ids += sequence[shared:] + [0] * (-own % width)
            positions += range(shared, len(sequence))
            rows.append((shared, own))
    return ids, positions, targets, rows


def choose_packing(model) -> None:
    """Set `model.packing`, how rows share a forward pass, and the attention that does it. "rows":
    each layer is plain causal attention, computed by `row_attention`. "mask": windows, soft caps or
    sinks; transformers masks other rows itself, by position ids that restart. "none": layers that
    are not attention, or ignore position ids: one row (or pair) per micro-batch."""
    import torch
    from transformers import AttentionInterface

    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    softcap = getattr(config, "attn_logit_softcapping", None)
    sinks = any(name.endswith("sinks") for name, _ in model.named_parameters())
    if (model._is_stateful or not model._supports_attention_backend
            or not kinds <= {"full_attention", "sliding_attention"}):
        model.packing = "none"
    elif "sliding_attention" in kinds or getattr(config, "sliding_window", None) or softcap or sinks:
        model.packing = "mask"
    else:
        model.packing = "rows"
        AttentionInterface.register("rows", torch.compiler.disable(row_attention))
        model.set_attn_implementation("rows")
    if softcap:
        model.set_attn_implementation("eager")  # SDPA ignores the soft cap


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
        out.append(torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=causal_lower_right(own, shared + own), scale=scaling))
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


def target_log_probs(model, groups: list, share_prefix: bool = False):
    """(log-probability (N,), number of its sequence (N,)) of each target in `groups` given what
    precedes it, in float32. Without rows, one of value and gradient zero: a process without rows
    must still take part in the collectives."""
    import torch

    kind, rest = model.packing, {"use_cache": False}
    sequences = [sequence for group in groups for sequence in group]
    width = max((len(ids) for ids, _ in sequences), default=2) if kind == "none" else 1
    *packed, rows = pack(groups or [[([0, 0], [False, True])]], share_prefix, width)
    ids, positions, targets = (torch.tensor(x, device=model.device) for x in packed)
    sources, labels, owners = targets.unbind(1)
    if kind == "none":
        logits = model(input_ids=ids.view(-1, width), **rest).logits.flatten(0, 1)[sources]
    else:
        rest |= {"rows": SimpleNamespace(lengths=rows)} if kind == "rows" else {}
        logits = model(input_ids=ids[None], position_ids=positions[None], logits_to_keep=sources,
                       **rest).logits[0]
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
            raise InputError(f"the Accelerate configuration turns on {kind}, but training shards "
                             "the model itself: launch with a configuration without it")
    wait = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # while one process writes the model
    try:
        return Accelerator(cpu=torch.backends.mps.is_available(),  # FSDP2 needs CUDA or a CPU
                           kwargs_handlers=[wait], log_with=a.log_with,
                           project_dir=f"{Path(a.out)}.logs" if a.log_with else None)
    except (ImportError, ValueError) as e:
        raise InputError(f"--log_with {a.log_with}: {e}") from None


def prepare_model(model, accelerator, a):
    """(model, optimizer), ready to train with the settings `a`: attention, adapters, FSDP2.

    With `a.lora_rank`, adapters at all linear layers are trained and the rest is frozen (Hu et al.
    2021). Each process holds its share of the float32 weights, gradients and AdamW averages of each
    decoder layer; with `a.precision` bf16 it gathers a layer's weights, while it runs, in bf16.
    Gradients are summed in float32. A single process does the same with a share of all."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if a.lora_rank:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise InputError("--lora_rank needs peft: pip install peft") from None
        model = get_peft_model(model, LoraConfig(
            r=a.lora_rank, lora_alpha=2 * a.lora_rank, target_modules="all-linear",
            task_type="CAUSAL_LM"))
    if a.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers skips checkpointing in eval mode
    layers, processes = model.get_decoder().layers, accelerator.num_processes
    if a.compile:
        for layer in layers:
            layer.compile()
    device = accelerator.device.type
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(),
                                rank=0, world_size=1)
    bf16, trained = a.precision == "bf16", [p for p in model.parameters() if p.requires_grad]
    for p in trained if bf16 else model.parameters():
        p.data = p.data.float()
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
    for module in [*layers, model]:
        fully_shard(module, mesh=dist.init_device_mesh(device, (processes,)), mp_policy=policy)
    model.to(accelerator.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=a.lr, weight_decay=a.weight_decay, fused=True)


def clip_gradients(model, limit: float) -> float:
    """Scale all gradients together to at most this norm (0: no limit); returns the norm before."""
    import torch

    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


class Training:
    """Checkpoints, metrics and the final model of one training run, in `out`.partial/ until it ends.

    A killed run resumes from its last checkpoint if data and settings are the same, except for the
    settings in `FREE`; else it starts over. The finished model replaces `out` in one rename."""

    # these change results by rounding at most
    FREE = {"out", "log_with", "micro_tokens", "share_prefix", "gradient_checkpointing", "compile",
            "save_steps"}

    def __init__(self, a, accelerator, model, optimizer, tokenizer, total: int):
        self.a, self.out, self.accelerator, self.model = a, Path(a.out), accelerator, model
        self.optimizer, self.tokenizer, self.total = optimizer, tokenizer, total
        self.start, self.log = 0, []
        self.partial = self.out.with_name(f"{self.out.name}.partial")
        settings = {**dataclasses.asdict(a), "model": model_id(a.model)}
        self.key = digest({k: v for k, v in settings.items() if k not in self.FREE},
                          tokenizer.chat_template, read_rows(a.data)[: a.limit])
        if self.out.exists() and not (self.out.is_dir() and (
                list(self.out.glob("*config.json")) or not any(self.out.iterdir()))):
            raise InputError(f"--out {a.out} exists and is not a model: choose another")
        state, metrics = self.partial / "state.json", self.partial / "metrics.jsonl"
        if accelerator.is_main_process:
            self.append = Appender(metrics)  # refuses a second run on the same folder
        saved = json.loads(state.read_text()) if state.exists() else {}
        if saved.get("settings") == self.key:
            self._load(self.partial / saved["checkpoint"])
            self.start, self.log = saved["step"], read_rows(metrics)[: saved["step"]]
            accelerator.print(f"resuming from step {self.start} of {total} ({self.partial})")
        elif saved:
            accelerator.print(f"starting over: {self.partial} has other settings or data")
        accelerator.wait_for_everyone()  # all have read what the main process deletes
        if accelerator.is_main_process:
            for path in set(self.partial.iterdir()) - {metrics} if not self.start else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.append.keep(self.start)
        if accelerator.log_with:
            accelerator.init_trackers(self.out.name, {
                k: v for k, v in settings.items() if isinstance(v, int | float | str)})
        accelerator.wait_for_everyone()

    def check(self, done: int, loss: float, norm: float, lines: list) -> None:
        """Raise `InputError`, before the weights are updated, if loss or gradient is not finite or
        the loss is 10 times the highest of the first ten steps. `lines`: the batch's in the data."""
        early = [row["loss"] for row in self.log[:10]]
        if not math.isfinite(loss + norm) or (len(early) == 10 and loss > 10 * max(early)):
            raise InputError(
                f"the loss is {loss:.4g} and the gradient norm {norm:.4g} at step {done}: lower "
                f"--lr, or look at lines {', '.join(map(str, sorted(lines)))} of {self.a.data}; "
                f"the last checkpoint is in {self.partial}")

    def step(self, done: int, metrics: dict) -> str:
        """Log optimizer step `done` (from 1), save a checkpoint every --save_steps steps; returns a
        line for the progress bar."""
        import resource

        import torch

        peak = (torch.cuda.max_memory_allocated() if self.accelerator.device.type == "cuda" else
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        metrics["memory_gb"] = peak / 1e9
        row = {"step": done, **{k: float(f"{v:.6g}") for k, v in metrics.items()}}
        self.log.append(row)
        if self.accelerator.is_main_process:
            self.append(row)
        if self.accelerator.log_with:
            self.accelerator.log(metrics, step=done)
        if self.a.save_steps and done % self.a.save_steps == 0 and done < self.total:
            self._save(done)
        return (f"loss {metrics['loss']:.3f}, lr {metrics['lr']:.1e}, "
                f"{metrics['tokens_per_second']:.0f} tok/s, {metrics['memory_gb']:.1f} GB")

    def _state(self) -> dict:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        return dict(zip(("model", "optimizer"), get_state_dict(self.model, self.optimizer),
                        strict=True))

    def _save(self, done: int) -> None:
        import torch.distributed.checkpoint as dcp

        folder, temporary = (self.partial / f"step-{done}{end}" for end in ("", ".tmp"))
        try:
            dcp.save(self._state(), checkpoint_id=temporary)
        except dcp.api.CheckpointException as e:  # for example a full disk
            raise next((error for error, _ in e.failures.values() if isinstance(error, OSError)),
                       RuntimeError(str(e))) from None
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
            write_text(self.partial / "state.json", json.dumps(
                {"settings": self.key, "step": done, "checkpoint": folder.name}))
            shutil.rmtree(self.partial / f"step-{done - 2 * self.a.save_steps}", ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _load(self, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict

        state = self._state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"])

    def finish(self, method: str) -> None:
        """Write the model in Hugging Face format, in the base model's dtype, with tokenizer, chat
        template, metrics.jsonl, curves.png and a model card, then put it in place of `out`. Adapters
        are merged into the base model with --lora_merge, else written alone."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
        from transformers import AutoModelForCausalLM

        a, final = self.a, self.partial / "final"
        weights = get_model_state_dict(self.model, options=StateDictOptions(
            full_state_dict=True, cpu_offload=True))
        if self.accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            base = AutoModelForCausalLM.from_pretrained(a.model, dtype="auto")
            if a.lora_rank:
                from peft import PeftModel

                self.model.save_pretrained(final, state_dict=weights)
                base = PeftModel.from_pretrained(base, final)
                if a.lora_merge:
                    shutil.rmtree(final)
                    base = base.merge_and_unload()
            else:
                base.load_state_dict(weights)
            base.save_pretrained(final)
            self.tokenizer.save_pretrained(final)
            write_rows(final / "metrics.jsonl", self.log)
            plot_curves(self.log, final / "curves.png")
            write_text(final / "README.md", f"# {a.out}\n\n{a.model} after {method} on {a.data}.\n\n"
                       f"Settings: `{json.dumps(dataclasses.asdict(a))}`\n\n"
                       f"Last step: `{json.dumps(self.log[-1:])}`; all steps in metrics.jsonl and "
                       "curves.png.\n")
            if self.out.is_symlink():
                self.out.unlink()
            elif self.out.exists():
                shutil.rmtree(self.out)
            final.rename(self.out)
            for file in self.out.glob("*config.json"):
                os.utime(file)  # Make looks at this file
            self.append.__exit__()
            shutil.rmtree(self.partial)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def plot_curves(log: list[dict], path) -> None:  # moves to data/report/report.py
    """Plot the metrics over the steps, training and held out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [k for k in ("loss", "reward_accuracy", "reward_margin", "lr", "grad_norm")
             if log and k in log[0]]
    figure, axes = pyplot.subplots(1, max(1, len(names)), figsize=(4 * max(1, len(names)), 3),
                                   squeeze=False)
    for ax, name in zip(axes[0], names, strict=False):
        ax.plot([r["step"] for r in log], [r[name] for r in log], label="training")
        if held := [(r["step"], r[f"eval_{name}"]) for r in log if f"eval_{name}" in r]:
            ax.plot(*zip(*held, strict=True), "o-", label="held out")
            ax.legend()
        ax.set(title=name.replace("_", " "), xlabel="optimizer step")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    worker_main(*sys.argv[1:])
