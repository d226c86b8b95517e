"""What one evaluated run leaves, read from its folder: matrix, scores, answers, routes, training logs, settings.

A folder is an evaluation's, ``output/eval/<name>``. The stages lie two levels above it where they are still there; the
pictures where the evaluation's record says. Whatever is missing is ``None`` or empty, and the page does without it; so
it does without a file that cannot be read, which it names (``Results.left_out``). The accuracy matrix alone is needed.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from llava.checkpoints.kinds import SLOTS_FILE, TRAINING_FILE
from llava.continual.record import read_record
from llava.continual.run import LOG_FILE
from llava.data.answers import read_answers
from llava.data.rows import Row, read_rows
from llava.eval.accuracy_matrix import MATRIX_NAME
from llava.eval.eval_video_qa import SCORES_NAME
from llava.eval.evaluation import Evaluation
from llava.eval.evaluation_record import EVALUATION_NAME, read_evaluation_record
from llava.eval.metrics.base import OVERALL
from llava.eval.over_seeds import read_matrix
from llava.eval.result_pages import OWN
from llava.eval.score_schema import read_scores
from llava.files import file_sha256
from llava.inside import Folder, inside, opened_to_links
from llava.outside import kind_of, read_json
from llava.schema import an_object, check_fields, list_of, number, whole, words
from llava.slots.pool import Pool
from llava.utils import UserError

Found = TypeVar("Found")
ANSWERS_NAME = "answers.jsonl"
_NO_SCORES: Mapping[str, Any] = {"groups": {OVERALL: {"rows": 0, "figures": {}}}, "provenance": {}}
_PLACE, _VALUE = whole(0), number()
_ROUTE = {"slots": list_of(_PLACE), "weights": list_of(_VALUE), "novelty": _VALUE}
_MATRIX = {"stages": list_of(words(empty=False)), "provenance": an_object({"question_file": an_object()})}


@dataclass(frozen=True)
class Damage:
    """A file that cannot be read: ``file`` as it is told on the page, ``error`` with its whole path."""

    file: str
    error: str


def read_or_leave(left: list[Damage], file: Path, read: Callable[[Path], Found], otherwise: Found) -> Found:
    """What a file holds; of one that cannot be read ``otherwise``, and its damage is added to ``left``."""
    try:
        return read(file)
    except UserError as error:
        left.append(Damage(f"{file.parent.name}/{file.name}", str(error)))
        return otherwise


@dataclass(frozen=True)
class Scored:
    """One model's answers and what they are worth.

    Attributes:
        name: its folder's. scores: what ``scores.json`` holds. rows: the lines of ``rows.jsonl``, none where they or
            the scores cannot be read.
        metadata: each row's, as its answer has it; empty where the answers are not there.
    """

    name: str
    scores: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    metadata: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, file: Path, left: list[Damage]) -> Scored:
        """A scores file, and what lies beside it; ``left`` gets what cannot be read."""
        none: tuple[Mapping[str, Any], list[dict[str, Any]]] = (_NO_SCORES, [])
        scores, rows = read_or_leave(left, file, _scores_and_rows, none)
        answers_file = file.with_name(ANSWERS_NAME)
        metadata: list[Mapping[str, Any]] = []
        if rows and answers_file.exists():
            metadata = read_or_leave(left, answers_file, lambda found: _metadata(found, rows), metadata)
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
        left: files that could not be read so far.
    """

    folder: Path
    label: str
    matrix: Mapping[str, Any]
    stages: Sequence[Scored]
    zero_shot: Scored | None
    about: Mapping[str, Any]
    alone: bool = True
    left: list[Damage] = field(default_factory=list)

    @classmethod
    def read(cls, folder: str | Path, label: str | None = None) -> Results:
        """The run of an evaluation's folder.

        Raises:
            UserError: there is no accuracy matrix, or it is broken.
        """
        place = Path(folder)
        matrix = read_matrix(place)
        check_fields(matrix, _MATRIX, str(place / MATRIX_NAME), False, tuple(_MATRIX))
        left: list[Damage] = []
        stages = [Scored.read(inside(place, f"{name}/{SCORES_NAME}", MATRIX_NAME), left) for name in matrix["stages"]]
        if len(stages) != len(matrix["tasks"]):
            raise UserError(f"{place / MATRIX_NAME}: {len(stages)} stages for {len(matrix['tasks'])} tasks")
        base = place / Evaluation.ZERO_SHOT / SCORES_NAME
        zero_shot = Scored.read(base, left) if matrix.get("zero_shot_model") and base.exists() else None
        zero_shot = zero_shot if zero_shot and zero_shot.rows else None
        record = place / EVALUATION_NAME
        about: dict[str, Any] = {}
        if record.exists():
            about = read_or_leave(left, record, read_evaluation_record, about)
        return cls(place, label or place.name, matrix, stages, zero_shot, about, label is None, left)

    @property
    def left_out(self) -> list[Damage]:
        """Every file that is there, or was promised by the matrix, and cannot be read."""
        _ = self.records, self.logs, self.slot_tasks
        return list(self.left)

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
        return [read_or_leave(self.left, file, read_record, {}) if file.exists() else {} for file in files]

    @cached_property
    def logs(self) -> list[list[dict[str, float]]]:
        """By stage, what was logged while it trained: ``{"step", "loss", ...}``; empty where nothing is there."""
        files = [place / LOG_FILE for place in self._stage_folders]
        return [read_or_leave(self.left, file, _log, []) if file.exists() else [] for file in files]

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
        return read_or_leave(self.left, file, _slot_tasks, []) if file.exists() else []

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


def check_route(metadata: Any, where: str) -> None:
    """Refuse an answer's metadata whose route is none that could be shown: other programs write answers too.

    Raises:
        UserError: which part of it.
    """
    check_fields(metadata, {"route": an_object({"task_posterior": an_object()})}, where, False)
    route = metadata.get("route") or {}
    posterior = route.get("task_posterior") or {}
    check_fields(route, _ROUTE, f"{where}: route", False)
    check_fields(posterior, dict.fromkeys(posterior, _VALUE), f"{where}: task_posterior", needed=tuple(posterior))


def _scores_and_rows(file: Path) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
    scores, rows = read_scores(file)
    if OVERALL not in scores["groups"] or not rows:
        raise UserError(f"{file}: holds no scores of all questions; score again")
    return scores, rows


def _metadata(file: Path, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What the answers tell beside their text, one for each scored row."""
    answers = read_answers(file)
    if [answer["question_id"] for answer in answers] != [row.get("question_id") for row in rows]:
        raise UserError(f"{file}: not the answers that {SCORES_NAME} was made of; score them again")
    metadata = [answer.get("metadata") or {} for answer in answers]
    for line, found in enumerate(metadata, start=1):
        check_route(found, f"{file}: line {line}")
    return metadata


def _slot_tasks(file: Path) -> list[str]:
    return [task.name for task in Pool.read(file).tasks for _ in range(task.count)]


def _log(file: Path) -> list[dict[str, float]]:
    """The lines of a training log that hold a loss.

    Raises:
        UserError: it is no log.
    """
    lines = read_json(file, "training log")
    if not isinstance(lines, list):
        raise UserError(f"{file}: expected a JSON list, found {kind_of(lines)}")
    known = [line for line in lines if isinstance(line, dict)]
    return [
        {name: value for name, value in line.items() if _VALUE.fits(value)}
        for line in known
        if _PLACE.fits(line.get("step")) and _VALUE.fits(line.get("loss"))
    ]


def evaluations(output: str | Path) -> list[Path]:
    """The evaluations' folders that an argument names: itself, those under its ``eval``, or a benchmark's cells, the
    project's own method first: the first is what others are compared with.

    Raises:
        UserError: there is none.
    """
    place = Path(output)
    if (place / MATRIX_NAME).is_file():
        return [place]
    found = sorted(place.glob(f"eval/*/{MATRIX_NAME}"))
    if not found:
        cells = ((file.relative_to(place).parts[0], file) for file in place.glob(f"*/*/*/eval/*/{MATRIX_NAME}"))
        found = [file for run, file in sorted(cells, key=lambda one: (one[0] != OWN, one)) if run != "trials"]
    folders = [file.parent for file in found]
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
