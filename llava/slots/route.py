"""The decision for a batch of questions: which slots, with which weights, and how it was come by.

Selection and weights are per sample::

    I_b = top_k(score[b] over allowed slots),   w = softmax(score[b, I_b])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llava.slots.queries import Query
from llava.slots.routers import Choice, Router
from llava.slots.unknown import UnknownGate

BEST_TASKS = 5
"""How many of the most probable tasks an answer tells of."""


@dataclass
class Route:
    """``slot_indices`` and ``slot_weights`` ``[batch, k]``; ``task_posterior`` ``[batch, tasks]`` over ``tasks``, where
    the decision looks at tasks.

    ``novelty`` ``[batch]`` where the tasks are calibrated: above 1 a question fits none of them, its weights are 0 and
    the base model answers. ``given``: the task of each row that was given away (``None``: decided freely); such a row
    has no novelty (NaN beside rows that have one). ``starts``: where weight offsets are scoped to the question, the
    first position of each row that they act on, counted from the batch's first; ``None``: on all.
    """

    slot_indices: Tensor
    slot_weights: Tensor
    task_posterior: Tensor | None = None
    tasks: list[str] = field(default_factory=list)
    novelty: Tensor | None = None
    given: list[str | None] | None = None
    starts: list[int] | None = None

    @property
    def unknown(self) -> Tensor | None:
        """Boolean ``[batch]``: questions that fit no known task; ``None`` where nothing was calibrated."""
        return None if self.novelty is None else self.novelty > 1

    def on_host(self) -> Route:
        """The same route with its tensors on the CPU."""
        parts: dict[str, Any] = {name: part.cpu() for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **parts)

    def describe(self, row: int, domain: str | None = None) -> dict[str, Any]:
        """One sample's route as plain values, for an answer's ``metadata``: as short for a thousand tasks as for five.

        Args:
            domain: the task that the row is about, whose probability is told too where it is a known one.
        """
        told: dict[str, Any] = {}
        if self.task_posterior is not None:
            posterior = self.task_posterior[row].tolist()
            best = sorted(range(len(posterior)), key=posterior.__getitem__, reverse=True)[:BEST_TASKS]
            shown = [place for place, task in enumerate(self.tasks) if place in best or task == domain]
            told["task"] = self.tasks[best[0]]
            told["task_posterior"] = {self.tasks[place]: round(posterior[place], 6) for place in shown}
        told["slots"] = self.slot_indices[row].tolist()
        told["weights"] = [round(w, 6) for w in self.slot_weights[row].tolist()]
        if self.given is not None and self.given[row] is not None:
            told["task_given"] = True
        elif self.novelty is not None:
            novelty = float(self.novelty[row])
            told |= {"novelty": round(novelty, 4), "unknown": novelty > 1}
        return told


def choose(router: Router, query: Query, given: Sequence[str | None] | None, k: int) -> Choice:
    """The ``k`` best slots of each row: among its own task's where that is given, else as the router decides.

    The rows that are decided freely are looked at in a batch of their own.
    """
    if given is None:
        return router.choose(query, k)
    free, told = free_rows(given), [row for row, task in enumerate(given) if task is not None]
    tasks = [task for task in given if task is not None]
    if not free:
        return router.choose_within(query, tasks, k)
    parts = router.choose(query.select(free), k), router.choose_within(query.select(told), tasks, k)
    place = torch.tensor(free + told).argsort()
    return Choice(
        *(torch.cat(pair)[place.to(pair[0].device)] for pair in zip(*(vars(p).values() for p in parts), strict=True))
    )


def distance_weights(scores: Tensor) -> Tensor:
    """``s / sum s`` of each row ``[batch, k]``, the prototype's; equal weights where all are 0 (``uniform``)."""
    weights = scores / scores.sum(-1, keepdim=True)
    return torch.where((scores == 0).all(-1, keepdim=True), 1 / scores.shape[-1], weights)


def measure_novelty(
    gate: UnknownGate, query: Query, choice: Choice, tasks: list[str], given: Sequence[str | None] | None
) -> Tensor | None:
    """``[batch]`` novelty of the rows that are decided freely, NaN for the others; ``None`` where there are none."""
    if given is None:
        return gate.novelty(query.evidence(), choice.posterior, tasks)
    free = free_rows(given)
    if not free:
        return None
    found = gate.novelty(query.select(free).evidence(), choice.posterior[free], tasks)
    novelty = found.new_full((len(given),), torch.nan)
    novelty[free] = found
    return novelty


def free_rows(given: Sequence[str | None]) -> list[int]:
    """Rows whose task is not given."""
    return [row for row, task in enumerate(given) if task is None]
