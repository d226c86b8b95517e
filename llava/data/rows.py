"""The one definition of the project's row formats: question rows and instruct rows.

A *question row* is one JSON object a line: ``question_id``, ``image`` (a file name, or a list of them), ``pair_id``,
``text`` (the question with ``<image>``), ``gpt4_answer`` (the reference answer), ``domain`` (name -> bool; one true
entry is the row's task), and optionally ``answer_type`` (OPEN or CLOSED), ``question_type``, ``split``. An *instruct
row* is LLaVA's ``id``, ``image``, ``conversations``. Readers tell the two apart by content, read other programs' rows
as what they are (``llava.data.layouts``), keep fields of no meaning here, and refuse a bad row with file, line, field
and reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.conversation import plain_question
from llava.data.jsonl import identifier_of, json_line, json_values, text_of, write_jsonl
from llava.data.layouts import CONVERSATION_KEYS, in_our_layout, is_missing, other_field
from llava.outside import kind_of
from llava.utils import UserError, rank0_print, require_file

__all__ = ["Row", "in_lower_case", "json_line", "json_values", "parse_row", "question_row", "read_rows", "write_jsonl"]

HUMAN, GPT, SYSTEM = "human", "gpt", "system"
ANSWER_TYPES = ("OPEN", "CLOSED")
ANSWER_STYLES = ("as_is", "lower")
"""How answers are taught: as the data has them, or in lower case."""


@dataclass(frozen=True)
class Row:
    """One question with its pictures and, where known, its answer.

    Attributes:
        id: ``question_id`` of a question row, ``id`` of an instruct row.
        images: file names relative to the image folder, in the order of their ``<image>``; none for a text-only row.
        conversations: alternating ``(HUMAN, text)`` and ``(GPT, text)`` turns, human first. Human text holds
            ``<image>`` as often as there are images, or not at all.
        domains: names of the true entries of the row's ``domain``; none when the row has none.
        answer_type: ``"OPEN"``, ``"CLOSED"`` or None.
        raw: the row as read, unknown fields included.
        system: replaces the template's system text; None where the row has no system turn.
        position: the row's place in its file, from 0, where several rows there have its id; else None.
    """

    id: int | str
    images: tuple[str, ...]
    conversations: tuple[tuple[str, str], ...]
    domains: tuple[str, ...]
    answer_type: str | None
    raw: dict[str, Any] = field(hash=False, repr=False)
    system: str | None = None
    position: int | None = None

    @property
    def image(self) -> str | None:
        """The first picture, or None."""
        return self.images[0] if self.images else None

    @property
    def shown(self) -> tuple[str, ...]:
        """The pictures of the first question: as many as it names, or all where it names none."""
        return self.images[: self.conversations[0][1].count(DEFAULT_IMAGE_TOKEN) or None]

    @property
    def domain(self) -> str | None:
        """The row's one domain; None where it has none, or several."""
        return self.domains[0] if len(self.domains) == 1 else None

    @property
    def key(self) -> tuple[str, int | None]:
        """What tells the row from all others of its file. Ids are compared as text: 7 and "7" are the same one."""
        return str(self.id), self.position

    @property
    def question(self) -> str:
        """The first human turn without ``<image>`` and surrounding white space."""
        return plain_question(self.conversations[0][1])

    @property
    def answer(self) -> str | None:
        """The first answer, or None when the row has none (or a blank one)."""
        if len(self.conversations) < 2 or not self.conversations[1][1].strip():
            return None
        return self.conversations[1][1]


def read_rows(
    path: str | Path, require_answer: bool = False, one_task: bool = False, tasks: Collection[str] = ()
) -> list[Row]:
    """Read a question JSONL or a LLaVA instruct JSON/JSONL, told by content, not by file ending.

    Args:
        path: the file.
        require_answer: refuse rows without an answer (training needs one, prediction does not).
        one_task: refuse rows whose ``domain`` says that they belong to no task, or to several.
        tasks: with ``one_task``, the tasks that the file is for: a row whose ``domain`` is another is refused.

    Raises:
        UserError: missing, unreadable or empty file; broken JSON; a bad field.
    """
    source = require_file(path, "row file", "check the path, or build it with: python fusion.py")
    rows: list[Row] = []
    others: dict[str, None] = {}  # in the order of their first use
    for place, (where, value) in enumerate(json_values(source)):
        row = parse_row(value, where, place)
        if name := other_field(value):
            others[name] = None
        if require_answer:
            _require_answers(row, where)
        if one_task:
            _require_one_task(row, where, tasks)
        rows.append(row)
    if not rows:
        raise UserError(f"{source}: the file holds no rows (write one JSON object a line)")
    if others:
        rank0_print(f"note: {source}: pictures are read from {', '.join(map(repr, others))}, which stands for 'image'")
    return with_positions(rows)


def with_positions(rows: Sequence[Row]) -> list[Row]:
    """The rows of one file; those that share their id with others know their ``position`` in it."""
    uses = Counter(str(row.id) for row in rows)
    return [replace(row, position=place) if uses[str(row.id)] > 1 else row for place, row in enumerate(rows)]


def parse_row(value: Any, where: str = "row", place: int = 0) -> Row:
    """Check one decoded JSON value and return it as a ``Row``.

    Args:
        where: names the place in error messages.
        place: the row's place in its file, from 0: the id of another program's row, which may have none.

    Raises:
        UserError: with the field and the reason.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {kind_of(value)}")
    raw, (value, foreign) = value, in_our_layout(value, where)
    key = next((name for name in CONVERSATION_KEYS if name in value), None)
    if key is None and "text" not in value:
        raise UserError(
            f"{where}: field 'text' is missing (a question row has 'text', an instruct row 'conversations')"
        )
    turns = _conversations(value[key], f"{where}: field '{key}'") if key else (None, _question_turns(value, where))
    system, conversations = turns
    images = _images(value.get("image"), f"{where}: field 'image'")
    _check_placeholders(conversations, len(images), where)
    if foreign and value.get("id") is None and value.get("question_id") is None:
        value["id" if key else "question_id"] = place
    return Row(
        id=_row_id(value, where, instruct=key is not None),
        images=images,
        conversations=conversations,
        domains=_domains(value.get("domain"), f"{where}: field 'domain'"),
        answer_type=_answer_type(value.get("answer_type"), f"{where}: field 'answer_type'"),
        raw=raw,
        system=system,
    )


def in_lower_case(row: Row) -> Row:
    """The row with its answers in lower case; questions and the raw fields stay."""
    turns = tuple((who, text.lower() if who == "gpt" else text) for who, text in row.conversations)
    return replace(row, conversations=turns)


def question_row(
    question_id: int | str,
    image: str | None,
    question: str,
    answer: str | None,
    domain: str | None,
    domains: Sequence[str] = (),
    **optional: Any,
) -> dict[str, Any]:
    """Build a question row: ``text`` is the question and ``\\n<image>``; ``pair_id`` the image name without ending.

    Args:
        question_id: unique within its file.
        image: name relative to the image folder, or None for a text-only row.
        question: the question without ``<image>``.
        answer: the reference answer, or None where unknown.
        domain: the row's domain, one of ``domains``, or None to leave the field out.
        domains: all domain names of the data set, in the order in which they are written.
        **optional: further fields such as ``answer_type`` or ``split``; those that are None are left out, and
            ``pair_id`` replaces the default.

    Raises:
        UserError: when the result would not be a valid question row.
    """
    where = f"question {question_id!r}"
    if domain is not None and domain not in domains:
        raise UserError(f"{where}: domain {domain!r} is not one of {', '.join(domains)}")
    question = text_of(question, f"{where}: question").strip()
    if not question or DEFAULT_IMAGE_TOKEN in question:
        raise UserError(f"{where}: the question is empty or holds {DEFAULT_IMAGE_TOKEN!r}: {question!r}")
    row: dict[str, Any] = {"question_id": question_id}
    if image is not None:
        if not PurePosixPath(image).name:
            raise UserError(f"{where}: image {image!r} names no file")
        row["image"] = image
        row["pair_id"] = str(PurePosixPath(image).with_suffix(""))
    row["text"] = question if image is None else f"{question}\n{DEFAULT_IMAGE_TOKEN}"
    if answer is not None:
        row["gpt4_answer"] = answer
    if domain is not None:
        row["domain"] = {name: name == domain for name in domains}
    row.update({name: value for name, value in optional.items() if value is not None})
    parse_row(row, where)
    return row


def _question_turns(value: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    text = text_of(value["text"], f"{where}: field 'text'")
    if not plain_question(text):
        raise UserError(f"{where}: field 'text': the question is empty")
    answer = value.get("gpt4_answer")
    if answer is None:
        return ((HUMAN, text),)
    return (HUMAN, text), (GPT, _answer_text(answer, f"{where}: field 'gpt4_answer'"))


def _conversations(turns: Any, where: str) -> tuple[str | None, tuple[tuple[str, str], ...]]:
    """The system text and the turns as tuples; a first turn by the model is left out, as LLaVA does."""
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: expected a list of {{from, value}}, found {kind_of(turns)}")
    pairs: list[tuple[str, str]] = []
    for number, turn in enumerate(turns, start=1):
        known = (HUMAN, GPT) if pairs else (HUMAN, GPT, SYSTEM)
        if not isinstance(turn, dict) or turn.get("from") not in known:
            first = "" if pairs else f", or '{SYSTEM}' in the first turn"
            raise UserError(f"{where}, turn {number}: expected 'from' to be '{HUMAN}' or '{GPT}'{first}")
        pairs.append((turn["from"], text_of(turn.get("value"), f"{where}, turn {number}, 'value'")))
    system = pairs.pop(0)[1].strip() if pairs[0][0] == SYSTEM else ""
    if DEFAULT_IMAGE_TOKEN in system:
        raise UserError(f"{where}, turn 1: the system turn names {DEFAULT_IMAGE_TOKEN} (put it into a human turn)")
    if pairs and pairs[0][0] == GPT:
        pairs = pairs[1:]
    expected = [(HUMAN, GPT)[index % 2] for index in range(len(pairs))]
    if not pairs or [role for role, _ in pairs] != expected:
        raise UserError(f"{where}: turns must alternate {HUMAN}, {GPT}, …")
    if not plain_question(pairs[0][1]):
        raise UserError(f"{where}: the first question is empty")
    return system or None, tuple(pairs)


def _check_placeholders(conversations: tuple[tuple[str, str], ...], images: int, where: str) -> None:
    count = sum(text.count(DEFAULT_IMAGE_TOKEN) for role, text in conversations if role == HUMAN)
    if count and not images:
        raise UserError(f"{where}: the text names {DEFAULT_IMAGE_TOKEN} but the row has no 'image'")
    if count not in (0, images):
        raise UserError(f"{where}: {wrong_count(count, images)}")


def wrong_count(marks: int, images: int) -> str:
    """What is said of a text that does not name ``<image>`` once for each picture."""
    pictures = "one image" if images == 1 else f"{images} images"
    return f"{marks} times {DEFAULT_IMAGE_TOKEN} for {pictures} (write it once for each, or not at all)"


def with_pictures(question: str, count: int) -> str:
    """The question with one ``<image>`` for each of ``count`` pictures, in front unless it places them itself.

    Raises:
        UserError: it names another number of pictures.
    """
    question = question.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)
    named = question.count(DEFAULT_IMAGE_TOKEN)
    if named and named != count:
        raise UserError(f"the question holds {wrong_count(named, count)}")
    return question if named else f"{DEFAULT_IMAGE_TOKEN}\n" * count + question


def _require_answers(row: Row, where: str) -> None:
    answers = [text for role, text in row.conversations if role == GPT]
    if len(answers) * 2 != len(row.conversations) or not all(text.strip() for text in answers):
        name = "conversations" if any(name in row.raw for name in CONVERSATION_KEYS) else "gpt4_answer"
        raise UserError(f"{where}: field '{name}': a training row needs an answer to each question")


def _require_one_task(row: Row, where: str, tasks: Collection[str]) -> None:
    if row.raw.get("domain") is not None and row.domain is None:
        found = f"{len(row.domains)} ({', '.join(row.domains) or 'none'})"
        raise UserError(f"{where}: field 'domain': a training row has one task: exactly one entry true, found {found}")
    if tasks and row.domain is not None and row.domain not in tasks:
        wanted = " or ".join(repr(task) for task in tasks)
        raise UserError(
            f"{where}: field 'domain': the row is of {row.domain!r}, but the file trains {wanted} (give that task's "
            "file, or correct the row)"
        )


def _row_id(value: dict[str, Any], where: str, instruct: bool) -> int | str:
    name = "question_id" if value.get("question_id") is not None or not instruct else "id"
    return identifier_of(value.get(name), f"{where}: field '{name}'")


def _images(value: Any, where: str) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [] if value is None else [value]
    for name in names:
        if not text_of(name, where).strip():
            raise UserError(f"{where}: the file name is empty (leave the field out for a text-only row)")
    return tuple(names)


def _domains(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, dict) or not all(isinstance(flag, bool) for flag in value.values()):
        raise UserError(f'{where}: expected an object of true and false, such as {{"abd": true, "chest": false}}')
    return tuple(name for name, flag in value.items() if flag)


def _answer_type(value: Any, where: str) -> str | None:
    if value is None:
        return None
    kind = text_of(value, where).strip().upper()
    if kind not in ANSWER_TYPES:
        raise UserError(f"{where}: expected OPEN or CLOSED, found {kind_of(value)}")
    return kind


def _answer_text(value: Any, where: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if is_missing(value):
        raise UserError(f"{where}: {value!r} stands for a missing value (leave the field out, or write the answer)")
    return text_of(value, where)
