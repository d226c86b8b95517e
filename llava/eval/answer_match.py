"""Which row an answer is for: its ``question_id`` says so, and where rows share one, their place in the question file.

Answers of this project name that place in their ``metadata`` (``position``). Those of other programs don't: their first
answer to an id is taken for the first row that has it, and so on, as such files are written in the questions' order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from llava.conversation import plain_question
from llava.data.rows import Row
from llava.utils import UserError

Answer = TypeVar("Answer", bound=Mapping[str, Any])


def position_of(answer: Mapping[str, Any]) -> int | None:
    """The place in the question file that an answer names, or None."""
    found = (answer.get("metadata") or {}).get("position")
    return found if type(found) is int else None


def answers_of(
    rows: Sequence[Row], answers: Sequence[Answer], source: Any, by_order: bool = True
) -> list[Answer | None]:
    """Each row's answer; ``None`` for rows that have none.

    Args:
        rows: of the whole question file.
        source: the answers' file, for messages.
        by_order: whether answers that name no position may be told apart by their order.

    Raises:
        UserError: an answer to no row, two to one row, or answers to one id that come in another order than its rows.
    """
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(str(row.id), []).append(place)
    given: dict[str, list[Answer]] = {}
    for answer in answers:
        given.setdefault(str(answer["question_id"]), []).append(answer)
    if unknown := [name for name in given if name not in places]:
        raise UserError(f"{source}: answers to questions that the question file lacks: {some(unknown)} (wrong file?)")
    found: list[Answer | None] = [None] * len(rows)
    for name, mine in given.items():
        own = {place: rows[place] for place in places[name]}
        if len(mine) > len(own):
            asked = "one row has" if len(own) == 1 else f"{len(own)} rows have"
            times = "twice" if len(mine) == 2 else f"{len(mine)} times"
            raise UserError(
                f"{source}: question_id {mine[0]['question_id']!r} is answered {times}, but {asked} it (keep one "
                "answer a row)"
            )
        for place, answer in zip(_places(own, mine, f"{source}: question_id {name!r}", by_order), mine, strict=True):
            found[place] = answer
    return found


def _places(rows: Mapping[int, Row], answers: Sequence[Mapping[str, Any]], where: str, by_order: bool) -> list[int]:
    """Places of the rows, which share one id, that the answers are for."""
    if len(rows) == 1:
        return list(rows)
    positions = [position_of(answer) for answer in answers]
    if positions.count(None) == len(positions) and by_order:
        return _by_order(rows, answers, where)
    if None in positions:
        raise UserError(
            f"{where}: several rows have it and an answer names no 'position' in its metadata (answer again)"
        )
    known = {row.position: place for place, row in rows.items()}
    for position in positions:
        if position not in known:
            raise UserError(f"{where}: no row with it at position {position} (answers to another question file?)")
        if positions.count(position) > 1:
            raise UserError(f"{where}: the row at position {position} is answered twice (keep one of the answers)")
    return [known[position] for position in positions]


def _by_order(rows: Mapping[int, Row], answers: Sequence[Mapping[str, Any]], where: str) -> list[int]:
    """The next row for each answer; a ``prompt`` that is one of the rows' questions says how many were passed over."""
    asked = {place: _bare(row.conversations[0][1]) for place, row in rows.items()}
    left, chosen = list(rows), []
    for answer in answers:
        said = _bare(answer.get("prompt"))
        fitting = [place for place in left if asked[place] == said] if said in asked.values() else left
        if not fitting:
            raise UserError(f"{where}: its answers come in another order than its rows (give answers in their order)")
        chosen.append(fitting[0])
        left = [place for place in left if place > fitting[0]]
    return chosen


def _bare(text: Any) -> str:
    return plain_question(text) if isinstance(text, str) else ""


def missing_rows(rows: Sequence[Row], found: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """The rows without an answer, in words: their id, and their position where others have it too."""
    return [
        str(row.id) if row.position is None else f"{row.id} (position {row.position})"
        for row, answer in zip(rows, found, strict=True)
        if answer is None
    ]


def taken_by_order(rows: Sequence[Row], found: Sequence[Mapping[str, Any] | None]) -> str | None:
    """What must be said of an incomplete file whose answers to one id were told apart by their order alone."""
    unsure = {str(row.id) for row, answer in zip(rows, found, strict=True) if row.position is not None and not answer}
    unsure &= {str(answer["question_id"]) for answer in found if answer and position_of(answer) is None}
    if not unsure:
        return None
    return (
        f"question_id {some(sorted(unsure))} has fewer answers than rows, and they name no position: their order and "
        "prompts alone tell them apart"
    )


def some(names: Sequence[str], shown: int = 5) -> str:
    """The first names, and how many there are beside them."""
    ordered = sorted(names, key=lambda name: (len(name), name))
    return ", ".join(ordered[:shown]) + (f" and {len(ordered) - shown} more" if len(ordered) > shown else "")
