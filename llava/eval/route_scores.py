"""Figures about routes: accuracy with Wilson intervals, calibration, confusion, novelty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 15
USED_SHARE = 0.05


@dataclass(frozen=True)
class RoutedRows:
    """What a router made of some rows.

    Attributes:
        tasks: the tasks that were to choose from. domains: the true domain of each row, known or not.
        posterior: ``[rows, tasks]``. novelty: ``[rows]`` or None. slots: ``[rows, k]`` places in the pool.
        slot_tasks: task of each slot, ``[pool]``.
    """

    tasks: list[str]
    domains: list[str]
    posterior: np.ndarray
    novelty: np.ndarray | None
    slots: np.ndarray
    slot_tasks: list[str]

    @property
    def routed(self) -> list[str]:
        """The most probable task of each row."""
        return [self.tasks[place] for place in self.posterior.argmax(1)]

    @property
    def known(self) -> np.ndarray:
        """Rows whose domain is one of the tasks, boolean ``[rows]``."""
        return np.array([domain in self.tasks for domain in self.domains], dtype=bool)


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float | None, float | None]:
    """95 % interval of a share; None for no rows."""
    if not count:
        return None, None
    share, width = right / count, z * z / count
    middle = (share + width / 2) / (1 + width)
    half = z / (1 + width) * math.sqrt(share * (1 - share) / count + width / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float | None:
    """Mean over rows of ``|accuracy - confidence|`` of the row's confidence bin; None for no rows."""
    if not len(confidence):
        return None
    gaps = [rows * abs(accuracy - mean) for rows, accuracy, mean in reliability(confidence, right, bins)]
    return float(sum(gaps) / len(confidence))


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[tuple[int, float, float]]:
    """Rows, accuracy and mean confidence of every confidence bin that has rows, from the least confident on."""
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    parts = [place == b for b in np.unique(place)]
    return [(int(part.sum()), right[part].mean(), confidence[part].mean()) for part in parts]


def auroc(known: Sequence[float], unknown: Sequence[float]) -> float | None:
    """How often an unknown row's novelty exceeds a known one's; ties count half, None where either is empty."""
    if not len(known) or not len(unknown):
        return None
    below = np.sort(np.asarray(known))
    values = np.asarray(unknown)
    return float(
        (np.searchsorted(below, values, "left") + np.searchsorted(below, values, "right")).mean() / 2 / len(below)
    )


def score_routes(routes: RoutedRows) -> dict:
    """All figures as plain values."""
    known, routed = routes.known, np.array(routes.routed, dtype=object)
    domains = np.array(routes.domains, dtype=object)
    right, confidence = routed == domains, routes.posterior.max(1)
    per_domain = {task: _share(right[domains == task]) for task in routes.tasks if (domains == task).any()}
    confusion = {
        str(domain): {task: int(((domains == domain) & (routed == task)).sum()) for task in routes.tasks}
        for domain in dict.fromkeys([*[t for t in routes.tasks if (domains == t).any()], *routes.domains])
    }
    return {
        "accuracy": _share(right[known]),
        "per_domain": per_domain,
        "confusion": confusion,
        "ece": expected_calibration_error(confidence[known], right[known]),
        "slots": {task: _slot_use(routes, task) for task in routes.tasks if (domains == task).any()},
        "novelty": None if routes.novelty is None else _novelty(routes.novelty, known, domains, routes.tasks),
    }


def worst_mistakes(routes: RoutedRows, count: int) -> list[int]:
    """Rows of known domains routed elsewhere, the most confident first."""
    confidence = routes.posterior.max(1)
    wrong = [row for row, task in enumerate(routes.routed) if routes.known[row] and task != routes.domains[row]]
    return sorted(wrong, key=lambda row: -confidence[row])[:count]


def _share(right: np.ndarray) -> dict:
    count, hits = len(right), int(right.sum())
    low, high = wilson(hits, count)
    return {"value": hits / count if count else None, "right": hits, "n": count, "interval": [low, high]}


def _slot_use(routes: RoutedRows, task: str) -> dict:
    """How a task's own questions spread over its slots: slots that 5 % of them select, entropy over its maximum."""
    rows = np.array([domain == task for domain in routes.domains])
    mine = [place for place, owner in enumerate(routes.slot_tasks) if owner == task]
    chosen = (routes.slots[rows][:, :, None] == np.array(mine)).sum((0, 1))  # [slots of the task]
    share = chosen / max(chosen.sum(), 1)
    entropy = -sum(part * math.log(part) for part in share if part > 0)
    used = int((chosen >= USED_SHARE * rows.sum()).sum())
    return {"slots": len(mine), "used": used, "entropy": entropy / math.log(len(mine)) if len(mine) > 1 else 1.0}


def _novelty(novelty: np.ndarray, known: np.ndarray, domains: np.ndarray, tasks: list[str]) -> dict:
    unknown = novelty > 1
    return {
        "rejected": {str(domain): _share(unknown[domains == domain]) for domain in dict.fromkeys(domains)},
        "rejected_known": _share(unknown[known]),
        "detected_unknown": _share(unknown[~known]),
        "auroc": auroc(novelty[known], novelty[~known]),
    }
