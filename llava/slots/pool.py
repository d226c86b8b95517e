"""The pool: all tasks' slots, and what reads, writes, routes and trains them.

A slot has a **key** (where it lives in query space) and a **weight offset** (low-rank matrices ``A`` and ``B`` per
layer and target projection). Slots belong to tasks; each task's slots are one ``TaskSlots`` with tensors of its own, so
that training, removing or merging a task touches no other task's numbers.

``pool_mask`` says which slots may be selected: in training the current task's alone, at inference those that are
trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava.devices import moved
from llava.slots.file import SlotData, read_slot_data, write_slot_data, write_stage_data
from llava.slots.offsets import WeightOffset
from llava.slots.queries import Query
from llava.slots.resident import Resident, Sides
from llava.slots.route import Route, choose, distance_weights, measure_novelty
from llava.slots.routers import ORACLE, Router, build_router
from llava.slots.settings import RetrieverSettings
from llava.slots.task_slots import TaskSlots
from llava.slots.unknown import UnknownGate
from llava.utils import UserError

SHARED_FORM_LIMIT = 32
"""Up to this many different slots in a batch, plain products over all of them beat a gather per sample."""


@dataclass(frozen=True)
class _Layout:
    """Derived from a pool: each task's slot range, each slot's task and number in it, the mask ``[pool]``, the
    selectable slots and their tasks."""

    ranges: dict[str, range]
    owners: list[tuple[str, int]]
    mask: Tensor
    allowed: Tensor
    allowed_tasks: dict[str, TaskSlots]


class Pool(nn.Module):
    """Tasks in slot order, with the settings and the base model they belong to.

    Args:
        settings: what the tasks share. tasks: in any order. base: ``path`` and ``fingerprint`` of the base model.
        prompt: how the tasks' questions are asked; empty where it is not known.
        adapter: what acts on a model with these slots (see ``adapter``); empty for the retriever.

    Raises:
        UserError: two tasks of one name.
    """

    def __init__(
        self,
        settings: RetrieverSettings,
        tasks: Iterable[TaskSlots] = (),
        base: dict[str, Any] | None = None,
        prompt: dict[str, Any] | None = None,
        adapter: str = "",
    ):
        super().__init__()
        self.settings, self.base, self.prompt, self.adapter = settings, base or {}, prompt or {}, adapter
        self.training_task: str | None = None
        self.slots = nn.ModuleDict()
        self.here: Tensor
        self.register_buffer("here", torch.zeros(1), persistent=False)  # moves with the model
        self.changed()
        for task in sorted(tasks, key=lambda task: task.start):
            self.add(task)

    @classmethod
    def read(cls, path: str | Path) -> Pool:
        """The pool of a slot file, or of a stage's ``slots.pth``; ``UserError`` names the file and what is wrong."""
        return cls(*read_slot_data(path))

    def write(self, path: str | Path) -> None:
        """Write a slot file, atomically; equal pools give equal bytes, whatever made them."""
        write_slot_data(path, self._data())

    def write_stage(self, path: Path, earlier: Iterable[Path] = ()) -> dict[str, str]:
        """Write the ``slots.pth`` of a new stage folder and a file of each task; see ``file.write_stage_data``."""
        return write_stage_data(path, self._data(), earlier)

    def _data(self) -> SlotData:
        return SlotData(self.settings, self.tasks, self.base, self.prompt, self.adapter)

    # -- tasks -----------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> list[TaskSlots]:
        """The tasks' slots, in slot order."""
        return list(self.slots.values())  # type: ignore[arg-type]

    @property
    def names(self) -> list[str]:
        """The tasks' names, in slot order."""
        return [task.name for task in self.tasks]

    def task(self, name: str) -> TaskSlots:
        """The slots of a task; ``UserError`` if the pool has none."""
        if f"task:{name}" not in self.slots:
            raise UserError(f"no slots for task {name!r}; the pool knows {self.names}")
        return self.slots[f"task:{name}"]  # type: ignore[return-value]

    def with_tasks(self, tasks: Iterable[TaskSlots]) -> Pool:
        """A pool of other tasks with the same settings, base and prompt; the tasks themselves are shared."""
        return Pool(self.settings, tasks, self.base, self.prompt, self.adapter)

    def add(self, task: TaskSlots) -> TaskSlots:
        """Take a task's slots in, at their place in slot order."""
        if f"task:{task.name}" in self.slots:
            raise UserError(f"the pool already has slots for task {task.name!r}")
        later = list(takewhile(lambda other: other.start > task.start, reversed(self.tasks)))
        self.slots[f"task:{task.name}"] = task
        for other in reversed(later):  # a ModuleDict keeps the order of insertion
            self.slots[f"task:{other.name}"] = self.slots.pop(f"task:{other.name}")
        self.changed()
        return task

    def append(self, name: str, count: int) -> TaskSlots:
        """Take ``count`` empty slots of a new task in, after all others."""
        start = max((task.stop for task in self.tasks), default=0)
        return self.add(TaskSlots.empty(self.settings, name, start, count))

    def remove(self, name: str) -> None:
        """Drop a task: afterwards the pool is, bit for bit, one that never had it."""
        self.task(name)
        del self.slots[f"task:{name}"]
        self.changed()

    def changed(self) -> None:
        """Forget what was derived from the pool (after keys, statistics, tasks or their state change)."""
        self._routers: dict[str, Router] = {}
        self._layout: _Layout | None = None
        self._gate: list[UnknownGate | None] = []  # empty until it is asked for
        self._tables: Resident | None = None

    def check_shapes(self) -> None:
        """``UserError`` naming the first task whose tensors don't fit the settings."""
        for task in self.tasks:
            task.check(self.settings)

    # -- slots -----------------------------------------------------------------------------------------------------

    def layout(self) -> _Layout:
        """Where each task's slots stand and which may be selected; worked out once per change of the pool."""
        if self._layout is None:
            ranges, start = {}, 0
            mask: list[bool] = []
            owners: list[tuple[str, int]] = []
            allowed_tasks: dict[str, TaskSlots] = {}
            for task in self.tasks:
                allowed = task.name == self.training_task if self.training_task else task.trained
                ranges[task.name] = range(start, start + task.count)
                mask += [allowed] * task.count
                owners += [(task.name, number) for number in range(task.count)]
                allowed_tasks |= {task.name: task} if allowed else {}
                start += task.count
            with torch.inference_mode(False):
                selectable = torch.tensor(mask, dtype=torch.bool)
                self._layout = _Layout(ranges, owners, selectable, selectable.nonzero().flatten(), allowed_tasks)
        return self._layout

    def slot_range(self, name: str) -> range:
        """Places of a task's slots in the pool, which has no gaps."""
        self.task(name)
        return self.layout().ranges[name]

    @property
    def size(self) -> int:
        """How many slots there are."""
        return len(self.layout().mask)

    @property
    def pool_mask(self) -> Tensor:
        """Boolean ``[pool]``: which slots may be selected."""
        return self.layout().mask

    @property
    def selectable(self) -> list[TaskSlots]:
        """Tasks whose slots may be selected, in slot order."""
        return list(self.layout().allowed_tasks.values())

    @property
    def active(self) -> bool:
        """Whether any slot may be selected."""
        return bool(self.layout().allowed_tasks)

    # -- training --------------------------------------------------------------------------------------------------

    def train_only(self, name: str) -> list[nn.Parameter]:
        """Make a task the one being trained: its offsets need gradients, nothing else in the pool does."""
        mine = self.task(name)
        for task in self.tasks:
            task.requires_grad_(task is mine)
            task.stays = False
        self.training_task = name
        self.to(self.device)
        return list(mine.parameters())

    def finish_training(self) -> None:
        """Mark the current task's slots as trained and free the pool for routing."""
        if self.training_task is not None:
            self.task(self.training_task).trained = True
            self.training_task = None
        self.requires_grad_(False)
        for task in self.tasks:
            task.stays = True
        self.changed()

    # -- routing ---------------------------------------------------------------------------------------------------

    def router(self, name: str | None = None) -> Router:
        """A router over the selectable slots; masked slots take no part in any router's arithmetic.

        Without a name the settings'. While a task trains its own keys decide.
        """
        name = "keys" if self.training_task else name or self.settings.router
        if name not in self._routers:
            with torch.inference_mode(False):  # what is kept must serve later calls with gradients too
                self._routers[name] = build_router(name, self.settings, self.selectable)
        return self._routers[name]

    def route(self, query: Query, tasks: Sequence[str | None] | None = None, router: str | None = None) -> Route:
        """Choose slots for each sample.

        Args:
            query: with the parts that the settings use.
            tasks: the true task of each sample (oracle): only its slots compete, by their keys. ``None`` in a row: the
                router decides, as if the row were in a batch of such rows.
            router: name of the router, by default the settings'.

        Raises:
            ValueError: fewer allowed slots than ``top_k``, an unknown task, a query of another dimension or missing.
        """
        given = None if tasks is None or self.training_task or not any(tasks) else list(tasks)
        name = router or self.settings.router
        if name == ORACLE:
            if not self.training_task and (given is None or None in given):
                raise ValueError("the oracle router needs the task of every question (--task-id, or the rows' domain)")
            name = "keys"
        chooser, k = self.router(name), self.settings.top_k
        self._check_top_k(given or [])
        query = Query(  # on the host, where the keys are: a batch of questions is too little work for a GPU
            text=query.text.cpu() if self.settings.uses_text and query.text is not None else None,
            image=query.image.cpu() if self.settings.uses_images and query.image is not None else None,
        )
        choice = choose(chooser, query, given, k)
        best = choice.scores
        weights = best.softmax(-1) if self.settings.weighting == "softmax" else distance_weights(best)
        novelty = None
        if (gate := self.unknown_gate()) is not None and chooser.judges_tasks:
            novelty = measure_novelty(gate, query, choice, chooser.tasks, given)
        if novelty is not None:
            weights = weights.masked_fill(novelty[:, None] > 1, 0)  # the offset is exactly zero: the base answers
        slots = self.layout().allowed.to(choice.slots.device)[choice.slots]
        return Route(slots, weights.float(), choice.posterior, chooser.tasks, novelty, given)

    def _check_top_k(self, given: Sequence[str | None]) -> None:
        k, layout = self.settings.top_k, self.layout()
        if len(layout.allowed) < k:
            raise ValueError(f"top_k is {k}, but only {len(layout.allowed)} slots may be selected")
        for name, task in layout.allowed_tasks.items():
            if name in given and task.count < k:
                raise ValueError(f"top_k is {k}, but task {name!r} has {task.count} slots")

    def unknown_gate(self) -> UnknownGate | None:
        """What tells unknown questions; ``None`` in training, or where a selectable task was not calibrated."""
        if not self._gate:
            extents = {task.name: task.extent for task in self.selectable if task.extent is not None}
            off = len(extents) < len(self.selectable) or self.training_task or not self.settings.unknown_share
            with torch.inference_mode(False):
                self._gate.append(None if off else UnknownGate(extents, self.settings.unknown_share))
        return self._gate[0]

    # -- offsets ---------------------------------------------------------------------------------------------------

    def forward(self, slot_indices: Tensor, slot_weights: Tensor, dtype: torch.dtype) -> WeightOffset:
        """The weight offsets of a batch, for all layers, on the pool's device.

        Args:
            slot_indices, slot_weights: ``[batch, k]`` of a route. dtype: of the hidden states.
        """
        chosen: list[list[int]] = slot_indices.tolist()
        if self.training_task is not None:
            used = list(self.slot_range(self.training_task))
        else:
            used = sorted({slot for row in chosen for slot in row})
        weights = slot_weights.to(dtype) * self.settings.scale  # [batch, k]
        if len(used) > SHARED_FORM_LIMIT:
            sides = self._take([slot for row in chosen for slot in row], dtype)
            return _per_sample(sides, moved(weights.repeat_interleave(self.settings.rank, dim=1), self.device))
        local = torch.tensor([[used.index(slot) for slot in row] for row in chosen]).to(weights.device)
        gate = weights.new_zeros(len(chosen), len(used)).scatter_add(1, local, weights)
        gate = gate.repeat_interleave(self.settings.rank, dim=1)  # [batch, used * rank]
        return _shared(self._take(used, dtype), moved(gate, self.device))

    def _take(self, slots: list[int], dtype: torch.dtype) -> Sides:
        """The offsets of some slots, which may repeat; tasks without one of them are not touched."""
        places = [self.layout().owners[slot] for slot in slots]
        tasks = {name: self.task(name) for name, _ in places}
        if not any(parameter.requires_grad for task in tasks.values() for parameter in task.parameters()):
            if self._tables is None:
                self._tables = Resident(self.settings, self.size)
            return self._tables.take(tasks, places, self.device, dtype)
        starts, parts, start = {}, [], 0
        for name, task in tasks.items():
            starts[name], start = start, start + task.count
            parts.append(task(self.settings.targets, dtype))
        rows = [starts[name] + number for name, number in places]
        sides = [torch.cat(part, dim=1) if len(part) > 1 else part[0] for part in zip(*parts, strict=True)]
        if rows != list(range(start)):
            wanted = moved(torch.tensor(rows), sides[0].device)
            sides = [side.index_select(1, wanted) for side in sides]
        sides = [side.to(self.device) for side in sides]
        return {target: (sides[2 * n], sides[2 * n + 1]) for n, target in enumerate(self.settings.targets)}

    @property
    def device(self) -> torch.device:
        """Where the offsets act."""
        return self.here.device

    def _apply(self, fn: Any, recurse: bool = True) -> Pool:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.changed()
        return self


def _shared(sides: Sides, gate: Tensor) -> WeightOffset:
    """Products over all slots in use, with a ``gate`` ``[batch, m]`` that is 0 where a sample did not select one."""
    down, up = ({t: pair[n].flatten(1, 2).unsqueeze(1) for t, pair in sides.items()} for n in (0, 1))
    return WeightOffset(down, up, gate.unsqueeze(1))


def _per_sample(sides: Sides, gate: Tensor) -> WeightOffset:
    """Each sample's own slots, ``[layers, batch * k, rank, features]``, and their weights ``[batch, k * rank]``."""
    rows = len(gate)
    down, up = ({t: pair[n].unflatten(1, (rows, -1)).flatten(2, 3) for t, pair in sides.items()} for n in (0, 1))
    return WeightOffset(down, up, gate.unsqueeze(1))
