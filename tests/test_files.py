import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from trm_helpers.files import (
    DiskFullError,
    append_jsonl,
    atomic_path,
    differences,
    read_json,
    read_jsonl,
    short_name,
    visible,
    write_bytes,
    write_json,
)


def test_a_file_appears_whole_and_the_old_one_stays_until_then(tmp_path):
    path = tmp_path / "sub" / "a.json"
    write_json(path, {"x": 1})
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert json.loads(path.read_text()) == {"x": 1} and temporary.suffix == ".json"
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write_json(tmp_path / "a.json", [1])
    with pytest.raises(DiskFullError, match=f"disk is full: a.json needs 1.0 MiB, in {tmp_path}, "
                       r"where [\d,.]+ MiB are free; completed"), atomic_path(path) as temporary:
        temporary.write_bytes(bytes(2**20))
        raise OSError(errno.ENOSPC, "No space left on device")
    assert json.loads(path.read_text()) == [1] and list(tmp_path.iterdir()) == [path]


def _wrapped():
    try:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    except OSError as error:
        raise RuntimeError("could not be saved") from error


def _torch():
    import torch

    torch.save({"a": torch.ones(2**20)}, "/dev/full")


def _safetensors():  # as it words it; it would put a file in the device's place
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device "
                          "(os error 28)")


def _hdf5():  # as h5py words it
    raise RuntimeError("Can't decrement id ref count (file write failed: filename = 'a.hdf5', "
                       "errno = 28, error message = 'No space left on device')")


@pytest.mark.parametrize("write", [_wrapped, _torch, _safetensors, _hdf5])
def test_a_full_disk_is_known_in_the_words_of_each_library(tmp_path, write):
    with pytest.raises(DiskFullError, match="the disk is full: a.pt in"), \
            atomic_path(tmp_path / "a.pt"):
        write()
    assert not list(tmp_path.iterdir())


def test_another_error_stays_what_it_is(tmp_path):
    with pytest.raises(PermissionError), atomic_path(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "no")


def test_a_full_disk_is_named_where_a_line_is_appended(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match="the disk is full: a.jsonl needs [0-9]+ bytes, in"):
        append_jsonl(tmp_path / "a.jsonl", {"a": 1})


def _killed_while_writing(path):
    """What a process leaves that is killed within :func:`atomic_path`."""
    script = ("import os, sys; from trm_helpers.files import atomic_path\n"
              "with atomic_path(sys.argv[1]) as temporary:\n"
              "    temporary.write_text('half'); print(temporary); os.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    return Path(done.stdout.strip())


def test_the_next_writer_removes_leftovers_of_killed_writers_and_nothing_else(tmp_path):
    dead = _killed_while_writing(tmp_path / "04_train.ipynb")
    *_, machine, pid, _, _ = dead.name.split(".")
    other = tmp_path / f".film.mp4.{machine}.{pid}.part.mp4"
    other.write_text("half")
    run = tmp_path / f".my.run-2.{machine}.{pid}.part.run-2"
    run.mkdir()
    foreign = tmp_path / ".a.json.0123abcd.1.part.json"  # of another machine, at work perhaps
    foreign.write_text("half")
    kept = [tmp_path / name for name in (".a.7.parts", ".lock", "a.7.part", ".gitignore")]
    for path in kept:
        path.touch()
    assert dead.exists() and other.exists()
    assert visible(tmp_path, "*") == [tmp_path / "a.7.part"]
    with atomic_path(tmp_path / "b.json") as mine:
        mine.write_text("1")
        write_json(tmp_path / "04_train.ipynb", 1)
        assert mine.exists()
    assert not dead.exists() and not other.exists() and not run.exists()
    assert foreign.exists() and all(path.exists() for path in kept)
    os.utime(foreign, (1e9, 1e9))
    write_json(tmp_path / "b.json", 2)
    assert not foreign.exists()


def test_a_long_name_has_room_for_its_temporary_one(tmp_path):
    path = tmp_path / ("a" * 250 + ".json")
    write_json(path, 1)
    assert read_json(path, int) == 1 and list(tmp_path.iterdir()) == [path]
    assert short_name("a" * 100) == "a" * 100 and len(short_name("a" * 101)) == 100
    write_json(tmp_path / ("\N{GREEK SMALL LETTER ALPHA}" * 120 + ".json"), 1)  # of two bytes each


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        assert write_bytes(tmp_path / "a", b"1").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1]", b"3"])
def test_a_damaged_json_file_is_named(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        read_json(path)
    path.write_text('{"a": 1}')
    assert read_json(path, keys=["a"]) == {"a": 1}
    with pytest.raises(ValueError, match=f"{path} is damaged: it holds no b, c"):
        read_json(path, keys=["a", "b", "c"])


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


@pytest.mark.parametrize("text", [b'{"a": 1}\nnonsense\n{"a": 2}\n', b'{"a": 1}\n{"a"\n',
                                  b'{"a": 1}\n\xff\n', b'{"a": 1}\n[2]\n', b'{"a": 1}\n\n'])
def test_a_broken_line_is_an_error_that_says_where(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="a.jsonl, line 2 is"):
        read_jsonl(path)


def test_differences_name_each_entry_once_and_what_is_missing():
    there, now = {"lr": 0.1, "seed": 0, "loss": "l1"}, {"lr": 0.2, "seed": 0, "chunk": 4}
    assert differences(there, now) == (
        "chunk: none there, 4 now; loss: 'l1' there, none now; lr: 0.1 there, 0.2 now")
    assert differences(there, dict(there)) == ""
    assert differences({}, {"lr": 1}, missing="any") == "lr: any there, 1 now"
