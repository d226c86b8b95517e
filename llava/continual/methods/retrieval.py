"""The project's method: each task trains its own retrieved slots; everything else stays bit-identical.

While a task trains, only its own slots are in memory, so the thousandth task costs what the first did. The slots of
earlier tasks pass from checkpoint to checkpoint untouched::

    y = W x + scale * sum_p w[p] * A[p]^T (B[p] x)          p: the question's nearest slots, w: by their keys

Paper: the project's own; its pool of slots is that of SLM (Peng et al., arXiv 2404.07470)
Keeps of past data: nothing but the slots' statistics
Grows with the tasks: the slots
Task at test time: not needed
"""

from __future__ import annotations

from llava.continual.methods import METHODS, Context, Recipe
from llava.slots.merge import check_mergeable
from llava.slots.pool import Pool


@METHODS.register
class Retrieval(Recipe):
    name = "retrieval"

    def pool(self, context: Context) -> tuple[Pool, str]:
        mine = context.keys.with_tasks([context.keys.task(context.task)])
        if context.previous is not None:  # refuses slots that could not stand in one pool
            check_mergeable("the stage before this one", context.previous.pool, "the merged keys", mine)
        return mine, context.task

    def slots(self, context: Context) -> Pool:
        earlier = [] if context.previous is None else context.previous.pool.tasks
        trained = context.trained_pool()
        return trained.with_tasks([*earlier, *trained.tasks])
