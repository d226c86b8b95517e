"""One writer at a time: refusing and waiting, leaving nothing behind, file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llava.locks import only_writer
from llava.utils import UserError

ROOT = Path(__file__).resolve().parents[1]


def refuse_locks(monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture(params=[None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=["locks", "lustre", "nfs", "other"])
def file_system(request, monkeypatch):
    if request.param is not None:
        refuse_locks(monkeypatch, request.param)
    return request.param


def test_a_second_writer_says_that_it_waits(file_system, tmp_path, capsys):
    path, order = tmp_path / "deep" / "a.jsonl", []

    def second():
        with only_writer(path, wait=True):
            order.append("second")

    with only_writer(path):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.3)
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"]
    said = capsys.readouterr().out
    assert f"a.jsonl is being written by process {os.getpid()} on {os.uname().nodename}; waiting for it" in said
    assert ("without locks" in said) == (file_system is not None)
    assert list(path.parent.iterdir()) == []


def test_a_failing_writer_lets_the_next_one_in(file_system, tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError, match="model"), only_writer(tmp_path / "a"):
            raise RuntimeError("model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [None, errno.ENOLCK], ids=["locks", "nfs"])
def test_a_killed_writer_blocks_nobody(number, tmp_path, monkeypatch):
    shim = f"def refuse(*_): raise OSError({number}, 'none')\nimport fcntl; fcntl.flock = refuse\n" if number else ""
    code = shim + "import os, sys\nfrom llava.locks import only_writer\n"
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


def test_a_second_writer_is_told_who_holds_it(file_system, tmp_path):
    """Two runs into one folder waited for each other, or wrote over each other's files."""
    with only_writer(tmp_path / "stage"):
        with pytest.raises(UserError, match=rf"stage is being written by process {os.getpid()} on \S+; wait until"):
            with only_writer(tmp_path / "stage"):
                raise AssertionError("not reached")
    assert list(tmp_path.iterdir()) == []
