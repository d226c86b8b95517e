"""Files and folders that appear whole or not at all, checksums of them, and one writer at a time.

A writer that is killed, or finds the disk full, leaves what was there before.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from llava.targets import open_in_place, replaceable
from llava.utils import rank0_print

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_HIDDEN_FULL_DISK = ("PytorchStreamWriter failed", "iostream error", "No space left on device")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path`` that replaces it only when the block ends without an error.

    A killed or failed writer leaves the old file as it was. Missing parent folders are made. What is no file, such as
    ``/dev/null`` or a pipe, is written to and stays; so does a link, whose file is replaced.
    """
    target = replaceable(path)
    if target is None:
        with open_in_place(path, mode) as stream:
            yield stream
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    encoding = None if "b" in mode else "utf-8"
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode, encoding=encoding) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        share([Path(temporary)])
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A new folder beside ``path`` that takes its place only when the block ends without an error.

    A folder that stood there before is replaced as a whole; of a link, the folder that it leads to. Its files may be
    read by whoever the umask lets.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with full_disk_named(partial):
            partial.mkdir(parents=True)
            yield partial
        share(file for file in partial.rglob("*") if file.is_file())
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def share(files: Iterable[Path]) -> None:
    """Give files the rights that the umask leaves: safetensors writes for its owner alone, whatever the umask is."""
    for file in files:
        file.chmod(0o666 & ~_umask())


@contextlib.contextmanager
def full_disk_named(place: str | os.PathLike) -> Iterator[None]:
    """Turn the errors by which torch, safetensors and tokenizers hide a full disk into the system's own ``OSError``."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if not any(mark in str(error) for mark in _HIDDEN_FULL_DISK):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place)) from error


@contextlib.contextmanager
def only_writer(path: str | os.PathLike) -> Iterator[None]:
    """Let one process at a time write ``path``: a second one says that it waits, and goes on when the first is done.

    The lock is a hidden file beside ``path``, removed at the end. Where the file system knows no locks (some NFS and
    Lustre mounts) the hidden file's being there is the lock; that of a dead process on the same machine is taken over.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    place = target.with_name(f".{target.name}.lock")
    lock: BaseFileLock = FileLock(place, fallback_to_soft=False)
    try:
        _wait_for(lock, target, "")
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        place.unlink(missing_ok=True)
        lock = SoftFileLock(f"{place}ed")
        _wait_for(lock, target, f" (if there is none any more, delete {lock.lock_file})")
    try:
        yield
    finally:
        # Removed while it is held: whoever waits for the old file sees that it is gone, and makes a new one.
        if isinstance(lock, FileLock):
            place.unlink(missing_ok=True)
        lock.release()


def _wait_for(lock: BaseFileLock, target: Path, hint: str) -> None:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        rank0_print(f"{target}: another process is writing this file; waiting for it{hint}")
        lock.acquire()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def file_sha256(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()
