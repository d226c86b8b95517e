"""Stage 1 of a task: data file in, key file out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava.checkpoints.checkpoint import Checkpoint
from llava.checkpoints.weights import resolve_checkpoint
from llava.continual.queries import compute_queries
from llava.continual.settings import KeySettings
from llava.data.prompt import Prompt
from llava.data.rows import Row, read_rows
from llava.data.samples import picture_groups
from llava.files import file_sha256
from llava.folds import held_out
from llava.inside import Folder
from llava.mm_utils import get_model_name_from_path
from llava.model.configs import llava_config
from llava.slots.fit import FittedKeys, fit_task_slots
from llava.slots.offsets import target_features
from llava.slots.pool import Pool
from llava.slots.queries import Queries
from llava.slots.settings import RetrieverSettings
from llava.utils import UserError


@dataclass(frozen=True)
class KeyOptions(KeySettings):
    """Settings of stage 1: a sequence's ``keys`` block, and how it is computed."""

    seed: int = 42
    device: str = "cpu"


def fit_task(
    task: str,
    slot_range: tuple[int, int],
    data_paths: list[str],
    base_name: str,
    image_folder: Folder,
    options: KeyOptions,
    cache_dir: str | None,
    **asked: Any,
) -> tuple[Pool, FittedKeys]:
    """Fit a task's keys and router statistics to its training questions.

    Rows of ``held_out`` of the pictures are kept from fitting; their queries go into the file, so that merging can
    measure routing on questions that no key has seen. ``asked`` are fields of the prompt that are not as the base has
    them; the file keeps the prompt.
    """
    base = resolve_checkpoint(base_name)
    prompt = Prompt.of(llava_config(base), get_model_name_from_path(str(base_name)), **asked)
    rows = [row for path in data_paths for row in read_rows(path, one_task=True, tasks=[task])]
    queries = compute_queries(
        rows,
        base,
        image_folder,
        options.query_mode,
        options.text_encoder,
        options.device,
        cache_dir,
        options.image_query,
        prompt.aspect_ratio,
    )
    settings = _settings(base, queries, options)
    kept, held = split_by_picture(rows, options.held_out, options.seed)
    pictures = picture_groups(rows)
    info = {"rows": len(rows), "data": [_digest(path) for path in data_paths]}
    fit = task, range(*slot_range), queries, kept, held, pictures, settings, options.seed, options.iterations, info
    task_slots, fitted = fit_task_slots(*fit)
    return Pool(settings, [task_slots], Checkpoint(base).identity(str(base_name)), prompt.to_dict()), fitted


def split_by_picture(rows: list[Row], share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row indices to fit on and to hold out; all rows of a picture go to the same side."""
    groups = [group if row.images else row.id for row, group in zip(rows, picture_groups(rows), strict=True)]
    held = torch.tensor(held_out(groups, share, seed), dtype=torch.bool)
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
            offset_scope=options.offset_scope,
            encoder=queries.encoder,
        )
    except (ValueError, KeyError) as error:
        raise UserError(str(error)) from error


def _digest(path: str) -> str:
    return f"{Path(path).name}:{file_sha256(path)[:16]}"
