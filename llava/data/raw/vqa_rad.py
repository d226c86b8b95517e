"""VQA-RAD as its authors published it: one JSON list, one object a question (doi 10.1038/sdata.2018.251).

The file's slips are mended here and noted in the report: qid 0 is a string, five answers are integers, tabs stand for
commas, ``"CLOSED "`` ends in a space, question types hold several labels, two spellings of OTHER, and typing slips.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.data.raw import RAW, Fused, RawDataset, Source
from llava.data.raw.example import TEST, TRAIN, Example, Report
from llava.data.raw.outputs import split_files
from llava.data.raw.splits import drop_repeats, unseen_split
from llava.data.rows import ANSWER_TYPES, json_values
from llava.files import file_sha256
from llava.utils import UserError, require_file

DOMAINS = ("abd", "chest", "head")
FILE_NAMES = ("VQA_RAD_Dataset_Public.json", "VQA_RAD Dataset Public.json")
PHRASE_TYPES = ("freeform", "para", "test_freeform", "test_para")
QUESTION_TYPE_SLIPS = {"ATRIB": "ATTRIB", "PRSE": "PRES"}
KEPT_FIELDS = ("phrase_type", "evaluation")
WHAT_TO_PLACE = (
    "place VQA_RAD_Dataset_Public.json and images/ in data/vqa-rad (python scripts/download_vqa_rad.py fetches them) "
    "or set VQA_RAD_DIR, or place metadata.csv with vqa_ABD.json, vqa_CHEST.json, vqa_HEAD.json in data/train"
)
FILES = ("train_vqa_rad_combined.jsonl", "train_{}.jsonl", "test_vqa_rad.jsonl")


@RAW.register
class VqaRad(RawDataset):
    """The authors' JSON: the official split without its leaks, and the split by picture in ``unseen/``."""

    name = "vqa-rad"
    title = "VQA-RAD"
    row_fields: ClassVar[tuple[str, ...]] = ("image_name", "image_organ")
    file_names: ClassVar[tuple[str, ...]] = FILE_NAMES
    variable, folder = "VQA_RAD_DIR", "data/vqa-rad"
    what_to_place = WHAT_TO_PLACE
    domains = DOMAINS
    report_name = "fusion_report.json"
    pairs = ((FILES[0], FILES[2]), (f"unseen/{FILES[0]}", f"unseen/{FILES[2]}"))

    def examples(self, source: Source, report: Report) -> list[Example]:
        return read_vqa_rad(source.path, report)

    def fuse(self, examples: Sequence[Example], domains: Sequence[str], seed: int, report: Report) -> Fused:
        official = drop_repeats(examples, report)
        unseen, fold_of = unseen_split(examples, seed)
        splits = {name: [row for row in official if row.split == name] for name in (TRAIN, TEST)}
        splits |= {f"unseen {name}": [row for row in unseen if row.split == name] for name in (TRAIN, TEST)}
        apart = split_files(unseen, domains, *FILES, fold_of)
        files = split_files(official, domains, *FILES) | {f"unseen/{name}": text for name, text in apart.items()}
        return Fused(files, splits)


def read_vqa_rad(path: Path, report: Report) -> list[Example]:
    """All examples of the authors' file, in its order, with the authors' split.

    Raises:
        UserError: missing, empty or broken file; a bad field, with its row; a qid used twice.
    """
    source = require_file(
        path, "VQA-RAD JSON", f"get it with: python scripts/download_vqa_rad.py, or place {FILE_NAMES[0]}"
    )
    report.inputs[str(path)] = file_sha256(source)
    examples = [_example(value, where, report) for where, value in json_values(source)]
    if not examples:
        raise UserError(f"{path}: the file holds no rows")
    seen: set[int | str] = set()
    for example in examples:
        if example.id in seen:
            raise UserError(f"{path}: qid {example.id} is used twice")
        seen.add(example.id)
    return examples


def _example(value: Any, where: str, report: Report) -> Example:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}")
    qid = integer_id(value.get("qid"), f"{where}: field 'qid'", report)
    where = f"{where} (qid {qid})"
    phrase_type = _phrase_type(value.get("phrase_type"), where)
    return Example(
        id=qid,
        image=report.text(value.get("image_name"), "image_name", qid, where),
        question=report.text(value.get("question"), "question", qid, where),
        answer=report.text(value.get("answer"), "answer", qid, where),
        domain=organ(value.get("image_organ"), where),
        split=TEST if phrase_type.startswith("test_") else TRAIN,
        answer_type=answer_type(value.get("answer_type"), qid, where, report),
        question_type=question_types(value.get("question_type"), qid, report),
        links=_case_links(value.get("image_case_url")),
        extra={name: value[name] for name in KEPT_FIELDS if isinstance(value.get(name), str)},
    )


def integer_id(value: Any, where: str, report: Report) -> int:
    """A question id as an integer; one that was written as a string is noted as mended."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,18}\s*", value):
        report.mend("qid: string read as number", int(value))
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where}: expected a whole number, found {value!r}")
    return value


def organ(value: Any, where: str) -> str:
    """The task name of an ``image_organ``."""
    name = value.strip().lower() if isinstance(value, str) else value
    if name not in DOMAINS:
        raise UserError(f"{where}: field 'image_organ': expected one of {', '.join(DOMAINS).upper()}, found {value!r}")
    return name


def answer_type(value: Any, row_id: int | str, where: str, report: Report) -> str:
    """``"OPEN"`` or ``"CLOSED"``, a trailing space or another case mended."""
    kind = value.strip().upper() if isinstance(value, str) else value
    if kind not in ANSWER_TYPES:
        raise UserError(f"{where}: field 'answer_type': expected OPEN or CLOSED, found {value!r}")
    if kind != value:
        report.mend("answer_type: spelling", row_id)
    return kind


def question_types(value: Any, row_id: int | str, report: Report) -> tuple[str, ...]:
    """The labels of a ``question_type``: ``"POS, PRES"`` is two, ``"ATRIB"`` is ATTRIB, ``"Other"`` is OTHER."""
    if not isinstance(value, str) or not value.strip() or value.strip().upper() == "NULL":
        return ()
    labels = []
    for part in re.split(r"[,;/]", value):
        label = QUESTION_TYPE_SLIPS.get(part.strip().upper(), part.strip().upper())
        if label != part.strip():
            report.mend("question_type: spelling", row_id)
        if label and label not in labels:
            labels.append(label)
    return tuple(labels)


def _phrase_type(value: Any, where: str) -> str:
    name = value.strip() if isinstance(value, str) else value
    if name in PHRASE_TYPES:
        return name
    hint = ""
    if name == "frame":
        hint = " (this looks like the community file trainset.json, which holds templated copies of the test questions;"
        hint += f" use the authors' {FILE_NAMES[0]})"
    raise UserError(f"{where}: field 'phrase_type': expected one of {', '.join(PHRASE_TYPES)}, found {value!r}{hint}")


def _case_links(value: Any) -> tuple[str, ...]:
    return (value.strip(),) if isinstance(value, str) and value.strip() not in ("", "NULL") else ()
