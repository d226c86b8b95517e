"""Whole cells of a benchmark, with the real commands, and what is left of them where a run is killed."""

from __future__ import annotations

import json

import pytest
from tiny_world import run_main, write_sequence

from llava.continual.benchmark import Benchmark
from llava.eval import benchmark_table
from scripts import run_cells


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


@pytest.fixture
def file(world, tmp_path, monkeypatch):
    """A benchmark of three short cells."""
    sequence = write_sequence(tmp_path, ("abd", "chest"), rows=6)
    short = {"keys": {"rank": 2, "top_k": 2, "text_encoder": "base"}, "train": {"save_steps": 1}}
    values = {**json.loads(sequence.read_text()), **short, "metrics": ["exact_match", "closed_accuracy"]}
    sequence.write_text(json.dumps(values), encoding="utf-8")
    flags = {"flags": ["--max_steps", "2"]}
    runs = [{"method": "joint", **flags}, {"method": "zero_shot"}, {"method": "retrieval", **flags, "seeds": [1]}]
    path = tmp_path / "short.json"
    path.write_text(json.dumps({"sequence": str(sequence), "seeds": [0], "runs": runs}), encoding="utf-8")
    monkeypatch.setenv("BASE_MODEL", str(world.base))
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path / "one"))
    return path


def results(file):
    """Bytes of everything that a reader takes from a benchmark."""
    benchmark = Benchmark.read(file)
    names = ("accuracy_matrix.json", "answers.jsonl", "rows.jsonl", "slots.pth")
    found = [path for path in benchmark.root.rglob("*") if path.name in names]
    return {str(path.relative_to(benchmark.root)): path.read_bytes() for path in found}


def killing(monkeypatch, after):
    """From now on the run is killed once it has done ``after`` further steps."""
    count = iter(range(after))
    call, main = run_cells.call, run_cells.evaluate_sequence.main

    def step(do):
        def done(*words):
            do(*words)
            if next(count, None) is None:
                raise Killed

        return done

    monkeypatch.setattr(run_cells, "call", step(call))
    monkeypatch.setattr(run_cells.evaluate_sequence, "main", step(main))


@pytest.mark.slow
def test_a_benchmark_is_run_skipped_and_told(file, monkeypatch, capsys):
    run_main(run_cells.main, file)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[benchmark]")]
    assert len(lines) == 4 and lines[0].startswith("[benchmark] 0 of 3 cells, 0 min 00 s so far; now joint/abd_chest")
    assert "2 of 3 cells" in lines[2] and " left; now retrieval/abd_chest/seed-1" in lines[2]
    made = results(file)
    monkeypatch.setattr(run_cells, "call", lambda *words: pytest.fail("nothing is left to do"))
    run_main(run_cells.main, file)
    assert results(file) == made
    zero_shot = {path: data for path, data in made.items() if path.endswith("zero-shot/answers.jsonl")}
    assert len(zero_shot) == 4 and len(set(zero_shot.values())) == 1
    run_main(benchmark_table.main, file)
    told = json.loads((Benchmark.read(file).root / "table.json").read_text())
    assert (told["done"], [entry["run"] for entry in told["runs"]]) == (3, ["joint", "zero_shot", "retrieval"])
    joint, _, retrieval = (
        entry["metrics"]["exact_match"]["summary"]["average_final"]["mean"] for entry in told["runs"]
    )
    gaps = told["runs"][2]["gaps"]
    assert gaps["joint"]["exact_match"] == pytest.approx(joint - retrieval) and gaps["individual"] is None
    assert "| retrieval | abd, chest | 1 |" in capsys.readouterr().out


@pytest.mark.thorough
def test_a_benchmark_that_is_killed_again_and_again_ends_with_the_same_bytes(file, tmp_path, monkeypatch):
    run_main(run_cells.main, file)
    wanted = results(file)
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path / "two"))
    kills = 0
    for after in sorted([*range(30), *range(30)]):
        with monkeypatch.context() as patched:
            killing(patched, after)
            try:
                run_main(run_cells.main, file)
                break
            except Killed:
                kills += 1
    assert kills >= 10 and results(file) == wanted
