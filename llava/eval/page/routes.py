"""The routes of answered questions, as their answers tell of them: confusion, reliability, novelty by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava.eval.page.results import Results, Scored
from llava.eval.route_scores import RoutedRows, reliability, score_routes


@dataclass(frozen=True)
class StageRoutes:
    """The freely decided routes of one stage.

    Attributes:
        task: the last one that it has learned.
        routes: of the rows that have one domain. scores: what ``score_routes`` says of them.
        bins: rows, accuracy and mean confidence of the known tasks' rows, by confidence.
    """

    task: str
    routes: RoutedRows
    scores: Mapping[str, Any]
    bins: list[tuple[int, float, float]]

    @property
    def novelty(self) -> dict[str, np.ndarray]:
        """Novelty of the rows by domain."""
        if self.routes.novelty is None:
            return {}
        domains = np.array(self.routes.domains, dtype=object)
        return {str(domain): self.routes.novelty[domains == domain] for domain in dict.fromkeys(self.routes.domains)}

    def knows(self, domain: str) -> bool:
        """Whether a domain is a task that the stage has learned."""
        return domain in self.routes.tasks


def routes_of(run: Results) -> list[StageRoutes]:
    """Of each stage; none of stages whose answers tell of no free route."""
    pairs = zip(run.tasks, run.stages)
    found = [_stage(stage, task, run.tasks, run.slot_tasks if stage is run.last else []) for task, stage in pairs]
    return [stage for stage in found if stage is not None]


def _stage(stage: Scored, task: str, order: Sequence[str], slot_tasks: list[str]) -> StageRoutes | None:
    told = [
        (row["domain"], metadata["route"])
        for row, metadata in zip(stage.rows, stage.metadata)
        if row.get("domain") and is_free(metadata.get("route"))
    ]
    if not told:
        return None
    found = dict.fromkeys(name for _, route in told for name in route["task_posterior"])
    tasks = [*(name for name in order if name in found), *(name for name in found if name not in order)]
    if not set(tasks) & set(order):  # one adapter for all tasks, under a name of its own
        return None
    posterior = np.array([[float(route["task_posterior"].get(name, 0.0)) for name in tasks] for _, route in told])
    novelty = [route.get("novelty") for _, route in told]
    measured = None if None in novelty else np.array(novelty, dtype=float)
    slots = _slots([route for _, route in told], slot_tasks)
    routes = RoutedRows(tasks, [domain for domain, _ in told], posterior, measured, slots, slot_tasks)
    known, right = routes.known, np.array(routes.routed, dtype=object) == np.array(routes.domains, dtype=object)
    return StageRoutes(
        task, routes, score_routes(routes), reliability(posterior.max(1)[known], right[known].astype(float))
    )


def is_free(route: Any) -> bool:
    """Whether a route was decided among tasks, none being given."""
    return isinstance(route, Mapping) and bool(route.get("task_posterior")) and not route.get("task_given")


def _slots(routes: Sequence[Mapping[str, Any]], slot_tasks: Sequence[str]) -> np.ndarray:
    """``[rows, k]`` places in the pool; none where it is not known whose they are."""
    found = [route.get("slots") or [] for route in routes]
    if not slot_tasks or len({len(slots) for slots in found}) != 1:
        return np.zeros((len(routes), 0), dtype=int)
    return np.array(found, dtype=int).reshape(len(routes), -1)
