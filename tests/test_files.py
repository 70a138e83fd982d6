import errno
import json

import pytest

from trm_helpers.files import append_jsonl, read_jsonl, replacing, write_json


def test_a_file_appears_whole_and_the_old_one_stays_until_then(tmp_path):
    path = tmp_path / "sub" / "a.json"
    write_json(path, {"x": 1})
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert json.loads(path.read_text()) == {"x": 1} and temporary.suffix == ".json"
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write_json(tmp_path / "a.json", [1])
    with pytest.raises(OSError, match="No space left"), replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert json.loads(path.read_text()) == [1] and list(tmp_path.iterdir()) == [path]


def test_nan_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_lines_are_appended_and_one_cut_off_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    assert read_jsonl(path) == []
    append_jsonl(path, {"a": 1})
    append_jsonl(path, {"a": 2})
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]
    path.write_text(path.read_text() + '{"a": ')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]
    append_jsonl(path, {"a": 3})  # the next line begins afresh
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_a_broken_line_in_the_middle_is_an_error_that_says_where(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(ValueError, match="a.jsonl, line 2 is not JSON"):
        read_jsonl(path)
