"""Which checkpoint a killed run goes on from: the newest one that is whole, file by file.

A checkpoint's mark ``complete`` is written last and lists its files by checksum. A checkpoint without the mark is what
a killed run left behind; one whose files are not those that were written is damaged, and the one before is taken.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llava.checkpoints.large_files import weights_sha256
from llava.checkpoints.manifest import SHORT, content_of, difference
from llava.files import atomic_write
from llava.outside import read_object
from llava.train.deepspeed_config import checkpoint_world_size
from llava.utils import UserError, is_main_process, rank0_print

COMPLETE = "complete"
NEEDED = ("optimizer.pt", "scheduler.pt")
"""Without them a run would go on from other steps, and end in other weights."""


def mark_complete(checkpoint: Path) -> None:
    """Say that everything is in a checkpoint's folder."""
    files = _checksums(checkpoint)
    with atomic_write(checkpoint / COMPLETE) as stream:
        json.dump({"files": files, "checksum": content_of(files)}, stream, indent=1)


def last_complete_checkpoint(folder: Path, world_size: int) -> str | None:
    """The newest whole checkpoint in ``folder``, after removing what killed runs left half-written, and damaged ones.

    Raises:
        UserError: it was written by another number of processes under DeepSpeed.
    """
    found = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    for checkpoint in reversed(found):
        if (checkpoint / COMPLETE).exists():
            if (damage := _damage(checkpoint)) is None:
                break
            rank0_print(f"note: {checkpoint} cannot be gone on from: {damage}; it is removed, and the one before taken")
        if is_main_process():
            shutil.rmtree(checkpoint, ignore_errors=True)
    else:
        return None
    writers = checkpoint_world_size(checkpoint)
    if writers is not None and writers != world_size:
        raise UserError(
            f"{checkpoint} was written by {writers} processes, this run has {world_size}; use {writers}, or remove "
            f"{folder} to start the task anew"
        )
    return str(checkpoint)


def _damage(checkpoint: Path) -> str | None:
    """Why a marked checkpoint is not what was written, in words; of an earlier version's, what it lacks."""
    if checkpoint_world_size(checkpoint) is None:  # DeepSpeed keeps both in files of its own
        if lacking := [name for name in NEEDED if not (checkpoint / name).is_file()]:
            return f"{lacking[0]} is not there"
    if not (checkpoint / COMPLETE).stat().st_size:  # an earlier version's mark
        return None
    try:
        values = read_object(checkpoint / COMPLETE)
        kept = values["files"]
        if values["checksum"] != content_of(kept):
            return f"{COMPLETE} is damaged"
    except (ValueError, KeyError, TypeError):
        return f"{COMPLETE} is damaged"
    try:
        now = _checksums(checkpoint)
    except FileNotFoundError:  # the main process, which has found the damage, removes it at this moment
        return "files of it are gone"
    return difference(kept, {name: now[name] for name in kept if name in now})


def _checksums(checkpoint: Path) -> dict[str, str]:
    """Checksums of all files of a checkpoint, by their paths in it; several at a time."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE)
    with ThreadPoolExecutor(4) as readers:
        sums = list(readers.map(weights_sha256, files))
    return {str(file.relative_to(checkpoint)): found[:SHORT] for file, found in zip(files, sums, strict=True)}
