"""A benchmark's file: its cells, their task sequences, and what counts as done."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tiny_world import TASKS

from llava.continual.benchmark import MATRIX, Benchmark, spread
from llava.data.rows import read_rows
from llava.utils import UserError


@pytest.fixture
def read(world, tmp_path):
    """Writes a benchmark's file and reads it."""

    def make(environ=None, **values):
        file = tmp_path / "tiny.json"
        file.write_text(json.dumps({"sequence": str(world.sequence), **values}), encoding="utf-8")
        return Benchmark.read(file, {"OUTPUT_DIR": str(tmp_path), "BASE_MODEL": str(world.base), **(environ or {})})

    return make


BACK = list(reversed(TASKS))


def test_cells_are_runs_by_orders_seeds_and_rates(read):
    runs = [{"method": "retrieval", "orders": "all"}, {"method": "sequential", "learning_rate": [1e-3, 0.02]}]
    runs += [{"name": "strong", "method": "ewc", "flags": ["--ewc_lambda", "9"], "seeds": [7]}]
    found = read(orders=[list(TASKS), BACK], seeds=[0, 1], runs=runs)
    front, back = "_".join(TASKS), "_".join(BACK)
    assert [str(cell.place) for cell in found.cells] == [
        *(f"retrieval/{order}/seed-{seed}" for order in (front, back) for seed in (0, 1)),
        *(f"sequential-{rate}/{front}/seed-{seed}" for seed in (0, 1) for rate in ("0.001", "0.02")),
        f"strong/{front}/seed-7",
    ]
    assert found.cells[-1].flags == ("--ewc_lambda", "9") and found.cells[-1].method == "ewc"
    assert found.cells[5].train == {"seed": 0, "learning_rate": 0.02}


def test_a_cell_is_a_task_sequence_with_its_order_seed_and_rows(read, world):
    found = read(orders=[BACK], rows=5, test_rows=2, runs=[{"method": "ewc", "train": {"epochs": 3}}], seeds=[4])
    (cell,) = found.cells
    sequence = found.prepare(cell)
    assert sequence.task_names == BACK and sequence.name == found.sequence.name
    assert (sequence.train.seed, sequence.train.epochs) == (4, 3.0)
    assert [len(read_rows(file)) for task in sequence.tasks for file in task.files] == [5] * 4
    assert [row.domain for row in read_rows(sequence.test)] == [task for task in TASKS for _ in range(2)]
    whole = replace(found, values={**found.values, "rows": None, "test_rows": None})
    assert whole.prepare(cell).task("abd").files == found.sequence.task("abd").files


def test_rows_are_spread_evenly():
    assert spread(10, 4) == [0, 2, 5, 7] and spread(3, 5) == [0, 1, 2]


def test_a_cell_is_done_as_long_as_nothing_that_decides_it_changes(read):
    found = read(runs=[{"method": "ewc"}, {"method": "lwf"}])
    first, second = found.cells
    identity = found.identity(first, found.prepare(first))
    assert identity == found.identity(first, found.prepare(first)) != found.identity(second, found.prepare(second))
    assert not found.done(first, identity) and found.time_left(found.cells) is None
    matrix = found.matrix(first)
    assert matrix == found.folder(first) / "eval" / f"{found.sequence.name}-ewc" / MATRIX
    matrix.parent.mkdir(parents=True)
    matrix.write_text("{}")
    found.finish(first, identity, 30.0)
    assert found.done(first, identity) and not found.done(first, "another")
    assert found.time_left(found.cells) == 60.0 and found.time_left([second], workers=2) == 15.0
    matrix.write_text("[]")
    assert not found.done(first, identity)


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"runs": [{"method": "ewc", "seed": [1]}]},
            "benchmark tiny: run 1: unknown field 'seed'; did you mean 'seeds'",
        ),
        ({"runs": [{"method": "ewc"}], "sedes": [1]}, "unknown field 'sedes'; did you mean 'seeds'"),
        ({"runs": {}}, "runs is {}"),
        ({"runs": [{"method": "ewc"}], "orders": [["abd"]]}, r"order \['abd'\] has other tasks than"),
        ({"runs": [{"method": "ewc"}, {"method": "ewc", "train": {"epochs": 2}}]}, "two runs would make ewc/.*seed-0"),
        ({"runs": [{"method": "ewc"}], "environ": {"SEED": "3"}}, "SEED is set, but a benchmark's seeds stand in"),
    ],
)
def test_what_is_wrong_is_one_line(read, values, message):
    with pytest.raises(UserError, match=message):
        read(**values)


def test_those_that_ship_name_methods_and_tasks_that_there_are(world, tmp_path):
    from pathlib import Path

    from llava.continual.methods import METHODS

    files = sorted((Path(__file__).resolve().parents[2] / "scripts" / "benchmarks").glob("*.json"))
    assert [file.stem for file in files] == ["phantom", "vqa-rad"]
    for file in files:
        found = Benchmark.read(file, {"OUTPUT_DIR": str(tmp_path), "BASE_MODEL": str(world.base)})
        assert {cell.method for cell in found.cells} == {one.name for one in METHODS if one.needs_keys}
