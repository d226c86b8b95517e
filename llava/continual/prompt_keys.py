"""Stage 1 of a task: data file in, key file out. And the merging of independently made key files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava.checkpoints.weights import fingerprint, resolve_checkpoint
from llava.continual.queries import compute_queries
from llava.continual.settings import KeySettings
from llava.data.prompt import Prompt
from llava.data.rows import Row, read_rows
from llava.folds import held_out
from llava.mm_utils import get_model_name_from_path
from llava.model.configs import llava_config
from llava.slots.file import SlotFile, TaskSlots
from llava.slots.fit import FittedKeys, fit_keys, seed_of
from llava.slots.offsets import target_features
from llava.slots.pool import RetrieverSettings
from llava.slots.queries import Queries
from llava.slots.routers import Pool, Query, TaskStatistics, build_router
from llava.slots.unknown import TaskExtent
from llava.utils import UserError


@dataclass(frozen=True)
class KeyOptions(KeySettings):
    """Settings of stage 1: a sequence's ``keys`` block, and how it is computed."""

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
    **asked: Any,
) -> tuple[SlotFile, FittedKeys]:
    """Fit a task's keys and router statistics to its training questions.

    Rows of ``held_out`` of the pictures are kept from fitting; their queries go into the file, so that merging can
    measure routing on questions that no key has seen. ``asked`` are fields of the prompt that are not as the base has
    them; the file keeps the prompt.
    """
    base = resolve_checkpoint(base_name)
    prompt = Prompt.of(llava_config(base), get_model_name_from_path(str(base_name)), **asked)
    rows = [row for path in data_paths for row in read_rows(path)]
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
        prompt.aspect_ratio,
    )
    settings = _settings(base, queries, options)
    kept, held = split_by_picture(rows, options.held_out, options.seed)
    slots = slot_range[1] - slot_range[0]
    if len(kept) < slots:
        raise UserError(f"task {task!r} has {len(kept)} rows to fit {slots} keys to; give more rows or fewer slots")
    if settings.top_k > slots:
        raise UserError(f"top_k is {settings.top_k}, but task {task!r} has {slots} slots; lower --top_k")
    mine, others = queries.select(kept), queries.select(held)
    weight = {"text": 0.0, "image": 1.0}.get(options.query_mode, options.image_weight)
    seed = seed_of(task, options.seed, "keys")
    fitted = fit_keys(mine, slots, options.groups, options.top_k, weight, seed, options.iterations)
    held_out = {name: part for name, part in (("text", others.text), ("image", others.image)) if part is not None}
    task_slots = TaskSlots(
        name=task,
        start=slot_range[0],
        stop=slot_range[1],
        text_keys=fitted.text,
        image_keys=fitted.image,
        statistics=TaskStatistics.of(Query(mine.text, mine.image).joint()),
        feature_statistics=_feature_statistics(mine) if options.router == "ridge" else None,
        extent=TaskExtent.of(
            Query(queries.text, queries.image).evidence(), [row.image or f"row {row.id}" for row in rows]
        ),
        held_out=held_out if len(held) else None,
        info={
            "rows": len(rows),
            "data": [_digest(path) for path in data_paths],
            "seed": options.seed,
            "mixture": mean_weights(fitted, mine, settings),
        },
    )
    made_for = {"path": str(base_name), "fingerprint": fingerprint(base)}
    return SlotFile(settings, [task_slots], made_for, prompt.to_dict()), fitted


def mean_weights(fitted: FittedKeys, queries: Queries, settings: RetrieverSettings) -> list[float]:
    """The weight each slot of a task gets on average over the task's own questions; they sum to 1."""
    pool = Pool(
        [""] * len(fitted.selected), fitted.text, fitted.image, image_weight=settings.image_weight, tau=settings.tau
    )
    scores = build_router("keys", pool).scores(Query(queries.text, queries.image))
    best, chosen = scores.topk(settings.top_k, dim=-1)
    return torch.zeros_like(scores).scatter(1, chosen, best.softmax(-1)).mean(0).tolist()


def split_by_picture(rows: list[Row], share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row indices to fit on and to hold out; all rows of a picture go to the same side."""
    held = torch.tensor(held_out([row.image or row.id for row in rows], share, seed), dtype=torch.bool)
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def _feature_statistics(queries: Queries) -> TaskStatistics:
    return TaskStatistics.of(Query(queries.text, queries.image).random_features())


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


def routing_accuracy(slots: SlotFile, router: str | None = None) -> dict[str, tuple[int, int]]:
    """Per task: held-out questions routed to it, and their number. Tasks without held-out queries are left out."""
    tasks = sorted(slots.tasks, key=lambda task: task.start)
    settings = slots.settings
    pool = Pool(
        slot_tasks=[task.name for task in tasks for _ in range(task.count)],
        text_keys=torch.cat([task.text_keys for task in tasks], 1) if settings.uses_text else None,
        image_keys=torch.cat([task.image_keys for task in tasks], 1) if settings.uses_images else None,
        statistics={task.name: task.statistics for task in tasks if task.statistics is not None},
        feature_statistics={t.name: t.feature_statistics for t in tasks if t.feature_statistics is not None},
        image_weight=settings.image_weight,
        tau=settings.tau,
    )
    chooser = build_router(router or settings.router, pool)
    result = {}
    for task in tasks:
        if not task.held_out:
            continue
        query = Query(task.held_out.get("text"), task.held_out.get("image"))
        best = chooser.scores(query).argmax(-1).tolist()
        result[task.name] = (sum(pool.slot_tasks[slot] == task.name for slot in best), len(best))
    return result
