"""The tables of the page: figures of a run as cells, whatever they are written as in the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.data.metric_names import metric_names
from llava.eval.matrix_report import UNSIGNED, labelled_rows, metric_title, title_of
from llava.eval.metrics.base import OVERALL
from llava.eval.page.results import Results, Scored
from llava.eval.page.routes import StageRoutes
from llava.eval.result_pages import score
from llava.eval.score_table import BY_KIND, KINDS

MAIN = ("exact_match", "closed_accuracy", "open_recall", "bleu_1", "rouge_l", "meteor", "cider")
"""Metrics of the summary; all others stand in the full table."""
BASELINES = {"majority": "majority answer", "nearest": "nearest question’s answer"}
MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: what is read first. detail: what stands behind it, such as an interval.
        value: what the table is sorted by; ``None``: by the text.
        share: how dark the cell is shaded, 0 to 1; ``None``: not at all.
        marked: whether it is framed.
    """

    text: str
    detail: str = ""
    value: float | None = None
    share: float | None = None
    marked: bool = False

    @property
    def counts(self) -> bool:
        """Whether it is a number, or stands for one."""
        return self.value is not None or self.text == MISSING

    def __str__(self) -> str:
        return f"{self.text} {self.detail}".strip()


@dataclass(frozen=True)
class Table:
    """A table; of each row the first cell names it. ``name`` is unique on the page."""

    name: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    @property
    def shaded(self) -> bool:
        return any(cell.share is not None for row in self.rows for cell in row)


def heading(metric: str) -> str:
    """A metric's name at the beginning of a line."""
    title = metric_title(metric)
    return title[:1].upper() + title[1:]


def words(text: object) -> Cell:
    return Cell(str(text))


def count(value: int | None) -> Cell:
    return Cell(MISSING if value is None else str(value), value=value)


def number(value: float, sign: str = "") -> str:
    """Three digits; what rounds to nothing has no sign of its own."""
    return score(round(value, 3) + 0.0, sign)


def figure(found: Mapping[str, Any] | None, sign: str = "", key: str = "value", ends: str = "ci95") -> Cell:
    """A figure with its interval."""
    if found is None or found.get(key) is None:
        return Cell(MISSING)
    return Cell(number(found[key], sign), interval(found.get(ends), sign), found[key])


def interval(ends: Sequence[Any] | None, sign: str = "") -> str:
    """``[.312, .401]``."""
    return "" if ends is None or None in ends else f"[{number(ends[0], sign)}, {number(ends[1], sign)}]"


def summary(run: Results) -> Table:
    """The main metrics of the last stage beside the base's and the baselines', overall and by domain."""
    groups = [OVERALL, *run.domains]
    rows = []
    for metric in [name for name in MAIN if run.last.figure(OVERALL, name)]:
        rows.append(_figures(metric, "this run", run.last, groups, metric))
        if run.zero_shot:
            rows.append(_figures(metric, "zero-shot base", run.zero_shot, groups, metric))
        for prefix, who in BASELINES.items():
            if run.last.figure(OVERALL, f"{prefix}_{metric}"):
                rows.append(_figures(metric, who, run.last, groups, f"{prefix}_{metric}"))
    rows.append([words("questions"), words(""), *(count(run.last.scores["groups"][name]["rows"]) for name in groups)])
    caption = run.titled("Scores after all tasks")
    return Table(f"summary-{run.label}", caption, ["figure", "answers by", *groups], rows, "95 % bootstrap intervals.")


def _figures(metric: str, who: str, model: Scored, groups: Sequence[str], name: str) -> list[Cell]:
    return [words(metric_title(metric)), words(who), *(figure(model.figure(group, name)) for group in groups)]


def matrix(run: Results, metric: str) -> Table:
    """One metric's accuracy matrix, shaded by value; the stage that trained a task is framed."""
    found = run.metrics[metric]
    shown = labelled_rows(found, run.matrix)
    first = len(shown) - len(run.tasks)
    nothing = [None] * len(run.tasks)
    intervals = [*([nothing] * first), *(found.get("ci95") or [nothing] * len(run.tasks))]
    curve = [*([None] * first), *found["learning_curve"]["value"]]
    table = np.array([values for _, values in shown], dtype=float)  # [(1 +) stages, tasks]
    top = max(1.0, float(table.max()))
    rows = []
    for stage, (label, _) in enumerate(shown):
        cells = [
            Cell(number(value), interval(ends), value, max(0.0, value / top), stage - first == task)
            for task, (value, ends) in enumerate(zip(table[stage].tolist(), intervals[stage], strict=True))
        ]
        rows.append([words(label), *cells, figure({"value": curve[stage]})])
    for name, values in (found.get("references") or {}).items():
        rows.append([words(name.replace("_", " ")), *(figure({"value": value}) for value in values), Cell(MISSING)])
    note = "Framed: the stage that trained the task."
    if shown[:first]:
        note += " Zero-shot: the base alone."
    caption = run.titled(f"{heading(metric)} by stage (rows) and task (columns)")
    return Table(f"matrix-{metric}-{run.label}", caption, ["", *run.tasks, "mean of the seen"], rows, note)


def continual(runs: Sequence[Results]) -> Table:
    """The summary figures of every metric: final average, transfer, forgetting, gaps; of each run."""
    names = list(dict.fromkeys(name for run in runs for found in run.metrics.values() for name in found["summary"]))
    names = [
        name
        for name in names
        if any(
            (found["summary"].get(name) or {}).get("value") is not None
            for run in runs
            for found in run.metrics.values()
        )
    ]
    who = ["run"] if len(runs) > 1 else []
    rows = [
        [
            words(metric_title(metric)),
            *([words(run.label)] if who else []),
            *(figure(found["summary"].get(name), "" if name in UNSIGNED else "+") for name in names),
        ]
        for metric in dict.fromkeys(metric for run in runs for metric in run.metrics)
        for run in runs
        if (found := run.metrics.get(metric))
    ]
    note = "Differences carry a sign. 95 % bootstrap intervals over questions; BLEU and METEOR have none here."
    return Table("continual", "Continual learning", ["metric", *who, *map(title_of, names)], rows, note)


def every_figure(model: Scored, run: Results, title: str) -> Table:
    """All metrics of one model, overall and by domain."""
    groups = [OVERALL, *run.domains]
    rows = [
        [words(metric_title(name)), *(figure(model.figure(group, name)) for group in groups)]
        for name in metric_names()
        if any(model.figure(group, name) for group in groups)
    ]
    formulas = {name: model.scores["groups"][OVERALL]["figures"].get(name) for name in metric_names()}
    lacking = [
        f"{metric_title(name)}: {found.get('reason', 'missing')}"
        for name, found in formulas.items()
        if found and found["value"] is None
    ]
    note = f"Missing: {'; '.join(lacking)}." if lacking else ""
    return Table(f"all-{model.name}-{run.label}", run.titled(title), ["metric", *groups], rows, note)


def by_kind(run: Results) -> list[Table]:
    """The last stage by answer type and question type, where there are several."""
    found = []
    for kind, title in KINDS.items():
        parts = run.last.scores.get(kind) or {}
        if len(parts) < 2:
            continue
        names = [
            name
            for name in BY_KIND
            if any(part["figures"].get(name, {}).get("value") is not None for part in parts.values())
        ]
        rows = [
            [words(label), count(part["rows"]), *(figure(part["figures"].get(name)) for name in names)]
            for label, part in parts.items()
        ]
        head = [title, "questions", *map(metric_title, names)]
        found.append(Table(f"{kind}-{run.label}", run.titled(f"Scores after all tasks by {title}"), head, rows))
    return found


def confusion(run: Results, stage: StageRoutes) -> Table:
    """True domain by row, routed to by column, shaded by the row's share."""
    counts = stage.scores["confusion"]
    rows = []
    for domain, by in counts.items():
        total = sum(by.values()) or 1
        cells = [Cell(str(by[task]), "", by[task], by[task] / total, domain == task) for task in stage.routes.tasks]
        rows.append([words(domain), *cells, figure(stage.scores["per_domain"].get(domain), ends="interval")])
    head = ["true domain", *(f"to {task}" for task in stage.routes.tasks), "right"]
    return Table(
        f"confusion-{run.label}", run.titled("Where the questions were routed to"), head, rows, "Wilson intervals."
    )


def routers(report: Mapping[str, Any]) -> Table:
    """A route report: each router's accuracy and calibration, and how well it tells unknown questions."""
    domains = list(dict.fromkeys(domain for scores in report["routers"].values() for domain in scores["per_domain"]))
    rows = []
    for name, scores in report["routers"].items():
        novelty = scores.get("novelty") or {}
        cells = [figure(scores["accuracy"], ends="interval")]
        cells += [figure(scores["per_domain"].get(domain), ends="interval") for domain in domains]
        cells += [figure({"value": scores.get("ece")}), figure(novelty.get("rejected_known"), ends="interval")]
        cells += [figure(novelty.get("detected_unknown"), ends="interval"), figure({"value": novelty.get("auroc")})]
        rows.append([words(name), *cells])
    head = ["router", "all", *domains, "calibration error", "known taken for unknown", "unknown found", "AUROC"]
    note = f"Of the questions of {Path(str(report['question_file'])).name}, and those of no task. Wilson intervals."
    return Table("routers", "Routers on the same queries", head, rows, note)


def slot_use(run: Results, stage: StageRoutes) -> Table:
    """How a task's questions spread over its slots."""
    rows = [
        [words(task), count(use["used"]), count(use["slots"]), Cell(score(use["entropy"]), value=use["entropy"])]
        for task, use in stage.scores["slots"].items()
    ]
    head = ["task", "slots used", "slots", "entropy"]
    note = "Used: chosen by at least 5 % of the task’s questions. Entropy: 1 where all are chosen alike."
    return Table(f"slots-{run.label}", run.titled("Use of the slots"), head, rows, note)


def novelty(run: Results, stages: Sequence[StageRoutes]) -> Table:
    """After each stage by domain how many questions were taken for unknown, and whether they were."""
    rows = [
        [
            words(f"after {stage.task}"),
            words(domain),
            words("yes" if stage.knows(domain) else "no"),
            count(share["n"]),
            figure(share, ends="interval"),
        ]
        for stage in stages
        if stage.scores["novelty"]
        for domain in run.domains
        if (share := stage.scores["novelty"]["rejected"].get(domain))
    ]
    areas = [
        f"after {stage.task} {score(stage.scores['novelty']['auroc'])}"
        for stage in stages
        if stage.scores["novelty"] and stage.scores["novelty"]["auroc"] is not None
    ]
    note = f"AUROC of unknown against known questions: {'; '.join(areas)}." if areas else ""
    head = ["stage", "domain", "learned by then", "questions", "taken for unknown"]
    return Table(f"novelty-{run.label}", run.titled("Questions taken for unknown"), head, rows, note)


def pictures(run: Results) -> Table | None:
    """What the pictures contribute to the base and to the last stage; ``None`` where that was not measured."""
    rows = []
    for who, model in (("zero-shot base", run.zero_shot), ("after all tasks", run.last)):
        for kind, part in ((model.scores.get("pictures") or {}) if model else {}).items():
            for group, found in part["groups"].items():
                exact = found["figures"].get("exact_match")
                rows.append([words(who), words(kind), words(group), figure(found["changed"]), *_drops(exact)])
    if not rows:
        return None
    head = ["model", "shown instead", "questions", "answers that change", "exact match, real", "shown", "drop"]
    return Table(
        f"pictures-{run.label}",
        run.titled("What the pictures contribute"),
        head,
        rows,
        "Paired bootstrap intervals.",
    )


def _drops(found: Mapping[str, Any] | None) -> list[Cell]:
    if found is None:
        return [Cell(MISSING)] * 3
    plain = [Cell(score(found[name]), value=found[name]) for name in ("real", "shown")]
    return [*plain, figure(found, "+", "drop")]


def named(name: str, caption: str, head: Sequence[str], pairs: Iterable[Sequence[object]]) -> Table:
    """A table of plain words."""
    return Table(name, caption, head, [[words(part) for part in pair] for pair in pairs])
