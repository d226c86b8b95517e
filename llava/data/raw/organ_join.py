"""Finds the organ of questions that came without one, by joining them with reference rows.

A row's own candidates are the organs under which the reference holds its question with its answer. One candidate
settles the row. With several, the *other* questions of the same picture decide: a picture shows one organ, so it must
be among the candidates of every one of them. What is still ambiguous stays open; nothing is guessed. A row that the
reference does not hold word for word takes its picture's organ where the others settle it, and is listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llava.normal_form import normalise

BY_ANSWER = "question and answer"
BY_IMAGE = "question and answer, then the picture's other questions"
BY_QUESTION = "question with another answer, then the picture's other questions"
BY_IMAGE_ALONE = "the picture's other questions alone"
CONFLICT = "question and answer, against the picture's other questions"
OPEN = "open"
LISTED = (BY_QUESTION, BY_IMAGE_ALONE, CONFLICT, OPEN)


@dataclass(frozen=True)
class Reference:
    """One row whose organ is known; ``fields`` are its further properties, for rows that join it."""

    organ: str
    question: str
    answer: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Decision:
    """The organ of one row (None while open), how it was found, and the organs that were possible."""

    organ: str | None
    how: str
    candidates: tuple[str, ...]


class ReferenceIndex:
    """Reference rows by question and answer in normal form, and by question alone."""

    def __init__(self, references: Iterable[Reference]) -> None:
        self._by_answer: dict[tuple[str, str], list[Reference]] = {}
        self._by_question: dict[str, set[str]] = {}
        for reference in references:
            question = normalise(reference.question)
            self._by_answer.setdefault((question, normalise(reference.answer)), []).append(reference)
            self._by_question.setdefault(question, set()).add(reference.organ)

    def matches(self, question: str, answer: str) -> list[Reference]:
        """References with this question and answer."""
        return self._by_answer.get((normalise(question), normalise(answer)), [])

    def organs(self, question: str, answer: str) -> frozenset[str]:
        """Organs under which this question has this answer."""
        return frozenset(reference.organ for reference in self.matches(question, answer))

    def organs_of_question(self, question: str) -> frozenset[str]:
        """Organs under which this question occurs, whatever its answer."""
        return frozenset(self._by_question.get(normalise(question), ()))


def join_organs(rows: Sequence[tuple[str, str, str]], index: ReferenceIndex) -> list[Decision]:
    """One decision a row.

    Args:
        rows: ``(picture, question, answer)``; rows with equal ``picture`` are about the same picture.
        index: the references.
    """
    candidates = [index.organs(question, answer) for _, question, answer in rows]
    by_picture: dict[str, list[int]] = {}
    for number, (picture, _, _) in enumerate(rows):
        by_picture.setdefault(picture, []).append(number)
    decisions = []
    for number, (picture, question, _) in enumerate(rows):
        others = [candidates[other] for other in by_picture[picture] if other != number and candidates[other]]
        # None: the other questions say nothing. Empty: they contradict each other.
        evidence = frozenset.intersection(*others) if others else None
        decisions.append(_decide(candidates[number], evidence, index.organs_of_question(question)))
    return decisions


def _decide(own: frozenset[str], evidence: frozenset[str] | None, of_question: frozenset[str]) -> Decision:
    possible = tuple(sorted(own or of_question or evidence or ()))
    if len(own) == 1:
        agrees = evidence is None or own <= evidence
        return Decision(possible[0], BY_ANSWER if agrees else CONFLICT, possible)
    if not evidence:
        return Decision(None, OPEN, possible)
    if own:
        left, how = own & evidence, BY_IMAGE
    elif of_question:
        left, how = of_question & evidence, BY_QUESTION
    else:
        left, how = evidence, BY_IMAGE_ALONE
    return Decision(next(iter(left)), how, possible) if len(left) == 1 else Decision(None, OPEN, possible)
