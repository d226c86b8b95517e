"""Text and pictures in one run of embeddings: the features of a picture take the place of its ``<image>``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.padding import Side, pad

Embed = Callable[[Tensor], Tensor]


def count_placeholders(input_ids: Tensor, attention_mask: Tensor | None) -> list[int]:
    """How many ``<image>`` each row of ``[batch, tokens]`` has, outside of its padding."""
    marks = input_ids == IMAGE_TOKEN_INDEX
    if attention_mask is not None and attention_mask.shape == input_ids.shape:
        marks = marks & attention_mask.bool()
    return marks.sum(dim=1).tolist()


def splice(
    embed: Embed,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    features: list[list[Tensor]],
    side: Side = "right",
    limit: int | None = None,
    prefix: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings ``[batch, length, hidden]``, mask, positions and labels with the pictures in their places.

    Args:
        embed: token ids to embeddings.
        input_ids, attention_mask, labels: ``[batch, tokens]``; the last two may be ``None``.
        features: per sample its pictures, ``[tokens, hidden]`` each.
        side: where shorter rows are padded. limit: embeddings of a row at most, the prefix not counted.
        prefix: ``[batch, prefix length, hidden]``, in front of each sample, behind its padding.

    Raises:
        ValueError: a row's pictures are not as many as its placeholders.
    """
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    rows, row_labels = [], []
    for index, pictures in enumerate(features):
        ids = input_ids[index][keep[index]]
        row_label = torch.full_like(ids, IGNORE_INDEX) if labels is None else labels[index][keep[index]]
        embeds, spliced = splice_row(embed, index, ids, row_label, pictures)
        if prefix is not None:
            embeds = torch.cat([prefix[index].to(embeds.dtype), embeds])
            spliced = torch.cat([spliced.new_full((prefix.shape[1],), IGNORE_INDEX), spliced])
        rows.append(embeds)
        row_labels.append(spliced)
    if limit is not None:
        limit += 0 if prefix is None else prefix.shape[1]
        rows, row_labels = [row[:limit] for row in rows], [row[:limit] for row in row_labels]
    embeds, mask = pad(rows, side)
    positions = (mask.cumsum(1) - 1) * mask  # counted from each row's own start; 0 on padding
    return embeds, mask, positions, pad(row_labels, side, IGNORE_INDEX)[0]


def splice_row(embed: Embed, index: int, ids: Tensor, labels: Tensor, pictures: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Embeddings ``[length, hidden]`` and labels ``[length]`` of sample ``index``, without padding."""
    places = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
    if len(places) != len(pictures):
        raise ValueError(
            f"row {index} of the batch has {len(places)} <image> placeholder(s) but {len(pictures)} picture(s)"
        )
    pieces, piece_labels, start = [], [], 0
    for place, picture in zip([*places, len(ids)], [*pictures, None], strict=True):
        pieces.append(embed(ids[start:place]))
        piece_labels.append(labels[start:place])
        if picture is not None:
            pieces.append(picture.to(pieces[0].dtype))
            piece_labels.append(labels.new_full((len(picture),), IGNORE_INDEX))
        start = place + 1
    return torch.cat(pieces), torch.cat(piece_labels)
