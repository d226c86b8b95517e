"""Registries: what a name on a command line, in a task sequence or in a slot file may mean.

Methods, routers, raw data sets and metrics are each one file. The ones that ship lie in a package of their kind and are
found there by themselves. Others are registered from outside the package: every ``*.py`` file in a folder that the
environment variable ``LLAVA_PLUGINS`` names (several folders are separated as in ``PATH``) is imported before the first
look-up::

    from llava.continual.methods import METHODS

    @METHODS.register
    class Mine(Recipe):
        name = "mine"
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from llava.utils import UserError

PLUGINS = "LLAVA_PLUGINS"

_plugin_files: dict[str, Path] = {}
"""Module name -> file, of every plug-in."""

Item = TypeVar("Item")


class Registry(Generic[Item]):
    """Things of one kind by name.

    Args:
        kind: what a thing is called in messages, such as ``"method"``.
        package: package whose modules register the things that ship; they are imported at the first look-up.
    """

    def __init__(self, kind: str, package: str | None = None):
        self.kind, self.package = kind, package
        self._items: dict[str, Item] = {}
        self._complete = package is None

    def register(self, item: Any) -> Any:
        """Add a class or an object under its ``name``; usable as a decorator.

        Raises:
            UserError: another thing has the name already.
        """
        known = self._items.setdefault(item.name, item)
        if known is not item and _source(known) != _source(item):
            raise UserError(
                f"two {self.kind}s are called {item.name!r}: {_source(known)} and {_source(item)}; rename one"
            )
        self._items[item.name] = item
        return item

    def names(self) -> list[str]:
        """Every name, in alphabetical order."""
        self._find_all()
        return sorted(self._items)

    def __iter__(self) -> Iterator[Item]:
        """Everything that ships, by module, whichever was imported first; then the others, as they were registered."""
        self._find_all()
        return iter(sorted(self._items.values(), key=self._place))

    def _place(self, item: Item) -> str:
        module = getattr(item, "__module__", None) or type(item).__module__
        ships = self.package is not None and module.startswith(f"{self.package}.")
        return module if ships else "~"  # behind every module's name; the order among them stays

    def get(self, name: str) -> Item:
        """The thing called ``name``; ``UserError`` names the ones there are."""
        self._find_all()
        if name not in self._items:
            raise UserError(f"unknown {self.kind} {name!r}; known: {', '.join(self.names())}")
        return self._items[name]

    def _find_all(self) -> None:
        if self.package is not None and not self._complete:
            self._complete = True
            for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
                importlib.import_module(f"{self.package}.{module.name}")
        load_plugins(os.environ.get(PLUGINS, ""))


def load_plugins(folders: str) -> None:
    """Import every Python file of some folders, each once in a process, in alphabetical order of a folder.

    Raises:
        UserError: a folder is missing, or a file cannot be imported.
    """
    for folder in filter(None, folders.split(os.pathsep)):
        if not Path(folder).is_dir():
            raise UserError(f"plugin folder not found: {folder} (check {PLUGINS})")
        for file in sorted(Path(folder).resolve().glob("*.py")):
            _import_file(file)


def _import_file(file: Path) -> None:
    # Two folders may hold files of one name, so the folder is part of the module's.
    name = f"llava_plugin_{hashlib.sha256(str(file.parent).encode()).hexdigest()[:8]}_{file.stem}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # a file that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[name], _plugin_files[name] = module, file
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{file}: the plugin cannot be imported ({reason}); mend it") from error


def _source(item: Any) -> str:
    """Where an item is defined, for messages: ``llava.slots.routers.keys.KeysRouter``, or a plug-in's file and name."""
    module = getattr(item, "__module__", type(item).__module__)
    name = getattr(item, "__qualname__", type(item).__qualname__)
    return f"{_plugin_files[module]} ({name})" if module in _plugin_files else f"{module}.{name}"
