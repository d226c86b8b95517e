"""Comparing texts: the normal forms of answers, and when one answers for another.

- ``normalise`` (exact match, closed accuracy, majority baseline) is the project's own, see ``llava.normal_form``.
- ``vqa_tokens`` (closed accuracy by containment, open recall and F1), the rule behind LLaVA-Med's published figures:
  lower case, VQA-v2's punctuation to spaces, full stops and commas kept only inside numbers, number words to digits
  (``none`` is 0), articles dropped.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from llava.data.rows import Row
from llava.normal_form import composed, normalise

NUMBER_WORDS = {"zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
NUMBER_WORDS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10", "none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
_VQA_PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`?!:]|(?<!\d)[.,]|[.,](?!\d)")


def vqa_tokens(text: str) -> list[str]:
    """Tokens in VQA-v2's form: see the module's docstring."""
    words = _VQA_PUNCTUATION.sub(" ", composed(text).lower()).split()
    return [NUMBER_WORDS.get(word, word) for word in words if word not in ARTICLES]


def is_closed(row: Row) -> bool:
    """Whether the row is a closed question: by its ``answer_type``, else by a yes/no reference."""
    if row.answer_type is not None:
        return row.answer_type == "CLOSED"
    return normalise(row.answer or "") in ("yes", "no")


def matches(prediction: str, reference: str) -> float:
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
