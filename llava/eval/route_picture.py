"""The picture of a route report: queries and keys in the plane of their first two principal components, and the
confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.route_scores import RoutedRows
from llava.files import atomic_write


def principal_plane(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean ``[dim]`` and the two leading principal directions ``[dim, 2]``, signs fixed."""
    mean = points.mean(0)
    _, _, directions = np.linalg.svd(points - mean, full_matrices=False)
    plane = directions[:2].T
    return mean, plane * np.where(plane[np.abs(plane).argmax(0), range(plane.shape[1])] < 0, -1, 1)


def draw(
    routes: RoutedRows, scores: Mapping[str, Any], queries: np.ndarray, keys: np.ndarray | None, title: str, path: Path
) -> bool:
    """Write the picture; False when matplotlib is not installed.

    Args:
        queries: ``[rows, dim]`` joint queries. keys: ``[pool, dim]`` in the same space.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    picture = Figure(figsize=(12, 5.2), layout="constrained")
    FigureCanvasAgg(picture)
    left, right = picture.subplots(1, 2, width_ratios=(1.5, 1))
    _draw_plane(left, routes, queries, keys)
    _draw_confusion(right, routes.tasks, scores["confusion"])
    picture.suptitle(title)
    with atomic_write(path, "wb") as stream:
        picture.savefig(stream, format="png", dpi=130, metadata={"Software": None})
    return True


def _draw_plane(panel: Any, routes: RoutedRows, queries: np.ndarray, keys: np.ndarray | None) -> None:
    mean, plane = principal_plane(queries)
    names = list(dict.fromkeys([*routes.tasks, *routes.domains]))
    places = (queries - mean) @ plane
    domains = np.array(routes.domains, dtype=object)
    for number, name in enumerate(names):
        colour, mine = f"C{number % 10}", domains == name
        label = name if name in routes.tasks else f"{name} (not a task)"
        panel.scatter(*places[mine].T, s=9, alpha=0.45, color=colour, label=label, linewidths=0)
        if keys is not None and name in routes.tasks:
            own = [place for place, task in enumerate(routes.slot_tasks) if task == name]
            panel.scatter(*((keys[own] - mean) @ plane).T, s=70, marker="X", color=colour, edgecolors="black")
    wrong = np.array(routes.routed, dtype=object) != domains
    wrong &= routes.known
    panel.scatter(*places[wrong].T, s=45, facecolors="none", edgecolors="black", linewidths=0.8, label="routed wrongly")
    panel.set_title("questions (dots) and keys (crosses), two principal components", fontsize=10)
    panel.legend(fontsize=8)
    panel.set_xticks([])
    panel.set_yticks([])


def _draw_confusion(panel: Any, tasks: list[str], confusion: Mapping[str, Mapping[str, int]]) -> None:
    table = np.array([[confusion[domain][task] for task in tasks] for domain in confusion], dtype=float)
    share = table / table.sum(1, keepdims=True).clip(min=1)
    panel.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        colour = "white" if share[row, column] > 0.6 else "black"
        panel.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour)
    panel.set_xticks(range(len(tasks)), tasks)
    panel.set_yticks(range(len(confusion)), list(confusion))
    panel.set_xlabel("routed to")
    panel.set_ylabel("true domain")
    panel.tick_params(length=0)
