"""Scores of a set of answers: every registered metric, per domain and overall.

A closed row is one whose ``answer_type`` says so; rows without the field count as closed when the reference is yes or
no (the scores file says how many). Every figure in the scores file carries its formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np

from llava.data.metric_names import METRICS, metric_names
from llava.data.rows import Row
from llava.eval.metrics.base import OVERALL, Example, Group
from llava.eval.statistics import DRAWS, SEED, Statistic, figure, missing_figure, resample_weights
from llava.eval.text_metrics import TextScorer
from llava.utils import UserError


def score(
    rows: Sequence[Row],
    answers: Sequence[Mapping[str, Any]],
    train_rows: Sequence[Row] = (),
    scorer: TextScorer | None = None,
    draws: int = DRAWS,
    seed: int = SEED,
) -> dict[str, Any]:
    """Score answers against question rows, overall and per domain.

    Args:
        rows: the question rows, each with a reference answer and a domain, in the order of ``answers``.
        answers: answer rows; ``text`` is the prediction.
        train_rows: training rows, for the majority baselines (absent without them).
        scorer: a running ``TextScorer`` to share; one is started and ended here otherwise.
        draws, seed: of the bootstrap.

    Returns:
        ``{"groups": {"overall" | domain: {"rows", "empty_answers", "figures": {metric: figure}}}, "tokenizer",
        "per_row": {metric: [value or None per row]}, ...}``, see ``bootstrap.figure``.

    Raises:
        UserError: an answer for another question, a row without a domain or a reference.
    """
    examples = [_example(row, answer) for row, answer in zip(rows, answers, strict=True)]
    if not examples:
        raise UserError("there is nothing to score: no rows")
    if scorer is None:
        with closing(TextScorer()) as own:
            return score(rows, answers, train_rows, own, draws, seed)
    tokens = scorer.tokenize([text for example in examples for text in (example.reference, example.prediction)])
    references, predictions = tokens[0::2], tokens[1::2]
    groups: dict[str, dict[str, Any]] = {}
    per_row: dict[str, list[float | None]] = {}
    for name, members in group_members(examples).items():
        group = Group(
            [examples[i] for i in members],
            [row for row in train_rows if name in (OVERALL, row.domain)],
            [references[i] for i in members],
            [predictions[i] for i in members],
            scorer,
        )
        statistics = {metric.name: metric(group) for metric in METRICS}
        groups[name] = _group_scores(group, statistics, resample_weights(len(members), draws, seed))
        if name != OVERALL:
            _spread_per_row(per_row, statistics, members, len(examples))
    return {
        "groups": groups,
        "tokenizer": scorer.tokenizer,
        "answer_type_source": _answer_type_source(examples),
        "bootstrap": {"draws": draws, "seed": seed, "interval": "95 % percentile, rows resampled within the group"},
        "per_row": per_row,
    }


def group_members(examples: Sequence[Example]) -> dict[str, list[int]]:
    """Row numbers per group: ``overall`` first, then the domains in alphabetical order."""
    groups = {OVERALL: list(range(len(examples)))}
    for domain in sorted({example.domain for example in examples}):
        groups[domain] = [number for number, example in enumerate(examples) if example.domain == domain]
    return groups


def _example(row: Row, answer: Mapping[str, Any]) -> Example:
    name = f"question_id {row.id!r}"
    if str(answer["question_id"]) != str(row.id):
        raise UserError(f"{name} is paired with the answer to question_id {answer['question_id']!r}")
    if row.domain is None:
        raise UserError(f"{name} has no domain (add 'domain' to the question row)")
    if row.answer is None:
        raise UserError(f"{name} has no reference answer (add 'gpt4_answer' to the question row)")
    if row.domain == OVERALL:
        raise UserError(f"{name}: a domain may not be called {OVERALL!r}")
    return Example(row, answer["text"], answer.get("metadata") or {})


def _group_scores(group: Group, statistics: Mapping[str, Statistic | str], weights: np.ndarray) -> dict[str, Any]:
    figures = {}
    for name in metric_names():
        found = statistics[name]
        if isinstance(found, str):
            figures[name] = missing_figure(METRICS.get(name).formula, found)
        else:
            figures[name] = figure(found, weights)
    return {
        "rows": len(group.examples),
        "closed_rows": sum(example.closed for example in group.examples),
        "empty_answers": sum(not example.prediction.strip() for example in group.examples),
        "train_rows": len(group.train_rows),
        "figures": figures,
    }


def _spread_per_row(
    per_row: dict[str, list], statistics: Mapping[str, Statistic | str], members: Sequence[int], total: int
) -> None:
    """Write a group's row values to their places among all rows (metrics that are means over rows)."""
    for name, found in statistics.items():
        values = None if isinstance(found, str) else found.per_row
        if values is None:
            continue
        column = per_row.setdefault(name, [None] * total)
        for number, value in zip(members, values, strict=True):
            column[number] = value


def _answer_type_source(examples: Sequence[Example]) -> str:
    derived = sum(example.row.answer_type is None for example in examples)
    return f"answer_type field; derived from a yes/no reference for {derived} of {len(examples)} rows"
