"""The one definition of the project's row formats: question rows, instruct rows and answer rows.

A *question row* is one JSON object a line: ``question_id``, ``image``, ``pair_id``, ``text`` (the question with
``<image>``), ``gpt4_answer`` (the reference answer), ``domain`` (name -> bool, exactly one true), and optionally
``answer_type`` (OPEN or CLOSED), ``question_type``, ``split``. An *instruct row* is LLaVA's ``id``, ``image``,
``conversations``. Readers tell the two apart by content, keep unknown fields, and refuse a bad row with file, line,
field and reason. Writers are atomic.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import plain_question
from llava.files import atomic_write
from llava.utils import UserError, require_file

HUMAN, GPT = "human", "gpt"
ANSWER_TYPES = ("OPEN", "CLOSED")
ANSWER_STYLES = ("as_is", "lower")
"""How answers are taught: as the data has them, or in lower case."""
CONVERSATION_KEYS = ("conversations", "conversatons")  # the second is a slip in LLaVA-Med's published files


@dataclass(frozen=True)
class Row:
    """One question with its picture and, where known, its answer.

    Attributes:
        id: ``question_id`` of a question row, ``id`` of an instruct row.
        image: file name relative to the image folder; None for a text-only row.
        conversations: alternating ``(HUMAN, text)`` and ``(GPT, text)`` turns, human first. Human text may hold
            ``<image>`` (at most once in the whole row).
        domain: name of the one true entry of the row's ``domain``; None when the row has none.
        answer_type: ``"OPEN"``, ``"CLOSED"`` or None.
        raw: the row as read, unknown fields included.
    """

    id: int | str
    image: str | None
    conversations: tuple[tuple[str, str], ...]
    domain: str | None
    answer_type: str | None
    raw: dict[str, Any] = field(hash=False, repr=False)

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


def read_rows(path: str | Path, require_answer: bool = False) -> list[Row]:
    """Read a question JSONL or a LLaVA instruct JSON/JSONL, told by content, not by file ending.

    Args:
        path: the file.
        require_answer: refuse rows without an answer (training needs one, prediction does not).

    Raises:
        UserError: missing, unreadable or empty file; broken JSON; a bad field; a ``question_id`` used twice.
    """
    source = require_file(path, "row file", "check the path, or build it with: python fusion.py")
    rows: list[Row] = []
    first_use: dict[str, str] = {}
    for where, value in json_values(source):
        row = parse_row(value, where)
        if require_answer:
            _require_answers(row, where)
        if "question_id" in row.raw:
            _refuse_second_use(row.id, where, first_use)
        rows.append(row)
    if not rows:
        raise UserError(f"{source}: the file holds no rows (write one JSON object a line)")
    return rows


def parse_row(value: Any, where: str = "row") -> Row:
    """Check one decoded JSON value and return it as a ``Row``; ``where`` names the place in error messages.

    Raises:
        UserError: with the field and the reason.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {_kind(value)}")
    key = next((name for name in CONVERSATION_KEYS if name in value), None)
    if key is None and "text" not in value:
        raise UserError(
            f"{where}: field 'text' is missing (a question row has 'text', an instruct row 'conversations')"
        )
    conversations = _conversations(value[key], f"{where}: field '{key}'") if key else _question_turns(value, where)
    image = _image(value, where)
    _check_placeholders(conversations, image, where)
    return Row(
        id=_row_id(value, where, instruct=key is not None),
        image=image,
        conversations=conversations,
        domain=_domain(value.get("domain"), f"{where}: field 'domain'"),
        answer_type=_answer_type(value.get("answer_type"), f"{where}: field 'answer_type'"),
        raw=value,
    )


def in_lower_case(row: Row) -> Row:
    """The row with its answers in lower case; questions and the raw fields stay."""
    turns = tuple((who, text.lower() if who == "gpt" else text) for who, text in row.conversations)
    return replace(row, conversations=turns)


def read_answers(path: str | Path, partial_last_line: bool = False) -> list[dict[str, Any]]:
    """Read an answer file: one object a line with ``question_id`` and ``text`` (the prediction), the rest optional.

    Args:
        path: the file.
        partial_last_line: the writer may have been killed: leave out a last line that lacks its newline (it counts
            as not written; rewrite the file before appending to it), and accept an empty file.

    Raises:
        UserError: as ``read_rows``; also a question answered twice.
    """
    source = require_file(path, "answer file", "check the path, or run the evaluation first")
    answers: list[dict[str, Any]] = []
    first_use: dict[str, str] = {}
    for where, value in json_values(source, partial_last_line):
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a JSON object, found {_kind(value)}")
        _identifier(value.get("question_id"), f"{where}: field 'question_id'")
        _string(value.get("text"), f"{where}: field 'text'")
        if not isinstance(value.get("metadata", {}), dict):
            raise UserError(f"{where}: field 'metadata': expected an object, found {_kind(value['metadata'])}")
        _refuse_second_use(value["question_id"], where, first_use)
        answers.append(value)
    if not answers and not partial_last_line:
        raise UserError(f"{source}: the file holds no answers")
    return answers


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically: the file is complete or it is as it was before.

    Raises:
        UserError: a row holds something JSON cannot say (NaN, an object, half a surrogate pair).
    """
    with atomic_write(path) as stream:
        for number, row in enumerate(rows, start=1):
            stream.write(json_line(row, f"{path}: row {number}"))


def json_line(row: dict[str, Any], where: str = "row") -> str:
    """``row`` as one line of JSON with its newline; ``where`` names it in the ``UserError`` when JSON cannot say it."""
    try:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False)
        line.encode("utf-8")
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} cannot be written as JSON: {error}") from error
    return line + "\n"


def json_values(source: str | Path, partial_last_line: bool = False) -> Iterator[tuple[str, Any]]:
    """``(place, value)`` for each entry of a JSONL file, a JSON list, or of objects spread over several lines.

    ``place`` names file and line (or list item) for error messages.

    Raises:
        UserError: broken JSON or text that is not UTF-8, with its place.
    """
    data = Path(source).read_bytes().removeprefix(b"\xef\xbb\xbf")
    if data.lstrip()[:1] == b"[":
        yield from _json_list(source, data)
        return
    lines = data.split(b"\n")
    if partial_last_line:
        lines = lines[:-1]
    if next((line.strip() for line in lines if line.strip()), b"") == b"{":
        yield from _spread_objects(source, _decode(data, str(source)))
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{source} line {number}"
            yield where, _load(_decode(line, where), where)


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
    question = _string(question, f"{where}: question").strip()
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


def _json_list(source: str | Path, data: bytes) -> Iterator[tuple[str, Any]]:
    values = _load(_decode(data, str(source)), str(source))
    for number, value in enumerate(values, start=1):
        yield f"{source} item {number}", value


def _spread_objects(source: str | Path, text: str) -> Iterator[tuple[str, Any]]:
    decoder = json.JSONDecoder()
    position = 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        where = f"{source} line {text.count(chr(10), 0, position) + 1}"
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: broken JSON ({error})") from error
        yield where, value


def _load(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{where}, column {error.colno}" if error.lineno == 1 else f"{where}: line {error.lineno}"
        raise UserError(f"{place}: broken JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: broken JSON ({error})") from error


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start} (save the file as UTF-8)") from error


def _question_turns(value: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    text = _string(value["text"], f"{where}: field 'text'")
    if not text.replace(DEFAULT_IMAGE_TOKEN, "").strip():
        raise UserError(f"{where}: field 'text': the question is empty")
    answer = value.get("gpt4_answer")
    if answer is None:
        return ((HUMAN, text),)
    return (HUMAN, text), (GPT, _answer_text(answer, f"{where}: field 'gpt4_answer'"))


def _conversations(turns: Any, where: str) -> tuple[tuple[str, str], ...]:
    """Turns as tuples; a first turn by the model is left out, as LLaVA does."""
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: expected a list of {{from, value}}, found {_kind(turns)}")
    pairs = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or turn.get("from") not in (HUMAN, GPT):
            raise UserError(f"{where}, turn {number}: expected 'from' to be '{HUMAN}' or '{GPT}'")
        pairs.append((turn["from"], _string(turn.get("value"), f"{where}, turn {number}, 'value'")))
    if pairs[0][0] == GPT:
        pairs = pairs[1:]
    expected = [(HUMAN, GPT)[index % 2] for index in range(len(pairs))]
    if not pairs or [role for role, _ in pairs] != expected:
        raise UserError(f"{where}: turns must alternate {HUMAN}, {GPT}, …")
    if not pairs[0][1].replace(DEFAULT_IMAGE_TOKEN, "").strip():
        raise UserError(f"{where}: the first question is empty")
    return tuple(pairs)


def _check_placeholders(conversations: tuple[tuple[str, str], ...], image: str | None, where: str) -> None:
    count = sum(text.count(DEFAULT_IMAGE_TOKEN) for role, text in conversations if role == HUMAN)
    if image is None and count:
        raise UserError(f"{where}: the text names {DEFAULT_IMAGE_TOKEN} but the row has no 'image'")
    if count > 1:
        raise UserError(f"{where}: {count} times {DEFAULT_IMAGE_TOKEN} for one image (keep the first)")


def _require_answers(row: Row, where: str) -> None:
    answers = [text for role, text in row.conversations if role == GPT]
    if len(answers) * 2 != len(row.conversations) or not all(text.strip() for text in answers):
        name = "gpt4_answer" if "question_id" in row.raw else "conversations"
        raise UserError(f"{where}: field '{name}': a training row needs an answer to each question")


def _row_id(value: dict[str, Any], where: str, instruct: bool) -> int | str:
    name = "question_id" if "question_id" in value or not instruct else "id"
    return _identifier(value.get(name), f"{where}: field '{name}'")


def _identifier(value: Any, where: str) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise UserError(f"{where}: expected a number or a string, found {_kind(value)}")
    return value if isinstance(value, int) else _string(value, where)


def _image(value: dict[str, Any], where: str) -> str | None:
    image = value.get("image")
    if image is None:
        return None
    if not _string(image, f"{where}: field 'image'").strip():
        raise UserError(f"{where}: field 'image': the file name is empty (leave the field out for a text-only row)")
    return image


def _domain(value: Any, where: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(flag, bool) for flag in value.values()):
        raise UserError(f'{where}: expected an object of true and false, such as {{"abd": true, "chest": false}}')
    true = [name for name, flag in value.items() if flag]
    if len(true) != 1:
        raise UserError(f"{where}: exactly one entry must be true, found {len(true)} ({', '.join(true) or 'none'})")
    return true[0]


def _answer_type(value: Any, where: str) -> str | None:
    if value is None:
        return None
    kind = _string(value, where).strip().upper()
    if kind not in ANSWER_TYPES:
        raise UserError(f"{where}: expected OPEN or CLOSED, found {value!r}")
    return kind


def _answer_text(value: Any, where: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    return _string(value, where)


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: expected a string, found {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: holds half a surrogate pair, which is no text") from error
    return value


def _refuse_second_use(identifier: int | str, where: str, first_use: dict[str, str]) -> None:
    # Compared as text: a file that mixes 7 and "7" means the same question, and answers are matched by this id.
    first = first_use.setdefault(str(identifier), where)
    if first != where:
        raise UserError(f"{where}: question_id {identifier!r} was used before, at {first}")


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    names = {bool: "true/false", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    text = repr(value)
    return f"{names.get(type(value), type(value).__name__)} ({text if len(text) <= 40 else text[:37] + '…'})"
