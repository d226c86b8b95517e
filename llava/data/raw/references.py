"""Reference rows that tell the organ of a csv's questions: ``vqa_<ORGAN>.json``, or the authors' own file.

Besides the organ they give answer type and question type where the joined references agree, and the official split
where the csv keeps the authors' image names.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.data.raw.example import TEST, Example, Report
from llava.data.raw.organ_join import LISTED, OPEN, Reference, ReferenceIndex, join_organs
from llava.data.raw.text import mend_text
from llava.data.raw.vqa_rad import question_types
from llava.data.rows import ANSWER_TYPES, json_values
from llava.files import file_sha256
from llava.normal_form import normalise
from llava.utils import UserError, require_file

REFERENCE_NAME = re.compile(r"vqa_(?!rad[_ ])(\w+)\.json", re.IGNORECASE)


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
        organ = named.group(1).lower() if named else None
        found = [_reference(value, where, organ) for where, value in json_values(source)]
        if not found:
            raise UserError(f"{path}: the file holds no rows")
        references.extend(found)
    return references


def fill_from_references(
    examples: Sequence[Example], references: Sequence[Reference], split_is_known: bool, report: Report
) -> list[Example]:
    """Give each example its organ, and what else the references tell.

    Args:
        examples: with ``picture`` set where the files are there, because an export may hold one copy of a picture for
            each of its questions. A domain that is already set stays.
        references: rows whose organ is known.
        split_is_known: the csv said the split; it is not taken from the references then.

    Returns:
        The examples whose organ is known; the open ones are left out, and listed in ``report.organ_join``.
    """
    index = ReferenceIndex(references)
    rows = [(example.picture or example.image, example.question, example.answer) for example in examples]
    counts: Counter[str] = Counter()
    kept, listed = [], []
    for example, decision in zip(examples, join_organs(rows, index), strict=True):
        organ = example.domain or decision.organ
        if example.domain is None:
            counts[decision.how] += 1
            if decision.how in LISTED:
                row: dict[str, Any] = {"question_id": example.id, "image": example.image}
                row |= {"question": example.question, "answer": example.answer, "organ": organ, "how": decision.how}
                listed.append(row | {"candidates": list(decision.candidates)})
        if organ is not None:
            kept.append(_filled(example, organ, index))
    report.organ_join = {"counts": dict(counts), "listed": listed}
    if listed:
        report.notes.append(
            f"{len(listed)} rows did not join by question and answer alone or with their picture's other questions; "
            f"{counts[OPEN]} of them stay open and are left out; the report lists all under organ_join"
        )
    return kept if split_is_known else _official_split(kept, references)


def _reference(value: Any, where: str, organ: str | None) -> Reference:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}")
    own = value.get("image_organ")
    own = own.strip().lower() if isinstance(own, str) and own.strip() else None
    if organ is None and own is None:
        raise UserError(f"{where}: no organ: name the file vqa_<ORGAN>.json, or give each row an 'image_organ'")
    if organ and own and organ != own:
        raise UserError(f"{where}: field 'image_organ' is {own!r}, but the file name says {organ!r}")
    if own and not re.fullmatch(r"[\w-]{1,60}", own):
        raise UserError(f"{where}: field 'image_organ': expected one word, found {own[:60]!r}")
    question, _ = mend_text(value.get("question"), f"{where}: field 'question'")
    answer, _ = mend_text(value.get("answer"), f"{where}: field 'answer'")
    return Reference(str(organ or own), question, answer, value)


def _filled(example: Example, organ: str, index: ReferenceIndex) -> Example:
    matches = [match for match in index.matches(example.question, example.answer) if match.organ == organ]
    same_image = [match for match in matches if match.fields.get("image_name") == example.image]
    matches = same_image or matches
    kinds = {str(match.fields.get("answer_type", "")).strip().upper() for match in matches} & set(ANSWER_TYPES)
    if len(kinds) != 1 and normalise(example.answer) in ("yes", "no"):
        kinds = {"CLOSED"}  # VQA-RAD has no open question whose answer is yes or no
    labels = {question_types(match.fields.get("question_type"), example.id, Report("unused")) for match in matches}
    return dataclasses.replace(
        example,
        domain=organ,
        answer_type=example.answer_type or (kinds.pop() if len(kinds) == 1 else None),
        question_type=example.question_type or (labels.pop() if len(labels) == 1 else ()),
    )


def _official_split(examples: list[Example], references: Sequence[Reference]) -> list[Example]:
    """Examples with the references' split, if each one finds its own reference row, its image name included.

    Question and answer alone do not tell the split: "Is the trachea midline?" is asked in both. So it is all or none.
    A row that is both in train and in test (qid 422 and 447) is told by counting: in the references' order where the
    csv has all of them, else the test rows are those that were kept.
    """
    is_test: dict[tuple[str, str, str], list[bool]] = {}
    for reference in references:
        phrase_type, image = reference.fields.get("phrase_type"), reference.fields.get("image_name")
        if isinstance(phrase_type, str) and isinstance(image, str):
            key = image, normalise(reference.question), normalise(reference.answer)
            is_test.setdefault(key, []).append(phrase_type.startswith("test_"))
    keys = [(example.image, normalise(example.question), normalise(example.answer)) for example in examples]
    counts = Counter(keys)
    if not all(key in is_test and count <= len(is_test[key]) for key, count in counts.items()):
        return examples
    left = {
        key: iter(is_test[key] if count == len(is_test[key]) else sorted(is_test[key])[-count:])
        for key, count in counts.items()
    }
    return [
        dataclasses.replace(example, split=TEST) if next(left[key]) else example
        for example, key in zip(examples, keys, strict=True)
    ]
