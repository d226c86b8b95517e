"""What methods share that give each task slots of its own and freeze those of the tasks before."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from llava.continual.methods import Context, Recipe
from llava.continual.methods.sequential import single_adapter
from llava.model.language_model.retriever import Retriever
from llava.slots.merge import check_mergeable
from llava.slots.pool import Pool
from llava.slots.queries import Query
from llava.slots.route import Route
from llava.slots.task_slots import TaskSlots
from llava.utils import UserError


def own_adapter(context: Context) -> Pool:
    """A pool of one untrained slot, which is the current task's, at its place in the sequence."""
    place = context.sequence.task_names.index(context.task)
    return single_adapter(context.keys, context.task, place)


def earlier_slots(context: Context, mine: Pool) -> list[TaskSlots]:
    """The slots of the tasks before, beside which those of ``mine`` are to stand.

    Raises:
        UserError: the stage before is another method's, or its slots cannot stand in one pool with these.
    """
    if context.previous is None:
        return []
    before = context.previous.pool
    if before.adapter != mine.adapter:
        method = context.previous.record.get("method", "another")
        raise UserError(f"{context.previous.folder} was trained with --method {method}; train it with this method")
    check_mergeable("the stage before this one", before, "the merged keys", mine)
    return before.tasks


class BesideFrozen(Retriever):
    """A retriever in which the slots of earlier tasks act, frozen, while a task trains."""

    def train_only(self, task: str) -> list[nn.Parameter]:
        # All act at every step, and DDP and ZeRO-2 want all weights on their device, also those that do not train.
        for one in self.pool.tasks:
            one.stays = False
        parameters = super().train_only(task)
        self.pool.training_task = None
        self.pool.changed()
        return parameters


class Summed(BesideFrozen):
    """Every question takes every task's adapter with weight 1: a sum that could be merged into the base's weights."""

    def decide(self, query: Query, tasks: Sequence[str | None] | None = None) -> Route:
        slots = torch.arange(self.pool.size).expand(len(query), -1)
        return Route(slots, torch.ones(slots.shape))


class SumOfTasks(Recipe):
    """A recipe whose adapter, registered under the recipe's name, adds up one low-rank adapter a task."""

    def pool(self, context: Context) -> tuple[Pool, str]:
        own = own_adapter(context)
        own.adapter = self.name
        earlier = copy.deepcopy(earlier_slots(context, own))  # whole on disk, whatever training makes of these
        mine = own.task(context.task).copy(trained=True)  # acts from the first step on
        return own.with_tasks([*earlier, mine]), context.task

    def slots(self, context: Context) -> Pool:
        earlier = [] if context.previous is None else context.previous.pool.tasks
        trained = context.trained_pool()
        return trained.with_tasks([*earlier, trained.task(context.task)])
