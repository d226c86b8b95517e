"""The one form in which texts are compared: for exact match, the majority answer, joining rows and finding repeats.

Two texts are equal here when they mean the same, so the form loses case, punctuation and ways of encoding, and nothing
else:

- Unicode's composed form (NFC); letters keep their marks, which are vowels in Hindi, Thai and Arabic. What is not seen
  (soft hyphens, joiners, marks of direction) is left out.
- Numbers are numbers: ``5.0`` is ``5``, ``.5`` is ``0.5``, ``1,000`` is ``1000`` and ``2,5`` is ``2.5``; digits of
  every script are read. A unit may touch its number: ``5mm`` is ``5 mm``.
- Signs stay as words of their own: ``HER2+`` is ``her2 +``, ``<5 mm`` is ``< 5 mm``. A hyphen is a sign (written ``−``)
  between numbers and at one end of a word (``3-5``, ``-5``, ``HER2-``), else it parts words (``T2-weighted``); a stroke
  or a colon is one between numbers (``1/2``).
- All other punctuation becomes a space: ``CT-scan.`` is ``ct scan``.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable

LETTER, DIGIT, SIGN = "a", "0", "+"
"""The kinds of characters in ``shape_of``; all others stand for themselves."""

MINUS = "\u2212"
"""A hyphen that is a sign, in the normal form; it is one wherever it stands."""

_SAME = dict.fromkeys("-\u2010\u2011\u2012\u2013\ufe63\uff0d", "-") | {
    "\u2044": "/",
    "\u2215": "/",
    "\u066a": "%",
    "\u00b7": ".",
    "\u066b": ".",
    "\u066c": ",",
}
_SAME |= {wide: chr(ord(wide) - 0xFEE0) for wide in "\uff05\uff0b\uff0c\uff0e\uff0f\uff1a\uff1c\uff1d\uff1e"}
_KEPT_PUNCTUATION = "-/:.,"
_SIGNS_OF_OTHER_KINDS = "%\u2030^"
_NO_SIGNS = "|\ufffd\u00a9\u00ae\u2122"  # of layout, of damage and of law
_VARIANTS = re.compile("[\u034f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_WRITTEN_OUT = (("+/-", "\u00b1"), ("<=", "\u2264"), (">=", "\u2265"))

_TOKEN = re.compile(
    r"""
    (?P<number> 0+(?:[.,]0+)* | (?<![a0.])\.0+ )
  | (?P<word> [a0]+(?:(?<=0)\.0[a0]*)* )
  | (?P<sign>
        \+
      | (?<=0)-(?=[ ]?\.?0) | (?<=0[ ])-(?=[ ]?\.?0)    # between numbers
      | (?<![a0-])-(?=\.?[a0]) | (?<=[a0])-(?!-|\.?[a0])  # at one end of a word
      | ^-(?=$|[ ]\.?0) | (?<=\+[ ])-(?=[ ]\.?0)        # alone, or before a number
      | (?<=[a0][ ])-$
      | (?<=0)[/:](?=[ ]?0) | (?<=0[ ])[/:](?=[ ]?0)
    )
    """,
    re.VERBOSE,
)
_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")
_DECIMAL_COMMA = re.compile(r"\d+,\d+")


class _Table(dict[int, str]):
    """A table for ``str.translate`` that works out each character when it is first met."""

    def __init__(self, of: Callable[[str], str]) -> None:
        super().__init__()
        self._of = of

    def __missing__(self, code: int) -> str:
        return self.setdefault(code, self._of(chr(code)))


@functools.lru_cache(maxsize=2**14)  # scores compare the same answers by many metrics in many groups
def normalise(text: str) -> str:
    """``text`` in the form in which it is compared: tokens joined by one space, see the module's docstring.

    Doing it twice changes nothing; the empty string means that the text holds no word and no sign.
    """
    folded = unicodedata.normalize("NFD", text).casefold()
    plain = composed(" ".join(folded.translate(_PLAIN).split()))
    for written, sign in _WRITTEN_OUT:
        plain = plain.replace(written, sign)
    tokens = []
    for found in _TOKEN.finditer(shape_of(plain)):
        token = plain[found.start() : found.end()]
        tokens.append(_number(token) if found.lastgroup == "number" else MINUS if token == "-" else token)
    return " ".join(tokens)


def composed(text: str) -> str:
    """The text in Unicode's composed form (NFC), so that a letter with its mark is one and the same everywhere."""
    return unicodedata.normalize("NFC", text)


def shape_of(text: str) -> str:
    """A text of the same length that says what each character is: ``a`` a letter or one of its marks, ``0`` a digit,
    ``+`` a sign; other characters stand as they are. Patterns that find words look at it."""
    return text.translate(_SHAPE)


def _plain(character: str) -> str:
    """The character as it is compared: punctuation as a space, what is not seen as nothing, digits as ASCII's."""
    if character in _SAME:
        return _SAME[character]
    kind = unicodedata.category(character)
    if kind == "Nd":
        return str(unicodedata.decimal(character))
    if kind == "Cf" or _VARIANTS.match(character):
        return ""
    return character if _shape(character) in (LETTER, SIGN) or character in _KEPT_PUNCTUATION else " "


def _shape(character: str) -> str:
    kind = unicodedata.category(character)
    if kind == "Nd":
        return DIGIT
    if kind[0] in "LMN" or kind in ("Co", "Cn"):
        return LETTER
    if character in _SIGNS_OF_OTHER_KINDS or (kind in ("Sm", "Sc", "So") and character not in _NO_SIGNS):
        return SIGN
    return character


def _number(text: str) -> str:
    """A number without what does not change its value; commas that part a list become spaces."""
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    elif _DECIMAL_COMMA.fullmatch(text):
        text = text.replace(",", ".")
    elif "," in text:
        return " ".join(map(_number, text.split(",")))
    if text.count(".") > 1:  # a date, a section, an identifier
        return text
    whole, _, part = text.partition(".")
    part = part.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{part}" if part else "")


_PLAIN, _SHAPE = _Table(_plain), _Table(_shape)
