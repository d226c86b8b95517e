"""The projector that carries vision features into the language model's embedding space.

Types, as LLaVA names them in ``mm_projector_type``: ``linear``, ``mlp{N}x_gelu`` (N linear layers with GELU between
them) and ``identity``.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from llava.checkpoints.weights import load_bin
from llava.utils import UserError


class IdentityMap(nn.Module):
    """Returns its input; for towers whose features already have the language model's width."""

    def forward(self, x, *args, **kwargs):
        return x

    @property
    def config(self) -> dict:
        return {"mm_projector_type": "identity"}


def build_vision_projector(config, delay_load: bool = False, **kwargs) -> nn.Module:
    """The projector that ``config.mm_projector_type`` names: ``[..., mm_hidden_size] -> [..., hidden_size]``.

    Raises ``ValueError`` for an unknown type. ``delay_load`` is accepted for LLaVA's callers.
    """
    kind = getattr(config, "mm_projector_type", None) or "linear"
    if kind == "identity":
        return IdentityMap()
    if kind == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    if match := re.fullmatch(r"mlp(\d+)x_gelu", kind):
        layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
        for _ in range(int(match[1]) - 1):
            layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
        return nn.Sequential(*layers)
    raise ValueError(f"unknown mm_projector_type {kind!r}; known: linear, mlp<N>x_gelu, identity")


def load_projector(projector: nn.Module, path: str | Path) -> None:
    """Read ``mm_projector.bin`` into ``projector``; ``UserError`` if it is another projector's."""
    state = {key.split("mm_projector.")[-1]: value for key, value in load_bin(Path(path)).items() if "projector" in key}
    try:
        projector.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit the projector ({reason}); check --mm_projector_type") from error
