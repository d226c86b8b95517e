"""The accuracy matrix of a task sequence from its stages' scores, with BWT, forgetting and FWT.

    python -m llava.eval.accuracy_matrix --sequence vqa-rad --output-dir output/eval/vqa-rad \\
        --zero-shot output/eval/vqa-rad/base/scores.json \\
        --scores output/eval/vqa-rad/llava-vqa-rad_abd/scores.json ...

``--reference joint=FILE`` adds the gap to the final scores of another method, or of the same one with the task given.

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
from llava.continual.matrix import FORMULAS, learning_curve, summary
from llava.continual.sequence import load_sequence
from llava.eval.eval_video_qa import package_version
from llava.eval.matrix_report import draw, matrix_text
from llava.eval.metrics import metric_names
from llava.eval.score_schema import read_scores
from llava.eval.statistics import DRAWS, SEED, interval, resample_weights
from llava.files import atomic_write, file_sha256
from llava.utils import UserError, run_cli

FORMAT_VERSION = 1
MATRIX_NAME, PICTURE_NAME = "accuracy_matrix.json", "accuracy_matrix.png"
DEFAULT_METRICS = ("exact_match", "closed_accuracy", "open_recall", "rouge_l", "cider")


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
        dict(named_file(text) for text in arguments.reference),
    )


def named_file(text: str) -> tuple[str, str]:
    """``joint=scores.json`` as name and file; ``UserError`` for anything else."""
    name, mark, file = text.partition("=")
    if not (name and mark and file):
        raise UserError(f"--reference {text!r} is not NAME=FILE (such as joint=output/eval/…/scores.json)")
    return name, file


def write_matrix(
    folder: Path,
    scores: Sequence[str | Path],
    tasks: Sequence[str],
    metrics: Sequence[str] = DEFAULT_METRICS,
    zero_shot: str | Path | None = None,
    draws: int = DRAWS,
    seed: int = SEED,
    references: Mapping[str, str | Path] | None = None,
    tables: bool = True,
) -> dict[str, Any]:
    """Print the matrix of the stages' score files, and write it to ``folder`` as numbers and as a picture.

    Args:
        references: by name the last scores file of what the final scores are compared with.
        tables: False prints no matrix.

    Returns:
        what ``accuracy_matrix.json`` holds.

    Raises:
        UserError: as ``load_stage`` and ``build``.
    """
    stages = [load_stage(path, tasks) for path in scores]
    base = load_stage(zero_shot, tasks) if zero_shot else None
    goals = {name: load_stage(path, tasks) for name, path in (references or {}).items()}
    result = build(stages, tasks, metrics, base, draws, seed, goals)
    if tables:
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
    reference: list[str] = flag([], "name=scores.json: whose final scores the gap is to, such as joint or oracle")
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
    references: Mapping[str, Stage] | None = None,
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
    goals = references or {}
    everyone = [*([zero_shot] if zero_shot else []), *stages, *goals.values()]
    _refuse_missing(everyone, tasks, metrics)
    _refuse_unequal(everyone)
    weights = [resample_weights(stages[0].groups[task]["rows"], draws, seed + i) for i, task in enumerate(tasks)]
    return {
        "format_version": FORMAT_VERSION,
        "tasks": list(tasks),
        "stages": [stage.model_id for stage in stages],
        "zero_shot_model": zero_shot.model_id if zero_shot else None,
        "formulas": FORMULAS,
        "references": {name: goal.model_id for name, goal in goals.items()},
        "metrics": {name: _metric_matrix(name, stages, tasks, zero_shot, weights, goals) for name in metrics},
        "provenance": {
            "package": {"llava": package_version("llava"), "numpy": package_version("numpy")},
            "question_file": stages[0].provenance["question_file"],
            "tokenizer": stages[0].provenance["tokenizer"],
            "scores": [{"path": str(stage.path), "sha256": file_sha256(stage.path)} for stage in everyone],
            "draws": draws,
            "seed": seed,
        },
    }


def fitting(
    files: Mapping[str, Path], like: str | Path, tasks: Sequence[str], metrics: Sequence[str]
) -> dict[str, Path]:
    """Those of the files that were scored as ``like`` was, for references; says of the others why they are left out."""
    mine = load_stage(like, tasks)
    found: dict[str, Path] = {}
    for name, path in files.items():
        try:
            goal = load_stage(path, tasks)
            _refuse_unequal([mine, goal])
            _refuse_missing([goal], tasks, metrics)
            found[name] = path
        except UserError as error:
            print(f"note: no gap to {name}: {error}")
    return found


def _refuse_missing(stages: Sequence[Stage], tasks: Sequence[str], metrics: Sequence[str]) -> None:
    for stage in stages:
        if absent := [name for name in metrics if name not in stage.groups[tasks[0]]["figures"]]:
            raise UserError(f"{stage.path}: no figure for metric {absent[0]!r}; score the answers again")


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
    metric: str,
    stages: Sequence[Stage],
    tasks: Sequence[str],
    zero_shot: Stage | None,
    weights: Sequence[np.ndarray],
    goals: Mapping[str, Stage],
) -> dict[str, Any]:
    """One metric: the matrix, its intervals, the zero-shot row, the learning curve and the summary figures."""
    everyone = [*([zero_shot] if zero_shot else []), *stages, *goals.values()]
    cells = [[stage.figure(task, metric) for task in tasks] for stage in everyone]  # [(1 +) stages + goals][tasks]
    values = [[cell["value"] for cell in row] for row in cells]
    first = 1 if zero_shot else 0
    last = first + len(stages)
    found = {
        "formula": cells[0][0]["formula"].split(" (")[0] if metric.startswith("majority") else cells[0][0]["formula"],
        "n": [cell["n"] for cell in cells[last - 1]],
        "matrix": values[first:last],
        "ci95": [[cell["ci95"] for cell in row] for row in cells[first:last]],
        "zero_shot": values[0] if zero_shot else None,
        "references": dict(zip(goals, values[last:], strict=True)),
    }
    reasons = [cell.get("reason", "missing") for row in cells for cell in row if cell["value"] is None]
    if reasons:
        return {**found, "learning_curve": None, "summary": None, "reason": reasons[0]}

    def measured(table: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Learning curve and summary of ``[..., (1 +) stages + goals, tasks]``."""
        matrix, base = table[..., first:last, :], table[..., 0, :] if zero_shot else None
        rows = {name: table[..., last + number, :] for number, name in enumerate(goals)}
        return learning_curve(matrix), summary(matrix, base, rows)

    curve, figures = measured(np.array(values))
    replicates = _replicates(everyone, tasks, metric, weights)
    drawn = None if replicates is None else measured(replicates)
    found["learning_curve"] = {
        "value": curve.tolist(),
        "ci95": None if drawn is None else [interval(drawn[0][..., stage]) for stage in range(len(stages))],
    }
    found["summary"] = {
        name: {
            "value": float(value) if np.isfinite(value) else None,
            "ci95": None if drawn is None else interval(drawn[1][name]),
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


if __name__ == "__main__":
    run_cli(main)
