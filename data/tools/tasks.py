"""The public task lists of an environment, `make tasks ENV=NAME`.

    python -m data.tools.tasks --env NAME

The addresses are in the environment's task_lists.json, {split: URL}. The lists are written to its
folder tasks/, from where `make all` takes them: all of them, or nothing if one fails.
"""

import http.client
import json
import shutil
import urllib.request
from dataclasses import dataclass

import common
from common import InputError, arg

OWN = "put your own lists into a folder and use make TASKS=FOLDER"


@dataclass
class Args:
    env: str = arg("sciworld", "environment: a folder of data/, or a path")


def addresses(env: str) -> dict[str, str]:
    """The environment's {split: URL}. Raises `InputError` that names file and fault."""
    path = common.environment_folder(env) / "task_lists.json"
    splits = ", ".join(common.environment(env).SPLITS)
    if not path.exists():
        raise InputError(f"{env} has no public task lists ({path} does not exist): {OWN}")
    try:
        found = json.loads(path.read_text())
    except ValueError as e:
        raise InputError(f"{path} must be JSON, {{split: URL}} ({e})") from None
    if not isinstance(found, dict) or "train" not in found:
        raise InputError(f"{path} must be {{split: URL}}, with the split train")
    for split, url in found.items():
        if split not in common.environment(env).SPLITS:
            raise InputError(f"{path}: {env} has no split {split!r}: it has {splits}")
        if not isinstance(url, str):
            raise InputError(f"{path}: the URL of {split} must be text, not {url!r}")
    return found


def download(url: str) -> bytes:
    """What is at the URL, in full. Raises `InputError` if that cannot be read."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read()  # fails if the connection ends before Content-Length bytes
    except (OSError, http.client.HTTPException, ValueError) as e:
        reason = str(e) or type(e).__name__
        raise InputError(f"{url} cannot be read ({reason}): try again, or {OWN}") from None


def fetch(env: str) -> dict[str, int]:
    """Download the lists into the environment's folder tasks/: all, or nothing. Returns {split:
    its number of tasks}."""
    cls = common.environment(env)
    lists = {}
    counts = {}
    for split, url in addresses(env).items():
        lists[split] = download(url)
        try:
            counts[split] = len(common.parse_task_list(cls, lists[split], url))
        except InputError as e:
            raise InputError(f"{e}: try again, correct task_lists.json, or {OWN}") from None
    folder = common.environment_folder(env) / "tasks"
    new = folder.with_name("tasks.tmp")
    shutil.rmtree(new, ignore_errors=True)  # what a kill left
    new.mkdir()
    for split, content in lists.items():
        (new / f"{split}.json").write_bytes(content)
    if folder.exists():
        common.remove_folder(folder)
    new.rename(folder)
    return counts


def main(a: Args) -> None:
    counts = fetch(a.env)
    folder = common.environment_folder(a.env) / "tasks"
    print(f"{folder}: " + ", ".join(f"{count:,} {split} tasks" for split, count in counts.items()))
    print(
        "make all takes them from now on, and make TASKS= the environment's own; "
        "give a new RUN=NAME, for a run has one set of tasks"
    )


if __name__ == "__main__":
    common.run_stage(main, Args)
