"""Figures with a confidence interval: every metric is a function of sums over rows.

A metric is written as ``value(sum over rows of stats[row])``. A mean is ``sum(x) / sum(1)``; corpus BLEU is a function
of summed n-gram counts. Resampling the rows with replacement then costs one matrix product, ``[draws, rows] @ [rows,
columns]``, for any metric, and the same draws serve all metrics and all stages (so differences are paired).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 1000
SEED = 17
INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Statistic:
    """A metric over rows.

    Attributes:
        formula: the formula in words, written into the scores file.
        rows: ``[rows, columns]`` additive statistics.
        value: ``[..., columns] -> [...]``, from their sums to the metric.
        counted: how many rows the metric is about (``n`` of the figure).
    """

    formula: str
    rows: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]
    counted: int

    @property
    def per_row(self) -> list[float | None] | None:
        """The rows' own values where the metric is a mean over rows (None for rows outside it), else None."""
        if self.value is not ratio:
            return None
        return [float(total / weight) if weight else None for total, weight in self.rows]


def ratio(sums: np.ndarray) -> np.ndarray:
    """``sums[..., 0] / sums[..., 1]``, NaN where the denominator is 0: the value of a mean."""
    numerator, denominator = sums[..., 0], sums[..., 1]
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def mean_statistic(formula: str, values: Sequence[float], where: Sequence[bool] | None = None) -> Statistic:
    """The mean of ``values`` over the rows for which ``where`` holds (all of them by default)."""
    weights = np.ones(len(values)) if where is None else np.asarray(where, dtype=np.float64)
    rows = np.stack([np.asarray(values, dtype=np.float64) * weights, weights], axis=-1)  # [rows, 2]
    return Statistic(formula, rows, ratio, int(weights.sum()))


def resample_weights(rows: int, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """How often each row is drawn, ``[draws, rows]``: ``draws`` samples of ``rows`` rows with replacement."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(rows, np.full(rows, 1 / rows), size=draws).astype(np.float64)


def interval(replicates: np.ndarray) -> list[float] | None:
    """The percentile interval of bootstrap replicates ``[draws]``; None when no replicate is defined."""
    defined = replicates[np.isfinite(replicates)]
    if not len(defined):
        return None
    return [float(bound) for bound in np.percentile(defined, INTERVAL)]


def figure(statistic: Statistic, weights: np.ndarray) -> dict:
    """``{"value", "n", "ci95", "formula"}`` of a metric; ``weights`` as ``resample_weights`` makes them."""
    if not statistic.counted:
        return {"value": None, "n": 0, "ci95": None, "formula": statistic.formula, "reason": "no such rows"}
    return {
        "value": float(statistic.value(statistic.rows.sum(axis=0))),
        "n": statistic.counted,
        "ci95": interval(statistic.value(weights @ statistic.rows)),
        "formula": statistic.formula,
    }


def missing_figure(formula: str, reason: str) -> dict:
    """A figure that could not be computed here, and why: never another number under the same name."""
    return {"value": None, "n": 0, "ci95": None, "formula": formula, "reason": reason}
