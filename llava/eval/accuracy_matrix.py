"""The accuracy matrix of a task sequence from its stages' scores, with BWT, forgetting and FWT.

    python -m llava.eval.accuracy_matrix --sequence vqa-rad --output-dir output/eval/vqa-rad \\
        --zero-shot output/eval/vqa-rad/base/scores.json \\
        --scores output/eval/vqa-rad/llava-vqa-rad_abd/scores.json ...

Writes ``accuracy_matrix.json`` and a heat map ``accuracy_matrix.png``, and prints the matrix of each metric: one row
per stage, one column per task. Confidence intervals of the summary figures resample the questions, the same ones for
all stages, from the row values that ``eval_video_qa`` leaves beside each ``scores.json``; metrics that are not means
over rows (BLEU, METEOR) have none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.cli import SEEDS, fail, flag, parse
from llava.continual.matrix import FORMULAS, summary
from llava.continual.sequence import load_sequence
from llava.eval.eval_video_qa import package_version
from llava.eval.metrics import metric_names
from llava.eval.score_schema import read_scores
from llava.eval.statistics import DRAWS, SEED, interval, resample_weights
from llava.files import atomic_write, file_sha256
from llava.utils import UserError, run_cli

FORMAT_VERSION = 1
MATRIX_NAME, PICTURE_NAME = "accuracy_matrix.json", "accuracy_matrix.png"
DEFAULT_METRICS = ("exact_match", "closed_accuracy", "open_recall", "rouge_l", "cider")
METRIC_TITLES = {"rouge_l": "ROUGE-L", "meteor": "METEOR", "cider": "CIDEr"}
METRIC_TITLES |= {f"bleu_{order}": f"BLEU-{order}" for order in (1, 2, 3, 4)}
SUMMARY_TITLES = {
    "average_final": "average final",
    "learning_accuracy": "learning accuracy",
    "bwt": "BWT",
    "forgetting": "forgetting",
    "fwt": "FWT",
}


@dataclass(frozen=True)
class Stage:
    """One model's scores: figures per group, row values per task and metric, and where they came from."""

    path: Path
    model_id: str
    groups: Mapping[str, Any]
    provenance: Mapping[str, Any]
    rows: Mapping[str, Sequence[Mapping[str, Any]]]

    def figure(self, task: str, metric: str) -> Mapping[str, Any]:
        return self.groups[task]["figures"][metric]

    def row_values(self, task: str, metric: str) -> np.ndarray | None:
        """The metric of each of the task's rows, NaN for rows outside it; None when it is no mean over rows."""
        values = [_scores_in(row, task).get(metric) for row in self.rows.get(task, ())]
        if not any(value is not None for value in values):
            return None
        return np.array([np.nan if value is None else value for value in values])


def main(argv: Sequence[str] | None = None) -> None:
    """Build, print, write and draw."""
    arguments = parse_arguments(argv)
    sequence = load_sequence(arguments.sequence) if arguments.sequence else None
    tasks = arguments.tasks or (sequence.task_names if sequence else [])
    names = arguments.metrics or (sequence.metrics if sequence else None) or DEFAULT_METRICS
    write_matrix(
        Path(arguments.output_dir),
        arguments.scores,
        tasks,
        names,
        arguments.zero_shot,
        arguments.draws,
        arguments.seed,
    )


def write_matrix(
    folder: Path,
    scores: Sequence[str | Path],
    tasks: Sequence[str],
    metrics: Sequence[str] = DEFAULT_METRICS,
    zero_shot: str | Path | None = None,
    draws: int = DRAWS,
    seed: int = SEED,
) -> dict[str, Any]:
    """Print the matrix of the stages' score files, and write it to ``folder`` as numbers and as a picture.

    Returns:
        what ``accuracy_matrix.json`` holds.

    Raises:
        UserError: as ``load_stage`` and ``build``.
    """
    stages = [load_stage(path, tasks) for path in scores]
    base = load_stage(zero_shot, tasks) if zero_shot else None
    result = build(stages, tasks, metrics, base, draws, seed)
    print(matrix_text(result))
    with atomic_write(folder / MATRIX_NAME) as stream:
        json.dump(result, stream, indent=1, ensure_ascii=False, allow_nan=False)
        stream.write("\n")
    print(f"\nwrote {folder / MATRIX_NAME}")
    if draw(result, folder / PICTURE_NAME):
        print(f"wrote {folder / PICTURE_NAME}")
    else:
        print("no heat map: matplotlib is not installed (pip install matplotlib)")
    return result


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    scores: list[str] = flag(help="scores.json of each stage, in order")
    zero_shot: str | None = flag(None, "scores.json of the base model")
    sequence: str | None = flag(None, "task sequence: a file, or the name of one that ships")
    tasks: list[str] | None = flag(None, "tasks in order, in place of --sequence")
    metrics: list[str] | None = flag(None, "default: the sequence's own, else the primary ones")
    output_dir: str = flag()
    draws: int = flag(DRAWS, "bootstrap draws", least=1, most=10**6)
    seed: int = flag(SEED, "seed of the bootstrap", **SEEDS)


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """The command line."""
    arguments = parse(Arguments, argv, __doc__)
    if bool(arguments.sequence) == bool(arguments.tasks):
        fail("give one of --sequence and --tasks")
    return arguments


def load_stage(path: str | Path, tasks: Sequence[str]) -> Stage:
    """Read a ``scores.json`` and the row values beside it.

    Raises:
        UserError: a missing or broken file, or a task without rows in the scores.
    """
    source = Path(path)
    scores, rows = read_scores(source)
    groups, provenance, model_id = scores["groups"], scores["provenance"], scores["model_id"]
    absent = [task for task in tasks if task not in groups]
    if absent:
        raise UserError(f"{source}: no scores for task {absent[0]!r}; the test file has {', '.join(groups)}")
    by_task = {task: [row for row in rows if task == row.get("domain") or task in _by_domain(row)] for task in tasks}
    return Stage(source, model_id, groups, provenance, by_task)


def _by_domain(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Scores by domain of a row that has several."""
    return row.get("scores_by_domain") or {}


def _scores_in(row: Mapping[str, Any], task: str) -> Mapping[str, float]:
    """A row's scores as one of the task's: they differ where a metric looks at the whole group."""
    return _by_domain(row).get(task, row["scores"])


def build(
    stages: Sequence[Stage],
    tasks: Sequence[str],
    metrics: Sequence[str],
    zero_shot: Stage | None = None,
    draws: int = DRAWS,
    seed: int = SEED,
) -> dict[str, Any]:
    """The content of ``accuracy_matrix.json``.

    Raises:
        UserError: not one stage per task, an unknown metric, or stages scored on different questions or in
            different ways.
    """
    if len(stages) != len(tasks):
        raise UserError(f"{len(stages)} stages for {len(tasks)} tasks: give one scores file per task, in order")
    unknown = [name for name in metrics if name not in metric_names()]
    if unknown:
        raise UserError(f"unknown metric {unknown[0]!r} (choose from {', '.join(metric_names())})")
    everyone = [*([zero_shot] if zero_shot else []), *stages]
    for stage in everyone:
        if absent := [name for name in metrics if name not in stage.groups[tasks[0]]["figures"]]:
            raise UserError(f"{stage.path}: no figure for metric {absent[0]!r}; score the answers again")
    _refuse_unequal(everyone)
    weights = [resample_weights(stages[0].groups[task]["rows"], draws, seed + i) for i, task in enumerate(tasks)]
    return {
        "format_version": FORMAT_VERSION,
        "tasks": list(tasks),
        "stages": [stage.model_id for stage in stages],
        "zero_shot_model": zero_shot.model_id if zero_shot else None,
        "formulas": FORMULAS,
        "metrics": {name: _metric_matrix(name, stages, tasks, zero_shot, weights) for name in metrics},
        "provenance": {
            "package": {"llava": package_version("llava"), "numpy": package_version("numpy")},
            "question_file": stages[0].provenance["question_file"],
            "tokenizer": stages[0].provenance["tokenizer"],
            "scores": [{"path": str(stage.path), "sha256": file_sha256(stage.path)} for stage in everyone],
            "draws": draws,
            "seed": seed,
        },
    }


def _refuse_unequal(stages: Sequence[Stage]) -> None:
    first = stages[0]
    for stage in stages[1:]:
        for what in ("question_file", "tokenizer", "unanswered_questions"):
            mine, theirs = (found.provenance[what] for found in (stage, first))
            if isinstance(mine, dict):
                mine, theirs = mine["sha256"], theirs["sha256"]
            if mine != theirs:
                raise UserError(f"{first.path} and {stage.path} differ in {what} (score all stages in one call)")


def _metric_matrix(
    metric: str, stages: Sequence[Stage], tasks: Sequence[str], zero_shot: Stage | None, weights: Sequence[np.ndarray]
) -> dict[str, Any]:
    """One metric: the matrix, its intervals, the zero-shot row and the summary figures."""
    everyone = [*([zero_shot] if zero_shot else []), *stages]
    cells = [[stage.figure(task, metric) for task in tasks] for stage in everyone]  # [(1 +) stages][tasks]
    values = [[cell["value"] for cell in row] for row in cells]
    first = len(everyone) - len(stages)
    found = {
        "formula": cells[0][0]["formula"].split(" (")[0] if metric.startswith("majority") else cells[0][0]["formula"],
        "n": [cell["n"] for cell in cells[-1]],
        "matrix": values[first:],
        "ci95": [[cell["ci95"] for cell in row] for row in cells[first:]],
        "zero_shot": values[0] if zero_shot else None,
    }
    reasons = [cell.get("reason", "missing") for row in cells for cell in row if cell["value"] is None]
    if reasons:
        return {**found, "summary": None, "reason": reasons[0]}
    table = np.array(values)
    figures = summary(table[first:], table[0] if zero_shot else None)
    replicates = _replicates(everyone, tasks, metric, weights)
    spread = None if replicates is None else summary(replicates[:, first:], replicates[:, 0] if zero_shot else None)
    found["summary"] = {
        name: {
            "value": float(value) if np.isfinite(value) else None,
            "ci95": None if spread is None else interval(spread[name]),
        }
        for name, value in figures.items()
    }
    return found


def _replicates(
    stages: Sequence[Stage], tasks: Sequence[str], metric: str, weights: Sequence[np.ndarray]
) -> np.ndarray | None:
    """Bootstrap replicates of the scores, ``[draws, stages, tasks]``; None when a cell is no mean over rows."""
    columns = []
    for task, drawn in zip(tasks, weights, strict=True):
        values = [found for stage in stages if (found := stage.row_values(task, metric)) is not None]
        if len(values) < len(stages) or any(len(found) != drawn.shape[1] for found in values):
            return None
        table = np.stack(values, axis=-1)  # [rows, stages]
        counted = drawn @ np.isfinite(table)
        total = drawn @ np.nan_to_num(table)
        columns.append(np.divide(total, counted, out=np.full(total.shape, np.nan), where=counted > 0))
    return np.stack(columns, axis=-1)


# -- showing -----------------------------------------------------------------------------------------------------------


def matrix_text(result: Mapping[str, Any]) -> str:
    """The matrices and their summary figures as text."""
    return "\n".join(_metric_text(name, found, result) for name, found in result["metrics"].items())


def _metric_text(name: str, found: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    rows = _labelled_rows(found, result)
    wide = max(len(label) for label, _ in rows)
    lines = [f"\n{name:<{wide}}" + "".join(f"  {task:>8}" for task in result["tasks"])]
    for label, values in rows:
        lines.append(f"{label:<{wide}}" + "".join(f"  {_number(value):>8}" for value in values))
    if found["summary"] is None:
        return "\n".join([*lines, f"  no summary: {found['reason']}"])
    for key, figure in found["summary"].items():
        if figure["value"] is not None:
            span = "" if figure["ci95"] is None else " [{}, {}]".format(*(_signed(key, end) for end in figure["ci95"]))
            lines.append(f"  {SUMMARY_TITLES[key]:<18}{_signed(key, figure['value'])}{span}")
    return "\n".join(lines)


def _labelled_rows(found: Mapping[str, Any], result: Mapping[str, Any]) -> list[tuple[str, Sequence[float | None]]]:
    rows = [(f"after {task}", values) for task, values in zip(result["tasks"], found["matrix"], strict=True)]
    return [("zero-shot", found["zero_shot"]), *rows] if found["zero_shot"] else rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _signed(key: str, value: float) -> str:
    """Differences with their sign, averages without."""
    return f"{value:.3f}" if key in ("average_final", "learning_accuracy") else f"{value:+.3f}"


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
    picture = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(picture)
    panels = picture.subplots(down, across, squeeze=False).flatten()
    for panel, (name, found) in zip(panels, shown.items(), strict=False):
        _draw_panel(panel, name, found, result)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    with atomic_write(path, "wb") as stream:
        picture.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    return True


def _draw_panel(panel: Any, name: str, found: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    rows = _labelled_rows(found, result)
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
    panel.set_title(METRIC_TITLES.get(name, name.replace("_", " ")), fontsize=11)
    panel.set_xlabel("\n".join([", ".join(caption[:1]), ", ".join(caption[1:])]), fontsize=8)


def _frame(left: float, bottom: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((left, bottom), 1, 1, fill=False, edgecolor="black", linewidth=1.5)


if __name__ == "__main__":
    run_cli(main)
