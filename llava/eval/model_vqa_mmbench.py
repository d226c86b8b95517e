"""LLaVA's ``model_vqa_mmbench``: multiple choice from MMBench's table, whose rows hold their picture.

    python -m llava.eval.model_vqa_mmbench --model-path MODEL --question-file mmbench_dev_en.tsv \\
        --answers-file answers.jsonl --single-pred-prompt

The table (tab-separated) has the columns ``index``, ``question``, ``A`` to ``D``, ``image`` (base64) and optionally
``hint``; other columns are not read. ``--all-rounds`` asks each question once for every rotation of its options. The
engine and the flags of ``model_vqa_loader``, with LLaVA's defaults: temperature 0.2, up to 1024 new tokens, one
question at a time. An answer row has LLaVA's ``round_id``, ``options`` and ``option_char`` beside the usual fields.
"""

from __future__ import annotations

import base64
import csv
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava.cli import filled, flag
from llava.data.jsonl import write_jsonl
from llava.eval import model_vqa_loader
from llava.eval.model_vqa import DEFAULTS
from llava.eval.model_vqa_science import LETTER_ONLY
from llava.utils import UserError, require_file, run_cli

OPTIONS = ("A", "B", "C", "D")
LETTER_PROMPTS = {"en": LETTER_ONLY, "cn": "请直接回答选项字母。"}
NEEDED = ("index", "question", "A", "B", "image")
_NO_TEXT = re.compile("[\ud800-\udfff]")  # what bytes that are no UTF-8 become
CARRIED = ("round_id", "options", "option_char")


@dataclass(kw_only=True)
class Arguments(model_vqa_loader.Arguments):
    """The loader's flags, and how options are put."""

    all_rounds: bool = flag(False, "ask once for every rotation of the options")
    single_pred_prompt: bool = flag(False, "ask for the option's letter and nothing else")
    lang: str = flag("en", "language of --single-pred-prompt", choices=tuple(LETTER_PROMPTS))


def main(argv: Sequence[str] | None = None) -> None:
    """Answer one chunk of the table."""
    eval_model(model_vqa_loader.parse_arguments(argv, Arguments, __doc__, **DEFAULTS))


def eval_model(args: Any) -> None:
    """The same from Python: ``args`` is any object with some of the flags as attributes."""
    arguments = filled(Arguments, args, **DEFAULTS)
    if arguments.single_pred_prompt:
        arguments.answer_suffix = LETTER_PROMPTS[arguments.lang]
    with tempfile.TemporaryDirectory(prefix="mmbench-") as folder:
        questions = Path(folder) / "questions.jsonl"
        write_jsonl(questions, question_rows(arguments.question_file, Path(folder), arguments.all_rounds))
        arguments.question_file, arguments.image_folder = str(questions), folder
        model_vqa_loader.write(replace(model_vqa_loader.chunk_of(arguments), carried=CARRIED))


def question_rows(table: str, folder: Path, all_rounds: bool) -> Iterator[dict[str, Any]]:
    """Question rows of MMBench's table; their pictures are written into ``folder``.

    Raises:
        UserError: naming the row, where a column is missing or a picture is not base64; no table, or none in UTF-8.
    """
    csv.field_size_limit(sys.maxsize)  # a picture is one field
    source = require_file(table, "table of questions", "check the path")
    with open(source, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        for number, row in enumerate(csv.DictReader(stream, delimiter="\t"), start=1):
            if any(_NO_TEXT.search(value) for value in row.values() if isinstance(value, str)):
                raise UserError(f"{table} row {number}: not UTF-8 (save the file as UTF-8)")
            lacking = [name for name in NEEDED if _is_none(row.get(name))]
            if lacking:
                raise UserError(f"{table} row {number}: column {lacking[0]!r} is missing or empty")
            picture = f"{number}.jpg"
            (folder / picture).write_bytes(_decoded(row["image"], f"{table} row {number}"))
            for turn in range(len(_options(row)) if all_rounds else 1):
                yield _question(row, picture, turn)


def _question(row: dict[str, str], picture: str, turn: int) -> dict[str, Any]:
    """One round: the letters stay in their order, the options are rotated by ``turn``."""
    options = _options(row)
    letters = list(OPTIONS[: len(options)])
    shown = options[turn:] + options[:turn]
    lines = [] if _is_none(row.get("hint")) else [row["hint"]]
    lines += [row["question"], *(f"{letter}. {option}" for letter, option in zip(letters, shown, strict=True))]
    index = row["index"]
    return {
        "question_id": int(index) if index.isdecimal() else index,
        "image": picture,
        "text": "\n".join(lines),
        "round_id": turn,
        "options": shown,
        "option_char": letters[turn:] + letters[:turn],
    }


def _options(row: dict[str, str]) -> list[str]:
    values = [row.get(letter) for letter in OPTIONS]
    count = next((place for place, value in enumerate(values) if _is_none(value)), len(values))
    return [str(value) for value in values[:count]]


def _is_none(value: str | None) -> bool:
    return value is None or value.lower() in ("", "nan", "none")


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)  # it may be broken into lines
    except ValueError as error:
        raise UserError(f"{where}: column 'image' is no base64 text ({error})") from error


if __name__ == "__main__":
    run_cli(main)
