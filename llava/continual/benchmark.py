"""A benchmark: methods, orders and seeds over one task sequence, in one file; what its cells are and where they lie.

``scripts/benchmarks/<name>.json``::

    {"sequence": "phantom", "rows": 200, "test_rows": 60, "validation": "data/phantom/validation.jsonl",
     "orders": [["abd", "chest", "head"], ["chest", "head", "abd"]],
     "seeds": [0, 1, 2],
     "runs": [{"method": "retrieval", "orders": "all"},
              {"method": "sequential", "learning_rate": [3e-3, 1e-2]},
              {"name": "ewc-strong", "method": "ewc", "flags": ["--ewc_lambda", "1e4"], "train": {"epochs": 3}}]}

A run is a cell for each of its orders (the first, or ``"all"``) and seeds. Of several learning rates it takes the one
that is best on validation rows, by the sequence's first metric: each is tried once, with the first order and seed.
``validation`` is a file of rows, or a share of the training pictures, which the trials then do without. ``rows`` of
each task's training files and ``test_rows`` of each domain, spread evenly, are used; left out, all are. ``data`` is a
folder with files of the same names as the sequence's, in their stead. ``train`` and ``keys`` override the sequence's
blocks, ``flags`` are the method's own, ``route`` and ``pictures`` are the evaluation's.
``workers`` is how many processes share the cells (default: one a device). Cells that differ only in what they are asked
(route, pictures, a trial's rows where it trains on all pictures) have the stages of the first of them. Under
``output/benchmarks/<name>``::

    <run>/<order>/seed-<n>/          a cell: sequence.json, its stages, eval/, and cell.json once it is whole
    trials/<run>-<rate>/<order>/...  the same for a learning rate that is tried
    keys/<order>/seed-<n>/           what cells of one order and seed share; of a run with ``keys``, keys/<run>/...
    cache, zero-shot, data           what all share
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import llava
from llava.checkpoints.checkpoint import Checkpoint
from llava.checkpoints.manifest import content_of, manifest_of
from llava.continual.methods import METHODS
from llava.continual.places import Places
from llava.continual.sequence import SEQUENCE_FOLDER, TaskSequence, load_sequence, sequence_of
from llava.continual.settings import KeySettings, read_block
from llava.data.rows import Row, read_rows, write_jsonl
from llava.data.samples import pictures_checksum
from llava.files import atomic_write, file_sha256, values_sha256
from llava.folds import held_out
from llava.outside import read_object
from llava.schema import an_object, check_fields, list_of, number, whole, words
from llava.slots.encoders import OWN, chosen
from llava.utils import UserError

MATRIX, SEQUENCE = "accuracy_matrix.json", "sequence.json"
_NAME = words(empty=False)
_SEEDS = list_of(whole(0), empty=False)
_SCHEMA = {
    "sequence": _NAME,
    "data": _NAME,
    "rows": whole(1),
    "test_rows": whole(1),
    "validation": _NAME | number(above=0, most=0.5),
    "orders": list_of(list_of(_NAME, empty=False), empty=False),
    "seeds": _SEEDS,
    "workers": whole(1),
    "runs": list_of(an_object(), empty=False),
}
_RUN_SCHEMA = {
    "method": _NAME,
    "name": _NAME,
    "orders": words(("first", "all")),
    "seeds": _SEEDS,
    "learning_rate": list_of(number(above=0), empty=False),
    "train": an_object(),
    "keys": an_object(),
    "flags": list_of(words()),
    "route": words(),
    "pictures": list_of(_NAME),
}
_SET_HERE = {"SEED": "seeds", "LEARNING_RATE": "learning_rate"}


@dataclass(frozen=True)
class Cell:
    """One method, order and seed.

    Attributes:
        run: its run's name.
        rates: learning rates of the run; of several, the trials say which is taken.
        trial: whether it only tries the first of ``rates``, on validation rows.
    """

    run: str
    method: str
    order: tuple[str, ...]
    seed: int
    rates: tuple[float, ...] = ()
    train: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    route: str = ""
    pictures: tuple[str, ...] = ()
    trial: bool = False

    @property
    def place(self) -> Path:
        """Where it lies in the benchmark's folder; also its name."""
        if self.trial:
            return Path("trials", f"{self.run}-{self.rates[0]:g}", *self.shared.parts)
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
            UserError: no such file, a field that is unknown or of another type, no such method, an order of other
                tasks, two cells of one name, rates without validation rows, a variable that the file decides, no base
                model.
        """
        environ = os.environ if environ is None else environ
        file = Path(path)
        values = read_object(file, "benchmark", "write one like those in scripts/benchmarks")
        for variable, name in _SET_HERE.items():
            if environ.get(variable):
                raise UserError(f"{variable} is set, but a benchmark's {name} stand in {file}; unset it")
        check_fields(values, _SCHEMA, str(file), needed=("sequence", "runs"))
        for place, entry in enumerate(values["runs"], start=1):
            check_fields(entry, _RUN_SCHEMA, f"{file}: run {place}", needed=("method",))
            METHODS.get(entry["method"])  # refuses a name that is no method
            read_block(KeySettings, entry.get("keys") or {}, f"{file}: run {place}: keys")
            if len(entry.get("learning_rate") or ()) > 1 and values.get("validation") is None:
                raise UserError(f"{file}: run {place} tries learning rates; give a field 'validation' to choose by")
        source = Path(values["sequence"])
        source = source if source.suffix == ".json" else SEQUENCE_FOLDER / f"{source}.json"
        sequence = _with_files_of(values.get("data"), load_sequence(source, environ))
        places = Places.of(sequence, environ=environ)
        root = places.root / "benchmarks" / file.stem
        made = cls(file.stem, root, places.base_model(), values, read_object(source), sequence)
        names = [cell.place for cell in made.cells]
        if twice := sorted(str(name) for name in set(names) if names.count(name) > 1):
            raise UserError(f"{file}: two runs would make {twice[0]}; give one of them a name")
        return made

    @cached_property
    def cells(self) -> list[Cell]:
        """In the order of the file: run by run, its trials first, so that what is done first can be compared first."""
        tasks = self.sequence.task_names
        orders = [tuple(order) for order in self.values.get("orders") or [tasks]]
        for order in orders:
            if sorted(order) != sorted(tasks):
                raise UserError(f"benchmark {self.name}: order {list(order)} has other tasks than {tasks}")
        found: list[Cell] = []
        for entry in self.values["runs"]:
            values: dict[str, Any] = {key: tuple(of) if isinstance(of, list) else of for key, of in entry.items()}
            name, rates = values.pop("name", None) or entry["method"], values.pop("learning_rate", None) or ()
            seeds = values.pop("seeds", None) or self.values.get("seeds") or [0]
            mine = orders if values.pop("orders", None) == "all" else orders[:1]
            given = {field: value for field, value in values.items() if value is not None}
            cells = [Cell(name, order=order, seed=seed, rates=rates, **given) for order in mine for seed in seeds]
            if len(rates) > 1:
                tried = replace(cells[0], route="", pictures=(), trial=True)
                found += [replace(tried, rates=(rate,)) for rate in rates]
            found += cells
        return found

    def trials(self, cell: Cell) -> list[Cell]:
        """The cells that say which of its learning rates a cell takes; none where it has one, or is a trial."""
        if cell.trial or len(cell.rates) < 2:
            return []
        return [other for other in self.cells if other.trial and other.run == cell.run]

    def rate(self, cell: Cell) -> float | None:
        """The cell's learning rate, ``None``: the sequence's. Of several it is the best on validation rows, of equally
        good ones the smallest; their trials are whole."""
        if len(cell.rates) < 2 or cell.trial:
            return cell.rates[0] if cell.rates else None
        return max(self.trials(cell), key=lambda trial: (self.score(trial), -trial.rates[0])).rates[0]

    def training(self, cell: Cell) -> tuple[Any, ...]:
        """What decides the stages of a cell whose trials are whole; cells that share it are only asked otherwise."""
        settings = cell.method, cell.order, cell.seed, cell.flags, cell.train, cell.keys
        return *settings, self._fewer(cell), self.rate(cell)

    def score(self, cell: Cell) -> float:
        """The average final score of a cell by the sequence's first metric."""
        (_, found), *_ = read_object(self.matrix(cell))["metrics"].items()
        return float(found["summary"]["average_final"]["value"])

    def folder(self, cell: Cell) -> Path:
        """Where a cell's files lie."""
        return self.root / cell.place

    def key_folder(self, cell: Cell) -> Path:
        """Keys of the cell's order and seed; trials that do without the validation pictures have their own, and so have
        runs that override the sequence's ``keys``."""
        mine = (cell.run,) if cell.keys else ()
        return Path(self.root, "trials/keys" if self._fewer(cell) else "keys", *mine, cell.shared)

    def _fewer(self, cell: Cell) -> bool:
        """Whether a cell trains without the validation pictures."""
        return cell.trial and not isinstance(self.values["validation"], str)

    @property
    def query_cache(self) -> Path:
        return self.root / "cache"

    @property
    def zero_shot(self) -> Path:
        """Answers of the base, a folder for each run that gives them, which no cell makes twice."""
        return self.root / "zero-shot"

    def matrix(self, cell: Cell) -> Path:
        """The cell's accuracy matrix."""
        places = Places(self.folder(cell), self.sequence, cell.method)
        return places.evaluation(cell.route or None) / MATRIX

    def prepare(self, cell: Cell) -> TaskSequence:
        """Write the cell's task sequence; ``sequence_of`` it."""
        path = self.folder(cell) / SEQUENCE
        with atomic_write(path) as stream:
            json.dump(self._values(cell), stream, indent=1)
        return load_sequence(path)

    def sequence_of(self, cell: Cell) -> TaskSequence:
        """The cell's task sequence. The rows that all cells use are written where these are not all.

        Raises:
            UserError: rows that are missing or broken.
        """
        return sequence_of(self._values(cell), self.folder(cell) / SEQUENCE)

    def _values(self, cell: Cell) -> dict[str, Any]:
        rates = {} if (rate := self.rate(cell)) is None else {"learning_rate": rate}
        tasks, test = self._trial_files if cell.trial else self._files
        return {
            **self.raw,
            "tasks": [{"name": name, "train": tasks[name]} for name in cell.order],
            "test": test,
            "keys": {**self.raw.get("keys", {}), **cell.keys},
            "train": {**self.raw.get("train", {}), **cell.train, "seed": cell.seed, **rates},
        }

    @cached_property
    def _files(self) -> tuple[dict[str, list[str]], str]:
        """Training files by task, and the test file."""
        rows = self.values.get("rows")
        tasks = {task.name: [self._some(file, rows) for file in task.files] for task in self.sequence.tasks}
        return tasks, self._some(self.sequence.test, self.values.get("test_rows"))

    @cached_property
    def _trial_files(self) -> tuple[dict[str, list[str]], str]:
        """The same of a trial, which is tested on validation rows."""
        tasks, _ = self._files
        validation, count = self.values["validation"], self.values.get("test_rows")
        if isinstance(validation, str):
            return tasks, self._some(validation, count)
        rest: dict[str, list[str]] = {}
        out: list[Row] = []
        for name, files in tasks.items():
            rows = [row for file in files for row in read_rows(file)]
            held = held_out([row.image for row in rows], validation, 0)
            rest[name] = [
                self._written(f"trial_{name}", [row for row, away in zip(rows, held, strict=True) if not away])
            ]
            out += [row for row, away in zip(rows, held, strict=True) if away]
        return rest, self._some(self._written("validation", out), count)

    def _some(self, file: str, count: int | None) -> str:
        """The file, or one with so many rows of each domain."""
        if count is None:
            return file
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in read_rows(file):
            groups.setdefault(row.domains, []).append(row)
        kept = [rows[place] for rows in groups.values() for place in spread(len(rows), count)]
        return self._written(f"some_{Path(file).stem}", kept)

    def _written(self, name: str, rows: list[Row]) -> str:
        """A file of rows, named by them: whoever runs with others, or only looks, takes it away from nobody."""
        found = [row.raw for row in rows]
        target = self.root / "data" / f"{name}-{values_sha256(found)[:8]}.jsonl"
        write_jsonl(target, found)
        return str(target)

    def identity(self, cell: Cell, sequence: TaskSequence) -> str:
        """A checksum over what decides the cell's results, wherever its files lie."""
        settings = sequence.slots_per_task, sequence.answer_suffix, sequence.answer_style, sequence.metrics
        parts = {
            "version": llava.__version__,
            "cell": [cell.method, cell.flags, cell.route, cell.pictures],
            "sequence": [sequence.name, sequence.task_names, settings, keys_of(sequence), vars(sequence.train)],
            "files": checksums(files_of(sequence)),
            "pictures": pictures(files_of(sequence), sequence.image_folder),
            "base": self.base_content,
        }
        return values_sha256(parts)

    def key_identity(self, sequence: TaskSequence) -> str:
        """The same of the cell's keys, whatever they are tested on: a trial has those of the cells."""
        parts = [sequence.task_names, sequence.slots_per_task, keys_of(sequence), sequence.train.seed]
        training = files_of(sequence)[:-1]
        found = [checksums(training), pictures(training, sequence.image_folder), self.base_content]
        return values_sha256([*parts, *found])

    @cached_property
    def base_content(self) -> str:
        """A checksum of the base's files."""
        return content_of(Checkpoint.open(self.base).manifest)


def _with_files_of(folder: str | None, sequence: TaskSequence) -> TaskSequence:
    """The sequence with the files of the same names in another folder."""
    if folder is None:
        return sequence

    def moved(file: str) -> str:
        return str(Path(folder, Path(file).name))

    tasks = tuple(replace(task, files=tuple(map(moved, task.files))) for task in sequence.tasks)
    return replace(sequence, tasks=tasks, test=moved(sequence.test))


def keys_of(sequence: TaskSequence) -> dict[str, Any]:
    """The settings of stage 1, with the content of an encoder that lies in a folder in place of its name."""
    choice = chosen(sequence.keys.text_encoder)
    found = {} if choice in OWN else {"text_encoder": manifest_of(choice)}
    return {**vars(sequence.keys), **found}


def files_of(sequence: TaskSequence) -> list[str]:
    """The training files in the tasks' order, and the test file."""
    return [*(file for task in sequence.tasks for file in task.files), sequence.test]


def checksums(files: Iterable[str]) -> list[str]:
    """Of each file."""
    return [file_sha256(file) for file in files]


def pictures(files: Iterable[str], folder: str) -> str | None:
    """A checksum over the contents of all pictures of some files' rows."""
    return pictures_checksum([row for file in files for row in _rows(file, file_sha256(file))], folder)


@lru_cache(maxsize=64)
def _rows(file: str, checksum: str) -> list[Row]:
    """The rows of a file of this checksum; many cells have the same ones."""
    return read_rows(file)


def spread(total: int, count: int) -> list[int]:
    """``count`` places spread evenly over ``total``; all where there are not as many."""
    return [place * total // count for place in range(count)] if count < total else list(range(total))
