"""What is reached by copying: the answer of the training question nearest in words, without looking at a picture.

Questions are vectors of TF-IDF weights over their normalised words, ``count * (ln((1 + n) / (1 + df)) + 1)`` where
``df`` of the ``n`` training questions hold the word, at unit length. Nearest is the highest cosine among all training
rows, of whatever domain; of equals the first. A question without a known word is answered with nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from llava.data.rows import Row
from llava.eval.metrics.base import Group, metric
from llava.eval.metrics.words import matches, token_overlap
from llava.eval.statistics import Statistic, mean_statistic
from llava.normal_form import normalise

FORMULA = "exact match of copying the answer of the nearest training question (TF-IDF cosine over words)"
CLOSED, OPEN = f"the same over closed rows: {FORMULA}", f"the same over open rows: {FORMULA}"
RECALL = "open recall of copying the answer of the nearest training question (TF-IDF cosine over words)"


def nearest_answers(questions: Sequence[str], train_rows: Sequence[Row]) -> list[str]:
    """For each question the answer of the nearest training question; empty where no training word is in it."""
    known = [row for row in train_rows if row.answer is not None]
    documents = [Counter(normalise(row.question).split()) for row in known]
    frequency = Counter(word for document in documents for word in document)
    weight = {word: math.log((1 + len(known)) / (1 + count)) + 1 for word, count in frequency.items()}
    postings: dict[str, tuple[list[int], list[float]]] = {word: ([], []) for word in frequency}
    for number, document in enumerate(documents):
        length = math.hypot(*(count * weight[word] for word, count in document.items()))
        for word, count in document.items():
            postings[word][0].append(number)
            postings[word][1].append(count * weight[word] / length)
    arrays = {word: (np.array(numbers), np.array(values)) for word, (numbers, values) in postings.items()}
    found: dict[str, str] = {}
    for text in {normalise(question) for question in questions}:
        similarity = np.zeros(len(known))
        for word, count in Counter(text.split()).items():
            if word in arrays:
                numbers, values = arrays[word]
                similarity[numbers] += count * weight[word] * values
        best = int(similarity.round(12).argmax()) if similarity.any() else None  # sums in another order are equals
        found[text] = "" if best is None else known[best].answer or ""
    return [found[normalise(question)] for question in questions]


def _copied(formula: str, group: Group, value: Callable[[str, str], float], closed: bool | None) -> Statistic | str:
    if not group.nearest:
        return "no training rows with an answer were given"
    values = [value(text, example.reference) for text, example in zip(group.nearest, group.examples, strict=True)]
    where = None if closed is None else [example.closed == closed for example in group.examples]
    return mean_statistic(formula, values, where)


@metric(CLOSED)
def nearest_closed_accuracy(group: Group) -> Statistic | str:
    return _copied(CLOSED, group, matches, True)


@metric(OPEN)
def nearest_open_exact_match(group: Group) -> Statistic | str:
    return _copied(OPEN, group, matches, False)


@metric(RECALL)
def nearest_open_recall(group: Group) -> Statistic | str:
    return _copied(RECALL, group, lambda text, reference: token_overlap(text, reference)[0], False)


@metric(FORMULA)
def nearest_exact_match(group: Group) -> Statistic | str:
    return _copied(FORMULA, group, matches, None)
