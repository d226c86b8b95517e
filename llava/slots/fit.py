"""Stage 1: fit a task's slots to the queries of its questions, from that task's data alone.

Every slot has a key per group and modality. Similarity of query ``q`` and slot ``p``::

    s[q, p] = sum_m weight_m * mean_g cos(q_m[g], key_m[g, p])

The keys are the centroids of a spherical k-means in that similarity, with k-means++ seeding: each query pulls its
nearest key, and a key that attracts too few queries takes over half of the most sought key's. So the keys cover the
task's queries instead of collapsing to their mean, which the reference's loss ``-mean cos`` lets them do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.progress import Progress
from llava.slots.pool import Pool
from llava.slots.queries import Queries, Query, TaskStatistics
from llava.slots.routers import build_router
from llava.slots.settings import RetrieverSettings
from llava.slots.task_slots import TaskSlots
from llava.slots.unknown import TaskExtent
from llava.utils import UserError

MIN_SHARE = 0.05
"""A key that is nearest to a smaller share of the queries (of an even share, if that is less) is re-seeded."""


@dataclass
class FittedKeys:
    """Keys ``[groups, slots, part]`` per modality, and how well they fit.

    ``similarity_before``/``after``: mean similarity of a query to its ``top_k`` selected slots, with random keys and
    with the fitted ones. ``selected``: ``[slots]`` share of queries that select each slot.
    """

    text: Tensor | None
    image: Tensor | None
    similarity_before: float
    similarity_after: float
    selected: Tensor

    @property
    def covered(self) -> int:
        """How many slots are selected by at least 5 % of the queries."""
        return int((self.selected >= MIN_SHARE).sum())

    @property
    def entropy(self) -> float:
        """Entropy of the selection divided by its maximum: 1 when all slots are selected equally often."""
        share = self.selected / self.selected.sum()
        entropy = -(share * share.clamp_min(1e-12).log()).sum()
        return float(entropy / torch.log(torch.tensor(float(len(share))))) if len(share) > 1 else 1.0


def seed_of(task: str, seed: int, purpose: str) -> int:
    """A seed that depends on the task's name, not on its place in a sequence."""
    digest = hashlib.sha256(f"{purpose}:{task}:{seed}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def fit_task_slots(
    name: str,
    slots: range,
    queries: Queries,
    kept: Tensor,
    held: Tensor,
    pictures: Sequence[object],
    settings: RetrieverSettings,
    seed: int,
    iterations: int = 50,
    info: dict[str, Any] | None = None,
) -> tuple[TaskSlots, FittedKeys]:
    """A task's keys and router statistics from the queries of its rows; its offsets come when it is merged.

    Args:
        slots: the task's in the task sequence. kept, held: rows to fit to, and rows to measure routing with.
        pictures: what each row is about. info: plain values to keep with the slots.

    Raises:
        UserError: fewer rows than slots, or more slots a question than there are.
    """
    count = len(slots)
    if len(kept) < count:
        raise UserError(f"task {name!r} has {len(kept)} rows to fit {count} keys to; give more rows or fewer slots")
    if settings.top_k > count:
        raise UserError(f"top_k is {settings.top_k}, but task {name!r} has {count} slots; lower --top_k")
    mine, others = queries.select(kept), queries.select(held)
    query = Query(mine.text, mine.image)
    weight = {"text": 0.0, "image": 1.0}.get(settings.query_mode, settings.image_weight)
    key_seed = seed_of(name, seed, "keys")
    fitted = fit_keys(mine, count, settings.groups, settings.top_k, weight, key_seed, iterations)
    held_out = {part: value for part, value in (("text", others.text), ("image", others.image)) if value is not None}
    task = TaskSlots(
        name,
        slots.start,
        slots.stop,
        text_keys=fitted.text,
        image_keys=fitted.image,
        statistics=TaskStatistics.of(query.joint()),
        feature_statistics=TaskStatistics.of(query.random_features()) if settings.router == "ridge" else None,
        extent=TaskExtent.of(Query(queries.text, queries.image).evidence(), pictures),
        held_out=held_out if len(held) else None,
        info={**(info or {}), "seed": seed},
    )
    task.info["mixture"] = mean_weights(Pool(settings, [task]), query)
    return task, fitted


def mean_weights(pool: Pool, query: Query) -> list[float]:
    """The weight each slot of a pool gets on average over some questions, by the keys; they sum to 1."""
    scores = build_router("keys", pool.settings, pool.tasks).scores(query)
    best, chosen = scores.topk(pool.settings.top_k, dim=-1)
    return torch.zeros_like(scores).scatter(1, chosen, best.softmax(-1)).mean(0).tolist()


def routing_accuracy(pool: Pool, router: str | None = None) -> dict[str, tuple[int, int]]:
    """Per task: held-out questions routed to it, and their number. Tasks without held-out queries are left out."""
    chooser = build_router(router or pool.settings.router, pool.settings, pool.tasks)
    result = {}
    for task in pool.tasks:
        if not task.held_out:
            continue
        query = Query(task.held_out.get("text"), task.held_out.get("image"))
        best = chooser.scores(query).argmax(-1).tolist()
        result[task.name] = (sum(chooser.slot_tasks[slot] == task.name for slot in best), len(best))
    return result


def fit_keys(
    queries: Queries, slots: int, groups: int, top_k: int, image_weight: float, seed: int, iterations: int = 50
) -> FittedKeys:
    """Fit ``slots`` keys to the queries. Deterministic for a given seed, whatever else was fitted before."""
    generator = torch.Generator().manual_seed(seed)
    space = _Space(queries, groups, image_weight)
    random = F.normalize(torch.randn(slots, space.vectors.shape[1], generator=generator, dtype=torch.float64), dim=-1)
    before = _selected_similarity(space, space.normalise(random), top_k)
    centres = _seeding(space, slots, generator)
    progress = Progress("prompt keys", "round", range(iterations))
    assigned = None
    for round_number in progress:
        similarity = space.vectors @ centres.T  # [queries, slots]
        nearest = similarity.argmax(-1)
        if assigned is not None and torch.equal(nearest, assigned):
            break
        assigned = nearest
        centres = _update(space, centres, nearest, reseed=round_number < iterations // 2)
        progress.figures["similarity"] = float(similarity.max(-1).values.mean())
    after = _selected_similarity(space, centres, top_k)
    text, image = space.keys(centres)
    chosen = (space.vectors @ centres.T).topk(min(top_k, slots), dim=-1).indices.flatten()
    selected = torch.bincount(chosen, minlength=slots) / len(space.vectors)
    return FittedKeys(text, image, before, after, selected.float())


class _Space:
    """Queries as vectors whose inner product is the slots' similarity.

    Each modality's groups are normalised and scaled by ``sqrt(weight / groups)``; keys are normalised the same way.
    """

    def __init__(self, queries: Queries, groups: int, image_weight: float):
        self.groups = groups
        weights = {"text": 1 - image_weight, "image": image_weight}
        parts = {name: value for name, value in (("text", queries.text), ("image", queries.image)) if value is not None}
        total = sum(weights[name] for name in parts) or 1.0
        self.widths = {name: value.shape[1] for name, value in parts.items()}
        self.scales = {name: (weights[name] / total / groups) ** 0.5 for name in parts}
        self.vectors = self.normalise(torch.cat([value.double() for value in parts.values()], dim=1))

    def normalise(self, vectors: Tensor) -> Tensor:
        parts = []
        for (name, width), part in zip(self.widths.items(), vectors.split(list(self.widths.values()), 1), strict=True):
            grouped = F.normalize(part.unflatten(1, (self.groups, width // self.groups)), dim=-1)
            parts.append(grouped.flatten(1) * self.scales[name])
        return torch.cat(parts, dim=1)

    def keys(self, centres: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Unit keys per modality, ``[groups, slots, part]`` float32."""
        found: dict[str, Tensor] = {}
        for name, part in zip(self.widths, centres.split(list(self.widths.values()), 1), strict=True):
            grouped = F.normalize(part.unflatten(1, (self.groups, -1)), dim=-1)
            found[name] = grouped.transpose(0, 1).float().contiguous()
        return found.get("text"), found.get("image")


def _seeding(space: _Space, slots: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre is a query drawn with probability proportional to its squared distance so far."""
    vectors = space.vectors
    first = int(torch.randint(len(vectors), (1,), generator=generator))
    chosen = [first]
    distance = 1 - vectors @ vectors[first]
    for _ in range(slots - 1):
        weight = distance.clamp_min(0) ** 2 + 1e-12
        pick = int(torch.multinomial(weight, 1, generator=generator))
        chosen.append(pick)
        distance = torch.minimum(distance, 1 - vectors @ vectors[pick])
    return vectors[chosen].clone()


def _update(space: _Space, centres: Tensor, nearest: Tensor, reseed: bool) -> Tensor:
    """Centroids of the assigned queries. While ``reseed`` is on, starved keys share the largest groups of queries."""
    slots, nearest = len(centres), nearest.clone()
    if reseed:
        enough = min(MIN_SHARE, 0.5 / slots) * len(nearest)
        for slot in (torch.bincount(nearest, minlength=slots) < enough).nonzero().flatten().tolist():
            donor = int(torch.bincount(nearest, minlength=slots).argmax())
            nearest[_half(space.vectors, (nearest == donor).nonzero().flatten())] = slot
    member = F.one_hot(nearest, slots).double()  # [queries, slots]
    sums = space.normalise(member.T @ space.vectors)
    return torch.where(member.sum(0)[:, None] > 0, sums, centres)


def _half(vectors: Tensor, group: Tensor) -> Tensor:
    """Half of a group of rows: those on one side of the group's middle, along the direction in which it is longest."""
    centred = vectors[group] - vectors[group].mean(0)
    direction = centred[centred.norm(dim=1).argmax()]
    for _ in range(8):  # power iteration
        direction = F.normalize(centred.T @ (centred @ direction), dim=0)
    return group[(centred @ direction).argsort(stable=True)[len(group) // 2 + len(group) % 2 :]]


def _selected_similarity(space: _Space, centres: Tensor, top_k: int) -> float:
    similarity = space.vectors @ centres.T
    return float(similarity.topk(min(top_k, len(centres)), dim=-1).values.mean())
