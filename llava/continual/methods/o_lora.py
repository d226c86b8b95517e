"""O-LoRA: a low-rank adapter for each task, held orthogonal to the frozen ones of the tasks before; all are added up.

Wang et al., Findings of EMNLP 2023 (arXiv 2310.14152). ``B`` is what the paper calls A, the side that reads a layer's
input::

    y = W x + scale * sum_t A[t]^T (B[t] x)
    loss = cross-entropy + lambda * sum_{s < t} || B[t] B[s]^T ||^2         the entries' squares, over layers

The sum can be merged into the weights, so that answering costs what the base's does; here the parts are kept. Earlier
adapters stay bit for bit as they were, but each new one acts on every question, so earlier tasks' answers move, and the
order counts.

Paper: Wang et al., Findings of EMNLP 2023 (arXiv 2310.14152)
Keeps of past data: nothing
Grows with the tasks: one adapter a task
Task at test time: not needed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llava.continual.methods import METHODS, Context, ParamGroup
from llava.continual.methods.per_task import Summed, SumOfTasks
from llava.slots.adapter import ADAPTERS
from llava.slots.pool import Pool


@dataclass
class OLoRAOptions:
    """How strongly adapters are held apart."""

    o_lora_lambda: float = field(default=0.5, metadata={"help": "weight of the orthogonality"})


@ADAPTERS.register
class OLoRAAdapter(Summed):
    name = "o_lora"


@METHODS.register
class OLoRA(SumOfTasks):
    name = "o_lora"
    Options = OLoRAOptions

    def begin(self, context: Context) -> Sequence[nn.Parameter | ParamGroup]:
        parameters = super().begin(context)
        earlier = [] if context.previous is None else context.previous.pool.names
        self.before = [side.detach() for name in earlier for side in reading_sides(context, name)]
        return parameters

    def loss(self, context: Context, batch: dict[str, Any], outputs: Any, loss: Tensor) -> Tensor:
        if not self.before:
            return loss
        now = reading_sides(context, context.task)
        # The model is not on its device yet when training begins; from the first step on nothing moves.
        self.before = [side.to(now[0].device) for side in self.before]
        earlier = [self.before[first : first + len(now)] for first in range(0, len(self.before), len(now))]
        weight: float = context.options.o_lora_lambda
        return loss + weight * sum((overlap(now, before) for before in earlier), start=torch.zeros_like(loss))


def reading_sides(context: Context, task: str) -> list[Tensor]:
    """``B`` of each target ``[layers, count, rank, in]``, as a forward pass takes it: whole, also under ZeRO-3."""
    pool: Pool = context.model.retriever.pool
    sides: tuple[Tensor, ...] = pool.task(task)(context.pool.settings.targets, torch.float32)
    return list(sides[::2])


def overlap(now: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """``|| B[t] B[s]^T ||^2`` of two tasks, summed over targets and layers."""
    products = [(one @ other.mT).square().sum() for one, other in zip(now, before, strict=True)]
    return torch.stack(products).sum()
