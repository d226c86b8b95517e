"""Queries of a data file: what the router sees of each row, computed once and cached.

The text query is the encoded question; the image query is the mean of the vision tower's features, which the answer
needs anyway. A row without a picture has zeros for its image query.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from llava.checkpoints.weights import fingerprint
from llava.data.rows import Row
from llava.data.samples import check_image_files
from llava.files import atomic_write
from llava.model.configs import llava_config
from llava.model.vision.features import tower_features
from llava.slots.encoders import TextEncoder, load_text_encoder
from llava.slots.picture_query import image_queries, image_query_dim
from llava.slots.queries import Queries
from llava.utils import UserError, is_main_process, rank0_print

DEFAULT_CACHE = "output/cache/queries"


def compute_queries(
    rows: list[Row],
    base: Path,
    image_folder: str | os.PathLike,
    query_mode: str,
    text_encoder: str,
    batch_size: int = 16,
    device: str = "cpu",
    cache_dir: str | os.PathLike | None = DEFAULT_CACHE,
    image_query: str = "tower",
) -> Queries:
    """Queries of ``rows`` in the space of ``base``; read from the cache when the same were computed before.

    Args:
        query_mode: ``text``, ``image`` or ``text+image``. text_encoder: see ``query_encoder``.
        cache_dir: where results are kept, keyed by base, encoder and rows; ``None`` keeps none.
        image_query: what the image query is made of, see ``llava.slots.picture_query``.
    """
    encoder = load_text_encoder(text_encoder, base) if "text" in query_mode else None
    if "image" in query_mode:
        check_image_files(rows, image_folder)
    cache = None
    if cache_dir is not None:
        cache = Path(cache_dir) / f"{_cache_key(rows, base, image_folder, query_mode, encoder, image_query)}.pt"
        if cache.is_file():
            stored = torch.load(cache, map_location="cpu", weights_only=True)
            return Queries(**stored)
    queries = Queries(
        text=_text_queries(rows, encoder) if encoder else None,
        image=None,
        encoder=encoder.identity if encoder else {},
    )
    if "image" in query_mode:
        queries.image = compute_image_queries(rows, base, image_folder, image_query, batch_size, device)
    if cache is not None and is_main_process():
        with atomic_write(cache, "wb") as stream:
            torch.save({"text": queries.text, "image": queries.image, "encoder": queries.encoder}, stream)
    return queries


def _text_queries(rows: list[Row], encoder: TextEncoder) -> Tensor:
    shown = tqdm(rows, desc="text queries", unit="question", disable=not is_main_process(), leave=False)
    return torch.stack([encoder([row.question])[0] for row in shown])


def compute_image_queries(
    rows: list[Row], base: Path, image_folder: str | os.PathLike, kind: str, batch_size: int = 16, device: str = "cpu"
) -> Tensor:
    """Image queries ``[rows, image_dim]``. Each picture goes through the tower once, however many questions it has."""
    names = list(dict.fromkeys(row.image for row in rows if row.image))
    dim = image_query_dim(kind, llava_config(base).mm_hidden_size)
    by_name: dict[str | None, Tensor] = {None: torch.zeros(dim)}
    for name, features, pixels, _ in tower_features(
        names, base, image_folder, batch_size, device, purpose="image queries"
    ):
        by_name[name] = image_queries(kind, [[features]], [[pixels]], dim)[0].cpu()
    return torch.stack([by_name[row.image or None] for row in rows])


def _cache_key(
    rows: list[Row], base: Path, image_folder, query_mode: str, encoder: TextEncoder | None, image_query: str
) -> str:
    stamps = {}
    if "image" in query_mode:
        for row in rows:
            if row.image and row.image not in stamps:
                status = os.stat(Path(image_folder) / row.image)
                stamps[row.image] = [status.st_size, status.st_mtime_ns]
    content = {
        "base": fingerprint(base),
        "encoder": encoder.identity if encoder else None,
        "mode": [query_mode, image_query],
        "rows": [[row.question, row.image] for row in rows],
        "pictures": stamps,
        "folder": str(Path(image_folder).resolve()),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def default_base(given: str | None) -> str:
    """The base model to use: the flag, else ``BASE_MODEL``, else the tiny base if it has been made."""
    name = given or os.environ.get("BASE_MODEL") or None
    if name is None and Path("output/tiny-base/config.json").is_file():
        name = "output/tiny-base"
        rank0_print(f"no base model given; using the tiny base in {name}")
    if name is None:
        raise UserError(
            "no base model: give --model-base (or BASE_MODEL) a LLaVA checkpoint, or make the tiny one with "
            "python scripts/make_tiny_base.py"
        )
    return name
