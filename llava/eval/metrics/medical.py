"""Medical VQA metrics: exact match, accuracy on closed questions, recall and F1 on open ones, and the route."""

from __future__ import annotations

from llava.eval.metrics.base import Example, Group, metric, row_metric
from llava.eval.metrics.words import contains, matches, token_overlap
from llava.eval.statistics import Statistic, mean_statistic

ROUTE_FORMULA = (
    "mean over rows of one domain, a task the model knows, of [most probable task = the row's domain]; "
    "rows of no or of several domains are left out"
)


@row_metric("mean over rows of [normalised prediction = normalised reference]")
def exact_match(example: Example) -> float:
    return matches(example.prediction, example.reference)


@row_metric("exact match over closed rows")
def closed_accuracy(example: Example) -> float | None:
    return matches(example.prediction, example.reference) if example.closed else None


@row_metric("mean over closed rows of [the reference's VQA-v2 form is a substring of the prediction's]")
def closed_contains(example: Example) -> float | None:
    return contains(example.prediction, example.reference) if example.closed else None


@row_metric("exact match over open rows")
def open_exact_match(example: Example) -> float | None:
    return None if example.closed else matches(example.prediction, example.reference)


@row_metric("mean over open rows of matched tokens / reference tokens (VQA-v2 tokens, as multisets)")
def open_recall(example: Example) -> float | None:
    return None if example.closed else token_overlap(example.prediction, example.reference)[0]


@row_metric("mean over open rows of the harmonic mean of token precision and recall (VQA-v2 tokens, as multisets)")
def open_f1(example: Example) -> float | None:
    return None if example.closed else token_overlap(example.prediction, example.reference)[1]


@row_metric("mean number of words in a prediction")
def answer_words(example: Example) -> float:
    return len(example.prediction.split())


@metric(ROUTE_FORMULA)
def route_accuracy(group: Group) -> Statistic | str:
    examples = group.examples
    if not any(example.task_posterior for example in examples):
        return "the answers carry no free route"
    known = [example.row.domain in example.task_posterior for example in examples]
    correct = [float(example.routed_task == example.row.domain) for example in examples]
    return mean_statistic(ROUTE_FORMULA, correct, known)
