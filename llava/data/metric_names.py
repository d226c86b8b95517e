"""Names of the metrics: a task sequence chooses among them, evaluation computes them.

They stand here, below both, so that a sequence file with a misspelt metric is refused before anything is trained.
"""

from __future__ import annotations

from typing import Any, Protocol

from llava.registry import Registry

METRIC_NAMES = (
    "exact_match",
    "closed_accuracy",
    "majority_closed_accuracy",
    "nearest_closed_accuracy",
    "closed_contains",
    "llava_med_closed_accuracy",
    "open_exact_match",
    "nearest_open_exact_match",
    "open_recall",
    "nearest_open_recall",
    "open_f1",
    "llava_med_open_recall",
    "bleu_1",
    "bleu_2",
    "bleu_3",
    "bleu_4",
    "rouge_l",
    "meteor",
    "cider",
    "majority_exact_match",
    "nearest_exact_match",
    "route_accuracy",
    "answer_words",
)
"""The metrics that ship, in the order of the tables."""


class NamedMetric(Protocol):
    """What is known of a metric here; ``llava.eval.metrics`` says how it is computed."""

    name: str
    formula: str

    def __call__(self, group: Any) -> Any:
        """Its statistic in a group of scored rows."""


METRICS: Registry[NamedMetric] = Registry("metric", "llava.eval.metrics")


def metric_names() -> list[str]:
    """Every metric in the order of the tables: those that ship, then the others by name."""
    return [*METRIC_NAMES, *(name for name in METRICS.names() if name not in METRIC_NAMES)]
