"""An accuracy matrix as text and as a heat map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava.files import atomic_write

METRIC_TITLES = {"rouge_l": "ROUGE-L", "meteor": "METEOR", "cider": "CIDEr"}
METRIC_TITLES |= {f"bleu_{order}": f"BLEU-{order}" for order in (1, 2, 3, 4)}
SUMMARY_TITLES = {
    "average_final": "average final",
    "average_over_stages": "over stages",
    "learning_accuracy": "learning accuracy",
    "bwt": "BWT",
    "forgetting": "forgetting",
    "fwt": "FWT",
}
UNSIGNED = ("average_final", "average_over_stages", "learning_accuracy")
GAP = "gap_to_"
"""Begins the names of the gaps to references; what follows is the reference's name."""


def matrix_text(result: Mapping[str, Any]) -> str:
    """The matrices and their summary figures as text."""
    return "\n".join(_metric_text(name, found, result) for name, found in result["metrics"].items())


def _metric_text(name: str, found: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    rows = labelled_rows(found, result)
    wide = max(len(label) for label, _ in rows)
    curve = found["learning_curve"]
    seen = dict(zip([f"after {task}" for task in result["tasks"]], curve["value"], strict=True)) if curve else {}
    lines = [f"\n{name:<{wide}}" + "".join(f"  {task:>8}" for task in [*result["tasks"], "seen so far"])]
    for label, values in rows:
        more = [f"  {_number(seen[label]):>11}"] if label in seen else []
        lines.append(f"{label:<{wide}}" + "".join([*(f"  {_number(value):>8}" for value in values), *more]))
    if found["summary"] is None:
        return "\n".join([*lines, f"  no summary: {found['reason']}"])
    for key, figure in found["summary"].items():
        if figure["value"] is not None:
            span = "" if figure["ci95"] is None else " [{}, {}]".format(*(_signed(key, end) for end in figure["ci95"]))
            lines.append(f"  {title_of(key):<18}{_signed(key, figure['value'])}{span}")
    return "\n".join(lines)


def title_of(key: str) -> str:
    """A summary figure's name in print."""
    return f"gap to {key.removeprefix(GAP)}" if key.startswith(GAP) else SUMMARY_TITLES[key]


def metric_title(name: str) -> str:
    """A metric's name in print."""
    return METRIC_TITLES.get(name, name.replace("_", " "))


def labelled_rows(found: Mapping[str, Any], result: Mapping[str, Any]) -> list[tuple[str, Sequence[float | None]]]:
    """Rows of a metric's matrix with their labels, the base's first where it was asked."""
    rows = [(f"after {task}", values) for task, values in zip(result["tasks"], found["matrix"], strict=True)]
    return [("zero-shot", found["zero_shot"]), *rows] if found["zero_shot"] else rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _signed(key: str, value: float) -> str:
    """Differences with their sign, averages without."""
    return f"{value:.3f}" if key in UNSIGNED else f"{value:+.3f}"


def draw(result: Mapping[str, Any], path: Path) -> bool:
    """Write the heat map, one panel per metric that has values; False when matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    shown = {name: found for name, found in result["metrics"].items() if found["summary"] is not None}
    across = min(4, max(1, len(shown)))
    down = -(-len(shown) // across) or 1
    tasks = len(result["tasks"])
    size = (across * (1.6 + 0.75 * tasks), down * (1.5 + 0.42 * (tasks + 1)))
    picture = Figure(figsize=size, dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(picture)
    panels = picture.subplots(down, across, squeeze=False).flatten()
    for panel, (name, found) in zip(panels, shown.items(), strict=False):
        _draw_panel(panel, name, found, result)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    with atomic_write(path, "wb") as stream:
        canvas.print_png(stream, metadata={"Software": None})  # not savefig, which draws everything twice
    return True


def _draw_panel(panel: Any, name: str, found: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    rows = labelled_rows(found, result)
    table = np.array([values for _, values in rows], dtype=float)
    top = max(1.0, float(table.max()))
    panel.imshow(table, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        colour = "white" if value > 0.6 * top else "black"
        panel.text(column, row, f"{value:.3f}", ha="center", va="center", color=colour, fontsize=9)
    first = len(rows) - len(result["tasks"])
    for number in range(len(result["tasks"])):  # the cell of the stage that trained the task
        panel.add_patch(_frame(number - 0.5, number + first - 0.5))
    panel.set_xticks(range(len(result["tasks"])), result["tasks"])
    panel.set_yticks(range(len(rows)), [label for label, _ in rows])
    panel.tick_params(length=0)
    caption = [
        f"{SUMMARY_TITLES[key]} {_signed(key, found['summary'][key]['value'])}"
        for key in ("average_final", "bwt", "forgetting")
        if found["summary"][key]["value"] is not None
    ]
    panel.set_title(metric_title(name), fontsize=11)
    panel.set_xlabel("\n".join([", ".join(caption[:1]), ", ".join(caption[1:])]), fontsize=8)


def _frame(left: float, bottom: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((left, bottom), 1, 1, fill=False, edgecolor="black", linewidth=1.5)
