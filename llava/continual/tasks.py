"""Task sequences: which tasks arrive in which order, with which files. One small JSON file each, no code.

``scripts/tasks/<name>.json``::

    {"name": "vqa-rad", "dataset": "vqa-rad",
     "tasks": [{"name": "abd", "train": "data/train_abd.jsonl"}, ...],
     "test": "data/test_vqa_rad.jsonl", "image_folder": "${VQA_RAD_DIR:-data/vqa-rad}/images",
     "slots_per_task": 8, "answer_suffix": "", "answer_style": "lower",
     "metrics": ["exact_match", ...]}

``answer_style`` says how answers are taught: ``as_is``, or ``lower`` where the data mixes cases without meaning.
Task ``i`` owns slots ``[i * slots_per_task, (i + 1) * slots_per_task)``. On the command line::

    python -m llava.continual.tasks get SEQUENCE FIELD          test, image_folder, tasks, train:<task>, ...
    python -m llava.continual.tasks stages SEQUENCE [--output_dir output] [--method retrieval]
"""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.data.rows import ANSWER_STYLES
from llava.slots.settings import check_task_name
from llava.utils import UserError, require_file, run_cli

SEQUENCE_FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "tasks"
_DEFAULTED_VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


@dataclass(frozen=True)
class Task:
    """One task: its name (also the rows' domain) and its training file."""

    name: str
    train: str


@dataclass(frozen=True)
class TaskSequence:
    """A task sequence as read from its file."""

    name: str
    dataset: str
    tasks: tuple[Task, ...]
    test: str
    image_folder: str
    slots_per_task: int = 8
    answer_suffix: str = ""
    answer_style: str = "as_is"
    metrics: tuple[str, ...] = field(default=())

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

        ``llava`` stays in the name, as LLaVA's loaders want it. Methods other than retrieval are named.
        """
        mark = "" if method == "retrieval" else f"-{method}"
        return f"llava-{self.name}{mark}_" + "_".join(self.task_names[:number])


def load_sequence(name_or_path: str | os.PathLike[str]) -> TaskSequence:
    """Read a task sequence by file, or by the name of one that ships (``vqa-rad``, ``slake``, ``phantom``)."""
    path = Path(name_or_path)
    if path.suffix != ".json":
        path = SEQUENCE_FOLDER / f"{name_or_path}.json"
    shipped = ", ".join(sorted(file.stem for file in SEQUENCE_FOLDER.glob("*.json")))
    require_file(path, "task sequence", f"give a JSON file, or one of {shipped}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: broken JSON ({error.msg})") from error
    return _validated(values, path)


def _validated(values: dict[str, Any], path: Path) -> TaskSequence:
    if not isinstance(values, dict) or not isinstance(values.get("tasks", []), list):
        raise UserError(f"{path}: a task sequence is a JSON object with a list of tasks (see scripts/tasks)")
    for name in ("name", "tasks", "test", "image_folder"):
        if not values.get(name):
            raise UserError(f"{path}: field {name!r} is missing or empty")
    tasks = []
    for number, entry in enumerate(values["tasks"], start=1):
        if not isinstance(entry, dict) or not entry.get("name") or not entry.get("train"):
            raise UserError(f"{path}: task {number} needs a name and a training file")
        check_task_name(entry["name"], f"{path}: ")
        tasks.append(Task(entry["name"], _expand(entry["train"])))
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        raise UserError(f"{path}: a task name occurs twice in {names}")
    slots = values.get("slots_per_task", 8)
    if type(slots) is not int or slots < 1:
        raise UserError(f"{path}: slots_per_task is {slots!r}; write an integer of 1 or more")
    style = values.get("answer_style", "as_is")
    if style not in ANSWER_STYLES:
        raise UserError(f"{path}: answer_style is {style!r}; known: {', '.join(ANSWER_STYLES)}")
    return TaskSequence(
        name=values["name"],
        dataset=values.get("dataset", values["name"]),
        tasks=tuple(tasks),
        test=_expand(values["test"]),
        image_folder=_expand(values["image_folder"]),
        slots_per_task=slots,
        answer_suffix=values.get("answer_suffix", ""),
        answer_style=style,
        metrics=tuple(values.get("metrics", ())),
    )


def _expand(text: str) -> str:
    """``${NAME:-default}`` and ``$NAME`` from the environment, as a shell would."""
    text = _DEFAULTED_VARIABLE.sub(lambda match: os.environ.get(match[1]) or match[2], text)
    return os.path.expandvars(text)


def _get(sequence: TaskSequence, wanted: str) -> str:
    if wanted == "tasks":
        return "\n".join(sequence.task_names)
    if wanted.startswith("train:"):
        return sequence.task(wanted.removeprefix("train:")).train
    if wanted == "train":
        return "\n".join(task.train for task in sequence.tasks)
    value = getattr(sequence, wanted, None)
    if value is None or callable(value):
        raise UserError(
            f"unknown field {wanted!r}; known: name, dataset, tasks, train, train:<task>, test, image_folder"
        )
    return "\n".join(value) if isinstance(value, tuple) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Read a task sequence file.")
    commands = parser.add_subparsers(dest="command", required=True)
    get = commands.add_parser("get", help="print one field")
    get.add_argument("sequence")
    get.add_argument("field")
    stages = commands.add_parser("stages", help="print the stage checkpoints' folders, one a line")
    stages.add_argument("sequence")
    stages.add_argument("--output_dir", default="output")
    stages.add_argument("--method", default="retrieval")
    args = parser.parse_args()
    sequence = load_sequence(args.sequence)
    if args.command == "get":
        print(_get(sequence, args.field))
        return
    for number in range(1, len(sequence.tasks) + 1):
        print(Path(args.output_dir) / sequence.stage_name(number, args.method))


if __name__ == "__main__":
    run_cli(main)
