"""The project's method: each task trains its own retrieved slots; everything else stays bit-identical.

While a task trains, only its own slots are in memory, so the thousandth task costs what the first did. The slots of
earlier tasks pass from checkpoint to checkpoint untouched.
"""

from __future__ import annotations

from pathlib import Path

from llava.continual.methods import only
from llava.continual.tasks import TaskSequence
from llava.slots.file import SlotFile
from llava.slots.merge import merge_slot_files


class Retrieval:
    name = "retrieval"

    def training_files(self, sequence: TaskSequence, task: str) -> list[str]:
        return list(sequence.task(task).files)

    def begin(self, merged: SlotFile, previous: SlotFile | None, task: str) -> tuple[SlotFile, str]:
        mine = only(merged, merged.task(task))
        if previous is not None:  # refuses slots that could not stand in one pool
            merge_slot_files([(Path("the stage before this one"), previous), (Path("the merged keys"), mine)])
        return mine, task

    def end(self, previous: SlotFile | None, trained: SlotFile) -> SlotFile:
        earlier = [] if previous is None else previous.tasks
        return SlotFile(trained.settings, [*earlier, *trained.tasks], trained.base)


METHOD = Retrieval()
