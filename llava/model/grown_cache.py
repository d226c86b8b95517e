"""Keys and values of a decoding loop in buffers that have room for further ones.

transformers' ``DynamicCache`` makes all keys and values of a layer anew at every token: at the shapes of LLaVA-1.5-7B
and a batch of 16 more than a third of the bytes that a decoding step moves. Here a token is written behind those before
it, and the buffers grow by ``BLOCK`` positions at a time; the numbers that attention reads are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

BLOCK = 64
"""Positions that a buffer grows by."""


class GrownLayer(DynamicLayer):
    """Keys and values ``[batch, heads, length, head_dim]`` of a layer: the filled part of a buffer each.

    Where another program has put its own tensors in their place (beams, picked rows), they are taken over into new
    buffers; with gradients they are joined as ``DynamicLayer`` does it.
    """

    _buffers: tuple[Tensor, Tensor] | None = None
    _filled: tuple[Tensor | None, Tensor | None] | None = None
    """The filled parts, by which others' tensors are told from them."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with no position, where and in the type in which the first come."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put the new positions' keys and values behind the others; gives back all of them."""
        if torch.is_grad_enabled():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        length = before + key_states.shape[-2]
        if self._buffers is None or not self._is_own() or self._buffers[0].shape[2] < length or self._is_sealed():
            self._buffers = (_grown(self.keys, key_states, length), _grown(self.values, value_states, length))
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, before:length] = new
        keys, values = (buffer[:, :, :length] for buffer in self._buffers)
        self.keys, self.values = self._filled = keys, values
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last positions away; what comes next is written over them."""
        own = self._is_own()
        super().crop(tokens_to_remove)
        if own:
            self._filled = (self.keys, self.values)

    def _is_own(self) -> bool:
        """Whether keys and values are parts of the buffers still."""
        return self._filled is not None and self.keys is self._filled[0] and self.values is self._filled[1]

    def _is_sealed(self) -> bool:
        """Whether the buffers were made in torch's inference mode, and may not be written into outside of it."""
        return self._buffers is not None and self._buffers[0].is_inference() and not torch.is_inference_mode_enabled()


def _grown(old: Tensor | None, new: Tensor, length: int) -> Tensor:
    """A buffer with room for ``length`` positions and a block more, which holds the old ones."""
    batch, heads, _, width = new.shape
    room = -(-length // BLOCK) * BLOCK + BLOCK
    buffer = torch.empty(batch, heads, room, width, dtype=new.dtype, device=new.device)
    if old is not None and old.shape[2]:
        buffer[:, :, : old.shape[2]] = old
    return buffer


def grown_cache(config: Any) -> DynamicCache:
    """An empty cache for a decoder of this config: of ``GrownLayer``, where all its layers see all positions."""
    cache = DynamicCache(config=config)
    if all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [GrownLayer() for _ in cache.layers]
    return cache
