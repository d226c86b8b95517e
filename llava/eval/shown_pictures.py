"""Which picture a question is shown: its own, a blank one, or another question's; for what the picture contributes.

- ``real``: its own.
- ``blank``: one of the same size in the colour that LLaVA pads with (the image processor's mean), so that nothing of
  the picture but its size is left.
- ``shuffled``: pictures change places within the row's domain; ``shuffled-across``: among all rows. Every question of a
  picture is shown the same other picture. The exchange follows from the seed and the names of the pictures alone.

Rows without a picture stay as they are, all others keep their number of pictures. The model and its route see what is
shown and nothing else: a route's picture part is that of the blank or of the other picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llava.data.rows import Row
from llava.folds import shuffled
from llava.utils import UserError

REAL, BLANK, SHUFFLED, ACROSS = "real", "blank", "shuffled", "shuffled-across"
KINDS = (REAL, BLANK, SHUFFLED, ACROSS)


def shown_rows(rows: Sequence[Row], kind: str, seed: int) -> list[Row]:
    """The rows with the pictures that they are shown; blank pictures keep their names, a ``BlankEncoder`` empties them.

    Args:
        rows: of the whole question file. kind: one of ``KINDS``.

    Raises:
        UserError: a domain whose pictures cannot change places, having just one.
    """
    if kind in (REAL, BLANK):
        return list(rows)
    groups: dict[str | None, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row.domain if kind == SHUFFLED else None, []).append(place)
    found = list(rows)
    for domain, places in groups.items():
        others = _exchanged([rows[place] for place in places], domain, seed)
        for place in places:
            found[place] = replace(rows[place], images=tuple(others[name] for name in rows[place].images))
    return found


def shown_metadata(row: Row, kind: str) -> dict[str, object]:
    """What an answer says of what it was shown, the row being one of ``shown_rows``; nothing of its own picture."""
    if kind == REAL:
        return {}
    return {"pictures": kind, **({} if kind == BLANK else {"shown": list(row.shown)})}


def _exchanged(rows: Sequence[Row], domain: str | None, seed: int) -> dict[str, str]:
    """For each picture of the rows another one; never one that any of its rows has."""
    beside: dict[str, set[str]] = {}
    for row in rows:
        for name in row.images:
            beside.setdefault(name, set()).update(row.images)
    names = sorted(beside)
    given = dict(zip(names, shuffled(names, seed), strict=True))
    for name in names:
        if given[name] in beside[name]:
            other = next((o for o in names if given[o] not in beside[name] and given[name] not in beside[o]), None)
            if other is None:
                where = "the questions" if domain is None else f"domain {domain!r}"
                raise UserError(
                    f"the pictures of {where} cannot change places: {name} finds no other one among {len(names)} "
                    f"(choose --pictures {ACROSS} or {BLANK}, or give more rows)"
                )
            given[name], given[other] = given[other], given[name]
    return given
