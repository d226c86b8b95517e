"""Any change of a whole file, to every reader: it is read, or refused in one line. The fuzzing program by itself."""

import copy
import io
import json
from functools import partial

import pytest
import torch
from fuzz import fuzz_readers
from hypothesis import given, settings
from hypothesis import strategies as st

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["abd", "../a", "1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
BYTES = st.tuples(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=3), st.integers(0, 3000))
"""New bytes by their places, and where the file is cut."""
examples = pytest.mark.parametrize("count", [6, pytest.param(150, marks=pytest.mark.thorough)])


@pytest.fixture
def target(tmp_path):
    (tmp_path / "read").mkdir()
    return fuzz_readers.Target(tmp_path / "read", tmp_path / "findings")


def test_every_reader_has_a_whole_file(target):
    assert {name for name, _ in fuzz_readers.seeds()} == target.readers.keys()


def test_no_whole_file_and_no_part_of_one_is_a_finding(target):
    for name, data in fuzz_readers.seeds():
        for size in {len(data), len(data) // 2, 1, 0}:
            target(target.input_of(name, data[:size]))
    assert not target.told


@examples
def test_other_bytes_in_a_whole_file_are_no_finding(target, count):
    for name, data in fuzz_readers.seeds():
        tried(target, name, BYTES.map(partial(with_bytes, data)), count)


@examples
def test_other_values_in_a_whole_file_are_no_finding(target, count):
    for name, data in fuzz_readers.seeds():
        whole, written = structure(name, data)
        if whole is not None:
            tried(target, name, with_values(whole).map(written), 2 * count)


def tried(target, name, files, count):
    """A reader's some files; hypothesis makes the smallest of one that is neither read nor refused."""

    @given(files)
    @settings(max_examples=count)
    def check(data):
        target.told.clear()
        target(target.input_of(name, data))
        assert not target.told

    check()


def with_bytes(data, change):
    places, cut = change
    changed = bytearray(data)
    for place, value in places:
        changed[place % len(data)] = value
    return bytes(changed[: cut or None])


@st.composite
def with_values(draw, whole):
    """The same with one value exchanged or left out, at any depth."""
    path, key = draw(st.sampled_from(places(whole)))
    changed = copy.deepcopy(whole)
    holder = changed
    for step in path:
        holder = holder[step]
    if draw(st.integers(0, 4)):
        holder[key] = draw(VALUES)
    else:
        del holder[key]
    return changed


def structure(name, data):
    """The values of a file and how they are written; nothing for a file of another kind."""
    if name == "slots":
        return torch.load(io.BytesIO(data), weights_only=True), saved
    try:
        whole = json.loads(data.splitlines()[0])
    except ValueError:
        return None, None
    return whole, lambda value: json.dumps(value).encode()


def saved(value) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def places(value, path=()):
    """Each value in nested dictionaries and lists, by the way to what holds it and its key there."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((path, key), *places(value[key], (*path, key)))]


def test_a_reader_that_fails_is_told_once_with_its_input(target, capsys):
    def fail(path):
        raise ValueError("of the reader")

    target.readers["rows"] = ("rows.jsonl", fail)
    for data in (b"one", b"two"):
        target(target.input_of("rows", data))
    (kept,) = target.findings.iterdir()
    assert kept.read_bytes() == b"one" and capsys.readouterr().out.count("FOUND rows: ValueError") == 1
