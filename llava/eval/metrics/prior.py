"""What is reached without looking: always the commonest training answer of the group."""

from __future__ import annotations

from collections.abc import Sequence

from llava.data.rows import Row
from llava.eval.metrics.base import Group, metric
from llava.eval.metrics.words import is_closed, majority_answer, matches
from llava.eval.statistics import Statistic, mean_statistic

CLOSED_FORMULA = "closed accuracy of always giving the commonest closed training answer of the group"
FORMULA = "exact match of always giving the commonest training answer of the group"


@metric(CLOSED_FORMULA)
def majority_closed_accuracy(group: Group) -> Statistic | str:
    closed = [example.closed for example in group.examples]
    return _constant(CLOSED_FORMULA, group, [row for row in group.train_rows if is_closed(row)], closed)


@metric(FORMULA)
def majority_exact_match(group: Group) -> Statistic | str:
    return _constant(FORMULA, group, group.train_rows, None)


def _constant(formula: str, group: Group, rows: Sequence[Row], where: Sequence[bool] | None) -> Statistic | str:
    answer = majority_answer([row.answer or "" for row in rows])
    if answer is None:
        return "no training rows with an answer were given for this group"
    values = [matches(answer, example.reference) for example in group.examples]
    return mean_statistic(f"{formula} ({answer!r})", values, where)
