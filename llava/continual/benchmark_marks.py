"""Which cells of a benchmark are whole, which have failed, and how long the rest will take: a small file in each.

``cell.json`` says with which settings and results a cell was finished, and what it took; or what has stopped it. No
path or place is in it, so that a cell's folder may come from elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.continual.benchmark import Benchmark, Cell
from llava.files import atomic_write, file_sha256, is_still
from llava.outside import read_object
from llava.utils import UserError

MARK, ANSWERS = "cell.json", "answers.jsonl"


@dataclass(frozen=True)
class Marks:
    """The marks of a benchmark's cells.

    Attributes:
        since: time in seconds; what failed earlier is tried again.
    """

    benchmark: Benchmark
    since: float = 0.0
    _identities: dict[tuple[Path, float | None], str] = field(default_factory=dict, init=False, repr=False)

    def fresh(self, cell: Cell) -> bool:
        """Whether the cell is there, whole, as a run would make it now: by trials that are, where it has some.

        One whose data are missing is not, as nothing can be made of it. Data are looked at once.
        """
        if not all(map(self.fresh, self.benchmark.trials(cell))) or not self.whole(cell):
            return False
        name = cell.place, self.benchmark.rate(cell)
        if name not in self._identities:
            with suppress(UserError):
                self._identities[name] = self.benchmark.identity(cell, self.benchmark.sequence_of(cell))
        return bool(self._mark(cell).get("identity", "") == self._identities.get(name))

    def done(self, cell: Cell, identity: str) -> bool:
        """Whether the cell is there, whole, as it would be made now."""
        return self.whole(cell) and self._mark(cell)["identity"] == identity

    def whole(self, cell: Cell) -> bool:
        """Whether the cell is there, with the results that it was finished with."""
        found, matrix = self._mark(cell), self.benchmark.matrix(cell)
        return "matrix" in found and matrix.is_file() and found["matrix"] == file_sha256(matrix)

    def answered(self, cell: Cell, identity: str) -> bool:
        """Whether the cell's answers are there, as they would be given now, whatever became of its scores."""
        found, folder = self._mark(cell), self.benchmark.folder(cell)
        answers: dict[str, str] = found.get("answers", {}) if found.get("identity") == identity else {}
        return bool(answers) and all(is_still(folder / name, checksum) for name, checksum in answers.items())

    def finish(self, cell: Cell, identity: str, seconds: float) -> None:
        """Mark a cell as whole, with what it took."""
        self._write(cell, {"identity": identity, **self._results(cell), "seconds": round(seconds, 1)})

    def renew(self, cell: Cell) -> None:
        """Mark a cell that was finished as whole, with other scores."""
        self._write(cell, {**self._mark(cell), **self._results(cell)})

    def _results(self, cell: Cell) -> dict[str, Any]:
        matrix, folder = self.benchmark.matrix(cell), self.benchmark.folder(cell)
        answers = sorted(matrix.parent.rglob(ANSWERS))
        found = {str(file.relative_to(folder)): file_sha256(file) for file in answers}
        return {"matrix": file_sha256(matrix), "answers": found}

    def fail(self, cell: Cell, why: str) -> None:
        """Mark a cell as failed, so that no other process tries it again before the command is given again."""
        self._write(cell, {"failed": why})

    def failed(self, cell: Cell) -> str | None:
        """What has stopped a cell since this start."""
        why = self._mark(cell).get("failed")
        return None if why is None or self._path(cell).stat().st_mtime < self.since else str(why)

    def blocked(self, cell: Cell) -> bool:
        """Whether a cell's learning rate is not known yet."""
        return not all(map(self.whole, self.benchmark.trials(cell)))

    def teacher(self, cell: Cell) -> Cell | None:
        """The first cell of the file whose stages a cell's are too; ``None`` where it is that one, or is blocked."""
        if self.blocked(cell):
            return None
        cells, wanted = self.benchmark.cells, self.benchmark.training(cell)
        before = (other for other in cells[: cells.index(cell)] if not self.blocked(other))
        return next((other for other in before if self.benchmark.training(other) == wanted), None)

    def time_left(self, todo: Sequence[Cell], workers: int = 1) -> float | None:
        """Seconds that cells will take, by those of the same run that are done, else by any; ``None`` before one is."""
        took = [(cell.run, self._mark(cell).get("seconds")) for cell in self.benchmark.cells]
        known = [(run, seconds) for run, seconds in took if seconds is not None]
        if not known:
            return None

        def mean(run: str) -> float:
            mine = [seconds for name, seconds in known if name == run] or [seconds for _, seconds in known]
            return float(sum(mine)) / len(mine)

        return sum(mean(cell.run) for cell in todo) / max(1, min(workers, len(todo)))

    def _path(self, cell: Cell) -> Path:
        return self.benchmark.folder(cell) / MARK

    def _mark(self, cell: Cell) -> dict[str, Any]:
        return read_object(self._path(cell)) if self._path(cell).is_file() else {}

    def _write(self, cell: Cell, found: dict[str, Any]) -> None:
        with atomic_write(self._path(cell)) as stream:
            json.dump(found, stream)
