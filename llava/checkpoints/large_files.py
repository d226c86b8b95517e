"""Checksums of large weight files, kept from one process to the next: to read 14 GB takes longer than many a command.

What is kept counts only for a file of the same inode, size and times, whose samples are still the same. It lies in the
user's cache folder, holds no names, and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from llava.files import SETTLED, atomic_write, file_sha256, file_state
from llava.outside import read_object

LARGE = 64 << 20
"""Bytes from which on a file's checksum is kept."""
SAMPLES, SAMPLE_SIZE = 64, 1 << 16
MOST = 1000
"""Entries; the oldest go."""


def weights_sha256(file: Path) -> str:
    """``file_sha256`` of a file that may be large."""
    state = file_state(file)
    if state[2] < LARGE:
        return file_sha256(file)
    place, wanted = f"{state[0]}:{state[1]}", [*state[2:], _samples(file, state[2])]
    kept = _read().get(place)
    if kept is not None and kept[:-1] == wanted:
        return str(kept[-1])
    found = file_sha256(file)
    if file_state(file) == state and time.time_ns() - max(state[3:]) > SETTLED:
        _keep(place, [*wanted, found])
    return found


def _samples(file: Path, size: int) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        for sample in range(SAMPLES):
            stream.seek((size - SAMPLE_SIZE) * sample // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_SIZE))
    return digest.hexdigest()


def _place() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llava" / "checksums.json"


def _read() -> dict[str, list[Any]]:
    """The entries; none where the file is not there or was not written so."""
    try:
        values = read_object(_place())
        entries: dict[str, list[Any]] = values["entries"]
        return entries if values["checksum"] == _checksum(entries) else {}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # the last: nobody knows the home
        return {}


def _keep(place: str, entry: list[Any]) -> None:
    entries = {name: value for name, value in _read().items() if name != place}
    entries = dict(list(entries.items())[1 - MOST :]) | {place: entry}
    try:
        with atomic_write(_place()) as stream:
            json.dump({"entries": entries, "checksum": _checksum(entries)}, stream)
    except (OSError, RuntimeError):  # no home, or one that cannot be written to: the file is read again next time
        return


def _checksum(entries: dict[str, list[Any]]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
