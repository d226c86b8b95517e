"""The room's table in ``docs/clients.md``: each row names a test that there is, and each test has a row."""

from __future__ import annotations

import re
from pathlib import Path

ROOM = Path(__file__).resolve().parent
PAGE = ROOM.parents[1] / "docs" / "clients.md"
ROW = re.compile(r"^\| (?P<cells>.+) \| `tests/clients/(?P<file>\w+\.py)::(?P<test>\w+)` \|$", re.M)


def rows():
    return [(row["file"], row["test"], row["cells"].split(" | ")) for row in ROW.finditer(PAGE.read_text("utf-8"))]


def test_every_test_has_its_row_and_every_row_its_test():
    written = {
        (path.name, name)
        for path in ROOM.glob("test_*.py")
        if path.name != Path(__file__).name
        for name in re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.M)
    }
    named = [(file, test) for file, test, _ in rows()]
    assert set(named) == written and len(named) == len(written)


def test_everything_works():
    """A row says what was compared; a base is left out where there is nothing of it to ask."""
    for file, test, cells in rows():
        _, _, base, stage, compared = cells
        assert base in ("works", "–") and stage == "works" and compared, f"{file}::{test}"


def test_nothing_is_expected_to_fail():
    found = [
        path.name
        for path in ROOM.glob("test_*.py")
        if re.search(r"mark\.(xfail|skip)|pytest\.(xfail|skip)\(", path.read_text("utf-8"))
    ]
    assert not [name for name in found if name != Path(__file__).name]
