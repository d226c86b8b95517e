"""What a path to write to is: a regular file is replaced, everything else is written to as what it is.

``/dev/null``, ``/dev/stdout``, a pipe or a disk belong to the machine or to another program. They are opened, never
removed, renamed over or truncated; a link stays, and the file that it leads to is replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from pathlib import Path
from typing import IO, Any

from llava.utils import UserError

PATIENCE = 8.0
"""Seconds that a writer waits for somebody to read a pipe."""
_MOST_LINKS = 40
_SYSTEM = re.compile(r"/(?:dev(?!/shm/)|proc|sys)/")
"""Paths of the system's; ``/dev/shm`` holds files as any other folder."""
_OPEN_ALREADY = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")
_NAMED = {"/dev/stdout": 1, "/dev/stderr": 2}


def replaceable(path: str | os.PathLike[str]) -> Path | None:
    """The regular file, there or yet to be made, that a writer of ``path`` may replace; None for anything else.

    A link gives the file that it leads to.

    Raises:
        UserError: links that lead in a circle.
        IsADirectoryError: a folder.
    """
    real = os.path.realpath(path)
    if os.path.islink(real):
        raise UserError(f"{path} is a link that leads to itself; remove it, or choose another file")
    mode = _mode(real)  # asked once: other processes make and remove files and folders meanwhile
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if any(_SYSTEM.match(name) for name in (*_hops(path), real)):
        return None
    return Path(real) if stat.S_ISREG(mode) or not mode else None


def written_in_place(path: str | os.PathLike[str]) -> bool:
    """Whether a path is neither a folder nor a file that is there or yet to be made: a device, a pipe, a socket."""
    try:
        return replaceable(path) is None
    except IsADirectoryError:
        return False


def open_in_place(path: str | os.PathLike[str], mode: str = "wb") -> IO[Any]:
    """Open what is not replaced, for writing; what this process has open already goes on where it is.

    Raises:
        UserError: a pipe that nobody reads.
        OSError: as the system's.
    """
    encoding = None if "b" in mode else "utf-8"
    for name in _hops(path):
        found = _OPEN_ALREADY.fullmatch(name)
        number = int(found[1]) if found else _NAMED.get(name)
        if number is not None:
            return os.fdopen(os.dup(number), mode, encoding=encoding)
    handle = _open_pipe(path) if _is_pipe(path) else os.open(path, os.O_WRONLY)
    return os.fdopen(handle, mode, encoding=encoding)


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a regular file; a link, a device and what is not there are left alone."""
    if os.path.isfile(path) and not os.path.islink(path) and replaceable(path) is not None:
        with contextlib.suppress(FileNotFoundError):  # another process removes it too
            os.unlink(path)


def _hops(path: str | os.PathLike[str]) -> list[str]:
    """The path, and where each of its links leads: ``/dev/stdout`` is one, to a file that may be any."""
    names = [os.path.abspath(path)]
    while os.path.islink(names[-1]) and len(names) < _MOST_LINKS:
        names.append(os.path.normpath(os.path.join(os.path.dirname(names[-1]), os.readlink(names[-1]))))
        if names[-1].startswith("/proc/"):
            break  # what follows is the system's own
    return names


def _mode(path: str | os.PathLike[str]) -> int:
    """What lies at a path, as ``os.stat`` says it; 0 for nothing."""
    with contextlib.suppress(OSError, ValueError):
        return os.stat(path).st_mode
    return 0


def _is_pipe(path: str | os.PathLike[str]) -> bool:
    return stat.S_ISFIFO(_mode(path))


def _open_pipe(path: str | os.PathLike[str]) -> int:
    """A pipe's end for writing, as soon as it has a reader."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > end:
                raise UserError(f"{path} is a pipe that nobody reads; start its reader first") from error
            time.sleep(0.05)
        else:
            os.set_blocking(handle, True)
            return handle
