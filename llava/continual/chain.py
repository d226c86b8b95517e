"""A chain of stages by the base's flag: ``--model_name_or_path <stage before>``, as in the public prototype's script.

The stage given as a base is the stage before; the base under it is the base. So the stage that comes out is, bit for
bit, the one that ``--model_name_or_path <base> --previous_stage <stage before>`` gives.
"""

from __future__ import annotations

import os
from pathlib import Path

from llava.checkpoints.checkpoint import Checkpoint
from llava.checkpoints.kinds import SLOTS_FILE
from llava.checkpoints.weights import resolve_recorded
from llava.continual.run import Run
from llava.continual.sequence import TaskSequence
from llava.utils import UserError


def stage_given_as_base(name: str | None) -> Path | None:
    """The folder, where ``name`` is that of a stage checkpoint; ``None`` for a base."""
    folder = Path(os.path.expanduser(name)) if name else None
    return folder if folder is not None and (folder / SLOTS_FILE).is_file() else None


def base_under(folder: Path, previous: str | None, sequence: TaskSequence, method: str) -> str:
    """The base model under a stage that goes on with a task of ``sequence``.

    Args:
        previous: the stage before, as the command knows it.

    Raises:
        UserError: the command names another stage before; the stage was trained with another method, or on another
            sequence; its base is not there.
    """
    if previous is None or Path(os.path.expanduser(previous)).resolve() != folder.resolve():
        raise UserError(
            f"--model_name_or_path {folder} is a stage, but --previous_stage is {previous}; give one of them, or both "
            "alike"
        )
    stage = Run.open(folder)
    _check_sequence(stage, sequence, method)
    config = Checkpoint(folder).config if (folder / "config.json").is_file() else {}
    name = str(config.get("base_model_name_or_path") or stage.pool.base.get("path") or "no base")
    try:
        return resolve_recorded(name, folder)
    except UserError as error:
        raise UserError(
            f"{folder} names {name} as its base model, which is not there; give the base as --model_name_or_path and "
            f"--previous_stage {folder}"
        ) from error


def _check_sequence(stage: Run, sequence: TaskSequence, method: str) -> None:
    trained = stage.record.get("method")
    if trained not in (None, method):
        raise UserError(f"{stage.folder} was trained with --method {trained}, not {method}; go on with its method")
    last = [stage.record["task"]] if stage.record.get("task") else []
    own = stage.pool.tasks if method == "retrieval" else []  # other methods' slots are not a task's each
    for name in [*last, *(task.name for task in own)]:
        if name not in sequence.task_names:
            raise UserError(
                f"{stage.folder} holds task {name!r}, which sequence {sequence.name!r} does not have "
                f"({', '.join(sequence.task_names)}); give --sequence, or a stage of this sequence"
            )
    for task in own:
        first, stop = sequence.slot_range(task.name)
        if (task.start, task.stop) != (first, stop):
            raise UserError(
                f"{stage.folder} holds task {task.name!r} in slots {task.start}:{task.stop}, which are {first}:{stop} "
                f"in sequence {sequence.name!r}; it was trained on another sequence"
            )
