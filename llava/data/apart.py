"""The turns of a row as questions of their own behind one picture (``llava.model.apart``)."""

from __future__ import annotations

from dataclasses import replace

from llava.constants import IGNORE_INDEX, SHARED_SEGMENT
from llava.data.labels import expanded_length
from llava.data.prompt import PromptEncoder
from llava.data.rows import Row

Apart = tuple[list[int], list[int], list[int]]
"""Ids, labels and segments of a row."""


def turns_apart(row: Row, encoder: PromptEncoder) -> Apart:
    """Each turn as the encoder gives it alone, behind what all turns begin with.

    A row with several pictures, or with one turn, stays as it is. Later turns that do not fit the prompt's length are
    left out.

    Raises:
        UserError: as ``PromptEncoder.tokens``.
    """
    pairs = [row.conversations[place : place + 2] for place in range(0, len(row.conversations), 2)]
    if len(row.images) > 1 or len(pairs) < 2:
        ids, labels = encoder.tokens(row, answer=True)
        return ids, labels, [SHARED_SEGMENT] * len(ids)
    turns = [encoder.tokens(replace(row, conversations=pair), answer=True) for pair in pairs]
    shared = _shared([ids for ids, _ in turns], [labels for _, labels in turns])
    ids, labels = turns[0][0][:shared], turns[0][1][:shared]
    segments = [SHARED_SEGMENT] * shared
    taken, limit = expanded_length(ids, encoder.image_tokens), encoder.prompt.max_length
    for number, (own_ids, own_labels) in enumerate(turns, start=1):
        taken += expanded_length(own_ids[shared:], encoder.image_tokens)
        if number > 1 and limit is not None and taken > limit:
            break
        ids, labels = ids + own_ids[shared:], labels + own_labels[shared:]
        segments += [number] * (len(own_ids) - shared)
    return ids, labels, segments


def _shared(ids: list[list[int]], labels: list[list[int]]) -> int:
    """How many first ids all turns have in common, the token before each answer's first one not counted.

    The first id of a turn's own is predicted by nothing: it stands behind another turn.
    """
    answers = [next((place for place, label in enumerate(own) if label != IGNORE_INDEX), len(own)) for own in labels]
    least = max(min(answers) - 1, 0)
    common = 0
    while common < least and len({own[common] for own in ids}) == 1:
        common += 1
    return common
