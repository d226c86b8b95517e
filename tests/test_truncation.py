"""What stays of a text too long for its limit: never more than the limit, the pictures, and room for an answer."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llava.truncation import KEPT_BEFORE_REPLY, kept_tokens, reply_runs

TURN = st.tuples(st.integers(1, 25), st.integers(0, 8))


@settings(deadline=None, max_examples=200)
@given(st.lists(TURN, min_size=1, max_size=3), st.sets(st.integers(1, 40), max_size=2), st.integers(1, 60), st.data())
def test_what_stays_fits_and_holds_an_answer(turns, pictures, limit, data):
    in_reply = [False]
    for question, answer in turns:
        in_reply += [False] * question + [True] * answer
    pictures = {place for place in pictures if place < len(in_reply) and not in_reply[place]}
    lengths = [data.draw(st.integers(1, 10)) if place in pictures else 1 for place in range(len(in_reply))]
    kept = kept_tokens(lengths, in_reply, pictures, limit)
    assert sum(lengths[place] for place in kept) <= limit and kept == sorted(set(kept))
    if sum(lengths) <= limit:
        assert len(kept) == len(lengths)
    runs = reply_runs(in_reply)
    if kept and runs:
        assert any(in_reply[place] for place in kept)
        start = runs[0][0]
        assert set(range(max(start - KEPT_BEFORE_REPLY, 0), start)) <= set(kept)
        assert {place for place in pictures if place < start} <= set(kept)
    elif kept:
        assert set(range(max(len(lengths) - KEPT_BEFORE_REPLY, 0), len(lengths))) | pictures <= set(kept)


def test_a_text_far_beyond_its_limit_is_not_returned_longer():
    """Two pictures of ten positions in a limit of fifteen: once, more was to be cut than there was."""
    lengths = [1] * 8 + [10] + [1] * 17 + [10] + [1] * 14
    in_reply = [False] * 33 + [True] * 8
    assert kept_tokens(lengths, in_reply, {8, 26}, 15) == []


def test_reply_runs():
    assert reply_runs([False, True, True, False, True]) == [(1, 3), (4, 5)]
    assert reply_runs([]) == reply_runs([False]) == []
