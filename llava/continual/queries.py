"""Queries of a data file: what the router sees of each row, computed once and cached.

The text query is the encoded question; the image query is the mean of the vision tower's features, which the answer
needs anyway. A row without a picture has zeros for its image query. One pass over the pictures gives their queries and
the features that training reuses: each picture is opened once and goes through the tower once, for all stages and
evaluations that share a folder (``llava.model.vision.sights``).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.checkpoints.manifest import manifest
from llava.continual.query_cache import QueryCache
from llava.data.prompt import Picture, check_aspect_ratio, pixels_of
from llava.data.rows import Row
from llava.data.samples import Features, check_image_files, picture_names
from llava.devices import arithmetic, readers
from llava.files import file_sha256
from llava.image_io import load_image
from llava.inside import Folder, inside
from llava.model.configs import llava_config
from llava.model.multimodal_encoder.tower import VisionTower
from llava.model.vision.features import ahead, load_vision_tower
from llava.model.vision.sights import LIBRARIES, MEGABYTES, Sight, SightStore, eye_of, see
from llava.progress import Progress
from llava.slots.encoders import TextEncoder, encoder_content, load_text_encoder
from llava.slots.picture_query import image_query_dim, joined_query
from llava.slots.queries import Queries

SIGHTS = "sights"
"""Folder of what towers saw, beside the queries."""


def compute_queries(
    rows: list[Row],
    base: Path,
    image_folder: Folder,
    query_mode: str,
    text_encoder: str,
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
        queries.text = text_queries(rows, encoder.identity, base, lambda: encoder, cache, device)
    if "image" in query_mode:
        check_image_files(rows, image_folder)
        source = PictureSource.standalone(base, image_folder, aspect_ratio, device)
        queries.image, _ = look_at_pictures(rows, source, image_query, source.store(cache_dir), 0)
    return queries


def text_queries(
    rows: Sequence[Row],
    identity: dict[str, Any],
    base: Path | None,
    load: Callable[[], TextEncoder],
    cache: QueryCache,
    device: str = "cpu",
) -> Tensor:
    """Text queries ``[rows, text_dim]``; ``load`` gives the encoder of this identity where they must be computed.

    Each question is encoded by itself, on ``device``, so that its query does not depend on the others.
    """
    content: dict[str, Any] = {}
    if cache:
        files = encoder_content(identity, base)
        content = {"encoder": identity, "files": files, "questions": [row.question for row in rows], **LIBRARIES}
        content |= {} if torch.device(device).type == "cpu" else {"run": arithmetic(device)}
    found: Tensor | None = cache.read("text", content)
    if found is None:
        encoder = load().to(device)
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
        attention: the implementation that the tower has.
    """

    base: Path
    config: Any
    image_folder: Folder
    aspect_ratio: str
    load_tower: Callable[[], VisionTower]
    device: str
    dtype: torch.dtype
    attention: str = "sdpa"

    @classmethod
    def standalone(
        cls,
        base: Path,
        image_folder: Folder,
        aspect_ratio: str | None,
        device: str,
        dtype: torch.dtype = torch.float32,
    ) -> PictureSource:
        """With a tower of its own, read from the base without its language model, at most once.

        Raises:
            UserError: a picture mode that is not known, or that the base cannot do.
        """
        config = llava_config(base)
        mode = aspect_ratio or getattr(config, "image_aspect_ratio", None) or "square"
        check_aspect_ratio(mode, config)
        load = functools.cache(lambda: load_vision_tower(base, device).to(dtype))
        return cls(base, config, image_folder, mode, load, device, dtype)

    def store(self, folder: str | os.PathLike[str] | None, megabytes: int = MEGABYTES) -> SightStore | None:
        """Where this source's sights are kept in a folder of queries; ``None`` without one."""
        if not folder:
            return None
        models = {"base": manifest(self.base)}
        eye = eye_of(models, self.config, self.aspect_ratio, self.device, self.dtype, self.attention)
        return SightStore(Path(folder) / SIGHTS, eye, megabytes)

    def sights(self, names: Sequence[str], store: SightStore | None, whole: bool) -> Iterator[tuple[str, Sight]]:
        """Each picture as the tower sees it: from the store, else opened, looked at and put there.

        The processes of a distributed run begin at different pictures, so that they share the work over the store.

        Args:
            whole: with the tower's features; else queries alone may come from the store.
        """
        sums = {name: file_sha256(inside(self.image_folder, name)) for name in names} if store else {}
        missing = [name for name in names if store is None or not store.holds(sums[name])]
        if store is not None and missing:
            tower = self.load_tower()
            store.expect(len(missing) * tower.num_patches * tower.hidden_size * self.dtype.itemsize)

        def open_one(name: str) -> Sight | Picture:
            found = store.get(sums[name], whole) if store else None
            if found is not None:
                return found
            picture = load_image(inside(self.image_folder, name))
            (pixels,) = pixels_of([picture], self.load_tower().image_processor, self.config, self.aspect_ratio)
            return pixels, picture.size

        number, count = (int(os.environ.get(name) or default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        first = number * len(names) // count if store else 0
        turn = [*names[first:], *names[:first]]
        opened = zip(turn, ahead(open_one, turn, readers(self.device) if missing else 0), strict=True)
        for name, found in Progress("pictures", "picture", opened, total=len(turn)):
            if isinstance(found, Sight):
                yield name, found
                continue
            pixels, size = found
            seen = see(self.load_tower(), pixels, size, self.dtype)
            yield name, store.keep(inside(self.image_folder, name), sums[name], seen) if store else seen


def look_at_pictures(
    rows: list[Row], source: PictureSource, kind: str | None, store: SightStore | None, feature_bytes: int
) -> tuple[Tensor | None, Features | None]:
    """Image queries and tower features of the rows' pictures, from the store or from one pass.

    Args:
        kind: of the image queries; None for none.
        feature_bytes: that the features may take; 0 for none.

    Returns:
        queries ``[rows, image_dim]`` or None, and the features by file name, or None where they would take more.
    """
    names = picture_names(rows)
    queries: dict[str, Tensor] = {}
    features: Features = {}
    taken = 0
    for name, sight in source.sights(names, store, feature_bytes > 0):
        taken += sight.features.nbytes
        if kind:
            queries[name] = sight.queries[kind]
        elif taken > feature_bytes:
            return None, None
        if taken <= feature_bytes:
            features[name] = sight.features, sight.size
        else:
            features.clear()
    by_row = _by_row(rows, queries, source, kind) if kind else None
    fits = feature_bytes and taken <= feature_bytes
    return by_row, {name: features[name] for name in names} if fits else None


def _by_row(rows: list[Row], by_name: dict[str, Tensor], source: PictureSource, kind: str) -> Tensor:
    blank = torch.zeros(image_query_dim(kind, source.config.mm_hidden_size))
    return torch.stack(
        [joined_query(kind, [by_name[name] for name in row.shown]) if row.images else blank for row in rows]
    )
