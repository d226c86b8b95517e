"""The oracle among the references: each task has an adapter of its own, trained from the base alone, and every question
comes with its task::

    y = W x + scale * A[t]^T (B[t] x)          t: the question's task

Its rank is that of ``sequential`` and ``joint``, so that the three differ in the data an adapter sees and in nothing
else. Isolation, order invariance, removal and composition hold as for ``retrieval``; what it lacks is a way to tell the
task. A question whose task is not given, or not learned yet, is the base's.

Paper: Hu et al., LoRA (arXiv 2106.09685), one a task
Keeps of past data: nothing
Grows with the tasks: one adapter a task
Task at test time: needed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from llava.continual.methods import METHODS, Context, Recipe
from llava.continual.methods.per_task import earlier_slots, own_adapter
from llava.model.language_model.retriever import Retriever
from llava.slots.adapter import ADAPTERS
from llava.slots.names import ORACLE
from llava.slots.pool import Pool
from llava.slots.queries import Query
from llava.slots.route import Route


@ADAPTERS.register
class GivenAdapter(Retriever):
    """A question takes its own task's adapter with weight 1; without a task it takes one with weight 0."""

    name = "individual"

    def decide(self, query: Query, tasks: Sequence[str | None] | None = None) -> Route:
        given = None if self.pool.training_task else tasks
        told = list(given or [self.pool.training_task] * len(query))
        known = self.pool.names
        slots = [known.index(task) if task in known else 0 for task in told]
        weights = [float(task in known) for task in told]
        return Route(torch.tensor(slots)[:, None], torch.tensor(weights)[:, None], given=told)


@METHODS.register
class Individual(Recipe):
    name = "individual"

    def pool(self, context: Context) -> tuple[Pool, str]:
        own = own_adapter(context)
        mine = Pool(replace(own.settings, router=ORACLE), own.tasks, own.base, adapter=self.name)
        earlier_slots(context, mine)  # refuses a stage that this one cannot follow
        return mine, context.task

    def slots(self, context: Context) -> Pool:
        earlier = [] if context.previous is None else context.previous.pool.tasks
        trained = context.trained_pool()
        return trained.with_tasks([*earlier, *trained.tasks])
