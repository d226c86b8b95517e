"""A benchmark's file: its cells, their task sequences, and what counts as done."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_world import TASKS

from llava.continual.benchmark import MATRIX, Benchmark, spread
from llava.continual.benchmark_marks import Marks
from llava.continual.methods import METHODS
from llava.data.rows import read_rows, write_jsonl
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
    runs += [{"name": "strong", "method": "ewc", "flags": ["--ewc_lambda", "9"], "seeds": [7], "learning_rate": [0.5]}]
    found = read(orders=[list(TASKS), BACK], seeds=[0, 1], runs=runs, validation=0.3)
    front, back = "_".join(TASKS), "_".join(BACK)
    assert [str(cell.place) for cell in found.cells] == [
        *(f"retrieval/{order}/seed-{seed}" for order in (front, back) for seed in (0, 1)),
        *(f"trials/sequential-{rate}/{front}/seed-0" for rate in ("0.001", "0.02")),
        *(f"sequential/{front}/seed-{seed}" for seed in (0, 1)),
        f"strong/{front}/seed-7",
    ]
    assert found.cells[-1].flags == ("--ewc_lambda", "9") and found.cells[-1].method == "ewc"
    assert found.rate(found.cells[-1]) == 0.5 and found.rate(found.cells[0]) is None
    assert found.trials(found.cells[6]) == found.cells[4:6] and found.trials(found.cells[0]) == []


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


TRIED = [{"method": "sequential", "learning_rate": [1e-3, 1e-2], "seeds": [3]}]


def test_a_trial_is_tested_on_pictures_that_it_does_not_train_on(read):
    found = read(runs=TRIED, validation=0.34)
    trial, cell = found.cells[0], found.cells[-1]
    sequence = found.prepare(trial)
    assert (sequence.train.learning_rate, sequence.train.seed) == (1e-3, 3)
    for task in sequence.tasks:
        rows = {row.question: row.image for file in found.sequence.task(task.name).files for row in read_rows(file)}
        kept = {row.question: row.image for file in task.files for row in read_rows(file)}
        out = {row.question: row.image for row in read_rows(sequence.test) if row.domain == task.name}
        assert {**kept, **out} == rows and len(set(out.values())) == 2 and not set(out.values()) & set(kept.values())
    assert found.key_folder(trial) != found.key_folder(cell)


def test_validation_rows_may_stand_in_a_file(read, world):
    found = read(runs=TRIED, validation=str(world.folder / "test.jsonl"), test_rows=1)
    trial, cell = found.cells[0], found.cells[-1]
    sequence = found.prepare(trial)
    assert [task.files for task in sequence.tasks] == [task.files for task in found.sequence.tasks]
    assert len(read_rows(sequence.test)) == len(TASKS) and found.key_folder(trial) == found.key_folder(cell)


def test_a_trial_does_not_make_the_keys_of_the_cells_anew(read, world, tmp_path):
    """They are trained on the same rows and tested on others: a process that made them anew would take them away from
    those that train with them."""
    rows = read_rows(world.folder / "test.jsonl")
    write_jsonl(tmp_path / "validation.jsonl", [rows[0].raw])
    found = read(runs=TRIED, validation=str(tmp_path / "validation.jsonl"), rows=1)
    trial, cell = found.cells[0], replace(found.cells[-1], rates=())
    assert found.key_folder(trial) == found.key_folder(cell)
    assert found.key_identity(found.prepare(trial)) == found.key_identity(found.prepare(cell))


@pytest.mark.parametrize("scores, best", [((0.5, 0.6), 1e-2), ((0.6, 0.5), 1e-3), ((0.5, 0.5), 1e-3)])
def test_the_best_rate_is_taken_and_of_equal_ones_the_smallest(read, scores, best):
    found = read(runs=TRIED, validation=0.34)
    *trials, cell = found.cells
    assert Marks(found).blocked(cell)
    for trial, value in zip(trials, scores, strict=True):
        path = found.matrix(trial)
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"metrics": {"any": {"summary": {"average_final": {"value": value}}}}}))
        Marks(found).finish(trial, "identity", 1.0)
    assert found.rate(cell) == best and not Marks(found).blocked(cell)


def test_a_run_with_keys_of_its_own_has_a_folder_of_them(read):
    found = read(runs=[{"method": "retrieval"}, {"name": "wide", "method": "retrieval", "keys": {"rank": 5}}])
    plain, wide = found.cells
    sequences = [found.prepare(cell) for cell in found.cells]
    assert [sequence.keys.rank for sequence in sequences] == [found.sequence.keys.rank, 5]
    assert found.key_folder(plain) != found.key_folder(wide) and found.training(plain) != found.training(wide)
    assert found.identity(plain, sequences[0]) != found.identity(wide, sequences[1])


def test_files_of_the_same_names_lie_in_another_folder(read, world, tmp_path):
    other = shutil.copytree(world.folder, tmp_path / "other", ignore=shutil.ignore_patterns("images"))
    found = read(runs=[{"method": "retrieval"}], data=str(other))
    sequence = found.prepare(found.cells[0])
    wanted = [str(other / Path(file).name) for task in found.sequence.tasks for file in task.files]
    assert [file for task in sequence.tasks for file in task.files] == wanted
    assert sequence.test == str(other / "test.jsonl") and sequence.image_folder == found.sequence.image_folder


def test_rows_are_spread_evenly():
    assert spread(10, 4) == [0, 2, 5, 7] and spread(3, 5) == [0, 1, 2]


def test_a_cell_is_done_as_long_as_nothing_that_decides_it_changes(read):
    found = read(runs=[{"method": "ewc"}, {"method": "lwf"}])
    first, second = found.cells
    marks, identity = Marks(found), found.identity(first, found.prepare(first))
    assert identity == found.identity(first, found.prepare(first)) != found.identity(second, found.prepare(second))
    assert not marks.done(first, identity) and marks.time_left(found.cells) is None
    matrix = found.matrix(first)
    assert matrix == found.folder(first) / "eval" / f"{found.sequence.name}-ewc" / MATRIX
    matrix.parent.mkdir(parents=True)
    matrix.write_text("{}")
    marks.finish(first, identity, 30.0)
    assert marks.done(first, identity) and not marks.done(first, "another")
    assert marks.time_left(found.cells) == 60.0 and marks.time_left(found.cells, workers=2) == 30.0
    assert marks.time_left([second], workers=2) == 30.0  # one cell does not go faster
    matrix.write_text("[]")
    assert not marks.done(first, identity)


def test_another_picture_under_the_same_name_is_another_cell(read, world, tmp_path):
    found = read(runs=[{"method": "ewc"}])
    (cell,) = found.cells
    sequence = found.prepare(cell)
    folder = shutil.copytree(sequence.image_folder, tmp_path / "pictures")
    moved = replace(sequence, image_folder=str(folder))
    assert found.identity(cell, moved) == found.identity(cell, sequence)
    keys = found.key_identity(moved)
    picture = next(iter(sorted(folder.iterdir())))
    picture.write_bytes(picture.read_bytes() + b" ")
    assert found.identity(cell, moved) != found.identity(cell, sequence) and found.key_identity(moved) != keys


def test_what_failed_counts_until_the_next_start(read):
    found = read(runs=[{"method": "ewc"}])
    (cell,) = found.cells
    assert Marks(found).failed(cell) is None
    Marks(found).fail(cell, "no space")
    assert Marks(found, since=time.time() - 100).failed(cell) == "no space"
    assert Marks(found, since=time.time() + 100).failed(cell) is None


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"runs": [{"method": "ewc", "seed": [1]}]},
            "tiny.json: run 1: unknown field 'seed'; did you mean 'seeds'",
        ),
        ({"runs": [{"method": "ewc"}], "sedes": [1]}, "unknown field 'sedes'; did you mean 'seeds'"),
        ({"runs": {}}, "runs is an object"),
        ({"runs": []}, r"runs is \[\]"),
        ({"runs": [{"method": "ewc", "learning_rate": [1e-3, -1]}]}, "run 1: learning_rate, entry 2 is -1; write a"),
        (
            {"runs": [{"method": "ewc", "learning_rate": [1, 2]}]},
            "run 1 tries learning rates; give a field 'validation",
        ),
        ({"runs": [{"method": "ewk"}]}, "unknown method 'ewk'"),
        ({"runs": [{"method": "ewc", "keys": {"rnak": 2}}]}, "run 1: keys: unknown field 'rnak'; did you mean 'rank'"),
        ({"runs": [{"orders": "all"}]}, "run 1: field 'method' is missing"),
        ({"runs": [{"method": "ewc"}], "seeds": [True]}, "seeds, entry 1 is True; write an integer"),
        ({"runs": [{"method": "ewc"}], "orders": [["abd"]]}, r"order \['abd'\] has other tasks than"),
        ({"runs": [{"method": "ewc"}, {"method": "ewc", "train": {"epochs": 2}}]}, "two runs would make ewc/.*seed-0"),
        ({"runs": [{"method": "ewc"}], "environ": {"SEED": "3"}}, "SEED is set, but a benchmark's seeds stand in"),
    ],
)
def test_what_is_wrong_is_one_line(read, values, message):
    with pytest.raises(UserError, match=message):
        read(**values)


def test_those_that_ship_name_methods_and_tasks_that_there_are(world, tmp_path):
    every = {one.name for one in METHODS if one.needs_keys}
    files = sorted((Path(__file__).resolve().parents[2] / "scripts" / "benchmarks").glob("*.json"))
    environ = {"OUTPUT_DIR": str(tmp_path), "BASE_MODEL": str(world.base)}
    found = {file.stem: {cell.method for cell in Benchmark.read(file, environ).cells} for file in files}
    slake = {"zero_shot", "retrieval", "sequential", "joint"}
    fewer = {"phantom-scope": {"zero_shot", "retrieval"}, "vqa-rad-unseen": slake}
    assert found == {"phantom": every, "slake": slake, "vqa-rad": every, **fewer}
