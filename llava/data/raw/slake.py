"""SLAKE's English rows, the imaging modality as the task (arXiv 2102.09542).

The Chinese rows were split separately, so mixing the languages would put test pictures into training: they are left
out. A row with an empty answer (qid 1622) is dropped, and rows that repeat another one are listed and kept, so that
the counts stay the published ones.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from llava.data.raw import RAW, RawDataset, RawOptions, Source
from llava.data.raw.example import TEST, TRAIN, VALIDATE, Example, Report
from llava.data.raw.vqa_rad import answer_type, integer_id
from llava.data.rows import json_values
from llava.files import file_sha256
from llava.utils import UserError, require_file

DOMAINS = ("ct", "mri", "xray")
SPLIT_FILES = {TRAIN: "train.json", VALIDATE: "validate.json", TEST: "test.json"}
IMAGE_FOLDERS = ("imgs", "images")


@RAW.register
class Slake(RawDataset):
    """The folder with the three JSONs; its files start with ``slake_`` so that VQA-RAD's stay as they are."""

    name = "slake"
    title = "SLAKE"
    row_fields = ("img_name", "modality")
    file_names = (SPLIT_FILES[TRAIN],)
    image_folders = IMAGE_FOLDERS
    what_to_place = "place train.json, validate.json, test.json and imgs/ in data/slake or set SLAKE_DIR"
    domains = DOMAINS

    def source(self, file: Path, options: RawOptions) -> Source:
        """The folder: its three files are read together."""
        return Source(self.name, file.parent, self.pictures(file.parent, options))

    def default(self, options: RawOptions) -> Source | None:
        """The folder itself, so that a file that lacks in it is named when it is read."""
        folder = Path(os.environ.get("SLAKE_DIR") or "data/slake")
        return Source(self.name, folder, self.pictures(folder, options)) if folder.is_dir() else None

    def examples(self, source: Source, report: Report) -> list[Example]:
        return read_slake(source.path, report)


def read_slake(folder: Path, report: Report) -> list[Example]:
    """The English examples of ``train.json``, ``validate.json`` and ``test.json`` in ``folder``.

    Raises:
        UserError: a missing, empty or broken file; a bad field, with its row; a qid used twice; a picture in two
            splits.
    """
    examples: list[Example] = []
    for split, name in SPLIT_FILES.items():
        source = require_file(folder / name, "SLAKE file", "place train.json, validate.json, test.json and imgs/ there")
        report.inputs[str(folder / name)] = file_sha256(source)
        found = [_example(value, where, split, report) for where, value in json_values(source)]
        if not any(found):
            raise UserError(f"{folder / name}: the file holds no English row with an answer")
        examples.extend(example for example in found if example is not None)
    _check(examples, folder)
    first: dict[tuple[str, str, str], Example] = {}
    for example in examples:
        original = first.setdefault(example.content(), example)
        if original is not example:
            report.repeat(example, original.id)
    return examples


def _example(value: Any, where: str, split: str, report: Report) -> Example | None:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}")
    if value.get("q_lang", "en") != "en":
        return None
    qid = integer_id(value.get("qid"), f"{where}: field 'qid'", report)
    where = f"{where} (qid {qid})"
    answer = value.get("answer")
    empty = isinstance(answer, str) and not answer.strip()
    example = Example(
        id=qid,
        image=report.text(value.get("img_name"), "img_name", qid, where),
        question=report.text(value.get("question"), "question", qid, where),
        answer="" if empty else report.text(answer, "answer", qid, where),
        domain=_modality(value.get("modality"), where),
        split=split,
        answer_type=answer_type(value.get("answer_type"), qid, where, report),
        question_type=(value["content_type"],) if isinstance(value.get("content_type"), str) else (),
        extra={name: value[name] for name in ("location", "base_type") if isinstance(value.get(name), str)},
    )
    if empty:
        report.drop(example, "empty answer")
        return None
    return example


def _modality(value: Any, where: str) -> str:
    name = re.sub(r"[^a-z]", "", value.lower()) if isinstance(value, str) else value
    if name not in DOMAINS:
        raise UserError(f"{where}: field 'modality': expected CT, MRI or X-Ray, found {value!r}")
    return name


def _check(examples: list[Example], folder: Path) -> None:
    ids: set[int | str] = set()
    split_of: dict[str, str] = {}
    for example in examples:
        if example.id in ids:
            raise UserError(f"{folder}: qid {example.id} is used twice")
        ids.add(example.id)
        if split_of.setdefault(example.image, example.split) != example.split:
            raise UserError(f"{folder}: picture {example.image} is in {split_of[example.image]} and in {example.split}")
