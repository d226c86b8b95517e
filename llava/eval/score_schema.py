"""What is asked of the files of scores that an accuracy matrix is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava.data.answers import CHECKSUM
from llava.data.jsonl import json_values
from llava.files import file_sha256, values_sha256
from llava.inside import inside
from llava.outside import kind_of, read_object
from llava.schema import Wanted, an_object, check_fields, list_of, number, whole, words
from llava.utils import UserError, require_file

FIGURE: dict[str, Wanted] = {
    "value": number(),
    "ci95": list_of(number(), 2),
    "n": whole(0),
    "formula": words(),
    "reason": words(),
}
GROUP: dict[str, Wanted] = {
    "rows": whole(0),
    "closed_rows": whole(0),
    "empty_answers": whole(0),
    "figures": an_object(),
}
_FINGERPRINT = an_object({"path": words(), "sha256": words(empty=False)})
PROVENANCE: dict[str, Wanted] = {
    **dict.fromkeys(("question_file", "answers_file"), _FINGERPRINT),
    "package": an_object(),
    "tokenizer": words(),
    "unanswered_questions": whole(0),
}
SCORES: dict[str, Wanted] = {
    "format_version": whole(1),
    "model_id": words(empty=False),
    "groups": an_object(),
    "provenance": an_object(PROVENANCE),
    "rows_file": words(empty=False),
    "tokenizer": words(),
    "rows_sha256": words(empty=False),
    CHECKSUM: words(empty=False),
}
ROW: dict[str, Wanted] = {"domain": words(), "scores": an_object(), "scores_by_domain": an_object()}


def read_scores(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A ``scores.json``, and the row values that lie beside it; files of earlier versions hold no checksums.

    Raises:
        UserError: one of them is missing or broken, a field is not what a scores file has, or a checksum differs.
    """
    source = Path(path)
    scores = read_object(source, "scores file", "score the answers first: python -m llava.eval.eval_video_qa")
    try:
        check_fields(scores, SCORES, str(source), False, ("groups", "provenance", "model_id", "rows_file"))
        check_fields(scores["provenance"], PROVENANCE, f"{source}: provenance", False, tuple(PROVENANCE))
        for name, group in scores["groups"].items():
            where = f"{source}: groups: {name}"
            an_object().check(group, where)
            check_fields(group, GROUP, where, False, ("rows", "figures"))
            for metric, figure in group["figures"].items():
                an_object().check(figure, f"{where}: {metric}")
                check_fields(figure, FIGURE, f"{where}: {metric}", False, ("n", "formula"))
                if absent := [name for name in ("value", "ci95") if name not in figure]:
                    raise UserError(f"{where}: {metric}: field {absent[0]!r} is missing")
    except UserError as error:
        raise UserError(f"{error} (not a scores file; score again)") from error
    rows = inside(source.parent, scores["rows_file"], str(source))
    if CHECKSUM in scores:
        _check_written(source, scores, rows)
    return scores, _read_rows(rows)


def _check_written(source: Path, scores: dict[str, Any], rows: Path) -> None:
    """Compare scores and row values with the checksums in the scores."""
    if values_sha256({name: value for name, value in scores.items() if name != CHECKSUM}) != scores[CHECKSUM]:
        raise UserError(f"{source}: is not what was written here; score again")
    if rows.is_file() and file_sha256(rows) != scores.get("rows_sha256"):
        raise UserError(f"{rows}: is not what was written beside {source.name}; score again")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    source = require_file(path, "row values", "score the answers again: python -m llava.eval.eval_video_qa --force")
    rows = []
    for where, row in json_values(source):
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, found {kind_of(row)}")
        check_fields(row, ROW, where, False, ("scores",))
        for scores in (row["scores"], *(row.get("scores_by_domain") or {}).values()):
            an_object().check(scores, f"{where}: scores")
            check_fields(scores, dict.fromkeys(scores, number()), f"{where}: scores", False)
        rows.append(row)
    return rows
