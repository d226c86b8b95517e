"""A benchmark: methods, orders and seeds over one task sequence, in one file; what its cells are and where they lie.

``scripts/benchmarks/<name>.json``::

    {"sequence": "phantom", "rows": 200, "test_rows": 60,
     "orders": [["abd", "chest", "head"], ["chest", "head", "abd"]],
     "seeds": [0, 1, 2],
     "runs": [{"method": "retrieval", "orders": "all"},
              {"method": "sequential", "learning_rate": [3e-3, 1e-2], "seeds": [0]},
              {"name": "ewc-strong", "method": "ewc", "flags": ["--ewc_lambda", "1e4"], "train": {"epochs": 3}}]}

A run is a cell for each of its orders (the first, or ``"all"``), seeds and learning rates. ``rows`` of each task's
training files and ``test_rows`` of each domain, spread evenly, are used; left out, all are. ``train`` overrides the
sequence's block, ``flags`` are the method's own, ``route`` is the evaluation's. Under ``output/benchmarks/<name>``::

    <run>/<order>/seed-<n>/     a cell: sequence.json, its stages, eval/, and cell.json once it is whole
    keys/<order>/seed-<n>/      what cells of one order and seed share
    cache, zero-shot, data      what all share
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import llava
from llava.checkpoints.checkpoint import Checkpoint
from llava.checkpoints.manifest import content_of
from llava.continual.places import Places
from llava.continual.sequence import SEQUENCE_FOLDER, TaskSequence, load_sequence
from llava.continual.settings import refuse_unknown
from llava.data.rows import Row, read_rows, write_jsonl
from llava.files import atomic_write, file_sha256
from llava.utils import UserError, require_file

DONE = "cell.json"
MATRIX = "accuracy_matrix.json"
_FIELDS = {"sequence": str, "rows": int, "test_rows": int, "orders": list, "seeds": list, "runs": list}
_SET_HERE = {"SEED": "seeds", "LEARNING_RATE": "learning_rate"}


@dataclass(frozen=True)
class RunOf:
    """One entry of ``runs``, as the file has it."""

    method: str
    name: str = ""
    orders: str = "first"
    seeds: tuple[int, ...] = ()
    learning_rate: tuple[float, ...] = ()
    train: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    route: str = ""


@dataclass(frozen=True)
class Cell:
    """One method, order and seed. ``run``: its run's name, with the learning rate where several are tried."""

    run: str
    method: str
    order: tuple[str, ...]
    seed: int
    train: Mapping[str, Any]
    flags: tuple[str, ...]
    route: str

    @property
    def place(self) -> Path:
        """Where it lies in the benchmark's folder; also its name."""
        return Path(self.run, *self.shared.parts)

    @property
    def shared(self) -> Path:
        """The part that cells with the same keys have in common."""
        return Path("_".join(self.order), f"seed-{self.seed}")


@dataclass(frozen=True)
class Benchmark:
    """What a file asks for, under ``root``, over ``base``."""

    name: str
    root: Path
    base: str
    values: Mapping[str, Any]
    raw: Mapping[str, Any]
    sequence: TaskSequence

    @classmethod
    def read(cls, path: str | Path, environ: Mapping[str, str] | None = None) -> Benchmark:
        """The benchmark of a file.

        Raises:
            UserError: no such file, an unknown field, an order of other tasks, two cells of one name, a variable that
                the file decides, no base model.
        """
        environ = os.environ if environ is None else environ
        file = require_file(path, "benchmark", "write one like those in scripts/benchmarks")
        for variable, name in _SET_HERE.items():
            if environ.get(variable):
                raise UserError(f"{variable} is set, but a benchmark's {name} stand in {file}; unset it")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file}: broken JSON ({error})") from error
        refuse_unknown(values, _FIELDS, str(file))
        for name, kind in _FIELDS.items():
            if type(values.get(name)) is not kind and (name in values or name in ("sequence", "runs")):
                raise UserError(f"{file}: {name} is {values.get(name)!r}; see the other files in scripts/benchmarks")
        source = Path(values["sequence"])
        source = source if source.suffix == ".json" else SEQUENCE_FOLDER / f"{source}.json"
        sequence = load_sequence(source, environ)
        places = Places.of(sequence, environ=environ)
        raw = json.loads(source.read_text(encoding="utf-8"))
        root = places.root / "benchmarks" / file.stem
        made = cls(file.stem, root, places.base_model(), values, raw, sequence)
        names = [cell.place for cell in made.cells]
        if twice := sorted(str(name) for name in set(names) if names.count(name) > 1):
            raise UserError(f"{file}: two runs would make {twice[0]}; give one of them a name")
        return made

    @cached_property
    def cells(self) -> list[Cell]:
        """In the order of the file: run by run, so that what is done first can be compared first."""
        tasks = self.sequence.task_names
        orders = [tuple(order) for order in self.values.get("orders", [tasks])]
        for order in orders:
            if sorted(order) != sorted(tasks):
                raise UserError(f"benchmark {self.name}: order {list(order)} has other tasks than {tasks}")
        found = []
        for number, entry in enumerate(self.values["runs"], start=1):
            refuse_unknown(entry, [one.name for one in fields(RunOf)], f"benchmark {self.name}: run {number}")
            run = RunOf(**entry)
            rates = run.learning_rate or (None,)
            for order in orders if run.orders == "all" else orders[:1]:
                for seed in run.seeds or self.values.get("seeds", [0]):
                    for rate in rates:
                        name = (run.name or run.method) + (f"-{rate:g}" if len(rates) > 1 else "")
                        train = {**run.train, "seed": seed, **({} if rate is None else {"learning_rate": rate})}
                        found.append(Cell(name, run.method, order, seed, train, tuple(run.flags), run.route))
        return found

    def folder(self, cell: Cell) -> Path:
        """Where a cell's files lie."""
        return self.root / cell.place

    def key_folder(self, cell: Cell) -> Path:
        """Keys of the cell's order and seed."""
        return self.root / "keys" / cell.shared

    @property
    def query_cache(self) -> Path:
        return self.root / "cache"

    @property
    def zero_shot(self) -> Path:
        """Answers of the base, which no cell makes twice."""
        return self.root / "zero-shot"

    def prepare(self, cell: Cell) -> TaskSequence:
        """Write the cell's task sequence, and the rows that all cells use where these are not all; the sequence."""
        rows, tests = self.values.get("rows"), self.values.get("test_rows")
        tasks = {task.name: [self._some(file, rows) for file in task.files] for task in self.sequence.tasks}
        path = self.folder(cell) / "sequence.json"
        values = {
            **self.raw,
            "tasks": [{"name": name, "train": tasks[name]} for name in cell.order],
            "test": self._some(self.sequence.test, tests),
            "train": {**self.raw.get("train", {}), **cell.train},
        }
        with atomic_write(path) as stream:
            json.dump(values, stream, indent=1)
        return load_sequence(path)

    def _some(self, file: str, count: int | None) -> str:
        """The file, or one with so many rows of each domain."""
        if count is None:
            return file
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in read_rows(file):
            groups.setdefault(row.domains, []).append(row)
        kept = [rows[place] for rows in groups.values() for place in spread(len(rows), count)]
        target = self.root / "data" / f"{Path(file).stem}.jsonl"
        write_jsonl(target, [row.raw for row in kept])
        return str(target)

    def identity(self, cell: Cell, sequence: TaskSequence) -> str:
        """A checksum over what decides the cell's results, wherever its files lie; pictures are not looked at."""
        files = [*(file for task in sequence.tasks for file in task.files), sequence.test]
        settings = sequence.slots_per_task, sequence.answer_suffix, sequence.answer_style, sequence.metrics
        parts = {
            "version": llava.__version__,
            "cell": [cell.method, cell.flags, cell.route],
            "sequence": [sequence.name, sequence.task_names, settings, vars(sequence.keys), vars(sequence.train)],
            "files": [file_sha256(file) for file in files],
            "base": self.base_content,
        }
        return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def base_content(self) -> str:
        """A checksum of the base's files."""
        return content_of(Checkpoint.open(self.base).manifest)

    def done(self, cell: Cell, identity: str) -> bool:
        """Whether the cell is there, whole, as it would be made now."""
        return self.whole(cell) and self._mark(cell)["identity"] == identity

    def whole(self, cell: Cell) -> bool:
        """Whether the cell is there, with the results that it was finished with."""
        found, matrix = self._mark(cell), self.matrix(cell)
        return bool(found) and matrix.is_file() and found["matrix"] == file_sha256(matrix)

    def finish(self, cell: Cell, identity: str, seconds: float) -> None:
        """Mark a cell as whole, with what it took."""
        found = {"identity": identity, "matrix": file_sha256(self.matrix(cell)), "seconds": round(seconds, 1)}
        with atomic_write(self.folder(cell) / DONE) as stream:
            json.dump(found, stream)

    def matrix(self, cell: Cell) -> Path:
        """The cell's accuracy matrix."""
        places = Places(self.folder(cell), self.sequence, cell.method)
        return places.evaluation(cell.route or None) / MATRIX

    def time_left(self, todo: Sequence[Cell], workers: int = 1) -> float | None:
        """Seconds that cells will take, by those of the same run that are done, else by any; ``None`` before one is."""
        took = [(cell.run, self._mark(cell).get("seconds")) for cell in self.cells]
        known = [(run, seconds) for run, seconds in took if seconds is not None]
        if not known:
            return None

        def mean(run: str) -> float:
            mine = [seconds for name, seconds in known if name == run] or [seconds for _, seconds in known]
            return float(sum(mine)) / len(mine)

        return sum(mean(cell.run) for cell in todo) / workers

    def _mark(self, cell: Cell) -> dict[str, Any]:
        path = self.folder(cell) / DONE
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found


def spread(total: int, count: int) -> list[int]:
    """``count`` places spread evenly over ``total``; all where there are not as many."""
    return [place * total // count for place in range(count)] if count < total else list(range(total))
