"""The row formats: what is accepted, what is refused and with which words, and that writing and reading agree."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava.data.answers import read_answers
from llava.data.layouts import is_missing
from llava.data.rows import parse_row, question_row, read_rows, write_jsonl
from llava.utils import UserError

DEMO = {
    "question_id": 101,
    "image": "test_img_00101.jpg",
    "pair_id": "test_img_00101",
    "text": "is there evidence of air in the peritoneal cavity?\n<image>",
    "domain": {"abd": True, "chest": False, "head": False},
}
INSTRUCT = {
    "id": "7",
    "image": "a.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is this?"},
        {"from": "gpt", "value": "A chest X-ray."},
        {"from": "human", "value": "Normal?"},
        {"from": "gpt", "value": "Yes"},
    ],
}


def write(path, *lines, ending="\n"):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + ending for line in lines))
    return path


def test_demo_row_of_the_seed(tmp_path):
    (row,) = read_rows(write(tmp_path / "demo.jsonl", DEMO))
    assert row.id == 101
    assert row.image == "test_img_00101.jpg"
    assert row.domain == "abd"
    assert row.question == "is there evidence of air in the peritoneal cavity?"
    assert row.answer is None
    assert row.answer_type is None
    assert row.conversations == (("human", DEMO["text"]),)


def test_demo_row_spread_over_lines_as_the_seed_prints_it(tmp_path):
    path = tmp_path / "demo.jsonl"
    path.write_text(json.dumps(DEMO, indent=4) + "\n" + json.dumps({**DEMO, "question_id": 102}, indent=4))
    assert [row.id for row in read_rows(path)] == [101, 102]


def test_demo_sample_file_is_the_demo_row():
    (row,) = read_rows(Path(__file__).parents[2] / "demo_sample.jsonl")
    assert row.raw == DEMO


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows"])
def test_instruct_rows_are_told_by_content_not_by_file_ending(tmp_path, as_list, name):
    path = tmp_path / name
    other = {**INSTRUCT, "id": 8}
    text = json.dumps([INSTRUCT, other], indent=1) if as_list else f"{json.dumps(INSTRUCT)}\n\n{json.dumps(other)}"
    path.write_text(text)
    first, second = read_rows(path, require_answer=True)
    assert (first.id, second.id) == ("7", 8)
    assert first.question == "What is this?"
    assert first.answer == "A chest X-ray."
    assert len(first.conversations) == 4


def test_question_row_with_answer_has_two_turns_and_keeps_unknown_fields(tmp_path):
    (row,) = read_rows(write(tmp_path / "a", {**DEMO, "gpt4_answer": "no", "answer_type": "CLOSED ", "fold": 3}))
    assert row.conversations == (("human", DEMO["text"]), ("gpt", "no"))
    assert row.answer == "no"
    assert row.answer_type == "CLOSED"
    assert row.raw["fold"] == 3


def test_integer_answer_is_read_as_text():
    assert parse_row({**DEMO, "gpt4_answer": 4}).answer == "4"


def test_slip_in_the_name_of_conversations_and_a_leading_model_turn_are_accepted():
    turns = [{"from": "gpt", "value": "Hello"}, *INSTRUCT["conversations"]]
    row = parse_row({"id": 1, "image": "a.jpg", "conversatons": turns})
    assert row.conversations[0] == ("human", "<image>\nWhat is this?")


def test_text_only_row():
    row = parse_row({"question_id": 1, "text": "What is a CT?"})
    assert row.image is None
    assert row.question == "What is a CT?"


def test_rows_are_hashable_and_line_separators_inside_text_do_not_end_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{**DEMO, "text": "one\u2028two\x85three\r\n<image>"}])
    (row,) = read_rows(path)
    assert row.question == "one\u2028two\x85three"
    assert len({row, row}) == 1


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(DEMO).encode() + b"\r\n")
    assert read_rows(path)[0].id == 101


BAD_ROWS = [
    ([1, 2], "expected a JSON object, found a list"),
    ({}, "field 'text' is missing"),
    (
        {
            "id": 1,
            "image": "a.png",
            "conversations": [{"from": "system", "value": "<image>"}, {"from": "human", "value": "q"}],
        },
        "field 'conversations', turn 1: the system turn names <image>",
    ),
    ({**DEMO, "question_id": None}, "field 'question_id': expected a whole number or a string, found nothing"),
    ({**DEMO, "question_id": 1.0}, "field 'question_id': expected a whole number or a string, found a number (1.0)"),
    ({**DEMO, "question_id": True}, "field 'question_id'"),
    ({**DEMO, "question_id": 1.5}, "field 'question_id'"),
    ({**DEMO, "question_id": ""}, "field 'question_id'"),
    ({**DEMO, "text": 7}, "field 'text': expected a string, found a number"),
    ({**DEMO, "text": " <image> \n"}, "field 'text': the question is empty"),
    ({**DEMO, "text": "<image> <image> which?"}, "2 times <image> for one image"),
    ({**DEMO, "image": None}, "names <image> but the row has no 'image'"),
    ({**DEMO, "image": " "}, "field 'image': the file name is empty"),
    ({**DEMO, "image": ["a.jpg", "b.jpg"]}, "1 times <image> for 2 images"),
    ({**DEMO, "image": ["a.jpg", 3]}, "field 'image': expected a string, found a number"),
    ({**DEMO, "image": ["a.jpg", " "]}, "field 'image': the file name is empty"),
    ({**DEMO, "image": []}, "names <image> but the row has no 'image'"),
    ({**DEMO, "image": {"file": "a.jpg"}}, "field 'image': expected a string, found an object"),
    ({**DEMO, "gpt4_answer": "NaN"}, "field 'gpt4_answer': 'NaN' stands for a missing value"),
    ({**DEMO, "domain": "abd"}, "field 'domain': expected an object"),
    ({**DEMO, "domain": {"abd": 1}}, "field 'domain': expected an object"),
    ({**DEMO, "answer_type": "yes/no"}, "field 'answer_type': expected OPEN or CLOSED"),
    ({**DEMO, "gpt4_answer": float("nan")}, "field 'gpt4_answer': expected a string"),
    ({**DEMO, "gpt4_answer": False}, "field 'gpt4_answer': expected a string"),
    ({**DEMO, "text": "\ud800"}, "half a surrogate pair"),
    ({**INSTRUCT, "id": None}, "field 'id'"),
    ({**INSTRUCT, "conversations": []}, "field 'conversations': expected a list"),
    ({**INSTRUCT, "conversations": [{"from": "user", "value": "?"}]}, "turn 1: expected 'from'"),
    ({**INSTRUCT, "conversations": [{"from": "human"}]}, "turn 1, 'value': expected a string, found nothing"),
    ({**INSTRUCT, "conversations": INSTRUCT["conversations"][::2]}, "turns must alternate"),
    ({**INSTRUCT, "conversations": [{"from": "gpt", "value": "Hello"}]}, "turns must alternate"),
    ({**INSTRUCT, "conversations": [{"from": "system", "value": "Be brief."}]}, "turns must alternate"),
    (
        {**INSTRUCT, "conversations": [*INSTRUCT["conversations"], {"from": "system", "value": "Be brief."}]},
        "turn 5: expected 'from' to be 'human' or 'gpt'",
    ),
]


@pytest.mark.parametrize(("row", "words"), BAD_ROWS)
def test_bad_row_is_refused_with_place_and_reason(row, words):
    with pytest.raises(UserError) as caught:
        parse_row(row, "here")
    assert str(caught.value).startswith("here: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no rows"),
        (b"\n \n", "holds no rows"),
        (b"[]", "holds no rows"),
        (json.dumps(DEMO).encode() + b"\n{broken\n", "line 2, column 2: broken JSON"),
        (b'{"a": 1}\n', "line 1: field 'text' is missing"),
        (b'[{"a": 1},\n oops]', "line 2: broken JSON"),
        (b'{\n"a": 1\n', "line 1: broken JSON"),
        (b'{"a": "\xff"}\n', "byte 7 is not UTF-8 text"),
        (b"[" * 200_000, "broken JSON"),
        (b'{"question_id": ' + b"9" * 5000 + b"}", "broken JSON"),
    ],
)
def test_bad_file_is_refused_with_its_name_and_line(tmp_path, content, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_missing_file_says_how_to_mend_it(tmp_path):
    with pytest.raises(UserError, match="row file not found: .*fusion.py"):
        read_rows(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    "row", [DEMO, {**DEMO, "gpt4_answer": " "}, {**INSTRUCT, "conversations": INSTRUCT["conversations"][:3]}]
)
def test_training_needs_an_answer(tmp_path, row):
    path = write(tmp_path / "rows.jsonl", row)
    assert len(read_rows(path)) == 1
    with pytest.raises(UserError, match=r"rows.jsonl line 1: field '.*': a training row needs an answer"):
        read_rows(path, require_answer=True)


def test_rows_that_share_an_id_are_told_apart_by_their_place(tmp_path):
    assert [row.key for row in read_rows(write(tmp_path / "a.json", [INSTRUCT, INSTRUCT]))] == [("7", 0), ("7", 1)]
    rows = read_rows(write(tmp_path / "b.jsonl", DEMO, {**DEMO, "question_id": 7}, {**DEMO, "question_id": "101"}))
    assert [row.position for row in rows] == [0, None, 2]


def test_a_domain_may_name_several_or_none_but_a_training_row_has_one_task(tmp_path):
    domains = [{"abd": True, "chest": True}, {"abd": False, "chest": False}, {}, {"abd": False, "chest": True}, None]
    values = [{**DEMO, "question_id": number, "domain": domain} for number, domain in enumerate(domains)]
    rows = read_rows(write(tmp_path / "a.jsonl", *values))
    assert [row.domains for row in rows] == [("abd", "chest"), (), (), ("chest",), ()]
    assert [row.domain for row in rows] == [None, None, None, "chest", None]
    assert len(read_rows(write(tmp_path / "b.jsonl", *values[3:]), one_task=True)) == 2
    for value, found in ((values[0], r"2 \(abd, chest\)"), (values[1], r"0 \(none\)")):
        path = write(tmp_path / "c.jsonl", values[3], value)
        with pytest.raises(UserError, match=f"line 2: field 'domain': a training row has one task.* found {found}"):
            read_rows(path, one_task=True)


MED = {
    "question_id": 0,
    "image": "18063892_F3.jpg",
    "pair_id": "18063892_F3",
    "text": "What is the organ in the image?\n<image>",
    "gpt4_answer": "The conjunctiva.",
    "fig_caption": "The gross histopathologic finding disclosed a cystic wall.",
    "in_text_mention": [{"tokens": "( Fig. 3 )", "entities": [{"type": "figure", "entity_id": "3"}]}],
    "domain": {"chest_xray": False, "mri": False, "ct_scan": False, "histology": True, "gross": True},
    "type": "conversation",
    "fig_label": "Fig. 3",
}


def test_a_row_of_llava_meds_own_evaluation_file():
    row = parse_row(MED)
    assert (row.domains, row.domain, row.answer) == (("histology", "gross"), None, "The conjunctiva.")
    assert parse_row({**MED, "in_text_mention": None, "type": "detailed_description"}).question == row.question


def test_rows_with_several_pictures():
    two = {"question_id": 1, "image": ["a.png", "b.png"], "text": "<image>\n<image>\nChanged?"}
    row = parse_row(two)
    assert (row.images, row.shown, row.image) == (("a.png", "b.png"), ("a.png", "b.png"), "a.png")
    assert row.question == "Changed?"
    bare = parse_row({**two, "text": "Changed?"})
    assert bare.shown == ("a.png", "b.png")
    assert parse_row({**DEMO, "image": ["a.jpg"]}).images == ("a.jpg",)
    assert parse_row({"question_id": 1, "image": [], "text": "What is a CT?"}).images == ()
    turns = [("human", "<image> What is this?"), ("gpt", "A rib."), ("human", "And <image>?"), ("gpt", "A lung.")]
    turns = [{"from": who, "value": text} for who, text in turns]
    later = parse_row({"id": 1, "image": ["a.png", "b.png"], "conversations": turns})
    assert later.shown == ("a.png",)
    with pytest.raises(UserError, match="2 times <image> for 3 images"):
        parse_row({"id": 1, "image": ["a.png", "b.png", "c.png"], "conversations": turns})


def test_a_system_turn_is_the_rows_system_text():
    turns = [{"from": "system", "value": " Be brief. "}, *INSTRUCT["conversations"]]
    row = parse_row({**INSTRUCT, "conversations": turns})
    assert row.system == "Be brief." and row.conversations == parse_row(INSTRUCT).conversations
    turns[0] = {"from": "system", "value": " "}
    assert parse_row({**INSTRUCT, "conversations": turns}).system is None


def test_question_row_by_hand():
    row = question_row(
        3, "xmlab1/source.jpg", " Is it CT? ", "Yes", "ct", ["ct", "mri"], split="train", answer_type=None
    )
    assert row == {
        "question_id": 3,
        "image": "xmlab1/source.jpg",
        "pair_id": "xmlab1/source",
        "text": "Is it CT?\n<image>",
        "gpt4_answer": "Yes",
        "domain": {"ct": True, "mri": False},
        "split": "train",
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1, "a.jpg", "q", "a", "knee", ["abd"]), "domain 'knee' is not one of abd"),
        ((1, "a.jpg", " ", "a", None), "question is empty"),
        ((1, "a.jpg", "what <image>?", "a", None), "holds '<image>'"),
        ((None, "a.jpg", "q", "a", None), "question_id"),
    ],
)
def test_question_row_refuses_what_its_reader_would_refuse(arguments, words):
    with pytest.raises(UserError, match=words):
        question_row(*arguments)


def test_an_answer_may_leave_its_metadata_empty(tmp_path):
    answers = [{"question_id": number, "text": "x", "metadata": value} for number, value in enumerate(({}, None))]
    assert read_answers(write(tmp_path / "answers.jsonl", *answers, {"question_id": 3, "text": "x"}))[:2] == answers


def test_answers_of_a_killed_writer(tmp_path):
    answer = {"question_id": 1, "prompt": "q", "text": "", "answer_id": "x", "model_id": "m", "metadata": {}}
    path = write(tmp_path / "answers.jsonl", answer, '{"question_id": 2, "te')
    assert read_answers(path, partial_last_line=True) == [answer]
    with pytest.raises(UserError, match="line 2, column .*: broken JSON"):
        read_answers(path)
    # A whole object whose newline is missing counts as not written: something appended would share its line.
    write(path, answer, {**answer, "question_id": 2}, ending="")
    assert read_answers(path, partial_last_line=True) == []
    path.write_text("")
    assert read_answers(path, partial_last_line=True) == []
    with pytest.raises(UserError, match="holds no answers"):
        read_answers(path)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (3, "expected a JSON object"),
        ({"text": "x"}, "field 'question_id'"),
        ({"question_id": 1}, "field 'text'"),
        ({"question_id": 1, "text": "x", "metadata": []}, "field 'metadata': expected an object"),
    ],
)
def test_bad_answer_is_refused(tmp_path, answer, words):
    with pytest.raises(UserError, match=f"line 1: {words}"):
        read_answers(write(tmp_path / "answers.jsonl", answer))


@pytest.mark.parametrize("bad", [float("nan"), {1, 2}, "\ud800"])
def test_failed_writing_leaves_the_old_file(tmp_path, bad):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [DEMO])
    before = path.read_bytes()
    with pytest.raises(UserError, match="row 2 cannot be written as JSON"):
        write_jsonl(path, [DEMO, {"x": bad}])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: text.strip() and "<image>" not in text
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "question_id",
    "id",
    "image",
    "text",
    "gpt4_answer",
    "domain",
    "answer_type",
    "conversations",
    "from",
    "value",
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    question=TEXT,
    answer=TEXT.filter(lambda text: not is_missing(text)),  # "nan" stands for no answer
    image=st.text("abcäß/_-. 0", min_size=1, max_size=12).filter(lambda name: PurePosixPath(name.strip()).name),
    identifier=st.integers() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    domain=st.sampled_from(["abd", "chest", "head"]),
)
def test_what_question_row_builds_is_read_back(tmp_path, question, answer, image, identifier, domain):
    path = tmp_path / "rows.jsonl"
    built = question_row(identifier, image, question, answer, domain, ["abd", "chest", "head"], answer_type="OPEN")
    write_jsonl(path, [built])
    (row,) = read_rows(path)
    assert row.raw == built
    assert (row.id, row.image, row.domain) == (identifier, image, domain)
    assert row.question == question.strip()
    assert row.conversations[1] == ("gpt", answer)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(FIELDS), JSON | st.lists(st.dictionaries(st.sampled_from(FIELDS), JSON)), max_size=6
    )
)
@pytest.mark.slow
def test_any_json_is_a_row_or_one_line_of_reason(value):
    try:
        row = parse_row(value, "here")
    except UserError as error:
        assert str(error).startswith("here: ")
        return
    assert row.question
    assert row.conversations[0][0] == "human"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_rows_or_one_user_error(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    for read in (read_rows, read_answers):
        with pytest.raises(UserError):
            read(path)


def test_an_image_that_names_no_file_is_refused():
    with pytest.raises(UserError, match="names no file"):
        question_row(1, "/", "What is this?", "a lung", None)
