"""What can be known of a task sequence before a model is loaded: one look for scripts and commands alike.

``finetune_continual.sh`` looks at all tasks before it trains the first (``python -m llava.continual.tasks check``),
``cv805.sh`` at the test questions before the first model answers them; a command for one task looks at that one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava.checkpoints.checkpoint import Checkpoint
from llava.checkpoints.kinds import SLOTS_FILE
from llava.checkpoints.schemas import GENERATION_FILE, PICTURE_FILES, TOKENIZER_FILES, check_settings
from llava.continual.methods import METHODS
from llava.continual.methods.base import Recipe
from llava.continual.places import Places
from llava.continual.sequence import TaskSequence
from llava.data.rows import Row, read_rows
from llava.data.samples import check_image_files
from llava.inside import Folder
from llava.model.builder import check_slots_fit
from llava.model.configs import llava_config
from llava.slots.pool import Pool
from llava.utils import UserError, rank0_print

STATES = 5
"""How many times its task's slots a stage takes while it trains: two checkpoints with optimizer states, and itself."""
MEGABYTE = 2**20


def check_training(places: Places, base: str, keys: str | None, image_folder: Folder) -> None:
    """Everything that would stop the training of a task of the sequence, whichever it is.

    Args:
        base: checkpoint folder or hub name. keys: merged key file; None: the sequence's.

    Raises:
        UserError: an unknown method; rows, pictures, base or keys that are missing or do not fit; too little disk.
    """
    sequence = places.sequence
    recipe = METHODS.get(places.method)()
    for task in sequence.tasks:
        known = tasks_of(recipe, sequence, task.name)
        rows = [row for file in task.files for row in read_rows(file, require_answer=True, one_task=True, tasks=known)]
        check_image_files(rows, image_folder)
    checkpoint = check_base(base)
    if not recipe.needs_keys:
        return
    pool = Pool.read(keys or places.merged_keys)
    if absent := [name for name in sequence.task_names if name not in pool.names]:
        raise UserError(
            f"{keys or places.merged_keys}: no keys of task {absent[0]!r} (it has {', '.join(pool.names)}); fit them "
            "with train_prompt_key.py and merge again"
        )
    check_slots_fit(llava_config(checkpoint), pool, checkpoint)
    stages = zip(sequence.task_names, places.stages, strict=True)
    left = pool.with_tasks([pool.task(task) for task, stage in stages if not (stage / SLOTS_FILE).is_file()])
    check_space(places.root, STATES * _bytes_of(left), "the stages")


def tasks_of(recipe: Recipe, sequence: TaskSequence, task: str | None) -> list[str]:
    """The domains that training rows may have: those of the recipe's files; empty for a recipe without tasks."""
    if not task:
        return []
    files = set(recipe.files(sequence, task))
    return [entry.name for entry in sequence.tasks if entry.name == task or files & set(entry.files)]


def check_base(name: str) -> Checkpoint:
    """A base checkpoint whose settings can all be read; its weights are not opened.

    Raises:
        UserError: it is missing, or one of its files is damaged.
    """
    checkpoint = Checkpoint.open(name)
    llava_config(checkpoint)
    check_settings(checkpoint.folder, (*TOKENIZER_FILES, *PICTURE_FILES, GENERATION_FILE))
    if not checkpoint.has_weights:
        raise UserError(f"{checkpoint} holds no full weights ({checkpoint.kind}); give the base it was trained on")
    return checkpoint


def check_questions(rows: Sequence[Row], sequence: TaskSequence) -> None:
    """Refuse test questions that could not be scored for the accuracy matrix.

    Raises:
        UserError: a row without an answer, a task without rows.
    """
    for row in rows:
        if row.answer is None:
            raise UserError(
                f"{sequence.test}: question_id {row.id!r} has no reference answer (add 'gpt4_answer' to the row)"
            )
    domains = list(dict.fromkeys(domain for row in rows for domain in row.domains))
    absent = [task for task in sequence.task_names if task not in domains]
    if absent:
        raise UserError(
            f"{sequence.test}: no question is of task {absent[0]!r} (its domains are "
            f"{', '.join(domains) or 'none'}); add some, or name the task as they do"
        )


def require_stages(stages: Iterable[Path]) -> None:
    """Refuse stages that are missing; ``UserError`` names the first."""
    for stage in stages:
        if not stage.is_dir():
            raise UserError(f"stage checkpoint not found: {stage} (train it with: bash finetune_continual.sh)")


def check_stages(stages: Iterable[Path], base: Checkpoint) -> None:
    """Refuse stages whose slots do not fit the base; ``UserError`` names the first."""
    for stage in stages:
        checkpoint = Checkpoint.open(stage)
        if checkpoint.kind == "stage" and not checkpoint.has_weights:
            check_slots_fit(llava_config(base), Pool.read(stage / SLOTS_FILE), base)


def check_space(folder: Path, wanted: int, what: str) -> None:
    """Refuse work whose results would not fit on the disk, by an estimate that errs on the small side.

    Args:
        folder: where they go; it need not be there yet. wanted: bytes. what: for the message.

    Raises:
        UserError: there is less room.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        rank0_print(f"note: the free space of {there} cannot be told ({error.strerror}); going on")
        return
    if free < wanted:
        raise UserError(
            f"{folder}: {what} take about {wanted // MEGABYTE:,} MB and {free // MEGABYTE:,} MB are free; make room, "
            "or choose another place"
        )


def _bytes_of(pool: Pool) -> int:
    """Of the offsets of all tasks, whether the file has them already or not."""
    settings, slots = pool.settings, sum(task.count for task in pool.tasks)
    return 4 * slots * settings.num_layers * settings.rank * sum(sum(pair) for pair in settings.features.values())
