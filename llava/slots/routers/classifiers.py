"""Closed-form task classifiers, made of sums that each task leaves behind on its own.

A slot's logit is its task's log-posterior plus its key logit relative to its task's best key. The sums are added in
name order, so the order of training does not matter, and a task can be taken out exactly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.padding import filled
from llava.slots.queries import Query, TaskStatistics
from llava.slots.routers import ROUTERS, Choice, Router
from llava.slots.row_products import RowProducts


class TaskClassifier(Router):
    """A linear task classifier times the key scores; subclasses ``fit`` it."""

    judges_tasks = True

    def prepare(self) -> None:
        self.table = self.keys.table
        tasks, known = sorted(self.tasks), self.statistics()
        missing = [task for task in tasks if task not in known]
        if missing:
            raise ValueError(f"the {self.name} router needs query statistics of every task; missing: {missing}")
        stats = [known[task] for task in tasks]
        means = torch.stack([s.mean.double() for s in stats])  # [tasks, dim]
        count = sum(s.count for s in stats)
        covariance = torch.zeros_like(stats[0].scatter, dtype=torch.float64)
        for one in stats:  # summed in name order
            covariance += one.scatter
        covariance /= max(count, 1)
        weight, bias = self.fit(means, covariance, [s.count for s in stats])
        # What all tasks share cancels in the posterior. Without it single precision is exact enough, and a route reads
        # half the memory, which is what it waits for in a large pool; transposed it is multiplied fastest.
        self.weight = (weight - weight.mean(0)).float().T.contiguous().T.to(self.device)
        self._products = RowProducts(self.weight)
        self.bias = bias.to(self.device)
        place = {task: index for index, task in enumerate(tasks)}
        self.order = torch.tensor([place[task] for task in self.tasks], device=self.device)  # the pool's tasks by name
        self.slot_name = self.order[self.slot_place]  # [pool]
        by_name = self.slot_name.argsort(stable=True)
        members = by_name.split(torch.bincount(self.slot_name, minlength=len(tasks)).tolist())
        self.rows = [_as_slice(slots) for slots in members]  # a slice reads the keys where they are
        self.slots_of = filled(members, max(map(len, members)))  # [tasks, most slots of a task]

    def fit(self, means: Tensor, covariance: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
        """``(weight, bias)``, ``[tasks, dim]`` and ``[tasks]``, from the tasks' means and the shared covariance."""
        raise NotImplementedError(f"{type(self).__name__} must define fit")

    def statistics(self) -> dict[str, TaskStatistics]:
        """The sums that the classifier is made of."""
        return {task.name: task.statistics for task in self.slots if task.statistics is not None}

    def features(self, query: Query) -> Tensor:
        """What the classifier sees of a query, ``[batch, dim]`` float64."""
        return query.joint()

    def log_posterior(self, query: Query) -> Tensor:
        """Log-probability of each task, ``[batch, tasks]`` float64, tasks in name order."""
        joint = self.features(query)
        if joint.shape[-1] != self.weight.shape[-1]:
            raise ValueError(f"query has {joint.shape[-1]} dimensions, the task statistics {self.weight.shape[-1]}")
        return F.log_softmax(self._products(joint.float()).double() + self.bias, dim=-1)

    def scores(self, query: Query) -> Tensor:
        by_key = self.keys.scores(query)  # [batch, pool]
        best = by_key.new_full((len(by_key), len(self.tasks)), -torch.inf)
        best = best.scatter_reduce(1, self.slot_name.expand_as(by_key), by_key, "amax", include_self=True)
        return self.log_posterior(query)[:, self.slot_name] + by_key - best[:, self.slot_name]

    def choose(self, query: Query, k: int) -> Choice:
        """As ``scores(query).topk(k)``, but only the keys of the ``k`` most probable tasks are looked at.

        Exact: the best slot of a task has its task's log-posterior for a score, so each of the ``k`` best tasks has a
        slot that is no worse than any slot of another task.
        """
        self._check(k)
        unit = self.keys.unit(query)
        by_task = self.log_posterior(query)  # [batch, tasks]
        likely = by_task.topk(min(k, len(self.tasks)), dim=-1).indices.sort(-1).values
        logits = self._by_keys(unit, likely.tolist()) / self.settings.tau  # [batch, likely, slots]
        scores = by_task.gather(1, likely)[..., None] + logits - logits.amax(-1, keepdim=True)
        top = scores.flatten(1).topk(k)
        slots = self.slots_of[likely].flatten(1).gather(1, top.indices)
        return Choice(top.values, slots, by_task.exp()[:, self.order])

    def _by_keys(self, unit: Tensor, tasks: list[list[int]]) -> Tensor:
        """Similarity ``[batch, tasks of a row, most slots of a task]`` of each query and its tasks' slots, one product
        for each, as in any batch; ``-inf`` where a task has fewer slots."""
        pairs = zip(unit.unbind(), tasks, strict=True)
        parts = [self.table[self.rows[task]] @ row for row, of_row in pairs for task in of_row]
        found = filled(parts, self.slots_of.shape[1], -torch.inf)
        return found.view(len(tasks), -1, found.shape[1])


@ROUTERS.register
class GaussianRouter(TaskClassifier):
    """One mean per task and one covariance shared by all tasks."""

    name = "gaussian"
    shrinkage = 0.1

    def fit(self, means: Tensor, covariance: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
        """Linear discriminant: ``log p(task | q) = q . weight[task] + bias[task]`` up to a constant of ``q``."""
        dim = covariance.shape[0]
        identity = torch.eye(dim, dtype=torch.float64, device=covariance.device)
        level = covariance.diagonal().mean().clamp_min(1e-12)
        regular = (1 - self.shrinkage) * covariance + self.shrinkage * level * identity
        weight = torch.linalg.solve(regular, means.T).T  # [tasks, dim]
        return weight, -0.5 * (weight * means).sum(-1)


@ROUTERS.register
class RidgeRouter(TaskClassifier):
    """Regularised least squares onto one-hot tasks: on random features of the queries where stage 1 stored their sums
    (``--router ridge``), else on the queries themselves."""

    name = "ridge"
    penalty = 1e-2
    sharpness = 20.0

    def fit(self, means: Tensor, covariance: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
        """Least squares from sums, with a bias column; ``sharpness`` makes logits of it."""
        total = float(sum(counts))
        share = torch.tensor(counts, dtype=torch.float64, device=means.device) / total  # [tasks]
        centre = share @ means  # [dim]
        spread = means - centre
        gram = covariance + (share[:, None] * spread).T @ spread
        level = gram.diagonal().mean().clamp_min(1e-12)
        gram = gram + self.penalty * level * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        cross = share[:, None] * spread  # [tasks, dim]: covariance of each one-hot column with the query
        linear = torch.linalg.solve(gram, cross.T).T
        return self.sharpness * linear, self.sharpness * (share - linear @ centre)

    def statistics(self) -> dict[str, TaskStatistics]:
        found = {task.name: task.feature_statistics for task in self.slots if task.feature_statistics is not None}
        self.on_features = bool(found)
        return found or super().statistics()

    def features(self, query: Query) -> Tensor:
        return query.random_features() if self.on_features else query.joint()


def _as_slice(slots: Tensor) -> slice | Tensor:
    first, last = int(slots[0]), int(slots[-1])
    return slice(first, last + 1) if last - first + 1 == len(slots) else slots
