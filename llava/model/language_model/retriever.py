"""The retriever: what a model holds of a pool of slots, and how its questions become queries.

Everything about slots is ``llava.slots.pool.Pool``; here are the text encoder and the router a user chose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from llava.slots.adapter import ADAPTERS, RETRIEVER, Action
from llava.slots.merge import with_offsets
from llava.slots.pool import Pool
from llava.slots.queries import Query
from llava.slots.route import Route
from llava.slots.settings import RetrieverSettings

__all__ = ["Retriever", "RetrieverSettings", "Route"]


@ADAPTERS.register
class Retriever(nn.Module):
    """A pool in a model: the adapter that ships (see ``llava.slots.adapter``), and the base of others.

    Args:
        pool: its tasks are shared with the caller's, so training changes them; those of a key file, which have no
            offsets yet, get initial ones.
        memory: tensors that a stage's method keeps beside the slots; a retriever needs none.

    Attributes:
        encode_text: questions to queries ``[batch, text_dim]``, by the encoder that the keys were fitted with.
        router_name: router in use, by default the settings'.

    Raises:
        UserError: keys or offsets don't have the shapes that the settings ask for.
    """

    name = RETRIEVER

    def __init__(self, pool: Pool, memory: Mapping[str, Tensor] | None = None):
        super().__init__()
        self.pool = pool.with_tasks([with_offsets(task, pool.settings) for task in pool.tasks])
        self.pool.check_shapes()
        self.encode_text: Callable[[Sequence[str]], Tensor] | None = None
        self.router_name = pool.settings.router

    @property
    def settings(self) -> RetrieverSettings:
        return self.pool.settings

    @property
    def active(self) -> bool:
        """Whether any slot may be selected."""
        return self.pool.active

    @property
    def known_tasks(self) -> list[str]:
        """Tasks whose slots may be selected."""
        return [task.name for task in self.pool.selectable]

    @property
    def pool_mask(self) -> Tensor:
        """Boolean ``[pool]``: which slots may be selected."""
        return self.pool.pool_mask

    def train_only(self, task: str) -> list[nn.Parameter]:
        """Make ``task`` the one being trained; returns its offsets, which alone need gradients."""
        return self.pool.train_only(task)

    def encode_questions(self, questions: Sequence[str]) -> Tensor:
        """Text queries ``[batch, text_dim]`` of plain questions."""
        if self.encode_text is None:
            raise ValueError("no text encoder is loaded, so questions cannot be routed; load the model with builder")
        return self.encode_text(questions)

    def decide(self, query: Query, tasks: Sequence[str | None] | None = None) -> Route | None:
        """Choose slots for each question (see ``Pool.route``), by the router in use."""
        return self.pool.route(query, tasks, self.router_name)

    def act(self, route: Route, dtype: torch.dtype) -> Action:
        """The weight offsets of the route's slots."""
        return Action(offset=self.pool(route.slot_indices, route.slot_weights, dtype))
