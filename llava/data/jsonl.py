"""JSON files: one object a line, a list, or objects spread over lines; and what their values must be.

Readers give every value with its place, for error messages. Writers are atomic.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llava.files import atomic_write
from llava.outside import DECODER, decoded, kind_of, parsed, refuse_depth
from llava.utils import UserError


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
        yield from _spread_objects(source, decoded(data, str(source)))
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{source} line {number}"
            yield where, parsed(decoded(line, where), where, one_line=True)


def identifier_of(value: Any, where: str) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise UserError(f"{where}: expected a whole number or a string, found {kind_of(value)}")
    return value if isinstance(value, int) else text_of(value, where)


def text_of(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: expected a string, found {kind_of(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: holds half a surrogate pair, which is no text") from error
    return value


def _json_list(source: str | Path, data: bytes) -> Iterator[tuple[str, Any]]:
    values = parsed(decoded(data, str(source)), str(source))
    for number, value in enumerate(values, start=1):
        yield f"{source} item {number}", value


def _spread_objects(source: str | Path, text: str) -> Iterator[tuple[str, Any]]:
    position = 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        where = f"{source} line {text.count(chr(10), 0, position) + 1}"
        try:
            start = position
            value, position = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: broken JSON ({error})") from error
        refuse_depth(value, text[start:position], where)
        yield where, value
