"""The space in which the closed-form routers see a question, and the sums a task leaves behind in it.

Every function here treats each row by itself: a row's numbers do not depend on its batch.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.slots.row_products import RowProducts

MODALITY_DIM = 512
"""Longer queries are folded to this length, so that a task's statistics stay within a few megabytes."""

RANDOM_FEATURES = 1024
BANDWIDTH = 1.0


@dataclass(frozen=True)
class Query:
    """What is known of each question: ``text`` ``[batch, text_dim]``, ``image`` ``[batch, image_dim]``, or neither."""

    text: Tensor | None = None
    image: Tensor | None = None

    def __len__(self) -> int:
        given = self.text if self.text is not None else self.image
        return 0 if given is None else len(given)

    def select(self, rows: list[int]) -> Query:
        """The queries of some rows."""
        return Query(*(None if part is None else part[rows] for part in (self.text, self.image)))

    def joint(self) -> Tensor:
        """Unit-length modalities side by side, ``[batch, dim]`` in float64: what the closed-form routers see."""
        return self._joint

    @functools.cached_property
    def _joint(self) -> Tensor:
        parts = [F.normalize(part.double(), dim=-1) for part in (self.text, self.image) if part is not None]
        return torch.cat([fold(part) for part in parts], dim=-1)

    def evidence(self) -> Tensor:
        """What shows whether a question fits a task at all, ``[batch, dim]`` float64: its picture, else its words.

        The same words are asked about every organ and device; beside a picture they only blur the answer.
        """
        dim = self.joint().shape[-1] if self.image is None else min(self.image.shape[-1], MODALITY_DIM)
        return self.joint()[:, -dim:]

    def random_features(self) -> Tensor:
        """``sqrt(2 / m) cos(W joint + b)``, ``[batch, m]``: their inner products approach a Gaussian kernel's."""
        joint = self.joint()
        products, bias = _random_waves(joint.shape[-1], joint.device)
        waves = products(joint.float()).double() + bias
        return waves.cos() * math.sqrt(2 / RANDOM_FEATURES)


@dataclass
class TaskStatistics:
    """Sums over one task's queries: ``count``, ``total`` ``[dim]`` and ``scatter`` ``[dim, dim]`` about its mean."""

    count: int
    total: Tensor
    scatter: Tensor

    @property
    def mean(self) -> Tensor:
        return self.total / max(self.count, 1)

    @classmethod
    def of(cls, joint: Tensor) -> TaskStatistics:
        """Statistics of ``[n, dim]`` joint queries (or of their random features)."""
        joint = joint.double()
        centred = joint - joint.mean(0)
        return cls(len(joint), joint.sum(0).float(), (centred.T @ centred).float())


def fold(rows: Tensor) -> Tensor:
    """Rows longer than ``MODALITY_DIM`` with their entries dealt to that many sums, with random signs.

    A random projection: inner products keep their expectation. Cheap, and the same on every machine.
    """
    dim = rows.shape[-1]
    if dim <= MODALITY_DIM:
        return rows
    order, signs = _deal(dim)
    dealt = rows[..., order.to(rows.device)] * signs.to(rows.device)
    dealt = F.pad(dealt, (0, -dim % MODALITY_DIM))
    sums: Tensor = dealt.unflatten(-1, (-1, MODALITY_DIM)).sum(-2)
    return sums


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _deal(dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dim)
    order = torch.randperm(dim, generator=generator)
    return order, torch.randint(0, 2, (dim,), generator=generator).double() * 2 - 1


@functools.lru_cache(maxsize=2)
@torch.inference_mode(False)
def _random_waves(dim: int, device: torch.device) -> tuple[RowProducts, Tensor]:
    generator = torch.Generator().manual_seed(dim)
    weight = torch.randn(RANDOM_FEATURES, dim, generator=generator, dtype=torch.float64) / BANDWIDTH
    bias = torch.rand(RANDOM_FEATURES, generator=generator, dtype=torch.float64) * 2 * torch.pi
    return RowProducts(weight.float().to(device)), bias.to(device)


@dataclass
class Queries:
    """Queries of some rows: ``text`` ``[rows, text_dim]`` and ``image`` ``[rows, image_dim]``, float32, or ``None``."""

    text: Tensor | None
    image: Tensor | None
    encoder: dict[str, Any]  # identity of the text encoder; empty without one

    def __len__(self) -> int:
        given = self.text if self.text is not None else self.image
        return 0 if given is None else len(given)

    def select(self, rows: Tensor) -> Queries:
        """The queries of some of the rows."""
        text, image = (None if part is None else part[rows] for part in (self.text, self.image))
        return Queries(text, image, self.encoder)
