"""Files and folders that appear whole or not at all, and checksums of them.

A writer that is killed, or that the system refuses, leaves what was there before. What it was writing lies under a
hidden name that says which process it was; the next run that writes into the folder removes what dead ones left.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from llava.targets import open_in_place, replaceable
from llava.utils import system_error

_COUNT = itertools.count()
_OURS: set[str] = set()
"""Temporary names that this process is writing to."""
_SWEPT: set[tuple[int, str]] = set()
"""Folders that this process (by its number: a forked one begins anew) has looked through."""
_TEMPORARY = re.compile(r"^\..*\.tmp-(\d+)-\d+@(.+)$", re.DOTALL)
_ABANDONED = 24 * 3600
"""Seconds after which a temporary file of another machine, whose processes are not known here, is nobody's."""
SETTLED = 2 * 10**9
"""Nanoseconds since its last change after which a file that changes again cannot bear the same time."""


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w", lasting: bool = True) -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path`` that replaces it only when the block ends without an error.

    A killed or failed writer leaves the old file as it was. Missing parent folders are made. What is no file, such as
    ``/dev/null`` or a pipe, is written to and stays; so does a link, whose file is replaced.

    Args:
        lasting: wait until the disk has it; not for one of many files whose readers notice what a crash left of it.

    Raises:
        OSError: what the system refuses, with the file's name, also where torch or safetensors hide it.
    """
    target = replaceable(path)
    if target is None:
        with system_errors_named(path), open_in_place(path, mode) as stream:
            yield stream
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    encoding = None if "b" in mode else "utf-8"
    sweep(target.parent)
    temporary = _temporary(target)
    _OURS.add(temporary.name)
    try:
        with system_errors_named(target):
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, mode, encoding=encoding) as stream:
                yield stream
                stream.flush()
                if lasting:
                    os.fsync(stream.fileno())
            share([temporary])
            os.replace(temporary, target)
            if lasting:
                _sync(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        _OURS.discard(temporary.name)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A new folder beside ``path`` that takes its place only when the block ends without an error.

    A folder that stood there before is replaced as a whole, and is put back where that fails; of a link, the folder
    that it leads to. Until then nobody else may look into the new one; then whoever the umask lets. A file in it that
    has another name elsewhere (see ``link_or_copy``) stays as it is.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    partial, before = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.before")
    settle_folder(target)
    try:
        with system_errors_named(target):
            partial.mkdir(parents=True, mode=0o700)
            yield partial
            inside = [place for place in partial.rglob("*") if place.is_dir() or place.lstat().st_nlink == 1]
            share(file for file in inside if file.is_file())
            partial.chmod(stat.S_IMODE(partial.stat().st_mode) | (0o777 & ~_umask()))
            for place in (*inside, partial):
                _sync(place)
            if target.exists():
                target.rename(before)
            partial.rename(target)
            _sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if before.exists() and not target.exists():
            before.rename(target)
        raise
    shutil.rmtree(before, ignore_errors=True)


@contextlib.contextmanager
def temporary_folder(beside: Path) -> Iterator[Path]:
    """A private folder beside a path, for files on their way there; what a killed process leaves of it is swept."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    sweep(beside.parent)
    folder = _temporary(beside)
    _OURS.add(folder.name)
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _OURS.discard(folder.name)


def settle_folder(target: Path) -> None:
    """Clear away what a killed ``atomic_folder`` left: the unfinished folder; the one before, which goes back."""
    before = target.with_name(f".{target.name}.before")
    shutil.rmtree(target.with_name(f".{target.name}.partial"), ignore_errors=True)
    if before.exists() and not target.exists():
        before.rename(target)
    shutil.rmtree(before, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove temporary files and folders that dead processes left in a folder; a process looks there once."""
    seen = os.getpid(), str(folder)
    if seen in _SWEPT or not folder.is_dir():
        return
    _SWEPT.add(seen)
    for name in os.listdir(folder):
        if (found := _TEMPORARY.match(name)) and name not in _OURS and _is_dead(folder / name, int(found[1]), found[2]):
            with contextlib.suppress(OSError):  # another process sweeps too, or may not be disturbed
                shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def _temporary(target: Path) -> Path:
    """A name of this process's own beside ``target``, short enough for every file system."""
    stem = target.name.encode()[:100].decode(errors="ignore")
    return target.with_name(f".{stem}.tmp-{os.getpid()}-{next(_COUNT)}@{_host()}")


def _host() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname())[:60] or "host"


def _is_dead(file: Path, process: int, host: str) -> bool:
    if host != _host():
        return file.exists() and time.time() - file.stat().st_mtime > _ABANDONED
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return process == os.getpid()


def _sync(place: Path) -> None:
    """Have the disk keep a file's contents, or a folder's list of names, before what follows."""
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EBADF):  # some file systems sync no folders
            raise
    finally:
        os.close(handle)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file, or those of a folder, which nobody writes into, a second name; a copy where there are no links."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=lambda one, other: link_or_copy(Path(one), Path(other)))
        return
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def share(files: Iterable[Path]) -> None:
    """Give files the rights that the umask leaves: safetensors writes for its owner alone, whatever the umask is."""
    for file in files:
        file.chmod(0o666 & ~_umask())


@contextlib.contextmanager
def system_errors_named(place: str | os.PathLike) -> Iterator[None]:
    """Turn the errors by which torch, safetensors and tokenizers hide the system's into its own, which name a file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(place)
        raise
    except Exception as error:
        hidden = system_error(error)
        if hidden is None:
            raise
        raise OSError(hidden.errno, os.strerror(hidden.errno or 0), str(place)) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_KNOWN: dict[str, tuple[tuple[int, ...], str]] = {}
"""Checksums by path, each with what the system said of the file when it was read."""


def file_sha256(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's bytes.

    A file is read once per process as long as its inode, size and times stay the same; one that was changed a moment
    ago is read again, because a further change could bear the same time.
    """
    name = os.path.abspath(path)
    before = file_state(name)
    if (known := _KNOWN.get(name)) and known[0] == before:
        return known[1]
    with open(name, "rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    found = digest.hexdigest()
    if file_state(name) == before and time.time_ns() - max(before[3:]) > SETTLED:
        _KNOWN[name] = before, found
    return found


def is_still(path: str | os.PathLike, checksum: str) -> bool:
    """Whether a file is there and has this ``file_sha256``."""
    try:
        return file_sha256(path) == checksum
    except OSError:
        return False


def values_sha256(values: Any) -> str:
    """16 hex digits of a SHA-256 over JSON values, however they are laid out in a file."""
    as_read = json.loads(json.dumps(values))  # names that were numbers are texts then, and in another order
    text = json.dumps(as_read, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def file_state(path: str | os.PathLike) -> tuple[int, ...]:
    """Device, inode, size, and the times of the last change of contents and of anything."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
