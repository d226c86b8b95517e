"""The routes of answered questions, as their answers tell of them: confusion, reliability, novelty by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.page.results import Results, Scored
from llava.eval.route_scores import RoutedRows, reliability, score_routes
from llava.outside import read_object
from llava.schema import Wanted, an_object, check_fields, list_of, number, whole, words
from llava.utils import UserError

_END = Wanted("a number, or null for none", lambda value: value is None or number(0, 1).fits(value))
_SHARE: dict[str, Wanted] = {"value": number(0, 1), "n": whole(0), "interval": list_of(_END, 2)}
_NOVELTY = {**dict.fromkeys(("rejected_known", "detected_unknown"), an_object(_SHARE)), "auroc": number(0, 1)}
_ROUTER = {"accuracy": an_object(_SHARE), "per_domain": an_object(), "ece": number(0), "novelty": an_object(_NOVELTY)}
_REPORT = {"question_file": words(), "routers": an_object()}
"""What is read of a route report."""


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


def read_route_report(path: str | Path) -> dict[str, Any]:
    """What ``llava.eval.route_report`` wrote.

    Raises:
        UserError: it is missing, or something else.
    """
    found = read_object(path, "route report", "write it with: python -m llava.eval.route_report")
    try:
        check_fields(found, _REPORT, str(path), False, tuple(_REPORT))
        for name, scores in found["routers"].items():
            where = f"{path}: routers: {name}"
            an_object().check(scores, where)
            check_fields(scores, _ROUTER, where, False, ("accuracy", "per_domain"))
            for part in scores["per_domain"].values():
                an_object(_SHARE).check(part, f"{where}: per_domain")
    except UserError as error:
        raise UserError(f"{error} (not a route report; write it again)") from error
    return found


def _slots(routes: Sequence[Mapping[str, Any]], slot_tasks: Sequence[str]) -> np.ndarray:
    """``[rows, k]`` places in the pool; none where it is not known whose they are."""
    found = [route.get("slots") or [] for route in routes]
    if not slot_tasks or len({len(slots) for slots in found}) != 1:
        return np.zeros((len(routes), 0), dtype=int)
    return np.array(found, dtype=int).reshape(len(routes), -1)
