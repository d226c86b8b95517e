"""The fuzzing program by itself: its whole files are read or refused in one line, and what is neither is kept."""

import pytest
from fuzz import fuzz_readers


@pytest.fixture
def target(tmp_path):
    (tmp_path / "read").mkdir()
    return fuzz_readers.Target(tmp_path / "read", tmp_path / "findings")


def test_no_whole_file_and_no_part_of_one_is_a_finding(target):
    for name, data in fuzz_readers.seeds():
        for size in {len(data), len(data) // 2, 1, 0}:
            target(target.input_of(name, data[:size]))
    assert not target.told


def test_a_reader_that_fails_is_told_once_with_its_input(target, capsys):
    def fail(path):
        raise ValueError("of the reader")

    target.readers["rows"] = ("rows.jsonl", fail)
    for data in (b"one", b"two"):
        target(target.input_of("rows", data))
    (kept,) = target.findings.iterdir()
    assert kept.read_bytes() == b"one" and capsys.readouterr().out.count("FOUND rows: ValueError") == 1
