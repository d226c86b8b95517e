"""What a metric is, and what it sees: the scored rows of one group, its training rows, and the texts' tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava.data.metric_names import METRICS
from llava.data.rows import Row
from llava.eval.metrics.words import is_closed
from llava.eval.statistics import Statistic, mean_statistic
from llava.eval.text_metrics import TextScorer

OVERALL = "overall"


@dataclass(frozen=True)
class Example:
    """One scored row: the question row, the prediction, and the route where the model took one."""

    row: Row
    prediction: str
    metadata: Mapping[str, Any]

    @property
    def reference(self) -> str:
        """The right answer."""
        return self.row.answer or ""

    @functools.cached_property
    def closed(self) -> bool:
        """Whether the question is closed: by its ``answer_type``, else by a yes/no reference."""
        return is_closed(self.row)

    @property
    def task_posterior(self) -> Mapping[str, float]:
        """Probability of each task the model knows, as the route saw it; empty where the task was given or no route."""
        route = self.metadata.get("route") or {}
        return {} if route.get("task_given") else route.get("task_posterior") or {}

    @property
    def routed_task(self) -> str | None:
        """The most probable task of the route, or None when the answer carries no posterior."""
        posterior = self.task_posterior
        return max(posterior, key=lambda task: posterior[task], default=None)


@dataclass(frozen=True)
class Group:
    """The rows that one figure is about: all of them, or those of a domain.

    Attributes:
        examples: the scored rows.
        train_rows: training rows of the group, for baselines; may be empty.
        references, predictions: the texts as tokens joined by spaces, in the order of ``examples``.
        scorer: computes caption metrics from them.
        nearest: for each example the answer of the training question nearest to it; may be empty.
    """

    examples: Sequence[Example]
    train_rows: Sequence[Row]
    references: Sequence[str]
    predictions: Sequence[str]
    scorer: TextScorer
    nearest: Sequence[str] = ()

    @functools.cached_property
    def captions(self) -> dict[str, Statistic | str]:
        """The caption metrics of the group, computed together."""
        return self.scorer.statistics(self.references, self.predictions)


class Metric:
    """A metric by name.

    Args:
        name: in tables, scores files and task sequences.
        formula: what it is, in words; written beside every figure.
        compute: the statistic of a group, or a string that says why there is none.
    """

    def __init__(self, name: str, formula: str, compute: Callable[[Group], Statistic | str]):
        self.name, self.formula, self.compute = name, formula, compute
        functools.update_wrapper(self, compute)

    def __call__(self, group: Group) -> Statistic | str:
        return self.compute(group)


def metric(formula: str, name: str | None = None) -> Callable[[Callable[[Group], Statistic | str]], Metric]:
    """Register a function of a ``Group`` as a metric, under its own name unless another is given."""
    return lambda compute: METRICS.register(Metric(name or compute.__name__, formula, compute))


def row_metric(formula: str, name: str | None = None) -> Callable[[Callable[[Example], float | None]], Metric]:
    """Register a function of one ``Example`` as a metric: its mean over the rows for which it is not ``None``."""

    def decorate(value_of: Callable[[Example], float | None]) -> Metric:
        @functools.wraps(value_of)
        def compute(group: Group) -> Statistic:
            values = [value_of(example) for example in group.examples]
            counted = [value is not None for value in values]
            return mean_statistic(formula, [0.0 if value is None else value for value in values], counted)

        return METRICS.register(Metric(name or value_of.__name__, formula, compute))

    return decorate
