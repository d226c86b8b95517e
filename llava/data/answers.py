"""The definition of answer rows: one object a line with ``question_id`` and ``text``, the rest optional."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.data.jsonl import identifier_of, json_values, text_of
from llava.files import values_sha256
from llava.outside import kind_of
from llava.utils import UserError, require_file

CHECKSUM = "checksum"


def read_answers(path: str | Path, partial_last_line: bool = False) -> list[dict[str, Any]]:
    """Read an answer file: one object a line with ``question_id`` and ``text`` (the prediction), the rest optional.

    Args:
        path: the file.
        partial_last_line: the writer may have been killed: leave out a last line that lacks its newline (it counts
            as not written; rewrite the file before appending to it), and accept an empty file.

    Raises:
        UserError: as ``read_rows``. Which row an answer is for is not looked at, see ``llava.eval.answer_match``.
    """
    source = require_file(path, "answer file", "check the path, or run the evaluation first")
    answers = [parse_answer(value, where) for where, value in json_values(source, partial_last_line)]
    if not answers and not partial_last_line:
        raise UserError(f"{source}: the file holds no answers")
    return answers


def with_checksum(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An answer whose ``metadata`` holds a ``checksum`` of all the rest of it."""
    metadata = answer.get("metadata") or {}
    return {**answer, "metadata": {**metadata, CHECKSUM: _checksum(answer)}}


def _checksum(answer: Mapping[str, Any]) -> str:
    metadata = {name: value for name, value in (answer.get("metadata") or {}).items() if name != CHECKSUM}
    return values_sha256({**answer, "metadata": metadata})


def parse_answer(value: Any, where: str) -> dict[str, Any]:
    """Check one decoded JSON value and return it; ``where`` names the place in error messages.

    Raises:
        UserError: with the field and the reason; the answer is not the one that was written.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {kind_of(value)}")
    identifier_of(value.get("question_id"), f"{where}: field 'question_id'")
    text_of(value.get("text"), f"{where}: field 'text'")
    if not isinstance(value.get("metadata"), dict | None):
        raise UserError(f"{where}: field 'metadata': expected an object, found {kind_of(value['metadata'])}")
    kept = (value.get("metadata") or {}).get(CHECKSUM)
    if kept is not None and kept != _checksum(value):
        raise UserError(
            f"{where}: is not the answer that was written here; answer again, or where the change is meant, take "
            f"{CHECKSUM!r} out of its metadata"
        )
    return value
