"""KeepLoRA: each task's low-rank adapter lies beside the directions that the base and the tasks before it need.

Luo et al., ICLR 2026 (arXiv 2601.19659). ``B`` is what the paper calls A, the side that reads a layer's input. For each
projection ``M`` begins as the input directions that hold a share of its weight's energy; then for each task::

    B = the first r right singular vectors of G - G M M^T          G: the loss's gradient by W, before the first step
    y = W x + scale * sum_t A[t]^T (B[t] x)                        B is frozen, A trains from 0
    M <- [M, the directions beside M that, with it, hold a share of the energy of the task's features x]

So a task's update acts on nothing that lies in ``M``. As in the authors' code ``A`` begins at 0, which needs no
correction of W. The sum can be merged into the weights, so that answering costs what the base's does and needs no
route; here the parts are kept. The later a task, the less room it has, and none once ``M`` fills the space.

Paper: Luo et al., ICLR 2026 (arXiv 2601.19659)
Keeps of past data: directions of its features, at most as many as a projection has inputs
Grows with the tasks: one adapter a task, and the directions
Task at test time: not needed
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llava.continual.methods import METHODS, Context, ParamGroup
from llava.continual.methods.per_task import Summed, SumOfTasks
from llava.continual.methods.subspace import extended, principal, residual
from llava.data.rows import Row
from llava.slots.adapter import ADAPTERS
from llava.slots.offsets import target_module
from llava.utils import UserError

Place = tuple[str, int]
"""A target projection and its layer."""


@dataclass
class KeepLoRAOptions:
    """How much is kept out of a task's reach."""

    keeplora_weights: float = field(default=0.8, metadata={"help": "share of the base weights' energy to keep"})
    keeplora_features: float = field(default=0.99, metadata={"help": "share of a task's features' energy to keep"})
    keeplora_rows: int = field(default=64, metadata={"help": "rows that gradient and features are taken from; 0: all"})


@ADAPTERS.register
class KeepLoRAAdapter(Summed):
    name = "keeplora"


@METHODS.register
class KeepLoRA(SumOfTasks):
    name = "keeplora"
    Options = KeepLoRAOptions

    def rows(self, context: Context, rows: list[Row]) -> list[Row]:
        options = context.options
        for name in ("keeplora_weights", "keeplora_features"):
            if not 0 <= getattr(options, name) <= 1:
                raise UserError(f"--{name} is {getattr(options, name)}; give a share between 0 and 1")
        if options.keeplora_rows < 0:
            raise UserError(f"--keeplora_rows is {options.keeplora_rows}; give 0 or more")
        self.every = max(len(rows) // options.keeplora_rows, 1) if options.keeplora_rows else 1
        return rows

    def begin(self, context: Context) -> Sequence[nn.Parameter | ParamGroup]:
        super().begin(context)
        before, share = context.previous, context.options.keeplora_weights
        self.kept: dict[Place, Tensor] = {}
        for place, module in projections(context):
            if hasattr(module.weight, "ds_id") or not module.weight.is_floating_point():
                raise UserError("keeplora looks into the base's whole weights: leave out ZeRO-3 and --bits")
            self.kept[place] = principal(module.weight, share) if before is None else before.remembered(_name(place))
        task = context.model.retriever.pool.task(context.trained)
        task.B.requires_grad_(False)
        return list(task.A.parameters())

    def start(self, context: Context, batches: Iterable[dict[str, Any]]) -> None:
        """Lay ``B`` into the directions that the task's gradient has beside the kept ones."""
        gradients: dict[Place, Tensor] = {}
        context.model.eval()
        with watched(context) as seen:
            for batch in self._some(batches):
                with torch.enable_grad():
                    loss = context.model(**batch).loss
                slopes = torch.autograd.grad(loss, [output for _, output in seen.values()])
                for (place, (given, _)), slope in zip(seen.items(), slopes, strict=True):
                    _add(gradients, place, slope.flatten(0, -2).float().T @ given.flatten(0, -2).float())
        side = context.model.retriever.pool.task(context.trained).B
        with torch.no_grad():
            for (target, layer), gradient in gradients.items():
                kept = self.kept[target, layer].to(gradient)
                side[target][0, layer].copy_(residual(gradient, kept, side[target].shape[2]))

    def end(self, context: Context, batches: Iterable[dict[str, Any]]) -> None:
        """Keep the directions of this task's features out of later tasks' reach."""
        moments: dict[Place, Tensor] = {}
        with watched(context) as seen, torch.no_grad():
            for batch in self._some(batches):
                context.model(**batch)
                for place, (given, _) in seen.items():
                    features = given.flatten(0, -2).float()
                    _add(moments, place, features.T @ features)
        for place, found in moments.items():
            kept = extended(self.kept[place].to(found), found, context.options.keeplora_features)
            context.run.memory[_name(place)] = kept.cpu().contiguous()

    def _some(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Evenly spread rows."""
        return (batch for number, batch in enumerate(batches) if number % self.every == 0)


def projections(context: Context) -> Iterator[tuple[Place, Any]]:
    """The projections that adapters act on."""
    for layer, module in enumerate(context.model.get_model().layers):
        for target in context.pool.settings.targets:
            yield (target, layer), target_module(module, target)


@contextmanager
def watched(context: Context) -> Iterator[dict[Place, tuple[Tensor, Tensor]]]:
    """What each projection was given and gave in the latest forward pass."""
    seen: dict[Place, tuple[Tensor, Tensor]] = {}

    def watch(place: Place) -> Any:
        return lambda module, args, output: seen.update({place: (args[0].detach(), output)})

    hooks = [module.register_forward_hook(watch(place)) for place, module in projections(context)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _add(sums: dict[Place, Tensor], place: Place, value: Tensor) -> None:
    sums[place] = sums[place] + value if place in sums else value


def _name(place: Place) -> str:
    return f"kept.{place[0]}.{place[1]}"
