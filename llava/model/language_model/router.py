"""Routers: how well each slot fits a question.

One interface: ``router.scores(query) -> [batch, pool]`` in logits, so that ``softmax`` over a sample's selected slots
gives their weights. Every score of a sample depends on that sample alone. A new router is one class with a ``name``.

- ``keys``: the prompt keys. ``s = mean over groups of cos(query, key)``, modalities combined, divided by ``tau``.
- ``gaussian`` (default): closed form. One mean per task and one covariance shared by all tasks, accumulated from
  per-task statistics in name order (so the order of training does not matter, and a task can be taken out exactly).
  A slot's logit is its task's log-posterior plus its key logit relative to its task's best key.
- ``ridge``: a linear classifier in closed form on the same statistics (regularised least squares to one-hot tasks).
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


@dataclass(frozen=True)
class Query:
    """What is known of each question: ``text`` ``[batch, text_dim]``, ``image`` ``[batch, image_dim]``, or neither."""

    text: Tensor | None = None
    image: Tensor | None = None
    tasks: list[str] | None = None  # the true task of each sample, for the oracle only

    def __len__(self) -> int:
        given = self.text if self.text is not None else self.image
        return len(given) if given is not None else len(self.tasks or [])

    def joint(self) -> Tensor:
        """Unit-length modalities side by side, ``[batch, dim]`` in float64: what the closed-form routers see."""
        parts = [F.normalize(part.double(), dim=-1) for part in (self.text, self.image) if part is not None]
        return torch.cat(parts, dim=-1)


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
        """Statistics of ``[n, dim]`` joint queries."""
        joint = joint.double()
        centred = joint - joint.mean(0)
        return cls(len(joint), joint.sum(0).float(), (centred.T @ centred).float())


@dataclass
class Pool:
    """What a router may know of the slots: their keys, their tasks, the tasks' statistics."""

    slot_tasks: list[str]  # task of each slot, length pool
    text_keys: Tensor | None = None  # [groups, pool, text_dim / groups]
    image_keys: Tensor | None = None  # [groups, pool, image_dim / groups]
    statistics: dict[str, TaskStatistics] = field(default_factory=dict)
    image_weight: float = 0.5
    tau: float = 0.1

    def __len__(self) -> int:
        return len(self.slot_tasks)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(self.slot_tasks))


class Router:
    """Base of all routers: holds the pool; subclasses give ``scores``."""

    name = ""
    needs_statistics = False

    def __init__(self, pool: Pool, seed: int = 0):
        self.pool, self.seed = pool, seed
        self.prepare()

    def prepare(self) -> None:
        """Work done once per pool."""

    def scores(self, query: Query) -> Tensor:
        """Logits ``[batch, pool]``."""
        raise NotImplementedError(f"{type(self).__name__} must define scores")


class KeysRouter(Router):
    name = "keys"

    def prepare(self) -> None:
        self.text_keys = _flat_keys(self.pool.text_keys)
        self.image_keys = _flat_keys(self.pool.image_keys)

    def similarity(self, query: Query) -> Tensor:
        """Mean cosine over groups, modalities combined: ``[batch, pool]`` in ``[-1, 1]``."""
        parts = []
        for name, value, keys, weight in (
            ("text", query.text, self.text_keys, 1 - self.pool.image_weight),
            ("image", query.image, self.image_keys, self.pool.image_weight),
        ):
            if keys is not None:
                parts.append((weight, _group_cosine(name, value, self.pool, keys)))
        if not parts:
            raise ValueError("the pool has no keys to compare a query with")
        total = sum(weight for weight, _ in parts)
        return sum(weight / total * part for weight, part in parts)

    def scores(self, query: Query) -> Tensor:
        return self.similarity(query) / self.pool.tau


class GaussianRouter(KeysRouter):
    name = "gaussian"
    needs_statistics = True
    shrinkage = 0.1

    def prepare(self) -> None:
        super().prepare()
        tasks = sorted(self.pool.tasks)
        missing = [task for task in tasks if task not in self.pool.statistics]
        if missing:
            raise ValueError(f"the {self.name} router needs query statistics of every task; missing: {missing}")
        device = _key_device(self.pool)
        stats = [self.pool.statistics[task] for task in tasks]
        means = torch.stack([s.mean.double() for s in stats])  # [tasks, dim]
        count = sum(s.count for s in stats)
        covariance = sum(s.scatter.double() for s in stats) / max(count, 1)  # summed in name order
        self.fit(means, covariance, [s.count for s in stats])
        place = {task: index for index, task in enumerate(tasks)}
        self.tasks = tasks
        self.slot_place = torch.tensor([place[task] for task in self.pool.slot_tasks], device=device)
        self.weight, self.bias = self.weight.to(device), self.bias.to(device)

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
        joint = query.joint()
        if joint.shape[-1] != self.weight.shape[-1]:
            raise ValueError(f"query has {joint.shape[-1]} dimensions, the task statistics {self.weight.shape[-1]}")
        return F.log_softmax(row_products(joint, self.weight) + self.bias, dim=-1)

    def scores(self, query: Query) -> Tensor:
        by_key = super().scores(query)  # [batch, pool]
        best = by_key.new_full((len(by_key), len(self.tasks)), -torch.inf)
        best = best.scatter_reduce(1, self.slot_place.expand_as(by_key), by_key, "amax", include_self=True)
        return self.log_posterior(query)[:, self.slot_place] + by_key - best[:, self.slot_place]


class RidgeRouter(GaussianRouter):
    name = "ridge"
    penalty = 1e-2
    sharpness = 20.0

    def fit(self, means: Tensor, covariance: Tensor, counts: list[int]) -> None:
        """Least squares onto one-hot tasks from the same sums, with a bias column; ``sharpness`` makes logits of it."""
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


class OracleRouter(KeysRouter):
    name = "oracle"

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


def _group_cosine(name: str, value: Tensor | None, pool: Pool, flat_keys: Tensor) -> Tensor:
    """Mean cosine over groups as one product: both sides are normalised group by group."""
    if value is None:
        raise ValueError(f"the pool has {name} keys, but the query has no {name} part")
    if value.shape[-1] != flat_keys.shape[-1]:
        raise ValueError(f"{name} query has {value.shape[-1]} dimensions, the keys have {flat_keys.shape[-1]}")
    if not torch.isfinite(value).all():
        raise ValueError(f"the {name} query holds NaN or infinite numbers")
    groups = (pool.text_keys if name == "text" else pool.image_keys).shape[0]
    unit = F.normalize(value.double().unflatten(-1, (groups, -1)), dim=-1).flatten(-2)
    return row_products(unit, flat_keys)


def row_products(rows: Tensor, matrix: Tensor) -> Tensor:
    """``rows @ matrix.T``, one row at a time: ``[batch, dim], [n, dim] -> [batch, n]``.

    Matrix products pick their kernel by the number of rows, so a row's last bits would depend on its batch.
    """
    return torch.stack([matrix @ row.clone() for row in rows])


def _key_device(pool: Pool) -> torch.device:
    keys = pool.text_keys if pool.text_keys is not None else pool.image_keys
    return keys.device if keys is not None else torch.device("cpu")
