"""The offsets that questions use, on the model's device and in its type.

A task's slots stay where they were read, exact; only those that questions use lie on the device, in one table per
target and side, ``[layers, room, rank, features]``. A batch takes its slots out of a table with one ``index_select``,
whose result the projections multiply by as it is. A task comes in when a question first uses it and goes out when the
room is needed and it was used least lately, so that a thousand stored tasks cost the device nothing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llava.devices import moved
from llava.slots.settings import RetrieverSettings
from llava.slots.task_slots import TaskSlots

LIMIT_BYTES = 4 * 2**30
"""For the tables, about 120 tasks of a 7B model's attention outputs; a batch that uses more gets what it needs."""

Sides = dict[str, tuple[Tensor, Tensor]]
"""Per target ``B`` and ``A``, each ``[layers, slots, rank, features]``."""


class Resident:
    """Tables of the slots in use. Safe to use from several threads.

    Args:
        settings: of the pool. total: slots that it has. limit: bytes that the tables may take.
    """

    def __init__(self, settings: RetrieverSettings, total: int, limit: int = LIMIT_BYTES):
        self.settings, self.total, self.limit = settings, total, limit
        self._lock = threading.RLock()
        self._kind: tuple[torch.device, torch.dtype] | None = None
        self._tables: Sides = {}
        self._room = 0
        self._free: list[int] = []
        self._rows: OrderedDict[str, list[int]] = OrderedDict()  # of each task, the least lately used first
        self._states: dict[str, tuple[tuple[int, int], ...]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Resident:
        return Resident(self.settings, self.total, self.limit)  # filled anew, on the copy's device

    def __reduce__(self) -> tuple[type[Resident], tuple[RetrieverSettings, int, int]]:
        return Resident, (self.settings, self.total, self.limit)

    def take(
        self,
        tasks: Mapping[str, TaskSlots],
        places: Sequence[tuple[str, int]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> Sides:
        """New tensors with the offsets of some slots, in the order of ``places``.

        Args:
            tasks: that the slots belong to. places: task and number in it, of each slot; may repeat.
        """
        with self._lock:
            self._make_room(sum(task.count for task in tasks.values()), (device, dtype))
            for name, task in tasks.items():
                self._bring_in(name, task, tasks)
            rows = moved(torch.tensor([self._rows[name][number] for name, number in places]), device)
            return {
                target: (down.index_select(1, rows), up.index_select(1, rows))
                for target, (down, up) in self._tables.items()
            }

    @torch.inference_mode(False)
    def _make_room(self, needed: int, kind: tuple[torch.device, torch.dtype]) -> None:
        """Tables of this kind with room for ``needed`` slots; where there are none, new ones, which are empty."""
        if kind == self._kind and needed <= self._room:
            return
        settings, (device, dtype) = self.settings, kind
        width = sum(in_ + out for in_, out in settings.features.values())
        slot_bytes = max(settings.num_layers * settings.rank * width * dtype.itemsize, 1)
        self._tables = {}  # before new ones are made
        self._kind, self._room = kind, max(needed, min(self.total, self.limit // slot_bytes))
        self._free = list(range(self._room))
        self._rows.clear()
        self._states.clear()
        shape = (settings.num_layers, self._room, settings.rank)
        for target, sides in settings.features.items():
            down, up = (torch.empty(*shape, features, device=device, dtype=dtype) for features in sides)
            self._tables[target] = (down, up)

    @torch.no_grad()
    def _bring_in(self, name: str, task: TaskSlots, wanted: Mapping[str, TaskSlots]) -> None:
        """Have a task's slots in the tables as they are now; room is taken from tasks that are not ``wanted``."""
        if name not in self._rows:
            while len(self._free) < task.count:
                oldest = next(held for held in self._rows if held not in wanted)
                self._free += self._rows.pop(oldest)
                del self._states[oldest]
            self._rows[name], self._free = self._free[: task.count], self._free[task.count :]
        self._rows.move_to_end(name)
        state = tuple(_mark(side[target]) for target in self._tables for side in (task.B, task.A))
        if self._states.get(name) == state:
            return
        assert self._kind is not None  # there is room by now
        device, dtype = self._kind
        rows = moved(torch.tensor(self._rows[name]), device)
        for target, tables in self._tables.items():
            for table, tensor in zip(tables, (task.B[target], task.A[target]), strict=True):
                table.index_copy_(1, rows, tensor.detach().to(device, dtype).transpose(0, 1))
        self._states[name] = state


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Tells whether a tensor is another one, or was written into."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
