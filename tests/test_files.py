"""One writer at a time: waiting, leaving nothing behind, file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava.files import atomic_folder, atomic_write, only_writer

ROOT = Path(__file__).resolve().parents[1]


def refuse_locks(monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture(params=[None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=["locks", "lustre", "nfs", "other"])
def file_system(request, monkeypatch):
    if request.param is not None:
        refuse_locks(monkeypatch, request.param)


def test_a_second_writer_says_that_it_waits(file_system, tmp_path, capsys):
    path, order = tmp_path / "deep" / "a.jsonl", []

    def second():
        with only_writer(path):
            order.append("second")

    with only_writer(path):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.3)
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"]
    assert "a.jsonl: another process is writing this file; waiting for it" in capsys.readouterr().out
    assert list(path.parent.iterdir()) == []


def test_a_failing_writer_lets_the_next_one_in(file_system, tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError, match="model"), only_writer(tmp_path / "a"):
            raise RuntimeError("model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [None, errno.ENOLCK], ids=["locks", "nfs"])
def test_a_killed_writer_blocks_nobody(number, tmp_path, monkeypatch):
    shim = f"def refuse(*_): raise OSError({number}, 'none')\nimport fcntl; fcntl.flock = refuse\n" if number else ""
    code = shim + "import os, sys\nfrom llava.files import only_writer\n"
    code += "held = only_writer(sys.argv[1])\nheld.__enter__()\nos.kill(os.getpid(), 9)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, tmp_path / "a"], env=environment, check=False)
    assert [path.name.startswith(".a.lock") for path in tmp_path.iterdir()] == [True]
    if number is not None:
        refuse_locks(monkeypatch, number)
    with only_writer(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_permission_is_no_matter_of_locks(tmp_path, monkeypatch):
    refuse_locks(monkeypatch, errno.EACCES + 1000)
    with pytest.raises(OSError, match="1013"), only_writer(tmp_path / "a"):
        raise AssertionError("not reached")


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
