"""The plain baseline: one low-rank adapter on the same projections, trained on task after task without any guard.

It is a pool of a single slot with the rank a routed question gets (``top_k * rank``), selected for every question with
weight 1: a LoRA. Each stage goes on from the one before.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from llava.continual.tasks import TaskSequence
from llava.slots.fit import seed_of
from llava.slots.pool import Pool
from llava.slots.task_slots import TaskSlots

SHARED = "shared"


class Sequential:
    name = "sequential"

    def training_files(self, sequence: TaskSequence, task: str) -> list[str]:
        return [sequence.task(task).train]

    def begin(self, merged: Pool, previous: Pool | None, task: str) -> tuple[Pool, str]:
        if previous is not None:
            return previous.with_tasks([previous.task(SHARED)]), SHARED
        return single_adapter(merged), SHARED

    def end(self, previous: Pool | None, trained: Pool) -> Pool:
        return trained


def single_adapter(merged: Pool) -> Pool:
    """A pool of one slot that every question selects, untrained."""
    settings = merged.settings
    settings = replace(settings, rank=settings.top_k * settings.rank, top_k=1, router="uniform")
    slot = TaskSlots.empty(settings, SHARED, 0, 1)
    seed = merged.tasks[0].info.get("seed", 0)
    slot.init_offsets(settings, torch.Generator().manual_seed(seed_of(SHARED, seed, "offsets")))
    return Pool(settings, [slot], merged.base, merged.prompt)


METHOD = Sequential()
