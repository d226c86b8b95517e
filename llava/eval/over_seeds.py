"""The continual metrics of several runs that differ in their seed: mean, standard deviation and interval over the runs.

    python -m llava.eval.over_seeds output/seed*/eval/vqa-rad --output-json over_seeds.json

Each folder holds an ``accuracy_matrix.json``, of the same tasks, metrics and questions. The interval is Student's t
over the runs; the matrix's own intervals are over questions. With one run there is neither deviation nor interval.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.cli import flag, parse, word
from llava.eval.accuracy_matrix import MATRIX_NAME
from llava.eval.matrix_report import title_of
from llava.eval.score_table import columns, span
from llava.files import atomic_write, file_sha256
from llava.outside import read_object
from llava.schema import HUGE, Wanted, an_object, check_fields, list_of, number, words
from llava.utils import UserError, require_file, run_cli

FORMAT_VERSION = 1
MATRIX: dict[str, Wanted] = {
    "tasks": list_of(words(empty=False), empty=False),
    "metrics": an_object(),
    "provenance": an_object(),
}
"""What is read here of an ``accuracy_matrix.json``."""
_QUESTIONS = {"sha256": words(empty=False)}
_FIGURE = number(-HUGE, HUGE)
# Student's t at 97.5 % for 1 to 30 degrees of freedom; beyond that the last, which is a little too wide.
_T_TABLE = """
12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131
2.120 2.110 2.101 2.093 2.086 2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048 2.045 2.042
"""
_T = [float(value) for value in _T_TABLE.split()]


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    folders: list[str] = word(help="output folders with an accuracy_matrix.json each, one a seed")
    output_json: str | None = flag(None, "write the figures there too")


def main(argv: Sequence[str] | None = None) -> None:
    """Read, print and write."""
    arguments = parse(Arguments, argv, __doc__)
    result = over_seeds([read_matrix(folder) for folder in arguments.folders])
    files = [Path(folder) / MATRIX_NAME for folder in arguments.folders]
    result["provenance"] = [{"path": str(file), "sha256": file_sha256(file)} for file in files]
    print(seeds_text(result))
    if arguments.output_json:
        with atomic_write(Path(arguments.output_json)) as stream:
            json.dump(result, stream, indent=1, ensure_ascii=False, allow_nan=False)
            stream.write("\n")
        print(f"wrote {arguments.output_json}")


def read_matrix(folder: str | Path) -> dict[str, Any]:
    """The accuracy matrix of an evaluation's folder.

    Raises:
        UserError: there is none, or it is none.
    """
    file = require_file(Path(folder) / MATRIX_NAME, "accuracy matrix", "evaluate first: bash cv805.sh")
    found = read_object(file)
    try:
        check_fields(found, MATRIX, str(file), False, tuple(MATRIX))
        provenance = f"{file}: provenance"
        check_fields(found["provenance"], {"question_file": an_object()}, provenance, False, ("question_file",))
        check_fields(
            found["provenance"]["question_file"], _QUESTIONS, f"{provenance}: question_file", False, ("sha256",)
        )
        for name, values in found["metrics"].items():
            where = f"{file}: metrics: {name}"
            an_object().check(values, where)
            if values.get("summary", values) is not None:  # None: a score is missing, and so are the figures
                _check_figures(values, len(found["tasks"]), where)
    except UserError as error:
        raise UserError(f"{error} (not an accuracy matrix of this version; evaluate again)") from error
    return found


def _check_figures(values: Mapping[str, Any], tasks: int, where: str) -> None:
    """One metric's figures, of a stage for each task."""
    of_tasks = list_of(_FIGURE, tasks)
    wanted = {
        "matrix": list_of(of_tasks, tasks),
        "learning_curve": an_object(),
        "summary": an_object(),
    }
    check_fields(values, wanted, where, False, tuple(wanted))
    check_fields(values["learning_curve"], {"value": of_tasks}, f"{where}: learning_curve", False, ("value",))
    for name, figure in values["summary"].items():
        an_object().check(figure, f"{where}: {name}")
        check_fields(figure, {"value": _FIGURE}, f"{where}: {name}", False)


def over_seeds(matrices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every figure of some runs' matrices, over the runs.

    Returns:
        ``{"runs", "tasks", "metrics": {metric: {"matrix": [stage][task], "learning_curve": [stage], "summary":
        {name}}}}`` with ``spread`` of the runs in each place. A figure that one of the runs lacks is left out.

    Raises:
        UserError: runs of other tasks, metrics or questions.
    """
    for what in ("tasks", "metrics", "questions"):
        found = [_identity(matrix, what) for matrix in matrices]
        if other := next((one for one in found if one != found[0]), None):
            raise UserError(
                f"the runs differ in {what}: {found[0]} and {other} (give runs that differ in the seed alone)"
            )
    first = matrices[0]
    metrics = {name: _metric([found["metrics"][name] for found in matrices]) for name in first["metrics"]}
    return {
        "format_version": FORMAT_VERSION,
        "runs": len(matrices),
        "tasks": list(first["tasks"]),
        "metrics": {name: found for name, found in metrics.items() if found},
    }


def _identity(matrix: Mapping[str, Any], what: str) -> str:
    """What must be equal in all runs, in words."""
    if what == "questions":
        return str(matrix["provenance"]["question_file"]["sha256"])
    return ", ".join(matrix[what])


def _metric(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One metric over the runs; empty where a run could not compute it."""
    if any(run["summary"] is None for run in runs):
        return {}
    tables = np.array([run["matrix"] for run in runs])  # [runs, stages, tasks]
    curves = np.array([run["learning_curve"]["value"] for run in runs])  # [runs, stages]
    names = [name for name in runs[0]["summary"] if all(name in run["summary"] for run in runs)]
    values = {name: [run["summary"][name].get("value") for run in runs] for name in names}
    return {
        "matrix": [[spread(tables[:, i, j]) for j in range(tables.shape[2])] for i in range(tables.shape[1])],
        "learning_curve": [spread(curves[:, i]) for i in range(curves.shape[1])],
        "summary": {name: spread(found) for name, found in values.items() if None not in found},
    }


def spread(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """``{"mean", "sd", "ci95", "values"}`` of one figure over the runs; ``sd`` (of ``n - 1``) and ``ci95`` need two."""
    found = np.asarray(values, dtype=np.float64)
    mean, count = float(found.mean()), len(found)
    if count < 2:
        return {"mean": mean, "sd": None, "ci95": None, "values": found.tolist()}
    deviation = float(found.std(ddof=1))
    half = _T[min(count - 1, len(_T)) - 1] * deviation / count**0.5
    return {"mean": mean, "sd": deviation, "ci95": [mean - half, mean + half], "values": found.tolist()}


def seeds_text(result: Mapping[str, Any]) -> str:
    """The summary figures and the final scores of each task as text, a line each."""
    text = [f"{result['runs']} runs; mean, standard deviation, 95 % t interval over runs"]
    for metric, found in result["metrics"].items():
        finals = {f"final, {task}": cell for task, cell in zip(result["tasks"], found["matrix"][-1], strict=True)}
        named = {**finals, **{title_of(name): cell for name, cell in found["summary"].items()}}
        lines = [[metric, "mean", "sd", "interval"]]
        for name, cell in named.items():
            deviation = "-" if cell["sd"] is None else f"{cell['sd']:.3f}"
            lines.append([f"  {name}", f"{cell['mean']:.3f}", deviation, span(cell["ci95"])])
        text += ["", *columns(lines)]
    return "\n".join(text)


if __name__ == "__main__":
    run_cli(main)
