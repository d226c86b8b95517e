"""How questions are answered: where the model runs, how answers are generated, which questions go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from llava.data.rows import Row
from llava.utils import UserError

if TYPE_CHECKING:
    import torch

ORACLE, NO_ROUTE = "oracle", "none"
REFUSAL = "I cannot answer this: the question or the picture is unlike everything I was trained on."
WINDOW = 8
"""Batches whose questions are sorted by length together; as many are asked again at most after a kill."""


@dataclass(frozen=True)
class Loading:
    """Where the model runs and in which form: by default on the accelerator, where there is one, unquantised.

    Args:
        device_map: ``auto`` puts the layers on all GPUs, in turn; by default the model is on one.
        tf32: whether a GPU's products of float32 matrices are TF32; by default as torch has it, which is not.
    """

    device: str | None = None
    device_map: str | None = None
    load_8bit: bool = False
    load_4bit: bool = False
    attn_implementation: str | None = None
    dtype: torch.dtype | str | None = None
    tf32: bool | None = None


@dataclass(frozen=True)
class Generation:
    """How answers are generated.

    Args:
        temperature: 0 is greedy. seed: for a temperature above 0.
        refuse_unknown: answer questions that fit no known task with a fixed refusal.
        workers: threads that open pictures ahead.
    """

    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    max_new_tokens: int = 128
    batch_size: int = 8
    seed: int = 0
    refuse_unknown: bool = False
    workers: int = 0


class Reply(NamedTuple):
    """An answer, and the route it took (``Route.describe``); no route where the base answered."""

    row: Row
    text: str
    route: dict[str, Any] | None


def sorted_batches(window: range, ids: dict[int, list[int]], size: int, done: int) -> list[list[int]]:
    """Row numbers of a window by length, longest first, in batches; those of answered rows alone are left out."""
    order = sorted(window, key=lambda number: (-len(ids[number]), number))
    found = [sorted(order[start : start + size]) for start in range(0, len(order), size)]
    return [batch for batch in found if batch[-1] >= done]


def given_tasks(rows: Sequence[Row], route: str | None, task: str | None = None) -> list[str | None]:
    """The task of each row where it is given away, else ``None``.

    Raises:
        UserError: ``oracle`` and a row that has no domain, or several.
    """
    if task:
        return [task] * len(rows)
    if route != ORACLE:
        return [None] * len(rows)
    for row in rows:
        if row.domain is None:
            found = f"several ({', '.join(row.domains)})" if row.domains else "none"
            raise UserError(
                f"--route oracle needs each row's one domain; question_id {row.id!r} has {found} (use --task-id)"
            )
    return [row.domain for row in rows]


def check_route(route: str | None) -> None:
    """``UserError`` for a route that is neither a router's name, ``oracle`` nor ``none``."""
    from llava.slots.routers import ROUTERS

    known = [*ROUTERS.names(), ORACLE, NO_ROUTE]
    if route is not None and route not in known:
        raise UserError(f"--route {route!r} is not a router (choose from {', '.join(known)})")
