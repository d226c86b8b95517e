"""The retriever: what a model holds of a pool of slots, and how its questions become queries.

Everything about slots is ``llava.slots.pool.Pool``; here are the text encoder and the router a user chose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from llava.slots.merge import with_offsets
from llava.slots.offsets import WeightOffset
from llava.slots.pool import Pool
from llava.slots.queries import Query
from llava.slots.route import Route
from llava.slots.settings import RetrieverSettings

__all__ = ["Retriever", "RetrieverSettings", "Route"]


class Retriever(nn.Module):
    """A pool in a model.

    Args:
        pool: its tasks are shared with the caller's, so training changes them; those of a key file, which have no
            offsets yet, get initial ones.
        encode_text: questions to queries ``[batch, text_dim]``, by the encoder that the keys were fitted with.

    Attributes:
        router_name: router in use, by default the settings'.

    Raises:
        UserError: keys or offsets don't have the shapes that the settings ask for.
    """

    def __init__(self, pool: Pool, encode_text: Callable[[Sequence[str]], Tensor] | None = None):
        super().__init__()
        self.pool = pool.with_tasks([with_offsets(task, pool.settings) for task in pool.tasks]).float()
        self.pool.check_shapes()
        self.encode_text = encode_text
        self.router_name = pool.settings.router

    @property
    def settings(self) -> RetrieverSettings:
        return self.pool.settings

    @property
    def active(self) -> bool:
        """Whether any slot may be selected."""
        return self.pool.active

    @property
    def pool_size(self) -> int:
        """How many slots there are."""
        return self.pool.size

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

    def route(
        self, text_query: Tensor | None, image_query: Tensor | None, tasks: Sequence[str | None] | None = None
    ) -> Route:
        """Choose slots for each sample (see ``Pool.route``).

        Args:
            text_query: ``[batch, text_dim]``, needed when the settings use text; ``image_query``:
                ``[batch, image_dim]``, needed when they use images.
            tasks: the true task of a row, given: only its slots compete (oracle); ``None``: the router decides.
        """
        return self.pool.route(Query(text_query, image_query), tasks, self.router_name)

    def forward(self, slot_indices: Tensor, slot_weights: Tensor, dtype: torch.dtype) -> WeightOffset:
        """The weight offsets of a batch for all layers; ``slot_indices``, ``slot_weights``: ``[batch, k]``."""
        return self.pool(slot_indices, slot_weights, dtype)
