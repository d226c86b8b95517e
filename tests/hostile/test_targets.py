"""Devices, pipes and links as files to write to: written to as such, never removed, renamed over or truncated."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from pathlib import Path

import pytest

from llava import targets
from llava.data.rows import parse_row, write_jsonl
from llava.eval.answer_file import append, appending, progress
from llava.files import atomic_folder, atomic_write
from llava.locks import only_writer
from llava.targets import open_in_place, remove, replaceable, written_in_place
from llava.utils import UserError

ROW = parse_row({"question_id": 1, "text": "q?"})


@pytest.fixture
def pipe(tmp_path):
    """A named pipe, what a reader of it got (after ``join``), and the reader."""
    path, got = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()))
    reader.start()
    yield path, got, reader
    reader.join(5)


@contextlib.contextmanager
def as_standard_output(path):
    """A regular file as this process's standard output, which holds a line already."""
    kept = os.dup(1)
    with open(path, "wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.write(1, b"before\n")
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)


@pytest.mark.parametrize(
    "name", ["/dev/null", "/dev/full", "/dev/stdout", "/dev/stderr", "/dev/fd/1", "/proc/self/fd/1"]
)
def test_what_belongs_to_the_machine_is_never_replaced(name):
    before = os.lstat(name).st_mode
    assert replaceable(name) is None
    remove(name)
    assert os.lstat(name).st_mode == before


@pytest.mark.parametrize("write", [lambda path: write_jsonl(path, [{"a": 1}]), lambda path: _answer(path)])
def test_dev_null_swallows_and_dev_full_is_a_full_disk(tmp_path, write):
    (tmp_path / "null").symlink_to("/dev/null")
    for path in ("/dev/null", tmp_path / "null"):
        write(path)
        assert not os.path.isfile("/dev/null") and os.path.exists("/dev/null")
    assert (tmp_path / "null").is_symlink() and os.listdir(tmp_path) == ["null"]
    with pytest.raises(OSError, match="No space left"):
        write("/dev/full")
    assert not [name for name in os.listdir("/dev") if name.startswith(".")]


def _answer(path):
    with appending(path, [ROW], "llava-x", "run") as (done, stream):
        assert done == 0
        append(stream, [{"question_id": 1, "text": "a", "prompt": "q?", "model_id": "llava-x"}])
    assert progress(path, [ROW], "llava-x", "run") == (0, None)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "a link"])
def test_standard_output_goes_on_where_it_is(tmp_path, name):
    if name == "a link":
        name = tmp_path / "out"
        name.symlink_to("/dev/stdout")
    with as_standard_output(tmp_path / "log.txt"):
        write_jsonl(name, [{"a": 1}])
        _answer(name)
        os.write(1, b"after\n")
    lines = (tmp_path / "log.txt").read_bytes().splitlines()
    assert lines[:2] == [b"before", b'{"a": 1}'] and b'"text": "a"' in lines[2] and lines[3] == b"after"


def test_a_pipe_is_written_to(pipe):
    path, got, reader = pipe
    _answer(path)
    reader.join(5)
    assert b'"text": "a"' in got[0] and path.is_fifo()


def test_a_pipe_that_nobody_reads_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "PATIENCE", 0.1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a pipe that nobody reads"):
        open_in_place(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a pipe that nobody reads"):
        write_jsonl(tmp_path / "pipe", [])


@pytest.mark.parametrize("write", [lambda path: write_jsonl(path, [{"a": 1}]), lambda path: _append(path)])
def test_a_link_stays_and_its_file_is_written(tmp_path, write):
    (tmp_path / "elsewhere").mkdir()
    link, real = tmp_path / "link.jsonl", tmp_path / "elsewhere" / "real.jsonl"
    link.symlink_to(real)
    for _ in range(2):  # of a file that is not there yet, and of one that is
        write(link)
        assert link.is_symlink() and real.is_file() and real.read_bytes()
        assert os.listdir(tmp_path / "elsewhere") == ["real.jsonl"]
    remove(link)
    assert link.is_symlink() and real.is_file()
    remove(real)
    assert not real.exists()


def _append(path):
    with appending(path, [ROW], "llava-x", "run", replace=True) as (_, stream):
        stream.truncate(0)
        append(stream, [{"question_id": 1, "text": "a", "prompt": "q?", "model_id": "llava-x"}])


def test_a_failed_write_leaves_link_and_file(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)
    with pytest.raises(RuntimeError), atomic_write(link) as stream:
        stream.write("new")
        raise RuntimeError
    assert link.is_symlink() and real.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_what_is_written_in_place_gets_no_lock_beside_it(tmp_path):
    """A lock file in ``/dev``, or beside a pipe, is nobody's to make, and keeps a second writer of nothing away."""
    os.mkfifo(tmp_path / "pipe")
    before = sorted(os.listdir("/dev"))
    for path in ("/dev/null", "/dev/stdout", "/dev/fd/1", tmp_path / "pipe"):
        with only_writer(path), only_writer(path):
            assert os.listdir(tmp_path) == ["pipe"] and sorted(os.listdir("/dev")) == before
    with only_writer(tmp_path / "a"):
        assert sorted(os.listdir(tmp_path)) == [".a.lock", "pipe"]
    with only_writer(tmp_path):  # a folder
        assert (tmp_path.parent / f".{tmp_path.name}.lock").is_file()


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no /dev/shm here")
def test_memory_that_is_mounted_as_a_folder_holds_files_as_any_other():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "rows.jsonl"
        assert replaceable(path) == path.resolve()
        for _ in range(2):
            write_jsonl(path, [{"a": 1}])
            assert path.read_text() == '{"a": 1}\n' and os.listdir(folder) == ["rows.jsonl"]
        remove(path)
        assert not path.exists()


def test_links_in_a_circle_and_folders_are_one_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="is a link that leads to itself"):
        write_jsonl(tmp_path / "loop", [])
    with pytest.raises(IsADirectoryError):
        write_jsonl(tmp_path, [])


def test_a_folder_takes_the_place_of_the_one_that_a_link_leads_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_folder(tmp_path / "link") as partial:
        (partial / "new").write_text("x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "new").is_file()
    for target in ("/dev/null", tmp_path / "real" / "new"):
        with pytest.raises(NotADirectoryError), atomic_folder(target):
            pass
    assert not os.path.isfile("/dev/null")


def test_a_folder_that_another_process_makes_meanwhile_is_no_error(tmp_path, monkeypatch):
    """Workers of a benchmark wait for one folder of keys, which one of them makes."""
    folder = tmp_path / "keys"

    def stat(path, *args, real=os.stat, **more):
        try:
            return real(path, *args, **more)
        finally:
            if os.fspath(path) == str(folder):
                monkeypatch.undo()
                folder.mkdir()

    monkeypatch.setattr(os, "stat", stat)
    assert not written_in_place(folder)
    assert folder.is_dir() and not written_in_place(folder)
