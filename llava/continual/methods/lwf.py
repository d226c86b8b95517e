"""Learning without forgetting: the sequential adapter, whose answers to the new rows stay near the stage before's.

Li and Hoiem, ECCV 2016 (arXiv 1606.09282), in the scale of Hinton et al. (arXiv 1503.02531)::

    loss = cross-entropy + lambda * T^2 * mean over answer tokens of KL(softmax(z' / T) || softmax(z / T))

``z`` are the logits of the adapter in training, ``z'`` those of the adapter that the stage before left, for the same
rows; before the first task there is none. A step costs a forward pass more.

Paper: Li and Hoiem, ECCV 2016 (arXiv 1606.09282)
Keeps of past data: nothing
Grows with the tasks: nothing
Task at test time: not needed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llava.continual.methods import METHODS, Context, ParamGroup
from llava.continual.methods.sequential import Sequential
from llava.model.language_model.retriever import Retriever
from llava.slots.adapter import Action
from llava.slots.pool import Pool
from llava.slots.route import Route
from llava.utils import UserError


@dataclass
class LwFOptions:
    """How near the answers stay."""

    lwf_lambda: float = field(default=1.0, metadata={"help": "weight of the distillation"})
    lwf_temperature: float = field(default=2.0, metadata={"help": "softens both distributions"})


class Recalling(Retriever):
    """The adapter in training, and while it is ``recalling`` the one that the stage before left in its place."""

    recalling = False

    def __init__(self, pool: Pool, before: Pool):
        super().__init__(pool)
        self._before = (before,)  # no part of the model, which ZeRO-3 would take apart

    @property
    def before(self) -> Pool:
        """What the stage before left, on the device of what trains."""
        (found,) = self._before
        return found if found.device == self.pool.device else found.to(self.pool.device)

    def act(self, route: Route, dtype: torch.dtype) -> Action:
        pool = self.before if self.recalling else self.pool
        return Action(offset=pool(route.slot_indices, route.slot_weights, dtype))


@METHODS.register
class LwF(Sequential):
    name = "lwf"
    Options = LwFOptions

    def pool(self, context: Context) -> tuple[Pool, str]:
        if not context.options.lwf_temperature > 0:
            raise UserError(f"--lwf_temperature is {context.options.lwf_temperature}; give more than 0")
        return super().pool(context)

    def begin(self, context: Context) -> Sequence[nn.Parameter | ParamGroup]:
        if context.previous is None:
            return super().begin(context)
        adapter = Recalling(context.pool, context.previous.pool)
        context.model.attach_adapter(adapter)
        return adapter.train_only(context.trained)

    def loss(self, context: Context, batch: dict[str, Any], outputs: Any, loss: Tensor) -> Tensor:
        if context.previous is None:
            return loss
        adapter = context.model.retriever
        adapter.recalling = True
        try:
            with torch.no_grad():
                before = context.model(**batch).logits  # [answer tokens, vocabulary]
        finally:
            adapter.recalling = False
        weight: float = context.options.lwf_lambda
        return loss + weight * distillation(outputs.logits, before, context.options.lwf_temperature)


def distillation(now: Tensor, before: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(before || now)`` of logits ``[tokens, vocabulary]`` softened by ``T``, on average over tokens."""
    mine, theirs = ((logits.float() / temperature).log_softmax(-1) for logits in (now, before))
    total = (theirs.exp() * (theirs - mine)).sum()
    return temperature**2 * total / max(len(now), 1)
