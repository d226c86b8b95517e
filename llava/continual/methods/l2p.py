"""Learning to Prompt: each slot is a key with a few prefix embeddings in front of the prompt, instead of an offset.

Wang et al., CVPR 2022 (arXiv 2112.08654). The prompts of all tasks form one pool from which every question takes the
``top_k`` whose keys are nearest to its query, and a task trains whatever its questions select::

    x = [P[i] for i in top_k(cos(q, keys))], then the prompt's embeddings

Here the keys come from stage 1 in closed form and stay; each task adds its own. Earlier tasks' prompts are not
protected, so isolation and order invariance do not hold.

Paper: Wang et al., CVPR 2022 (arXiv 2112.08654)
Keeps of past data: nothing
Grows with the tasks: the pool, by a prompt for each of a task's slots
Task at test time: not needed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from llava.continual.methods import METHODS, Context, Recipe
from llava.model.language_model.retriever import Retriever
from llava.slots.adapter import ADAPTERS, Action
from llava.slots.fit import seed_of
from llava.slots.pool import Pool
from llava.slots.route import Route
from llava.utils import UserError

PREFIX = "prefix.table"


@dataclass
class L2POptions:
    """The prompts' shape."""

    prompt_length: int = field(default=5, metadata={"help": "embeddings of each prompt"})


class Prefixes(nn.Module):
    """A table of prompts ``[pool, length, hidden]``; a call, so that ZeRO-3 gathers it."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)

    def forward(self, indices: Tensor) -> Tensor:
        """``[batch, k] -> [batch, k * length, hidden]``."""
        return self.table[indices].flatten(1, 2)


@ADAPTERS.register
class PrefixAdapter(Retriever):
    """Routes on keys as the retriever does, and puts the selected slots' prompts in front."""

    name = "l2p"

    def __init__(self, pool: Pool, memory: dict[str, Tensor]):
        super().__init__(pool)
        if PREFIX not in memory or len(memory[PREFIX]) != pool.size:
            raise UserError(f"the stage's prompts do not belong to its {pool.size} slots; train it again")
        self.prefix = Prefixes(memory[PREFIX].clone())

    def act(self, route: Route, dtype: torch.dtype) -> Action:
        return Action(prefix=self.prefix(route.slot_indices).to(dtype))


@METHODS.register
class L2P(Recipe):
    name = "l2p"
    Options = L2POptions

    def pool(self, context: Context) -> tuple[Pool, str]:
        settings = replace(context.keys.settings, features={}, router="keys", unknown_share=0.0)
        mine = context.keys.task(context.task).copy(A={}, B={}, trained=True)
        earlier = [] if context.previous is None else context.previous.pool.tasks
        if any(task.name == mine.name for task in earlier):
            raise UserError(f"the stage before this one holds task {mine.name!r} already; train another task")
        return Pool(settings, [*earlier, mine], context.keys.base, adapter=self.name), context.task

    def begin(self, context: Context) -> Sequence[nn.Parameter]:
        if context.options.prompt_length < 1:
            raise UserError(f"--prompt_length is {context.options.prompt_length}; give 1 or more")
        hidden = context.model.config.hidden_size
        generator = torch.Generator().manual_seed(seed_of(context.task, context.seed, "prompts"))
        count = context.pool.task(context.task).count
        table = torch.randn(count, context.options.prompt_length, hidden, generator=generator) * 0.02
        if context.previous is not None:
            before = context.previous.remembered(PREFIX)
            if before.shape[1] != table.shape[1]:
                raise UserError(f"--prompt_length is {table.shape[1]}, but the stage before has {before.shape[1]}")
            table = torch.cat([before, table])
        adapter = PrefixAdapter(context.pool, {PREFIX: table})
        context.model.attach_adapter(adapter)
        adapter.prefix.requires_grad_(True)
        return list(adapter.prefix.parameters())

    def slots(self, context: Context) -> Pool:
        context.run.memory = {PREFIX: context.adapter_state()[PREFIX]}
        return context.pool
