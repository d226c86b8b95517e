"""What is asked of a slot file's content before slots are made of it: types, ranges and shapes, by field.

Whether its tensors are those that were written is a question of checksums; here is said what could not be used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llava.schema import HUGE, Wanted, an_object, check_fields, list_of, number, whole, words, yes_or_no
from llava.slots.names import KINDS, QUERY_MODES, SCOPES, check_task_name
from llava.utils import UserError

WIDE = 2**20
_count = whole(1, WIDE)


def tensor_of(dimensions: int) -> Wanted:
    """A tensor of numbers with so many dimensions."""
    return Wanted(
        f"a tensor of {dimensions} dimensions",
        lambda value: isinstance(value, Tensor) and value.dim() == dimensions and value.dtype != torch.bool,
    )


_SOURCE: dict[str, Wanted] = {"fingerprint": words(), "files": an_object()}
SETTINGS: dict[str, Wanted] = {
    **dict.fromkeys(("num_layers", "groups", "rank", "top_k", "text_dim", "image_dim"), _count),
    "features": an_object(),
    "query_mode": words(QUERY_MODES),
    "image_query": words(KINDS),
    "tau": number(above=0),
    "scale": number(),
    "image_weight": number(0, 1),
    "router": words(empty=False),
    "weighting": words(("softmax", "distance")),
    "unknown_share": number(0, 1),
    "offset_scope": words(SCOPES),
    "encoder": an_object({**_SOURCE, "kind": words(), "name": words(), "dim": _count}),
}
STATISTICS: dict[str, Wanted] = {"count": whole(0, None), "total": tensor_of(1), "scatter": tensor_of(2)}
EXTENT: dict[str, Wanted] = {
    **dict.fromkeys(("mean", "variances", "distances"), tensor_of(1)),
    "directions": tensor_of(2),
    "rest": tensor_of(0),
}
TASK: dict[str, Wanted] = {
    "name": words(empty=False),
    "start": whole(0),
    "stop": whole(1),
    "trained": yes_or_no,
    **dict.fromkeys(("statistics", "feature_statistics"), an_object(STATISTICS)),
    "extent": an_object(EXTENT),
    "held_out": an_object(dict.fromkeys(("text", "image"), tensor_of(2))),
    "info": an_object(),
    "checksum": words(),
    **dict.fromkeys(("text_keys", "image_keys"), tensor_of(3)),
    **dict.fromkeys(("A", "B"), an_object()),
}
"""The last two rows are those of a stage, whose tasks have files of their own."""
PROMPT: dict[str, Wanted] = {
    **dict.fromkeys(("conv_mode", "answer_suffix", "answer_style", "aspect_ratio"), words()),
    "max_length": whole(1),
}
FILE: dict[str, Wanted] = {
    "settings": an_object(SETTINGS),
    "base": an_object({**_SOURCE, "path": words()}),
    "prompt": an_object(PROMPT),
    **dict.fromkeys(("adapter", "checksum"), words()),
    **dict.fromkeys(("keys", "image_keys"), tensor_of(4)),
    "tasks": list_of(replace(an_object(TASK), words="one task")),
    "offsets": an_object(),
}
_FEATURE = list_of(_count, 2)
_SIDES, _OFFSET = ("A", "B"), tensor_of(4)


def check_slot_data(data: Mapping[str, Any], where: str) -> None:
    """Refuse content that no slots can be made of; what is missing is for the reader to find.

    Raises:
        UserError: the first field that is of another type, or out of its range.
    """
    check_fields(data, FILE, where, closed=False)
    for target, shape in ((data.get("settings") or {}).get("features") or {}).items():
        _FEATURE.check(shape, f"{where}: settings: features: {target}")
    taken: dict[str, tuple[int, int]] = {}
    if data.get("tasks") is None:
        return
    for entry in data["tasks"]:
        if not {"name", "start", "stop"} <= entry.keys():
            return
        _check_place(entry, taken, where)
    for task, offsets in (data.get("offsets") or {}).items():
        _check_offsets(task, offsets, taken, where)


def _check_place(entry: Mapping[str, Any], taken: dict[str, tuple[int, int]], where: str) -> None:
    name, start, stop = entry["name"], entry["start"], entry["stop"]
    check_task_name(name, f"{where}: ")
    if name in taken or start >= stop or stop > HUGE:
        raise UserError(f"{where}: task {name!r} at slots {start}:{stop} is there twice, or has no slots")
    for other, (first, last) in taken.items():
        if start < last and first < stop:
            raise UserError(f"{where}: tasks {other!r} and {name!r} share slots ({first}:{last} and {start}:{stop})")
    taken[name] = start, stop
    for kind in ("statistics", "feature_statistics"):
        if found := entry.get(kind):
            check_fields(found, STATISTICS, f"{where}: task {name!r}: {kind}", needed=tuple(STATISTICS))
            if found["scatter"].shape != (len(found["total"]),) * 2:
                raise UserError(f"{where}: task {name!r}: {kind}: scatter and total are of different sizes")
    if found := entry.get("extent"):
        check_fields(found, EXTENT, f"{where}: task {name!r}: extent", needed=tuple(EXTENT))
        if found["directions"].shape != found["variances"].shape + found["mean"].shape:
            raise UserError(f"{where}: task {name!r}: extent: directions, variances and mean are of different sizes")
    _check_sides({side: entry.get(side) or {} for side in _SIDES}, f"{where}: task {name!r}")


def _check_offsets(task: Any, offsets: Any, taken: Mapping[str, Any], where: str) -> None:
    if task not in taken:
        raise UserError(f"{where}: offsets of task {task!r}, which the file does not name")
    sides = {side: an_object() for side in _SIDES}
    an_object().check(offsets, f"{where}: offsets: {task}")
    check_fields(offsets, sides, f"{where}: offsets: {task}", needed=_SIDES)
    _check_sides(offsets, f"{where}: offsets: {task}")


def _check_sides(sides: Mapping[str, Mapping[str, Any]], where: str) -> None:
    for side in _SIDES:
        for target, values in sides[side].items():
            _OFFSET.check(values, f"{where}: {side}: {target}")
