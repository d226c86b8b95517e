"""The configuration file of the public prototype's first stage (``--config_path``), as far as it shapes keys here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava.continual.settings import KeySettings, checked
from llava.outside import read_object
from llava.utils import rank0_print

SETTINGS = {"weight_topk": "top_k", "low_rank": "rank", "groups": "groups"}
"""Fields of its configuration by the name that the sequence's ``keys`` block has for them."""


def read_prototype_config(path: str) -> dict[str, Any]:
    """The fields of ``KeySettings`` that the file gives; a note names what it holds beside them.

    Raises:
        UserError: the file is missing, no JSON object, or a value is no number that the setting takes.
    """
    file = Path(path)
    values = read_object(file, "configuration", "give the prototype's JSON file, or leave --config_path out")
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
