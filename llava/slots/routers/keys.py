"""Routing by the prompt keys alone, for each sample or, as published systems do, for a whole batch at once."""

from __future__ import annotations

import warnings

from torch import Tensor

from llava.slots.queries import Query
from llava.slots.routers import ROUTERS, Router


@ROUTERS.register
class KeysRouter(Router):
    """The nearest keys win, whatever task they belong to."""

    name = "keys"
    judges_tasks = True

    def prepare(self) -> None:
        """Broken keys are refused here, not at the first question."""
        self.keys  # noqa: B018

    def scores(self, query: Query) -> Tensor:
        return self.keys.scores(query)


@ROUTERS.register
class BatchVoteRouter(Router):
    """The mean of another router's scores over the batch.

    It lets the batch leak the task and makes an answer depend on its neighbours.
    """

    name = "batch_vote"
    depends_on_batch = True
    of: type[Router] = KeysRouter

    def prepare(self) -> None:
        self.each = self.of(self.settings, self.slots, self.seed)
        warnings.warn(
            "router 'batch_vote' takes one decision for the whole batch: answers depend on their batch and task "
            "identity leaks; use it for fidelity studies only",
            stacklevel=4,
        )

    def scores(self, query: Query) -> Tensor:
        each = self.each.scores(query)
        return each.mean(0, keepdim=True).expand_as(each)
