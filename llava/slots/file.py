"""The slot file: prompt keys, router statistics and weight offsets of some tasks.

One format serves stage 1 (``output/prompt-key/<task>.pth``), the merged file (``merged_prompt_key.pth``) and stage
checkpoints (``slots.pth``). It is a ``torch.save`` of tensors and plain containers, read with ``weights_only=True``::

    format: "llava-slots", version: 1
    settings: RetrieverSettings as a dict (dimensions, groups, rank, query mode, encoder identity, ...)
    base: {"path", "fingerprint"} of the base model
    prompt: how the questions are asked (template, suffix, picture mode, ...); left out where it is not known
    keys: [1, groups, pool, text_dim / groups]          image_keys: the same for image queries (either may be None)
    tasks: [{name, start, stop, trained, statistics: {count, total, scatter} | None, feature_statistics: the same,
             extent: tensors of ``unknown.TaskExtent`` | None, held_out: {text, image} | None, info: {},
             checksum: of the task's tensors}]
    offsets: {task: {"A": {target: [slots, layers, rank, out]}, "B": {target: [slots, layers, rank, in]}}}

``start`` and ``stop`` are the task's slots in the task sequence; keys are stored in the order of ``tasks``. The
prototype's bare ``{"keys": tensor}`` is read too, given the tasks and their ranges.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llava.files import atomic_write
from llava.slots.pool import Retriever, RetrieverSettings
from llava.slots.routers import TaskStatistics
from llava.slots.unknown import TaskExtent
from llava.utils import UserError

FORMAT, VERSION = "llava-slots", 1

UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, IndexError)
"""What ``torch.load`` raises for a cut or foreign file; it depends on where the cut is."""


@dataclass
class TaskSlots:
    """One task's part of a slot file."""

    name: str
    start: int
    stop: int
    text_keys: Tensor | None = None  # [groups, slots, text_dim / groups]
    image_keys: Tensor | None = None  # [groups, slots, image_dim / groups]
    statistics: TaskStatistics | None = None
    feature_statistics: TaskStatistics | None = None  # of random features, where the router is ``ridge``
    extent: TaskExtent | None = None  # tells questions that fit no known task
    held_out: dict[str, Tensor] | None = None  # queries kept from fitting, to measure routing when merging
    trained: bool = False
    A: dict[str, Tensor] = field(default_factory=dict)
    B: dict[str, Tensor] = field(default_factory=dict)
    info: dict = field(default_factory=dict)
    recorded_checksum: str | None = None  # written beside the tensors; None for a task that was not read from a file

    @property
    def count(self) -> int:
        return self.stop - self.start

    def tensors(self) -> dict[str, Tensor]:
        """All of the task's tensors that a route or an answer depends on, by name."""
        parts: dict[str, Tensor | None] = {"text_keys": self.text_keys, "image_keys": self.image_keys}
        for name in ("statistics", "feature_statistics"):
            if (found := getattr(self, name)) is not None:
                parts |= {f"{name}.total": found.total, f"{name}.scatter": found.scatter}
        if self.extent is not None:
            parts |= {f"extent.{name}": tensor for name, tensor in self.extent.tensors().items()}
        for kind, tensors in (("A", self.A), ("B", self.B)):
            parts |= {f"{kind}.{target}": tensor for target, tensor in tensors.items()}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def checksum(self) -> str:
        """16 hex digits over everything a route or an answer depends on, whatever the task and its file are called."""
        digest = hashlib.sha256(str((self.trained, self.statistics and self.statistics.count)).encode())
        for name, tensor in sorted(self.tensors().items()):
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{name}:{plain.dtype}:{tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


@dataclass
class SlotFile:
    """Tasks, in the order of their slots, with the settings and the base model they belong to."""

    settings: RetrieverSettings
    tasks: list[TaskSlots]
    base: dict = field(default_factory=dict)
    prompt: dict = field(default_factory=dict)  # how the tasks' questions are asked; empty in files of older versions

    def task(self, name: str) -> TaskSlots:
        for task in self.tasks:
            if task.name == name:
                return task
        raise UserError(f"no slots for task {name!r}; the file knows {[task.name for task in self.tasks]}")


def write_slot_file(path: str | Path, slots: SlotFile) -> None:
    """Write atomically; equal slots give equal bytes, whatever made them."""
    tasks = sorted(slots.tasks, key=lambda task: task.start)
    data = {
        "format": FORMAT,
        "version": VERSION,
        "settings": slots.settings.to_dict(),
        "base": slots.base,
        "keys": _stack_keys([task.text_keys for task in tasks]),
        "image_keys": _stack_keys([task.image_keys for task in tasks]),
        "tasks": [_task_to_dict(task) for task in tasks],
        "offsets": {task.name: {"A": task.A, "B": task.B} for task in tasks if task.B},
    }
    if slots.prompt:
        data["prompt"] = slots.prompt
    with atomic_write(path, "wb") as stream:
        torch.save(_canonical(data), stream)


def read_slot_file(path: str | Path) -> SlotFile:
    """Read and validate; ``UserError`` names the file and what is wrong with it."""
    data = _load(path)
    if "format" not in data and "keys" in data:
        raise UserError(
            f"{path}: a bare key table without tasks, as the public prototype writes it; convert it first with "
            "read_prototype_keys(path, {task: (start, stop)}, settings)"
        )
    if data.get("format") != FORMAT:
        raise UserError(f"{path}: not a slot file (no format mark {FORMAT!r}); make it with train_prompt_key.py")
    if data.get("version", 0) > VERSION:
        raise UserError(f"{path}: slot file version {data['version']}, this package reads up to {VERSION}; update it")
    try:
        return _parse(data, path)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: the slot file is incomplete or damaged ({reason}); write it again") from error


def _parse(data: dict, path: str | Path) -> SlotFile:
    settings = RetrieverSettings.from_dict(data["settings"])
    tasks, place = [], 0
    wanted = sum(entry["stop"] - entry["start"] for entry in data["tasks"])
    for name in ("keys", "image_keys"):
        if data[name] is not None and data[name].shape[2] != wanted:
            raise UserError(f"{path}: {name} for {data[name].shape[2]} slots, but its tasks have {wanted}")
    for entry in data["tasks"]:
        count = entry["stop"] - entry["start"]
        span = slice(place, place + count)
        offsets = data["offsets"].get(entry["name"], {"A": {}, "B": {}})
        tasks.append(
            TaskSlots(
                name=entry["name"],
                start=entry["start"],
                stop=entry["stop"],
                text_keys=_slice_keys(data["keys"], span),
                image_keys=_slice_keys(data["image_keys"], span),
                statistics=_statistics(entry["statistics"]),
                feature_statistics=_statistics(entry.get("feature_statistics")),
                extent=None if entry.get("extent") is None else TaskExtent(**entry["extent"]),
                held_out=entry["held_out"],
                trained=entry["trained"],
                A=offsets["A"],
                B=offsets["B"],
                info=entry["info"],
                recorded_checksum=entry.get("checksum"),
            )
        )
        _refuse_nan(tasks[-1], path)
        place += count
    return SlotFile(settings, tasks, data["base"], data.get("prompt", {}))


def read_prototype_keys(path: str | Path, ranges: dict[str, tuple[int, int]], settings: RetrieverSettings) -> SlotFile:
    """The prototype's ``{"keys": [1, groups, pool, dim / groups]}`` as a slot file, tasks at the given ranges."""
    keys = _load(path).get("keys")
    if not isinstance(keys, Tensor) or keys.dim() != 4:
        raise UserError(f"{path}: expected a tensor 'keys' of shape [1, groups, pool, dim]")
    pool = keys.shape[2]
    bad = [task for task, (start, stop) in ranges.items() if not 0 <= start < stop <= pool]
    if bad:
        raise UserError(f"{path}: holds {pool} slots, but task {bad[0]!r} is said to be at {ranges[bad[0]]}")
    tasks = [
        TaskSlots(name, start, stop, text_keys=keys[0, :, start:stop].float().clone())
        for name, (start, stop) in ranges.items()
    ]
    return SlotFile(settings, tasks)


def retriever_from(slots: SlotFile) -> Retriever:
    """A ``Retriever`` with the file's slots, in slot order."""
    retriever = Retriever(slots.settings)
    for task in sorted(slots.tasks, key=lambda task: task.start):
        block = retriever.add_task(task.name, task.count)
        for buffer, value in ((block.text_keys, task.text_keys), (block.image_keys, task.image_keys)):
            if (buffer is None) != (value is None) or (buffer is not None and buffer.shape != value.shape):
                raise UserError(
                    f"task {task.name!r}: keys of shape {_shape(value)}, but the settings ask for {_shape(buffer)}"
                )
            if buffer is not None:
                buffer.copy_(value)
        load_task_offsets(retriever, task)
        block.statistics, block.feature_statistics = task.statistics, task.feature_statistics
        block.extent, block.trained = task.extent, task.trained
    retriever.changed()
    return retriever


def load_task_offsets(retriever: Retriever, task: TaskSlots) -> None:
    """Put a task's offsets from a file into the retriever's block of that name."""
    block = retriever.block(task.name)
    for kind, mine, theirs in (("A", block.A, task.A), ("B", block.B, task.B)):
        for target, tensor in theirs.items():
            if target not in mine or mine[target].shape != tensor.shape:
                expected = _shape(mine[target] if target in mine else None)
                raise UserError(
                    f"task {task.name!r}: offset {kind} of {target} has shape {_shape(tensor)}, but the settings ask "
                    f"for {expected}"
                )
            with torch.no_grad():
                mine[target].copy_(tensor)


def _load(path: str | Path) -> dict:
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


def _task_to_dict(task: TaskSlots) -> dict:
    def plain(s: TaskStatistics | None) -> dict | None:
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


def _canonical(value):
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


def _statistics(stored: dict | None) -> TaskStatistics | None:
    return None if stored is None else TaskStatistics(**stored)


def _stack_keys(keys: list[Tensor | None]) -> Tensor | None:
    if any(key is None for key in keys):
        return None
    return torch.cat([key.detach().cpu() for key in keys], dim=1).unsqueeze(0).contiguous()


def _slice_keys(keys: Tensor | None, span: slice) -> Tensor | None:
    return None if keys is None else keys[0, :, span].clone()


def _refuse_nan(task: TaskSlots, path) -> None:
    for name, tensor in task.tensors().items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} of task {task.name!r} holds NaN or infinite numbers; fit the task again")


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else str(tuple(tensor.shape))
