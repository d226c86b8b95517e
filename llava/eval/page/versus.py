"""Several runs beside each other: what two of them differ in, by a paired bootstrap, and what several seeds spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from llava.data.metric_names import metric_names
from llava.eval.comparison import compare
from llava.eval.metrics.scoring import Prepared
from llava.eval.over_seeds import over_seeds
from llava.eval.page.results import Results
from llava.eval.text_metrics import TextScorer

DETAILED = 6
"""Runs that are shown with all their parts; of more, the first of each group."""


@dataclass(frozen=True)
class Difference:
    """A run against the first: ``groups`` as ``llava.eval.comparison.compare`` gives them, or why there are none."""

    run: str
    against: str
    groups: Mapping[str, Any]
    lacking: str = ""

    @property
    def metrics(self) -> list[str]:
        """What is compared, in the order of the tables."""
        found = {metric for group in self.groups.values() for metric in group["figures"]}
        return [name for name in metric_names() if name in found]


def differences(runs: Sequence[Results], use_java: bool | None = None) -> list[Difference]:
    """Every run's last stage against the first run's; runs of other questions are named, not compared."""
    first, *others = runs
    if not others:
        return []
    with closing(TextScorer(use_java=use_java)) as scorer:
        texts = [
            str(row.get(name) or "") for run in runs for row in run.last.rows for name in ("reference", "prediction")
        ]
        scorer.tokenize(texts)
        mine = _prepared(first, scorer)
        return [_difference(first, mine, other, scorer) for other in others]


def _difference(first: Results, mine: Prepared | None, other: Results, scorer: TextScorer) -> Difference:
    if not (first.last.rows and other.last.rows):
        return Difference(other.label, first.label, {}, "the scores of one of them cannot be read")
    if mine is None:
        return Difference(other.label, first.label, {}, "the question file is gone or has changed since")
    theirs = _prepared(other, scorer) if same_questions(first, other) else None
    if theirs is None:
        return Difference(other.label, first.label, {}, "answers other questions")
    return Difference(other.label, first.label, compare(mine, theirs))


def _prepared(run: Results, scorer: TextScorer) -> Prepared | None:
    """The last stage's answers, ready to be scored; ``None`` where their questions are not there any more."""
    if not run.questions:
        return None
    answers = [
        {"question_id": row.id, "text": str(said.get("prediction") or "")}
        for row, said in zip(run.questions, run.last.rows, strict=True)
    ]
    return Prepared.of(run.questions, answers, (), scorer)


def same_questions(first: Results, other: Results) -> bool:
    """Whether two runs answered the same rows of the same question file."""
    keys = [[(str(row.get("question_id")), row.get("position")) for row in run.last.rows] for run in (first, other)]
    return first.question_file["sha256"] == other.question_file["sha256"] and keys[0] == keys[1]


def groups(runs: Sequence[Results]) -> list[list[Results]]:
    """Runs of one method, route, order and question file together: they differ in their seed."""
    found: dict[tuple[Any, ...], list[Results]] = {}
    for run in runs:
        alone = run.label if run.seed is None or not run.method else ""
        kind = alone, run.method, run.route, tuple(run.tasks), run.question_file["sha256"], tuple(run.matrix["metrics"])
        found.setdefault(kind, []).append(run)
    return list(found.values())


def detailed(runs: Sequence[Results]) -> list[Results]:
    """The runs that are shown with all their parts."""
    return list(runs) if len(runs) <= DETAILED else [group[0] for group in groups(runs)][:DETAILED]


@dataclass(frozen=True)
class Seeds:
    """Runs that differ in their seed alone; ``spread`` as ``llava.eval.over_seeds`` gives it."""

    name: str
    runs: Sequence[Results]
    spread: Mapping[str, Any]


def seeds_of(runs: Sequence[Results]) -> list[Seeds]:
    """Each group of several seeds."""
    several = [group for group in groups(runs) if len({run.seed for run in group}) == len(group) > 1]
    return [Seeds(_name(group[0]), group, over_seeds([run.matrix for run in group])) for group in several]


def _name(run: Results) -> str:
    return f"{run.method}{f' ({run.route})' if run.route else ''}, {' → '.join(run.tasks)}"
