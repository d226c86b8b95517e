"""The table of a benchmark: each run in each order, over its seeds, from the cells that are done.

    python -m llava.eval.benchmark_table scripts/benchmarks/phantom.json

Writes ``table.json`` into the benchmark's folder, with mean, standard deviation and interval over seeds of every figure
(``llava.eval.over_seeds``), and prints the first metric as a table. Gaps are to the runs called ``joint`` and
``individual`` in the same order: the mean of their average final score minus this one's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava.cli import flag, parse, word
from llava.continual.benchmark import Benchmark, Cell
from llava.continual.benchmark_marks import Marks
from llava.eval.over_seeds import over_seeds, read_matrix
from llava.files import atomic_write
from llava.utils import run_cli

REFERENCES = ("joint", "individual")
SHOWN = {"average_final": "average final", "forgetting": "forgetting", "bwt": "BWT", "fwt": "FWT"}


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    benchmark: str = word("file of the benchmark")
    output_json: str | None = flag(None, "file to write (default: table.json in the benchmark's folder)")


def main(argv: Sequence[str] | None = None) -> None:
    """Read, write and print."""
    arguments = parse(Arguments, argv, __doc__)
    benchmark = Benchmark.read(arguments.benchmark)
    result = table(benchmark)
    target = arguments.output_json or benchmark.root / "table.json"
    with atomic_write(target) as stream:
        json.dump(result, stream, indent=1, allow_nan=False)
        stream.write("\n")
    print(markdown(result))
    print(f"wrote {target}")


def table(benchmark: Benchmark) -> dict[str, Any]:
    """``{"benchmark", "cells", "done", "runs": [{"run", "method", "order", "seeds", "metrics", "gaps"}]}``."""
    groups: dict[tuple[str, tuple[str, ...]], list[Cell]] = {}
    marks = Marks(benchmark)
    cells = [cell for cell in benchmark.cells if not cell.trial]
    done = [cell for cell in cells if marks.whole(cell)]
    for cell in done:
        groups.setdefault((cell.run, cell.order), []).append(cell)
    runs = []
    for (run, order), mine in groups.items():
        found = over_seeds([read_matrix(benchmark.matrix(cell).parent) for cell in mine])
        seeds = [cell.seed for cell in mine]
        told = {"run": run, "method": mine[0].method, "order": list(order), "seeds": seeds}
        runs.append({**told, "metrics": found["metrics"]})
    for entry in runs:
        entry["gaps"] = {name: gaps(entry, runs, name) for name in REFERENCES if name != entry["run"]}
    return {"benchmark": benchmark.name, "cells": len(cells), "done": len(done), "runs": runs}


def gaps(entry: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], name: str) -> dict[str, float] | None:
    """By metric, how far the run ``name`` in the same order is above this one; ``None`` where it is not there."""
    reference = next((one for one in runs if one["run"] == name and one["order"] == entry["order"]), None)
    if reference is None:
        return None
    both = [metric for metric in entry["metrics"] if metric in reference["metrics"]]
    return {metric: final(reference, metric) - final(entry, metric) for metric in both}


def final(entry: Mapping[str, Any], metric: str) -> float:
    """The mean average final score."""
    value: float = entry["metrics"][metric]["summary"]["average_final"]["mean"]
    return value


def markdown(result: Mapping[str, Any]) -> str:
    """The first metric of all runs: means over seeds, with the standard deviation where there are several."""
    metric = next((name for entry in result["runs"] for name in entry["metrics"]), "")
    head = ["run", "order", "seeds", *SHOWN.values(), *(f"gap to {name}" for name in REFERENCES)]
    lines = [head, ["---"] * len(head)]
    for entry in result["runs"]:
        summary = entry["metrics"].get(metric, {}).get("summary", {})
        values = [cell_text(summary.get(name)) for name in SHOWN]
        values += [gap_text((entry["gaps"].get(name) or {}).get(metric)) for name in REFERENCES]
        lines.append([entry["run"], ", ".join(entry["order"]), str(len(entry["seeds"])), *values])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{metric}, {result['done']} of {result['cells']} cells\n\n{text}\n"


def cell_text(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['mean']:.3f}" + ("" if found["sd"] is None else f" ± {found['sd']:.3f}")


def gap_text(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"


if __name__ == "__main__":
    run_cli(main)
