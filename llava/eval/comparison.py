"""Two sets of answers to the same questions: which answers differ, and by how much each metric, with paired intervals.

Both are scored on the same resampled questions, so an interval is about the difference itself and far narrower than the
two figures' own intervals suggest. CIDEr's word weights come from the references, which the two share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava.data.metric_names import metric_names
from llava.eval.metrics.base import OVERALL
from llava.eval.metrics.scoring import Prepared
from llava.eval.score_table import columns, span
from llava.eval.statistics import DRAWS, SEED, Statistic, figure, interval, mean_statistic, resample_weights
from llava.normal_form import normalise

CHANGED = "share of rows whose two answers differ after normalisation"
PRIMARY = ("exact_match", "closed_accuracy", "open_recall")
"""Metrics that the printed tables show of every group."""


def compare(first: Prepared, second: Prepared, draws: int = DRAWS, seed: int = SEED) -> dict[str, Any]:
    """The second set of answers against the first.

    Args:
        first, second: of the same rows, without training rows, so that baselines are left out.

    Returns:
        ``{"overall" | domain: {"rows", "changed": figure, "figures": {metric: {"first", "second", "difference", "ci95",
        "n"}}}}``; a metric that one side lacks is left out.
    """
    found = {}
    for name, members, belongs in first.domains():
        weights = resample_weights(len(members), draws, seed)
        pairs = [(first.examples[i].prediction, second.examples[i].prediction) for i in members]
        changed = [float(normalise(one) != normalise(other)) for one, other in pairs]
        (_, mine), (_, theirs) = (side.statistics(members, belongs) for side in (first, second))
        differences = {metric: _difference(mine[metric], theirs[metric], weights) for metric in metric_names()}
        found[name] = {
            "rows": len(members),
            "changed": figure(mean_statistic(CHANGED, changed), weights),
            "figures": {metric: value for metric, value in differences.items() if value is not None},
        }
    return found


def _difference(first: Statistic | str, second: Statistic | str, weights: Any) -> dict[str, Any] | None:
    """One metric of both sides; None where it is not there on both, or about other rows."""
    if isinstance(first, str) or isinstance(second, str) or not first.counted == second.counted > 0:
        return None
    values = [float(side.value(side.rows.sum(axis=0))) for side in (first, second)]
    replicates = [side.value(weights @ side.rows) for side in (first, second)]
    return {
        "first": values[0],
        "second": values[1],
        "difference": values[1] - values[0],
        "ci95": interval(replicates[1] - replicates[0]),
        "n": first.counted,
    }


def comparison_table(found: Mapping[str, Any], names: tuple[str, str]) -> str:
    """The comparison as text: both values overall, and the difference of every group."""
    groups = list(found)
    lines = [["", *names, *(f"difference, {group}" for group in groups)]]
    lines.append(["rows", "", "", *(str(found[group]["rows"]) for group in groups)])
    lines.append(["answers that change", "", "", *(_share(found[group]["changed"]) for group in groups)])
    for metric, overall in found[OVERALL]["figures"].items():
        cells = [found[group]["figures"].get(metric) for group in groups]
        values = [f"{overall[side]:.3f}" for side in ("first", "second")]
        lines.append([metric, *values, *("-" if cell is None else _signed(cell) for cell in cells)])
    return "\n".join(["\n95 % paired bootstrap intervals in brackets", *columns(lines)])


def drops(found: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison of answers to other pictures with those to the real ones, as what is lost without the real ones."""
    return {
        group: {**part, "figures": {metric: _drop(value) for metric, value in part["figures"].items()}}
        for group, part in found.items()
    }


def _drop(value: Mapping[str, Any]) -> dict[str, Any]:
    ends = value["ci95"]
    return {
        "real": value["first"],
        "shown": value["second"],
        "drop": value["first"] - value["second"],
        "ci95": None if ends is None else [-end for end in reversed(ends)],
        "n": value["n"],
    }


def pictures_table(pictures: Mapping[str, Any]) -> str:
    """What the pictures contribute, as text: for each kind of picture shown the value, and the drop from the real one.

    Args:
        pictures: by kind what ``drops`` gives, as in ``scores.json``.
    """
    kinds = list(pictures)
    parts = [pictures[kind]["groups"] for kind in kinds]
    lines = [["", "real", *(title for kind in kinds for title in (kind, f"drop, {kind}"))]]
    for group in parts[0]:
        mark = "" if group == OVERALL else f"{group}: "
        changed = [cell for part in parts for cell in ("", _share(part[group]["changed"]))]
        lines.append([f"{mark}answers that change", "", *changed])
        for metric, first in parts[0][group]["figures"].items():
            if group == OVERALL or metric in PRIMARY:
                cells = [part[group]["figures"].get(metric) for part in parts]
                lines.append([f"{mark}{metric}", f"{first['real']:.3f}", *_shown(cells)])
    title = "\nwhat the pictures contribute (drop: real minus shown; 95 % paired bootstrap intervals in brackets)"
    return "\n".join([title, *columns(lines)])


def _shown(cells: Sequence[Mapping[str, Any] | None]) -> list[str]:
    return [text for cell in cells for text in (("-", "-") if cell is None else (f"{cell['shown']:.3f}", _fall(cell)))]


def _share(changed: Mapping[str, Any]) -> str:
    return f"{changed['value']:.3f} {span(changed['ci95'])}"


def _signed(cell: Mapping[str, Any]) -> str:
    return f"{cell['difference']:+.3f} {span(cell['ci95'], '+')}"


def _fall(cell: Mapping[str, Any]) -> str:
    return f"{cell['drop']:+.3f} {span(cell['ci95'], '+')}"
