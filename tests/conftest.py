"""Shared fixtures: a tiny world that is made once, on which the commands run in-process."""

import gc

import pytest


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A tiny base, four tasks with data, and their merged keys. Read-only: write stages into ``tmp_path``."""
    from tiny_world import make_world

    made = make_world(tmp_path_factory.mktemp("world"))
    gc.freeze()  # the trainer collects garbage at each start; without this it walks all of the libraries' objects
    return made
