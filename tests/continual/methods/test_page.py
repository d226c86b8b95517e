"""``docs/methods.md`` says what each method's file says: both are read, and the tables must be equal."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

from llava.continual.methods import METHODS

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
FACTS = ("Paper", "Keeps of past data", "Grows with the tasks", "Task at test time")
FIRST = ["retrieval", "zero_shot", "sequential", "joint", "individual"]


def shipped():
    """The methods of the package, the project's own and the references first."""
    names = [one.name for one in METHODS if one.needs_keys and one.__module__.startswith("llava.")]
    return FIRST + [name for name in sorted(names) if name not in FIRST]


def docstring(name):
    return inspect.getmodule(METHODS.get(name)).__doc__


def facts(name):
    """What a method's file says of it, by the words of ``FACTS``."""
    found = dict(re.findall(rf"^({'|'.join(FACTS)}): (.+)$", docstring(name), re.M))
    return [found.get(word) for word in FACTS]


def about(name):
    """The first sentence."""
    return " ".join(re.split(r"\.\s|::", docstring(name), maxsplit=1)[0].split())


def methods_table():
    return [f"| `{name}` | {' | '.join([about(name), *map(str, facts(name))])} |" for name in shipped()]


def flags_table():
    options = [entry for name in shipped() for entry in fields(METHODS.get(name).Options)]
    rows = [f"| `--{entry.name}` | {entry.default} | {entry.metadata['help']} |" for entry in options]
    return list(dict.fromkeys(rows))


def on_the_page(first):
    """Rows of the table whose head begins with ``first``."""
    lines = PAGE.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(first))
    rows = lines[start + 2 :]
    return rows[: next(number for number, line in enumerate([*rows, ""]) if not line.startswith("|"))]


@pytest.mark.parametrize("name", shipped())
def test_a_methods_file_says_what_a_reader_asks(name):
    assert None not in facts(name)
    assert facts(name)[-1] == ("needed" if name == "individual" else "not needed")
    assert re.search(r"::\n\n    \S", docstring(name)), "no equation"


def test_the_page_has_the_methods_as_their_files_have_them():
    assert on_the_page("| `METHOD`") == methods_table()


def test_the_page_has_every_flag_with_its_default():
    assert on_the_page("| flag |") == flags_table()


def test_every_method_is_told_whether_guarantees_hold():
    named = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in on_the_page("| | isolation"))))
    assert named == set(shipped())


def test_every_method_is_one_short_file():
    for file in (ROOT / "llava" / "continual" / "methods").glob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 150, file.name
