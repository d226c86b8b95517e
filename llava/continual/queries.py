"""Queries of a data file: what the router sees of each row, computed once and cached.

The text query is the encoded question; the image query is the mean of the vision tower's features, which the answer
needs anyway. A row without a picture has zeros for its image query. One pass over the pictures gives their queries and
the features that training reuses: each picture is opened once and goes through the tower once.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava.checkpoints.manifest import manifest, tower_manifest
from llava.continual.query_cache import QueryCache
from llava.data.prompt import Picture, check_aspect_ratio, pixels_of
from llava.data.rows import Row
from llava.data.samples import Features, check_image_files, picture_names
from llava.devices import tf32_is_on
from llava.files import file_sha256
from llava.inside import Folder, inside
from llava.model.configs import llava_config
from llava.model.multimodal_encoder.tower import VisionTower
from llava.model.vision.features import load_vision_tower, tower_features
from llava.progress import Progress
from llava.slots.encoders import TextEncoder, encoder_content, load_text_encoder
from llava.slots.picture_query import image_queries, image_query_dim, joined_query
from llava.slots.queries import Queries

FEATURES_ON_DISK = 2**30
"""Bytes of picture features that one entry of the cache may hold; more are computed where they are needed."""

_TOWER_FIELDS = ("mm_vision_tower", "mm_vision_select_layer", "mm_vision_select_feature", "image_grid_pinpoints")
LIBRARIES = {"libraries": {name: version(name) for name in ("torch", "transformers", "tokenizers", "pillow", "numpy")}}
"""What computes: another version may give other numbers."""


def compute_queries(
    rows: list[Row],
    base: Path,
    image_folder: Folder,
    query_mode: str,
    text_encoder: str,
    batch_size: int = 16,
    device: str = "cpu",
    cache_dir: str | os.PathLike[str] | None = None,
    image_query: str = "tower",
    aspect_ratio: str | None = None,
) -> Queries:
    """Queries of ``rows`` in the space of ``base``; read from the cache when the same were computed before.

    Args:
        query_mode: ``text``, ``image`` or ``text+image``. text_encoder: see ``llava.slots.encoders``.
        cache_dir: where results are kept (see ``query_cache``); ``None`` keeps none.
        image_query: what the image query is made of, see ``llava.slots.picture_query``.
        aspect_ratio: picture mode, LLaVA's ``image_aspect_ratio``; None for the base's own.
    """
    cache = QueryCache(cache_dir)
    queries = Queries(text=None, image=None, encoder={})
    if "text" in query_mode:
        encoder = load_text_encoder(text_encoder, base)
        queries.encoder = encoder.identity
        queries.text = text_queries(rows, encoder.identity, base, lambda: encoder, cache)
    if "image" in query_mode:
        check_image_files(rows, image_folder)
        source = PictureSource.standalone(base, image_folder, aspect_ratio, device, batch_size=batch_size)
        queries.image, _ = look_at_pictures(rows, source, image_query, cache, FEATURES_ON_DISK if cache else 0)
    return queries


def text_queries(
    rows: list[Row], identity: dict[str, Any], base: Path, load: Callable[[], TextEncoder], cache: QueryCache
) -> Tensor:
    """Text queries ``[rows, text_dim]``; ``load`` gives the encoder of this identity where they must be computed."""
    content: dict[str, Any] = {}
    if cache:
        files = encoder_content(identity, base)
        content = {"encoder": identity, "files": files, "questions": [row.question for row in rows], **LIBRARIES}
    found: Tensor | None = cache.read("text", content)
    if found is None:
        encoder = load()
        shown = Progress("text queries", "question", rows)
        found = torch.stack([encoder([row.question])[0] for row in shown])
        cache.write("text", content, found)
    return found


@dataclass(frozen=True)
class PictureSource:
    """Picture files and the tower that looks at them.

    Args:
        base: checkpoint folder that names or ships the tower. config: its LLaVA config.
        load_tower: gives the tower, on ``device`` and in ``dtype``; called only where pictures must be looked at.
    """

    base: Path
    config: Any
    image_folder: Folder
    aspect_ratio: str
    load_tower: Callable[[], VisionTower]
    device: str
    dtype: torch.dtype
    batch_size: int = 16

    @classmethod
    def standalone(
        cls,
        base: Path,
        image_folder: Folder,
        aspect_ratio: str | None,
        device: str,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> PictureSource:
        """With a tower of its own, read from the base without its language model, at most once.

        Raises:
            UserError: a picture mode that is not known, or that the base cannot do.
        """
        config = llava_config(base)
        mode = aspect_ratio or getattr(config, "image_aspect_ratio", None) or "square"
        check_aspect_ratio(mode, config)
        load = functools.cache(lambda: load_vision_tower(base, device).to(dtype))
        return cls(base, config, image_folder, mode, load, device, dtype, batch_size)

    def content(self, names: list[str]) -> dict[str, Any]:
        """What decides the features of these pictures."""
        return {
            "base": manifest(self.base),
            "tower": {name: getattr(self.config, name, None) for name in _TOWER_FIELDS},
            "tower_files": tower_manifest(vars(self.config)),
            "aspect_ratio": self.aspect_ratio,
            "run": [self.device, str(self.dtype), self.batch_size, *(["tf32"] if tf32_is_on() else [])],
            **LIBRARIES,
            "pictures": [file_sha256(inside(self.image_folder, name)) for name in names],
        }

    def look(self, names: list[str]) -> Iterator[tuple[str, Tensor, Tensor, tuple[int, int]]]:
        """One pass over the files, see ``tower_features``; nothing is loaded where there are none."""
        if not names:
            return iter(())
        tower = self.load_tower()

        def preprocess(pictures: list[Image.Image]) -> Tensor | list[Tensor]:
            return pixels_of(pictures, tower.image_processor, self.config, self.aspect_ratio)

        return tower_features(names, tower, self.image_folder, preprocess, self.batch_size)


def look_at_pictures(
    rows: list[Row], source: PictureSource, kind: str | None, cache: QueryCache, feature_bytes: int
) -> tuple[Tensor | None, Features | None]:
    """Image queries and tower features of the rows' pictures, from the cache or from one pass.

    Args:
        kind: of the image queries; None for none.
        feature_bytes: memory that the features may take; 0 for none.

    Returns:
        queries ``[rows, image_dim]`` or None, and the features by file name, or None where they would take more.
    """
    names = picture_names(rows)
    content = source.content(names) if cache else {}
    queries: Any = cache.read("image", {**content, "query": kind}) if kind else None
    features = _kept_features(cache, content, names, feature_bytes) if feature_bytes else None
    missing = kind if queries is None else None
    if missing or (feature_bytes and features is None):
        fresh, features = _look_once(names, source, missing, feature_bytes)
        if missing:
            queries = fresh
            cache.write("image", {**content, "query": kind}, queries)
        if features is not None and _size(features.values()) <= FEATURES_ON_DISK:
            cache.write("features", content, list(features.values()))
    if kind is None:
        return None, features
    return _by_row(rows, dict(zip(names, queries or [], strict=True)), source, kind), features


def _look_once(
    names: list[str], source: PictureSource, kind: str | None, feature_bytes: int
) -> tuple[list[Tensor], Features | None]:
    """Image queries (where ``kind`` asks for some) and features (as far as they fit) from one pass over the files."""
    dim = image_query_dim(kind, source.config.mm_hidden_size) if kind else 0
    queries: list[Tensor] = []
    features: Features = {}
    taken = 0
    for name, feature, pixels, size in source.look(names):
        taken += feature.nbytes
        if kind:
            queries.append(image_queries(kind, [[feature]], [[pixels]], dim)[0].cpu())
        elif taken > feature_bytes:
            return queries, None
        if taken <= feature_bytes:
            features[name] = feature.cpu().clone(), size
    return queries, features if feature_bytes and taken <= feature_bytes else None


def _kept_features(cache: QueryCache, content: dict[str, Any], names: list[str], limit: int) -> Features | None:
    """Features from the cache, where they are there and within the limit."""
    kept = cache.read("features", content)
    if kept is None or _size(kept) > limit:
        return None
    return {name: (feature, tuple(size)) for name, (feature, size) in zip(names, kept, strict=True)}


def _size(pictures: Iterable[Picture]) -> int:
    return sum(feature.nbytes for feature, _ in pictures)


def _by_row(rows: list[Row], by_name: dict[str, Tensor], source: PictureSource, kind: str) -> Tensor:
    blank = torch.zeros(image_query_dim(kind, source.config.mm_hidden_size))
    return torch.stack(
        [joined_query(kind, [by_name[name] for name in row.shown]) if row.images else blank for row in rows]
    )
