"""A batch without pictures, in training: tower and projector run on an empty one, which counts for nothing.

Processes that train together must run the same modules: one whose rows hold no picture would keep the others waiting
for its gradients, or under ZeRO-3 for its parts of the weights. And in the same order, tower and projector before the
embeddings: DeepSpeed sums gradients as they come.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def blank_needed(model: Any) -> bool:
    """Whether tower or projector are in training, or lie in parts on several processes."""
    tower = model.get_vision_tower()
    weights = [] if tower is None else [*model.get_model().mm_projector.parameters(), *tower.parameters()]
    return any(hasattr(weight, "ds_id") or (model.training and weight.requires_grad) for weight in weights)


def blank_feature(model: Any, with_tower: bool) -> Tensor:
    """Zero, as a result of the projector and, with ``with_tower``, of the tower."""
    core, tower = model.get_model(), model.get_vision_tower()
    dtype = core.embed_tokens.weight.dtype
    features = torch.zeros(1, 1, model.config.mm_hidden_size, device=tower.device, dtype=dtype)
    if with_tower:
        features = tower(torch.zeros(1, 3, tower.image_size, tower.image_size, device=tower.device, dtype=dtype))
    result = core.mm_projector(features).sum()
    newline = getattr(core, "image_newline", None)
    return (result if newline is None else result + newline.sum()) * 0
