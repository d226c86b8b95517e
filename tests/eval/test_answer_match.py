"""Which row an answer is for: by id, by position, by order, and never by guessing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.rows import parse_row, with_positions
from llava.eval.answer_file import answer_row
from llava.eval.answer_match import answers_of, missing_rows, taken_by_order
from llava.utils import UserError


def rows_of(ids, questions=None):
    texts = questions or [f"question {number}?" for number in range(len(ids))]
    values = zip(ids, texts, strict=True)
    return with_positions([parse_row({"question_id": name, "text": text}) for name, text in values])


def ours(rows):
    return [answer_row(row, f"answer {place}", "m", {}) for place, row in enumerate(rows)]


def foreign(answers):
    """The same answers as LLaVA's own loader writes them."""
    return [{**answer, "metadata": {}} for answer in answers]


IDS = st.lists(st.sampled_from(["a", "b", 7, "7", "c"]), min_size=1, max_size=9)


@settings(deadline=None)
@given(IDS, st.randoms())
def test_own_answers_find_their_rows_in_any_order(ids, source):
    rows = rows_of(ids)
    answers = ours(rows)
    shuffled = source.sample(answers, len(answers))
    assert answers_of(rows, shuffled, "a.jsonl") == answers
    assert answers_of(rows, shuffled, "a.jsonl", by_order=False) == answers
    assert len({answer["answer_id"] for answer in answers}) == len(answers)


@settings(deadline=None)
@given(IDS, st.data())
def test_any_of_the_own_answers_find_their_rows(ids, data):
    rows = rows_of(ids)
    answers = ours(rows)
    kept = data.draw(st.sets(st.sampled_from(range(len(rows)))))
    found = answers_of(rows, [answers[place] for place in sorted(kept)], "a.jsonl")
    assert found == [answer if place in kept else None for place, answer in enumerate(answers)]
    assert len(missing_rows(rows, found)) == len(rows) - len(kept)
    assert taken_by_order(rows, found) is None


@settings(deadline=None)
@given(IDS)
def test_answers_of_other_programs_are_taken_in_their_order(ids):
    rows = rows_of(ids)
    answers = foreign(ours(rows))
    assert answers_of(rows, answers, "a.jsonl") == answers
    bare = [{"question_id": answer["question_id"], "text": answer["text"]} for answer in answers]
    assert answers_of(rows, bare, "a.jsonl") == bare


def test_answers_whose_prompts_say_that_one_is_missing_are_not_shifted():
    rows = rows_of(["a"] * 4)
    answers = foreign(ours(rows))
    found = answers_of(rows, [answers[0], answers[2]], "a.jsonl")
    assert found == [answers[0], None, answers[2], None]
    assert missing_rows(rows, found) == ["a (position 1)", "a (position 3)"]
    assert "question_id a has fewer answers than rows" in taken_by_order(rows, found)


def test_answers_to_one_question_about_several_pictures_go_by_order():
    rows = rows_of(["a", "b", "a", "a"], ["Normal?"] * 4)
    answers = foreign(ours(rows))
    assert answers_of(rows, answers[:3], "a.jsonl") == [*answers[:3], None]


def test_a_prompt_that_is_none_of_the_rows_questions_decides_nothing():
    rows = rows_of(["a", "a"])
    answers = [{"question_id": "a", "text": "x", "prompt": f"USER: <image> {row.question}"} for row in rows]
    assert answers_of(rows, answers, "a.jsonl") == answers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found[::-1], "its answers come in another order than its rows"),
        (lambda found: [*found, found[0]], "question_id 'a' is answered 4 times, but 3 rows have it"),
        (lambda found: [*found, {**found[0], "question_id": "z"}], "the question file lacks: z"),
        (lambda found: [{**found[0], "metadata": {"position": 0}}, *found[1:]], "names no 'position'"),
        (lambda found: [{**answer, "metadata": {"position": 1}} for answer in found], "position 1 is answered twice"),
        (lambda found: [{**found[0], "metadata": {"position": 5}}], "no row with it at position 5"),
    ],
)
def test_what_cannot_be_matched_is_refused(change, words):
    rows = rows_of(["a"] * 3)
    with pytest.raises(UserError, match=f"a.jsonl: .*{words}"):
        answers_of(rows, change(foreign(ours(rows))), "a.jsonl")


def test_without_positions_chunks_are_not_put_together():
    rows = rows_of(["a", "b", "a"])
    answers = foreign(ours(rows))
    with pytest.raises(UserError, match="question_id 'a': several rows have it and an answer names no 'position'"):
        answers_of(rows, answers, "the chunks", by_order=False)


def test_a_position_that_means_something_else_is_not_looked_at_where_ids_are_unique():
    rows = rows_of(["a", "b"])
    answers = [{"question_id": name, "text": "x", "metadata": {"position": 99}} for name in ("b", "a")]
    assert answers_of(rows, answers, "a.jsonl") == answers[::-1]
