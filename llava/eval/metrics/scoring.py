"""Scores of a set of answers: every registered metric, overall, per domain, answer type and question type.

A row of several domains counts under each of them and once in the overall figures; a row of none in the latter alone.
So do the labels of ``question_type``, a text or a list of texts.

A closed row is one whose ``answer_type`` says so; rows without the field count as closed when the reference is yes or
no (the scores file says how many). Every figure in the scores file carries its formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from llava.data.metric_names import METRICS, metric_names
from llava.data.rows import Row
from llava.eval.metrics.base import OVERALL, Example, Group
from llava.eval.metrics.nearest import nearest_answers
from llava.eval.metrics.words import is_closed
from llava.eval.statistics import DRAWS, SEED, Statistic, figure, missing_figure, resample_weights
from llava.eval.text_metrics import TextScorer
from llava.utils import UserError


@dataclass(frozen=True)
class Prepared:
    """Answers ready to be scored in groups.

    Attributes:
        examples: the paired rows and answers. nearest: see ``Group``.
        references, predictions: their texts as tokens joined by spaces.
    """

    examples: Sequence[Example]
    train_rows: Sequence[Row]
    references: Sequence[str]
    predictions: Sequence[str]
    nearest: Sequence[str]
    scorer: TextScorer

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        answers: Sequence[Mapping[str, Any]],
        train_rows: Sequence[Row],
        scorer: TextScorer,
    ) -> Prepared:
        """Pair and tokenise.

        Raises:
            UserError: no rows, an answer for another question, a row without a reference.
        """
        examples = [_example(row, answer) for row, answer in zip(rows, answers, strict=True)]
        if not examples:
            raise UserError("there is nothing to score: no rows")
        tokens = scorer.tokenize([text for example in examples for text in (example.reference, example.prediction)])
        nearest = nearest_answers([row.question for row in rows], train_rows) if train_rows else []
        return cls(examples, train_rows, tokens[0::2], tokens[1::2], nearest, scorer)

    def statistics(
        self, members: Sequence[int], belongs: Callable[[Row], bool]
    ) -> tuple[Group, dict[str, Statistic | str]]:
        """A group's rows, and every metric of them; ``belongs`` says which training rows are the group's."""
        group = Group(
            [self.examples[i] for i in members],
            [row for row in self.train_rows if belongs(row)],
            [self.references[i] for i in members],
            [self.predictions[i] for i in members],
            self.scorer,
            [self.nearest[i] for i in members] if self.nearest else (),
        )
        return group, {metric.name: metric(group) for metric in METRICS}

    def domains(self) -> Iterable[tuple[str, Sequence[int], Callable[[Row], bool]]]:
        """Name, row numbers and test for training rows of the overall group and of every domain."""
        for name, members in group_members(self.examples).items():
            yield name, members, partial(_is_of, name, lambda row: (OVERALL, *row.domains))

    def kinds(self, kind: str) -> Iterable[tuple[str, Sequence[int], Callable[[Row], bool]]]:
        """The same of every label of a kind, one of ``KINDS``, in alphabetical order."""
        labels = KINDS[kind]
        of_rows = [labels(example.row) for example in self.examples]
        for name in sorted({label for found in of_rows for label in found}):
            members = [number for number, found in enumerate(of_rows) if name in found]
            yield name, members, partial(_is_of, name, labels)


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
        rows: the question rows, each with a reference answer, in the order of ``answers``.
        answers: answer rows; ``text`` is the prediction.
        train_rows: training rows, for the majority and nearest-question baselines (absent without them).
        scorer: a running ``TextScorer`` to share; one is started and ended here otherwise.
        draws, seed: of the bootstrap.

    Returns:
        ``{"groups": {"overall" | domain: {"rows", "empty_answers", "figures": {metric: figure}}}, "answer_types" and
        "question_types": {label: as a group}, "tokenizer", "per_row": {metric: [value or None per row]}, "by_domain":
        [{domain: {metric: value}} per row], ...}``, see ``statistics.figure``. ``per_row`` has a row's values in its
        domain, or overall where it has not just one; ``by_domain`` those of rows that have several.

    Raises:
        UserError: an answer for another question, a row without a reference.
    """
    if scorer is None:
        with closing(TextScorer()) as own:
            return score(rows, answers, train_rows, own, draws, seed)
    prepared = Prepared.of(rows, answers, train_rows, scorer)
    examples = prepared.examples
    groups: dict[str, dict[str, Any]] = {}
    per_row: dict[str, list[float | None]] = {}
    by_domain: list[dict[str, dict[str, float]]] = [{} for _ in examples]
    for name, members, belongs in prepared.domains():
        group, statistics = prepared.statistics(members, belongs)
        groups[name] = _group_scores(group, statistics, resample_weights(len(members), draws, seed))
        for number, values in zip(members, _row_values(statistics, len(members)), strict=True):
            domains = examples[number].row.domains
            if len(domains) > 1 and name != OVERALL:
                by_domain[number][name] = values
            elif name == (domains[0] if len(domains) == 1 else OVERALL):
                for column, value in values.items():
                    per_row.setdefault(column, [None] * len(examples))[number] = value
    kinds: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    for kind, found in kinds.items():
        for name, members, belongs in prepared.kinds(kind):
            group, statistics = prepared.statistics(members, belongs)
            found[name] = _group_scores(group, statistics, resample_weights(len(members), draws, seed))
    return {
        "groups": groups,
        **kinds,
        "tokenizer": scorer.tokenizer,
        "answer_type_source": _answer_type_source(examples),
        "rows_of_several_domains": sum(len(row.domains) > 1 for row in rows),
        "rows_of_no_domain": sum(not row.domains for row in rows),
        "bootstrap": {"draws": draws, "seed": seed, "interval": "95 % percentile, rows resampled within the group"},
        "per_row": {metric.name: per_row[metric.name] for metric in METRICS if metric.name in per_row},
        "by_domain": by_domain,
    }


def _is_of(name: str, labels: Callable[[Row], Sequence[str]], row: Row) -> bool:
    return name in labels(row)


def _question_types(row: Row) -> Sequence[str]:
    found = row.raw.get("question_type")
    return [str(label) for label in (found if isinstance(found, list) else [found]) if label not in (None, "")]


KINDS: dict[str, Callable[[Row], Sequence[str]]] = {
    "answer_types": lambda row: ["CLOSED" if is_closed(row) else "OPEN"],
    "question_types": _question_types,
}
"""Labels of a row by which scores are given too, by their name in the scores file."""


def group_members(examples: Sequence[Example]) -> dict[str, list[int]]:
    """Row numbers per group: ``overall`` first, then the domains in alphabetical order."""
    groups = {OVERALL: list(range(len(examples)))}
    for domain in sorted({domain for example in examples for domain in example.row.domains}):
        groups[domain] = [number for number, example in enumerate(examples) if domain in example.row.domains]
    return groups


def _example(row: Row, answer: Mapping[str, Any]) -> Example:
    name = f"question_id {row.id!r}"
    if str(answer["question_id"]) != str(row.id):
        raise UserError(f"{name} is paired with the answer to question_id {answer['question_id']!r}")
    if row.answer is None:
        raise UserError(f"{name} has no reference answer (add 'gpt4_answer' to the question row)")
    if OVERALL in row.domains:
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


def _row_values(statistics: Mapping[str, Statistic | str], count: int) -> list[dict[str, float]]:
    """For each row of a group the values of the metrics that are means over rows, where the row is in them."""
    rows: list[dict[str, float]] = [{} for _ in range(count)]
    for name, found in statistics.items():
        values = None if isinstance(found, str) else found.per_row
        for row, value in zip(rows, values or []):
            if value is not None:
                row[name] = value
    return rows


def _answer_type_source(examples: Sequence[Example]) -> str:
    derived = sum(example.row.answer_type is None for example in examples)
    return f"answer_type field; derived from a yes/no reference for {derived} of {len(examples)} rows"
