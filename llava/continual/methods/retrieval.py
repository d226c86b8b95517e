"""The project's method: each task trains its own retrieved slots; everything else stays bit-identical.

While a task trains, only its own slots are in memory, so the thousandth task costs what the first did. The slots of
earlier tasks pass from checkpoint to checkpoint untouched.
"""

from __future__ import annotations

from pathlib import Path

from llava.continual.tasks import TaskSequence
from llava.slots.merge import merge_pools
from llava.slots.pool import Pool


class Retrieval:
    name = "retrieval"

    def training_files(self, sequence: TaskSequence, task: str) -> list[str]:
        return [sequence.task(task).train]

    def begin(self, merged: Pool, previous: Pool | None, task: str) -> tuple[Pool, str]:
        mine = merged.with_tasks([merged.task(task)])
        if previous is not None:  # refuses slots that could not stand in one pool
            merge_pools([(Path("the stage before this one"), previous), (Path("the merged keys"), mine)])
        return mine, task

    def end(self, previous: Pool | None, trained: Pool) -> Pool:
        earlier = [] if previous is None else previous.tasks
        return trained.with_tasks([*earlier, *trained.tasks])


METHOD = Retrieval()
