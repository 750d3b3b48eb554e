"""Rows: every file between stages is JSONL, one complete row a line."""

import errno
import itertools
import json
import os
import random
import shutil

import pytest
from conftest import write_jsonl
from safetensors.torch import load_file, save_file

import common
from common import (
    Appender,
    InputError,
    fingerprint,
    finished,
    read_rows,
    seed_of,
    weights_fingerprint,
    write_rows,
)


@pytest.mark.parametrize("line", ['{"a": 1', "not json", "[1, 2]", "3", '{"b": 2}', '"a"'])
def test_bad_line_names_file_and_line(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:2\b"):
        read_rows(path, ("a",))


def test_bad_bytes_name_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:1\b"):
        read_rows(path, ("a",))


def test_missing_field_is_named(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"task": "t", "plan": "p"}, {"task": "t"}])
    with pytest.raises(InputError, match=r"rows\.jsonl:2: .*plan"):
        read_rows(path, ("task", "plan"))
    assert len(read_rows(path, ("task",))) == 2


@pytest.mark.parametrize(
    "field, value",
    [
        ("task", 5),
        ("task", None),
        ("plan", 5),
        ("plan", ["Step 1"]),
        ("m", "0"),
        ("m", True),
        ("rollout", -1),
        ("reward", "0.5"),
        ("reward", None),
        ("reward", float("nan")),
        ("reward", 7),
        ("success", 1),
        ("steps", "Action: look"),
        ("steps", [["look"]]),
        ("steps", [["look", None]]),
        ("thoughts", "I look."),
        ("tasks", [1]),
        ("fingerprint", 5),
        ("end", None),
        ("instruction", {}),
    ],
)
def test_a_value_of_the_wrong_type(tmp_path, field, value):
    """File, line and field are named. A field that is not asked for may be anything."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{field: value}])
    with pytest.raises(InputError, match=rf"rows\.jsonl:1: the field {field} must be "):
        read_rows(path, (field,))
    assert len(read_rows(path)) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"plan": None, "reward": 1, "steps": [], "instruction": None},
        {"plan": "Step 1", "reward": 0.5, "steps": [["look", "You see."]], "thoughts": None},
        {"m": 0, "rollout": 3, "success": False, "solved": True, "thoughts": ["I look."]},
    ],
)
def test_values_of_the_right_type(tmp_path, row):
    assert read_rows(write_jsonl(tmp_path / "rows.jsonl", [row]), tuple(row)) == [row]


def test_what_is_no_file_of_rows(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputError, match=r"folder\.jsonl cannot be read: Is a directory"):
        read_rows(tmp_path / "folder.jsonl", missing_ok=True)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": ' + "[" * 100_000 + "\n")
    with pytest.raises(InputError, match=r"rows\.jsonl:1: nested too deeply"):
        read_rows(path)
    (tmp_path / "later.jsonl").symlink_to("not-yet.jsonl")
    assert read_rows(tmp_path / "later.jsonl", missing_ok=True) == []


def test_a_file_that_is_not_appended_to(tmp_path):
    """An incomplete last line is no trace of a kill: rows are lost."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    assert len(read_rows(path, appended=False)) == 2
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    with pytest.raises(InputError, match=r"rows\.jsonl:2: the file ends within this line"):
        read_rows(path, appended=False)
    assert len(read_rows(path)) == 1


def test_lone_surrogates_do_not_stop_a_stage(tmp_path):
    """JSON can name them, but no file in UTF-8 can hold them."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "\\ud83d"}\n')
    [row] = read_rows(path)
    with Appender(path) as append:
        append(row)
    assert read_rows(path)[1] == {"a": "?"}
    write_rows(path, [row])
    assert read_rows(path) == [{"a": "?"}]


def test_missing_file_and_empty_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(InputError, match=r"rows\.jsonl does not exist"):
        read_rows(path)
    assert read_rows(path, missing_ok=True) == []
    path.write_text('{"a": 1}\n\n  \n{"a": 2}\n')
    assert read_rows(path, ("a",)) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("half", [b'{"a": 2', b"{", b'{"a": "\xc3', b'{"a": 2, "b": [1'])
def test_incomplete_last_line_is_dropped_and_removed(tmp_path, half):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + half)
    assert read_rows(path, ("a",)) == [{"a": 1}]
    with Appender(path) as append:
        append({"a": 3})
    assert path.read_bytes() == b'{"a": 1}\n{"a": 3}\n'


def test_complete_last_row_without_newline_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    assert read_rows(path) == [{"a": 1}, {"a": 2}]
    with Appender(path) as append:
        append({"a": 3})
    assert read_rows(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_a_file_cut_anywhere_resumes(tmp_path):
    """Wherever a kill cuts the file, an Appender continues after the rows that can be read."""
    path = tmp_path / "rows.jsonl"
    rows = [{"a": i, "text": "ünï\n" * i} for i in range(3)]
    write_rows(path, rows)
    content = path.read_bytes()
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        kept = read_rows(path)
        assert kept == rows[: len(kept)]
        with Appender(path) as append:
            for row in rows[len(kept) :]:
                append(row)
        assert read_rows(path) == rows


def test_rows_are_on_disk_at_once(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    with Appender(path) as append:
        append({"text": "één\nzwei"})
        assert read_rows(path) == [{"text": "één\nzwei"}]
        append({"text": ""})
        assert len(path.read_bytes().splitlines()) == 2


def test_keep_truncates_after_the_first_rows(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}, {"a": 2}, {"a": 3}])
    with Appender(path) as append:
        append.keep(2)
        append({"a": 4})
    assert read_rows(path) == [{"a": 1}, {"a": 2}, {"a": 4}]


def test_second_appender_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    with Appender(path), pytest.raises(InputError, match=r"rows\.jsonl.*another run"):
        Appender(path)
    with Appender(path) as append:
        append({"a": 2})
    assert len(read_rows(path)) == 2


def flock_fails(monkeypatch, name: str) -> None:
    def fail(*_):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(common.fcntl, "flock", fail)


@pytest.mark.parametrize("name", ["EWOULDBLOCK", "EAGAIN", "EACCES"])
def test_a_lock_that_is_held(tmp_path, monkeypatch, name):
    flock_fails(monkeypatch, name)
    with pytest.raises(InputError, match=r"rows\.jsonl is being written by another run"):
        Appender(tmp_path / "rows.jsonl")


NO_LOCKS = ["ENOSYS", "ENOTSUP", "EOPNOTSUPP", "ENOLCK", "EINVAL", "EPERM", "EIO", "ENOTTY"]


@pytest.mark.parametrize("name", NO_LOCKS)
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, name):
    """It is said, once for each file, and the rows are written."""
    flock_fails(monkeypatch, name)
    path = write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    for a in (2, 3):
        with Appender(path) as append:
            append({"a": a})
    assert read_rows(path) == [{"a": 1}, {"a": 2}, {"a": 3}]
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith(f"warning: {path} cannot be locked on this file system (")


def test_write_rows_is_atomic(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    with path.open() as reader:
        with pytest.raises(TypeError):
            write_rows(path, [{"a": 2}, {"a": object()}])
        assert read_rows(path) == [{"a": 1}]
        write_rows(path, [{"a": 3}, {"a": 4}])
        assert json.loads(reader.read()) == {"a": 1}, "a reader of the old file sees the old file"
    assert read_rows(path) == [{"a": 3}, {"a": 4}]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_finished_keys():
    rows = [{"task": "t", "m": 0, "x": 1}, {"task": "t", "m": 1}, {"task": "t", "m": 0, "x": 2}]
    assert finished(rows, "task", "m") == {("t", 0): rows[2], ("t", 1): rows[1]}


def test_the_fingerprint_of_a_model_follows_its_weights(
    tmp_path, tiny_model, chat_server, monkeypatch
):
    monkeypatch.setenv("MPO_MAX_RETRIES", "0")
    copy = tmp_path / "tiny"
    shutil.copytree(tiny_model, copy)
    before = weights_fingerprint(str(copy))
    assert before == weights_fingerprint(tiny_model) and before.startswith("tiny-")
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert weights_fingerprint(str(copy)) != before
    assert weights_fingerprint("gpt-4o") == "gpt-4o"
    url = chat_server(lambda messages, body: "").url
    assert common.model_fingerprint("gpt-4o") == "gpt-4o"
    assert common.model_fingerprint(str(copy)) == weights_fingerprint(str(copy))
    assert common.model_fingerprint("gpt-4o", url) == "scripted"
    assert common.model_fingerprint("other", f"{url},http://elsewhere") == "scripted"
    with pytest.raises(InputError, match="cannot be reached"):
        common.model_fingerprint("gpt-4o", "http://127.0.0.1:9/v1")


def test_seeds_depend_on_their_parts_alone():
    tasks = [f"find-plant/{variation}" for variation in range(20)]
    keys = list(itertools.product(range(2), tasks, range(15)))
    seeds = {key: seed_of(*key) for key in keys}
    random.Random(0).shuffle(keys)
    assert all(seed_of(*key) == seeds[key] for key in keys)
    assert len(set(seeds.values())) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds.values())
    assert seed_of("ab", "c") != seed_of("a", "bc") and seed_of(1, None) != seed_of(1)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
