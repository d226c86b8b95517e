"""Join key files or slot files that were made independently, and give new tasks their initial offsets."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import torch

from llava.slots.file import SlotFile, TaskSlots, read_slot_file
from llava.slots.fit import seed_of
from llava.slots.pool import SlotBlock
from llava.slots.settings import RetrieverSettings
from llava.utils import UserError


def merge_key_files(paths: list[Path]) -> SlotFile:
    """Join key files into one, in slot order, and give every task its initial weight offsets.

    Raises:
        UserError: naming the two files, when they hold the same task, overlapping slots, or were made with different
            encoders, dimensions or base models.
    """
    return merge_slot_files([(path, read_slot_file(path)) for path in paths])


def merge_slot_files(files: list[tuple[Path, SlotFile]]) -> SlotFile:
    """The same for files that were read already; ``UserError`` as in ``merge_key_files``."""
    for (path_a, a), (path_b, b) in combinations(files, 2):
        _check_mergeable(path_a, a, path_b, b)
    tasks = sorted((task for _, file in files for task in file.tasks), key=lambda task: task.start)
    merged = SlotFile(files[0][1].settings, tasks, files[0][1].base)
    for task in tasks:
        if not task.B:
            init_task_offsets(task, merged.settings)
    return merged


def init_task_offsets(task: TaskSlots, settings: RetrieverSettings) -> None:
    """Initial offsets of a task: ``A = 0``, ``B`` random from a seed that depends on the task alone."""
    block = SlotBlock(settings, task.count)
    block.init_offsets(torch.Generator().manual_seed(seed_of(task.name, task.info.get("seed", 0), "offsets")))
    task.A = {target: tensor.detach() for target, tensor in block.A.items()}
    task.B = {target: tensor.detach() for target, tensor in block.B.items()}


def _check_mergeable(path_a: Path, a: SlotFile, path_b: Path, b: SlotFile) -> None:
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
    if a.settings.encoder != b.settings.encoder:
        raise UserError(f"{pair} used different text encoders: {a.settings.encoder} and {b.settings.encoder}")
    if a.base.get("fingerprint") != b.base.get("fingerprint"):
        raise UserError(f"{pair} were made for different base models: {a.base} and {b.base}")
    mine, theirs = a.settings.to_dict(), b.settings.to_dict()
    different = [name for name in mine if mine[name] != theirs[name]]
    if different:
        name = different[0]
        raise UserError(f"{pair} differ in {name}: {mine[name]} and {theirs[name]}; fit both with the same settings")
