"""The plain baseline: one low-rank adapter on the same projections, trained on task after task without any guard.

It is a pool of a single slot with the rank a routed question gets (``top_k * rank``), selected for every question with
weight 1: a LoRA. Each stage goes on from the one before.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from llava.continual.methods import only
from llava.continual.tasks import TaskSequence
from llava.slots.file import SlotFile, TaskSlots
from llava.slots.fit import seed_of
from llava.slots.pool import SlotBlock

SHARED = "shared"


class Sequential:
    name = "sequential"

    def training_files(self, sequence: TaskSequence, task: str) -> list[str]:
        return list(sequence.task(task).files)

    def begin(self, merged: SlotFile, previous: SlotFile | None, task: str) -> tuple[SlotFile, str]:
        if previous is not None:
            return only(previous, previous.task(SHARED)), SHARED
        return single_adapter(merged), SHARED

    def end(self, previous: SlotFile | None, trained: SlotFile) -> SlotFile:
        return trained


def single_adapter(merged: SlotFile) -> SlotFile:
    """A pool of one slot that every question selects, untrained."""
    settings = merged.settings
    settings = replace(settings, rank=settings.top_k * settings.rank, top_k=1, router="uniform")
    block = SlotBlock(settings, 1)
    seed = merged.tasks[0].info.get("seed", 0)
    block.init_offsets(torch.Generator().manual_seed(seed_of(SHARED, seed, "offsets")))
    slot = TaskSlots(
        name=SHARED,
        start=0,
        stop=1,
        text_keys=block.text_keys,
        image_keys=block.image_keys,
        A={target: tensor.detach() for target, tensor in block.A.items()},
        B={target: tensor.detach() for target, tensor in block.B.items()},
    )
    return SlotFile(settings, [slot], merged.base)


METHOD = Sequential()
