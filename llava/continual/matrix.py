"""Continual-learning metrics from the accuracy matrix ``R``.

``R[i][j]`` is the score on task ``j`` after stage ``i`` (stages and tasks count from 1 in the formulas, ``T`` of each;
task ``j`` is trained in stage ``j``). ``Z[j]`` is the score of the zero-shot base.

- average final accuracy: ``mean_j R[T][j]``
- learning curve:         ``C[i] = mean over j <= i of R[i][j]``, the average over the tasks seen so far
- average over stages:    ``mean_i C[i]``
- learning accuracy:      ``mean_j R[j][j]``
- BWT:                    ``mean over j < T of R[T][j] - R[j][j]``
- forgetting:             ``mean over j < T of max over i < T of R[i][j], minus R[T][j]``
- FWT:                    ``mean over j > 1 of R[j-1][j] - Z[j]`` (what earlier tasks give a task before it is trained)
- gap to a reference:     ``mean_j G[j] - R[T][j]``, ``G[j]`` the reference's final score on task ``j``

All functions take ``[..., T, T]`` arrays, so that bootstrap replicates are one call. A metric that a single task does
not define is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

FORMULAS = {
    "average_final": "mean_j R[T][j]",
    "average_over_stages": "mean_i mean_{j<=i} R[i][j]",
    "learning_accuracy": "mean_j R[j][j]",
    "bwt": "mean_{j<T} (R[T][j] - R[j][j])",
    "forgetting": "mean_{j<T} (max_{i<T} R[i][j] - R[T][j])",
    "fwt": "mean_{j>1} (R[j-1][j] - zero_shot[j])",
    "gap": "mean_j (reference[j] - R[T][j]), reference: the final scores of another method or with the task given",
    "learning_curve": "mean_{j<=i} R[i][j] for each stage i",
}


def check_matrix(matrix: np.ndarray) -> np.ndarray:
    """``matrix`` as floats ``[..., T, T]``.

    Raises:
        ValueError: it is not square, or empty.
    """
    found = np.asarray(matrix, dtype=np.float64)
    if found.ndim < 2 or found.shape[-1] != found.shape[-2] or found.shape[-1] == 0:
        raise ValueError(f"an accuracy matrix has one row per stage and one column per task, not shape {found.shape}")
    return found


def average_final(matrix: np.ndarray) -> np.ndarray:
    """Mean over tasks after the last stage, ``[..., T, T] -> [...]``."""
    found: np.ndarray = check_matrix(matrix)[..., -1, :].mean(-1)
    return found


def learning_curve(matrix: np.ndarray) -> np.ndarray:
    """After each stage the mean over the tasks seen so far, ``[..., T, T] -> [..., T]``."""
    found = check_matrix(matrix)
    seen = np.tril(np.ones(found.shape[-2:]))
    averages: np.ndarray = np.where(seen > 0, found, 0.0).sum(-1) / seen.sum(-1)
    return averages


def average_over_stages(matrix: np.ndarray) -> np.ndarray:
    """Mean of the learning curve, ``[..., T, T] -> [...]``."""
    found: np.ndarray = learning_curve(matrix).mean(-1)
    return found


def gap_to(matrix: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """How far the last stage is behind a reference's final scores ``[..., T]``: ``[..., T, T] -> [...]``.

    Raises:
        ValueError: the reference has another number of tasks.
    """
    found, goal = check_matrix(matrix), np.asarray(reference, dtype=np.float64)
    if goal.shape[-1] != found.shape[-1]:
        raise ValueError(f"the reference has {goal.shape[-1]} tasks, the matrix {found.shape[-1]}")
    return _mean(goal - found[..., -1, :])


def learning_accuracy(matrix: np.ndarray) -> np.ndarray:
    """Mean over tasks right after each was trained, ``[..., T, T] -> [...]``."""
    found: np.ndarray = _diagonal(check_matrix(matrix)).mean(-1)
    return found


def backward_transfer(matrix: np.ndarray) -> np.ndarray:
    """BWT, ``[..., T, T] -> [...]``: below 0 where later stages cost earlier tasks."""
    found = check_matrix(matrix)
    return _mean(found[..., -1, :-1] - _diagonal(found)[..., :-1])


def forgetting(matrix: np.ndarray) -> np.ndarray:
    """Loss from each task's best earlier stage to the last, ``[..., T, T] -> [...]``; below 0 is a gain."""
    return _mean(forgetting_by_task(matrix))


def forgetting_by_task(matrix: np.ndarray) -> np.ndarray:
    """The same of each task but the last, ``[..., T, T] -> [..., T - 1]``."""
    found = check_matrix(matrix)
    if found.shape[-1] < 2:
        return found[..., -1, :-1]
    lost: np.ndarray = found[..., :-1, :-1].max(-2) - found[..., -1, :-1]
    return lost


def forward_transfer(matrix: np.ndarray, zero_shot: np.ndarray) -> np.ndarray:
    """FWT against the zero-shot row ``[..., T]``: ``[..., T, T] -> [...]``.

    Raises:
        ValueError: the zero-shot row has another number of tasks.
    """
    found, base = check_matrix(matrix), np.asarray(zero_shot, dtype=np.float64)
    if base.shape[-1] != found.shape[-1]:
        raise ValueError(f"the zero-shot row has {base.shape[-1]} tasks, the matrix {found.shape[-1]}")
    return _mean(np.diagonal(found, offset=1, axis1=-2, axis2=-1) - base[..., 1:])


def summary(
    matrix: np.ndarray, zero_shot: np.ndarray | None = None, references: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """All metrics by name; ``fwt`` is NaN without a zero-shot row, and each reference gives a ``gap_to_<its name>``."""
    measures: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "average_final": average_final,
        "average_over_stages": average_over_stages,
        "learning_accuracy": learning_accuracy,
        "bwt": backward_transfer,
        "forgetting": forgetting,
    }
    found = {name: measure(matrix) for name, measure in measures.items()}
    missing = np.full(np.shape(found["bwt"]), np.nan)
    found["fwt"] = missing if zero_shot is None else forward_transfer(matrix, zero_shot)
    return {**found, **{f"gap_to_{name}": gap_to(matrix, goal) for name, goal in (references or {}).items()}}


def _diagonal(matrix: np.ndarray) -> np.ndarray:
    return np.diagonal(matrix, axis1=-2, axis2=-1)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis, NaN (without a warning) where it is empty."""
    return values.mean(-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan)
