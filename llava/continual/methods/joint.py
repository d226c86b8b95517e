"""The upper reference: one adapter trained on the data of all tasks at once, which a stream never allows."""

from __future__ import annotations

from llava.continual.methods.sequential import SHARED, single_adapter
from llava.continual.tasks import TaskSequence
from llava.slots.file import SlotFile


class Joint:
    name = "joint"

    def training_files(self, sequence: TaskSequence, task: str) -> list[str]:
        names = sequence.task_names
        return [file for name in names[: names.index(task) + 1] for file in sequence.task(name).files]

    def begin(self, merged: SlotFile, previous: SlotFile | None, task: str) -> tuple[SlotFile, str]:
        return single_adapter(merged), SHARED

    def end(self, previous: SlotFile | None, trained: SlotFile) -> SlotFile:
        return trained


METHOD = Joint()
