"""How near a question is to every slot's key."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.slots.queries import Query
from llava.slots.row_products import RowProducts


class KeyScores:
    """``s = mean over groups of cos(query, key)``, modalities combined by ``image_weight``, divided by ``tau``.

    Args:
        text_keys, image_keys: ``[groups, pool, part]``; either may be ``None``.

    Attributes:
        table: all keys side by side, ``[pool, dim]`` float64, so that a product with ``unit(query)`` is the
            similarity; ``[0, 0]`` for a pool without keys.

    Raises:
        ValueError: keys that are not finite.
    """

    def __init__(self, text_keys: Tensor | None, image_keys: Tensor | None, image_weight: float, tau: float):
        weights = {"text": 1 - image_weight, "image": image_weight}
        tables = {"text": text_keys, "image": image_keys}
        self.tables = {name: keys for name, keys in tables.items() if keys is not None}
        self.tau = tau
        total = sum(weights[name] for name in self.tables)
        flat = [_flat_keys(keys) * (weights[name] / total) for name, keys in self.tables.items()]
        self.table = torch.cat(flat, dim=1) if flat else torch.zeros(0, 0, dtype=torch.float64)
        self._products = RowProducts(self.table)

    def unit(self, query: Query) -> Tensor:
        """The query's modalities, each group of unit length: ``[batch, dim]`` float64."""
        values = {"text": query.text, "image": query.image}
        if not self.tables:
            raise ValueError("the pool has no keys to compare a query with")
        return torch.cat([_unit_groups(name, values[name], keys) for name, keys in self.tables.items()], dim=1)

    def similarity(self, query: Query) -> Tensor:
        """Mean cosine over groups, modalities combined: ``[batch, pool]`` in ``[-1, 1]``."""
        return self._products(self.unit(query))

    def scores(self, query: Query) -> Tensor:
        """Logits ``[batch, pool]``."""
        return self.similarity(query) / self.tau


def joined(keys: Sequence[Tensor | None]) -> Tensor | None:
    """Keys of several tasks ``[groups, count, part]`` side by side; ``None`` where the tasks have none."""
    given = [key for key in keys if key is not None]
    return torch.cat(given, 1) if given and len(given) == len(keys) else None


def _flat_keys(keys: Tensor) -> Tensor:
    """Unit keys of all groups side by side: ``[groups, pool, part] -> [pool, groups * part]`` float64, over groups."""
    if not torch.isfinite(keys).all():
        raise ValueError("the keys hold NaN or infinite numbers")
    unit = F.normalize(keys.double(), dim=-1)
    return unit.permute(1, 0, 2).flatten(1) / keys.shape[0]


def _unit_groups(name: str, value: Tensor | None, keys: Tensor) -> Tensor:
    """A modality with every group of unit length: ``[batch, groups * part]``, for keys ``[groups, pool, part]``."""
    groups, _, part = keys.shape
    if value is None:
        raise ValueError(f"the pool has {name} keys, but the query has no {name} part")
    if value.shape[-1] != groups * part:
        raise ValueError(f"{name} query has {value.shape[-1]} dimensions, the keys have {groups * part}")
    if not torch.isfinite(value).all():
        raise ValueError(f"the {name} query holds NaN or infinite numbers")
    return F.normalize(value.double().unflatten(-1, (groups, part)), dim=-1).flatten(-2)
