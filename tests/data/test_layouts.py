"""Rows of other programs are read as what they are; what nearly is a known field, or can't be read, is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.layouts import INSTRUCT_FIELDS, NOT_READ, OWN_FIELDS, PICTURE_FIELDS, QUESTION_FIELDS
from llava.data.rows import Row, parse_row, read_rows
from llava.utils import UserError

TURNS = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A rib."}]
ASKED = (("human", "What is it?"), ("gpt", "A rib."))
MESSAGES = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A rib."}]
PARTS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A rib."}]},
]


def shapes(row: Row):
    return row.images, tuple((who, text.replace("<image>", "").strip()) for who, text in row.conversations)


@pytest.mark.parametrize("name", ("image", *PICTURE_FIELDS))
@pytest.mark.parametrize("value", ["a.png", ["a.png"], {"path": "a.png", "bytes": None}, [{"path": "a.png"}]])
def test_a_picture_is_seen_under_every_known_name(name, value):
    assert parse_row({"question_id": 1, name: value, "text": "What is it?"}).images == ("a.png",)
    assert parse_row({"id": 1, name: value, "conversations": TURNS}).images == ("a.png",)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": TURNS, "images": ["a.png"]},
        {"conversations": TURNS, "images": "a.png", "system": "", "tools": ""},
        {"instruction": "What is it?", "input": "", "output": "A rib.", "images": ["a.png"]},
        {"messages": MESSAGES, "images": ["a.png"]},
        {"messages": MESSAGES, "images": [{"path": "a.png", "bytes": None}], "videos": []},
        {"messages": PARTS, "images": ["a.png"]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "path": "a.png"}, PARTS[0]["content"][1]]},
                MESSAGES[1],
            ]
        },
        {"query": "<image>What is it?", "response": "A rib.", "images": ["a.png"], "history": []},
        {"image": {"path": "a.png", "bytes": None}, "question": "What is it?", "answer": "A rib."},
        {"qid": 7, "image_name": "a.png", "question": "What is it?", "answer": "A rib."},
        {"question_id": 7, "image": "a.png", "text": "What is it?", "answer": "A rib."},
    ],
)
def test_other_programs_rows_are_read_as_what_they_are(row, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row, row]))
    rows = read_rows(path, require_answer=True)
    assert [shapes(found) for found in rows] == [(("a.png",), ASKED)] * 2
    assert [found.id for found in rows] == ([7, 7] if {"qid", "question_id"} & set(row) else [0, 1])
    assert rows[0].raw == row


def test_it_is_said_once_where_pictures_are_read_from(tmp_path, capsys):
    rows = [{"id": number, "conversations": TURNS, name: "a.png"} for number, name in enumerate(["images", "img"] * 2)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    read_rows(tmp_path / "rows.json")
    said = capsys.readouterr().out
    assert said.count("note:") == 1 and "pictures are read from 'images', 'img', which stands for 'image'" in said
    (tmp_path / "own.json").write_text(
        json.dumps([{"id": 1, "image": "a.png", "image_name": "a", "conversations": TURNS}])
    )
    read_rows(tmp_path / "own.json")
    assert capsys.readouterr().out == ""


def test_history_and_system_are_turns():
    row = parse_row(
        {"query": "And now?", "response": "no", "history": [["What is it?", "A rib."]], "system": "Be brief."}
    )
    assert row.conversations == (*ASKED, ("human", "And now?"), ("gpt", "no"))
    assert row.system == "Be brief."
    assert parse_row({"id": 1, "conversations": TURNS, "system": "Be brief."}).system == "Be brief."


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question_id": 1, "text": "?a", "iamge": "a.png"}, "unknown field 'iamge'; did you mean 'image'?"),
        ({"question_id": 1, "text": "?a", "Image": "a.png"}, "unknown field 'Image'; did you mean 'image'?"),
        ({"question_id": 1, "text": "?a", "gpt4_anwser": "yes"}, "did you mean 'gpt4_answer'?"),
        ({"question_id": 1, "text": "?a", "anwser_type": "OPEN"}, "did you mean 'answer_type'?"),
        ({"question_id": 1, "text": "?a", "answer-type": "OPEN"}, "did you mean 'answer_type'?"),
        ({"question_id": 1, "text": "?a", "domains": {"abd": True}}, "did you mean 'domain'?"),
        ({"question_id": 1, "txt": "?a"}, "did you mean 'text'?"),
        ({"id": 1, "conversation": TURNS}, "did you mean 'conversations'?"),
        ({"id": 1, "conversations": TURNS, "domian": {"abd": True}}, "did you mean 'domain'?"),
        ({"id": 1, "conversations": TURNS, "image_url": "a.png"}, "field 'image_url' seems to name a picture"),
        ({"id": 1, "conversations": TURNS, "xray_img": "a.png"}, "field 'xray_img' seems to name a picture"),
        ({"id": 1, "conversations": TURNS, "videos": ["a.mp4"]}, "field 'videos': rows of pictures and texts alone"),
        ({"id": 1, "conversations": TURNS, "tools": "[]x"}, "field 'tools'"),
        ({"id": 1, "conversations": TURNS, "image": "a.png", "images": ["b.png"]}, "name different pictures"),
        ({"id": 1, "conversations": TURNS, "img": "a.png", "file_name": "b.png"}, "name different pictures"),
        ({"question": "?a", "image": {"bytes": "iVBOR", "path": None}}, "the picture itself stands in the row"),
        ({"messages": []}, "expected a list of {role, content}"),
        ({"messages": [{"role": "user"}]}, "turn 1, 'content': expected a string, found nothing"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "parts of the type 'text' or 'image'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "turn 1: expected 'from' to be 'human' or 'gpt'"),
        ({"query": "?a", "history": ["x"]}, "expected pairs of question and answer"),
        ({"instruction": 3}, "field 'instruction': expected a string"),
        ({"question": None, "answer": "x"}, "field 'question': expected a string, found nothing"),
        ({"question_id": 1, "text": "?a", "gpt4_answer": "null"}, "stands for a missing value"),
    ],
)
def test_what_is_nearly_known_or_cannot_be_read_is_refused_by_name(row, words):
    with pytest.raises(UserError) as caught:
        parse_row(row, "here")
    assert str(caught.value).startswith("here: ") and words in str(caught.value)


def test_fields_of_no_meaning_here_are_kept():
    more = {
        "fold": 3,
        "phrase_type": "para",
        "location": "Lung",
        "conversation_id": 5,
        "caption": "x",
        "type": "detail",
    }
    row = {"question_id": 1, "image": "a.png", "text": "What?", "image_organ": "CHEST", **more}
    assert parse_row(row).raw == row
    assert parse_row({"id": 1, "conversations": TURNS, **more}).images == ()
    assert parse_row({"messages": MESSAGES, **more}).conversations == ASKED


def test_a_row_of_another_domain_trains_no_task(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"question_id": 1, "text": "What?", "gpt4_answer": "yes", "domain": {"abd": False, "chest": True}}
    path.write_text(json.dumps(row))
    assert len(read_rows(path, one_task=True, tasks=["chest", "abd"])) == 1
    with pytest.raises(UserError, match=r"line 1: field 'domain': the row is of 'chest', but the file trains 'abd'"):
        read_rows(path, one_task=True, tasks=["abd"])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=6) | st.just("<image>\na.png"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["from", "value", "role", "content", "type", "text", "image", "path", "bytes", "abd"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(
    sorted(
        {
            *OWN_FIELDS,
            *QUESTION_FIELDS,
            *INSTRUCT_FIELDS,
            *NOT_READ,
            "messages",
            "query",
            "response",
            "instruction",
            "output",
            "history",
            "question",
            "answer",
            "qid",
        }
    )
) | st.text(max_size=9)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=7) | VALUES)
def test_any_row_is_read_or_refused_in_one_line(value):
    before = json.dumps(value)
    try:
        row = parse_row(value, "here")
    except UserError as error:
        assert str(error).startswith("here") and "\n" not in str(error)
    else:
        assert row.conversations and row.raw is value
    assert json.dumps(value) == before
