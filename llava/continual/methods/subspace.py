"""Directions of a space of features: those that hold most of a matrix, and what is left beside them.

A set of directions is a matrix ``[features, count]`` with orthonormal columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOTHING = 1e-5
"""Singular values below this share of a matrix's norm are rounding."""


def principal(weight: Tensor, share: float) -> Tensor:
    """The fewest input directions that hold a share of ``||W||^2``, of a weight ``[out, in]``."""
    rows: Tensor
    _, values, rows = torch.linalg.svd(weight.float(), full_matrices=False)
    return rows[: _fewest(values.square(), 0.0, share)].T


def extended(directions: Tensor, moments: Tensor, share: float) -> Tensor:
    """``directions`` and the fewest more with which they hold a share of ``||X||^2``.

    Args:
        directions: ``[in, count]``. moments: ``X^T X`` of the features ``X`` ``[tokens, in]``.
    """
    beside = torch.eye(len(moments), dtype=moments.dtype, device=moments.device) - directions @ directions.T
    values, vectors = torch.linalg.eigh(beside @ moments @ beside)  # in ascending order
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    total = moments.trace()
    more = _fewest(values / total, float(1 - values.sum() / total), share) if total > 0 else 0
    new = vectors[:, : min(more, len(moments) - directions.shape[1])]
    whole, _ = torch.linalg.qr(torch.cat([directions, beside @ new], dim=1))
    return torch.cat([directions, whole[:, directions.shape[1] :]], dim=1)


def residual(gradient: Tensor, directions: Tensor, rank: int) -> Tensor:
    """The ``rank`` input directions beside ``directions`` that hold most of a gradient ``[out, in]``, as rows
    ``[rank, in]``; rows of 0 where there are fewer."""
    _, values, rows = torch.linalg.svd(gradient - (gradient @ directions) @ directions.T, full_matrices=False)
    rows = rows[:rank][values[:rank] > NOTHING * gradient.norm()]
    found = gradient.new_zeros(rank, gradient.shape[1])
    found[: len(rows)] = rows - (rows @ directions) @ directions.T
    return found


def _fewest(energies: Tensor, held: float, share: float) -> int:
    """How many of the largest ``energies`` bring ``held`` up to a share of all."""
    total = held + float(energies.sum())
    if held >= share * total:
        return 0
    reached = held + energies.cpu().double().cumsum(0) >= share * total  # CUDA sums along a line in no fixed order
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else len(energies)
