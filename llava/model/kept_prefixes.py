"""Prefixes (``llava.model.prefixes``) on the disk, so that the stages and evaluations of a run work out each once.

They lie in files like those of ``llava.model.vision.sights``, mapped, bounded and checked alike. Their names are
checksums over everything that decides their bits: the folder's over weights, arithmetic and libraries, the file's over
the ids of the head and the features of the pictures themselves, wherever those come from.

On the CPU alone: a GPU works a prefix out faster than it is read and compared with its checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.devices import arithmetic
from llava.model.vision.sights import LIBRARIES, MEGABYTES, Sight, SightStore

PREFIXES = "prefixes"
FORMAT = 1
"""Raised when the same content would give other numbers."""
_SAMPLE = 64
_MERGING = ("mm_patch_merge_type", "image_grid_pinpoints")
"""Fields of a model's config that decide how tiles become one picture."""


class PrefixFolder:
    """The prefixes of one model in a folder that others may have too; safe to use from several threads.

    Args:
        folder: of queries, whose ``prefixes`` they are.
        models: contents of the checkpoints that the model's weights come from (``checkpoints.manifest``).
        megabytes: that the folder may take.
    """

    def __init__(self, folder: str | os.PathLike[str], models: Mapping[str, Any], megabytes: int = MEGABYTES) -> None:
        self.root, self.models, self.megabytes = Path(folder) / PREFIXES, dict(models), megabytes
        self._store: SightStore | None = None
        self._lock = threading.Lock()

    def prefix(
        self,
        model: Any,
        head: Sequence[int],
        pictures: Sequence[Tensor],
        sizes: Sequence[Any],
        work_out: Callable[[], Tensor],
    ) -> tuple[Tensor, bool]:
        """The prefix of a head with its pictures' features: from the folder, else worked out and put there.

        Returns:
            it, and whether it lies in the folder now, so that it takes no memory that others could not have.
        """
        if model.get_model().embed_tokens.weight.device.type != "cpu" or not self.megabytes:
            return work_out(), False
        with self._lock:
            self._store = self._store or SightStore(self.root, weights_of(model, self.models), self.megabytes)
        name = name_of(model, head, pictures, sizes)
        if (found := self._store.get(name)) is not None:
            return found.features, True
        made = Sight(work_out().contiguous(), {}, (0, 0))
        kept = made if self._store.full else self._store.put(name, made)
        return kept.features, kept is not made


def weights_of(model: Any, models: Mapping[str, Any]) -> str:
    """A checksum over what decides the prefixes of a model, but for ids and pictures.

    The checkpoints say which weights those are; what was put into the model since, as another projector, shows in the
    weights themselves: all of the projector's, and the first of every other one.
    """
    digest = hashlib.sha256()
    for name, weight in model.get_model().named_parameters():
        if not name.startswith("vision_tower"):  # which has made the features by then
            values = weight.detach().flatten()
            values = values if name.startswith("mm_projector") else values[:_SAMPLE]
            digest.update(f"{name}:{weight.dtype}:{list(weight.shape)}".encode() + _bytes(values))
    found = {
        "format": FORMAT,
        "models": dict(models),
        "weights": digest.hexdigest(),
        "run": [arithmetic("cpu"), str(getattr(model.config, "_attn_implementation", None))],
        **LIBRARIES,
    }
    return hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()[:32]


def name_of(model: Any, head: Sequence[int], pictures: Sequence[Tensor], sizes: Sequence[Any]) -> str:
    """A checksum over a head's ids, its pictures' features and how they are put together, as things are now."""
    autocast = str(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else None
    merging = [getattr(model.config, field, None) for field in _MERGING]
    about = [list(head), [size and list(size) for size in sizes], merging, autocast]
    digest = hashlib.sha256(json.dumps(about, default=str).encode())
    for picture in pictures:
        digest.update(f"{picture.dtype}:{list(picture.shape)}".encode() + _bytes(picture))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
