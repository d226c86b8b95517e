"""Registries: names find things, from the package and from plug-in folders, and what is wrong is said in one line."""

import os
import sys
import types

import pytest

from llava.registry import PLUGINS, Registry
from llava.utils import UserError


@pytest.fixture
def shapes(monkeypatch):
    """A registry without a package, which plug-ins import from ``shapes_of_a_test``."""
    module = types.ModuleType("shapes_of_a_test")
    module.SHAPES, module.seen = Registry("shape"), []
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delenv(PLUGINS, raising=False)
    return module


def plugin(folder, file, name, body="pass"):
    """Write a plug-in that registers a class under ``name``; returns its folder."""
    folder.mkdir(exist_ok=True)
    text = f"from shapes_of_a_test import SHAPES, seen\n\nseen.append(__file__)\n{body}\n\n\n"
    (folder / file).write_text(f"{text}@SHAPES.register\nclass Mine:\n    name = {name!r}\n")
    return folder


def use(monkeypatch, *folders):
    monkeypatch.setenv(PLUGINS, os.pathsep.join(map(str, folders)))


def test_things_are_found_by_name(shapes):
    @shapes.SHAPES.register
    class Square:
        name = "square"

    @shapes.SHAPES.register
    class Circle:
        name = "circle"

    assert shapes.SHAPES.names() == ["circle", "square"]
    assert shapes.SHAPES.get("circle") is Circle
    assert list(shapes.SHAPES) == [Square, Circle]
    with pytest.raises(UserError, match="unknown shape 'cube'; known: circle, square"):
        shapes.SHAPES.get("cube")


def test_a_package_is_looked_through_at_the_first_look_up(tmp_path, monkeypatch):
    package = tmp_path / "shapes_that_ship"
    package.mkdir()
    (package / "__init__.py").write_text("from llava.registry import Registry\nSHAPES = Registry('shape', __name__)\n")
    text = "from shapes_that_ship import SHAPES\n@SHAPES.register\nclass Cube:\n    name = 'cube'\n"
    (package / "cube.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import shapes_that_ship

    assert "shapes_that_ship.cube" not in sys.modules
    assert shapes_that_ship.SHAPES.names() == ["cube"]
    assert shapes_that_ship.SHAPES.get("cube").__module__ == "shapes_that_ship.cube"


def test_plugins_are_imported_once_in_alphabetical_order(tmp_path, monkeypatch, shapes):
    folder = plugin(tmp_path / "plugins", "b.py", "second")
    plugin(folder, "a.py", "first")
    (folder / "notes.txt").write_text("no plug-in")
    use(monkeypatch, folder)
    assert shapes.SHAPES.names() == ["first", "second"]
    assert [path.rsplit("/", 1)[-1] for path in shapes.seen] == ["a.py", "b.py"]
    assert [kind.name for kind in shapes.SHAPES] == ["first", "second"]
    assert shapes.SHAPES.get("first").name == "first"
    assert len(shapes.seen) == 2


def test_a_second_folder_adds_to_the_first(tmp_path, monkeypatch, shapes):
    """Also when it is named later, and when its file is called as one of the first."""
    one, two = plugin(tmp_path / "one", "mine.py", "here"), plugin(tmp_path / "two", "mine.py", "there")
    use(monkeypatch, one)
    assert shapes.SHAPES.names() == ["here"]
    use(monkeypatch, one, two)
    assert shapes.SHAPES.names() == ["here", "there"]
    assert len(shapes.seen) == 2


def test_two_of_one_name_are_refused_with_both_places(tmp_path, monkeypatch, shapes):
    """Files of one name in two folders once passed as one file that is read again, and the second one won."""
    one, two = plugin(tmp_path / "one", "mine.py", "same"), plugin(tmp_path / "two", "mine.py", "same")
    use(monkeypatch, one, two)
    with pytest.raises(UserError, match="two shapes are called 'same'") as refused:
        shapes.SHAPES.names()
    assert f"{one / 'mine.py'} (Mine)" in str(refused.value)
    assert f"{two / 'mine.py'} (Mine)" in str(refused.value)


def test_the_name_of_one_that_ships_is_refused(tmp_path, monkeypatch, shapes):
    @shapes.SHAPES.register
    class Square:
        name = "square"

    use(monkeypatch, plugin(tmp_path / "plugins", "mine.py", "square"))
    with pytest.raises(UserError, match=r"two shapes are called 'square': .*Square and .*mine.py \(Mine\)"):
        shapes.SHAPES.get("square")


def test_a_missing_folder_is_named(tmp_path, monkeypatch, shapes):
    use(monkeypatch, tmp_path / "nowhere")
    with pytest.raises(UserError, match="plugin folder not found: .*nowhere .check LLAVA_PLUGINS"):
        shapes.SHAPES.names()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import no_such_module_here", "ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("def broken(:", "SyntaxError: "),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_broken_file_is_one_line_each_time(tmp_path, monkeypatch, shapes, body, reason):
    use(monkeypatch, plugin(tmp_path / "plugins", "mine.py", "mine", body))
    for _ in range(2):
        with pytest.raises(UserError) as refused:
            shapes.SHAPES.names()
        assert str(refused.value).count("\n") == 0
        assert f"mine.py: the plugin cannot be imported ({reason}" in str(refused.value)
    use(monkeypatch, plugin(tmp_path / "plugins", "mine.py", "mended"))
    assert shapes.SHAPES.names() == ["mended"]


def test_the_order_of_what_ships_is_that_of_its_modules_whichever_was_imported_first():
    registry = Registry("thing", "some.package")
    registry._complete = True
    for module in ("some.package.later", "a_plugin", "some.package.early"):
        registry.register(type("Thing", (), {"name": module, "__module__": module}))
    assert [thing.name for thing in registry] == ["some.package.early", "some.package.later", "a_plugin"]
