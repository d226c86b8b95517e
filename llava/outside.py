"""What comes from outside: the one reader of JSON and of other people's text, and one line for what is wrong with it.

Files are UTF-8, with or without a byte order mark. A field that an object has twice, nesting beyond reason and a value
that is no object are refused here; what the fields must be is said by ``llava.schema``. ``foreign`` is for files that
another library reads by itself.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava.utils import UserError, require_file

DEEPEST = 100
"""Levels of nesting that are read. Nothing of the project's needs ten."""
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: str | os.PathLike[str], what: str = "file", mend: str = "check the path") -> str:
    """The text of a file.

    Raises:
        UserError: it is missing, no regular file, not readable, or not UTF-8.
    """
    found = require_file(path, what, mend)
    return decoded(found.read_bytes(), str(found))


def read_json(path: str | os.PathLike[str], what: str = "JSON file", mend: str = "check the path") -> Any:
    """The one value of a JSON file.

    Raises:
        UserError: as ``read_text``, and as ``parsed``.
    """
    return parsed(read_text(path, what, mend), str(path))


def read_object(
    path: str | os.PathLike[str], what: str = "JSON file", mend: str = "check the path", bare: bool = False
) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        bare: another library reads the file too, and none of them takes a byte order mark.

    Raises:
        UserError: as ``read_json``; another value than an object.
    """
    if bare and Path(path).is_file() and Path(path).read_bytes().startswith(codecs.BOM_UTF8):
        raise UserError(f"{path}: begins with a byte order mark, which transformers refuses; save it as plain UTF-8")
    values = read_json(path, what, mend)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {kind_of(values)}")
    return values


def decoded(data: bytes, where: str) -> str:
    """The text of some bytes, without a byte order mark; ``where`` names them in messages.

    Raises:
        UserError: they are not UTF-8; the message says what they look like.
    """
    if data.startswith(_UTF_16) or b"\0" in data[:2]:
        raise UserError(f"{where}: byte 0 is not UTF-8 text; save the file as UTF-8 (it looks like UTF-16)")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte {error.start} is not UTF-8 text; save the file as UTF-8 (it may be Latin-1)"
        ) from error


def parsed(text: str, where: str, one_line: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        where: names the text in messages. one_line: it is one line of a file, and ``where`` says which.

    Raises:
        UserError: broken JSON, with its place; a field twice in one object; nesting deeper than ``DEEPEST``.
    """
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if one_line else f"line {error.lineno}"
        raise UserError(f"{where}, {place}: broken JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: broken JSON ({_said(error)})") from error
    refuse_depth(value, text, where)
    return value


def parsed_yaml(text: str, where: str) -> Any:
    """The value of a YAML text: plain values alone, no objects.

    Raises:
        UserError: broken YAML.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: broken YAML ({_said(error)})") from error


def refuse_depth(value: Any, text: str, where: str) -> None:
    """``UserError`` where a value is nested so deeply that no later step could handle it."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise UserError(f"{where}: broken JSON (nested deeper than {DEEPEST} levels)")
        insides = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list)))
        level = [one for inside in insides for one in inside if isinstance(one, (dict, list))]


def kind_of(value: Any) -> str:
    """What a value is, in words, for messages."""
    if value is None:
        return "nothing"
    names = {bool: "true/false", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of thousands of digits
        text = "…"
    return f"{names.get(type(value), type(value).__name__)} ({text if len(text) <= 40 else text[:37] + '…'})"


@contextlib.contextmanager
def foreign(where: str | os.PathLike[str], mend: str, said: str = "cannot be read here") -> Iterator[None]:
    """While another library reads files from outside: what it raises of them becomes one line.

    A machine that is out of memory or disk, or lacks a permission, is no fault of a file and passes.

    Raises:
        UserError: ``where`` cannot be read.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        of_the_machine = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if of_the_machine or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise UserError(f"{where}: {said} ({_said(error)}); {mend}") from error


def _said(error: BaseException) -> str:
    """An error's first line, with its kind where the text alone says little."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, RecursionError):
        return f"nested deeper than {DEEPEST} levels"
    return text[:200] if " " in text else f"{type(error).__name__}: {text}".removesuffix(": ")[:200]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} occurs twice in one object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_once)
