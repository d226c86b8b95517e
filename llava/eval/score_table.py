"""A scores file as text: metrics by domain with their intervals, then the main ones by answer and question type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llava.data.metric_names import metric_names
from llava.eval.metrics import OVERALL

KINDS = {"answer_types": "answer type", "question_types": "question type"}
BY_KIND = ("exact_match", "majority_exact_match", "nearest_exact_match", "closed_accuracy", "open_recall", "rouge_l")
"""What is shown by answer type and question type; the scores file holds every metric."""


def score_table(scores: Mapping[str, Any]) -> str:
    """The scores as text: one line a metric, one column a group, values with their 95 % intervals."""
    groups = scores["groups"]
    names = [OVERALL, *sorted(groups.keys() - {OVERALL})]
    lines = [["", *names], ["rows", *(str(groups[name]["rows"]) for name in names)]]
    lines.append(["  of them closed", *(str(groups[name]["closed_rows"]) for name in names)])
    for metric in metric_names():
        figures = [groups[name]["figures"][metric] for name in names]
        if any(figure["value"] is not None for figure in figures):
            lines.append([metric, *map(_cell, figures)])
    lines.append(["empty answers", *(str(groups[name]["empty_answers"]) for name in names)])
    tokenizer = scores["tokenizer"].split(" (")[0]
    title = f"\n{scores['model_id']}  (95 % bootstrap interval in brackets; tokenizer: {tokenizer})"
    several, none = scores.get("rows_of_several_domains"), scores.get("rows_of_no_domain")
    reasons = [f"rows of several domains, counted under each and overall once: {several}"] if several else []
    reasons += [f"rows of no domain, counted overall alone: {none}"] if none else []
    reasons += [
        f"{metric}: missing, {figure['reason']}"
        for metric, figure in groups[OVERALL]["figures"].items()
        if figure["value"] is None
    ]
    return "\n".join([title, *columns(lines), *_by_kind(scores), *reasons])


def _by_kind(scores: Mapping[str, Any]) -> Iterator[str]:
    """One line an answer type and question type; nothing where there is just one of a kind."""
    shown = [name for name in BY_KIND if scores["groups"][OVERALL]["figures"][name]["value"] is not None]
    for kind, title in KINDS.items():
        found = scores[kind]
        if len(found) > 1:
            lines = [[title, "rows", *shown]]
            lines += [
                [label, str(part["rows"]), *(_cell(part["figures"][name]) for name in shown)]
                for label, part in found.items()
            ]
            yield from ("", *columns(lines))


def columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells as text: the first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        (
            line[0].ljust(widths[0])
            + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        ).rstrip()
        for line in lines
    ]


def span(ends: Sequence[float] | None, sign: str = "") -> str:
    """``[0.312, 0.401]``; ``-`` where there is no interval."""
    return "-" if ends is None else f"[{ends[0]:{sign}.3f}, {ends[1]:{sign}.3f}]"


def _cell(figure: Mapping[str, Any]) -> str:
    return "-" if figure["value"] is None else f"{figure['value']:.3f} {span(figure['ci95'])}"
