"""Routes that outlive the call that decided them, so that no later call is the base model by mistake.

A route is decided once, at a prompt's prefill. What comes later has no question any more:

- **a decoding step** has a cache: the prefill leaves its ``Decision`` and its padding on the cache object, which takes
  them along through beams, picked and reordered rows, and deep copies;
- **the second of two steps** (``prepare_inputs_labels_for_multimodal``, then ``model(inputs_embeds=...)``) has
  embeddings: ``EmbeddingRoutes`` knows the routes of those that were handed out, by their content, so that a clone, a
  cast to a wider type, a row of the batch or a leaf of another graph is known too.

Nothing here belongs to a call or a thread that can be mistaken for another.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llava.slots.adapter import Action, Adapter
from llava.slots.names import QUESTION
from llava.slots.offsets import WeightOffset
from llava.slots.route import Route

NO_ROUTE = "none"
"""Given as ``route``: the base model answers, whatever adapter is attached."""
_REMEMBERED_ROWS = 4096
_CARRIED = "_llava_prefill"


class Decision:
    """A route as it holds from prefill to the last step; without one the base model answers.

    Args:
        route: of each question. adapter: that decided it, and acts on it.
    """

    def __init__(self, route: Route | None, adapter: Adapter | None) -> None:
        self.route, self.adapter = route, adapter
        self._ready: dict[tuple[int, torch.dtype], Action] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Decision:
        return self  # of a copied cache: the adapter, a part of the model, is not copied with it

    def action(self, rows: int, dtype: torch.dtype) -> Action:
        """What the route does to ``rows`` rows: its own number, or a multiple where each question has several beams.

        Worked out once, but with gradients at every call.

        Raises:
            ValueError: another number of rows.
        """
        if self.route is None or self.adapter is None:
            return Action()
        found = self._ready.get((rows, dtype))
        if found is None:
            found = self.adapter.act(self._of(self.route, rows), dtype)
            if not torch.is_grad_enabled():
                self._ready = {(rows, dtype): found}
        return found

    @property
    def of_question(self) -> bool:
        """Whether its offsets act behind a row's last picture alone."""
        settings = None if self.route is None or self.adapter is None else self.adapter.settings
        return settings is not None and settings.offset_scope == QUESTION and bool(settings.targets)

    def starting(self, starts: Sequence[int] | None) -> Decision:
        """The decision for a batch whose rows' last pictures end before the positions ``starts``."""
        if not self.of_question or self.route is None:
            return self
        found = Decision(replace(self.route, starts=None if starts is None else list(starts)), self.adapter)
        found._ready = self._ready
        return found

    def placed(self, offset: WeightOffset | None, rows: int, new: int, past: int) -> WeightOffset | None:
        """``offset`` as it acts on ``new`` positions behind ``past`` cached ones."""
        if offset is None or self.route is None or self.route.starts is None or past >= max(self.route.starts):
            return offset
        starts = torch.tensor(self.route.starts, device=offset.gate.device)
        starts = starts.repeat_interleave(beams(rows, len(starts), "a route"))
        places = torch.arange(past, past + new, device=starts.device)
        return replace(offset, where=(places >= starts[:, None])[..., None])

    def picked(self, rows: Tensor, width: int) -> Decision:
        """The decision for ``rows`` of a batch of ``width``, in their order."""
        if self.route is None:
            return self
        whole = self._of(self.route, width)
        starts = None if whole.starts is None else [whole.starts[row] for row in rows.tolist()]
        rows = rows.to(whole.slot_indices.device)
        return Decision(Route(whole.slot_indices[rows], whole.slot_weights[rows], starts=starts), self.adapter)

    def _of(self, route: Route, rows: int) -> Route:
        if rows == len(route.slot_indices):
            return route
        times = beams(rows, len(route.slot_indices), "a route")
        starts = None if route.starts is None else [start for start in route.starts for _ in range(times)]
        slots, weights = (part.repeat_interleave(times, 0) for part in (route.slot_indices, route.slot_weights))
        return Route(slots, weights, starts=starts)


def beams(rows: int, questions: int, what: str) -> int:
    """How often each of ``questions`` stands in ``rows`` rows; ``ValueError`` where that is no whole number."""
    if rows < questions or rows % questions:
        raise ValueError(f"{what} of {questions} question(s) does not fit a batch of {rows} row(s)")
    return rows // questions


# -- caches ------------------------------------------------------------------------------------------------------------


@dataclass
class Prefill:
    """What a cache carries to its later steps: the decision, and which of the first positions are no padding."""

    decision: Decision
    mask: Tensor | None

    def cut(self, length: int) -> Prefill:
        """Of a cache that was cropped to ``length`` positions."""
        return self if self.mask is None else Prefill(self.decision, self.mask[:, :length])

    def picked(self, rows: Tensor, width: int) -> Prefill:
        """Of a cache that had ``width`` rows and has now ``rows`` of them."""
        mask = self.mask
        if mask is not None:
            mask = mask.repeat_interleave(beams(width, len(mask), "the mask of a cache"), 0)[rows.to(mask.device)]
        return Prefill(self.decision.picked(rows, width), mask)


def cached_length(cache: Any) -> int:
    """Positions in a cache; 0 for none and for an empty one, which is what a prefill is given."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


class _Followed:
    """Mix-in of a cache that carries a ``Prefill``: where its rows are picked, so are the route's and the mask's."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._follow(super().reorder_cache, beam_idx)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> None:
        self._follow(super().batch_select_indices, indices)  # type: ignore[misc]

    def _follow(self, pick: Callable[[Tensor], None], rows: Tensor) -> None:
        before, width = carried(self), _width(self)
        pick(rows)
        if before is not None and width:
            setattr(self, _CARRIED, before.picked(rows, width))

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        _, (kind, *arguments), *state = reduced
        return (_remade, (kind.__mro__[2], *arguments), *state)


@functools.cache
def _followed(kind: type) -> type:
    """A class of caches whose rows are followed; made from theirs, since a cache is its caller's."""
    return type(kind.__name__, (_Followed, kind), {})


def _remade(kind: type, *arguments: Any) -> Any:
    """A copied or unpickled cache, before its state."""
    followed = _followed(kind)
    return followed.__new__(followed, *arguments)


def _width(cache: Any) -> int:
    """Rows of a cache, 0 where it is empty."""
    keys = [layer.keys for layer in getattr(cache, "layers", ()) if getattr(layer, "keys", None) is not None]
    return len(keys[0]) if keys else 0


def carry(cache: Any, prefill: Prefill) -> None:
    """Leave on a cache what its later steps need."""
    if cache is None:
        return
    setattr(cache, _CARRIED, prefill)
    if hasattr(cache, "batch_select_indices") and not isinstance(cache, _Followed):
        kind: Any = type(cache)
        cache.__class__ = _followed(kind)


def carried(cache: Any) -> Prefill | None:
    """What the prefill left on a cache; ``None`` where another program filled it."""
    found: Prefill | None = getattr(cache, _CARRIED, None)
    return found


def cache_of(out: Any, given: Any) -> Any:
    """The cache of a forward pass: the one that it was given, or that its output holds."""
    if given is not None:
        return given
    if isinstance(out, tuple):
        return next((part for part in out if hasattr(part, "get_seq_length")), None)
    return getattr(out, "past_key_values", None)


def continue_mask(
    before: Tensor, rows: int, new: int, mask: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mask ``[rows, all]`` and positions ``[rows, new]`` of a step after a prefill with pictures.

    Args:
        before: ``[questions, length]`` of the cached positions, pictures' features included.
        mask, positions: the caller's. They are believed where they count the pictures' features too.
    """
    times = beams(rows, len(before), "the mask of a cache")
    before = before.repeat_interleave(times, 0)
    if mask is None or mask.shape[1] != before.shape[1] + new:
        fresh = before.new_ones(rows, new) if mask is None else mask[:, -new:].to(before)
        positions = None if mask is not None else positions
        mask = torch.cat([before, fresh], 1)
    if positions is None:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -new:]
    return mask, positions


# -- embeddings --------------------------------------------------------------------------------------------------------


class EmbeddingRoutes:
    """Routes by the content of the rows of embeddings, and how far behind its begin a row's last picture ends.

    The oldest are forgotten. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._rows: OrderedDict[tuple[int, ...], tuple[Route | None, int, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> EmbeddingRoutes:
        return EmbeddingRoutes()  # those of another model

    def __reduce__(self) -> tuple[type[EmbeddingRoutes], tuple[()]]:
        return EmbeddingRoutes, ()

    def forget(self) -> None:
        """Know no embeddings any more."""
        with self._lock:
            self._rows.clear()

    def remember(self, embeds: Tensor, route: Route | None, starts: Sequence[int]) -> None:
        """Know the rows of ``embeds`` ``[batch, length, hidden]`` as routed by ``route``, with their last pictures in
        front of the positions ``starts``."""
        marks = [_fingerprint(row) for row in embeds]
        with self._lock:
            for number, ((mark, first), start) in enumerate(zip(marks, starts, strict=True)):
                self._rows[mark] = (route, number, start - first)
                self._rows.move_to_end(mark)
            while len(self._rows) > _REMEMBERED_ROWS:
                self._rows.popitem(last=False)

    def know(self, embeds: Tensor) -> bool:
        """Whether every row of ``embeds`` is remembered."""
        marks = [_fingerprint(row) for row in embeds]
        with self._lock:
            return all(mark in self._rows for mark, _ in marks)

    def starts(self, embeds: Tensor) -> list[int]:
        """The position behind each row's last picture; ``KeyError`` where a row is not known."""
        marks = [_fingerprint(row) for row in embeds]
        with self._lock:
            return [first + self._rows[mark][2] for mark, first in marks]

    def find(self, embeds: Tensor) -> Route | None:
        """The route of ``embeds``, row by row.

        Raises:
            KeyError: a row is not known, or some rows have a route and others none.
        """
        marks = [_fingerprint(row) for row in embeds]
        with self._lock:
            found = [self._rows[mark] for mark, _ in marks]
        routes = [(route, number) for route, number, _ in found if route is not None]
        if not routes:
            return None
        if len(routes) < len(found):
            raise KeyError("some rows have a route and others none")
        return Route(
            torch.stack([route.slot_indices[number] for route, number in routes]),
            torch.stack([route.slot_weights[number] for route, number in routes]),
        )


def _fingerprint(row: Tensor) -> tuple[tuple[int, ...], int]:
    """Integers that tell the content of a row ``[length, hidden]``, wherever it is padded with zeros; and its begin.

    Sums of whole numbers, which are the same on every device and in every order of addition.
    """
    row = row.detach().float()
    filled = row.ne(0).any(-1).nonzero().flatten()
    first = int(filled[0]) if len(filled) else 0
    if len(filled):
        row = row[first : int(filled[-1]) + 1]
    bits = row.contiguous().view(torch.int32).flatten().long()
    place = torch.arange(1, len(bits) + 1, device=bits.device)
    sums = [(bits * (place * odd ^ (place >> 7))).sum() for odd in (0x9E3779B1, 0x85EBCA77)]
    return (len(row), *torch.stack(sums).tolist()), first


# -- threads -----------------------------------------------------------------------------------------------------------


class LastRoute(threading.local):
    """The route of this thread's latest questions. ``known`` says whether it has asked any."""

    route: Route | None = None
    known = False

    def set(self, route: Route | None) -> None:
        self.route, self.known = route, True

    def __deepcopy__(self, memo: dict[int, Any]) -> LastRoute:
        return LastRoute()

    def __reduce__(self) -> tuple[type[LastRoute], tuple[()]]:
        return LastRoute, ()
