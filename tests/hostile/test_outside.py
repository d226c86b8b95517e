"""The one reader of JSON, and the one checker of fields: whatever a file holds, the answer is a value or one line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.jsonl import json_values
from llava.outside import foreign, parsed, parsed_yaml, read_json, read_object
from llava.schema import check_fields, list_of, number, whole, words, yes_or_no
from llava.utils import UserError

DEEP = 50_000
BROKEN = {
    "empty": b"",
    "blank": b" \n\t",
    "cut": b'{"a": [1, 2',
    "two values": b"{} {}",
    "trailing comma": b'{"a": 1,}',
    "single quotes": b"{'a': 1}",
    "a comment": b'{"a": 1 // one\n}',
    "python": b'{"a": None}',
    "a field twice": b'{"a": 1, "a": 2}',
    "a field twice, inside": b'{"b": [{"a": 1, "a": 2}]}',
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deeper than any file": b'{"a":' * 101 + b"1" + b"}" * 101,
    "an endless number": b'{"a": ' + b"9" * 5000 + b"}",
    "utf-16": '{"a": "é"}'.encode("utf-16"),
    "utf-16 without its mark": '{"a": "é"}'.encode("utf-16-be"),
    "utf-32": '{"a": "é"}'.encode("utf-32"),
    "latin-1": '{"a": "é"}'.encode("latin-1"),
    "bytes": bytes(range(256)),
    "zeros": b"\0" * 64,
    "gzip": b"\x1f\x8b\x08\0" + b"\1" * 40,
    "a control character": b'{"a": "\x01"}',
    "two marks": b"\xef\xbb\xbf\xef\xbb\xbf{}",
}
NO_OBJECT = {"a list": b"[1]", "a number": b"3", "a text": b'"x"', "null": b"null", "true": b"true", "NaN": b"NaN"}


def one_line(call, *said) -> str:
    """The message of a refusal, which is one line that names the file."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and len(line) < 2000, line
    assert all(word in line for word in said), line
    return line


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_json_is_one_line(tmp_path, name):
    path = tmp_path / "file.json"
    path.write_bytes(BROKEN[name])
    one_line(lambda: read_object(path), "file.json")
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b'{"question_id": 1}\n' + BROKEN[name] + b"\n")
    if name not in ("empty", "blank", "two values", "two marks"):  # lines may be blank
        one_line(lambda: list(json_values(rows)), "rows.jsonl")


@pytest.mark.parametrize("name", NO_OBJECT)
def test_what_is_no_object_is_one_line(tmp_path, name):
    path = tmp_path / "file.json"
    path.write_bytes(NO_OBJECT[name])
    one_line(lambda: read_object(path), "file.json: expected a JSON object, found ")


def test_the_place_and_the_mend_are_said(tmp_path):
    path = tmp_path / "file.json"
    path.write_text('{\n "a": 1,\n oops\n}')
    one_line(lambda: read_object(path), "file.json, line 3: broken JSON (Expecting property name")
    path.write_text('{"a": 1, "b": {"rank": 1, "rank": 2}}')
    one_line(lambda: read_object(path), "field 'rank' occurs twice in one object")
    path.write_bytes("{}".encode("utf-16"))
    one_line(lambda: read_object(path), "looks like UTF-16", "save the file as UTF-8")
    one_line(
        lambda: read_object(tmp_path / "absent.json", "scores file", "score again"), "scores file not found", "score"
    )
    one_line(lambda: read_object(tmp_path), "not found")


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(json.dumps({"a": "é"}).encode("utf-8-sig"))
    assert read_object(path) == {"a": "é"}
    one_line(lambda: read_object(path, bare=True), "begins with a byte order mark, which transformers refuse")


def test_nesting_within_reason_and_long_flat_files_pass():
    deep: list = []
    for _ in range(60):
        deep = [deep]
    assert parsed(json.dumps(deep), "x") == deep
    assert len(parsed(json.dumps([[1], {}] * 5000), "x")) == 10_000


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_a_value_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(data)
    try:
        read_json(path)
    except UserError as error:
        assert "\n" not in str(error)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SCHEMA = {"rank": whole(1, 64), "tau": number(above=0), "router": words(("keys", "ridge")), "names": list_of(words())}


@given(st.dictionaries(st.sampled_from([*SCHEMA, "ranks", "zzz"]), VALUES, max_size=4))
@settings(max_examples=200, deadline=None)
def test_any_values_fit_or_are_one_line(values):
    try:
        check_fields(values, SCHEMA, "x.json")
    except UserError as error:
        assert str(error).startswith("x.json: ")
    else:
        assert set(values) <= set(SCHEMA)
        assert values.get("rank") is None or 1 <= values["rank"] <= 64


@pytest.mark.parametrize(
    "values, message",
    [
        ({"rnak": 4}, "unknown field 'rnak'; did you mean 'rank'?"),
        ({"rank": "4"}, "rank is '4'; write an integer of 1 or more, 64 at most"),
        ({"rank": 4.0}, "rank is 4.0; write an integer"),
        ({"rank": True}, "rank is True; write an integer"),
        ({"rank": 10**9}, "64 at most"),
        ({"tau": 0}, "tau is 0; write a number above 0"),
        ({"tau": float("nan")}, "tau is nan; write a number"),
        ({"tau": float("inf")}, "tau is inf; write a number"),
        ({"tau": 10**400}, "write a number"),
        ({"router": "key"}, "router is 'key'; known: keys, ridge"),
        ({"router": "\ud800"}, "known: keys"),
        ({"names": "abd"}, "names is 'abd'; write a list"),
        ({"names": ["abd", 3]}, "names, entry 2 is 3; write a text in quotes"),
    ],
)
def test_a_field_is_named_with_what_was_found_and_what_is_wanted(values, message):
    one_line(lambda: check_fields(values, SCHEMA, "x.json"), f"x.json: {message}" if "field" in message else message)


@pytest.mark.parametrize(
    "slip", ["mm_projector_typ", "mm_projektor_type", "mm_porjector_type", "mm_projector_types", "MM-projector-type"]
)
def test_in_other_peoples_files_only_slips_are_refused(slip):
    known = {"mm_projector_type": words(), "mm_vision_tower": words(), "use": yes_or_no}
    check_fields({"anything": 3, "mm_vision_tower_lr": 1.0, "us": 1}, known, "x", closed=False)
    check_fields({"mm_projector_type": "linear", slip: "linear"}, known, "x", closed=False)  # the right one is there
    one_line(lambda: check_fields({slip: "linear"}, known, "x", closed=False), "did you mean 'mm_projector_type'?")


@pytest.mark.parametrize("text", ["a: [", "a: !!python/object/apply:os.system ['true']", "a: 2024-99-99", "[" * DEEP])
def test_yaml_is_plain_values_or_one_line(text):
    one_line(lambda: parsed_yaml(text, "README.md"), "README.md: broken YAML")


@pytest.mark.parametrize(
    "error", [KeyError("a"), TypeError("no"), Exception(""), RuntimeError("two\nlines"), OSError("x")]
)
def test_what_a_library_raises_of_a_file_is_one_line(error):
    def read():
        with foreign("tokenizer.json", "copy it again"):
            raise error

    one_line(read, "tokenizer.json: cannot be read here (", "; copy it again")


@pytest.mark.parametrize("error", [OSError(28, "No space left"), PermissionError(13, "denied"), MemoryError()])
def test_a_machine_without_room_is_no_fault_of_a_file(error):
    with pytest.raises(type(error)), foreign("tokenizer.json", "copy it again"):
        raise error
