"""Questions that fit no known task.

The distance of a question to a task is Mahalanobis' under that task's own mean and regularised covariance::

    d_t(q)^2 = (q - mean_t)^T C_t^-1 (q - mean_t),      C_t = (1 - a) scatter_t / n_t + a * level * I

In stage 1 every row of the task is measured against statistics of rows of other pictures; these held-out distances go
into the slot file. A task's limit is their ``1 - share`` quantile, so that ``share`` of its own questions, at most,
would count as unknown. A question's novelty is the smallest ``d_t / limit_t`` over its most probable tasks; above 1 it
is unknown and the base model answers.

Everything is kept per task and measured per sample: merging, order and removal of other tasks change no limit.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from llava.model.language_model.query_space import TaskStatistics

SHRINKAGE = 0.1
CANDIDATES = 3
"""Tasks a question is measured against: the most probable ones."""
KEPT_FACTORS = 64


class TaskDistance:
    """Mahalanobis distance to one task, from its statistics."""

    def __init__(self, statistics: TaskStatistics):
        self.mean = statistics.mean.double()
        covariance = statistics.scatter.double() / max(statistics.count, 1)
        level = covariance.diagonal().mean().clamp_min(1e-12)
        regular = (1 - SHRINKAGE) * covariance
        regular.diagonal().add_(SHRINKAGE * level)
        factor = torch.linalg.cholesky(regular)
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        self.whiten = torch.linalg.solve_triangular(factor, identity, upper=False)  # [dim, dim]

    def __call__(self, row: Tensor) -> Tensor:
        """Distance of one joint query ``[dim]``, a scalar."""
        return torch.linalg.vector_norm(self.whiten @ (row - self.mean))

    def to(self, device: torch.device) -> TaskDistance:
        self.mean, self.whiten = self.mean.to(device), self.whiten.to(device)
        return self


def held_out_distances(joint: Tensor, pictures: Sequence[object], folds: int = 5) -> Tensor | None:
    """Sorted distances ``[rows]`` of a task's rows to statistics of rows of other pictures; ``None`` for one picture.

    Args:
        joint: ``[rows, dim]`` joint queries. pictures: what the rows are grouped by.
    """
    names = sorted({str(picture) for picture in pictures}, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    folds = min(folds, len(names))
    if folds < 2:
        return None
    fold_of = {name: number % folds for number, name in enumerate(names)}
    fold = torch.tensor([fold_of[str(picture)] for picture in pictures])
    parts = []
    for number in range(folds):
        distance = TaskDistance(TaskStatistics.of(joint[fold != number]))
        parts.append(torch.stack([distance(row) for row in joint[fold == number].double()]))
    return torch.cat(parts).sort().values.float()


def limit_of(distances: Tensor, share: float) -> float:
    """The smallest held-out distance that at most ``share`` of them exceed."""
    place = math.ceil(len(distances) * (1 - share)) - 1
    return float(distances.sort().values[max(place, 0)])


class UnknownGate:
    """Tells questions that fit none of the tasks.

    Args:
        statistics, distances: per task; both must know every task. share: see the module's docstring.
    """

    def __init__(self, statistics: dict[str, TaskStatistics], distances: dict[str, Tensor], share: float):
        self.statistics = statistics
        self.limits = {task: limit_of(distances[task], share) for task in statistics}
        self._distances: OrderedDict[str, TaskDistance] = OrderedDict()

    def novelty(self, joint: Tensor, posterior: Tensor, tasks: list[str]) -> Tensor:
        """``[batch]``: smallest distance in units of the limit; above 1 the question is unknown.

        Args:
            joint: ``[batch, dim]`` joint queries. posterior: ``[batch, tasks]`` of ``tasks``.
        """
        likely = posterior.topk(min(CANDIDATES, len(tasks)), dim=-1).indices.tolist()
        rows = []
        for row, candidates in zip(joint, likely, strict=True):
            ratios = [self._distance(tasks[i], row.device)(row) / self.limits[tasks[i]] for i in candidates]
            rows.append(torch.stack(ratios).min())
        return torch.stack(rows)

    def _distance(self, task: str, device: torch.device) -> TaskDistance:
        """Factored on first use; only the last ones are kept, for pools of many tasks."""
        if task not in self._distances:
            self._distances[task] = TaskDistance(self.statistics[task]).to(device)
            if len(self._distances) > KEPT_FACTORS:
                self._distances.popitem(last=False)
        self._distances.move_to_end(task)
        return self._distances[task]
