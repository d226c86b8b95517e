"""Stage 1 of a task: data file in, key file out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from llava.checkpoints.weights import fingerprint, resolve_checkpoint
from llava.continual.queries import compute_queries
from llava.data.rows import Row, read_rows
from llava.model.configs import llava_config
from llava.slots.fit import FittedKeys, fit_task_slots
from llava.slots.offsets import target_features
from llava.slots.pool import Pool
from llava.slots.queries import Queries
from llava.slots.settings import RetrieverSettings
from llava.utils import UserError


@dataclass(frozen=True)
class KeyOptions:
    """Settings of stage 1; what shapes the slots must be the same for all tasks that are to be merged."""

    query_mode: str = "text+image"
    text_encoder: str = "auto"
    image_query: str = "tower+picture"
    groups: int = 4
    top_k: int = 4
    rank: int = 8
    tau: float = 0.1
    scale: float = 1.0
    image_weight: float = 0.5
    router: str = "gaussian"
    unknown_share: float = 0.005
    targets: tuple[str, ...] = ("o_proj",)
    held_out: float = 0.1
    iterations: int = 50
    seed: int = 42
    batch_size: int = 16
    device: str = "cpu"


def fit_task(
    task: str,
    slot_range: tuple[int, int],
    data_paths: list[str],
    base_name: str,
    image_folder: str,
    options: KeyOptions,
    cache_dir: str | None,
) -> tuple[Pool, FittedKeys]:
    """Fit a task's keys and router statistics to its training questions.

    Rows of ``held_out`` of the pictures are kept from fitting; their queries go into the file, so that merging can
    measure routing on questions that no key has seen.
    """
    rows = [row for path in data_paths for row in read_rows(path)]
    base = resolve_checkpoint(base_name)
    queries = compute_queries(
        rows,
        base,
        image_folder,
        options.query_mode,
        options.text_encoder,
        options.batch_size,
        options.device,
        cache_dir,
        options.image_query,
    )
    settings = _settings(base, queries, options)
    kept, held = split_by_picture(rows, options.held_out, options.seed)
    pictures = [row.image or f"row {row.id}" for row in rows]
    info = {"rows": len(rows), "data": [_digest(path) for path in data_paths]}
    fit = task, range(*slot_range), queries, kept, held, pictures, settings, options.seed, options.iterations, info
    task_slots, fitted = fit_task_slots(*fit)
    return Pool(settings, [task_slots], {"path": str(base_name), "fingerprint": fingerprint(base)}), fitted


def split_by_picture(rows: list[Row], share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row indices to fit on and to hold out; all rows of a picture go to the same side."""

    def draw(row: Row) -> str:
        return hashlib.sha256(f"{seed}:{row.image or row.id}".encode()).hexdigest()

    pictures = sorted({draw(row) for row in rows})
    out = set(pictures[: int(round(share * len(pictures)))])
    held = torch.tensor([draw(row) in out for row in rows], dtype=torch.bool)
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def _settings(base: Path, queries: Queries, options: KeyOptions) -> RetrieverSettings:
    config = llava_config(base)
    dims = {name: None if part is None else part.shape[1] for name, part in vars(queries).items() if name != "encoder"}
    try:
        return RetrieverSettings(
            num_layers=config.num_hidden_layers,
            features={target: target_features(config, target) for target in options.targets},
            text_dim=dims["text"],
            image_dim=dims["image"],
            query_mode=options.query_mode,
            image_query=options.image_query,
            groups=options.groups,
            rank=options.rank,
            top_k=options.top_k,
            tau=options.tau,
            scale=options.scale,
            image_weight=options.image_weight,
            router=options.router,
            unknown_share=options.unknown_share,
            encoder=queries.encoder,
        )
    except (ValueError, KeyError) as error:
        raise UserError(str(error)) from error


def _digest(path: str) -> str:
    return f"{Path(path).name}:{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"
