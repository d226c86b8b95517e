"""Routers: how well each slot fits a question.

One interface: ``router.scores(query) -> [batch, pool]`` in logits, so that ``softmax`` over a sample's selected slots
gives their weights. Every score of a sample depends on that sample alone. A new router is one class with a ``name``.
``router.choose(query, k)`` gives the best slots and the task posterior, without looking at every slot where it can.

- ``keys``: the prompt keys. ``s = mean over groups of cos(query, key)``, modalities combined, divided by ``tau``.
- ``gaussian`` (default): closed form. One mean per task and one covariance shared by all tasks, accumulated from
  per-task statistics in name order (so the order of training does not matter, and a task can be taken out exactly).
  A slot's logit is its task's log-posterior plus its key logit relative to its task's best key.
- ``ridge``: regularised least squares onto one-hot tasks, in closed form from the same kind of sums: on random
  features of the queries where stage 1 stored their sums (``--router ridge``), else on the queries themselves.
- ``oracle``: the task is given. ``uniform``: every slot alike. ``random``: a seeded random choice (ablation).
- ``batch_vote``: one decision for the whole batch, as published systems do. It lets the batch leak the task and makes
  an answer depend on its neighbours; for fidelity studies only.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.slots.queries import Query, TaskStatistics, row_products


@dataclass
class Pool:
    """What a router may know of the slots: their keys, their tasks, the tasks' statistics."""

    slot_tasks: list[str]  # task of each slot, length pool
    text_keys: Tensor | None = None  # [groups, pool, text_dim / groups]
    image_keys: Tensor | None = None  # [groups, pool, image_dim / groups]
    statistics: dict[str, TaskStatistics] = field(default_factory=dict)
    feature_statistics: dict[str, TaskStatistics] = field(default_factory=dict)  # of random features, for ``ridge``
    image_weight: float = 0.5
    tau: float = 0.1

    def __len__(self) -> int:
        return len(self.slot_tasks)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(self.slot_tasks))

    def task_places(self) -> Tensor:
        """Place of each slot's task in ``tasks``, ``[pool]``."""
        place = {task: index for index, task in enumerate(self.tasks)}
        return torch.tensor([place[task] for task in self.slot_tasks], device=_key_device(self))


@dataclass(frozen=True)
class Choice:
    """The ``k`` best slots of each sample: ``scores`` and ``slots`` ``[batch, k]``, best first, and the probability
    ``posterior`` ``[batch, tasks]`` of the pool's tasks."""

    scores: Tensor
    slots: Tensor
    posterior: Tensor


class Router:
    """Base of all routers: holds the pool; subclasses give ``scores``."""

    name = ""
    judges_tasks = False
    """Whether its task posterior says something about the question."""

    def __init__(self, pool: Pool, seed: int = 0):
        self.pool, self.seed = pool, seed
        self.tasks = pool.tasks
        self.slot_place = pool.task_places()  # [pool]
        self.prepare()

    def prepare(self) -> None:
        """Work done once per pool."""

    def scores(self, query: Query) -> Tensor:
        """Logits ``[batch, pool]``."""
        raise NotImplementedError(f"{type(self).__name__} must define scores")

    def choose(self, query: Query, k: int) -> Choice:
        """The ``k`` best slots; a task's probability is the softmax of all scores, summed over its slots."""
        scores = self.scores(query)  # [batch, pool]
        best, slots = scores.topk(k, dim=-1)
        posterior = scores.new_zeros(len(scores), len(self.tasks))
        place = self.slot_place.expand_as(scores)
        return Choice(best, slots, posterior.scatter_add(1, place, scores.softmax(-1)))


class KeysRouter(Router):
    name = "keys"
    judges_tasks = True

    def prepare(self) -> None:
        """All keys side by side, ``[pool, dim]`` float64, so that a product with ``unit(query)`` is the similarity."""
        weights = {"text": 1 - self.pool.image_weight, "image": self.pool.image_weight}
        tables = {"text": self.pool.text_keys, "image": self.pool.image_keys}
        self.tables = {name: keys for name, keys in tables.items() if keys is not None}
        total = sum(weights[name] for name in self.tables)
        flat = [_flat_keys(keys) * (weights[name] / total) for name, keys in self.tables.items()]
        self.keys = torch.cat(flat, dim=1) if flat else None

    def unit(self, query: Query) -> Tensor:
        """The query's modalities, each group of unit length: ``[batch, dim]`` float64."""
        if self.keys is None:
            raise ValueError("the pool has no keys to compare a query with")
        values = {"text": query.text, "image": query.image}
        return torch.cat([_unit_groups(name, values[name], keys) for name, keys in self.tables.items()], dim=1)

    def similarity(self, query: Query) -> Tensor:
        """Mean cosine over groups, modalities combined: ``[batch, pool]`` in ``[-1, 1]``."""
        return row_products(self.unit(query), self.keys)

    def scores(self, query: Query) -> Tensor:
        return self.similarity(query) / self.pool.tau


class GaussianRouter(KeysRouter):
    name = "gaussian"
    shrinkage = 0.1

    def prepare(self) -> None:
        super().prepare()
        tasks = sorted(self.tasks)
        known = self.statistics()
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
        self.fit(means, covariance, [s.count for s in stats])
        place = {task: index for index, task in enumerate(tasks)}
        device = self.slot_place.device
        # What all tasks share cancels in the posterior. Without it single precision is exact enough, and a route reads
        # half the memory, which is what it waits for in a large pool.
        self.weight = (self.weight - self.weight.mean(0)).float().contiguous().to(device)
        self.bias = self.bias.to(device)
        self.order = torch.tensor([place[task] for task in self.tasks], device=device)  # the pool's tasks by name
        self.slot_name = self.order[self.slot_place]  # [pool]
        by_name = self.slot_name.argsort(stable=True)
        self.members = by_name.split(torch.bincount(self.slot_name, minlength=len(tasks)).tolist())
        self.rows = [_as_slice(slots) for slots in self.members]  # a slice reads the keys where they are

    def statistics(self) -> dict[str, TaskStatistics]:
        """The sums that the classifier is made of."""
        return self.pool.statistics

    def features(self, query: Query) -> Tensor:
        """What the classifier sees of a query, ``[batch, dim]`` float64."""
        return query.joint()

    def fit(self, means: Tensor, covariance: Tensor, counts: list[int]) -> None:
        """Linear discriminant: ``log p(task | q) = q . weight[task] + bias[task]`` up to a constant of ``q``."""
        dim = covariance.shape[0]
        identity = torch.eye(dim, dtype=torch.float64, device=covariance.device)
        level = covariance.diagonal().mean().clamp_min(1e-12)
        regular = (1 - self.shrinkage) * covariance + self.shrinkage * level * identity
        self.weight = torch.linalg.solve(regular, means.T).T  # [tasks, dim]
        self.bias = -0.5 * (self.weight * means).sum(-1)

    def log_posterior(self, query: Query) -> Tensor:
        """Log-probability of each task, ``[batch, tasks]`` float64, tasks in name order."""
        joint = self.features(query)
        if joint.shape[-1] != self.weight.shape[-1]:
            raise ValueError(f"query has {joint.shape[-1]} dimensions, the task statistics {self.weight.shape[-1]}")
        return F.log_softmax(row_products(joint.float(), self.weight).double() + self.bias, dim=-1)

    def scores(self, query: Query) -> Tensor:
        by_key = super().scores(query)  # [batch, pool]
        best = by_key.new_full((len(by_key), len(self.tasks)), -torch.inf)
        best = best.scatter_reduce(1, self.slot_name.expand_as(by_key), by_key, "amax", include_self=True)
        return self.log_posterior(query)[:, self.slot_name] + by_key - best[:, self.slot_name]

    def choose(self, query: Query, k: int) -> Choice:
        """As ``scores(query).topk(k)``, but only the keys of the ``k`` most probable tasks are looked at.

        Exact: the best slot of a task has its task's log-posterior for a score, so each of the ``k`` best tasks has a
        slot that is no worse than any slot of another task.
        """
        unit = self.unit(query)
        by_task = self.log_posterior(query)  # [batch, tasks]
        likely = by_task.topk(min(k, len(self.tasks)), dim=-1).indices.sort(-1).values.tolist()
        best, slots = [], []
        for row, log_posterior, tasks in zip(unit, by_task, likely, strict=True):
            found = []
            for task in tasks:
                logits = (self.keys[self.rows[task]] @ row) / self.pool.tau
                found.append(log_posterior[task] + logits - logits.max())
            top = torch.cat(found).topk(k)
            best.append(top.values)
            slots.append(torch.cat([self.members[task] for task in tasks])[top.indices])
        return Choice(torch.stack(best), torch.stack(slots), by_task.exp()[:, self.order])


class RidgeRouter(GaussianRouter):
    name = "ridge"
    penalty = 1e-2
    sharpness = 20.0

    def fit(self, means: Tensor, covariance: Tensor, counts: list[int]) -> None:
        """Least squares onto one-hot tasks from sums, with a bias column; ``sharpness`` makes logits of it."""
        total = float(sum(counts))
        share = torch.tensor(counts, dtype=torch.float64, device=means.device) / total  # [tasks]
        centre = share @ means  # [dim]
        spread = means - centre
        gram = covariance + (share[:, None] * spread).T @ spread
        level = gram.diagonal().mean().clamp_min(1e-12)
        gram = gram + self.penalty * level * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        cross = share[:, None] * spread  # [tasks, dim]: covariance of each one-hot column with the query
        linear = torch.linalg.solve(gram, cross.T).T
        self.weight = self.sharpness * linear
        self.bias = self.sharpness * (share - linear @ centre)

    def statistics(self) -> dict[str, TaskStatistics]:
        return self.pool.feature_statistics or self.pool.statistics

    def features(self, query: Query) -> Tensor:
        return query.random_features() if self.pool.feature_statistics else query.joint()


class OracleRouter(KeysRouter):
    name = "oracle"
    judges_tasks = False

    def scores(self, query: Query) -> Tensor:
        if query.tasks is None:
            raise ValueError("the oracle router needs the task of every question (--task-id, or the rows' domain)")
        known = set(self.pool.slot_tasks)
        unknown = sorted(set(query.tasks) - known)
        if unknown:
            raise ValueError(f"no slots for task {unknown[0]!r}; the pool knows {sorted(known)}")
        device = _key_device(self.pool)
        mine = torch.tensor([[slot == task for slot in self.pool.slot_tasks] for task in query.tasks], device=device)
        by_key = super().scores(query) if query.text is not None or query.image is not None else mine.double()
        return by_key.masked_fill(~mine, -torch.inf)


class UniformRouter(Router):
    name = "uniform"

    def scores(self, query: Query) -> Tensor:
        return torch.zeros(len(query), len(self.pool), dtype=torch.float64, device=_key_device(self.pool))


class RandomRouter(Router):
    """Random logits that depend on the seed and the query's own numbers, so that an answer can be reproduced."""

    name = "random"

    def scores(self, query: Query) -> Tensor:
        rows = []
        for row in query.joint().cpu():
            digest = hashlib.sha256(self.seed.to_bytes(8, "little") + row.float().numpy().tobytes()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            rows.append(torch.randn(len(self.pool), generator=generator, dtype=torch.float64))
        return torch.stack(rows).to(_key_device(self.pool))


class BatchVoteRouter(KeysRouter):
    name = "batch_vote"
    judges_tasks = False

    def prepare(self) -> None:
        super().prepare()
        warnings.warn(
            "router 'batch_vote' takes one decision for the whole batch: answers depend on their batch and task "
            "identity leaks; use it for fidelity studies only",
            stacklevel=3,
        )

    def scores(self, query: Query) -> Tensor:
        each = super().scores(query)
        return each.mean(0, keepdim=True).expand_as(each)


ROUTERS: dict[str, type[Router]] = {
    router.name: router
    for router in (
        KeysRouter,
        GaussianRouter,
        RidgeRouter,
        OracleRouter,
        UniformRouter,
        RandomRouter,
        BatchVoteRouter,
    )
}


def build_router(name: str, pool: Pool, seed: int = 0) -> Router:
    """The router called ``name`` over ``pool``. Raises ``ValueError`` for an unknown name or an empty pool."""
    if name not in ROUTERS:
        raise ValueError(f"unknown router {name!r}; known: {', '.join(ROUTERS)}")
    if len(pool) == 0:
        raise ValueError("the pool is empty: there is no slot to route to")
    return ROUTERS[name](pool, seed)


def _flat_keys(keys: Tensor | None) -> Tensor | None:
    """Unit keys of all groups side by side: ``[groups, pool, part] -> [pool, groups * part]`` float64, over groups."""
    if keys is None:
        return None
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


def _as_slice(slots: Tensor) -> slice | Tensor:
    first, last = int(slots[0]), int(slots[-1])
    return slice(first, last + 1) if last - first + 1 == len(slots) else slots


def _key_device(pool: Pool) -> torch.device:
    keys = pool.text_keys if pool.text_keys is not None else pool.image_keys
    return keys.device if keys is not None else torch.device("cpu")
