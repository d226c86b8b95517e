"""Continual methods: one file each. A method says which slots a stage trains and which ones its checkpoint keeps.

A new method is a module in this folder with a class that has ``name`` and the three members of ``Method``; the loop in
``llava.train.train`` does the rest. ``load_method`` finds it by its module's name.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Protocol

from llava.continual.tasks import TaskSequence
from llava.slots.file import SlotFile, TaskSlots
from llava.utils import UserError


class Method(Protocol):
    """What the training loop asks of a continual method."""

    name: str

    def training_files(self, sequence: TaskSequence, task: str) -> list[str]:
        """Data of the stage that ends with ``task``."""

    def begin(self, merged: SlotFile, previous: SlotFile | None, task: str) -> tuple[SlotFile, str]:
        """The slots in memory while training, and which task's of them are trained.

        ``merged`` holds keys and initial offsets of all tasks; ``previous`` is the checkpoint of the stage before.
        """

    def end(self, previous: SlotFile | None, trained: SlotFile) -> SlotFile:
        """The slots of the stage checkpoint, given those that were just trained."""


def method_names() -> list[str]:
    """Names of the methods that are there."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_method(name: str) -> Method:
    """The method called ``name``; ``UserError`` names the ones there are."""
    if name not in method_names():
        raise UserError(f"unknown method {name!r}; known: {', '.join(method_names())}")
    method: Method = importlib.import_module(f"{__name__}.{name}").METHOD
    return method


def only(slots: SlotFile, task: TaskSlots) -> SlotFile:
    """The same settings and base with one task's slots."""
    return SlotFile(slots.settings, [task], slots.base)
