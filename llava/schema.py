"""What the fields of a file from outside must be: types, ranges, known names, and one line for one that is not.

A schema is a dict of ``Wanted`` by field name. A file of the project's own is closed: an unknown field is refused with
the nearest known name. A file of others is open, because every version of theirs adds fields; there a name is refused
only where it is a slip of one that is known and not there.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava.outside import kind_of
from llava.utils import UserError

HUGE = 2**31 - 1
"""Counts that are larger cannot be meant."""
ONE_OF = "one of "
MOST_SHOWN = 40


@dataclass(frozen=True)
class Wanted:
    """What a value must be.

    Attributes:
        words: for messages, such as "an integer of 1 or more".
        fits: whether a value is so.
        inside: of an object, what its fields must be; of a list, what each part must be.
    """

    words: str
    fits: Callable[[Any], bool]
    inside: Mapping[str, Wanted] | Wanted | None = None

    def check(self, value: Any, where: str) -> None:
        """``UserError`` where ``value`` is something else; ``where`` names file and field."""
        if not self.fits(value):
            mend = self.words.replace(ONE_OF, "known: ") if self.words.startswith(ONE_OF) else f"write {self.words}"
            raise UserError(f"{where} is {shown(value)}; {mend}")
        if isinstance(self.inside, Wanted):
            for number, part in enumerate(value, start=1):
                self.inside.check(part, f"{where}, entry {number}")
        elif self.inside is not None:
            check_fields(value, self.inside, where, closed=False)

    def __or__(self, other: Wanted) -> Wanted:
        """Either of the two."""
        return Wanted(f"{self.words}, or {other.words}", lambda value: self.allows(value) or other.allows(value))

    def allows(self, value: Any) -> bool:
        """Whether ``check`` would pass."""
        try:
            self.check(value, "")
        except UserError:
            return False
        return True


def whole(least: int | None = None, most: int | None = HUGE) -> Wanted:
    """An integer in a range."""

    def fits(value: Any) -> bool:
        return type(value) is int and (least is None or value >= least) and (most is None or value <= most)

    return Wanted(f"an integer{_range(least, most if most != HUGE else None)}", fits)


def number(least: float | None = None, most: float | None = None, above: float | None = None) -> Wanted:
    """A finite number in a range, ends included; ``above`` is a lower end that is not."""

    def fits(value: Any) -> bool:
        if type(value) not in (int, float) or (type(value) is int and abs(value) > 10**300) or not math.isfinite(value):
            return False
        if above is not None and value <= above:
            return False
        return (least is None or value >= least) and (most is None or value <= most)

    return Wanted(f"a number{f' above {above:g}' if above is not None else ''}{_range(least, most)}", fits)


def words(choices: Iterable[str] = (), empty: bool = True) -> Wanted:
    """A text, one of ``choices`` where there are some."""
    known = tuple(choices)

    def fits(value: Any) -> bool:
        return isinstance(value, str) and is_text(value) and (empty or bool(value)) and (not known or value in known)

    return Wanted(f"{ONE_OF}{', '.join(known)}" if known else "a text in quotes", fits)


def list_of(inside: Wanted, length: int | None = None, empty: bool = True) -> Wanted:
    """A list whose parts are all so."""

    def fits(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and (empty or len(value) > 0) and length in (None, len(value))

    return Wanted(f"a list{f' of {length}' if length else ''}, each {inside.words}", fits, inside)


def an_object(inside: Mapping[str, Wanted] | None = None) -> Wanted:
    """A JSON object, with what some of its fields must be."""
    return Wanted("a JSON object", lambda value: isinstance(value, Mapping), inside)


yes_or_no = Wanted("true or false", lambda value: isinstance(value, bool))


def is_text(value: str) -> bool:
    """Whether a string can be written as text: no half of a surrogate pair."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_fields(
    values: Mapping[str, Any],
    schema: Mapping[str, Wanted],
    where: str,
    closed: bool = True,
    needed: Sequence[str] = (),
) -> None:
    """Refuse an object whose fields are not what a schema says; ``null`` is as good as a field left out.

    Raises:
        UserError: the first field that is unknown, missing or something else, by file, name and value.
    """
    if closed:
        refuse_unknown(values, schema, where)
    else:
        refuse_slips(values, schema, where)
    for name in needed:
        if values.get(name) is None:
            raise UserError(f"{where}: field {name!r} is missing; write {schema[name].words}")
    for name, wanted in schema.items():
        if values.get(name) is not None:
            wanted.check(values[name], f"{where}: {name}")


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str, what: str = "field") -> None:
    """Raise ``UserError`` for a name that is not known, with the nearest known one."""
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            more = ", …" if len(known) > MOST_SHOWN else ""
            mend = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known[:MOST_SHOWN])}{more}"
            raise UserError(f"{where}: unknown {what} {name!r}; {mend}")


def refuse_slips(
    names: Iterable[str], known: Collection[str], where: str, passed: Container[str] = (), alike: float | None = None
) -> None:
    """Refuse a name that is a slip of the pen for a known one which is not there.

    Args:
        passed: further names that are known, and no slips. alike: how much of the two must agree, of 1; without it they
            differ by one letter, and are long enough to tell.

    Raises:
        UserError: with both names.
    """
    names = list(names)
    absent = [name for name in known if name not in names and len(name) > (5 if alike is None else 3)]
    for name in names:
        if name in known or name in passed:
            continue
        plain = str(name).strip().lower().replace("-", "_").replace(" ", "_")
        if alike is None:
            near = [right for right in absent if plain == right or _one_slip(str(name), right)]
        else:
            near = difflib.get_close_matches(plain, absent, n=1, cutoff=alike)
        if near:
            raise UserError(f"{where}: unknown field {name!r}; did you mean {near[0]!r}?")


def _one_slip(written: str, right: str) -> bool:
    """Whether two names differ by one letter: more, less, other, or two changed places."""
    if abs(len(written) - len(right)) > 1:
        return False
    start = next((at for at, (a, b) in enumerate(zip(written, right)) if a != b), min(len(written), len(right)))
    rest, wanted = written[start:], right[start:]
    swapped = rest[1:2] + rest[:1] + rest[2:]
    return rest[1:] == wanted[1:] or rest[1:] == wanted or rest == wanted[1:] or swapped == wanted


def shown(value: Any) -> str:
    """A value for messages; long ones are cut, with their kind."""
    words = kind_of(value)
    if isinstance(value, (str, bool, int, float, list)) and not words.endswith("…)"):
        return repr(value)
    return words


def _range(least: float | None, most: float | None) -> str:
    low = "" if least is None else f" of {least:g} or more"
    return low if most is None else f"{low}, {most:.15g} at most"
