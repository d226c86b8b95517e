"""Fixtures of the room: a stage and a service on it, made once."""

from __future__ import annotations

import pytest
from serve.room import Place


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Read-only: programs that write do so into ``tmp_path``."""
    made = Place(tmp_path_factory.mktemp("serve"))
    yield made
    made.service.close()
