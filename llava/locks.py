"""One writer at a time, across processes."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from llava.files import settle_folder, sweep
from llava.targets import written_in_place
from llava.utils import UserError, rank0_print

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def only_writer(path: str | os.PathLike, wait: bool = False) -> Iterator[None]:
    """Let one process at a time write ``path``, a file or a folder. What killed writers left beside it is removed.

    The lock is a hidden file beside ``path`` that names its holder, removed at the end; that of a dead process is taken
    over. Where the file system knows no locks (some NFS and Lustre mounts), which is said, the hidden file's being
    there is the lock. What is written in place, such as ``/dev/null`` or a pipe, has no lock: it is nobody's alone.

    Args:
        wait: go on when the other process is done, instead of refusing; for what takes a moment.

    Raises:
        UserError: another process holds it.
    """
    if written_in_place(path):
        yield
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    place = target.with_name(f".{target.name}.lock")
    lock: BaseFileLock = FileLock(place, fallback_to_soft=False)
    try:
        _acquire(lock, target, wait, "")
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        place.unlink(missing_ok=True)
        lock = SoftFileLock(f"{place}ed")
        rank0_print(
            f"note: {target.parent} is on a file system without locks; the file {lock.lock_file} stands for one"
        )
        _acquire(lock, target, wait, f"; if it has ended, delete {lock.lock_file}")
    try:
        if isinstance(lock, FileLock):
            place.write_text(f"{os.getpid()}\n{socket.gethostname()}\n", encoding="utf-8")
        sweep(target.parent)
        settle_folder(target)
        yield
    finally:
        # Removed while it is held: whoever waits for the old file sees that it is gone, and makes a new one.
        if isinstance(lock, FileLock):
            place.unlink(missing_ok=True)
        lock.release()


def _acquire(lock: BaseFileLock, target: Path, wait: bool, hint: str) -> None:
    try:
        lock.acquire(blocking=False)
    except Timeout as refused:
        holder = _holder(Path(lock.lock_file))
        if not wait:
            raise UserError(
                f"{target} is being written by {holder}; wait until it has ended, or stop it{hint}"
            ) from refused
        rank0_print(f"{target} is being written by {holder}; waiting for it{hint}")
        lock.acquire()


def _holder(place: Path) -> str:
    """Who holds a lock, in words; the file may be going away, or not be written yet."""
    with contextlib.suppress(OSError, ValueError):
        process, host, *_ = place.read_text(encoding="utf-8").split("\n")
        return f"process {int(process)} on {host}"
    return "another process"
