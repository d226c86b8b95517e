"""The configuration file of the public prototype's first stage (``--config_path``), as far as it shapes keys here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava.checkpoints.weights import read_json
from llava.continual.settings import KeySettings, checked
from llava.utils import UserError, rank0_print, require_file

SETTINGS = {"weight_topk": "top_k", "low_rank": "rank", "groups": "groups"}
"""Fields of its configuration by the name that the sequence's ``keys`` block has for them."""


def read_prototype_config(path: str) -> dict[str, Any]:
    """The fields of ``KeySettings`` that the file gives; a note names what it holds beside them.

    Raises:
        UserError: the file is missing, no JSON object, or a value is no number that the setting takes.
    """
    file = require_file(Path(path), "configuration", "give the prototype's JSON file, or leave --config_path out")
    values = read_json(file)
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object with weight_topk, low_rank or groups")
    found = {
        ours: checked(KeySettings, ours, values[theirs], f"{file}: {theirs}")
        for theirs, ours in SETTINGS.items()
        if theirs in values
    }
    if others := [name for name in values if name not in SETTINGS]:
        rank0_print(
            f"note: --config_path gives {', '.join(f'{name} {value}' for name, value in found.items()) or 'nothing'}; "
            f"the task sequence says what {', '.join(others)} said"
        )
    return found
