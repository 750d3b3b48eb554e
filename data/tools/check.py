"""Whether a run can be done here, before it costs anything: `make check ENV=NAME`.

    python -m data.tools.check TARGET ...           # make's targets; nothing of them is made
    python -m data.tools.check stage SCRIPT ARGS    # what make CHECKING=1 runs in place of a stage

Make is asked for the targets with CHECKING=1. Each command that is left then runs as `SCRIPT ARGS
--check true`: it reads its settings, looks at packages, one step of the environment, the models,
memory and disk, and prints a line for each (`common.Checks`). So the settings of every stage are
looked at before the first one begins. Exit status 2 if a check fails.

Without a GPU, the last line lists the tests that such a machine skips.
"""

import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import common
from common import InputError


def check_stage(words: list[str]) -> None:
    """Run the check of one command, SCRIPT ARGS, and note its result. It never fails: make is to go
    on with the commands that follow."""
    checks = Path(os.environ["MPO_CHECKS"])
    before = len(common.read_rows(checks, missing_ok=True))
    command = [sys.executable, *words, "--check", "true"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    new = common.read_rows(checks, missing_ok=True)[before:]
    lines = [row["line"] for row in new if "line" in row]
    failed = [line for line in lines if line.startswith("WRONG")]
    with common.Appender(checks) as append:
        append({"command": words[0]})
        if done.returncode and not failed:  # the settings, before the first check
            said = [f"exit status {done.returncode}", *done.stderr.strip().splitlines()][-1]
            _, _, reason = said.rpartition("error: ")
            line = f"WRONG  {'settings':12} {words[0]}: {reason}"
            print(line, flush=True)
            append({"line": line})


def check_targets(targets: list[str]) -> None:
    """Check all commands that are left to do for these make targets. Raises `InputError` if a check
    failed."""
    # settings on the command line of make come here in MAKEFLAGS; one job: the checks share a file
    flags = os.environ.get("MAKEFLAGS", "").split()
    flags = [flag for flag in flags if not flag.startswith(("-j", "--jobserver"))]
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryDirectory() as folder:
        checks = Path(folder) / "checks.jsonl"
        env = {"MPO_MAX_RETRIES": "2", **quiet, **os.environ}
        env |= {"MPO_CHECKS": str(checks), "MAKEFLAGS": " ".join(flags)}
        make = subprocess.run(["make", "-s", "CHECKING=1", *targets], env=env)
        rows = common.read_rows(checks, missing_ok=True)
    if make.returncode:
        raise InputError(f"make {' '.join(targets)} fails with status {make.returncode}")
    report(rows)


def gpu_tests() -> list[str]:
    """The names of the tests that need a GPU."""
    path = common.ROOT / "tests" / "test_gpu.py"
    if not path.exists():
        return []
    names = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            names.append(node.name.removeprefix("test_"))
    return names


def report(rows: list[dict]) -> None:
    """Print what remains to be said of all commands together. Raises `InputError` if a check
    failed."""
    commands = [row["command"] for row in rows if "command" in row]
    if not commands:
        print(f"ok     {'settings':12} nothing is left to do")
        return
    scripts = ", ".join(dict.fromkeys(commands))
    settings = f"ok     {'settings':12} of {len(commands)} commands: {scripts}"
    try:
        disk = f"ok     {'disk':12} {common.check_disk(rows)}"
    except InputError as e:
        disk = f"WRONG  {'disk':12} {e}"
    print(f"{settings}\n{disk}", flush=True)
    lines = [row["line"] for row in rows if "line" in row] + [settings, disk]
    wrong = [line for line in lines if line.startswith("WRONG")]
    names = gpu_tests()
    if names and any(line.split()[:3] == ["ok", "GPUs", "none"] for line in lines):
        said = f"skipped here, run by `make test-gpu` on a machine with GPUs: {', '.join(names)}"
        print(f"ok     {'tests':12} {said}", flush=True)
    if wrong:
        raise InputError(f"{len(wrong)} of {len(lines)} checks failed")


def main(words: list[str]) -> None:
    if words[:1] == ["stage"]:
        check_stage(words[1:])
        return
    try:
        check_targets(words)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(sys.argv[1:])
