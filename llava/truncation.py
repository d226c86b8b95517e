"""Which tokens of a text too long for its limit stay: one rule, for training samples and for prompts."""

from __future__ import annotations

from collections.abc import Container, Sequence

KEPT_BEFORE_REPLY = 8
"""Prompt tokens right before an answer that are kept: they hold the assistant's name."""


def kept_tokens(lengths: Sequence[int], in_reply: Sequence[bool], fixed: Container[int], limit: int) -> list[int]:
    """Places of the tokens that stay, so that they take at most ``limit`` positions and an answer stays.

    Later turns go first, whole. When the first turn alone is too long, its question loses tokens from the end, and
    only then the answer. Without a reply the text is an open prompt, whose end is kept.

    Args:
        lengths: positions that each token takes (a picture's features, otherwise 1).
        in_reply: which tokens are an answer's.
        fixed: places of tokens that stay, the pictures.

    Returns:
        the places in order; none where there is no room for an answer.
    """
    if sum(lengths) <= limit:
        return list(range(len(lengths)))
    runs, end = reply_runs(in_reply), len(lengths)
    if runs:
        fitting = [stop for _, stop in runs if sum(lengths[:stop]) <= limit]
        end = fitting[-1] if fitting else runs[0][1]
    reply = runs[0][0] if runs else end
    excess = max(sum(lengths[:end]) - limit, 0)
    droppable = [place for place in range(1, max(reply - KEPT_BEFORE_REPLY, 1)) if place not in fixed]
    dropped = set(droppable[max(len(droppable) - excess, 0) :])
    kept = [place for place in range(end) if place not in dropped]
    kept = kept[: max(len(kept) - (excess - len(dropped)), 0)]
    return kept if kept and kept[-1] >= min(reply, end - 1) else []


def reply_runs(in_reply: Sequence[bool]) -> list[tuple[int, int]]:
    """``[start, end)`` of each stretch of true places."""
    padded = [False, *in_reply, False]
    edges = [place for place in range(len(padded) - 1) if padded[place] != padded[place + 1]]
    return list(zip(edges[::2], edges[1::2]))
