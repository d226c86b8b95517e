"""Continual LLaVA: a task's questions take its own slots, and with them a learned mix of the frozen slots of every task
before.

Cao et al. (arXiv 2411.02564). With ``w`` the weights that the router gives a question's slots, ``n[s]`` the slots of
task ``s`` and ``W[t]`` what of ``w`` falls on slots of task ``t``::

    weight of slot p of task s = w[p] + sum_{t > s} W[t] * alpha[t, s] / n[s]

``alpha[t, s]`` trains with task ``t`` from 0 on and is frozen with it; the slots of ``s`` get no gradient (the paper's
stop-gradient). So what was learned may help a new task, at the price of two guarantees: the order of the tasks counts,
and tasks that were trained apart cannot be put together. Taking a task out would also change the tasks that lean on it,
so it is refused. Isolation, batch invariance and the base's own answer to unknown questions hold.

Paper: Cao et al., Continual LLaVA (arXiv 2411.02564)
Keeps of past data: nothing but the slots' statistics
Grows with the tasks: the slots, and one number for each pair of tasks
Task at test time: not needed
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from llava.continual.methods import METHODS, Context, Recipe
from llava.continual.methods.per_task import BesideFrozen, earlier_slots
from llava.slots.adapter import ADAPTERS
from llava.slots.pool import Pool
from llava.slots.queries import Query
from llava.slots.route import Route
from llava.utils import UserError

MIX = "mix"


class Mix(nn.Module):
    """``alpha`` ``[tasks, tasks]``, of which one task's row may train; a call, so that ZeRO-3 gathers it."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", table.clone(), persistent=False)
        self.row = nn.Parameter(torch.zeros(len(table)), requires_grad=False)
        self.learned: int | None = None

    def learn(self, task: int) -> list[nn.Parameter]:
        """Let the row of a new task train."""
        self.learned = task
        self.row.requires_grad_(True)
        return [self.row]

    def forward(self, shares: Tensor) -> Tensor:
        """What each task's slots together are lent: ``[batch, tasks] -> [batch, tasks]``."""
        lent = shares @ self.table  # the row in training is 0 there
        if self.learned is None:
            return lent
        others = torch.arange(len(self.table), device=shares.device) != self.learned
        return lent + shares[:, [self.learned]] * self.row * others


@ADAPTERS.register
class ContextualAdapter(BesideFrozen):
    """Routes as the retriever does, and lends each chosen task the slots of those before it."""

    name = "contextual"

    def __init__(self, pool: Pool, memory: dict[str, Tensor]):
        super().__init__(pool)
        count = len(pool.tasks)
        if MIX not in memory or tuple(memory[MIX].shape) != (count, count):
            raise UserError(f"the stage's mix does not belong to its {count} tasks; train it again")
        self.mix = Mix(memory[MIX])
        self.learning: str | None = None

    def train_only(self, task: str) -> list[nn.Parameter]:
        self.learning = task
        return [*super().train_only(task), *self.mix.learn(self.pool.names.index(task))]

    def decide(self, query: Query, tasks: Sequence[str | None] | None = None) -> Route:
        asked = [self.learning] * len(query) if self.learning else tasks
        found = self.pool.route(query, asked, self.router_name)
        counts = torch.tensor([task.count for task in self.pool.tasks])
        owners = torch.arange(len(counts)).repeat_interleave(counts).expand(len(query), -1)  # [batch, pool]
        own = torch.zeros(owners.shape).scatter_add(1, found.slot_indices, found.slot_weights)
        shares = torch.zeros(len(query), len(counts)).scatter_add(1, owners, own).to(self.mix.row.device)
        lent = (self.mix(shares) / counts.to(shares.device)).gather(1, owners.to(shares.device))
        slots = torch.arange(owners.shape[1]).expand(owners.shape)
        return replace(found, slot_indices=slots, slot_weights=own.to(shares.device) + lent)


@METHODS.register
class Contextual(Recipe):
    name = "contextual"

    def pool(self, context: Context) -> tuple[Pool, str]:
        own = context.keys.with_tasks([context.keys.task(context.task).copy(trained=True)])
        own.adapter = self.name
        earlier = copy.deepcopy(earlier_slots(context, own))  # whole on disk, whatever training makes of these
        return own.with_tasks([*earlier, *own.tasks]), context.task

    def begin(self, context: Context) -> Sequence[nn.Parameter]:
        names = context.pool.names
        table = torch.zeros(len(names), len(names))
        if context.previous is not None:
            places = torch.tensor([names.index(name) for name in context.previous.pool.names])
            table[places[:, None], places] = context.previous.remembered(MIX)
        adapter = ContextualAdapter(context.pool, {MIX: table})
        context.model.attach_adapter(adapter)
        return adapter.train_only(context.trained)

    def slots(self, context: Context) -> Pool:
        table = context.model.retriever.mix.table.cpu().clone()
        table[context.pool.names.index(context.task)] = context.adapter_state()["mix.row"]
        context.run.memory = {MIX: table}
        earlier = [] if context.previous is None else context.previous.pool.tasks
        trained = context.trained_pool()
        return trained.with_tasks([*earlier, trained.task(context.task)])
