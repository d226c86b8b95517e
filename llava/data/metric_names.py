"""Names of the metrics: a task sequence chooses among them, evaluation computes them.

They stand here, below both, so that a sequence file with a misspelt metric is refused before anything is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava.registry import Registry

METRIC_NAMES = (
    "exact_match",
    "closed_accuracy",
    "majority_closed_accuracy",
    "closed_contains",
    "open_exact_match",
    "open_recall",
    "open_f1",
    "bleu_1",
    "bleu_2",
    "bleu_3",
    "bleu_4",
    "rouge_l",
    "meteor",
    "cider",
    "majority_exact_match",
    "route_accuracy",
    "answer_words",
)
"""The metrics that ship, in the order of the tables."""


@dataclass(frozen=True)
class Metric:
    """A metric by name."""

    name: str


METRICS: Registry[Metric] = Registry("metric")
for _name in METRIC_NAMES:
    METRICS.register(Metric(_name))
