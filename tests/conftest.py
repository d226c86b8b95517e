"""Shared fixtures: a tiny world that is made once, on which the commands run in-process."""

import gc

import pytest
import warm_python
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is, and in a fresh checkout that Unicode's tables are made.
settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")

LONGEST = (
    "tests/faults",
    "tests/train/test_llava_parallel.py",
    "tests/train/test_train_zero.py",
    "tests/train/test_train.py",
    "tests/slots/test_offsets.py",
    "tests/scripts",
    "tests/test_pipeline.py",
    "tests/test_prototype_commands.py",
    "tests/clients",
    "tests/toy",
    "tests/test_guarantees.py",
    "tests/test_cli.py",
)
"""Files that take longest, which come first: at the end no process waits for another that has one of them alone."""


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="also run the combinations that others stand for")


def pytest_configure(config):
    warm_python.cold = config.getoption("--thorough")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--thorough"):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]

    def rank(item):
        return next((place for place, name in enumerate(LONGEST) if item.nodeid.startswith(name)), len(LONGEST))

    items.sort(key=rank)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A tiny base, four tasks with data, and their merged keys. Read-only: write stages into ``tmp_path``."""
    from tiny_world import make_world

    made = make_world(tmp_path_factory.mktemp("world"))
    gc.freeze()  # the trainer collects garbage at each start; without this it walks all of the libraries' objects
    return made
