"""Text of raw rows: the mending of known slips.

VQA-RAD's commas were lost on the way to JSON. Some came back as tabs, and in lists the letter before the comma moved
behind a space: ``spleen, stomach, and`` reads ``splee n<TAB>stomac h<TAB>and``.
"""

from __future__ import annotations

import math
import re
from typing import Any

from llava.data.layouts import is_missing
from llava.utils import UserError

_MOVED_LETTER = re.compile(r"(?<=\w) (\w)\t")
_TAB = re.compile(r"[ \t]*\t[ \t]*")
_LOST_APOSTROPHE = re.compile("(?<=\\w)\ufffd(?=\\w)")
_SPACES = re.compile(r"\s+")

NUMBER = "number written as text"
TAB = "tab read as comma"
APOSTROPHE = "undecodable character read as apostrophe"
QUOTE = "stray quotation mark removed"
SPACE = "white space tidied"


def mend_text(value: Any, where: str) -> tuple[str, list[str]]:
    """Text of a raw field, and the names of the slips that were mended in it.

    Args:
        value: string or number as read.
        where: file, row and field for the error message.

    Raises:
        UserError: the field is missing, NaN, of another type, or holds no text.
    """
    mended = []
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        mended.append(NUMBER)
        value = str(int(value)) if value == int(value) else str(value)
    if not isinstance(value, str):
        raise UserError(f"{where} is missing or no text: {value!r}")
    text = value.strip()
    for name, mend in ((TAB, _mend_tabs), (APOSTROPHE, _mend_apostrophes), (QUOTE, _mend_quote)):
        before, text = text, mend(text)
        if text != before:
            mended.append(name)
    tidy = _SPACES.sub(" ", text)
    if value != value.strip() or tidy != text:
        mended.append(SPACE)
    if not tidy:
        raise UserError(f"{where} is empty")
    if is_missing(tidy):
        raise UserError(f"{where} is missing: {tidy!r} (fill it in, or take the row out)")
    return tidy, mended


def _mend_tabs(text: str) -> str:
    return _TAB.sub(", ", _MOVED_LETTER.sub(r"\1\t", text))


def _mend_apostrophes(text: str) -> str:
    return _LOST_APOSTROPHE.sub("'", text)


def _mend_quote(text: str) -> str:
    """Without a quotation mark at its very start that has no partner."""
    return text[1:].strip() if text.startswith('"') and text.count('"') == 1 else text
