"""``import llava`` makes transformers' auto classes know LLaVA's model types, and costs nothing until one is asked for.

LLaVA imports its classes at once, which takes seconds; a command that needs no model should not pay for that. Here the
table that ``AutoConfig`` looks model types up in gets entries whose modules are imported when they are first read. The
modules register their own classes, for ``AutoModelForCausalLM`` too. Transformers is not imported for it: where it is
not there yet, its table is completed as soon as it is.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

MODULES = {
    "llava_llama": "llava.model.language_model.llava_llama",
    "llava_mistral": "llava.model.language_model.llava_mistral",
}
"""Where each model type is registered. The type ``llava`` is transformers' own."""

TABLE = "transformers.models.auto.configuration_auto"


class _Watch:
    """A finder of ``sys.meta_path`` that finds the module of the table, once, and completes it when it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_complete(module: ModuleType) -> None:
            load(module)
            _complete(module)

        vars(spec.loader)["exec_module"] = load_and_complete
        return spec


def _complete(module: ModuleType) -> None:
    """Add LLaVA's entries to the table of registered configs; those of others stay."""
    from collections import UserDict

    class OnDemand(UserDict):
        """Configs by model type; a module's name stands for the class that it will register."""

        def __getitem__(self, key: str) -> Any:
            if isinstance(self.data[key], str):
                import_module(self.data[key])
            return self.data[key]

    table = module.CONFIG_MAPPING
    table._extra_content = OnDemand(MODULES | dict(table._extra_content))


def announce() -> None:
    """Let ``AutoConfig`` know LLaVA's model types, now or as soon as transformers' table is imported."""
    if TABLE in sys.modules:
        _complete(sys.modules[TABLE])
    else:
        sys.meta_path.insert(0, _Watch())
