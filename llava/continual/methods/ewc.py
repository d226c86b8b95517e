"""Elastic weight consolidation: the sequential adapter, held back where earlier tasks need it.

Kirkpatrick et al., PNAS 2017 (arXiv 1612.00796), with one running sum over the tasks (Schwarz et al.,
arXiv 1805.06370)::

    loss = cross-entropy + lambda / 2 * sum_i F_i (theta_i - theta*_i)^2,     F <- gamma F + F_task

``theta*`` are the offsets as the stage before left them; ``F_task`` is the mean squared gradient of single rows' loss.

Paper: Kirkpatrick et al., PNAS 2017 (arXiv 1612.00796)
Keeps of past data: squared gradients, one number a weight
Grows with the tasks: nothing
Task at test time: not needed
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llava.continual.methods import METHODS, Context, ParamGroup
from llava.continual.methods.sequential import SHARED, Sequential
from llava.slots.pool import Pool
from llava.slots.task_slots import TaskSlots


@dataclass
class EWCOptions:
    """How strongly earlier tasks hold the adapter."""

    ewc_lambda: float = field(default=1000.0, metadata={"help": "weight of the penalty"})
    ewc_gamma: float = field(default=1.0, metadata={"help": "share of earlier information that a new task leaves"})


@METHODS.register
class EWC(Sequential):
    name = "ewc"
    Options = EWCOptions

    def begin(self, context: Context) -> Sequence[nn.Parameter | ParamGroup]:
        parameters = super().begin(context)
        self.fisher: list[Tensor] = []
        self.anchor: list[Tensor] = []
        if context.previous is not None:
            before = context.previous.pool.task(SHARED)
            self.anchor = [tensor.detach() for tensor in _offsets(before, context)]
            self.fisher = [context.previous.remembered(name) for name in _names(context)]
        return parameters

    def loss(self, context: Context, batch: dict[str, Any], outputs: Any, loss: Tensor) -> Tensor:
        if not self.fisher:
            return loss
        now = _offsets(_slots(context), context)
        # The model is not on its device yet when training begins; from the first step on nothing moves.
        self.fisher, self.anchor = ([one.to(now[0].device) for one in held] for held in (self.fisher, self.anchor))
        penalty = torch.zeros_like(loss)
        for fisher, value, anchor in zip(self.fisher, now, self.anchor, strict=True):
            penalty = penalty + (fisher * (value - anchor).square()).sum()
        weight: float = context.options.ewc_lambda
        return loss + weight / 2 * penalty

    def end(self, context: Context, batches: Iterable[dict[str, Any]]) -> None:
        """Add this task's information to that of the tasks before."""
        used: list[tuple[Tensor, ...]] = []
        # The offsets as the forward pass took them: their gradients are whole, also where ZeRO-3 splits the parameters.
        watch = _slots(context).register_forward_hook(lambda module, args, output: used.append(output))
        total: list[Tensor] = []
        count = 0
        try:
            for batch in batches:
                used.clear()
                with torch.enable_grad():
                    loss = context.model(**batch).loss
                gradients = _as_stored(torch.autograd.grad(loss, used[0]))
                squares = [gradient.detach().float().square() for gradient in gradients]
                total = [one + other for one, other in zip(total, squares)] if total else squares
                count += 1
        finally:
            watch.remove()
        for number, name in enumerate(_names(context)):
            here = total[number].cpu() / max(count, 1)
            before = context.previous.remembered(name) * context.options.ewc_gamma if context.previous else 0
            context.run.memory[name] = here + before


def _slots(context: Context) -> TaskSlots:
    pool: Pool = context.model.retriever.pool
    return pool.task(SHARED)


def _offsets(task: TaskSlots, context: Context) -> list[Tensor]:
    return _as_stored(task(context.pool.settings.targets, torch.float32))


def _as_stored(sides: Iterable[Tensor]) -> list[Tensor]:
    """``[layers, count, rank, features]``, as a forward pass takes offsets, to ``[count, layers, rank, features]``."""
    return [side.transpose(0, 1) for side in sides]


def _names(context: Context) -> list[str]:
    """In the order in which a task's slots give their offsets."""
    return [f"information.{kind}.{target}" for target in context.pool.settings.targets for kind in ("B", "A")]
