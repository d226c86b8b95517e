"""The section of several runs: their main figures, what they differ in, and what several seeds spread."""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.matrix_report import UNSIGNED, metric_title, title_of
from llava.eval.metrics.base import OVERALL
from llava.eval.page.parts import Section
from llava.eval.page.results import Results
from llava.eval.page.tables import MAIN, MISSING, Table, count, figure, words
from llava.eval.page.versus import Difference, Seeds


def side_by_side(runs: Sequence[Results], seeds: Sequence[Seeds], found: Sequence[Difference], shown: int) -> Section:
    """Several runs: their main figures, their differences, their spread over seeds."""
    said = [f"{runs[0].label} is what the others are compared with."]
    if shown < len(runs):
        said.append(
            f"{shown} of the {len(runs)} runs are shown in full below: the first of each method, route and order."
        )
    said += [f"{one.run} is not compared: {one.lacking}." for one in found if one.lacking]
    if not seeds:
        said.append("No two runs differ in their seed alone, so nothing is said of the spread over seeds.")
    compared = [one for one in found if one.groups]
    return Section(
        "runs",
        "Runs side by side",
        said,
        tables=[
            _runs(runs),
            *(_over_seeds(one, list(one.spread["metrics"])[:1]) for one in seeds),
            *(_differences(one, MAIN) for one in compared),
        ],
        folded=[
            *(_over_seeds(one, list(one.spread["metrics"]), "every-") for one in seeds),
            *(_differences(one, one.metrics, "every-") for one in compared),
        ],
    )


def _runs(runs: Sequence[Results]) -> Table:
    main = next((name for run in runs for name in run.metrics), "")
    figures = ("average_final", "bwt", "forgetting", "fwt")
    metrics = ("exact_match", "closed_accuracy", "open_recall", "route_accuracy")
    rows = []
    for run in runs:
        summary = run.metrics[main]["summary"] if main in run.metrics else {}
        rows.append(
            [
                words(run.label),
                words(f"{run.method or MISSING}{f', {run.route}' if run.route else ''}"),
                words(" → ".join(run.tasks)),
                count(run.seed),
                *(figure(summary.get(name), "" if name == "average_final" else "+") for name in figures),
                *(figure(run.last.figure(OVERALL, name)) for name in metrics),
            ]
        )
    head = ["run", "method", "order", "seed", *(f"{title_of(name)}, {metric_title(main)}" for name in figures)]
    caption = "Final figures of every run"
    return Table(
        "runs", caption, [*head, *map(metric_title, metrics)], rows, "95 % bootstrap intervals over questions."
    )


def _differences(found: Difference, names: Sequence[str], prefix: str = "") -> Table:
    groups = list(found.groups)
    rows = [
        [
            words(metric_title(name)),
            *(figure(found.groups[group]["figures"].get(name), "+", "difference") for group in groups),
        ]
        for name in names
        if name in found.metrics
    ]
    rows.append([words("answers that change"), *(figure(found.groups[group]["changed"]) for group in groups)])
    caption = f"{found.run} minus {found.against}" + (", every metric" if prefix else "")
    note = "Paired bootstrap: both are scored on the same resampled questions."
    return Table(f"{prefix}difference-{found.run}", caption, ["metric", *groups], rows, note)


def _over_seeds(found: Seeds, metrics: Sequence[str], prefix: str = "") -> Table:
    rows = []
    for metric in metrics:
        values = found.spread["metrics"][metric]
        finals = zip(found.spread["tasks"], values["matrix"][-1], strict=True)
        cells = [(f"final, {task}", cell, "") for task, cell in finals]
        cells += [(title_of(key), cell, "" if key in UNSIGNED else "+") for key, cell in values["summary"].items()]
        rows += [
            [words(metric_title(metric)), words(name), figure(cell, sign, "mean"), figure(cell, key="sd", ends="")]
            for name, cell, sign in cells
        ]
    caption = f"{found.name}, over {len(found.runs)} seeds" + (", every metric" if prefix else "")
    note = "Mean, Student’s t interval and standard deviation over the runs."
    return Table(f"{prefix}seeds-{found.name}", caption, ["metric", "figure", "mean", "sd"], rows, note)
