"""What stands on the page, in order: each section with its words, tables and plots, whatever it is written as."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.continual.model_card import SETTINGS
from llava.eval.matrix_report import SUMMARY_TITLES, metric_title, title_of
from llava.eval.metrics.base import OVERALL
from llava.eval.page import plots, tables
from llava.eval.page.examples import Example, examples_of
from llava.eval.page.parts import Card, Panel, Section
from llava.eval.page.plots import Plot
from llava.eval.page.results import Results
from llava.eval.page.routes import StageRoutes, routes_of
from llava.eval.page.several import side_by_side
from llava.eval.page.tables import MISSING, Cell, Table, figure
from llava.eval.page.versus import detailed, differences, same_questions, seeds_of
from llava.eval.result_pages import score
from llava.inside import Folder

_WHOLE = ("/", "~", "file:/")
SHORT = 16
"""Digits of a checksum that are shown."""


def summary(runs: Sequence[Results], shown: Sequence[Results]) -> Section:
    """The figures that are looked for first."""
    first = runs[0]
    scored = [run for run in shown if run.last.rows]
    folded = [tables.every_figure(run.last, run, "Every figure, after all tasks") for run in scored]
    folded += [
        tables.every_figure(run.zero_shot, run, "Every figure of the base, zero-shot") for run in shown if run.zero_shot
    ]
    folded += [table for run in shown for table in tables.by_kind(run)]
    cards = cards_of(first) if len(runs) == 1 else []
    said = [about(first)]
    for run in shown:
        said += [run.titled(f"Left out, as {one.file} cannot be read: what it tells.") for one in run.left_out]
    return Section("summary", "Summary", said, cards, [tables.summary(run) for run in scored], folded=folded)


def about(run: Results) -> str:
    """What was evaluated, in a sentence."""
    rows = run.last.scores["groups"][OVERALL]["rows"]
    over = f" over the base {run.about['base']}" if run.about.get("base") else ""
    how = f"{run.method or 'one method'}{over}"
    route = f", routes: {run.route}" if run.route else ""
    asked = f"; {rows} test questions" if rows else ""
    return f"{how}, tasks in the order {' → '.join(run.tasks)}{route}{asked}."


def cards_of(run: Results) -> list[Card]:
    """A run's main figures."""
    main = next(iter(run.metrics), None)
    cards = []
    if found := run.last.figure(OVERALL, "exact_match"):
        others = [("zero-shot base", run.zero_shot.figure(OVERALL, "exact_match") if run.zero_shot else None)]
        others += [(who, run.last.figure(OVERALL, f"{name}_exact_match")) for name, who in tables.BASELINES.items()]
        cards.append(_card("Exact match, all questions", figure(found), _beside(others)))
    if main is not None:
        summary = run.metrics[main]["summary"]
        cards.append(_card(f"{tables.heading(main)}, mean over tasks", figure(summary.get("average_final"))))
        transfer = [(SUMMARY_TITLES[name], summary.get(name), "+") for name in ("bwt", "fwt")]
        beside = "; ".join(
            f"{title} {figure(cell, sign)}" for title, cell, sign in transfer if cell and cell["value"] is not None
        )
        cards.append(_card(f"Forgetting, {metric_title(main)}", figure(summary.get("forgetting"), "+"), beside))
    if found := run.last.figure(OVERALL, "route_accuracy"):
        cards.append(_card("Routes that find their task", figure(found), f"of {found['n']} questions, decided freely"))
    for kind, part in (run.last.scores.get("pictures") or {}).items():
        if exact := part["groups"][OVERALL]["figures"].get("exact_match"):
            cards.append(_card(f"Exact match lost with {kind} pictures", figure(exact, "+", "drop")))
    return [card for card in cards if card.text != MISSING]


def _card(title: str, cell: Cell, words: str = "") -> Card:
    return Card(title, cell.text, cell.detail, words)


def _beside(others: Iterable[tuple[str, Mapping[str, Any] | None]]) -> str:
    return "; ".join(f"{who} {score(found['value'])}" for who, found in others if found)


def matrices(runs: Sequence[Results]) -> Section:
    """Matrix, curves and forgetting of every metric."""
    panels = []
    for metric in dict.fromkeys(name for run in runs for name in run.metrics):
        having = [run for run in runs if metric in run.metrics]
        drawn: list[Plot | None] = []
        for run in having:
            drawn += [plots.curves(run, metric), plots.lost(run, metric)]
        panel_tables = [tables.matrix(run, metric) for run in having]
        panels.append(Panel(metric, metric_title(metric), panel_tables, [plot for plot in drawn if plot]))
    left = [
        f"{run.titled(metric_title(name))}: {found.get('reason', 'missing')}."
        for run in runs
        for name, found in run.matrix["metrics"].items()
        if found["summary"] is None
    ]
    formulas = runs[0].matrix.get("formulas") or {}
    rows = [
        [title_of(name) if name in SUMMARY_TITLES else name.replace("_", " "), text] for name, text in formulas.items()
    ]
    note = tables.named(
        "formulas", "Formulas; R[i][j] is the score on task j after stage i, T the last", ["figure", "formula"], rows
    )
    return Section(
        "matrix",
        "Accuracy matrix, curves, forgetting",
        left,
        tables=[tables.continual(runs)] if panels else [],
        panels=panels,
        folded=[note] if rows else [],
    )


def routes(runs: Sequence[Results], report: Mapping[str, Any] | None) -> Section:
    """Confusion, reliability, slots, novelty; and the routers of a route report."""
    said: list[str] = []
    shown: list[Table] = [tables.routers(report)] if report else []
    drawn: list[Plot | None] = []
    for run in runs:
        stages = routes_of(run)
        if not stages or stages[-1].task != run.tasks[-1]:
            said.append(run.titled(_no_route(run)))
            continue
        last = stages[-1]
        shown.append(tables.confusion(run, last))
        drawn.append(plots.reliable(run, last) if last.bins else None)
        if run.slot_tasks:
            shown.append(tables.slot_use(run, last))
        if any(stage.scores["novelty"] for stage in stages):
            shown.append(tables.novelty(run, stages))
            drawn += [plots.novel(run, stage) for stage in _telling(stages)]
        else:
            said.append(run.titled("Its slots are not calibrated, so no question was told to be unknown."))
    return Section("routes", "Routes", said, tables=shown, plots=[plot for plot in drawn if plot])


def _telling(stages: Sequence[StageRoutes]) -> list[StageRoutes]:
    """The stages whose novelty is drawn: the first, where most domains are unknown, and the last."""
    return list({stage.task: stage for stage in (stages[0], stages[-1])}.values())


def _no_route(run: Results) -> str:
    if run.route == "oracle":
        return "Each question’s task was given, so there is no route to judge."
    if not run.last.metadata:
        return "The answers are not beside the scores any more, or cannot be read, and they are what tells of routes."
    return "The answers tell of no route among tasks: the method decides none."


def pictures(runs: Sequence[Results]) -> Section:
    """What the pictures contribute."""
    found = {run.label: tables.pictures(run) for run in runs}
    lacking = [label for label, table in found.items() if table is None]
    command = 'PICTURES="real blank shuffled" bash cv805.sh'
    who = "" if runs[0].alone else f" for {', '.join(lacking)}"
    said = [f"Not measured{who}; {command} does."] if lacking else []
    if len(lacking) < len(runs):
        said.append("Blank: pictures of one colour. Shuffled: pictures of the domain change places.")
    drawn = [plots.looked(run) for run in runs]
    return Section(
        "pictures",
        "What the picture contributes",
        said,
        tables=[table for table in found.values() if table],
        plots=[plot for plot in drawn if plot],
    )


def some(examples: Sequence[Example], runs: Sequence[Results]) -> Section:
    """Questions with their pictures."""
    said = [
        "Chosen by chance, evenly over domains, right and wrong, closed and open questions. So the share of right ones "
        "is not the model’s."
    ]
    if len(runs) > 1:
        said.append(f"Right and wrong are those of {runs[0].label}.")
    return Section("examples", f"{len(examples)} example questions", said, examples=examples)


def training(runs: Sequence[Results]) -> Section:
    """Curves and settings of every stage."""
    drawn = [plots.learned(run, number) for run in runs for number in range(len(run.tasks))]
    kept = [plot for plot in drawn if plot]
    lacking = [run.label for run in runs if not any(run.logs)]
    who = "" if runs[0].alone else f" of {', '.join(lacking)}"
    said = (
        [f"The stages are not beside the results any more, or cannot be read, so no training log is left{who}."]
        if lacking
        else []
    )
    if len(kept) < len(drawn) and len(lacking) < len(runs):
        said.append("Stages that logged less than two losses have no curve.")
    return Section(
        "training", "Training", said, plots=kept, folded=[_settings(run) for run in runs if any(run.records)]
    )


def _settings(run: Results) -> Table:
    names = [name for name in SETTINGS if any(record.get(name) not in (None, "", -1) for record in run.records)]
    rows = [[name.replace("_", " "), *(str(record.get(name, MISSING)) for record in run.records)] for name in names]
    for name in ("base", "keys", "pictures", "training_files"):
        values = [record.get(name) for record in run.records]
        if any(values):
            rows.append([f"{name.replace('_', ' ')}, checksum", *map(_checksum, values)])
    return tables.named(f"settings-{run.label}", run.titled("Settings by stage"), ["", *run.tasks], rows)


def _checksum(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or MISSING)


def provenance(runs: Sequence[Results]) -> Section:
    """What was run, on what, made of which files."""
    columns = [_about(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name, MISSING) for column in columns)] for name in names]
    table = tables.named(
        "provenance", "Commands, versions, data, machine", ["", *("" if run.alone else run.label for run in runs)], rows
    )
    said = [
        run.titled("There is no evaluation.json, as in runs of older versions: command and machine are not known.")
        for run in runs
        if not run.about
    ]
    return Section("provenance", "What was run", said, tables=[table])


def _about(run: Results) -> dict[str, str]:
    """One run's column."""
    about, found = run.about, run.last.scores["provenance"]
    versions = {**(about.get("versions") or {}), **(found.get("package") or {})}
    files = [
        ("question file", found.get("question_file") or run.question_file),
        *(("training file", file) for file in found.get("train_files") or []),
    ]
    told = {
        "command": " ".join(map(shown_path, shlex.split(about["command"]))) if about.get("command") else "",
        "machine": about.get("machine", ""),
        "sequence": about.get("sequence", ""),
        "method": run.method,
        "route": run.route or "as trained",
        "base": about.get("base", ""),
        "order of the tasks": " → ".join(run.tasks),
        "seed of the training": "" if run.seed is None else str(run.seed),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "tokenizer of the scores": str(found.get("tokenizer", "")),
        "bootstrap": f"{found.get('draws', MISSING)} draws, seed {found.get('seed', MISSING)}",
    }
    for what, file in files:
        place = shown_path(str(file.get("path") or MISSING))
        told[f"{what} {place}, SHA-256"] = str(file["sha256"])[:SHORT]
    return {name: text for name, text in told.items() if text}


def shown_path(text: str) -> str:
    """A word of a command line; of an absolute path, or of one in a home, the last part: a page may be passed on."""
    name, equals, value = text.partition("=")
    if equals and not name.startswith(_WHOLE):
        return f"{name}={shown_path(value)}"
    return f"…/{Path(text).name}" if text.startswith(_WHOLE) else text


def title_of_page(runs: Sequence[Results]) -> str:
    """What the page is called."""
    names = list(dict.fromkeys(str(run.about.get("sequence") or run.label) for run in runs))
    return f"Evaluation of {', '.join(names)}" + (f", {len(runs)} runs" if len(runs) > 1 else "")


def all_sections(
    runs: Sequence[Results],
    examples: int,
    seed: int,
    image_folder: Folder | None = None,
    use_java: bool | None = None,
    route_report: Mapping[str, Any] | None = None,
) -> list[Section]:
    """The whole page.

    Args:
        examples, seed: how many questions are shown, and which. image_folder: of their pictures; default: as recorded.
        route_report: what ``llava.eval.route_report`` wrote, where it is to be shown too.
        use_java: for the metrics in which several runs are compared (see ``TextScorer``).
    """
    shown = detailed(runs)
    found = [] if len(runs) == 1 else [side_by_side(runs, seeds_of(runs), differences(shown, use_java), len(shown))]
    alike = [run for run in shown if same_questions(runs[0], run)]
    return [
        *found,
        summary(runs, shown),
        matrices(shown),
        routes(shown, route_report),
        pictures(shown),
        some(examples_of(alike, examples, seed, image_folder), alike),
        training(shown),
        provenance(runs),
    ]
