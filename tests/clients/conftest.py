"""Fixtures of the room: a base and a trained stage of each family, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from clients.room import Side, must_differ, write_side_pair

SIDES = [(family, kind) for family in ("llama", "mistral") for kind in ("base", "stage")]


def pytest_collection_modifyitems(items):
    """The room as a whole takes more than a minute, so the inner loop leaves it out."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def sides(tmp_path_factory) -> dict[tuple[str, str], Side]:
    """Every side by family and kind. Read-only: programs that write do so into ``tmp_path``."""
    found = {}
    for family in ("llama", "mistral"):
        base, stage = write_side_pair(tmp_path_factory.mktemp(family), family)
        must_differ(base, stage)
        found |= {(family, "base"): base, (family, "stage"): stage}
    return found


@pytest.fixture(scope="session", params=SIDES, ids=["-".join(side) for side in SIDES])
def side(request, sides) -> Side:
    """A base and a stage of Llama and of Mistral, one after the other."""
    return sides[request.param]


@pytest.fixture(scope="session", params=["llama", "mistral"])
def stage(request, sides) -> Side:
    """The stage of each family."""
    return sides[request.param, "stage"]
