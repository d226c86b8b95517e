"""Join pools that were made independently, and give new tasks their initial offsets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from llava.checkpoints.manifest import difference
from llava.slots.encoders import same_encoder
from llava.slots.fit import seed_of
from llava.slots.pool import Pool
from llava.slots.settings import RetrieverSettings
from llava.slots.task_slots import TaskSlots
from llava.utils import UserError


def merge_files(paths: Sequence[Path]) -> Pool:
    """Join key files into one pool, in slot order, and give every task its initial weight offsets.

    Raises:
        UserError: naming the two files, when they hold the same task, overlapping slots, or were made with different
            encoders, dimensions or base models.
    """
    return merge_pools([(path, Pool.read(path)) for path in paths])


def merge_pools(pools: Sequence[tuple[Path, Pool]]) -> Pool:
    """The same for pools that were read already, each with the place it is from; they stay as they are."""
    for path, pool in pools:
        refuse_more_than_slots(path, pool, "merged")
    for (path_a, a), (path_b, b) in combinations(pools, 2):
        check_mergeable(path_a, a, path_b, b)
        _check_pictures(path_a, a, path_b, b)
    first = pools[0][1]
    tasks = [with_offsets(task, first.settings) for _, pool in pools for task in pool.tasks]
    prompt = next((pool.prompt for _, pool in pools if pool.prompt), None)
    return Pool(first.settings, tasks, first.base, prompt)


def with_offsets(task: TaskSlots, settings: RetrieverSettings) -> TaskSlots:
    """The task itself if it has offsets, else a copy with initial ones: ``A = 0``, ``B`` random from a seed that
    depends on the task alone."""
    if task.B:
        return task
    begun = task.copy()
    seed = seed_of(task.name, task.info.get("seed", 0), "offsets")
    begun.init_offsets(settings, torch.Generator().manual_seed(seed))
    return begun


def check_mergeable(path_a: Path | str, a: Pool, path_b: Path | str, b: Pool) -> None:
    """``UserError``, naming the two places, where their tasks cannot stand in one pool."""
    pair = f"{path_a} and {path_b}"
    for one in a.tasks:
        for other in b.tasks:
            if one.name == other.name:
                raise UserError(f"{pair} both hold task {one.name!r}; leave one of them out")
            if one.start < other.stop and other.start < one.stop:
                raise UserError(
                    f"{pair}: slots overlap ({one.name} {one.start}:{one.stop}, {other.name} "
                    f"{other.start}:{other.stop}); fit them with the same task sequence"
                )
    if not same_encoder(a.settings.encoder, b.settings.encoder):
        raise UserError(f"{pair} used different text encoders: {a.settings.encoder} and {b.settings.encoder}")
    if found := _other_base(a.base, b.base):
        bases = f"{a.base.get('path')} and {b.base.get('path')}"
        raise UserError(f"{pair} were made for different base models, {bases}: {found}")
    mine, theirs = ({**pool.settings.to_dict(), "encoder": None} for pool in (a, b))
    different = [name for name in mine if mine[name] != theirs[name]]
    if different:
        name = different[0]
        raise UserError(f"{pair} differ in {name}: {mine[name]} and {theirs[name]}; fit both with the same settings")


def _other_base(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    if one.get("fingerprint") != other.get("fingerprint"):
        return f"their fingerprints are {one.get('fingerprint')} and {other.get('fingerprint')}"
    files = one.get("files"), other.get("files")  # earlier versions kept none
    return difference(files[0], files[1]) if files[0] and files[1] else None


def _check_pictures(path_a: Path, a: Pool, path_b: Path, b: Pool) -> None:
    """Keys of pictures that were cut differently have no common query space."""
    mine, theirs = a.prompt.get("aspect_ratio"), b.prompt.get("aspect_ratio")
    if mine and theirs and mine != theirs:
        raise UserError(
            f"{path_a} and {path_b} were fitted to pictures of different modes, {mine} and {theirs}; fit both with the "
            "same --image_aspect_ratio"
        )


def refuse_more_than_slots(path: Path | str, pool: Pool, what: str) -> None:
    """``UserError`` for slots of a method that keeps more beside them, so that they are only a part."""
    if pool.adapter:
        raise UserError(
            f"{path}: its slots belong to method {pool.adapter!r}, which keeps tensors beside them, so they cannot be "
            f"{what} by themselves; train the tasks with that method instead"
        )
