import errno
import json
import resource

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
    for write in (write_json, append_jsonl):
        with pytest.raises(ValueError, match="JSON"):
            write(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_lines_are_appended(tmp_path):
    path = tmp_path / "a.jsonl"
    assert read_jsonl(path) == []
    append_jsonl(path, {"a": 1})
    append_jsonl(path, {"a": "é\u2028"})
    assert read_jsonl(path) == [{"a": 1}, {"a": "é\u2028"}]


@pytest.mark.parametrize("cut", ['{"a": ', '{"a": 3}', "{"])
def test_a_line_counts_when_its_newline_is_there(tmp_path, cut):
    """Reading and appending agree on which lines there are, also on one cut just before its end."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' + cut)
    assert read_jsonl(path) == [{"a": 1}]
    append_jsonl(path, {"a": 2})
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'


def test_a_disk_that_fills_up_within_a_line_loses_that_line_only(tmp_path):
    path = tmp_path / "a.jsonl"
    append_jsonl(path, {"a": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (15, limits[1]))  # no file above 15 bytes
        with pytest.raises(OSError):
            append_jsonl(path, {"a": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.stat().st_size == 15 and read_jsonl(path) == [{"a": 1}]
    append_jsonl(path, {"a": 3})
    assert read_jsonl(path) == [{"a": 1}, {"a": 3}]


@pytest.mark.parametrize("text", ['{"a": 1}\nnonsense\n{"a": 2}\n', '{"a": 1}\n{"a"\n'])
def test_a_broken_line_is_an_error_that_says_where(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="a.jsonl, line 2 is not JSON"):
        read_jsonl(path)
