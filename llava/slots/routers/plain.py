"""Routers that know nothing of a question: for a pool of one shared adapter, and as an ablation."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from llava.slots.queries import Query
from llava.slots.routers import ROUTERS, Router


@ROUTERS.register
class UniformRouter(Router):
    """Every slot alike."""

    name = "uniform"

    def scores(self, query: Query) -> Tensor:
        return torch.zeros(len(query), len(self.slot_tasks), dtype=torch.float64, device=self.device)


@ROUTERS.register
class RandomRouter(Router):
    """Random logits that depend on the seed and the query's own numbers, so that an answer can be reproduced."""

    name = "random"

    def scores(self, query: Query) -> Tensor:
        rows = []
        for row in query.joint().cpu():
            digest = hashlib.sha256(self.seed.to_bytes(8, "little") + row.float().numpy().tobytes()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            rows.append(torch.randn(len(self.slot_tasks), generator=generator, dtype=torch.float64))
        return torch.stack(rows).to(self.device)
