"""What every raw reader returns: examples, and a report of all that was mended, dropped or left open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llava.data.raw.text import mend_text
from llava.data.rows import question_row
from llava.normal_form import normalise

TRAIN, VALIDATE, TEST = "train", "validate", "test"


@dataclass(frozen=True)
class Example:
    """One raw question with its answer.

    Attributes:
        id: unique within the data set.
        image: file name relative to the image folder.
        domain: task name; None while it is not known.
        split: ``TRAIN``, ``VALIDATE`` or ``TEST``.
        answer_type: ``"OPEN"``, ``"CLOSED"`` or None.
        question_type: labels, typing slips mended and joined labels split.
        links: whatever ties pictures together (the same case); pictures that share one stay on one side of the
            unseen-image split.
        picture: what identifies the picture where several files may hold the same one; empty means the file name.
        extra: further fields of the output row.
    """

    id: int | str
    image: str
    question: str
    answer: str
    domain: str | None
    split: str
    answer_type: str | None = None
    question_type: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    picture: str = ""
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def content(self) -> tuple[str, str, str]:
        """What makes two examples the same one: picture, question and answer in normal form."""
        return self.picture or self.image, normalise(self.question), normalise(self.answer)

    def row(self, domains: Sequence[str], **optional: Any) -> dict[str, Any]:
        """The question row (see ``llava.data.rows``); ``optional`` fields win over the example's own."""
        fields = {
            "answer_type": self.answer_type,
            "question_type": list(self.question_type) or None,
            "split": self.split,
            **self.extra,
            **optional,
        }
        return question_row(self.id, self.image, self.question, self.answer, self.domain, domains, **fields)


@dataclass
class Report:
    """What happened to the raw rows; written beside the output so that nothing is changed or left out in silence.

    Attributes:
        dataset: data set name.
        inputs: path -> sha256 of each file read.
        mended: slip -> ids of the rows in which it was mended.
        dropped: rows that are in no output, each with its reason.
        repeated: rows that repeat another and were kept.
        organ_join: how the organ was found (the csv form only).
        notes: further lines for the reader.
    """

    dataset: str
    inputs: dict[str, str] = field(default_factory=dict)
    mended: dict[str, list[int | str]] = field(default_factory=dict)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    repeated: list[dict[str, Any]] = field(default_factory=list)
    organ_join: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def mend(self, kind: str, row_id: int | str) -> None:
        """Note that the slip ``kind`` was mended in a row."""
        self.mended.setdefault(kind, []).append(row_id)

    def text(self, value: Any, name: str, row_id: int | str, where: str) -> str:
        """``mend_text`` of one field, with its slips noted."""
        text, kinds = mend_text(value, f"{where}: field '{name}'")
        for kind in kinds:
            self.mend(f"{name}: {kind}", row_id)
        return text

    def drop(self, example: Example, reason: str, **details: Any) -> None:
        """Note that ``example`` is left out."""
        self.dropped.append({**_named(example), "reason": reason, **details})

    def repeat(self, example: Example, of: int | str) -> None:
        """Note that ``example`` repeats the row ``of`` and is kept."""
        self.repeated.append({**_named(example), "same_as": of})


def _named(example: Example) -> dict[str, Any]:
    return {
        "question_id": example.id,
        "split": example.split,
        "image": example.image,
        "question": example.question,
        "answer": example.answer,
    }
