"""Per-sample low-rank weight offsets on a frozen projection.

For target projection ``W`` of layer ``l`` and a sample ``b`` with selected slots ``I_b`` and weights ``w``::

    y = W x + scale * sum_{p in I_b} w[b, p] * A[p, l]^T (B[p, l] x)          A: [rank, out], B: [rank, in]

The dense ``out x in`` offset is never formed: two small products do the work. Where few slots are in use by the whole
batch the products are plain matrix products over those slots with a gate per sample (``gate`` holds the weights, zero
for slots that a sample did not select); where there are many, each sample gathers its own.

How the offset reaches the projection: the causal LM's ``forward`` passes ``weight_offset=...`` on; transformers hands
keyword arguments to every layer's attention (also when gradient checkpointing recomputes it), where a pre-hook takes
it out and a hook on the projection adds it. No modelling file is forked, and wrapping the projection (PEFT,
bitsandbytes) does not lose it, because nothing is stored on the projection itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# By default compiled code is not looked at again for hooks: what was compiled for a base would serve for a stage.
torch._dynamo.config.skip_nnmodule_hook_guards = False

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
TARGETS = ATTENTION_TARGETS + MLP_TARGETS
ARGUMENT = "weight_offset"
"""The keyword argument that offsets travel by."""


@dataclass
class WeightOffset:
    """The offsets of one batch for all layers.

    Attributes:
        down: per target ``[layers, batch or 1, m, in]``; ``m`` = ranks of all gathered slots.
        up: per target ``[layers, batch or 1, m, out]``.
        gate: ``[batch, 1, m]``, the sample's slot weight times ``scale``, repeated over each slot's ranks.
        where: ``[batch, length, 1]``, the positions that the offsets act on; ``None`` for all.
    """

    down: dict[str, Tensor]
    up: dict[str, Tensor]
    gate: Tensor
    where: Tensor | None = None

    def __post_init__(self) -> None:
        # Once, not at each layer: the backward pass of an index is a tensor of all layers for each of them.
        self._layers = {target: list(zip(self.down[target].unbind(0), self.up[target].unbind(0))) for target in self.up}
        # In half precision what overflows in a slot that a sample did not select would be no number: inf * 0.
        gate = self.gate if self.where is None else self.gate * self.where  # [batch, length or 1, m]
        closed = gate == 0 if gate.dtype == torch.float16 else None
        self._gates = {gate.device: (gate, closed)}

    def add_to(self, output: Tensor, target: str, layer: int, x: Tensor) -> Tensor:
        """``output`` ``[batch, length, out]`` of a projection, with the offset's share for its ``x``
        ``[batch, length, in]``."""
        down, up = self._layer(target, layer, x.device)
        gate, closed = self._gate(x.device)
        shared = down.shape[0] == 1
        x = x.to(down.dtype)
        low = (x @ down.squeeze(0).T if shared else torch.bmm(x, down.mT)) * gate  # [batch, length, m]
        if closed is not None:
            low = low.masked_fill(closed, 0)
        if output.dtype != low.dtype:
            return output + (low @ up).to(output.dtype)
        # Without gradients in place: a projection's output is nobody else's, and a copy is a launch and its bytes more.
        alone = not torch.is_grad_enabled() and output.is_contiguous()
        if shared:
            add = Tensor.addmm_ if alone else torch.addmm
            return add(output.flatten(0, -2), low.flatten(0, -2), up.squeeze(0)).view(output.shape)
        return (Tensor.baddbmm_ if alone else torch.baddbmm)(output, low, up)

    def _layer(self, target: str, layer: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """``down`` and ``up`` of a layer; on its device, where the model lies on several, moved there once."""
        down, up = self._layers[target][layer]
        if down.device != device:
            down, up = self._layers[target][layer] = (down.to(device), up.to(device))
        return down, up

    def _gate(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        if device not in self._gates:
            gate, closed = self._gates[self.gate.device]
            self._gates[device] = (gate.to(device), None if closed is None else closed.to(device))
        return self._gates[device]


def target_module(layer: nn.Module, target: str) -> nn.Module:
    """The projection called ``target`` of a decoder layer."""
    parent = layer.self_attn if target in ATTENTION_TARGETS else layer.mlp
    found: nn.Module = getattr(parent, target)
    return found


def target_features(config: Any, target: str) -> tuple[int, int]:
    """``(in, out)`` features of a target projection for a Llama-like config."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "q_proj": (hidden, config.num_attention_heads * head_dim),
        "k_proj": (hidden, config.num_key_value_heads * head_dim),
        "v_proj": (hidden, config.num_key_value_heads * head_dim),
        "o_proj": (config.num_attention_heads * head_dim, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }[target]


def install_offset_hooks(layers: Iterable[nn.Module], targets: Iterable[str]) -> list[RemovableHandle]:
    """Let the ``weight_offset`` argument of a forward pass act on the ``targets`` of every decoder layer."""
    targets = tuple(targets)
    return [hook for index, layer in enumerate(layers) for hook in _hook_layer(layer, index, targets)]


class _Current(threading.local):
    """The offset of the forward pass that this thread is in; others of the same model may run beside it."""

    offset: WeightOffset | None = None


def _hook_layer(layer: nn.Module, index: int, targets: tuple[str, ...]) -> list[RemovableHandle]:
    current = _Current()

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if ARGUMENT not in kwargs:
            raise ValueError(
                "a decoder layer with slots was called by itself, without the offset of a route: call the model or its "
                "decoder, or give weight_offset=None for the base model's layer"
            )
        current.offset = kwargs[ARGUMENT]
        return args, {name: value for name, value in kwargs.items() if name != ARGUMENT}

    # On self_attn, not on the layer: checkpointing recomputes what is inside the layer's forward. Attention runs before
    # the MLP, so MLP targets find the offset too.
    attention: nn.Module = layer.self_attn  # type: ignore[assignment]
    hooks = [attention.register_forward_pre_hook(take, with_kwargs=True)]
    for target in targets:
        hooks.append(target_module(layer, target).register_forward_hook(_adder(current, target, index)))
    return hooks


def _adder(current: _Current, target: str, index: int) -> Callable[..., Tensor | None]:
    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        offset = current.offset
        return None if offset is None else offset.add_to(output, target, index, args[0])

    return add
