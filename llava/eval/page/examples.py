"""Some questions with their pictures, what was answered and how it was routed, chosen evenly."""

from __future__ import annotations

import base64
import io
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava.data.rows import Row
from llava.eval.page.results import Results
from llava.image_io import load_image
from llava.inside import Folder, inside
from llava.utils import UserError, rank0_print

COUNT, SEED = 24, 17
SIDE = 320
"""Longest side of a picture on the page, in pixels."""
MOST_PICTURES = 4
QUALITY = 82
LONGEST_TEXT = 600
SEVERAL = "several or none"


@dataclass(frozen=True)
class Said:
    """What one run answered: ``route`` as in the answer's metadata, ``None`` without one."""

    run: str
    prediction: str
    right: bool
    route: Mapping[str, Any] | None
    slot_tasks: Sequence[str]

    @property
    def decision(self) -> str:
        """What the route decided, in words."""
        route = self.route or {}
        if route.get("task_given"):
            return "Route: the task was given"
        novelty = f", novelty {route['novelty']:.2f}" if route.get("novelty") is not None else ""
        unknown = ", taken for unknown: the base answers" if route.get("unknown") else ""
        return f"Route: {route.get('task', 'decided among slots')}{unknown}{novelty}"

    @property
    def posterior(self) -> list[tuple[str, float]]:
        """The tasks and their probabilities, as far as the answer tells of them."""
        return list(((self.route or {}).get("task_posterior") or {}).items())

    @property
    def slots(self) -> list[tuple[int, str, float]]:
        """Number, task (where known) and weight of each slot that acted."""
        route = self.route or {}
        pairs = zip(route.get("slots") or (), route.get("weights") or ())
        known = range(len(self.slot_tasks))
        return [(slot, self.slot_tasks[slot] if slot in known else "", weight) for slot, weight in pairs]


@dataclass(frozen=True)
class Example:
    """One question. ``pictures`` are data addresses with the size; ``lacking`` says why there is none."""

    number: int
    domain: str
    closed: bool
    question: str
    reference: str
    said: Sequence[Said]
    pictures: Sequence[tuple[str, int, int]] = field(default=(), repr=False)
    lacking: str = ""

    @property
    def right(self) -> bool:
        """By the first run."""
        return self.said[0].right


def examples_of(
    runs: Sequence[Results], count: int = COUNT, seed: int = SEED, folder: Folder | None = None
) -> list[Example]:
    """Examples of runs that answered the same questions, as the first run's right and wrong ones.

    Args:
        folder: of the pictures; ``None``: as the first run says.
    """
    first = runs[0]
    places = chosen(first.last.rows, count, seed)
    home = first.image_folder if folder is None else folder
    asked = {place: first.questions[place] for place in places} if first.questions else {}
    return [_example(number, place, runs, asked.get(place), home) for number, place in enumerate(places, start=1)]


def chosen(rows: Sequence[Mapping[str, Any]], count: int, seed: int) -> list[int]:
    """Places of ``count`` rows, spread evenly over domain, right or wrong, closed or open; mixed."""
    groups: dict[tuple[str, bool, bool], list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        groups[domain_of(row), is_right(row), is_closed(row)].append(place)
    dice = random.Random(seed)
    queues = [dice.sample(places, len(places)) for _, places in sorted(groups.items())]
    found: list[int] = []
    while len(found) < count and any(queues):
        found += [queue.pop() for queue in queues if queue]
    return dice.sample(found[:count], min(count, len(found)))


def domain_of(row: Mapping[str, Any]) -> str:
    return str(row.get("domain") or SEVERAL)


def is_right(row: Mapping[str, Any]) -> bool:
    return row["scores"].get("exact_match") == 1


def is_closed(row: Mapping[str, Any]) -> bool:
    """As the scores took the row."""
    return "closed_accuracy" in row["scores"]


def _example(number: int, place: int, runs: Sequence[Results], asked: Row | None, home: Folder | None) -> Example:
    row = runs[0].last.rows[place]
    said = [_said(run, place) for run in runs]
    pictures: list[tuple[str, int, int]] = []
    lacking = ""
    if asked is None:
        lacking = "the question file is not there any more"
    elif home is None and asked.shown:
        lacking = "where the pictures lie is not known"
    else:
        try:
            pictures = [thumbnail(home or "", name) for name in asked.shown[:MOST_PICTURES]]
            lacking = "" if pictures else "the question has none"
        except UserError as error:
            rank0_print(f"note: question {row.get('question_id')!r} is shown without a picture: {error}")
            lacking = "it cannot be read here"
    question, reference = (_short(str(row.get(name) or "")) for name in ("question", "reference"))
    return Example(number, domain_of(row), is_closed(row), question, reference, said, pictures, lacking)


def _said(run: Results, place: int) -> Said:
    row = run.last.rows[place]
    route = run.last.metadata[place].get("route") if run.last.metadata else None
    among = set((route.get("task_posterior") or {}) if isinstance(route, Mapping) else ())
    known = route if isinstance(route, Mapping) and (not among or among & set(run.tasks)) else None
    return Said(run.label, _short(str(row.get("prediction") or "")), is_right(row), known, run.slot_tasks)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"


def thumbnail(folder: Folder, name: str) -> tuple[str, int, int]:
    """A picture as a data address of a small JPEG, with its width and height.

    Raises:
        UserError: the file is missing, no picture, or outside of the folder.
    """
    picture = load_image(inside(folder, name))
    picture.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}", *picture.size
