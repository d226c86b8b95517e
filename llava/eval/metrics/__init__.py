"""Metrics of a set of answers, each a registered function, and the scores that they give per domain and overall.

A metric is a decorated function; its file lies here or in a plug-in folder (see ``docs/extending.md``)::

    @row_metric("mean over rows of [the prediction ends in a full stop]")
    def full_stop(example):
        return float(example.prediction.endswith("."))
"""

from __future__ import annotations

from llava.data.metric_names import METRICS, metric_names
from llava.eval.metrics.base import OVERALL, Example, Group, Metric, metric, row_metric
from llava.eval.metrics.scoring import score
from llava.eval.statistics import Statistic, mean_statistic
from llava.normal_form import normalise

__all__ = [
    "METRICS",
    "OVERALL",
    "Example",
    "Group",
    "Metric",
    "Statistic",
    "mean_statistic",
    "metric",
    "metric_names",
    "normalise",
    "row_metric",
    "score",
]
