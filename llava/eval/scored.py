"""Whether an evaluation's scores are whole, as far as they can be here: others may lack what Java adds."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from llava.eval.accuracy_matrix import MATRIX_NAME
from llava.eval.eval_video_qa import ROWS_NAME, SCORES_NAME
from llava.eval.text_metrics import METEOR_FAILED, PLAIN_TOKENIZER, find_java
from llava.files import is_still
from llava.outside import read_object

_java = functools.cache(find_java)
"""Found once a process."""


def scores_are_whole(folder: Path) -> bool:
    """Whether the scores beside an accuracy matrix are those that it was made of, and miss nothing that would be in
    them if the answers were scored here.

    Raises:
        UserError: the matrix is damaged.
    """
    matrix = read_object(folder / MATRIX_NAME)
    provenance = matrix.get("provenance", {})
    own = len(matrix.get("stages", ())) + bool(matrix.get("zero_shot_model"))  # behind them stand references
    for entry in provenance.get("scores", ())[:own]:
        file = folder / Path(entry["path"]).parent.name / SCORES_NAME
        if not is_still(file, entry["sha256"]):
            return False
        if not is_still(file.with_name(ROWS_NAME), read_object(file).get("rows_sha256", "")):
            return False
    return not (_lacks_java(matrix, provenance.get("tokenizer")) and _java())


def _lacks_java(matrix: dict[str, Any], tokenizer: str | None) -> bool:
    """Whether figures were made without Java, or while its process failed."""
    failed = any(str(found.get("reason", "")).startswith(METEOR_FAILED) for found in matrix["metrics"].values())
    return tokenizer == PLAIN_TOKENIZER or failed
