"""The upper reference: one adapter trained on the data of all tasks at once, which a stream never allows."""

from __future__ import annotations

from llava.continual.methods.sequential import SHARED, single_adapter
from llava.continual.tasks import TaskSequence
from llava.slots.pool import Pool


class Joint:
    name = "joint"

    def training_files(self, sequence: TaskSequence, task: str) -> list[str]:
        names = sequence.task_names
        return [sequence.task(name).train for name in names[: names.index(task) + 1]]

    def begin(self, merged: Pool, previous: Pool | None, task: str) -> tuple[Pool, str]:
        return single_adapter(merged), SHARED

    def end(self, previous: Pool | None, trained: Pool) -> Pool:
        return trained


METHOD = Joint()
