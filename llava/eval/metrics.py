"""Scores of a set of answers: text metrics and medical VQA metrics, per domain and overall.

Normalisations:

- ``normalise`` (exact match, closed accuracy, majority baseline): lower case, punctuation to spaces, runs of spaces to
  one. ``"CT-scan."`` -> ``"ct scan"``.
- ``vqa_tokens`` (closed accuracy by containment, open recall and F1), the rule behind LLaVA-Med's published figures:
  lower case, VQA-v2's punctuation to spaces, full stops and commas kept only inside numbers, number words to digits
  (``none`` is 0), articles dropped.

A closed row is one whose ``answer_type`` says so; rows without the field count as closed when the reference is yes or
no (the scores file says how many). Formulas are in ``FORMULAS`` and, with every figure, in the scores file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava.data.metric_names import METRIC_NAMES
from llava.data.rows import Row
from llava.eval.statistics import DRAWS, SEED, Statistic, figure, mean_statistic, missing_figure, resample_weights
from llava.eval.text_metrics import TextScorer
from llava.utils import UserError

OVERALL = "overall"

FORMULAS = {
    "exact_match": "mean over rows of [normalised prediction = normalised reference]",
    "closed_accuracy": "exact match over closed rows",
    "closed_contains": "mean over closed rows of [the reference's VQA-v2 form is a substring of the prediction's]",
    "open_recall": "mean over open rows of matched tokens / reference tokens (VQA-v2 tokens, as multisets)",
    "open_f1": "mean over open rows of the harmonic mean of token precision and recall (VQA-v2 tokens, as multisets)",
    "open_exact_match": "exact match over open rows",
    "route_accuracy": "mean over rows of tasks the model knows of [most probable task = the row's domain]",
    "answer_words": "mean number of words in a prediction",
    "majority_closed_accuracy": "closed accuracy of always giving the commonest closed training answer of the group",
    "majority_exact_match": "exact match of always giving the commonest training answer of the group",
}
METRICS = METRIC_NAMES

_NUMBER_WORDS = {"zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_NUMBER_WORDS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10", "none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
_NOT_A_WORD = re.compile(r"[\W_]+")
_VQA_PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`?!:]|(?<!\d)[.,]|[.,](?!\d)")


@dataclass(frozen=True)
class Example:
    """One scored row: the question row, the prediction, and the route where the model took one."""

    row: Row
    prediction: str
    metadata: Mapping[str, Any]

    @property
    def closed(self) -> bool:
        return is_closed(self.row)

    @property
    def task_posterior(self) -> Mapping[str, float]:
        """Probability of each task the model knows, as the route saw it; empty where the task was given or no route."""
        route = self.metadata.get("route") or {}
        return {} if route.get("task_given") else route.get("task_posterior") or {}

    @property
    def routed_task(self) -> str | None:
        """The most probable task of the route, or None when the answer carries no posterior."""
        return max(self.task_posterior, key=self.task_posterior.get, default=None)


# -- normalisation and row values ------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Lower case, punctuation to spaces, runs of spaces to one, none at the ends."""
    return _NOT_A_WORD.sub(" ", text.lower()).strip()


def vqa_tokens(text: str) -> list[str]:
    """Tokens in VQA-v2's form: see the module's docstring."""
    words = _VQA_PUNCTUATION.sub(" ", text.lower()).split()
    return [_NUMBER_WORDS.get(word, word) for word in words if word not in _ARTICLES]


def is_closed(row: Row) -> bool:
    """Whether the row is a closed question: by its ``answer_type``, else by a yes/no reference."""
    if row.answer_type is not None:
        return row.answer_type == "CLOSED"
    return normalise(row.answer or "") in ("yes", "no")


def exact_match(prediction: str, reference: str) -> float:
    """1.0 when the two are equal after ``normalise`` (and not both empty)."""
    return float(normalise(prediction) == normalise(reference) != "")


def contains(prediction: str, reference: str) -> float:
    """1.0 when the reference's tokens, joined, are a substring of the prediction's. Long answers gain by it."""
    wanted = " ".join(vqa_tokens(reference))
    return float(bool(wanted) and wanted in " ".join(vqa_tokens(prediction)))


def token_overlap(prediction: str, reference: str) -> tuple[float, float]:
    """Token recall and F1 of one row; both 0 when either side has no token."""
    found, wanted = Counter(vqa_tokens(prediction)), Counter(vqa_tokens(reference))
    matched = (found & wanted).total()
    if not matched:
        return 0.0, 0.0
    precision, recall = matched / found.total(), matched / wanted.total()
    return recall, 2 * precision * recall / (precision + recall)


def majority_answer(answers: Sequence[str]) -> str | None:
    """The commonest answer after ``normalise`` (ties: the first in the alphabet), or None without answers."""
    counts = Counter(filter(None, map(normalise, answers)))
    return min(counts, key=lambda answer: (-counts[answer], answer)) if counts else None


# -- scores ------------------------------------------------------------------------------------------------------------


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
    tokens = scorer.tokenize([text for example in examples for text in (example.row.answer, example.prediction)])
    references, predictions = tokens[0::2], tokens[1::2]
    groups, per_row = {}, {}
    for name, members in group_members(examples).items():
        texts = scorer.statistics([references[i] for i in members], [predictions[i] for i in members])
        chosen = [examples[i] for i in members]
        train = [row for row in train_rows if name in (OVERALL, row.domain)]
        statistics = {**texts, **vqa_statistics(chosen), **baseline_statistics(chosen, train)}
        groups[name] = _group_scores(chosen, train, statistics, resample_weights(len(members), draws, seed))
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
    for domain in sorted({example.row.domain for example in examples}):
        groups[domain] = [number for number, example in enumerate(examples) if example.row.domain == domain]
    return groups


def vqa_statistics(examples: Sequence[Example]) -> dict[str, Statistic | str]:
    """The medical VQA metrics of one group; a string in place of a metric says why it is missing."""
    pairs = [(example.prediction, example.row.answer) for example in examples]
    closed = np.array([example.closed for example in examples])
    matches = [exact_match(*pair) for pair in pairs]
    overlaps = [token_overlap(*pair) for pair in pairs]
    values = {
        "exact_match": (matches, None),
        "closed_accuracy": (matches, closed),
        "closed_contains": ([contains(*pair) for pair in pairs], closed),
        "open_exact_match": (matches, ~closed),
        "open_recall": ([recall for recall, _ in overlaps], ~closed),
        "open_f1": ([f1 for _, f1 in overlaps], ~closed),
        "answer_words": ([len(example.prediction.split()) for example in examples], None),
    }
    found: dict[str, Statistic | str] = {name: mean_statistic(FORMULAS[name], *value) for name, value in values.items()}
    found["route_accuracy"] = _route_statistic(examples)
    return found


def _route_statistic(examples: Sequence[Example]) -> Statistic | str:
    if not any(example.task_posterior for example in examples):
        return "the answers carry no free route"
    known = [example.row.domain in example.task_posterior for example in examples]
    correct = [float(example.routed_task == example.row.domain) for example in examples]
    return mean_statistic(FORMULAS["route_accuracy"], correct, known)


def baseline_statistics(examples: Sequence[Example], train_rows: Sequence[Row]) -> dict[str, Statistic | str]:
    """The majority baselines of one group from its training rows."""
    closed = np.array([example.closed for example in examples])
    common = majority_answer([row.answer or "" for row in train_rows])
    common_closed = majority_answer([row.answer or "" for row in train_rows if is_closed(row)])
    reason = "no training rows with an answer were given for this group"

    def constant(name: str, answer: str | None, where: np.ndarray | None) -> Statistic | str:
        if answer is None:
            return reason
        values = [exact_match(answer, example.row.answer) for example in examples]
        return mean_statistic(f"{FORMULAS[name]} ({answer!r})", values, where)

    return {
        "majority_closed_accuracy": constant("majority_closed_accuracy", common_closed, closed),
        "majority_exact_match": constant("majority_exact_match", common, None),
    }


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


def _group_scores(
    examples: Sequence[Example], train: Sequence[Row], statistics: Mapping[str, Statistic | str], weights: np.ndarray
) -> dict[str, Any]:
    figures = {}
    for name in METRICS:
        found = statistics[name]
        figures[name] = (
            missing_figure(FORMULAS.get(name, name), found) if isinstance(found, str) else figure(found, weights)
        )
    return {
        "rows": len(examples),
        "closed_rows": sum(example.closed for example in examples),
        "empty_answers": sum(not example.prediction.strip() for example in examples),
        "train_rows": len(train),
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
