"""Questions that fit no known task.

What is looked at is a question's picture, or its words where the pool knows no pictures (``Query.evidence``). A task's
extent is a Gaussian about the mean of its own questions, with the leading directions of their covariance and
one variance for all others. A question's distance to the task is Mahalanobis' under it::

    d(q)^2 = sum_i (v_i . x)^2 / s_i + (|x|^2 - sum_i (v_i . x)^2) / s_rest,      x = q - mean
    s = (1 - a) variance + a * mean variance

In stage 1 every row of the task is also measured against an extent of rows of other pictures; these held-out distances
go into the slot file. A task's limit is their ``1 - share`` quantile, so that ``share`` of its own questions, at most,
would count as unknown. A question's novelty is the smallest ``d / limit`` over its most probable tasks; above 1 it is
unknown and the base model answers.

Everything is kept per task and measured per sample: merging, order and removal of other tasks change no limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from llava.folds import deal

SHRINKAGE = 0.1
DIRECTIONS = 64
CANDIDATES = 3
"""Tasks a question is measured against: the most probable ones."""


@dataclass
class TaskExtent:
    """Where a task's questions lie: ``mean`` ``[dim]``, ``directions`` ``[m, dim]``, their ``variances`` ``[m]`` and
    the ``rest`` variance (a scalar), all float32, and the sorted held-out ``distances`` ``[rows]``."""

    mean: Tensor
    directions: Tensor
    variances: Tensor
    rest: Tensor
    distances: Tensor

    @classmethod
    def of(cls, evidence: Tensor, pictures: Sequence[object], folds: int = 5) -> TaskExtent | None:
        """Fit to ``[rows, dim]`` evidence of queries; ``None`` where all rows are about one picture.

        Args:
            pictures: what each row is about. Rows of a picture are measured against those of other pictures.
        """
        folds = min(folds, len({str(picture) for picture in pictures}))
        if folds < 2:
            return None
        fold = torch.tensor(deal(pictures, range(folds)))
        parts = []
        for number in range(folds):
            others = cls._fit(evidence[fold != number])
            held_out = evidence[fold == number]
            parts.append(distances([others] * len(held_out), held_out))
        extent = cls._fit(evidence)
        extent.distances = torch.cat(parts).sort().values
        return extent

    @classmethod
    def _fit(cls, evidence: Tensor) -> TaskExtent:
        evidence = evidence.double()
        mean, dim = evidence.mean(0), evidence.shape[1]
        centred = evidence - mean
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(evidence))  # ascending
        level = variances.mean().clamp_min(1e-12)
        kept = min(DIRECTIONS, dim)
        rest = variances[: dim - kept].mean() if kept < dim else level
        leading, rest = (
            ((1 - SHRINKAGE) * part.clamp_min(0) + SHRINKAGE * level).float()
            for part in (variances[dim - kept :], rest)
        )
        return cls(mean.float(), directions[:, dim - kept :].T.float().contiguous(), leading, rest, mean[:0])

    def limit(self, share: float) -> float:
        """The smallest held-out distance that at most ``share`` of them exceed."""
        place = math.ceil(len(self.distances) * (1 - share)) - 1
        return float(self.distances.sort().values[max(place, 0)])

    def tensors(self) -> dict[str, Tensor]:
        """As plain tensors by name; ``TaskExtent(**tensors)`` is the way back."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


class UnknownGate:
    """Tells questions that fit none of the tasks, given their extents; ``share``: see the module's docstring."""

    def __init__(self, extents: dict[str, TaskExtent], share: float):
        self.extents = extents
        self.limits = {task: extent.limit(share) for task, extent in extents.items()}

    def novelty(self, evidence: Tensor, posterior: Tensor, tasks: list[str]) -> Tensor:
        """``[batch]``: smallest distance in units of the limit; above 1 the question is unknown.

        Args:
            evidence: ``[batch, dim]`` of the queries. posterior: ``[batch, tasks]`` of ``tasks``.
        """
        likely = posterior.topk(min(CANDIDATES, len(tasks)), dim=-1).indices  # [batch, candidates]
        names = [tasks[place] for place in likely.flatten().tolist()]
        found = distances([self.extents[name] for name in names], evidence.repeat_interleave(likely.shape[1], 0))
        limits = found.new_tensor([self.limits[name] for name in names])
        return (found / limits).view(likely.shape).amin(-1)


def distances(extents: Sequence[TaskExtent], rows: Tensor) -> Tensor:
    """Of each of the rows ``[n, dim]`` from the extent in its place, ``[n]``; one product for each, as in any batch.

    Raises:
        ValueError: a row of another dimension.
    """
    if unlike := [len(extent.mean) for extent in extents if len(extent.mean) != rows.shape[1]]:
        raise ValueError(
            f"the query has {rows.shape[1]} dimensions, the task's extent {unlike[0]}; fit the keys again "
            "(train_prompt_key.py)"
        )
    sizes = {len(extent.variances) for extent in extents}
    if len(sizes) > 1:  # filled up to one of them, a sum's last bits would depend on the other extents
        return torch.cat([distances([extent], row[None]) for extent, row in zip(extents, rows, strict=True)])
    mean, variances, rest = (
        torch.stack([getattr(extent, name).float() for extent in extents]).to(rows.device)
        for name in ("mean", "variances", "rest")
    )
    offset = rows.float() - mean
    directions = (extent.directions.float().to(rows.device) for extent in extents)
    along = torch.stack([of_one @ row for of_one, row in zip(directions, offset.unbind(), strict=True)]).square()
    beside = (offset.square().sum(-1) - along.sum(-1)).clamp_min(0)
    return ((along / variances).sum(-1) + beside / rest).sqrt()
