"""Questions of a test set that the demo offers: some of each domain, with their pictures and reference answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llava.data.rows import Row, read_rows
from llava.inside import Folder, inside
from llava.serve.pictures import opened, thumbnail
from llava.serve.question import Limits
from llava.utils import UserError


@dataclass(frozen=True)
class Example:
    """A question, the files of its pictures, the first one small, the domain and the reference answer, if known."""

    question: str
    pictures: tuple[tuple[str, bytes], ...]
    thumbnail: str
    domain: str | None
    reference: str | None


def read_examples(question_file: str, image_folder: Folder, count: int, limits: Limits) -> list[Example]:
    """``count`` questions about pictures of a question file, in turn from each domain, each about another picture.

    Raises:
        UserError: the file is broken, a picture cannot be read, or no question has one.
    """
    rows = [row for row in read_rows(question_file) if row.shown]
    if not rows:
        raise UserError(f"{question_file}: no row has a picture; give a test set with pictures")
    return [_example(row, image_folder, limits) for row in _spread(rows, count)]


def _spread(rows: Sequence[Row], count: int) -> list[Row]:
    """Rows in turn from each domain, spread over its rows, on pictures of their own as long as there are some."""
    by_domain: dict[str | None, list[Row]] = {}
    for row in rows:
        by_domain.setdefault(row.domain, []).append(row)
    queues = []
    for some in by_domain.values():
        once: dict[str, Row] = {}
        for row in some:
            once.setdefault(row.shown[0], row)
        firsts = list(once.values())
        share = -(-count // len(by_domain))
        queues.append(firsts[:: max(len(firsts) // share, 1)] + [row for row in some if row not in firsts])
    found: list[Row] = []
    for turn in range(max(map(len, queues))):
        found += [queue[turn] for queue in queues if turn < len(queue)]
    return found[:count]


def _example(row: Row, image_folder: Folder, limits: Limits) -> Example:
    files = []
    for name in row.shown:
        place = inside(image_folder, name, f"row {row.id!r}")
        if not place.is_file():
            raise UserError(f"row {row.id!r}: image file not found: {place} (check --image-folder)")
        files.append((name, place.read_bytes()))
    small = thumbnail(opened(files[0][1], files[0][0], limits))
    return Example(row.question, tuple(files), small, row.domain, row.answer)
