"""The csv form of VQA-RAD: ``metadata.csv`` with picture, question and answer.

The csv is what an export of the Hugging Face copy holds; that copy lacks the organ, the answer type and the picture's
name. Optional columns are ``split`` (train or test), ``question_id``, ``answer_type``, ``question_type`` and
``domain``.
"""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from llava.data.layouts import is_missing
from llava.data.raw.example import TEST, TRAIN, Example, Report
from llava.data.raw.vqa_rad import answer_type, question_types
from llava.files import file_sha256
from llava.utils import UserError, require_file

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
    examples: list[Example] = []
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
        if not values[field] or is_missing(values[field]):
            raise UserError(f"{where}: field '{field}' is empty")
    identifier: int | str = values.get("question_id") or number
    if isinstance(identifier, str) and re.fullmatch(r"\d{1,18}", identifier):
        identifier = int(identifier)
    kind = values.get("answer_type")
    return Example(
        id=identifier,
        image=_picture_name(values["image"], where),
        question=report.text(values["question"], "question", identifier, where),
        answer=report.text(values["answer"], "answer", identifier, where),
        domain=_domain(values.get("domain"), where),
        split=split or _split(values.get("split"), where),
        answer_type=answer_type(kind, identifier, where, report) if kind else None,
        question_type=question_types(values.get("question_type"), identifier, report),
    )


def _picture_name(cell: str, where: str) -> str:
    """The file name in a picture's cell; ``datasets`` and pandas write ``{'bytes': …, 'path': …}`` there."""
    if not cell.startswith("{"):
        return cell
    try:
        picture = ast.literal_eval(cell)
        named = picture.get("path") if not picture.get("bytes") else None
    except (ValueError, SyntaxError, AttributeError, TypeError, MemoryError, RecursionError):
        named = None
    if isinstance(named, str) and named.strip():
        return named.strip()
    raise UserError(
        f"{where}: field 'image': the picture itself stands in the cell, not its file's name (save the pictures as "
        "files, and name them in the column)"
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
