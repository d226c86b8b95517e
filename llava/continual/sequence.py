"""Task sequences: which tasks arrive in which order, with which files and settings. One JSON file each, no code.

``scripts/tasks/<name>.json``::

    {"name": "vqa-rad", "dataset": "vqa-rad",
     "tasks": [{"name": "abd", "train": "data/train_abd.jsonl"}, ...],
     "test": "data/test_vqa_rad.jsonl", "image_folder": "${VQA_RAD_DIR:-data/vqa-rad}/images",
     "slots_per_task": 8, "answer_suffix": "", "answer_style": "lower",
     "metrics": ["exact_match", ...], "licence": "CC0 1.0 (VQA-RAD)",
     "keys": {"rank": 8}, "train": {"epochs": 1}, "base": {"recipe": "phantom"}}

``train`` of a task is a file or a list of files. ``answer_style`` says how answers are taught: ``as_is``, or ``lower``
where the data mixes cases without meaning. ``licence`` is that of the data, for model cards. Task ``i`` owns slots
``[i * slots_per_task, (i + 1) * slots_per_task)``. The blocks and their defaults stand in
``llava/continual/settings.py``; the environment overrides them, and ``SLOTS_PER_TASK`` the slots. Relative paths mean
the folder in which a command is started.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from llava.continual.settings import (
    WIDE,
    BaseSettings,
    KeySettings,
    TrainSettings,
    overridden,
    read_block,
    stated_by,
)
from llava.data.metric_names import METRICS
from llava.data.rows import ANSWER_STYLES
from llava.inside import check_file_name
from llava.outside import read_object
from llava.schema import Wanted, check_fields, list_of, refuse_unknown, whole, words
from llava.slots.names import check_task_name
from llava.utils import UserError

_IN_A_CLONE = Path(__file__).resolve().parents[2] / "scripts" / "tasks"
SEQUENCE_FOLDER = _IN_A_CLONE if _IN_A_CLONE.is_dir() else Path(sysconfig.get_path("data"), "share", "llava", "tasks")
_DEFAULTED_VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


@dataclass(frozen=True)
class Task:
    """One task: its name (also the rows' domain) and its training files."""

    name: str
    files: tuple[str, ...]

    @property
    def train(self) -> str:
        """The training file of a task that has one."""
        if len(self.files) > 1:
            raise UserError(f"task {self.name!r} has {len(self.files)} training files; one is wanted here")
        return self.files[0]


@dataclass(frozen=True)
class TaskSequence:
    """A task sequence as read from its file. ``stated``: fields of ``train`` that are not defaults."""

    name: str
    dataset: str
    tasks: tuple[Task, ...]
    test: str
    image_folder: str
    slots_per_task: int = 8
    answer_suffix: str = ""
    answer_style: str = "as_is"
    metrics: tuple[str, ...] = field(default=())
    licence: str = ""
    keys: KeySettings = field(default_factory=KeySettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    base: BaseSettings = field(default_factory=BaseSettings)
    stated: frozenset[str] = field(default=frozenset())

    @property
    def task_names(self) -> list[str]:
        return [task.name for task in self.tasks]

    def task(self, name: str) -> Task:
        """The task called ``name``; ``UserError`` names the ones there are."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise UserError(f"unknown task {name!r}; sequence {self.name!r} has {', '.join(self.task_names)}")

    def slot_range(self, name: str) -> tuple[int, int]:
        """First slot and one past the last slot of a task."""
        index = self.task_names.index(self.task(name).name)
        return index * self.slots_per_task, (index + 1) * self.slots_per_task

    def stage_name(self, number: int, method: str = "retrieval") -> str:
        """Folder name of the checkpoint after ``number`` tasks, e.g. ``llava-vqa-rad_abd_chest``.

        ``llava`` stays in the name, as LLaVA's loaders want it.
        """
        return f"llava-{self.learned_by(method)}_" + "_".join(self.task_names[:number])

    def learned_by(self, method: str) -> str:
        """``<sequence>[-<method>]``, as what a method makes of the sequence is called; retrieval is not named."""
        return self.name if method == "retrieval" else f"{self.name}-{method}"

    def overridden(self, environ: Mapping[str, str]) -> TaskSequence:
        """The sequence with what the environment sets (see ``llava/continual/settings.py``)."""
        slots: Any = environ.get("SLOTS_PER_TASK") or self.slots_per_task
        slots = int(slots) if str(slots).isascii() and str(slots).isdigit() and len(str(slots)) < 10 else slots
        _SLOTS.check(slots, "SLOTS_PER_TASK")
        return replace(
            self,
            slots_per_task=slots,
            keys=overridden(self.keys, environ),
            train=overridden(self.train, environ),
            base=overridden(self.base, environ),
            stated=self.stated | stated_by(TrainSettings, {}, environ),
        )


FIELDS = tuple(entry.name for entry in fields(TaskSequence) if entry.name != "stated")
"""Fields of a file."""
_TEXTS = {"name": "", "dataset": "", "answer_suffix": "", "licence": "", "answer_style": "as_is"}
_SLOTS, _TEXT = whole(1, WIDE), replace(words(), words="one text in quotes")
SCHEMA: dict[str, Wanted] = {
    **{name: Wanted("", lambda _: True) for name in FIELDS},  # blocks and tasks have a schema of their own
    **dict.fromkeys((*_TEXTS, "test", "image_folder"), _TEXT),
    "answer_style": words(ANSWER_STYLES),
    "slots_per_task": _SLOTS,
    "metrics": replace(list_of(words(empty=False)), words='a list of names, e.g. ["exact_match"]'),
}
_FILE = words(empty=False)
_TASK_SCHEMA = {
    "name": replace(words(empty=False), words="it in quotes"),
    "train": replace(_FILE | list_of(_FILE, empty=False), words="a file's name, or a list of them"),
}


def load_sequence(name_or_path: str | os.PathLike[str], environ: Mapping[str, str] | None = None) -> TaskSequence:
    """Read a task sequence by file, or by the name of one that ships (``vqa-rad``, ``slake``, ``phantom``).

    Args:
        environ: variables that override the file; the process's own unless given.
    """
    path = Path(name_or_path)
    if path.suffix != ".json":
        path = SEQUENCE_FOLDER / f"{name_or_path}.json"
    values = read_object(path, "task sequence", f"give a JSON file, or one of {', '.join(shipped_names())}")
    return sequence_of(values, path, environ)


def sequence_of(
    values: dict[str, Any], path: str | os.PathLike[str], environ: Mapping[str, str] | None = None
) -> TaskSequence:
    """The task sequence that a file of these values would be; ``path`` names it in errors. ``environ`` as above."""
    return _validated(values, Path(path)).overridden(os.environ if environ is None else environ)


def sequence_flag(**more: Any) -> Any:
    """The field of a command's arguments that names a task sequence; ``SEQUENCE`` is its default."""
    about = {"help": "task sequence, name or file", **more}
    return field(default_factory=lambda: os.environ.get("SEQUENCE") or "vqa-rad", metadata=about)


def shipped_names() -> list[str]:
    """Names of the sequences in ``scripts/tasks``."""
    return sorted(file.stem for file in SEQUENCE_FOLDER.glob("*.json"))


def choose_sequence(dataset: str, environ: Mapping[str, str]) -> str:
    """The quick start's sequence for a data set; ``auto``: VQA-RAD's where its data lies, else the phantoms'."""
    if dataset == "auto":
        folder = Path(environ.get("VQA_RAD_DIR") or "data/vqa-rad")
        return "vqa-rad" if any(folder.glob("VQA_RAD*.json")) else "phantom"
    return dataset


def _validated(values: dict[str, Any], path: Path) -> TaskSequence:
    if not isinstance(values.get("tasks", []), list):
        raise UserError(f"{path}: a task sequence is a JSON object with a list of tasks (see scripts/tasks)")
    refuse_unknown(values, FIELDS, str(path))
    for name in ("name", "tasks", "test", "image_folder"):
        if not values.get(name):
            raise UserError(f"{path}: field {name!r} is missing or empty")
    check_fields(values, SCHEMA, str(path))
    check_file_name(values["name"], f"{path}: name")
    tasks = tuple(_task(entry, number, path) for number, entry in enumerate(values["tasks"], start=1))
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        raise UserError(f"{path}: a task name occurs twice in {names}")
    metrics = values.get("metrics") or ()
    refuse_unknown(metrics, METRICS.names(), f"{path}: metrics", "metric")
    texts = {name: default if values.get(name) is None else values[name] for name, default in _TEXTS.items()}
    train = values.get("train") or {}
    base = values["base"] if "base" in values else {}
    return TaskSequence(
        **{**texts, "dataset": texts["dataset"] or texts["name"]},
        **{name: _expand(values[name]) for name in ("test", "image_folder")},
        tasks=tasks,
        slots_per_task=8 if values.get("slots_per_task") is None else values["slots_per_task"],
        metrics=tuple(metrics),
        keys=read_block(KeySettings, values.get("keys") or {}, f"{path}: keys"),
        train=read_block(TrainSettings, train, f"{path}: train"),
        base=BaseSettings(recipe=None) if base is None else read_block(BaseSettings, base, f"{path}: base"),
        stated=stated_by(TrainSettings, train, {}),
    )


def _task(entry: Any, number: int, path: Path) -> Task:
    where = f"{path}: task {number}"
    if not isinstance(entry, dict) or not entry.get("name") or not entry.get("train"):
        raise UserError(f"{where} needs a name and a training file")
    check_fields(entry, _TASK_SCHEMA, where)
    check_task_name(entry["name"], f"{path}: ")
    files = [entry["train"]] if isinstance(entry["train"], str) else entry["train"]
    return Task(entry["name"], tuple(map(_expand, files)))


def _expand(text: str) -> str:
    """``${NAME:-default}`` and ``$NAME`` from the environment, as a shell would."""
    text = _DEFAULTED_VARIABLE.sub(lambda match: os.environ.get(match[1]) or match[2], text)
    return os.path.expandvars(text)
