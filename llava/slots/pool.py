"""The retriever: a pool of slots, and the route that picks some of them for each question.

A slot has a **key** (where it lives in query space) and a **weight offset** (low-rank matrices ``A`` and ``B`` per
layer and target projection). Slots belong to tasks; each task's slots are one ``SlotBlock`` with tensors of its own,
so that training, removing or merging a task touches no other task's numbers.

``pool_mask`` says which slots may be selected: in training the current task's alone, at inference those that are
trained. Selection and weights are per sample::

    I_b = top_k(score[b] over allowed slots),   w = softmax(score[b, I_b])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from llava.slots.offsets import WeightOffset
from llava.slots.routers import Pool, Query, Router, TaskStatistics, build_router
from llava.slots.settings import RetrieverSettings
from llava.slots.unknown import TaskExtent, UnknownGate

SHARED_FORM_LIMIT = 32
"""Up to this many different slots in a batch, plain products over all of them beat a gather per sample."""


@dataclass
class Route:
    """The decision for a batch: ``slot_indices`` and ``slot_weights`` ``[batch, k]``; ``task_posterior``
    ``[batch, tasks]`` over ``tasks``; ``novelty`` ``[batch]`` where the tasks are calibrated: above 1 a question fits
    none of them, its weights are 0 and the base model answers."""

    slot_indices: Tensor
    slot_weights: Tensor
    task_posterior: Tensor
    tasks: list[str]
    novelty: Tensor | None = None

    @property
    def unknown(self) -> Tensor | None:
        """Boolean ``[batch]``: questions that fit no known task; ``None`` where nothing was calibrated."""
        return None if self.novelty is None else self.novelty > 1

    def describe(self, row: int) -> dict:
        """One sample's route as plain values, for an answer's ``metadata``."""
        posterior = self.task_posterior[row].tolist()
        best = max(range(len(posterior)), key=posterior.__getitem__)
        told = {
            "task": self.tasks[best],
            "task_posterior": {task: round(p, 6) for task, p in zip(self.tasks, posterior, strict=True)},
            "slots": self.slot_indices[row].tolist(),
            "weights": [round(w, 6) for w in self.slot_weights[row].tolist()],
        }
        if self.novelty is not None:
            told |= {"novelty": round(float(self.novelty[row]), 4), "unknown": bool(self.unknown[row])}
        return told


class SlotBlock(nn.Module):
    """One task's slots: ``count`` keys and low-rank offsets.

    Parameters (per target): ``A`` ``[count, layers, rank, out]`` and ``B`` ``[count, layers, rank, in]``; the keys
    ``[groups, count, part]`` and the router's statistics are buffers, fitted in closed form in stage 1.
    """

    def __init__(self, settings: RetrieverSettings, count: int):
        super().__init__()
        self.count, self.trained, self.rank, self.targets = count, False, settings.rank, settings.targets
        shape = (count, settings.num_layers, settings.rank)
        self.A = nn.ParameterDict(
            {
                t: nn.Parameter(torch.zeros(*shape, out), requires_grad=False)
                for t, (_, out) in settings.features.items()
            }
        )
        self.B = nn.ParameterDict(
            {
                t: nn.Parameter(torch.zeros(*shape, in_), requires_grad=False)
                for t, (in_, _) in settings.features.items()
            }
        )
        self.register_buffer("text_keys", _empty_keys(settings.uses_text, settings.text_dim, settings.groups, count))
        self.register_buffer(
            "image_keys", _empty_keys(settings.uses_images, settings.image_dim, settings.groups, count)
        )
        self.statistics: TaskStatistics | None = None
        self.feature_statistics: TaskStatistics | None = None
        self.extent: TaskExtent | None = None

    def init_offsets(self, generator: torch.Generator) -> None:
        """``A = 0`` (an untrained slot changes nothing), ``B`` uniform in ``+-1/sqrt(in)``."""
        with torch.no_grad():
            for target in self.B:
                bound = 1 / math.sqrt(self.B[target].shape[-1])
                values = torch.empty(self.B[target].shape).uniform_(-bound, bound, generator=generator)
                self.B[target].copy_(values)
                self.A[target].zero_()

    def forward(self) -> tuple[Tensor, ...]:
        """All of the block's offsets, ``A`` then ``B`` per target. A call, so that ZeRO-3 gathers the parameters.

        In the order of the settings; a ``ParameterDict`` has its own.
        """
        return tuple(side[target].clone() for target in self.targets for side in (self.A, self.B))


@dataclass(frozen=True)
class PoolLayout:
    """Derived from a pool: each task's slot range, the mask ``[pool]``, the selectable slots and their tasks."""

    ranges: dict[str, range]
    mask: Tensor
    allowed: Tensor
    allowed_tasks: list[str]

    @classmethod
    def of(cls, retriever: Retriever) -> PoolLayout:
        ranges, mask, allowed_tasks, start = {}, [], [], 0
        for task in retriever.tasks:
            block = retriever.block(task)
            allowed = task == retriever.training_task if retriever.training_task else block.trained
            ranges[task] = range(start, start + block.count)
            mask += [allowed] * block.count
            allowed_tasks += [task] * allowed
            start += block.count
        mask = torch.tensor(mask, dtype=torch.bool)
        return cls(ranges, mask, mask.nonzero().flatten(), allowed_tasks)


class Retriever(nn.Module):
    """Keys, weight offsets, ``pool_mask`` and the per-sample route."""

    def __init__(self, settings: RetrieverSettings, counts: dict[str, int] | None = None):
        super().__init__()
        self.settings = settings
        self.blocks = nn.ModuleDict()
        self.training_task: str | None = None
        self.encode_text: Callable[[Sequence[str]], Tensor] | None = None
        self.router_name = settings.router
        self._routers: dict[str, Router] = {}
        self._layout: PoolLayout | None = None
        self._gate: list[UnknownGate | None] = []  # empty until it is asked for
        for task, count in (counts or {}).items():
            self.add_task(task, count)

    # -- the pool --------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> list[str]:
        return [name.removeprefix("task:") for name in self.blocks]

    def block(self, task: str) -> SlotBlock:
        """The slots of ``task``; ``ValueError`` if the pool has none."""
        if f"task:{task}" not in self.blocks:
            raise ValueError(f"no slots for task {task!r}; the pool knows {self.tasks}")
        return self.blocks[f"task:{task}"]

    def add_task(self, task: str, count: int) -> SlotBlock:
        """Append ``count`` slots for a new task."""
        if task in self.tasks:
            raise ValueError(f"the pool already has slots for task {task!r}")
        self.blocks[f"task:{task}"] = SlotBlock(self.settings, count)
        self.changed()
        return self.block(task)

    def remove_task(self, task: str) -> None:
        """Drop a task: afterwards the pool is, bit for bit, one that never had it."""
        self.block(task)
        del self.blocks[f"task:{task}"]
        self.changed()

    def changed(self) -> None:
        """Forget what was derived from the pool (after keys, statistics, tasks or their state change)."""
        self._routers, self._layout, self._gate = {}, None, []

    def layout(self) -> PoolLayout:
        """Where each task's slots stand and which may be selected; worked out once per change of the pool."""
        if self._layout is None:
            self._layout = PoolLayout.of(self)
        return self._layout

    def slot_range(self, task: str) -> range:
        """Pool indices of a task's slots."""
        self.block(task)
        return self.layout().ranges[task]

    @property
    def pool_size(self) -> int:
        return len(self.layout().mask)

    @property
    def pool_mask(self) -> Tensor:
        """Boolean ``[pool]``: which slots may be selected."""
        return self.layout().mask

    @property
    def active(self) -> bool:
        """Whether any slot may be selected."""
        return bool(self.layout().allowed_tasks)

    def train_only(self, task: str) -> list[nn.Parameter]:
        """Make ``task`` the one being trained: its offsets need gradients, nothing else in the pool does."""
        mine = self.block(task)
        for block in self.blocks.values():
            block.requires_grad_(block is mine)
        self.training_task = task
        self.changed()
        return list(mine.parameters())

    def finish_training(self) -> None:
        """Mark the current task's slots as trained and free the pool for routing."""
        if self.training_task is not None:
            self.block(self.training_task).trained = True
            self.training_task = None
        self.requires_grad_(False)
        self.changed()

    # -- routing ---------------------------------------------------------------------------------------------------

    def encode_questions(self, questions: Sequence[str]) -> Tensor:
        """Text queries ``[batch, text_dim]`` of plain questions, by the encoder the keys were fitted with."""
        if self.encode_text is None:
            raise ValueError("no text encoder is loaded, so questions cannot be routed; load the model with builder")
        return self.encode_text(questions)

    def router(self, tasks_given: bool = False) -> Router:
        """The router over the selectable slots; masked slots take no part in any router's arithmetic.

        While a task trains its own keys decide; with ``tasks_given`` the oracle does.
        """
        name = "keys" if self.training_task else "oracle" if tasks_given else self.router_name
        if name not in self._routers:
            self._routers[name] = build_router(name, self._pool())
        return self._routers[name]

    def _pool(self) -> Pool:
        tasks = self.layout().allowed_tasks
        blocks = [self.block(task) for task in tasks]
        return Pool(
            slot_tasks=[task for task, block in zip(tasks, blocks, strict=True) for _ in range(block.count)],
            text_keys=torch.cat([b.text_keys for b in blocks], 1) if blocks and self.settings.uses_text else None,
            image_keys=torch.cat([b.image_keys for b in blocks], 1) if blocks and self.settings.uses_images else None,
            statistics={t: b.statistics for t, b in zip(tasks, blocks, strict=True) if b.statistics is not None},
            feature_statistics={
                t: b.feature_statistics for t, b in zip(tasks, blocks, strict=True) if b.feature_statistics is not None
            },
            image_weight=self.settings.image_weight,
            tau=self.settings.tau,
        )

    def route(self, text_query: Tensor | None, image_query: Tensor | None, tasks: Sequence[str] | None = None) -> Route:
        """Choose slots for each sample.

        Args:
            text_query: ``[batch, text_dim]``, needed when the settings use text; ``image_query``:
                ``[batch, image_dim]``, needed when they use images.
            tasks: the true task of each sample; given, only its slots compete (oracle).

        Raises:
            ValueError: fewer allowed slots than ``top_k``, an unknown task, a query of another dimension or missing.
        """
        router = self.router(tasks_given=tasks is not None)
        allowed = self.layout().allowed
        if len(allowed) < self.settings.top_k:
            raise ValueError(f"top_k is {self.settings.top_k}, but only {len(allowed)} slots may be selected")
        for task in set(tasks or ()):
            if task in self.layout().allowed_tasks and self.block(task).count < self.settings.top_k:
                raise ValueError(
                    f"top_k is {self.settings.top_k}, but task {task!r} has {self.block(task).count} slots"
                )
        query = Query(
            text=text_query if self.settings.uses_text else None,
            image=image_query if self.settings.uses_images else None,
            tasks=None if tasks is None else list(tasks),
        )
        choice = router.choose(query, self.settings.top_k)
        best = choice.scores
        weights = best.softmax(-1) if self.settings.weighting == "softmax" else best / best.sum(-1, keepdim=True)
        novelty = None
        if (gate := self.unknown_gate()) is not None and router.judges_tasks:
            novelty = gate.novelty(query.evidence(), choice.posterior, router.tasks)
            weights = weights.masked_fill(novelty[:, None] > 1, 0)  # the offset is exactly zero: the base answers
        slots = allowed.to(choice.slots.device)[choice.slots]
        return Route(slots, weights.float(), choice.posterior, router.tasks, novelty)

    def unknown_gate(self) -> UnknownGate | None:
        """What tells unknown questions; ``None`` in training, or where a selectable task was not calibrated."""
        if not self._gate:
            blocks = {task: self.block(task) for task in self.layout().allowed_tasks}
            extents = {task: block.extent for task, block in blocks.items() if block.extent is not None}
            off = len(extents) < len(blocks) or self.training_task or not self.settings.unknown_share
            self._gate.append(None if off else UnknownGate(extents, self.settings.unknown_share))
        return self._gate[0]

    # -- offsets ---------------------------------------------------------------------------------------------------

    def forward(self, slot_indices: Tensor, slot_weights: Tensor, dtype: torch.dtype) -> WeightOffset:
        """The weight offsets of a batch, for all layers.

        Args:
            slot_indices, slot_weights: ``[batch, k]`` of a route. dtype: of the hidden states.
        """
        if self.training_task is not None:
            used = list(self.slot_range(self.training_task))
        else:
            used = sorted(set(slot_indices.flatten().tolist()))
        tensors = self._gather(used)  # per target: A, B [slots, layers, rank, features]
        place = torch.full((self.pool_size,), -1, dtype=torch.long, device=slot_indices.device)
        place[torch.tensor(used, device=slot_indices.device)] = torch.arange(len(used), device=slot_indices.device)
        local = place[slot_indices]  # [batch, k] positions among the used slots
        weights = slot_weights.to(dtype) * self.settings.scale
        if len(used) <= SHARED_FORM_LIMIT:
            return self._shared_form(tensors, local, weights, len(used), dtype)
        return self._gathered_form(tensors, local, weights, dtype)

    def _gather(self, used: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
        """``A`` and ``B`` of the used slots, block by block; blocks without a used slot are not touched."""
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {target: [] for target in self.settings.targets}
        for task, slots in self.layout().ranges.items():
            mine = [index - slots.start for index in used if index in slots]
            if not mine:
                continue
            tensors = self.block(task)()
            for number, target in enumerate(self.settings.targets):
                a, b = tensors[2 * number], tensors[2 * number + 1]
                whole = len(mine) == len(slots)
                parts[target].append((a, b) if whole else (a[mine], b[mine]))
        return {
            target: tuple(torch.cat(side) if len(side) > 1 else side[0] for side in zip(*pairs, strict=True))
            for target, pairs in parts.items()
        }

    def _shared_form(self, tensors, local: Tensor, weights: Tensor, count: int, dtype: torch.dtype) -> WeightOffset:
        gate = torch.zeros(len(local), count, dtype=dtype, device=local.device)
        gate = gate.scatter_add(1, local, weights).repeat_interleave(self.settings.rank, dim=1)
        down, up = {}, {}
        for target, (a, b) in tensors.items():
            down[target] = rearrange(b.to(dtype), "slots layers rank features -> layers 1 features (slots rank)")
            up[target] = rearrange(a.to(dtype), "slots layers rank features -> layers 1 (slots rank) features")
        return WeightOffset(down, up, gate.unsqueeze(1))

    def _gathered_form(self, tensors, local: Tensor, weights: Tensor, dtype: torch.dtype) -> WeightOffset:
        gate = weights.repeat_interleave(self.settings.rank, dim=1)  # [batch, k * rank]
        down, up = {}, {}
        for target, (a, b) in tensors.items():
            down[target] = rearrange(b.to(dtype)[local], "b k layers rank features -> layers b features (k rank)")
            up[target] = rearrange(a.to(dtype)[local], "b k layers rank features -> layers b (k rank) features")
        return WeightOffset(down, up, gate.unsqueeze(1))


def _empty_keys(wanted: bool, dim: int | None, groups: int, count: int) -> Tensor | None:
    return torch.zeros(groups, count, dim // groups) if wanted and dim else None
