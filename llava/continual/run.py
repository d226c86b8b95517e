"""One trained stage: what identifies it, whether it is finished, what stands in its folder.

A stage folder is light: ``slots.pth`` (the tasks so far, with the prompt) and ``slots`` (the numbers of each, in files
that are linked from stage to stage; see ``llava.slots.parts``), ``training.json`` (the record), ``config.json`` and the
tokenizer, ``log_history.json``, and where its method keeps something for later stages or for answering, ``memory.pth``
(tensors) and ``kept_rows.jsonl`` (rows). It appears under its name only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.checkpoints.kinds import SLOTS_FILE, TRAINING_FILE
from llava.checkpoints.manifest import check_seal, seal
from llava.continual.places import Places
from llava.continual.record import SHORT, difference, plain, read_record
from llava.data.rows import Row, read_rows, write_jsonl
from llava.files import atomic_folder, atomic_write
from llava.locks import only_writer
from llava.slots.adapter import read_memory, write_memory
from llava.slots.pool import Pool
from llava.utils import UserError

KEPT_ROWS_FILE = "kept_rows.jsonl"
LOG_FILE = "log_history.json"
WORK_FILE = "run.json"
SLOTS = "slots"  # checksums of the tasks that a finished stage wrote, in its record


@dataclass
class Run:
    """A stage that is to be trained, or was.

    Attributes:
        folder: of the stage checkpoint.
        record: everything that decides what is learned (see ``llava.continual.record``).
        unset: value of each recorded setting that nobody has set.
        first: what records of the first version kept under other names (see ``record.first_version``).
        pool: slots of the finished stage; there are none before.
        memory: tensors that the method keeps (Fisher information, a gate, prefixes).
        kept_rows: rows of past tasks that the method keeps.
        has_slots: whether the stage leaves slots; one that does not is known by its record.
    """

    folder: Path
    record: dict[str, Any]
    unset: dict[str, Any] = field(default_factory=dict)
    first: dict[str, Any] = field(default_factory=dict)
    pool: Pool = field(init=False)
    memory: dict[str, Tensor] = field(default_factory=dict)
    kept_rows: list[Row] = field(default_factory=list)
    has_slots: bool = True

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """A finished stage.

        Raises:
            UserError: there is none, or its files are damaged.
        """
        place = Path(folder)
        if not (place / SLOTS_FILE).is_file():
            raise UserError(f"stage checkpoint not found: {place} (train the stage before this one first)")
        check_seal(place)
        record = read_record(place / TRAINING_FILE) if (place / TRAINING_FILE).is_file() else {}
        rows = read_rows(place / KEPT_ROWS_FILE) if (place / KEPT_ROWS_FILE).is_file() else []
        run = cls(place, record, memory=read_memory(place), kept_rows=rows)
        run.pool = Pool.read(place / SLOTS_FILE)
        return run

    def contents(self) -> dict[str, Any]:
        """What a later stage takes from this finished one, as checksums for its record."""
        memory = hashlib.sha256()
        for name, tensor in sorted(self.memory.items()):
            memory.update(f"{name}:{tuple(tensor.shape)}".encode())
            memory.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for row in self.kept_rows:
            memory.update(json.dumps(row.raw, sort_keys=True).encode())
        kept = {"earlier_memory": memory.hexdigest()[:SHORT]} if self.memory or self.kept_rows else {}
        return {"earlier_tasks": {task.name: task.checksum() for task in self.pool.tasks}, **kept}

    def remembered(self, name: str) -> Tensor:
        """A tensor that the method keeps; ``UserError`` where another method trained the stage, which keeps none."""
        if name not in self.memory:
            method = self.record.get("method", "another")
            raise UserError(f"{self.folder} keeps no {name}: it was trained with --method {method}; train it with this")
        return self.memory[name]

    @property
    def work(self) -> Path:
        """Where checkpoints lie while the stage is in training."""
        return Places.work(self.folder)

    def held(self) -> AbstractContextManager[None]:
        """Keep other processes from training this stage; ``UserError`` where one is at it."""
        if self.folder.is_dir() and not os.access(self.folder.parent, os.W_OK):
            return nullcontext()  # nobody can write a stage here; a finished one can still be found so
        return only_writer(self.folder)

    def finished(self) -> bool:
        """Whether the folder holds this very stage, whole.

        Raises:
            UserError: it holds one that was trained otherwise, or whose slots are no longer those that were trained; or
                something else, which the finished stage would replace.
        """
        self._refuse_another(self.folder / TRAINING_FILE, self.folder)
        if not (self.folder / (SLOTS_FILE if self.has_slots else TRAINING_FILE)).is_file():
            self._refuse_occupied()
            return False
        if self.has_slots:
            self._refuse_edited()
        check_seal(self.folder)
        return True

    def begin_work(self) -> None:
        """Note in the work folder whose it is."""
        with atomic_write(self.work / WORK_FILE) as stream:
            json.dump(self.record, stream, indent=1)

    def check_work(self) -> None:
        """``UserError`` where an interrupted run of other settings, or of an earlier version, left its checkpoints.

        One that ended before its first checkpoint left nothing to go on from, and is no obstacle.
        """
        if not any(self.work.glob("checkpoint-*")):
            return
        path = self.work / WORK_FILE
        if path.is_file() and "record" not in read_record(path):  # the weights have other names in its checkpoints
            raise UserError(f"{path}: was begun by an earlier version; remove {self.work} to start the task anew")
        self._refuse_another(path, self.work)

    def write(
        self,
        pool: Pool,
        config: Any,
        tokenizer: Any,
        log_history: list[dict[str, Any]],
        more_files: Iterable[Callable[[Path], None]] = (),
        previous: Run | None = None,
    ) -> None:
        """Write the finished stage; ``more_files`` put further files into its folder before it appears.

        Slots that ``previous`` has already, the stage before, are not written again: their files are linked.
        """
        self.pool = pool
        with atomic_folder(self.folder) as partial:
            config.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            if self.memory:
                write_memory(partial, self.memory)
            if self.kept_rows:
                write_jsonl(partial / KEPT_ROWS_FILE, [row.raw for row in self.kept_rows])
            for write_more in more_files:
                write_more(partial)
            earlier = [] if previous is None else [previous.folder / SLOTS_FILE]
            written = pool.write_stage(partial / SLOTS_FILE, earlier) if self.has_slots else {}
            for name, value in ((TRAINING_FILE, {**self.record, SLOTS: written}), (LOG_FILE, log_history)):
                with atomic_write(partial / name) as stream:
                    json.dump(value, stream, indent=1)
            seal(partial)

    def _refuse_another(self, path: Path, folder: Path) -> None:
        if not path.is_file():
            return
        kept = read_record(path)
        kept.pop(SLOTS, None)
        now = plain(self.record if "record" in kept else {**self.record, **self.first})
        if found := difference(kept, now, self.unset):
            aim = "train again" if folder == self.folder else "start the task anew"
            raise UserError(f"{path}: was trained with {found}; remove {folder} to {aim}, or restore the setting")

    def _refuse_occupied(self) -> None:
        """The folder is replaced as a whole, so it must be new, empty, or what is left of this very stage."""
        mend = "writing the stage would remove it; give --output_dir a new folder, or move it away"
        if self.folder.is_symlink() or self.folder.is_file():
            raise UserError(f"{self.folder} is no folder of its own: {mend}")
        if (self.folder / TRAINING_FILE).is_file() or not self.folder.is_dir():
            return
        if found := sorted(entry.name for entry in self.folder.iterdir()):
            raise UserError(f"{self.folder} holds {found[0]!r} and is no stage: {mend}")

    def _refuse_edited(self) -> None:
        """The slots must be the ones that the record names: a task may have been removed in place since."""
        path = self.folder / TRAINING_FILE
        written = _written_slots(read_record(path)) if path.is_file() else None
        if written is None:
            return
        here = {task.name: task.checksum() for task in Pool.read(self.folder / SLOTS_FILE).tasks}
        for name in [*written, *here]:
            what = "was removed" if name not in here else "is new" if name not in written else "has changed"
            if what != "has changed" or written[name] not in (None, here[name]):
                raise UserError(
                    f"{self.folder / SLOTS_FILE}: task {name!r} {what} since the stage was trained; remove the "
                    "folder to train it again, or evaluate it as it is"
                )


def _written_slots(record: dict[str, Any]) -> dict[str, str | None] | None:
    """Checksum of each task that a stage wrote, ``None`` for one that the record does not tell.

    Records of the first version name the tasks before, which ``retrieval`` passes through, and the stage's own.
    """
    if "record" not in record and record.get("method") == "retrieval":
        return {**record.get("earlier_tasks", {}), record.get("task"): None}
    return record.get(SLOTS)
