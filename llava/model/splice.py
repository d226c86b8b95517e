"""Text and pictures in one run of embeddings: the features of a picture take the place of its ``<image>``.

Where everything goes is planned on the host, from ids that are there or are copied there once; then one gather puts
words, pictures and padding in their places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.devices import moved
from llava.padding import Side, pad
from llava.truncation import kept_tokens
from llava.utils import UserError

Embed = Callable[[Tensor], Tensor]


class Spliced(NamedTuple):
    """Embeddings ``[batch, length, hidden]``; mask, positions and labels ``[batch, length]``; tokens cut per row, and
    the position in the batch at which what stands behind the row's last picture begins: without one the row's own."""

    embeds: Tensor
    mask: Tensor
    positions: Tensor
    labels: Tensor
    cut: list[int]
    starts: list[int]


class Row(NamedTuple):
    """A row without its padding: ids and labels ``[tokens]``, its pictures ``[tokens, hidden]`` each."""

    ids: Tensor
    labels: Tensor
    pictures: list[Tensor]


def check_prompts(input_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """``ValueError`` where ids are no tensor ``[batch, tokens]``, or a mask of two dimensions has another shape."""
    if input_ids is None:
        return
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        found = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids are {found}; give a tensor of shape [batch, tokens]")
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask is {list(attention_mask.shape)}, for input_ids {list(input_ids.shape)}")


def count_placeholders(input_ids: Tensor, attention_mask: Tensor | None) -> list[int]:
    """How many ``<image>`` each row of ``[batch, tokens]`` has, outside of its padding."""
    marks = input_ids == IMAGE_TOKEN_INDEX
    if isinstance(attention_mask, Tensor) and attention_mask.shape == input_ids.shape:
        marks = marks & attention_mask.bool().to(marks.device)
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
) -> Spliced:
    """Put the pictures in their places.

    Args:
        embed: token ids to embeddings.
        input_ids, attention_mask, labels: ``[batch, tokens]``; the last two may be ``None``.
        features: per row its pictures, ``[tokens, hidden]`` each.
        side: where shorter rows are padded.
        limit: embeddings of a row at most, the prefix not counted. A longer row loses the tokens that it would lose in
            training (``llava.truncation``): a prompt keeps its end, where the answer begins.
        prefix: ``[batch, prefix length, hidden]``, in front of each row, behind its padding.

    Raises:
        ValueError: a row's pictures are not as many as its placeholders.
        UserError: a row's pictures leave no room for an answer within ``limit``.
    """
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError("pictures need an attention_mask of shape [batch, tokens], or none")
    weight = getattr(embed, "weight", input_ids)
    device = input_ids.device if weight.device.type == "meta" else weight.device  # a hook may bring the weight
    input_ids, keep, labels = _on_host(input_ids, attention_mask, labels)
    shortened, cut, behind = [], [], []
    for index, pictures in enumerate(features):
        ids = input_ids[index][keep[index]]
        row_label = torch.full_like(ids, IGNORE_INDEX) if labels is None else labels[index][keep[index]]
        places = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
        if len(places) != len(pictures):
            raise ValueError(
                f"row {index} of the batch has {len(places)} <image> placeholder(s) but {len(pictures)} picture(s)"
            )
        row, lost = _within(limit, Row(ids, row_label, pictures), places)
        if lost and not len(row.ids):
            raise UserError(
                f"row {index} of the batch: pictures of {sum(map(len, pictures))} positions leave no room for an "
                f"answer in the model's window of {limit} (give fewer, or a larger tokenizer_model_max_length)"
            )
        if lost:
            places = (row.ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
        shortened.append(row)
        cut.append(lost)
        behind.append(len(row.ids) - 1 - places[-1] if places else None)
    # Once for the whole batch: under ZeRO-3 processes must call it equally often, whatever pictures their rows have.
    words = embed(moved(torch.cat([row.ids.clamp(min=0) for row in shortened]), device))  # [tokens of all rows, hidden]
    flat = [picture.to(words) for row in shortened for picture in row.pictures]
    front = [] if prefix is None else [prefix.to(words).flatten(0, 1)]
    nothing = words.new_zeros(1, words.shape[1])
    table = torch.cat([nothing, *front, words, *flat])
    length = 0 if prefix is None else prefix.shape[1]
    word, picture = 1 + len(shortened) * length, 1 + len(shortened) * length + len(words)
    rows, row_labels = [], []
    for index, row in enumerate(shortened):
        sources, spliced = plan_row(row, word, picture)
        ahead = torch.arange(1 + index * length, 1 + (index + 1) * length)
        rows.append(torch.cat([ahead, sources]))
        row_labels.append(torch.cat([spliced.new_full((length,), IGNORE_INDEX), spliced]))
        word, picture = word + len(row.ids), picture + sum(map(len, row.pictures))
    sources, mask = pad(rows, side)  # [batch, longest]
    ends = [sources.shape[1] if side == "left" else len(row) for row in rows]
    starts = [end - (len(row) if own is None else own) for end, row, own in zip(ends, rows, behind, strict=True)]
    positions = (mask.cumsum(1) - 1) * mask  # counted from each row's own start; 0 on padding
    plan = moved(torch.stack([sources, mask.long(), positions, pad(row_labels, side, IGNORE_INDEX)[0]]), words.device)
    embeds = table.index_select(0, plan[0].flatten()).unflatten(0, sources.shape)
    return Spliced(embeds, plan[1].bool(), plan[2], plan[3], cut, starts)


def _on_host(ids: Tensor, mask: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, which of them are no padding, and labels, on the CPU; from a device they come in one copy."""
    keep = torch.ones_like(ids) if mask is None else mask.bool().to(ids)
    host = torch.stack([ids, keep, ids if labels is None else labels.to(ids)]).cpu()
    return host[0], host[1].bool(), None if labels is None else host[2]


def _within(limit: int | None, row: Row, places: list[int]) -> tuple[Row, int]:
    """The row shortened to ``limit`` positions, and how many tokens it lost; ``places`` are those of its pictures."""
    if limit is None or len(row.ids) - len(places) + sum(map(len, row.pictures)) <= limit:
        return row, 0
    pictures = dict(zip(places, row.pictures, strict=True))
    lengths = [len(pictures[place]) if place in pictures else 1 for place in range(len(row.ids))]
    kept = kept_tokens(lengths, (row.labels != IGNORE_INDEX).tolist(), pictures, limit)
    chosen = torch.tensor(kept, dtype=torch.long, device=row.ids.device)
    left = [pictures[place] for place in kept if place in pictures]
    return Row(row.ids[chosen], row.labels[chosen], left), len(row.ids) - len(kept)


def plan_row(row: Row, word: int, picture: int) -> tuple[Tensor, Tensor]:
    """Where each position of a row comes from, and its label: both ``[length]``.

    Args:
        row: with as many pictures as placeholders. word, picture: where its words, and its pictures, begin in the
            table of all that positions can come from.
    """
    places = (row.ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
    pieces, piece_labels, start = [], [], 0
    for place, shown in zip([*places, len(row.ids)], [*row.pictures, None], strict=True):
        pieces.append(torch.arange(word + start, word + place))
        piece_labels.append(row.labels[start:place])
        if shown is not None:
            pieces.append(torch.arange(picture, picture + len(shown)))
            piece_labels.append(row.labels.new_full((len(shown),), IGNORE_INDEX))
            picture += len(shown)
        start = place + 1
    return torch.cat(pieces), torch.cat(piece_labels)
