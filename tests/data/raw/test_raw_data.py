"""The parts of fusion, each by hand: mending text, joining organs, the two splits, reading the csv."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.raw.example import TEST, TRAIN, Example, Report
from llava.data.raw.metadata_csv import read_metadata
from llava.data.raw.organ_join import (
    BY_ANSWER,
    BY_IMAGE,
    BY_IMAGE_ALONE,
    BY_QUESTION,
    CONFLICT,
    OPEN,
    Reference,
    ReferenceIndex,
    join_organs,
)
from llava.data.raw.splits import drop_repeats, picture_groups, unseen_split
from llava.data.raw.text import APOSTROPHE, NUMBER, QUOTE, SPACE, TAB, mend_text
from llava.data.raw.vqa_rad import question_types
from llava.utils import UserError


@pytest.mark.parametrize(
    ("value", "text", "mended"),
    [
        ("yes", "yes", []),
        (4, "4", [NUMBER]),
        (2.0, "2", [NUMBER]),
        (0.5, "0.5", [NUMBER]),
        ("Heart \tlungs", "Heart, lungs", [TAB]),
        ("Are the liver \tsplee n\tstomac h\tand esophagus?", "Are the liver, spleen, stomach, and esophagus?", [TAB]),
        ("hours?\tminutes?", "hours?, minutes?", [TAB]),
        ("it\ufffds the duct", "it's the duct", [APOSTROPHE]),
        ("a \ufffd b", "a \ufffd b", []),
        ('" superficial to the skin', "superficial to the skin", [QUOTE]),
        (' " x', "x", [QUOTE, SPACE]),
        ('"both"', '"both"', []),
        (" superficial ", "superficial", [SPACE]),
        ("\tindented\t", "indented", [SPACE]),
        ("two  spaces\nand a line", "two spaces and a line", [SPACE]),
    ],
)
def test_mending_by_hand(value, text, mended):
    assert mend_text(value, "here") == (text, mended)


@pytest.mark.parametrize("value", [None, float("nan"), True, [], {}, "", " \t ", '"', "NaN", " null"])
def test_field_without_text_is_refused(value):
    with pytest.raises(UserError, match="^here"):
        mend_text(value, "here")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_mended_text_needs_no_further_mending_of_spaces(text):
    try:
        once, _ = mend_text(text, "here")
    except UserError:
        return
    assert once == once.strip()
    assert "\t" not in once
    assert mend_text(once, "here")[0] == once or once.startswith('"')


@pytest.mark.parametrize(
    ("value", "labels", "mended"),
    [
        ("PRES", ("PRES",), 0),
        ("POS, PRES", ("POS", "PRES"), 0),
        ("PRSE", ("PRES",), 1),
        ("ATRIB, ATTRIB", ("ATTRIB",), 1),
        ("Other", ("OTHER",), 1),
        ("NULL", (), 0),
        ("", (), 0),
        (None, (), 0),
    ],
)
def test_question_types(value, labels, mended):
    report = Report("x")
    assert question_types(value, 1, report) == labels
    assert sum(map(len, report.mended.values())) == mended


INDEX = ReferenceIndex(
    Reference(organ, question, answer, {})
    for organ, question, answer in [
        ("abd", "Is the liver normal?", "Yes"),
        ("abd", "Is it normal?", "no"),
        ("chest", "Is it normal?", "No"),
        ("head", "Is it normal?", "yes"),
        ("chest", "Is the heart large?", "yes"),
    ]
)


@pytest.mark.parametrize(
    ("rows", "organ", "how"),
    [
        # one reference has this question with this answer
        ([("a", "is the LIVER normal", "yes.")], "abd", BY_ANSWER),
        # two have it, the other question of the picture decides
        ([("a", "Is it normal?", "No"), ("a", "Is the liver normal?", "Yes")], "abd", BY_IMAGE),
        # the other question is about another picture
        ([("a", "Is it normal?", "No"), ("b", "Is the liver normal?", "Yes")], None, OPEN),
        # the other questions contradict each other
        (
            [("a", "Is it normal?", "No"), ("a", "Is the liver normal?", "Yes"), ("a", "Is the heart large?", "Yes")],
            None,
            OPEN,
        ),
        # ... and a row that is certain by itself keeps its organ, and is listed
        ([("a", "Is the liver normal?", "Yes"), ("a", "Is the heart large?", "Yes")], "abd", CONFLICT),
        # the other question is as ambiguous
        ([("a", "Is it normal?", "No"), ("a", "Is it normal?", "No")], None, OPEN),
        # the question is known with another answer only
        ([("a", "Is the liver normal?", "No")], None, OPEN),
        ([("a", "Is the liver normal?", "No"), ("a", "Is it normal?", "no")], "abd", BY_QUESTION),
        # the question is not known at all
        ([("a", "Why?", "No"), ("a", "Is the heart large?", "yes")], "chest", BY_IMAGE_ALONE),
        ([("a", "Why?", "No")], None, OPEN),
    ],
)
def test_organ_of_the_first_row(rows, organ, how):
    first = join_organs(rows, INDEX)[0]
    assert (first.organ, first.how) == (organ, how)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.integers(0, 9),
        st.tuples(
            st.sampled_from(["abd", "chest", "head"]),
            st.lists(st.tuples(st.sampled_from("pqrs"), st.sampled_from(["yes", "no"])), min_size=1, max_size=4),
        ),
        max_size=10,
    )
)
def test_a_full_reference_never_gives_a_wrong_organ(pictures):
    """With every row in the reference a decision is right or open, whatever the questions."""
    rows = [(str(name), q, a, organ) for name, (organ, asked) in pictures.items() for q, a in asked]
    index = ReferenceIndex(Reference(organ, question, answer, {}) for _, question, answer, organ in rows)
    decisions = join_organs([row[:3] for row in rows], index)
    for (_, _, _, organ), decision in zip(rows, decisions, strict=True):
        assert decision.organ in (organ, None)
        assert organ in decision.candidates
        assert (decision.organ is None) == (decision.how == OPEN)


def example(number, image="a.jpg", question="Is it?", answer="yes", split=TRAIN, **fields):
    return Example(number, image, question, answer, fields.pop("domain", "abd"), split, **fields)


def test_repeats_and_leaks_are_dropped_from_training_only():
    rows = [
        example(1),
        example(2, question="IS IT", answer="Yes."),
        example(3, question="Where?"),
        example(4, question="Where?", split=TEST),
        example(5, question="Where?", split=TEST),
        example(6, image="b.jpg"),
    ]
    report = Report("x")
    assert [row.id for row in drop_repeats(rows, report)] == [1, 4, 5, 6]
    assert [(row["question_id"], row["same_as"], row["reason"]) for row in report.dropped] == [
        (2, 1, "repeats a training row"),
        (3, 4, "leak: repeats a test row"),
    ]


def test_copies_of_a_picture_count_as_the_picture():
    rows = [
        example(1, "a.jpg", picture="same"),
        example(2, "b.jpg", picture="same"),
        example(3, "c.jpg", picture="other"),
    ]
    assert [row.id for row in drop_repeats(rows, Report("x"))] == [1, 3]
    groups = picture_groups(rows)
    assert groups["a.jpg"] == groups["b.jpg"] != groups["c.jpg"]


def test_pictures_are_tied_over_others():
    rows = [
        example(1, "a", links=("x",)),
        example(2, "b", links=("x", "y")),
        example(3, "c", links=("y",)),
        example(4, "d"),
    ]
    assert picture_groups(rows) == {"a": "a", "b": "a", "c": "a", "d": "d"}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 5), st.integers(0, 3)), max_size=60), st.integers(0, 3))
def test_unseen_split_keeps_pictures_and_cases_apart_and_drops_repeats(rows, seed):
    examples = [
        example(number, f"{image}.jpg", f"question {asked}", links=(f"case {image % 5 if case else image}",))
        for number, (image, asked, case) in enumerate(rows)
    ]
    split, fold_of = unseen_split(examples, seed)
    assert len(split) == len({row.content() for row in examples})
    groups = picture_groups(split)
    sides: dict[str, set[str]] = {}
    for row in split:
        sides.setdefault(groups[row.image], set()).add(row.split)
        assert row.split == (TEST if fold_of[row.id] in (0, 1) else TRAIN)
    assert all(len(side) == 1 for side in sides.values())
    assert unseen_split(list(reversed(examples)), seed)[0] != [] or not examples


def test_unseen_split_depends_on_the_seed_only():
    examples = [example(number, f"{number}.jpg", domain=("abd", "head")[number % 2]) for number in range(40)]
    first, _ = unseen_split(examples, 0)
    assert unseen_split(examples, 0)[0] == first
    assert unseen_split(examples, 1)[0] != first
    for domain in ("abd", "head"):
        assert sum(row.split == TEST and row.domain == domain for row in first) == 4


def test_csv_keeps_answers_that_pandas_would_take_for_missing(tmp_path):
    path = tmp_path / "metadata.csv"
    path.write_text('file_name,Question,ANSWER\na.jpg,"What, if\nany?",None\n\nb.jpg,Which?,NA\n', encoding="utf-8-sig")
    rows = read_metadata(path, Report("x"), first_id=5)
    assert [(row.id, row.image, row.question, row.answer) for row in rows] == [
        (5, "a.jpg", "What, if any?", "None"),
        (6, "b.jpg", "Which?", "NA"),
    ]
    assert all(row.split == TRAIN and row.domain is None for row in rows)


def test_csv_with_every_optional_column(tmp_path):
    path = tmp_path / "metadata.csv"
    path.write_text(
        "qid,image,question,answer,split,answer_type,question_type,organ\nx7,a.jpg,q,a,TEST,open ,PRSE,ABD\n"
    )
    (row,) = read_metadata(path, Report("x"))
    assert row == Example("x7", "a.jpg", "q", "a", "abd", TEST, "OPEN", ("PRES",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "the file is empty"),
        ("image,question,answer\n", "a header but no rows"),
        ("image;question;answer\na;b;c\n", "line 1: no column for 'image'"),
        ("image,question\na,b\n", "line 1: no column for 'answer' (answer or gpt4_answer) in: image, question"),
        ('image,question,answer\na,"two\nlines",x\nb,,y\n', "line 4: field 'question' is empty"),
        ("image,question,answer\na,b,c\n\nd,e,nan\n", "line 4: field 'answer' is empty"),
        ("image,question,answer\na,b,<NA>\n", "line 2: field 'answer' is empty"),
        (
            "image,question,answer\n\"{'bytes': b'\\x89PNG', 'path': None}\",b,c\n",
            "the picture itself stands in the cell",
        ),
        ("image,question,answer\n\"{'bytes': b'\\x89P\",b,c\n", "the picture itself stands in the cell"),
        ("image,question,answer\n{},b,c\n", "the picture itself stands in the cell"),
        ("image,question,answer\na,b\n", "line 2: field 'answer' is empty"),
        ("image,question,answer\na,b,c,d\n", "broken csv"),
        ("image,question,answer\na,b,c\na,b,c,d\n", "line 3"),
        ('image,question,answer\na,"b,c\n', "broken csv"),
        ("image,question,answer,split\na,b,c,dev\n", "line 2: field 'split': expected train or test, found 'dev'"),
        ("image,question,answer,domain\na,b,c,two words\n", "line 2: field 'domain': expected one word"),
        ("image,question,answer,answer_type\na,b,c,yes/no\n", "line 2: field 'answer_type'"),
        (b"image,question,answer\na,b,\xff\n", "not UTF-8"),
        (b"image,question,answer\na\x00,b,c\n\x00\n", "metadata.csv"),
    ],
)
def test_bad_csv_is_refused_with_its_line(tmp_path, content, words):
    path = tmp_path / "metadata.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_metadata(path, Report("x"))
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
