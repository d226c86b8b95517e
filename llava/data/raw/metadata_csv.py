"""The csv form of VQA-RAD: ``metadata.csv`` (picture, question, answer) and references that give the organ.

The csv is what an export of the Hugging Face copy holds; that copy lacks the organ, the answer type and the picture's
name. Optional columns are ``split`` (train or test), ``question_id``, ``answer_type``, ``question_type`` and
``domain``. References are ``vqa_<ORGAN>.json`` (rows of the authors' file, one organ a file), or the authors' file
itself.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.data.raw.example import TEST, TRAIN, Example, Report
from llava.data.raw.organ_join import LISTED, OPEN, Reference, ReferenceIndex, join_organs
from llava.data.raw.text import mend_text
from llava.data.raw.vqa_rad import answer_type, question_types
from llava.data.rows import ANSWER_TYPES, json_values
from llava.utils import UserError, file_sha256, require_file

if TYPE_CHECKING:
    import pandas

COLUMNS = {
    "image": ("image", "file_name", "image_name", "image_file", "filename", "img_name"),
    "question": ("question", "text"),
    "answer": ("answer", "gpt4_answer"),
    "split": ("split",),
    "question_id": ("question_id", "qid", "id"),
    "answer_type": ("answer_type",),
    "question_type": ("question_type",),
    "domain": ("domain", "image_organ", "organ"),
}
REQUIRED = ("image", "question", "answer")
SPLITS = {"train": TRAIN, "test": TEST}
REFERENCE_NAME = re.compile(r"vqa_(\w+)\.json", re.IGNORECASE)


def read_metadata(path: Path, report: Report, split: str | None = None, first_id: int = 0) -> list[Example]:
    """Examples of one csv; ``domain`` stays None where the csv does not give it.

    Args:
        path: the csv, with a header line.
        split: the split of all rows; None takes the ``split`` column, or leaves ``TRAIN`` where there is none.
        first_id: question ids count from here when the csv has no ``question_id`` column.

    Raises:
        UserError: missing, empty or broken csv; an unknown header; an empty (NaN) field, with its line.
    """
    table, columns = _read_table(path)
    report.inputs[str(path)] = file_sha256(path)
    lines = _line_numbers(table)
    examples = []
    for number, cells in enumerate(table.itertuples(index=False)):
        if not any(cell.strip() for cell in cells):
            continue
        values = {name: cells[position].strip() for name, position in columns.items()}
        examples.append(_example(values, f"{path} line {lines[number]}", split, first_id + len(examples), report))
    if not examples:
        raise UserError(f"{path}: the file holds a header but no rows")
    return examples


def has_split_column(path: Path) -> bool:
    """Whether the csv says which rows are test rows."""
    return "split" in _read_table(path)[1]


def read_references(paths: Sequence[Path], report: Report) -> list[Reference]:
    """Rows whose organ is known: from the name of a ``vqa_<ORGAN>.json``, or from each row's ``image_organ``.

    Raises:
        UserError: a missing, empty or broken file; a row without question or answer, or without an organ.
    """
    references = []
    for path in paths:
        source = require_file(path, "reference JSON", "name the files with --reference vqa_ABD.json vqa_CHEST.json …")
        report.inputs[str(path)] = file_sha256(source)
        named = REFERENCE_NAME.fullmatch(path.name)
        organ = named.group(1).lower() if named and not named.group(1).lower().startswith("rad_") else None
        found = [_reference(value, where, organ) for where, value in json_values(source)]
        if not found:
            raise UserError(f"{path}: the file holds no rows")
        references.extend(found)
    return references


def fill_from_references(
    examples: list[Example],
    references: Sequence[Reference],
    split_is_known: bool,
    report: Report,
) -> list[Example]:
    """Give each example its organ, and where the joined references agree, answer type, question type and split.

    Args:
        examples: with ``picture`` set where the files are there, because an export may hold one copy of a picture for
            each of its questions.
        references: rows whose organ is known.
        split_is_known: the csv said the split; it is not taken from the references then.

    Returns:
        The examples whose organ is known; the open ones are left out, and listed in ``report.organ_join``.
    """
    index = ReferenceIndex(references)
    rows = [(example.picture or example.image, example.question, example.answer) for example in examples]
    kept, counts, listed = [], {}, []
    for example, decision in zip(examples, join_organs(rows, index), strict=True):
        counts[decision.how] = counts.get(decision.how, 0) + 1
        if decision.how in LISTED:
            row = {"question_id": example.id, "image": example.image, "question": example.question}
            row |= {"answer": example.answer, "organ": decision.organ, "how": decision.how}
            listed.append(row | {"candidates": list(decision.candidates)})
        organ = example.domain or decision.organ
        if organ is not None:
            kept.append(_filled(example, organ, index, split_is_known))
    report.organ_join = {"counts": counts, "listed": listed}
    if counts.get(OPEN):
        report.notes.append(
            f"{counts[OPEN]} rows have no certain organ and are left out; the report lists them under organ_join"
        )
    return kept


def _read_table(path: Path) -> tuple[pandas.DataFrame, dict[str, int]]:
    """The csv as text cells, and field -> column position."""
    import pandas

    require_file(path, "metadata csv", "export one with columns image, question, answer")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            # Text as it stands: pandas would read the answers "None" and "NA" as missing. Blank lines are kept so
            # that line numbers are right; index_col=False keeps a row that is too long from shifting the columns.
            table = pandas.read_csv(
                path, dtype=str, keep_default_na=False, skip_blank_lines=False, encoding="utf-8-sig", index_col=False
            )
    except pandas.errors.EmptyDataError as error:
        raise UserError(f"{path}: the file is empty (expected a header with image, question, answer)") from error
    except (pandas.errors.ParserError, pandas.errors.ParserWarning) as error:
        raise UserError(f"{path}: broken csv ({' '.join(str(error).split())})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start} (save the file as UTF-8)") from error
    table = table.fillna("")
    names = [str(name).strip().lower() for name in table.columns]
    columns = {}
    for field, choices in COLUMNS.items():
        position = next((names.index(choice) for choice in choices if choice in names), None)
        if position is None and field in REQUIRED:
            raise UserError(f"{path} line 1: no column for '{field}' ({' or '.join(choices)}) in: {', '.join(names)}")
        if position is not None:
            columns[field] = position
    return table, columns


def _line_numbers(table: pandas.DataFrame) -> list[int]:
    """The line in the file at which each record starts (a quoted cell may span several)."""
    numbers, line = [], 2
    for cells in table.itertuples(index=False):
        numbers.append(line)
        line += 1 + sum(cell.count("\n") for cell in cells)
    return numbers


def _example(values: dict[str, str], where: str, split: str | None, number: int, report: Report) -> Example:
    for field in REQUIRED:
        if values[field].lower() in ("", "nan"):
            raise UserError(f"{where}: field '{field}' is empty")
    identifier: int | str = values.get("question_id") or number
    if isinstance(identifier, str) and re.fullmatch(r"\d{1,18}", identifier):
        identifier = int(identifier)
    kind = values.get("answer_type")
    return Example(
        id=identifier,
        image=values["image"],
        question=report.text(values["question"], "question", identifier, where),
        answer=report.text(values["answer"], "answer", identifier, where),
        domain=_domain(values.get("domain"), where),
        split=split or _split(values.get("split"), where),
        answer_type=answer_type(kind, identifier, where, report) if kind else None,
        question_type=question_types(values.get("question_type"), identifier, report),
    )


def _domain(value: str | None, where: str) -> str | None:
    if not value:
        return None
    if not re.fullmatch(r"[\w-]+", value):
        raise UserError(f"{where}: field 'domain': expected one word, found {value!r}")
    return value.lower()


def _split(value: str | None, where: str) -> str:
    if value is None:
        return TRAIN
    if value.lower() not in SPLITS:
        raise UserError(f"{where}: field 'split': expected train or test, found {value!r}")
    return SPLITS[value.lower()]


def _reference(value: Any, where: str, organ: str | None) -> Reference:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}")
    own = value.get("image_organ")
    own = own.strip().lower() if isinstance(own, str) and own.strip() else None
    if organ is None and own is None:
        raise UserError(f"{where}: no organ: name the file vqa_<ORGAN>.json, or give each row an 'image_organ'")
    if organ and own and organ != own:
        raise UserError(f"{where}: field 'image_organ' is {own!r}, but the file name says {organ!r}")
    question, _ = mend_text(value.get("question"), f"{where}: field 'question'")
    answer, _ = mend_text(value.get("answer"), f"{where}: field 'answer'")
    return Reference(organ or own, question, answer, value)


def _filled(example: Example, organ: str, index: ReferenceIndex, split_is_known: bool) -> Example:
    matches = [match for match in index.matches(example.question, example.answer) if match.organ == organ]
    same_image = [match for match in matches if match.fields.get("image_name") == example.image]
    matches = same_image or matches
    phrase_types = {str(match.fields.get("phrase_type", "")) for match in matches}
    is_test = bool(phrase_types) and all(name.startswith("test_") for name in phrase_types)
    kinds = {str(match.fields.get("answer_type", "")).strip().upper() for match in matches} & set(ANSWER_TYPES)
    if len(kinds) != 1 and example.answer.strip(" .").lower() in ("yes", "no"):
        kinds = {"CLOSED"}  # VQA-RAD has no open question whose answer is yes or no
    labels = {question_types(match.fields.get("question_type"), example.id, Report("unused")) for match in matches}
    return dataclasses.replace(
        example,
        domain=organ,
        split=TEST if is_test and not split_is_known else example.split,
        answer_type=example.answer_type or (kinds.pop() if len(kinds) == 1 else None),
        question_type=example.question_type or (labels.pop() if len(labels) == 1 else ()),
    )
