"""Disturbances: a forked child that is killed, or refused, at a change to the disk; files that are damaged.

Every change that Python makes is seen by an audit hook before it happens: opening a file to write, making, renaming and
removing. What compiled code writes itself (safetensors, tokenizers) is seen by the changes around it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llava.utils import run_cli

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
MEASURED = re.compile(r'"train_(runtime|samples_per_second|steps_per_second)": [-+.\de]+')
"""What differs from run to run: times."""
RERUN = 120
"""Seconds after which a child hangs."""


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit status (negative: the signal), and what it said."""

    code: int
    said: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("error: ")]

    def check_refused(self) -> None:
        """One clear line, and nothing that looks like a fault of the program."""
        assert "Traceback" not in self.said, self.said
        assert self.code == 2 and len(self.errors) == 1, self.said


def in_child(command: Callable[[], None], hook: Callable[[str, tuple], None] | None = None) -> Outcome:
    """Run a command as ``run_cli`` does, in a child that is its own; ``hook`` sees its audit events."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.dup2(write, 1)
        os.dup2(write, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        code = 1
        signal.alarm(RERUN)
        try:
            if hook is not None:
                sys.addaudithook(hook)
            run_cli(command)
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with os.fdopen(read, errors="replace") as stream:
        said = stream.read()
    return Outcome(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said)


def is_change(event: str, args: tuple, folder: str) -> bool:
    """Whether an audit event changes something under ``folder``."""
    if event == "open":
        path, mode, flags = args
        writes = any(letter in (mode or "") for letter in "wax+") or bool((flags or 0) & WRITES)
        return writes and isinstance(path, (str, bytes)) and os.fsdecode(path).startswith(folder)
    return event in CHANGES and isinstance(args[0], (str, os.PathLike)) and os.fspath(args[0]).startswith(folder)


def at_change(number: int, folder: Path, act: Callable[[], None]) -> Callable[[str, tuple], None]:
    """A hook that acts just before a child's change of this number, from 0."""
    seen = [0]

    def hook(event: str, args: tuple) -> None:
        if is_change(event, args, str(folder)):
            seen[0] += 1
            if seen[0] == number + 1:
                act()

    return hook


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse_with(number: int) -> Callable[[], None]:
    def refuse() -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def count_changes(command: Callable[[], None], folder: Path) -> int:
    """How many changes an undisturbed command makes; the command is run."""
    tally = folder.with_name(f"{folder.name}.tally")  # beside the folder, whose changes are counted

    def hook(event: str, args: tuple) -> None:
        if is_change(event, args, f"{folder}{os.sep}"):
            handle = os.open(tally, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(handle, b".")
            os.close(handle)

    tally.write_bytes(b"")
    found = in_child(command, hook)
    assert found.code == 0, found.said
    count = tally.stat().st_size
    tally.unlink()
    return count


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder by its path, and every folder without one."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
        elif not any(path.iterdir()):
            found[str(path.relative_to(folder))] = b"an empty folder"
    return found


def comparable(found: dict[str, bytes]) -> dict[str, bytes]:
    """Contents without what is measured, in the logs and in the lists of checksums."""
    result = {
        name: MEASURED.sub("", data.decode()).encode() if name.endswith("log_history.json") else data
        for name, data in found.items()
    }
    for name, data in found.items():
        if name.endswith("/checksums.json"):
            files = json.loads(data)["files"]
            result[name] = repr(
                {file: checksum for file, checksum in files.items() if file != "log_history.json"}
            ).encode()
    return result


def put_back(folder: Path, state: dict[str, bytes]) -> None:
    """Make a folder hold these contents and nothing else."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif str(path.relative_to(folder)) not in state:
            path.unlink()
    for name, data in state.items():
        path = folder / name
        if data == b"an empty folder":
            path.mkdir(parents=True, exist_ok=True)
        elif not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def damaged(file: Path, how: str) -> None:
    """Cut, flip, empty or remove a file, or put another one of its kind in its place."""
    data = file.read_bytes()
    middle = len(data) // 2
    if how == "remove":
        file.unlink()
    elif how == "swap":
        alike = [other for other in file.parent.glob(f"*{file.suffix}") if other.read_bytes() != data]
        file.write_bytes(min(alike).read_bytes() if alike else data[::-1])
    else:
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else b"x"
        file.write_bytes({"cut": data[:middle], "flip": flipped, "empty": b""}[how])
