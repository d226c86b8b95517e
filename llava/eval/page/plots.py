"""The plots of the page: SVG that stands in the page itself, takes its colours, and is read out by title and words.

Series differ in mark and dash too, and bars in hatching, so that they can be told apart without colour.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava.continual.matrix import forgetting_by_task
from llava.eval.matrix_report import labelled_rows, metric_title
from llava.eval.page.results import Results
from llava.eval.page.routes import StageRoutes
from llava.eval.page.tables import heading
from llava.eval.result_pages import score

SIZE = (4.6, 2.9)
"""Inches; drawn small enough to be read on a phone as it is."""
INK, SOFT, GROUND = "#010203", "#040506", "#070809"
SERIES = tuple(f"#1000{number:02d}" for number in range(1, 7))
"""Stand-ins for the page's colours, which its style sheet gives by light and dark."""
MARKS, DASHES, HATCHES = (
    "osD^vP",
    ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1))),
    ("", "//", "..", "xx", "\\\\", "++"),
)
MOST_POINTS = 400
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 50, 100, 1000)
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "svg.hashsalt": "llava",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": SOFT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.color": INK,
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Plot:
    """A drawing: ``title`` names it, ``words`` say what it shows, ``svg`` is the element itself."""

    title: str
    words: str
    svg: str


def drawn(title: str, words: str, paint: Callable[[Any], None]) -> Plot:
    """What ``paint`` draws on the axes that it is given."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # text stays text, and the browser has the fonts
        picture = Figure(figsize=SIZE, layout="constrained", facecolor="none")
        paint(picture.subplots())
        stream = io.StringIO()
        # Not savefig, which draws everything twice.
        FigureCanvasSVG(picture).print_svg(stream, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Plot(title, words, _for_a_page(stream.getvalue(), title))


_COLOURS = {INK: "var(--ink)", SOFT: "var(--soft)", GROUND: "var(--ground)"}
_COLOURS |= {name: f"var(--series-{number})" for number, name in enumerate(SERIES, start=1)}


def _for_a_page(svg: str, title: str) -> str:
    """The element alone, in the page's colours and as wide as there is room; what it shows is said beside it."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    own = hashlib.sha256(title.encode()).hexdigest()[:8]  # what is referred to has a name of this drawing's own
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1d{own}-", svg)
    for name, colour in _COLOURS.items():
        svg = svg.replace(name, colour)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def _style(number: int) -> dict[str, Any]:
    place = number % len(SERIES)
    return {"color": SERIES[place], "marker": MARKS[place], "linestyle": DASHES[place]}


def _bars(number: int) -> dict[str, Any]:
    place = number % len(SERIES)
    return {"facecolor": SERIES[place], "hatch": HATCHES[place], "edgecolor": INK, "linewidth": 0.7}


def curves(run: Results, metric: str) -> Plot:
    """Each task's score over the stages; the stage that trained it has a larger mark."""
    found = run.metrics[metric]
    shown = labelled_rows(found, run.matrix)
    first = len(shown) - len(run.tasks)
    table = np.array([values for _, values in shown], dtype=float)  # [(1 +) stages, tasks]
    ends = [None] * first + list(found.get("ci95") or [None] * len(run.tasks))

    def paint(axes: Any) -> None:
        for task, name in enumerate(run.tasks):
            axes.plot(range(len(shown)), table[:, task], label=name, markersize=4, linewidth=1.6, **_style(task))
            axes.plot([first + task], [table[first + task, task]], markersize=9, fillstyle="none", **_style(task))
            spans = [(x, row[task]) for x, row in enumerate(ends) if row is not None and row[task] is not None]
            for x, (low, high) in spans:
                axes.vlines(x + (task - (len(run.tasks) - 1) / 2) * 0.05, low, high, color=SERIES[task % 6], alpha=0.6)
        axes.set_xticks(range(len(shown)), [label for label, _ in shown])
        axes.set_ylim(bottom=min(0.0, float(table.min())))
        axes.set_ylabel(metric_title(metric))
        _legend(axes, len(run.tasks))

    words = "; ".join(
        f"{name}: " + ", ".join(f"{label} {score(row[task])}" for (label, _), row in zip(shown, table, strict=True))
        for task, name in enumerate(run.tasks)
    )
    return drawn(run.titled(f"{heading(metric)} by task over the stages"), words, paint)


def lost(run: Results, metric: str) -> Plot | None:
    """What is forgotten of each task but the last; ``None`` for a single task."""
    values = forgetting_by_task(np.array(run.metrics[metric]["matrix"], dtype=float))
    if not len(values):
        return None
    names = run.tasks[: len(values)]

    def paint(axes: Any) -> None:
        for number, value in enumerate(values):
            axes.bar(number, value, width=0.6, **_bars(number))
            _value_on(axes, number, value)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_ylim(min(-0.05, 1.25 * float(values.min())), max(0.05, 1.25 * float(values.max())))
        axes.set_ylabel("best earlier − final")
        axes.grid(axis="x", visible=False)

    words = ", ".join(f"{name} {score(value, '+')}" for name, value in zip(names, values, strict=True))
    return drawn(run.titled(f"Forgetting by task, {metric_title(metric)}"), f"{words}. Below 0 is a gain.", paint)


def reliable(run: Results, stage: StageRoutes) -> Plot:
    """Accuracy of the route by its confidence, sized by the questions; on the diagonal it is calibrated."""

    def paint(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=SOFT, linestyle="--", linewidth=1)
        rows = np.array([count for count, _, _ in stage.bins], dtype=float)
        places = [confidence for _, _, confidence in stage.bins]
        right = [accuracy for _, accuracy, _ in stage.bins]
        axes.plot(places, right, color=SERIES[0], linewidth=1)
        axes.scatter(places, right, s=15 + 120 * rows / rows.max(), color=SERIES[0], edgecolors=INK, linewidths=0.7)
        for (count, accuracy, confidence), where in zip(stage.bins, places, strict=True):
            left = confidence > 0.8
            axes.annotate(
                str(count),
                (where, accuracy),
                (-9 if left else 9, -3),
                textcoords="offset points",
                fontsize=8,
                ha="right" if left else "left",
            )
        axes.set_xlim(0, 1.06)
        axes.set_ylim(0, 1.08)
        axes.set_xlabel("confidence of the route")
        axes.set_ylabel("share that is right")

    words = "; ".join(
        f"{count} questions at confidence {score(confidence)}: {score(float(accuracy))} right"
        for count, accuracy, confidence in stage.bins
    )
    error = stage.scores["ece"]
    more = "" if error is None else f". Expected calibration error {score(error)}"
    return drawn(run.titled("Reliability of the route"), f"{words}{more}.", paint)


def novel(run: Results, stage: StageRoutes) -> Plot | None:
    """Novelty of the questions by domain, beside the limit; ``None`` where none was measured."""
    by_domain = {name: stage.novelty[name] for name in run.domains if name in stage.novelty}
    if not by_domain:
        return None
    values = np.concatenate(list(by_domain.values()))
    low, high = max(float(values.min()), 1e-3), max(float(values.max()), 1.2)
    edges = np.geomspace(low * 0.95, high * 1.05, 30)
    titles = {name: name if stage.knows(name) else f"{name} (not learned yet)" for name in by_domain}

    def paint(axes: Any) -> None:
        for number, (name, found) in enumerate(by_domain.items()):
            line = DASHES[number % 6]
            axes.hist(found.clip(low), edges, histtype="stepfilled", alpha=0.25, color=SERIES[number % 6], linewidth=0)
            axes.hist(
                found.clip(low),
                edges,
                histtype="step",
                color=SERIES[number % 6],
                linewidth=1.6,
                linestyle=line,
                label=titles[name],
            )
        axes.axvline(1, color=INK, linewidth=1)
        axes.text(1, axes.get_ylim()[1], " unknown →", va="top", fontsize=8)
        axes.set_xscale("log")
        ticks = [tick for tick in TICKS if low <= tick <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("novelty (1: the limit)")
        axes.set_ylabel("questions")
        _legend(axes, len(by_domain))

    words = "; ".join(
        f"{titles[name]}: median {np.median(found):.2f}, {int((found > 1).sum())} of {len(found)} above the limit"
        for name, found in by_domain.items()
    )
    return drawn(run.titled(f"Novelty of the questions after {stage.task}"), f"{words}.", paint)


def looked(run: Results) -> Plot | None:
    """Exact match with the real pictures and with others, of the last stage; ``None`` where that was not measured."""
    parts = run.last.scores.get("pictures") or {}
    kinds = [kind for kind, part in parts.items() if "exact_match" in part["groups"]["overall"]["figures"]]
    if not kinds:
        return None
    groups = list(parts[kinds[0]]["groups"])
    values = {"real": [_exact(parts[kinds[0]], group, "real") for group in groups]}
    values |= {kind: [_exact(parts[kind], group, "shown") for group in groups] for kind in kinds}
    width = 0.8 / len(values)

    def paint(axes: Any) -> None:
        for number, (kind, heights) in enumerate(values.items()):
            places = np.arange(len(groups)) + (number - (len(values) - 1) / 2) * width
            axes.bar(places, heights, width, label=kind, **_bars(number))
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel("exact match")
        axes.grid(axis="x", visible=False)
        _legend(axes, len(values))

    words = "; ".join(
        f"{group}: " + ", ".join(f"{kind} {score(heights[place])}" for kind, heights in values.items())
        for place, group in enumerate(groups)
    )
    return drawn(run.titled("Exact match by what is shown"), f"{words}.", paint)


def _exact(part: Mapping[str, Any], group: str, side: str) -> float:
    found = part["groups"].get(group, {}).get("figures", {}).get("exact_match")
    return float("nan") if found is None else float(found[side])


def learned(run: Results, number: int) -> Plot | None:
    """A stage's training loss and learning rate; ``None`` where nothing was logged."""
    lines, task = run.logs[number], run.tasks[number]
    if len(lines) < 2:
        return None
    shown = lines[:: -(-len(lines) // MOST_POINTS)]
    steps, losses = ([line[name] for line in shown] for name in ("step", "loss"))
    rates = [(line["step"], line["learning_rate"]) for line in shown if "learning_rate" in line]

    def paint(axes: Any) -> None:
        axes.plot(steps, losses, color=SERIES[0], linewidth=1.4, label="loss")
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        axes.set_ylim(bottom=0)
        if rates:
            right = axes.twinx()
            right.plot(*zip(*rates), color=SERIES[1], linewidth=1, linestyle="--", label="learning rate")
            right.set_ylabel("learning rate (dashed)")
            right.ticklabel_format(axis="y", scilimits=(-2, 3))
            right.grid(visible=False)
            right.spines["right"].set_visible(True)

    ends = [f"{line['loss']:.3g} at step {line['step']:.0f}" for line in (lines[0], lines[-1])]
    words = f"The loss goes from {ends[0]} to {ends[1]}."
    return drawn(run.titled(f"Training of {task}"), words, paint)


def _value_on(axes: Any, place: float, value: float) -> None:
    below = value < 0
    axes.annotate(
        score(value, "+"),
        (place, value),
        (0, -3 if below else 3),
        textcoords="offset points",
        ha="center",
        va="top" if below else "bottom",
        fontsize=8,
    )


def _legend(axes: Any, names: int) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(names, 3), borderaxespad=0.2, handlelength=2.6)
