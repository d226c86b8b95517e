"""The plain baseline: one low-rank adapter on the same projections, trained on task after task without any guard.

It is a pool of a single slot with the rank a routed question gets (``top_k * rank``), selected for every question with
weight 1: a LoRA. Each stage goes on from the one before::

    y = W x + scale * A^T (B x)

Paper: Hu et al., LoRA (arXiv 2106.09685), trained on
Keeps of past data: nothing
Grows with the tasks: nothing
Task at test time: not needed
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from llava.continual.methods import METHODS, Context, Recipe
from llava.slots.fit import seed_of
from llava.slots.pool import Pool
from llava.slots.task_slots import TaskSlots
from llava.utils import UserError

SHARED = "shared"


@METHODS.register
class Sequential(Recipe):
    name = "sequential"

    def pool(self, context: Context) -> tuple[Pool, str]:
        if context.previous is not None:
            before = context.previous.pool
            if before.adapter:
                raise UserError(
                    f"{context.previous.folder} was trained with --method {before.adapter}, whose adapter is another; "
                    "train it with this method"
                )
            return before.with_tasks([copy.deepcopy(before.task(SHARED))]), SHARED  # the stage before stays as it was
        return single_adapter(context.keys), SHARED


def single_adapter(keys: Pool, name: str = SHARED, start: int = 0) -> Pool:
    """A pool of one untrained slot, which stands for the task ``name`` at the place ``start``: a LoRA that every
    question selects."""
    settings = keys.settings
    settings = replace(settings, rank=settings.top_k * settings.rank, top_k=1, router="uniform")
    slot = TaskSlots.empty(settings, name, start, 1)
    seed = keys.tasks[0].info.get("seed", 0)
    slot.init_offsets(settings, torch.Generator().manual_seed(seed_of(name, seed, "offsets")))
    return Pool(settings, [slot], keys.base)
