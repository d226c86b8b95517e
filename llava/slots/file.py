"""The slot file: prompt keys, router statistics and weight offsets of some tasks.

One format serves stage 1 (``output/prompt-key/<task>.pth``), the merged file (``merged_prompt_key.pth``) and stages
(``slots.pth``). It is a ``torch.save`` of tensors and plain containers, read with ``weights_only=True``::

    format: "llava-slots", version: 1
    settings: RetrieverSettings as a dict (dimensions, groups, rank, query mode, encoder identity, ...)
    base: {"path", "fingerprint"} of the base model
    prompt: how the questions are asked (template, suffix, picture mode, ...); left out where it is not known
    adapter: what acts on the model with these slots (see ``adapter``); left out for the retriever
    keys: [1, groups, pool, text_dim / groups]          image_keys: the same for image queries (either may be None)
    tasks: [{name, start, stop, trained, statistics: {count, total, scatter} | None, feature_statistics: the same,
             extent: tensors of ``unknown.TaskExtent`` | None, held_out: {text, image} | None, info: {},
             checksum: of the task's tensors}]
    offsets: {task: {"A": {target: [slots, layers, rank, out]}, "B": {target: [slots, layers, rank, in]}}}
    checksum: of all the rest, which is compared on every reading; files of earlier versions have none

``start`` and ``stop`` are the task's slots in the task sequence; keys are stored in the order of ``tasks``. The
prototype's bare ``{"keys": tensor}`` is read by ``llava.slots.prototype``. A stage's file is of version 2: without
tensors, which lie in a file of each task beside it (see ``parts``).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava.checkpoints.manifest import changing
from llava.checkpoints.weights import UNREADABLE
from llava.files import atomic_write
from llava.slots.key_scores import joined
from llava.slots.parts import read_parts, write_parts
from llava.slots.queries import TaskStatistics
from llava.slots.schema import check_slot_data
from llava.slots.settings import RetrieverSettings
from llava.slots.task_slots import TaskSlots
from llava.slots.unknown import TaskExtent
from llava.utils import UserError

FORMAT, VERSION, WITH_PARTS = "llava-slots", 1, 2
MEND = "copy it again, or make it again"


class SlotData(NamedTuple):
    """What a slot file holds."""

    settings: RetrieverSettings
    tasks: list[TaskSlots]
    base: dict[str, Any]
    prompt: dict[str, Any]
    adapter: str = ""


def write_slot_data(path: str | Path, slots: SlotData) -> None:
    """Write atomically; equal slots give equal bytes, whatever made them."""
    tasks = sorted(slots.tasks, key=lambda task: task.start)
    content = {
        "keys": _stack_keys([task.text_keys for task in tasks]),
        "image_keys": _stack_keys([task.image_keys for task in tasks]),
        "tasks": [_task_to_dict(task) for task in tasks],
        "offsets": {task.name: _offsets_of(task) for task in tasks if task.B},
    }
    _save(Path(path), slots, VERSION, content)


def write_stage_data(path: Path, slots: SlotData, earlier: Iterable[Path] = ()) -> dict[str, str]:
    """Write the slots of a new stage folder, whose ``slots.pth`` is ``path``: a file of each task beside it.

    Args:
        earlier: the same of other stages; of tasks that one of them has already, the files are linked.

    Returns:
        The checksum of each task.
    """
    tasks = sorted(slots.tasks, key=lambda task: task.start)
    keys = ({"text_keys": task.text_keys, "image_keys": task.image_keys} for task in tasks)
    whole = [{**_task_to_dict(task), **more, **_offsets_of(task)} for task, more in zip(tasks, keys, strict=True)]
    _save(path, slots, WITH_PARTS, {"tasks": write_parts(path, whole, earlier)})
    return {entry["name"]: entry["checksum"] for entry in whole}


def read_slot_data(path: str | Path) -> SlotData:
    """Read and validate; ``UserError`` names the file and what is wrong with it."""
    data = _load(path)
    if "format" not in data and "keys" in data:
        raise UserError(
            f"{path}: a bare key table without tasks, as the public prototype writes it; convert it first with "
            "python -m llava.continual.slots import-prototype"
        )
    if data.get("format") != FORMAT:
        raise UserError(f"{path}: not a slot file (no format mark {FORMAT!r}); make it with train_prompt_key.py")
    version = data.get("version", 0)
    if not isinstance(version, int) or version > WITH_PARTS:
        raise UserError(f"{path}: slot file version {version}, this package reads up to {WITH_PARTS}; update it")
    try:
        if version == WITH_PARTS:
            _check_checksum(data, data["checksum"], path)
            data = {**data, "tasks": read_parts(Path(path), data["tasks"])}
        check_slot_data(data, str(path))
        found = _parse(data, path)
        if version != WITH_PARTS:
            _check_content(data, found.tasks, path)
        return found
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: the slot file is incomplete or damaged ({reason}); write it again") from error


def _parse(data: dict[str, Any], path: str | Path) -> SlotData:
    try:
        settings = RetrieverSettings.from_dict(data["settings"])
    except ValueError as error:
        raise UserError(f"{path}: its settings cannot be used here ({error})") from error
    entries = data["tasks"] if data.get("version") == WITH_PARTS else _with_own_tensors(data, path)
    tasks = [_task(entry) for entry in entries]
    for task in tasks:
        _refuse_nan(task, path)
    return SlotData(settings, tasks, data["base"], data.get("prompt", {}), data.get("adapter", ""))


def _with_own_tensors(data: dict[str, Any], path: str | Path) -> Iterator[dict[str, Any]]:
    """The entries of a file's tasks, each with its part of the keys and its offsets."""
    place, wanted = 0, sum(entry["stop"] - entry["start"] for entry in data["tasks"])
    for name in ("keys", "image_keys"):
        if data[name] is not None and data[name].shape[2] != wanted:
            raise UserError(f"{path}: {name} for {data[name].shape[2]} slots, but its tasks have {wanted}")
    for entry in data["tasks"]:
        span = slice(place, place + entry["stop"] - entry["start"])
        keys = {"text_keys": _slice_keys(data["keys"], span), "image_keys": _slice_keys(data["image_keys"], span)}
        yield {**entry, **keys, **data["offsets"].get(entry["name"], {"A": {}, "B": {}})}
        place = span.stop


def _task(entry: dict[str, Any]) -> TaskSlots:
    return TaskSlots(
        name=entry["name"],
        start=entry["start"],
        stop=entry["stop"],
        text_keys=entry["text_keys"],
        image_keys=entry["image_keys"],
        statistics=_statistics(entry["statistics"]),
        feature_statistics=_statistics(entry.get("feature_statistics")),
        extent=None if entry.get("extent") is None else TaskExtent(**entry["extent"]),
        held_out=entry["held_out"],
        trained=entry["trained"],
        A=entry["A"],
        B=entry["B"],
        info=entry["info"],
        recorded_checksum=entry.get("checksum"),
    )


def _check_content(data: dict[str, Any], tasks: list[TaskSlots], path: str | Path) -> None:
    """The file holds what was written: by its checksum, in a file of an earlier version by those of its tasks."""
    if (kept := data.get("checksum")) is not None:
        _check_checksum(data, kept, path)
        return
    for task in tasks:
        if task.recorded_checksum and task.recorded_checksum != task.checksum():
            raise UserError(f"{path}: task {task.name!r} is damaged, its checksum is not that of its numbers; {MEND}")


def _check_checksum(data: dict[str, Any], kept: str, path: str | Path) -> None:
    if kept != content_sha256({name: value for name, value in data.items() if name != "checksum"}):
        raise UserError(f"{path}: is damaged, its checksum is not that of what it holds; {MEND}")


def content_sha256(value: Any) -> str:
    """16 hex digits of a SHA-256 over tensors and plain containers, in their order."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()[:16]


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, (dict, list, tuple)):
        digest.update(f"{type(value).__name__} {len(value)}".encode())
        for part in value.items() if isinstance(value, dict) else value:
            _feed(digest, part)
    else:
        digest.update(f"{type(value).__name__} {value!r};".encode())


def _load(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_file():
        raise UserError(f"slot file not found: {path} (make it with train_prompt_key.py or merge_prompt_key.py)")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except UNREADABLE as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path}: cannot be read as a slot file ({reason}); write it again") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds a {type(data).__name__}, not a slot file")
    return data


def _save(path: Path, slots: SlotData, version: int, content: dict[str, Any]) -> None:
    """Write a file's content with what its tasks share around it."""
    settings = slots.settings.to_dict()
    data = {"format": FORMAT, "version": version, "settings": settings, "base": slots.base, **content}
    data |= {name: value for name, value in (("prompt", slots.prompt), ("adapter", slots.adapter)) if value}
    data = _canonical(data)
    data["checksum"] = content_sha256(data)
    with changing(path), atomic_write(path, "wb") as stream:
        torch.save(data, stream)


def _offsets_of(task: TaskSlots) -> dict[str, dict[str, Tensor]]:
    return {"A": dict(task.A.items()), "B": dict(task.B.items())}


def _task_to_dict(task: TaskSlots) -> dict[str, Any]:
    def plain(s: TaskStatistics | None) -> dict[str, Any] | None:
        return None if s is None else {"count": s.count, "total": s.total, "scatter": s.scatter}

    return {
        "name": task.name,
        "start": task.start,
        "stop": task.stop,
        "trained": task.trained,
        "statistics": plain(task.statistics),
        "feature_statistics": plain(task.feature_statistics),
        "extent": None if task.extent is None else task.extent.tensors(),
        "held_out": task.held_out,
        "info": task.info,
        "checksum": task.checksum(),
    }


def _canonical(value: Any) -> Any:
    """A copy without shared parts: pickle writes an object that occurs again as a reference to the first place."""
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous().clone()
    if isinstance(value, str):
        return sys.intern(value)
    if isinstance(value, dict):
        return {_canonical(key): _canonical(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_canonical, value))
    return value


def _statistics(stored: dict[str, Any] | None) -> TaskStatistics | None:
    return None if stored is None else TaskStatistics(**stored)


def _stack_keys(keys: list[Tensor | None]) -> Tensor | None:
    whole = joined([None if key is None else key.detach().cpu() for key in keys])
    return None if whole is None else whole.unsqueeze(0).contiguous()


def _slice_keys(keys: Tensor | None, span: slice) -> Tensor | None:
    return None if keys is None else keys[0, :, span].clone()


def _refuse_nan(task: TaskSlots, path: str | Path) -> None:
    if bad := task.not_finite():
        raise UserError(f"{path}: {bad[0]} of task {task.name!r} holds NaN or infinite numbers; fit the task again")
