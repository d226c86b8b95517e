"""What one evaluated run leaves, read from its folder: matrix, scores, answers, routes, training logs, settings.

A folder is an evaluation's, ``output/eval/<name>``. The stages lie two levels above it where they are still there; the
pictures where the evaluation's record says. Whatever is missing is ``None`` or empty, and the page does without it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llava.checkpoints.kinds import SLOTS_FILE, TRAINING_FILE
from llava.continual.record import read_record
from llava.continual.run import LOG_FILE
from llava.data.answers import read_answers
from llava.data.rows import Row, read_rows
from llava.eval.accuracy_matrix import MATRIX_NAME
from llava.eval.eval_video_qa import SCORES_NAME
from llava.eval.evaluation import Evaluation
from llava.eval.evaluation_record import EVALUATION_NAME, read_evaluation_record
from llava.eval.over_seeds import read_matrix
from llava.eval.score_schema import read_scores
from llava.files import file_sha256
from llava.inside import Folder, inside, opened_to_links
from llava.outside import read_json
from llava.schema import an_object, check_fields, list_of, number, whole, words
from llava.slots.pool import Pool
from llava.utils import UserError

ANSWERS_NAME = "answers.jsonl"
_PLACE, _VALUE = whole(0), number()
_MATRIX = {"stages": list_of(words(empty=False)), "provenance": an_object({"question_file": an_object()})}


@dataclass(frozen=True)
class Scored:
    """One model's answers and what they are worth.

    Attributes:
        name: its folder's. scores: what ``scores.json`` holds. rows: the lines of ``rows.jsonl``.
        metadata: each row's, as its answer has it; empty where the answers are not there.
    """

    name: str
    scores: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    metadata: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, file: Path) -> Scored:
        """A scores file, and what lies beside it.

        Raises:
            UserError: one of the files is broken, or the answers are not those that were scored.
        """
        scores, rows = read_scores(file)
        answers_file = file.with_name(ANSWERS_NAME)
        metadata: list[Mapping[str, Any]] = []
        if answers_file.is_file():
            answers = read_answers(answers_file)
            if [answer["question_id"] for answer in answers] != [row.get("question_id") for row in rows]:
                raise UserError(f"{answers_file}: not the answers that {file.name} was made of; score them again")
            metadata = [answer.get("metadata") or {} for answer in answers]
        return cls(file.parent.name, scores, rows, metadata)

    def figure(self, group: str, metric: str) -> Mapping[str, Any] | None:
        """A figure of a group (``overall``, a domain), ``None`` where there is none."""
        found = self.scores["groups"].get(group, {}).get("figures", {}).get(metric)
        return found if found and found["value"] is not None else None


@dataclass(frozen=True)
class Results:
    """What is known of one run.

    Attributes:
        folder: the evaluation's. label: its name among the others on the page.
        matrix: what ``accuracy_matrix.json`` holds. stages: one for each of its rows.
        about: the evaluation's record, empty for older runs. alone: whether it is the page's only run.
    """

    folder: Path
    label: str
    matrix: Mapping[str, Any]
    stages: Sequence[Scored]
    zero_shot: Scored | None
    about: Mapping[str, Any]
    alone: bool = True

    @classmethod
    def read(cls, folder: str | Path, label: str | None = None) -> Results:
        """The run of an evaluation's folder.

        Raises:
            UserError: there is no accuracy matrix, or a file is missing or broken.
        """
        place = Path(folder)
        matrix = read_matrix(place)
        check_fields(matrix, _MATRIX, str(place / MATRIX_NAME), False, tuple(_MATRIX))
        stages = [Scored.read(inside(place, f"{name}/{SCORES_NAME}", MATRIX_NAME)) for name in matrix["stages"]]
        if len(stages) != len(matrix["tasks"]):
            raise UserError(f"{place / MATRIX_NAME}: {len(stages)} stages for {len(matrix['tasks'])} tasks")
        base = place / Evaluation.ZERO_SHOT / SCORES_NAME
        zero_shot = Scored.read(base) if matrix.get("zero_shot_model") and base.is_file() else None
        record = place / EVALUATION_NAME
        about = read_evaluation_record(record) if record.is_file() else {}
        return cls(place, label or place.name, matrix, stages, zero_shot, about, label is None)

    def titled(self, text: str) -> str:
        """A title of something of this run, which names the run where there are several."""
        return text if self.alone else f"{text} ({self.label})"

    @property
    def tasks(self) -> list[str]:
        return list(self.matrix["tasks"])

    @property
    def metrics(self) -> dict[str, Mapping[str, Any]]:
        """The matrix's metrics that could be computed."""
        return {name: found for name, found in self.matrix["metrics"].items() if found["summary"] is not None}

    @property
    def last(self) -> Scored:
        """After the last task."""
        return self.stages[-1]

    @property
    def domains(self) -> list[str]:
        """Domains of the test questions: the tasks in order, then the others."""
        found = [name for name in self.last.scores["groups"] if name != "overall"]
        return [*(task for task in self.tasks if task in found), *sorted(set(found) - set(self.tasks))]

    @property
    def route(self) -> str:
        """How routes were decided, as the evaluation was asked; empty: as trained."""
        return str(self.about.get("route") or "")

    @cached_property
    def records(self) -> list[Mapping[str, Any]]:
        """Each stage's record of its training, empty where the stage is not there any more."""
        files = [place / TRAINING_FILE for place in self._stage_folders]
        return [read_record(file) if file.is_file() else {} for file in files]

    @cached_property
    def logs(self) -> list[list[dict[str, float]]]:
        """By stage, what was logged while it trained: ``{"step", "loss", ...}``; empty where nothing is there."""
        return [_log(place / LOG_FILE) for place in self._stage_folders]

    @property
    def method(self) -> str:
        return str(self.records[-1].get("method") or self.about.get("method") or "")

    @property
    def seed(self) -> int | None:
        """Of the last stage's training."""
        found = self.records[-1].get("seed")
        return found if isinstance(found, int) else None

    @cached_property
    def slot_tasks(self) -> list[str]:
        """The task of each slot of the last stage, empty where its slots are not there any more."""
        file = self._stage_folders[-1] / SLOTS_FILE
        if not file.is_file():
            return []
        return [task.name for task in Pool.read(file).tasks for _ in range(task.count)]

    @property
    def question_file(self) -> Mapping[str, str]:
        """``{"path", "sha256"}`` of the test questions."""
        return self.matrix["provenance"]["question_file"]

    @cached_property
    def questions(self) -> list[Row]:
        """The rows that ``last`` answers, in its order; empty where the file is gone, or another one by now."""
        path = Path(str(self.question_file.get("path")))
        if not path.is_file() or file_sha256(path) != self.question_file["sha256"]:
            return []
        by_key = {row.key: row for row in read_rows(path)}
        keys = [(str(row.get("question_id")), row.get("position")) for row in self.last.rows]
        return [by_key[key] for key in keys] if all(key in by_key for key in keys) else []

    @property
    def image_folder(self) -> Folder | None:
        """Of the test questions; ``None`` for older runs, which don't say."""
        return opened_to_links(self.about.get("image_folder"), bool(self.about.get("follow_links")))

    @property
    def _stage_folders(self) -> list[Path]:
        return [self.folder.parent.parent / stage.name for stage in self.stages]


def _log(file: Path) -> list[dict[str, float]]:
    """The lines of a training log that hold a loss; nothing of a file that is no log."""
    lines = read_json(file, "training log") if file.is_file() else []
    known = [line for line in lines if isinstance(line, dict)] if isinstance(lines, list) else []
    return [
        {name: value for name, value in line.items() if _VALUE.fits(value)}
        for line in known
        if _PLACE.fits(line.get("step")) and _VALUE.fits(line.get("loss"))
    ]


def evaluations(output: str | Path) -> list[Path]:
    """The evaluations' folders that an argument names: itself, those under its ``eval``, or a benchmark's cells.

    Raises:
        UserError: there is none.
    """
    place = Path(output)
    if (place / MATRIX_NAME).is_file():
        return [place]
    found = sorted(place.glob(f"eval/*/{MATRIX_NAME}")) or sorted(place.glob(f"*/*/*/eval/*/{MATRIX_NAME}"))
    folders = [file.parent for file in found if file.relative_to(place).parts[0] != "trials"]
    if not folders:
        raise UserError(f"{place}: no {MATRIX_NAME} there, in eval/*, or in cells of a benchmark; evaluate first")
    return folders


def labels(folders: Sequence[Path]) -> list[str | None]:
    """Short names that tell folders apart, the parts in which their paths differ; none for a single one."""
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]
    if len(paths) < 2:
        return [None] * len(paths)
    columns = [column for column in itertools.zip_longest(*paths, fillvalue="") if len(set(column)) > 1]
    for column in columns[::-1]:  # what tells nothing that the others don't
        others = [other for other in columns if other is not column]
        if len(set(zip(*others))) == len(paths):
            columns = others
    return ["/".join(filter(None, parts)) for parts in zip(*columns)]
