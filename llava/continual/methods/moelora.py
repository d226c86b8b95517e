"""MoELoRA: a mixture of low-rank experts with a trained gate, all shared by all tasks.

Chen et al., CoIN (arXiv 2403.08350), with one gate for all layers that sees the question's query::

    w = softmax(G q),     y = W x + scale * sum_e w[e] A[e]^T (B[e] x)

Gate and experts go on from task to task; nothing protects earlier tasks.

Paper: Chen et al., CoIN (arXiv 2403.08350)
Keeps of past data: nothing
Grows with the tasks: nothing
Task at test time: not needed
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from llava.continual.methods import METHODS, Context, Recipe
from llava.continual.methods.sequential import SHARED
from llava.model.language_model.retriever import Retriever
from llava.slots.adapter import ADAPTERS
from llava.slots.fit import seed_of
from llava.slots.pool import Pool
from llava.slots.queries import MODALITY_DIM, Query
from llava.slots.route import Route
from llava.slots.settings import RetrieverSettings
from llava.slots.task_slots import TaskSlots
from llava.utils import UserError

GATE = "gate.weight"


@dataclass
class MoELoRAOptions:
    """The mixture's shape; an expert's rank is a slot's."""

    experts: int = field(default=4, metadata={"help": "low-rank experts of the mixture"})


@ADAPTERS.register
class GatedAdapter(Retriever):
    """Every question takes all experts, with the weights that the gate gives it."""

    name = "moelora"

    def __init__(self, pool: Pool, memory: dict[str, Tensor]):
        super().__init__(pool)
        shape = (pool.size, query_width(pool.settings))
        if GATE not in memory or tuple(memory[GATE].shape) != shape:
            raise UserError(f"the stage's gate does not belong to its {pool.size} experts; train it again")
        self.gate = nn.Linear(shape[1], shape[0], bias=False)
        self.gate.weight = nn.Parameter(memory[GATE].clone(), requires_grad=False)

    def decide(self, query: Query, tasks: Sequence[str | None] | None = None) -> Route:
        weights = self.gate(query.joint().to(self.gate.weight)).softmax(-1)  # [batch, experts]
        return Route(torch.arange(weights.shape[1]).expand(weights.shape), weights)


@METHODS.register
class MoELoRA(Recipe):
    name = "moelora"
    Options = MoELoRAOptions

    def pool(self, context: Context) -> tuple[Pool, str]:
        if context.previous is not None:
            before = context.previous.pool
            return before.with_tasks([copy.deepcopy(before.task(SHARED))]), SHARED
        count = context.options.experts
        if count < 1:
            raise UserError(f"--experts is {count}; give 1 or more")
        settings = replace(context.keys.settings, top_k=count, router="uniform", unknown_share=0.0)
        experts = TaskSlots.empty(settings, SHARED, 0, count)
        experts.init_offsets(settings, torch.Generator().manual_seed(seed_of(SHARED, context.seed, "experts")))
        return Pool(settings, [experts], context.keys.base, adapter=self.name), SHARED

    def begin(self, context: Context) -> Sequence[nn.Parameter]:
        width = query_width(context.pool.settings)
        before = context.previous
        gate = torch.zeros(context.pool.size, width) if before is None else before.remembered(GATE)
        adapter = GatedAdapter(context.pool, {GATE: gate})
        context.model.attach_adapter(adapter)
        adapter.gate.requires_grad_(True)
        return [*adapter.train_only(SHARED), *adapter.gate.parameters()]

    def slots(self, context: Context) -> Pool:
        context.run.memory = {GATE: context.adapter_state()[GATE]}
        return context.trained_pool()


def query_width(settings: RetrieverSettings) -> int:
    """Length of a query's modalities side by side, as ``Query.joint`` gives them."""
    parts = [settings.text_dim if settings.uses_text else 0, settings.image_dim if settings.uses_images else 0]
    return sum(min(part or 0, MODALITY_DIM) for part in parts)
