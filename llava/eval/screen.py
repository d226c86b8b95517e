"""The screen at the end of an evaluation: the last stage's main figures, the matrix of the main metric, its summary.

At most 40 lines of 100 columns with the line about the page, whatever a sequence's tasks are: first the intervals of
single domains give way, then domains, tasks and stages in the middle, and a word says how many. Only the name of a file
is never cut, as a cut one leads nowhere. Everything else stands in ``scores.json`` and ``accuracy_matrix.json``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from llava.eval.matrix_report import UNSIGNED, labelled_rows, metric_title, title_of
from llava.eval.metrics.base import OVERALL

LINES, COLUMNS = 39, 100
"""With the line that ``llava.eval.report`` adds, 40."""
NAME = 14
"""Columns of a task's or domain's name; of a longer one the beginning and the end are shown."""
SHOWN = {
    "exact_match": "exact match",
    "closed_accuracy": "closed accuracy",
    "majority_closed_accuracy": "  its majority",
    "open_recall": "open recall",
    **{name: metric_title(name) for name in ("bleu_1", "rouge_l", "meteor", "cider")},
    "route_accuracy": "route accuracy",
}
"""Metrics of the table by domain, and what they are called there."""
SUMMARY = ("average_final", "bwt", "forgetting", "fwt")
"""What of the matrix's summary is shown before the gaps."""
GAPS = 3
"""How many gaps are shown at most."""


def screen(title: str, scores: Mapping[str, Any], matrix: Mapping[str, Any], more: Sequence[str] = ()) -> str:
    """The whole of it.

    Args:
        title: of the run. scores: of the last stage, as in ``scores.json``. matrix: as in ``accuracy_matrix.json``.
        more: last lines, such as where the rest lies.
    """
    overall = scores["groups"][OVERALL]
    asked = f"{overall['rows']} question{'s' * (overall['rows'] != 1)}"
    about = f"{title}: {asked}, {overall['closed_rows']} of them closed; 95 % intervals in brackets"
    top = ["", _cut(about, COLUMNS), *_by_domain(scores["groups"], matrix["tasks"])]
    top += [*_missing(overall), *_pictures(scores.get("pictures") or {}), ""]
    bottom = [*_summary(matrix), "", *more]
    return "\n".join([*top, *_stages(matrix, LINES - len(top) - len(bottom)), *bottom])


def _by_domain(groups: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    """The last stage's figures, overall and by domain: the tasks in their order, then the other domains."""
    names = [OVERALL, *tasks, *sorted(groups.keys() - {OVERALL, *tasks})]
    shown = [metric for metric in SHOWN if groups[OVERALL]["figures"][metric]["value"] is not None]
    labels = ["after the last stage", "questions", *(SHOWN[metric] for metric in shown)]

    def column(name: str, spans: bool) -> list[str]:
        figures = [_figure(groups[name]["figures"][metric], spans) for metric in shown]
        return [_name(name), str(groups[name]["rows"]), *figures]

    full, plain = ([labels, *(column(name, spans or name == OVERALL) for name in names)] for spans in (True, False))
    return _fitted(full if _width(full) <= COLUMNS else plain, tail=1)


def _missing(overall: Mapping[str, Any]) -> list[str]:
    """Metrics without a figure, and why: one line, or none."""
    found = {title.strip(): overall["figures"][name] for name, title in SHOWN.items()}
    reasons = [f"{title}: {figure['reason']}" for title, figure in found.items() if figure["value"] is None]
    return [_cut(f"no {'; no '.join(reasons)}", COLUMNS)] if reasons else []


def _pictures(pictures: Mapping[str, Any]) -> list[str]:
    """What the pictures contribute: a line for each kind that was shown in their place."""
    lines = []
    for kind, part in pictures.items():
        overall = part["groups"][OVERALL]
        told = f"{kind} pictures: {_figure(overall['changed'])} of the answers change"
        if drop := overall["figures"].get("exact_match"):
            told += f"; exact match drop {_figure({**drop, 'value': drop['drop']}, sign='+')}"
        lines.append(_cut(told, COLUMNS))
    return lines


def _stages(matrix: Mapping[str, Any], most: int) -> list[str]:
    """The matrix of the main metric in at most so many lines."""
    name, found = next(iter(matrix["metrics"].items()))
    rows = labelled_rows(found, matrix)
    curve = found["learning_curve"]
    seen = [_plain(value) for value in curve["value"]] if curve else ["-"] * len(matrix["tasks"])
    seen = [""] * (len(rows) - len(seen)) + seen
    lines = [[metric_title(name), *map(_name, matrix["tasks"]), "seen so far"]]
    lines += [[_name(label), *map(_plain, values), mean] for (label, values), mean in zip(rows, seen, strict=True)]
    lines = _fewer(lines, len(lines) + 1 - most if len(lines) > most else 0, tail=1)
    return _fitted([list(column) for column in zip(*lines, strict=True)], tail=2)


def _summary(matrix: Mapping[str, Any]) -> list[str]:
    """BWT, forgetting and the others, one a line."""
    _, found = next(iter(matrix["metrics"].items()))
    if found["summary"] is None:
        return [_cut(f"no summary: {found['reason']}", COLUMNS)]
    gaps = [key for key in found["summary"] if key.startswith("gap_to_")][:GAPS]
    figures = {key: found["summary"][key] for key in (*SUMMARY, *gaps) if key in found["summary"]}
    return [
        f"{title_of(key):<22}{_figure(figure, sign='' if key in UNSIGNED else '+')}"
        for key, figure in figures.items()
        if figure["value"] is not None
    ]


def _fitted(columns: list[list[str]], tail: int) -> list[str]:
    """Columns as lines; of too many those before the last ``tail`` give way to one that says how many they are."""
    shown = columns
    for hidden in range(1, len(columns) - tail):
        if _width(shown) <= COLUMNS:
            break
        shown = _fewer(columns, hidden, tail)
    widths = [max(map(_wide, column)) for column in shown]

    def line(cells: Sequence[str]) -> str:
        gaps = [" " * (width - _wide(cell)) for cell, width in zip(cells, widths, strict=True)]
        padded = [cells[0] + gaps[0], *(gap + cell for cell, gap in zip(cells[1:], gaps[1:], strict=True))]
        return "  ".join(padded).rstrip()

    return [line(cells) for cells in zip(*shown, strict=True)]


def _fewer(lines: list[list[str]], hidden: int, tail: int) -> list[list[str]]:
    """Lines (or columns) without the ``hidden`` ones before the last ``tail``, in whose place one says how many."""
    if not hidden:
        return lines
    end = len(lines) - tail
    note = [f"{hidden} more", *[""] * (len(lines[0]) - 1)]
    return [*lines[: end - hidden], note, *lines[end:]]


def _width(columns: Sequence[Sequence[str]]) -> int:
    """Of columns with two blanks between them."""
    return sum(max(map(_wide, column)) + 2 for column in columns) - 2


def _wide(text: str) -> int:
    """Columns of a terminal that a text takes; an accent stands on the letter before it."""
    return sum(
        0 if unicodedata.category(letter) in ("Mn", "Me") else 1 + (unicodedata.east_asian_width(letter) in "WF")
        for letter in text
    )


def _printable(text: str) -> str:
    """The text without what would move the cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _cut(text: str, most: int) -> str:
    """The beginning of a text, in at most so many columns."""
    text = _printable(text)
    if _wide(text) <= most:
        return text
    while _wide(text) > most - 2:
        text = text[:-1]
    return f"{text}.."


def _name(text: str) -> str:
    """Of a long name the beginning and the end, as names of one kind often begin alike."""
    text = _printable(text)
    if _wide(text) <= NAME:
        return text
    head, tail = text, text
    while _wide(head) > NAME // 2 - 1:
        head = head[:-1]
    while _wide(tail) > NAME - 2 - _wide(head) or (tail and not _wide(tail[0])):
        tail = tail[1:]
    return f"{head}..{tail}"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _figure(figure: Mapping[str, Any], spans: bool = True, sign: str = "") -> str:
    """``0.512 [0.46, 0.56]``."""
    if figure["value"] is None:
        return "-"
    ends = figure["ci95"] if spans else None
    return f"{figure['value']:{sign}.3f}" + ("" if ends is None else f" [{ends[0]:{sign}.2f}, {ends[1]:{sign}.2f}]")
