"""What stands in front of a question, the template's head and the pictures, computed once by the frozen base.

Where no offset acts up to a row's last picture (they are scoped to the question, or there are none), the keys and
values of these positions, the row's **prefix**, depend on ids, pictures and the frozen base alone. ``PrefixStore``
keeps them, for every question, epoch, task and stage; a pass then runs only the positions behind, on top of a cache
that is filled from it, and no gradient goes through the picture. Each prefix is worked out by itself, so that it does
not depend on the batch in which it is first met; with a folder (``llava.model.kept_prefixes``) once for all processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.devices import moved
from llava.model.decision import Decision
from llava.model.grown_cache import grown_cache
from llava.model.kept_prefixes import PrefixFolder
from llava.model.splice import splice
from llava.model.vision.hand_out import sizes_of
from llava.padding import pad
from llava.slots.adapter import Action
from llava.slots.offsets import ARGUMENT

Names = Sequence[Sequence[Hashable]]
"""What tells the pictures of each row from all others that a model is shown, such as their files' names."""


_OF_ALL = ("output_hidden_states", "output_attentions", "logits_to_keep")
"""Options of a pass whose results have a place for each position."""
_OWN_CACHE = ("past_key_values", "cache_implementation", "prefill_chunk_size", "custom_generate")
"""Options of ``generate`` that decide how a cache is made and filled."""


class PrefixStore:
    """Prefixes ``[layers, 2, heads, length, head_dim]`` in the main memory; safe to use from several threads.

    What is kept first stays: epochs and stages meet the same pictures again, where dropping the oldest would drop each
    just before it is needed.

    Args:
        limit: bytes at most.
        folder: where other processes find them too; what lies there is mapped, and takes nothing of ``limit``.
    """

    def __init__(self, limit: int, folder: PrefixFolder | None = None) -> None:
        self.limit, self.used, self.full, self.folder = limit, 0, False, folder
        self._kept: dict[Hashable, Tensor] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefixStore:
        return PrefixStore(self.limit)  # of another model

    def get(self, key: Hashable) -> Tensor | None:
        """The prefix, ``None`` where it is not kept."""
        return self._kept.get(key)

    def keep(self, key: Hashable, prefix: Tensor, mapped: bool = False) -> None:
        """Keep a prefix where there is room; from the first that finds none on the store counts as full."""
        taken = 0 if mapped else prefix.nbytes
        with self._lock:
            if self.used + taken > self.limit:
                self.full = True
            elif key not in self._kept:
                self._kept[key] = prefix.cpu()
                self.used += taken


class Row(NamedTuple):
    """A row on the host: the ids up to its last picture, and ids and labels behind it."""

    head: tuple[int, ...]
    ids: list[int]
    labels: list[int]


class Behind(NamedTuple):
    """A pass over what stands behind the prefixes: the decoder's arguments, and ``labels`` ``[batch, length]``."""

    inputs: dict[str, Any]
    labels: Tensor


def split_rows(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None = None) -> list[Row] | None:
    """The rows of a batch ``[batch, tokens]``; one without a picture has no head.

    ``None`` where a row cannot be split: nothing stands behind its last picture, or a label is predicted before.
    """
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    wanted = torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels
    rows = []
    for values in torch.stack([input_ids, real.to(input_ids), wanted], dim=1).tolist():  # one copy to the host
        kept = [(token, label) for token, own, label in zip(*values, strict=True) if own]
        ids, known = [token for token, _ in kept], [label for _, label in kept]
        cut = len(ids) - ids[::-1].index(IMAGE_TOKEN_INDEX) if IMAGE_TOKEN_INDEX in ids else 0
        if cut == len(ids) or (cut and any(label != IGNORE_INDEX for label in known[: cut + 1])):
            return None
        rows.append(Row(tuple(ids[:cut]), ids[cut:], known[cut:]))
    return rows


class SharedPrefixes:
    """Mix-in of a causal language model with pictures: passes that begin behind what is kept of the prefixes.

    Attributes:
        prefixes: where they are kept; ``None``: every pass runs all positions.
    """

    prefixes: PrefixStore | None = None
    get_model: Callable[[], Any]
    project_features: Callable[..., list[list[Tensor]]]
    config: Any
    training: bool

    def _may_share(self, decision: Decision, action: Action, options: Mapping[str, Any]) -> bool:
        """Whether prefixes are the frozen base's alone, and a pass with ``options`` can go on behind them."""
        if any(options.get(name) for name in _OF_ALL) or options.get("return_dict") is False:
            return False
        if self.prefixes is None or action.prefix is not None or not (decision.of_question or action.offset is None):
            return False
        decoder, config = self.get_model(), self.config
        if self.training and (
            config.attention_dropout or any(layer.gradient_checkpointing for layer in decoder.layers)
        ):
            return False
        window = getattr(config, "sliding_window", None)  # is counted in places of the cache, which has gaps
        if window is not None and window < config.max_position_embeddings:
            return False
        sharded = type(decoder.layers[0]).__name__.startswith(("FSDP", "FullySharded"))
        if sharded or len(set((getattr(self, "hf_device_map", None) or {}).values())) > 1:
            return False
        return not any(weight.requires_grad or hasattr(weight, "ds_id") for weight in decoder.parameters())

    def _may_go_on(self, options: Mapping[str, Any], defaults: Any) -> bool:
        """Whether ``generate`` with ``options`` can begin on a cache that is filled already."""
        settings = options.get("generation_config") or defaults
        asked = {name: getattr(settings, name, None) for name in ("num_beams", "num_return_sequences", "use_cache")}
        asked |= {name: value for name, value in options.items() if name in asked}
        several = max(asked["num_beams"] or 1, asked["num_return_sequences"] or 1) > 1
        own = any(options.get(name) or getattr(settings, name, None) for name in _OWN_CACHE)
        return not several and not own and asked["use_cache"] is not False

    def _laid_out(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        names: Names,
        features: list[list[Tensor]],
        image_sizes: Any,
    ) -> tuple[Tensor, Tensor, DynamicCache, int] | None:
        """Prompts for ``generate``: embeddings ``[batch, length, hidden]`` and mask ``[batch, length]``, each row's
        prefix and the rest padded on the left by themselves, the cache of the prefixes and their common length.

        The prefixes' embeddings are left 0: they are in the cache. ``None`` where all positions must run, or where
        prefixes would be worked out that find no room.
        """
        rows = split_rows(input_ids, attention_mask)
        if rows is None or not any(row.head for row in rows):
            return None
        assert self.prefixes is not None  # _may_share
        wanted = [(tuple(own), row.head) for row, own in zip(rows, names, strict=True) if row.head]
        if self.prefixes.full and any(self.prefixes.get(key) is None for key in wanted):
            return None
        prefixes = self._prefixes(rows, names, features, image_sizes)
        if self._too_long(prefixes, rows):
            return None
        embed = self.get_model().embed_tokens
        cached, seen = joined(prefixes, embed.weight.device)
        ids, real = pad([torch.tensor(row.ids) for row in rows], "left")
        words = embed(moved(ids, embed.weight.device))
        empty = words.new_zeros(len(rows), seen.shape[1], words.shape[2])
        mask = torch.cat([seen, moved(real, seen.device)], dim=1)
        return torch.cat([empty, words], dim=1), mask, filled(cached, grown_cache(self.config)), seen.shape[1]

    def _too_long(self, prefixes: Sequence[Tensor], rows: Sequence[Row]) -> bool:
        """Whether a row would be cut to the model's window."""
        window = getattr(self.config, "tokenizer_model_max_length", None)
        lengths = [prefix.shape[3] + len(row.ids) for prefix, row in zip(prefixes, rows, strict=True)]
        return window is not None and max(lengths) > window

    def _behind(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        names: Names,
        features: list[list[Tensor]] | None,
        image_sizes: Any,
    ) -> Behind | None:
        """A training pass that begins behind the rows' last pictures; ``None`` where all positions must run."""
        rows = split_rows(input_ids, attention_mask, labels)
        if features is None or rows is None or not any(row.head for row in rows):
            return None
        prefixes = self._prefixes(rows, names, features, image_sizes)
        if self._too_long(prefixes, rows):
            return None
        cached, seen = joined(prefixes, input_ids.device)
        ids, real = pad([torch.tensor(row.ids) for row in rows])
        known = pad([torch.tensor(row.labels) for row in rows], value=IGNORE_INDEX)[0]
        ids, real, known = (moved(part, input_ids.device) for part in (ids, real, known))
        places = torch.tensor([prefix.shape[3] for prefix in prefixes])[:, None] + torch.arange(ids.shape[1])
        inputs = {
            "inputs_embeds": self.get_model().embed_tokens(ids),
            "attention_mask": torch.cat([seen, real], dim=1),
            "position_ids": moved(places, input_ids.device),
            "past_key_values": filled(cached, DynamicCache()),
            "use_cache": True,
        }
        return Behind(inputs, known)

    def _prefixes(
        self, rows: Sequence[Row], names: Names, features: list[list[Tensor]], image_sizes: Any
    ) -> list[Tensor]:
        """The prefix of each row; those that are not kept are worked out, and kept where there is room.

        Raises:
            ValueError: a row has another number of names than pictures.
        """
        wrong = next((row for row, own in enumerate(names) if len(own) != len(features[row])), None)
        if wrong is not None:
            raise ValueError(f"row {wrong} has {len(features[wrong])} picture(s) and {len(names[wrong])} name(s)")
        assert self.prefixes is not None  # _may_share
        sizes, here = iter(sizes_of(features, image_sizes)), {}
        for row, own, pictures in zip(rows, names, features, strict=True):
            taken, key = [next(sizes) for _ in pictures], (tuple(own), row.head)
            if not row.head or key in here:
                continue
            if (found := self.prefixes.get(key)) is None:
                found, mapped = self._from_folder(row.head, pictures, taken)
                self.prefixes.keep(key, found, mapped)
            here[key] = found
        none = next(iter(here.values()))[:, :, :, :0]
        return [here[tuple(own), row.head] if row.head else none for row, own in zip(rows, names, strict=True)]

    def _from_folder(self, head: tuple[int, ...], pictures: list[Tensor], sizes: list[Any]) -> tuple[Tensor, bool]:
        """A prefix that is not in the memory, and whether it lies in the store's folder."""
        assert self.prefixes is not None  # _may_share
        work_out, folder = partial(self._prefix, head, pictures, sizes), self.prefixes.folder
        return (work_out(), False) if folder is None else folder.prefix(self, head, pictures, sizes, work_out)

    def _prefix(self, head: tuple[int, ...], pictures: list[Tensor], sizes: list[Any]) -> Tensor:
        """Keys and values ``[layers, 2, heads, length, head_dim]`` of a head, in the type of attention."""
        decoder, cache = self.get_model(), DynamicCache()
        with torch.inference_mode(False), torch.no_grad():
            device = decoder.embed_tokens.weight.device
            projected = self.project_features([pictures], [sizes])
            spliced = splice(decoder.embed_tokens, torch.tensor([head], device=device), None, None, projected)
            decoder(inputs_embeds=spliced.embeds, past_key_values=cache, use_cache=True, **{ARGUMENT: None})
            layers: list[Any] = cache.layers
            dtype = layers[0].keys.dtype
            if torch.is_autocast_enabled(device.type):
                dtype = torch.get_autocast_dtype(device.type)
            return torch.stack([torch.stack((layer.keys[0].to(dtype), layer.values[0].to(dtype))) for layer in layers])


def joined(prefixes: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prefixes of a batch, padded on the left: ``[layers, 2, batch, heads, longest, head_dim]`` and their mask
    ``[batch, longest]``."""
    first, lengths = prefixes[0], [prefix.shape[3] for prefix in prefixes]
    layers, pair, heads, _, width = first.shape
    longest = max(lengths)
    cached = torch.zeros(layers, pair, len(prefixes), heads, longest, width, dtype=first.dtype, device=device)
    for number, (prefix, length) in enumerate(zip(prefixes, lengths, strict=True)):
        # Not over pinned memory: of that torch keeps what a batch once took, and a 7B's prefix is 300 MB.
        cached[:, :, number, :, longest - length :] = prefix.to(device)
    seen = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return cached, moved(seen, device)


def filled(cached: Tensor, cache: DynamicCache) -> DynamicCache:
    """An empty cache with the prefixes that ``joined`` gave."""
    for number, (keys, values) in enumerate(cached):
        cache.update(keys, values, number)
    return cache
