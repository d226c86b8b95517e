"""The numbers of a stage's tasks: a file of each, beside the ``slots.pth`` that tells of them all.

``slots/<task>.safetensors`` holds the tensors of one task, ``slots.pth`` (see ``file``) everything else of it, with two
fields more: ``tensors``, where each of them belongs, and ``sha256`` of the file's bytes, which is compared on every
reading. Equal numbers make equal bytes, whatever the task is called and whatever stands beside it, so that stages share
a file by links. Nobody writes into such a file: every writer makes a new one that takes its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from llava.checkpoints.weights import UNREADABLE
from llava.files import file_sha256, link_or_copy
from llava.schema import Wanted, an_object, check_fields, list_of, words
from llava.slots.names import check_task_name
from llava.utils import UserError

FOLDER, ENDING = "slots", ".safetensors"
LONGEST = 100
"""Letters of a task's name that its file bears; some file systems end at 143 bytes."""
AT_A_TIME = 4
"""Files that are hashed at once."""
_PART: dict[str, Wanted] = {
    "name": words(empty=False),
    "sha256": words(empty=False),
    "tensors": list_of(list_of(words(), empty=False)),
}
_MEND = "copy the stage's whole folder again, or make it again"
Entry = dict[str, Any]


def part_file(path: Path, task: str) -> Path:
    """The file of a task beside a ``slots.pth``. Tasks' names have no capitals, dots or separators (see ``names``)."""
    stem = task if len(task) <= LONGEST else f"{task[:LONGEST]}-{_sha256(task.encode())[:16]}"
    return path.parent / FOLDER / f"{stem}{ENDING}"


def read_parts(path: Path, entries: list[Entry]) -> list[Entry]:
    """The entries of a ``slots.pth`` with the tensors of their files.

    Raises:
        UserError: a file is not there, is not the one that was written with ``path``, or is no task's of it.
    """
    an_entry = an_object()
    for entry in entries:
        an_entry.check(entry, f"{path}: one task")
        check_fields(entry, _PART, f"{path}: one task", needed=tuple(_PART), closed=False)
        check_task_name(entry["name"], f"{path}: ")
    own = {part_file(path, entry["name"]) for entry in entries}
    if others := sorted({*(path.parent / FOLDER).glob(f"*{ENDING}")} - own):
        raise UserError(f"{others[0]}: belongs to no task of {path}; remove it, or copy the folder again")
    # Threads do without torch: in a process that was forked it has no threads of its own any more.
    with ThreadPoolExecutor(AT_A_TIME) as readers:
        files = readers.map(lambda entry: _whole_file(path, entry), entries)
        return [_with_tensors(*pair) for pair in zip(entries, files, strict=True)]


def write_parts(path: Path, entries: list[Entry], earlier: Iterable[Path] = ()) -> list[Entry]:
    """Write the tensors of tasks beside a ``slots.pth`` that is to be; what it holds of them.

    Args:
        earlier: ``slots.pth`` of other stages; a file of theirs that holds the very bytes is linked.

    Raises:
        UserError: a task whose name no reader would take.
    """
    for entry in entries:
        check_task_name(entry["name"])
    known = {sha256: file for place in earlier for sha256, file in parts_of(place).items()}
    if entries:
        (path.parent / FOLDER).mkdir()
    written = []
    for entry in entries:
        target, (plain, tensors) = part_file(path, entry["name"]), _taken_apart(entry)
        content = _packed(tensors)
        sha256 = _sha256(content)
        source = known.get(sha256)
        there = source is not None and source.is_file() and source.read_bytes() == content  # it may be damaged since
        link_or_copy(source, target) if source and there else target.write_bytes(content)
        written.append({**plain, "tensors": [list(place) for place in tensors], "sha256": sha256})
    return written


def parts_of(path: Path) -> dict[str, Path]:
    """The files beside a ``slots.pth`` by their checksums; none where it is whole by itself, or cannot be read."""
    if not (path.parent / FOLDER).is_dir():
        return {}
    try:
        entries = torch.load(path, map_location="cpu", weights_only=True)["tasks"]
        return {entry["sha256"]: part_file(path, entry["name"]) for entry in entries if "sha256" in entry}
    except UNREADABLE:
        return {}


def _whole_file(path: Path, entry: Entry) -> Path:
    file = part_file(path, entry["name"])
    if not file.is_file():
        raise UserError(f"{file}: is gone, and {path} names it; {_MEND}")
    if file_sha256(file) != entry["sha256"]:
        raise UserError(f"{file}: is not the file that was written with {path}; {_MEND}")
    return file


def _with_tensors(entry: Entry, file: Path) -> Entry:
    """The entry with its tensors mapped from their file: what no question uses takes no memory of the process."""
    try:
        numbers = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file}: cannot be read as a file of tensors ({error}); {_MEND}") from error
    whole = {name: value for name, value in entry.items() if name not in ("tensors", "sha256")}
    for *above, name in entry["tensors"]:
        inner = whole
        for step in above:
            inner = inner.setdefault(step, {})
        inner[name] = numbers[_name([*above, name])]
    return whole


def _taken_apart(entry: Entry) -> tuple[Entry, dict[tuple[str, ...], Tensor]]:
    """An entry without its tensors, and they by their places, in order."""
    tensors: dict[tuple[str, ...], Tensor] = {}

    def plain(values: Entry, place: tuple[str, ...]) -> Entry:
        left = {}
        for name, value in values.items():
            where = (*place, name)
            if isinstance(value, Tensor):
                tensors[where] = value
            else:
                left[name] = plain(value, where) if isinstance(value, dict) else value
        return left

    return plain(entry, ()), tensors


def _packed(tensors: Mapping[tuple[str, ...], Tensor]) -> bytes:
    return save({_name(place): tensor.detach().cpu().contiguous().clone() for place, tensor in tensors.items()})


def _name(place: Iterable[str]) -> str:
    return ".".join(place)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
