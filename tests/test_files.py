"""Files that appear whole or not at all; what killed writers leave; what the system refuses; checksums."""

from __future__ import annotations

import errno
import os
import threading

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llava import files
from llava.files import atomic_folder, atomic_write, file_sha256, sweep, system_errors_named, temporary_folder
from llava.utils import run_cli


def test_what_is_no_file_is_written_to_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    with atomic_write(pipe) as stream:
        stream.write("answers")
    reader.join(10)
    assert read == ["answers"] and pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


def test_a_folder_in_a_files_place_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(IsADirectoryError) as refused, atomic_write(tmp_path):
        pass
    assert refused.value.filename == str(tmp_path) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("mask", "rights"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_rights_that_the_umask_leaves(mask, rights, tmp_path):
    """safetensors, for one, writes files that nobody but their owner may read."""
    before = os.umask(mask)
    try:
        with atomic_folder(tmp_path / "stage") as partial:
            (partial / "inner").mkdir()
            save_file({"weight": torch.zeros(2)}, partial / "model.safetensors")
            (partial / "inner" / "config.json").write_text("{}")
        with atomic_write(tmp_path / "answers.jsonl") as stream:
            stream.write("{}")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3 and {path.stat().st_mode & 0o777 for path in files} == {rights}


def test_what_is_being_written_is_its_owners_alone(tmp_path):
    """A stage's folder could be looked into by everybody until it was whole."""
    with atomic_folder(tmp_path / "stage") as partial, atomic_write(tmp_path / "answers.jsonl"):
        assert partial.stat().st_mode & 0o777 == 0o700
        (written,) = [path for path in tmp_path.iterdir() if path.is_file()]
        assert written.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "stage").stat().st_mode & 0o777 == 0o777 & ~files._umask()


def dead() -> int:
    """The number of a process that is no more."""
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_the_next_run_removes_what_a_killed_writer_left(tmp_path, monkeypatch):
    """A half-written file stayed for good: each run wrote under another name."""
    (tmp_path / "a").write_text("whole")
    child = os.fork()
    if not child:
        with atomic_write(tmp_path / "a") as stream:
            stream.write("half")
            stream.flush()
            os._exit(0)  # as a kill does: nothing is cleared away
    os.waitpid(child, 0)
    assert (tmp_path / "a").read_text() == "whole" and len(list(tmp_path.iterdir())) == 2
    others = [tmp_path / ".b.tmp-1-0@another-machine", tmp_path / f".b.tmp-{os.getppid()}-0@{files._host()}"]
    for file in others:
        file.write_text("")
    with atomic_write(tmp_path / "c" / "deep") as stream:
        stream.write("")
    with atomic_write(tmp_path / "b") as stream:
        stream.write("new")
    assert sorted(tmp_path.glob(".*")) == sorted(others)
    os.utime(others[0], (0, 0))
    files._SWEPT.clear()
    sweep(tmp_path)
    assert list(tmp_path.glob(".*")) == others[1:]


def test_the_next_run_removes_a_folder_that_a_killed_process_left(tmp_path):
    """Half-unpacked pictures stayed for good."""
    child = os.fork()
    if not child:
        with temporary_folder(tmp_path / "images") as place:
            (place / "half.png").write_text("")
            os._exit(0)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1
    with temporary_folder(tmp_path / "images") as place:
        assert list(tmp_path.iterdir()) == [place] and place.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["os.replace", "os.fsync", "os.open"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.ENOSYS])
def test_a_refusing_system_leaves_the_old_file_and_one_line(place, number, tmp_path, monkeypatch, capsys):
    (tmp_path / "a").write_text("old")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    def command():
        with atomic_write(tmp_path / "a") as stream:
            stream.write("new")

    monkeypatch.setattr(f"llava.files.{place}", refuse)
    with pytest.raises(SystemExit, match="2"):
        run_cli(command)
    monkeypatch.undo()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"error: {tmp_path / 'a'}: ")
    assert (tmp_path / "a").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_under_torch_is_the_systems_error(tmp_path):
    """torch.save says 'unexpected pos' of a stream that takes no more, and safetensors speaks of 'os error 28'."""

    class Full:
        def write(self, data):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        def flush(self):
            pass

    with pytest.raises(OSError) as refused, system_errors_named("keys.pth"):
        torch.save({"keys": torch.zeros(99)}, Full())
    assert (refused.value.errno, refused.value.filename) == (errno.EDQUOT, "keys.pth")
    for error in (
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("unexpected pos 64"),
    ):
        with pytest.raises(OSError) as refused, system_errors_named("model.safetensors"):
            raise error
        assert refused.value.errno == errno.ENOSPC
    with pytest.raises(RuntimeError, match="a bug"), system_errors_named("a"):
        raise RuntimeError("a bug")


def test_names_are_never_too_long_for_the_file_system(tmp_path):
    for name in ("a" * 255, "\u00e4" * 127):
        with atomic_write(tmp_path / name) as stream:
            stream.write("whole")
        assert (tmp_path / name).read_text() == "whole"


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    stage, rename = tmp_path / "stage", type(tmp_path).rename
    with atomic_folder(stage) as partial:
        (partial / "a").write_text("old")

    def refuse(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", refuse)
    with pytest.raises(OSError), atomic_folder(stage) as partial:
        (partial / "a").write_text("new")
    monkeypatch.undo()
    assert (stage / "a").read_text() == "old" and list(tmp_path.iterdir()) == [stage]
    stage.rename(tmp_path / ".stage.before")  # killed between the two renames
    (tmp_path / ".stage.partial").mkdir()
    files.settle_folder(stage)
    assert (stage / "a").read_text() == "old" and list(tmp_path.iterdir()) == [stage]


def test_a_checksum_is_of_what_the_file_holds_now(tmp_path, monkeypatch):
    """Same name, size and time: a file whose time was put back was taken for the one before."""
    path, read = tmp_path / "a", []
    path.write_bytes(b"one")
    first, times = file_sha256(path), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_bytes(b"two")
    os.utime(path, ns=times)
    assert file_sha256(path) != first
    later = path.stat().st_ctime_ns + 3 * 10**9
    monkeypatch.setattr(files.time, "time_ns", lambda: later)
    second = file_sha256(path)
    monkeypatch.setattr(files.hashlib, "sha256", lambda: read.append(1))
    assert file_sha256(path) == second and not read  # unchanged since long: not read again
