"""The table of a benchmark: each run in each order, over its seeds, from the cells that are done.

    python -m llava.eval.benchmark_table scripts/benchmarks/phantom.json
    python -m llava.eval.benchmark_table scripts/benchmarks/phantom.json --result docs/results/phantom.json \\
        --machine "two CPU cores"

Writes ``table.json`` into the benchmark's folder, with mean, standard deviation and interval over seeds of every figure
(``llava.eval.over_seeds``), and prints the first metric as a table. Gaps are to the runs called ``joint`` and
``individual`` in the same order, and to the same stages where they are also asked with the task given: their average
final score minus this one's, over the seeds that both have. ``--result`` writes the small file that is published: the
first metric's figures, and what they were made of (``llava.eval.result_pages``).
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava.cli import flag, parse, word
from llava.continual.benchmark import Benchmark, Cell, checksums, files_of
from llava.continual.benchmark_marks import Marks
from llava.continual.places import Places
from llava.eval.eval_video_qa import SCORES_NAME, package_version
from llava.eval.generation import ORACLE
from llava.eval.metrics.base import OVERALL
from llava.eval.over_seeds import over_seeds, read_matrix, spread
from llava.eval.result_pages import FORMAT_VERSION, markdown
from llava.files import atomic_write
from llava.outside import read_object
from llava.utils import UserError, run_cli

TASK_GIVEN = "task_given"
REFERENCES = ("joint", "individual", TASK_GIVEN)
BASELINES = {"majority": "majority answer", "nearest": "nearest question's answer"}
PACKAGES = ("llava", "torch", "transformers", "numpy")
ALSO = ("closed_accuracy", "open_recall")
"""Metrics that are published beside the first, where they are measured."""
DIGITS = 4


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    benchmark: str = word("file of the benchmark")
    output_json: str | None = flag(None, "file to write (default: table.json in the benchmark's folder)")
    result: str | None = flag(None, "also write the small file that is published")
    machine: str = flag("", "of that: what it ran on, in words")


def main(argv: Sequence[str] | None = None) -> None:
    """Read, write and print."""
    arguments = parse(Arguments, argv, __doc__)
    if arguments.result and not arguments.machine:
        raise UserError("--result wants --machine: say in a few words what the benchmark ran on")
    benchmark = Benchmark.read(arguments.benchmark)
    found = table(benchmark)
    write(arguments.output_json or benchmark.root / "table.json", found)
    small = result(benchmark, found, arguments.benchmark, arguments.machine)
    print(markdown(small))
    if arguments.result:
        write(arguments.result, small)


def write(target: str | Path, found: Mapping[str, Any]) -> None:
    """A JSON file, named on the terminal."""
    with atomic_write(target) as stream:
        json.dump(found, stream, indent=1, ensure_ascii=False, allow_nan=False)
        stream.write("\n")
    print(f"wrote {target}")


def table(benchmark: Benchmark) -> dict[str, Any]:
    """``{"benchmark", "cells", "done", "runs": [{"run", "method", "order", "seeds", "metrics", "gaps", ...}]}``."""
    groups: dict[tuple[str, tuple[str, ...]], list[Cell]] = {}
    marks = Marks(benchmark)
    cells = [cell for cell in benchmark.cells if not cell.trial]
    done = list(filter(marks.fresh, cells))
    if stale := sum(map(marks.whole, cells)) - len(done):
        print(
            f"note: {stale} more were made with other rates, settings, data or another version, or their data are gone"
        )
    for cell in done:
        groups.setdefault((cell.run, cell.order), []).append(cell)
    runs: list[dict[str, Any]] = []
    matrices = {cell.place: read_matrix(benchmark.matrix(cell).parent) for cell in done}
    if len({matrix["provenance"].get("tokenizer") for matrix in matrices.values()}) > 1:
        print(
            "note: some cells were scored without Java, which moves BLEU, ROUGE and CIDEr: run again where there is one"
        )
    for (run, order), mine in groups.items():
        first, found = mine[0], over_seeds([matrices[cell.place] for cell in mine])
        runs.append(
            {
                "run": run,
                "method": first.method,
                "order": list(order),
                "seeds": [cell.seed for cell in mine],
                TASK_GIVEN: first.route == ORACLE or first.method == "individual",
                "rates": tried(benchmark, first),
                "overall": overall(benchmark, mine),
                "pictures": pictures(benchmark, mine),
                "metrics": found["metrics"],
            }
        )
    stages = [[benchmark.training(cell) for cell in mine] for mine in groups.values()]
    for entry, own in zip(runs, stages, strict=True):
        shared = [any(stage in own for stage in theirs) for theirs in stages]
        beside = [pair for pair in zip(runs, shared, strict=True) if pair[0] is not entry]
        found = {name: reference(entry, beside, name) for name in REFERENCES if name != entry["run"]}
        entry["gaps"] = {name: None if one is None else gaps(entry, one) for name, one in found.items()}
    return {"benchmark": benchmark.name, "cells": len(cells), "done": len(done), "runs": runs}


def tried(benchmark: Benchmark, cell: Cell) -> dict[str, float]:
    """What each learning rate reached on validation rows; empty where none was tried."""
    return {f"{trial.rates[0]:g}": benchmark.score(trial) for trial in benchmark.trials(cell)}


def overall(benchmark: Benchmark, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """What the last stage reaches over all questions, whatever their task, by metric, over the cells' seeds."""
    found = [scores.get("groups", {}).get(OVERALL, {}).get("figures", {}) for scores in last_scores(benchmark, cells)]
    values = {name: [figures.get(name, {}).get("value") for figures in found] for name in found[0]}
    return {name: spread(mine) for name, mine in values.items() if None not in mine}


def last_scores(benchmark: Benchmark, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The scores of each cell's last stage; empty where they are not there."""
    files = [matrix.parent / stage.name / SCORES_NAME for matrix, stage in (last(benchmark, cell) for cell in cells)]
    return [read_object(file) if file.is_file() else {} for file in files]


def pictures(benchmark: Benchmark, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """What the pictures contribute to the last stage, by kind shown in their place: ``changed``, the share of
    answers that change, and by metric the drop, over the cells' seeds. With one seed the interval is over questions."""
    found = [scores.get("pictures") or {} for scores in last_scores(benchmark, cells)]
    told = {}
    for kind in [kind for kind in found[0] if all(kind in one for one in found)]:
        groups = [one[kind]["groups"][OVERALL] for one in found]
        parts = {"changed": [(group["changed"]["value"], group["changed"]["ci95"]) for group in groups]}
        for metric in groups[0]["figures"]:
            figures = [group["figures"].get(metric) for group in groups]
            if all(figures):
                parts[metric] = [(figure["drop"], figure["ci95"]) for figure in figures]
        told[kind] = {name: over_cells(values) for name, values in parts.items()}
    return told


def last(benchmark: Benchmark, cell: Cell) -> tuple[Path, Path]:
    """A cell's accuracy matrix and its last stage."""
    names = replace(benchmark.sequence, tasks=tuple(map(benchmark.sequence.task, cell.order)))
    return benchmark.matrix(cell), Places(benchmark.folder(cell), names, cell.method).stages[-1]


def over_cells(values: Sequence[tuple[float, list[float] | None]]) -> dict[str, Any]:
    """A figure over some cells; of one cell with its own interval."""
    found = spread([value for value, _ in values])
    return {**found, "ci95": values[0][1]} if len(values) == 1 else found


def reference(
    entry: Mapping[str, Any], beside: Sequence[tuple[dict[str, Any], bool]], name: str
) -> dict[str, Any] | None:
    """The run that a gap is to, in the same order; ``None`` where it is not there.

    Args:
        beside: the other runs, each with whether it has stages of this one.
    """
    for one, same_stages in beside:
        told = same_stages and one[TASK_GIVEN] and not entry[TASK_GIVEN]
        if one["order"] == entry["order"] and (told if name == TASK_GIVEN else one["run"] == name):
            return one
    return None


def gaps(entry: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By metric, how far another run's average final score is above this one's: over the seeds that both have; where
    there is none the difference of the means."""
    found = {}
    for metric in entry["metrics"]:
        if metric in other["metrics"]:
            mine, theirs = (one["metrics"][metric]["summary"]["average_final"] for one in (entry, other))
            of_seeds = dict(zip(other["seeds"], theirs["values"], strict=True))
            pairs = [(of_seeds.get(seed), value) for seed, value in zip(entry["seeds"], mine["values"], strict=True)]
            differences = [above - value for above, value in pairs if above is not None]
            apart = {"mean": theirs["mean"] - mine["mean"], "sd": None, "ci95": None, "values": []}
            found[metric] = spread(differences) if differences else apart
    return found


def result(benchmark: Benchmark, found: Mapping[str, Any], file: str, machine: str) -> dict[str, Any]:
    """The small file: what ran, on what, and the first metric's figures of ``table``."""
    sequence = benchmark.sequence
    files = files_of(sequence)
    metric = next((name for entry in found["runs"] for name in entry["metrics"]), "")
    return {
        "format_version": FORMAT_VERSION,
        "benchmark": benchmark.name,
        "command": f"bash scripts/run_benchmark.sh {file}",
        "machine": machine,
        "versions": {"python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}},
        "base": {"name": Path(benchmark.base).name, "content": benchmark.base_content},
        "data": dict(zip((Path(file).name for file in files), checksums(files), strict=True)),
        "settings": dict(benchmark.values),
        "cells": found["cells"],
        "done": found["done"],
        "metric": metric,
        "tasks": sequence.task_names,
        "baselines": baselines(benchmark, metric),
        "runs": [small(entry, metric) for entry in found["runs"] if metric in entry["metrics"]],
    }


def small(entry: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """One run's part of the small file."""
    found, names = entry["metrics"][metric], ("run", "method", "order", "seeds", TASK_GIVEN, "rates")
    return {
        **{name: entry[name] for name in names},
        "final": {task: rounded(cell["mean"]) for task, cell in zip(entry["order"], found["matrix"][-1], strict=True)},
        "summary": {name: figure(cell) for name, cell in found["summary"].items()},
        "overall": {name: figure(entry["overall"][name]) for name in (metric, *ALSO) if name in entry["overall"]},
        "pictures": {
            kind: {title: figure(by[name]) for title, name in (("changed", "changed"), ("drop", metric)) if name in by}
            for kind, by in entry["pictures"].items()
        },
        "gaps": {name: figure(by[metric]) for name, by in entry["gaps"].items() if by and metric in by},
    }


def figure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A figure over seeds, without the values that it was made of."""
    return {key: rounded(cell[key]) for key in ("mean", "sd", "ci95")}


def baselines(benchmark: Benchmark, metric: str) -> dict[str, dict[str, float]]:
    """What majority answer and nearest question reach on each task, as the evaluation of any cell found it."""
    marks = Marks(benchmark)
    cells = (cell for cell in benchmark.cells if not cell.trial and marks.fresh(cell))
    scores = next((path for cell in cells for path in benchmark.matrix(cell).parent.glob(f"*/{SCORES_NAME}")), None)
    if scores is None:
        return {}
    groups = read_object(scores)["groups"]
    found = {}
    for name, title in BASELINES.items():
        cells_of = {task: groups[task]["figures"].get(f"{name}_{metric}") for task in benchmark.sequence.task_names}
        if all(cell and cell["value"] is not None for cell in cells_of.values()):
            found[title] = {task: rounded(cell["value"]) for task, cell in cells_of.items()}
    return found


def rounded(value: Any) -> Any:
    """A number, or a list of them, to few digits; ``None`` stays."""
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return None if value is None else round(value, DIGITS)


if __name__ == "__main__":
    run_cli(main)
