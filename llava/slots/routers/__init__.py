"""Routers: how well each slot fits a question. A router is a task classifier times the key scores.

One interface: ``router.scores(query) -> [batch, pool]`` in logits, so that ``softmax`` over a sample's selected slots
gives their weights. Every score of a sample depends on that sample alone.
``router.choose(query, k)`` gives the best slots and the task posterior, without looking at every slot where it can.

- ``keys``: the prompt keys alone.
- ``gaussian`` (default) and ``ridge``: closed-form task classifiers; the keys choose among a task's slots.
- ``uniform``: every slot alike. ``random``: a seeded random choice (ablation).
- ``batch_vote``: one decision for the whole batch, as published systems do; for fidelity studies only.

Giving a question's task away (``oracle``) is no router but a mask over the key scores: see ``Pool.route``.

A new router is one class with a ``name``: in a module of this package, or in a plug-in file (``llava.registry``)::

    from llava.slots.routers import ROUTERS, Router

    @ROUTERS.register
    class Nearest(Router):
        name = "nearest"

        def scores(self, query):
            return self.keys.similarity(query)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.slots.key_scores import KeyScores, joined
from llava.slots.names import ORACLE, ROUTERS
from llava.slots.queries import Query
from llava.slots.settings import RetrieverSettings
from llava.slots.task_slots import TaskSlots

__all__ = ["ORACLE", "ROUTERS", "Choice", "Router", "build_router"]


@dataclass(frozen=True)
class Choice:
    """The ``k`` best slots of each sample: ``scores`` and ``slots`` ``[batch, k]``, best first, and the probability
    ``posterior`` ``[batch, tasks]`` of the router's tasks."""

    scores: Tensor
    slots: Tensor
    posterior: Tensor


class Router:
    """Base of all routers; subclasses give ``scores``.

    Args:
        settings: of the pool. slots: the tasks that may be selected, in slot order. seed: of random decisions.

    Attributes:
        tasks: the tasks' names. slot_tasks: the task of each slot. slot_place: its place in ``tasks``, ``[pool]``.
    """

    name = ""
    judges_tasks = False
    """Whether its task posterior says something about the question."""
    depends_on_batch = False
    """Whether a question's scores depend on the ones beside it."""

    def __init__(self, settings: RetrieverSettings, slots: Sequence[TaskSlots], seed: int = 0):
        self.settings, self.slots, self.seed = settings, list(slots), seed
        self.tasks = [task.name for task in self.slots]
        self.slot_tasks = [task.name for task in self.slots for _ in range(task.count)]
        places = [place for place, task in enumerate(self.slots) for _ in range(task.count)]
        self.slot_place = torch.tensor(places, dtype=torch.long, device=self.device)
        self.prepare()

    @property
    def device(self) -> torch.device:
        """Where the keys are."""
        keys = [key for task in self.slots[:1] for key in (task.text_keys, task.image_keys) if key is not None]
        return keys[0].device if keys else torch.device("cpu")

    @functools.cached_property
    @torch.inference_mode(False)
    def keys(self) -> KeyScores:
        """How near a question is to each slot."""
        settings = self.settings
        text = joined([task.text_keys for task in self.slots]) if settings.uses_text else None
        image = joined([task.image_keys for task in self.slots]) if settings.uses_images else None
        return KeyScores(text, image, settings.image_weight, settings.tau)

    def prepare(self) -> None:
        """Work done once per pool."""

    def scores(self, query: Query) -> Tensor:
        """Logits ``[batch, pool]``."""
        raise NotImplementedError(f"{type(self).__name__} must define scores")

    def choose(self, query: Query, k: int) -> Choice:
        """The ``k`` best slots; a task's probability is the softmax of all scores, summed over its slots.

        Raises:
            ValueError: the pool has fewer slots, or the query lacks what its keys are compared with.
        """
        self._check(k)
        return self.best_of(self.scores(query), k)

    def _check(self, k: int) -> None:
        """Refuse more slots than there are."""
        if k > len(self.slot_tasks):
            raise ValueError(f"{k} slots are asked for, but the pool has {len(self.slot_tasks)}")

    def best_of(self, scores: Tensor, k: int) -> Choice:
        """The same for scores ``[batch, pool]``."""
        best, slots = scores.topk(k, dim=-1)
        posterior = scores.new_zeros(len(scores), len(self.tasks))
        place = self.slot_place.expand_as(scores)
        return Choice(best, slots, posterior.scatter_add(1, place, scores.softmax(-1)))

    def choose_within(self, query: Query, given: Sequence[str], k: int) -> Choice:
        """The ``k`` best slots of each row's own task, by the keys alone.

        Raises:
            ValueError: a task that has no selectable slots.
        """
        unknown = sorted(set(given) - set(self.tasks))
        if unknown:
            raise ValueError(f"no slots for task {unknown[0]!r}; the pool knows {sorted(self.tasks)}")
        places = torch.tensor([self.tasks.index(task) for task in given], device=self.slot_place.device)
        mine = self.slot_place == places[:, None]  # [batch, pool]
        scores = self.keys.scores(query) if query.text is not None or query.image is not None else mine.double()
        return self.best_of(scores.masked_fill(~mine, -torch.inf), k)


def build_router(name: str, settings: RetrieverSettings, slots: Sequence[TaskSlots], seed: int = 0) -> Router:
    """The router called ``name`` over the slots of some tasks. ``ValueError``: an unknown name, or no slots."""
    router: type[Router] = ROUTERS.get(name)
    if not slots:
        raise ValueError("the pool is empty: there is no slot to route to")
    return router(settings, slots, seed)
