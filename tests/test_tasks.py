"""Lists of tasks: `make tasks`, the forms of a list, and what --tasks takes."""

import asyncio
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import CORRIDOR, ROOT, run_make

import common
from common import InputError
from data.tools import tasks as tool

LISTS = {
    "train": [["find-lamp", 1], ["find-key", 2], ["find-lamp", 3]],
    "seen": [["find-key", 11]],
    "unseen": [["find-lamp", 21], ["find-key", 2]],
}


@pytest.fixture
def hall(tmp_path):
    """The folder of an environment, the corridor under another name, with lists beside it and
    their addresses."""
    folder = tmp_path / "hall"
    shutil.copytree(CORRIDOR, folder)
    addresses = {}
    for split, rows in LISTS.items():
        file = tmp_path / f"{split}_indices.json"
        file.write_text(json.dumps(rows))
        addresses[split] = file.as_uri()
    (folder / "task_lists.json").write_text(json.dumps(addresses))
    return folder


def lists_of(folder) -> dict:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("tasks/*")}


def test_make_tasks_downloads_the_lists(hall, tmp_path):
    assert tool.fetch(str(hall)) == {"train": 3, "seen": 1, "unseen": 2}
    assert lists_of(hall) == LISTS
    (tmp_path / "seen_indices.json").write_text('[["find-key", 12]]')
    tool.fetch(str(hall))
    assert lists_of(hall) == {**LISTS, "seen": [["find-key", 12]]}, "again: the new lists"
    assert sorted(p.name for p in hall.iterdir() if "tasks" in p.name) == ["tasks"]
    commands = run_make("-n", "tasks", f"ENV={hall}").stdout
    assert commands.endswith(f"python -m data.tools.tasks --env {hall}\n")


class Half(BaseHTTPRequestHandler):
    """Says that a list is long, and sends a part of it that is a list itself."""

    def do_GET(self):
        self.send_response(404 if "missing" in self.path else 200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'[["find-lamp", 1]]')

    def log_message(self, *_):
        """Silence."""


@pytest.fixture
def half():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Half)
    options = {"poll_interval": 0.01}
    threading.Thread(target=server.serve_forever, kwargs=options, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "unseen, says",
    [
        ("{half}/list.json", r"http://127.*/list.json cannot be read \(IncompleteRead.*try again"),
        ("{half}/missing.json", "missing.json cannot be read .*404.*TASKS=FOLDER"),
        ("http://127.0.0.1:9/list.json", "list.json cannot be read .*refused"),
        ("file://{folder}/no.json", "no.json cannot be read .*No such file"),
        ("no address", "no address cannot be read .*unknown url type"),
        ("file://{folder}/half.json", "half.json: must be a JSON list .*correct task_lists.json"),
        ("file://{folder}/page.html", "page.html: must be a JSON list of tasks"),
        ("file://{folder}/none.json", "none.json: the list has no tasks"),
        ("file://{folder}/flat.json", 'flat.json: must be .*, but its entry 2 is "x"'),
        (3, "task_lists.json: the URL of unseen must be text, not 3"),
    ],
)
def test_a_list_that_cannot_be_had_leaves_nothing_half(hall, tmp_path, half, unseen, says):
    """The lists before it are not kept, and those of an earlier download stay."""
    (tmp_path / "half.json").write_text('[["find-lamp", 1], ["find-')
    (tmp_path / "page.html").write_text("<html>")
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "flat.json").write_text('[["find-lamp", 1], "x"]')
    good = (hall / "task_lists.json").read_text()
    bad = json.loads(good)
    bad["unseen"] = unseen
    if isinstance(unseen, str):
        bad["unseen"] = unseen.format(half=half, folder=tmp_path)
    (hall / "task_lists.json").write_text(json.dumps(bad))
    with pytest.raises(InputError, match=says) as error:
        tool.fetch(str(hall))
    assert "\n" not in str(error.value)
    assert not [p.name for p in hall.iterdir() if p.name.startswith("tasks")]
    (hall / "task_lists.json").write_text(good)
    tool.fetch(str(hall))
    (hall / "task_lists.json").write_text(json.dumps(bad))
    with pytest.raises(InputError):
        tool.fetch(str(hall))
    assert lists_of(hall) == LISTS


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "no public task lists .*task_lists.json does not exist.*TASKS=FOLDER"),
        ("{", "task_lists.json must be JSON"),
        ("[]", r"task_lists.json must be \{split: URL\}, with the split train"),
        ('{"seen": "file:///x"}', "with the split train"),
        (
            '{"train": "file:///x", "trian": "file:///x"}',
            "no split 'trian': it has train, seen, unseen",
        ),
    ],
)
def test_bad_addresses(hall, content, says):
    (hall / "task_lists.json").unlink()
    if content is not None:
        (hall / "task_lists.json").write_text(content)
    with pytest.raises(InputError, match=says):
        tool.fetch(str(hall))


@pytest.mark.parametrize("file", sorted(ROOT.glob("data/*/task_lists.json")), ids=str)
def test_the_addresses_that_are_committed(file):
    """Each list of a fixed version, so that nobody else's edit changes the tasks of a run."""
    for url in json.loads(file.read_text()).values():
        _owner, _name, commit, *_ = url.removeprefix("https://raw.githubusercontent.com/").split(
            "/"
        )
        assert len(commit) == 40 and int(commit, 16)


def test_make_all_takes_the_lists_that_were_fetched(hall):
    """The demo and the evidence do not, and TASKS= does not."""

    def flags(*settings) -> set[str]:
        commands = run_make("-n", "all", f"ENV={hall}", "RUN=q", *settings).stdout
        return {word for line in commands.splitlines() for word in line.split() if "/tasks" in word}

    assert flags() == set()
    tool.fetch(str(hall))
    assert flags() == {f"{hall}/tasks"}
    assert flags("TASKS=") == set()
    estimate = run_make("-n", "estimate", f"ENV={hall}").stdout
    assert f"--tasks {hall}/tasks" in estimate


@pytest.mark.parametrize("mode", ["1", "evidence"])
def test_the_demo_and_the_evidence_keep_their_own_tasks(mode, tmp_path):
    (tmp_path / "tasks").mkdir()
    settings = ["ENV=sciworld", f"ENV_FOLDER={tmp_path}", "RUN=q"]
    assert f"--tasks {tmp_path}/tasks" in run_make("-n", "all", *settings).stdout
    commands = run_make("-n", "all", *settings, f"DEMO={mode}").stdout
    assert " 03_sample_score.py " in commands and str(tmp_path) not in commands


# ---- what --tasks takes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, splits",
    [
        (["train", "seen", "unseen"], ["seen", "unseen"]),
        (["train", "dev", "test"], ["seen", "unseen"]),
        (["train_indices", "dev_indices", "test_indices"], ["seen", "unseen"]),
        (["train", "test_indices"], ["unseen"]),
        (["train", "dev"], ["seen"]),  # no list of unseen tasks
        (["train", "max_steps"], ["seen", "unseen"]),  # the environment's own
    ],
)
def test_a_folder_of_lists(tmp_path, names, splits):
    for name in names:
        (tmp_path / f"{name}.json").write_text("[]")
    found = common.task_files(CORRIDOR, [str(tmp_path)])
    assert found["train"] == f"{tmp_path}/{names[0]}.json"
    assert common.evaluated_splits(CORRIDOR, [str(tmp_path)]) == splits
    assert set(found) <= {"train", *splits}


def test_a_folder_for_an_environment_with_one_test_split(tmp_path, monkeypatch):
    cls = common.environment(CORRIDOR)
    monkeypatch.setattr(cls, "SPLITS", {"train": 0, "seen": 10})
    for name in ("train_indices", "test_indices"):
        (tmp_path / f"{name}.json").write_text("[]")
    found = common.task_files(CORRIDOR, [str(tmp_path)])
    assert found == {
        "train": f"{tmp_path}/train_indices.json",
        "seen": f"{tmp_path}/test_indices.json",
    }


@pytest.mark.parametrize(
    "values, says",
    [
        (["trian=x.json"], "trian=x.json: .* no split 'trian'.*SPLIT one of train, seen, unseen"),
        (["runs/lr=1/x.json"], "no split 'runs/lr'; write SPLIT=FILE"),
        (["=x.json"], "no split ''"),
        (["train=a", "train=b"], "--tasks a b: two files of the train split"),
        (["a.json", "b.json"], "--tasks a.json b.json: two files without SPLIT="),
        (["FOLDER/both"], "both/train.json and .*/train_indices.json are lists of the same split"),
        (["FOLDER/tests"], "tests: there is no train.json"),
    ],
)
def test_tasks_that_would_be_ignored(tmp_path, values, says):
    for name in ("both/train", "both/train_indices", "tests/seen", "tests/trian"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.json").write_text("[]")
    values = [value.replace("FOLDER", str(tmp_path)) for value in values]
    with pytest.raises(InputError, match=says):
        common.task_files(CORRIDOR, values)


def test_a_flat_list_where_there_is_one_task_type(tmp_path, monkeypatch):
    cls = common.environment(CORRIDOR)
    file = tmp_path / "list.json"
    file.write_bytes(b'\xef\xbb\xbf[7, ["find-lamp", "8"], 0]')  # as some editors save it
    with pytest.raises(InputError, match=r"list.json: must be [^0-9]*, but its entry 1 is 7"):
        common.read_task_file(cls, str(file))
    monkeypatch.setattr(cls, "MAX_STEPS", {"find-lamp": 6})
    assert common.read_task_file(cls, str(file)) == ["find-lamp/7", "find-lamp/8", "find-lamp/0"]
    for row in ("true", "7.0", "null", '"7"', "[7]", '["find-lamp", 7, 8]', '["find-lamp", true]'):
        file.write_text(f"[1, {row}]")
        with pytest.raises(InputError, match=r"or \[NUMBER, ...\], but its entry 2 is "):
            common.read_task_file(cls, str(file))


def test_tasks_that_the_environment_does_not_have(tmp_path):
    file = tmp_path / "list.json"
    file.write_text('[["find-lamp", 3], ["find-unicorn", 3], ["find-key", -1]]')
    says = (
        "list.json: 2 of its 3 tasks do not exist here: unknown task 'find-unicorn/3': .*"
        "make TASKS=FOLDER, or TASKS= for"
    )
    with pytest.raises(InputError, match=says):
        asyncio.run(common.list_tasks(None, CORRIDOR, "seen", [f"seen={file}"], None, None))


def test_the_check_says_which_tasks(hall):
    files = {split: f"{hall}/tasks/{split}.json" for split in LISTS}
    found = {}
    tool.fetch(str(hall))
    for split, file in files.items():
        found[split] = common.read_task_file(common.environment(str(hall)), file)
    assert common.describe_tasks(found, str(hall), [f"{hall}/tasks"]) == (
        f"3 train tasks of {files['train']}, 1 seen tasks of {files['seen']}, 2 unseen tasks of "
        f"{files['unseen']}, 1 test tasks are train tasks, too"
    )
    assert common.describe_tasks(found, str(hall), [f"seen={files['seen']}"]) == (
        f"3 train tasks, 1 seen tasks of {files['seen']}"
    )
