"""Pictures as a frozen tower sees them, and a store of them on disk, so that each is looked at once for all.

A **sight** is what is kept of a picture: the tower's features, from which the answer is made, and the image queries,
from which routes are. Each picture goes through the tower by itself, so that its sight does not depend on which
pictures it came with; stage 1, stage 2 and every evaluation see the same numbers.

``SightStore`` is a folder that any number of processes read and write at a time, one file a picture::

    <root>/<what sees>/<the picture's checksum>.safetensors    "features", and a query of each kind under its name

**What sees** is a checksum over everything but the picture that decides the numbers (``eye_of``). Features are mapped
from their file, not read into memory. A file that is damaged counts as none. Over its limit the store gives up what
other eyes saw, least lately used first; what its own eye saw stays, because epochs, stages and tasks meet the same
pictures again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from llava.checkpoints.manifest import tower_manifest
from llava.devices import arithmetic, moved, tf32_is_on
from llava.files import atomic_write, is_still
from llava.model.multimodal_encoder.tower import VisionTower
from llava.slots.names import KINDS
from llava.slots.picture_query import image_queries, image_query_dim
from llava.utils import rank0_print

FORMAT = 1
"""Raised when the same picture would give other numbers."""
MEGABYTES = 4096
"""What a store may take by default, 1,700 pictures of LLaVA-1.5 in float32."""
FEATURES, ABOUT = "features", "sight"
MAPPED, MAPS = 2**18, 30_000
"""Bytes from which on features are mapped, not read, and how many of them at a time: Linux lets a process have 65,530
maps."""
LIBRARIES = {"libraries": {name: version(name) for name in ("torch", "transformers", "tokenizers", "pillow", "numpy")}}
"""What computes: another version may give other numbers."""

_TOWER_FIELDS = ("mm_vision_select_layer", "mm_vision_select_feature", "image_grid_pinpoints")
_EYE = re.compile(r"[0-9a-f]{32}")
_DAMAGE = (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError)


@dataclass(frozen=True)
class Sight:
    """A picture as a tower sees it, on the CPU.

    Attributes:
        features: ``[tiles, patches, mm_hidden_size]``; of no tile where they were not kept.
        queries: by kind the image query ``[image_dim]``.
        size: ``(width, height)`` of the picture.
    """

    features: Tensor
    queries: dict[str, Tensor]
    size: tuple[int, int]

    @property
    def whole(self) -> bool:
        """Whether its features are there."""
        return len(self.features) > 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.features, *self.queries.values()))


@torch.no_grad()
def see(tower: VisionTower, pixels: Tensor, size: tuple[int, int], dtype: torch.dtype | None = None) -> Sight:
    """One picture through the tower, where that is.

    Args:
        pixels: ``[3, h, w]`` or ``[tiles, 3, h, w]``. dtype: of the features; by default the tower's.
    """
    tiles = pixels if pixels.dim() == 4 else pixels[None]
    features: Any = tower(moved(tiles, tower.device).to(dtype or tower.dtype))
    features = features.cpu().contiguous()
    width = features.shape[-1]
    queries = {kind: image_queries(kind, [[features]], [[tiles]], image_query_dim(kind, width))[0] for kind in KINDS}
    return Sight(features, queries, size)


def eye_of(
    models: Mapping[str, Any], config: Any, aspect_ratio: str, device: str | torch.device, dtype: Any, attention: str
) -> str:
    """A checksum over what decides the sights of a model's tower, but for the pictures.

    Args:
        models: contents of the checkpoints that the tower's weights come from (``manifest``). config: LLaVA's.
        device, dtype: where the tower runs, and in what. attention: its implementation.
    """
    found = {
        "format": FORMAT,
        "models": dict(models),
        "tower": {name: getattr(config, name, None) for name in _TOWER_FIELDS},
        "tower_files": tower_manifest(vars(config)),
        "aspect_ratio": aspect_ratio,
        "run": [arithmetic(device), str(dtype), attention, *(["tf32"] if tf32_is_on() else [])],
        **LIBRARIES,
    }
    return hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()[:32]


class SightStore:
    """The sights of one eye in a folder.

    Args:
        root: of all eyes. eye: of ``eye_of``. megabytes: that ``root`` may take, as far as one process knows: what
            others write meanwhile is seen by the next; 0: queries alone are kept.
    """

    def __init__(self, root: str | os.PathLike[str], eye: str, megabytes: int = MEGABYTES) -> None:
        self.root, self.folder, self.limit = Path(root), Path(root) / eye, megabytes * 2**20
        self.full, self.refused = not self.limit, False
        self._used: int | None = None
        self._maps = 0
        with contextlib.suppress(OSError):  # it is not there yet, or is another user's
            os.utime(self.folder)  # used now

    def get(self, picture: str, whole: bool = True) -> Sight | None:
        """The sight of a picture, of which ``picture`` is the file's checksum; ``None`` where there is none.

        Args:
            whole: with its features; else its queries are enough.
        """
        path = self._path(picture)
        if not self.holds(picture):
            return None
        try:
            found = _read(path)
        except FileNotFoundError:  # another process gave it up
            return None
        except _DAMAGE:
            rank0_print(f"note: {path} is damaged; its picture is looked at again")
            return None
        return self._held(found) if found.whole or not whole else None

    def _held(self, found: Sight) -> Sight:
        """A sight whose tensors are mapped; or read, where maps are not worth it, or as many as may be."""
        if found.features.nbytes >= MAPPED and self._maps < MAPS:
            self._maps += 1
            return found
        return Sight(found.features.clone(), {kind: query.clone() for kind, query in found.queries.items()}, found.size)

    def holds(self, picture: str) -> bool:
        """Whether there is a file for a picture."""
        return os.path.exists(self._path(picture))  # Path.exists raises in a folder that may not be looked into

    def put(self, picture: str, sight: Sight) -> Sight:
        """Keep a picture's sight, and give it back as ``get`` would. Where there is no room, its queries are kept.

        A disk that refuses is said once; then nothing more is kept.
        """
        if self.refused:
            return sight
        kept = sight if self._has_room(sight.nbytes) else replace(sight, features=sight.features[:0])
        path = self._path(picture)
        tensors = {FEATURES: kept.features, **kept.queries}
        width, height = kept.size
        about = {ABOUT: f"{width} {height} {_digest(path, tensors, kept.size)}"}  # of several the order would vary
        try:
            with atomic_write(path, "wb", lasting=False) as stream:
                stream.write(save(tensors, about))
        except FileNotFoundError:  # another process gave up the folder meanwhile
            return sight
        except OSError as error:
            self.refused = True
            rank0_print(f"note: {path} cannot be written ({error.strerror}); pictures' features are not kept")
            return sight
        self._used = (self._used or 0) + kept.nbytes
        return (self.get(picture) if kept.whole else None) or sight

    def keep(self, file: Path, picture: str, sight: Sight) -> Sight:
        """``put``, unless ``file`` is not the one any more whose checksum ``picture`` is: it was opened after that."""
        return self.put(picture, sight) if is_still(file, picture) else sight

    def expect(self, more: int) -> None:
        """Notice before any picture is looked at that features of so many bytes find no room: none is then kept."""
        if not self.refused:
            self._has_room(more)

    def _has_room(self, more: int) -> bool:
        """Whether so many bytes more may be written; what other eyes saw goes, where that makes room for them."""
        if self._used is None:
            self._used = _size(self.root)
        if not self.full and self._used + more > self.limit:
            others = [place for place in self._eyes() if place != self.folder]
            if _size(self.folder) + more <= self.limit:
                while others and self._used + more > self.limit:
                    shutil.rmtree(others.pop(0), ignore_errors=True)
                    self._used = _size(self.root)
            self.full = self._used + more > self.limit
            if self.full:
                rank0_print(
                    f"note: the features of all pictures exceed the {self.limit // 2**20} MB that {self.root} may take "
                    "(--feature_cache_mb); those of further ones are not kept there"
                )
        return not self.full

    def _eyes(self) -> list[Path]:
        """The folders of all eyes, the least lately used first."""
        found = [place for place in next(os.walk(self.root), ("", [], []))[1] if _EYE.fullmatch(place)]
        return sorted((self.root / name for name in found), key=_last_used)

    def _path(self, picture: str) -> Path:
        return self.folder / f"{picture[:32]}.safetensors"


def _read(path: Path) -> Sight:
    """A file's sight, its tensors mapped; ``ValueError`` where they are not what was written."""
    with safe_open(path, framework="pt") as stream:
        width, height, written = (stream.metadata() or {})[ABOUT].split()
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a mapping
    size = (int(width), int(height))
    if _digest(path, tensors, size) != written:
        raise ValueError("another checksum")
    return Sight(tensors.pop(FEATURES), tensors, size)


def _digest(path: Path, tensors: Mapping[str, Tensor], size: tuple[int, int]) -> str:
    """Over a file's name too: an exchanged file is as bad as a damaged one."""
    digest = hashlib.sha256(f"{path.name}:{size}".encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _size(folder: Path) -> int:
    """Bytes of the files in a folder and those in it; some may be going away, others may not be looked at."""
    found = 0
    for place, _, names in os.walk(folder):  # which passes over folders that it cannot list
        for name in names:
            if name.endswith(".safetensors"):
                with contextlib.suppress(OSError):
                    found += os.stat(os.path.join(place, name)).st_size
    return found


def _last_used(folder: Path) -> float:
    try:
        return os.stat(folder).st_mtime
    except OSError:  # another process gave it up
        return 0.0
