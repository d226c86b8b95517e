"""Life of slots after training: merge, remove and rename tasks, and check what a file holds.

A place is a slot file (``*.pth``) or a stage checkpoint (a folder with ``slots.pth``). Tasks keep their slot ranges, so
that taking one out leaves every other number as it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.checkpoints.checkpoint import Checkpoint
from llava.checkpoints.kinds import SLOTS_FILE, TRAINING_FILE
from llava.checkpoints.manifest import CHECKSUMS_FILE, check_seal, seal
from llava.files import atomic_folder, atomic_write, link_or_copy
from llava.slots.card import TRAINING, write_slots_card
from llava.slots.merge import merge_pools, refuse_more_than_slots
from llava.slots.names import check_task_name
from llava.slots.parts import FOLDER as PARTS_FOLDER
from llava.slots.pool import Pool
from llava.slots.task_slots import TaskSlots
from llava.utils import UserError

NOT_COPIED = (SLOTS_FILE, TRAINING_FILE, CHECKSUMS_FILE, "log_history.json")


def slots_path(place: str | Path) -> Path:
    """The slot file of a place."""
    path = Path(place)
    if path.is_dir():
        path = path / SLOTS_FILE
        if not path.is_file():
            raise UserError(f"{place}: no {SLOTS_FILE} in this folder, so it is no stage checkpoint of this project")
    return path


def read_place(place: str | Path) -> Pool:
    """The pool at a place; ``UserError`` where a file of its folder is not the one that was written."""
    if Path(place).is_dir():
        check_seal(Path(place))
    return Pool.read(slots_path(place))


def write_place(pool: Pool, output: str | Path, like: Sequence[str | Path], done: str) -> Path:
    """Write a pool to ``output``: a ``.pth`` file, or a stage folder with the config and tokenizer of the first stage
    folder among ``like``. ``done`` is recorded as the folder's origin. Returns the slot file's path."""
    target = Path(output)
    if target.suffix == ".pth":
        pool.write(target)
        return target
    if (target / SLOTS_FILE).is_file():
        _write_in_place(pool, target, like)
        return target / SLOTS_FILE
    folders = [Path(place) for place in like if Path(place).is_dir()]
    if not folders:
        raise UserError(f"--output {target}: give a .pth file, because none of the inputs is a stage checkpoint folder")
    if "llava" not in target.name.lower():
        raise UserError(f"--output {target}: the folder's name must contain 'llava' (or give a .pth file)")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--output {target}: is there already and is no stage checkpoint; give a new folder")
    with atomic_folder(target) as partial:
        for file in sorted(folders[0].iterdir()):
            if file.is_file() and file.name not in NOT_COPIED:
                shutil.copyfile(file, partial / file.name)
        with atomic_write(partial / TRAINING_FILE) as stream:
            json.dump({"made_by": done, "tasks": pool.names}, stream, indent=1)
        write_slots_card(partial, pool, target.name, drop=[TRAINING])
        pool.write_stage(partial / SLOTS_FILE, [folder / SLOTS_FILE for folder in folders])
        seal(partial)
    return target / SLOTS_FILE


def _write_in_place(pool: Pool, stage: Path, like: Sequence[str | Path]) -> None:
    """Replace a stage folder by one of other slots, whose other files are the same."""
    with atomic_folder(stage) as partial:
        for file in sorted(stage.iterdir()):
            if file.name not in (SLOTS_FILE, PARTS_FOLDER) and not file.name.startswith("."):
                link_or_copy(file, partial / file.name)
        pool.write_stage(partial / SLOTS_FILE, [Path(place) / SLOTS_FILE for place in (stage, *like)])
        write_slots_card(partial, pool, stage.name)


def merge(places: Sequence[str | Path], pack: bool = False) -> Pool:
    """Join the tasks of several places; the result does not depend on the order of ``places``.

    A task that stands in two places with the very same numbers (an earlier task that later stages carry along) is taken
    once. With ``pack`` the tasks get new slot ranges one after another in the given order, for machines that numbered
    their slots independently.

    Raises:
        UserError: naming the two places: the same task with other numbers, overlapping slot ranges, different
            encoders, dimensions, settings or base models.
    """
    pools: list[tuple[Path, Pool]] = []
    seen: dict[str, tuple[str, Path]] = {}
    next_start = 0
    for path in map(Path, places):
        pool, kept = read_place(path), []
        for task in pool.tasks:
            checksum = task.checksum()
            if seen.get(task.name, ("", path))[0] == checksum:
                continue
            if task.name in seen:
                raise UserError(
                    f"{seen[task.name][1]} and {path} both hold task {task.name!r}, with different numbers; leave one "
                    "out (remove) or give it another name (rename)"
                )
            seen[task.name] = (checksum, path)
            if pack:
                task = task.copy(start=next_start, stop=next_start + task.count)
                next_start = task.stop
            kept.append(task)
        if kept:
            pools.append((path, pool.with_tasks(kept)))
    pools.sort(key=lambda entry: min(task.start for task in entry[1].tasks))
    return merge_pools(pools)


def remove(pool: Pool, names: Sequence[str]) -> Pool:
    """The pool without the named tasks: bit for bit that of a model that never saw them.

    Raises:
        UserError: an unknown task, no task would be left, or the slots are only a part of what was learned.
    """
    refuse_more_than_slots("the stage", pool, "taken apart")
    for name in names:
        pool.task(name)
    left = [task for task in pool.tasks if task.name not in names]
    if not left:
        raise UserError(f"removing {', '.join(names)} would leave no slots; delete the file instead")
    return pool.with_tasks(left)


def rename(pool: Pool, old: str, new: str) -> Pool:
    """The pool with task ``old`` called ``new``; its numbers stay as they are."""
    pool.task(old)
    check_task_name(new)
    if new in pool.names:
        raise UserError(f"there is a task {new!r} already; choose another name")
    return pool.with_tasks([task.copy(name=new) if task.name == old else task for task in pool.tasks])


@dataclass
class Finding:
    """One line of ``verify``: what was looked at, whether it is sound, and what was found."""

    what: str
    sound: bool | None  # None: could not be checked
    found: str


def verify(pool: Pool, base: Path | None) -> list[Finding]:
    """Check every task's checksum, finiteness, slot range and shapes, and the base model's fingerprint."""
    findings = [_check_task(task) for task in pool.tasks]
    findings.append(_check_ranges(pool.tasks))
    try:
        pool.check_shapes()
        findings.append(Finding("shapes", True, f"fit the settings ({pool.settings.num_layers} layers)"))
    except UserError as error:
        findings.append(Finding("shapes", False, str(error)))
    recorded = pool.base.get("fingerprint")
    if not recorded or base is None:
        findings.append(Finding("base", None, f"not checked ({pool.base.get('path') or 'no base'} recorded)"))
    else:
        other = Checkpoint(base).other_than(pool.base)
        words = f"is {recorded}" if other is None else f"is not the one that the slots belong to: {other}"
        findings.append(Finding("base", other is None, f"{base} {words}"))
    return findings


def _check_task(task: TaskSlots) -> Finding:
    what, checksum = f"task {task.name}", task.checksum()
    if bad := task.not_finite():
        return Finding(what, False, f"{', '.join(bad)} hold NaN or infinite numbers")
    if task.recorded_checksum is None:
        return Finding(what, None, f"{checksum}, none recorded to compare with")
    if task.recorded_checksum != checksum:
        return Finding(what, False, f"checksum {checksum}, but {task.recorded_checksum} is recorded")
    return Finding(what, True, f"checksum {checksum}")


def _check_ranges(tasks: list[TaskSlots]) -> Finding:
    for one, other in zip(tasks, tasks[1:], strict=False):
        if other.start < one.stop:
            return Finding("slot ranges", False, f"{one.name} and {other.name} overlap")
    return Finding("slot ranges", True, f"{sum(task.count for task in tasks)} slots, none shared")
