"""What an install without ``-e`` has: every module, and every other file that the package reads at run time."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "llava").rglob("*.py"))


@pytest.fixture(scope="module")
def settings():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_module_is_in_a_package_that_is_found(settings):
    """A folder without ``__init__.py`` would be left out, and missed only by those who install."""
    setuptools = pytest.importorskip("setuptools")
    found = set(setuptools.find_packages(str(ROOT), **settings["packages"]["find"]))
    assert {".".join(file.parent.relative_to(ROOT).parts) for file in SOURCES} == found


def test_a_file_that_is_no_module_lies_where_it_ships(settings):
    """Among the modules only what the list of package data takes along."""
    others = {file for file in (ROOT / "llava").rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    listed = [
        (Path(*name.split(".")), pattern) for name, all_of in settings["package-data"].items() for pattern in all_of
    ]
    shipped = [set((ROOT / place).glob(pattern)) for place, pattern in listed]
    assert all(shipped) and others - set(SOURCES) == set().union(*shipped)


def test_what_the_package_reads_beside_itself_ships(settings):
    """The one module that looks beside itself reads the task sequences; it finds them where they are installed to."""
    beside = re.compile(r"(?<![.\w])__file__|importlib.resources")
    readers = {file.relative_to(ROOT).as_posix() for file in SOURCES if beside.search(file.read_text("utf-8"))}
    assert readers == {"llava/continual/sequence.py"}
    (target, patterns), *others = settings["data-files"].items()
    assert not others and target == "share/llava/tasks"
    shipped = {file.name for pattern in patterns for file in ROOT.glob(pattern)}
    assert shipped == {file.name for file in (ROOT / "scripts" / "tasks").iterdir()}
    text = (ROOT / "llava" / "continual" / "sequence.py").read_text()
    assert 'sysconfig.get_path("data"), "share", "llava", "tasks"' in text
