"""Rows of unequal length in one tensor: the only padder of the project."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Side = Literal["left", "right"]


def pad(rows: Sequence[Tensor], side: Side = "right", value: float = 0) -> tuple[Tensor, Tensor]:
    """Stack rows ``[length_i, ...]`` to ``[rows, longest, ...]``, filled with ``value`` on one side.

    Returns:
        The stack, and a boolean mask ``[rows, longest]``, true where a row's own values are.

    Raises:
        ValueError: no rows, or a side other than ``left`` and ``right``.
    """
    if not rows:
        raise ValueError("there are no rows to pad")
    if side not in ("left", "right"):
        raise ValueError(f"padding side must be left or right, not {side!r}")
    padded = pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)[:, None]  # [rows, 1]
    places = torch.arange(padded.shape[1], device=padded.device)  # [longest]
    mask = places >= padded.shape[1] - lengths if side == "left" else places < lengths
    return padded, mask


def filled(rows: Sequence[Tensor], width: int, value: float = 0) -> Tensor:
    """Stack rows ``[length_i]`` to ``[rows, width]``, filled with ``value`` behind; plainly where all are as wide."""
    return torch.stack([row if len(row) == width else F.pad(row, (0, width - len(row)), value=value) for row in rows])
