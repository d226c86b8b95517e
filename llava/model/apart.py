"""Several questions about one picture in one row, none of which sees the others.

A conversation's later answers can often be told from its earlier ones ("cardiomegaly" answers "is it healthy?"), so a
model trained on them need not look at the picture. Kept apart, each turn sees what all share, the template's head and
the picture, and itself: the loss is that of as many rows, and the picture is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX, NO_SEGMENT, SHARED_SEGMENT
from llava.padding import pad


def spread(
    segments: Tensor, input_ids: Tensor, attention_mask: Tensor, pictures: Sequence[Sequence[int]], length: int
) -> Tensor:
    """Segments of a batch once its pictures are in their places, ``[batch, length]``.

    Args:
        segments, input_ids, attention_mask: ``[batch, tokens]``, padded on the right.
        pictures: per row the positions that each of its pictures takes.
        length: positions of the longest row.

    Raises:
        ValueError: the rows were shortened, so segments and positions do not belong together.
    """
    rows = []
    for own, ids, real, taken in zip(segments, input_ids, attention_mask.bool(), pictures, strict=True):
        own, ids = own[real], ids[real]
        repeats = torch.ones_like(ids)
        repeats[ids == IMAGE_TOKEN_INDEX] = torch.tensor(list(taken), dtype=ids.dtype, device=ids.device)
        rows.append(own.repeat_interleave(repeats))
    found = pad(rows, value=NO_SEGMENT)[0]
    if found.shape[1] != length:
        raise ValueError(f"rows of {found.shape[1]} positions were cut to {length}; turns that are kept apart must fit")
    return found


def who_sees_whom(segments: Tensor, added: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Attention mask ``[batch, 1, length, length]`` (true: seen) and positions ``[batch, length]`` of ``segments``.

    Each turn's positions go on behind what is shared, as if it stood there alone. With ``added``, a float type, the
    mask is one to add to scores, as eager attention takes it.
    """
    shared = segments == SHARED_SEGMENT  # [batch, length]
    same = segments[:, :, None] == segments[:, None, :]  # [batch, query, key]
    before = torch.ones_like(same[0]).tril()
    own = same & before
    seen = (shared[:, None, :] & before) | own
    positions = own.sum(-1) - 1 + shared.sum(-1, keepdim=True) * (~shared)
    mask = seen[:, None]
    if added is not None:
        mask = torch.zeros(mask.shape, dtype=added, device=mask.device).masked_fill(~mask, torch.finfo(added).min)
    return mask, positions
