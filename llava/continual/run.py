"""The light checkpoint after a stage: config, slots of the tasks seen so far, tokenizer, how it was trained.

It appears under its name only when it is whole: the files are written to a folder beside it that is renamed at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from llava.checkpoints.kinds import SLOTS_FILE, TRAINING_FILE
from llava.files import atomic_folder, atomic_write
from llava.slots.pool import Pool
from llava.utils import UserError


def finished_stage(folder: Path, run: dict) -> bool:
    """Whether ``folder`` holds a finished stage of this very run.

    Raises:
        UserError: it holds one that was trained differently, naming the first difference.
    """
    if not (folder / SLOTS_FILE).is_file():
        return False
    check_same_run(folder / TRAINING_FILE, run, f"remove {folder} to train again, or restore the setting")
    return True


def check_same_run(path: Path, run: dict, mend: str) -> None:
    """Compare ``run`` with the one recorded in ``path``; a missing record passes."""
    if not path.is_file():
        return
    recorded = json.loads(path.read_text(encoding="utf-8"))
    current = json.loads(json.dumps(run))
    for name in sorted(set(recorded) | set(current)):
        if recorded.get(name) != current.get(name):
            raise UserError(
                f"{path}: was trained with {name} = {recorded.get(name)}, now it is {current.get(name)}; {mend}"
            )


def write_stage(
    folder: Path,
    slots: Pool,
    config,
    tokenizer,
    run: dict,
    log_history: list[dict],
    model=None,
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Write a stage checkpoint; with ``model`` the base's weights go in too and make it self-contained.

    ``write_more`` puts further files (a LoRA) into the folder before it appears under its name.
    """
    with atomic_folder(folder) as partial:
        config.save_pretrained(partial)
        if model is not None:
            state = {key: value for key, value in model.state_dict().items() if not key.startswith("retriever.")}
            model.save_pretrained(partial, state_dict=state)
        tokenizer.save_pretrained(partial)
        for name, value in ((TRAINING_FILE, run), ("log_history.json", log_history)):
            with atomic_write(partial / name) as stream:
                json.dump(value, stream, indent=1)
        if write_more is not None:
            write_more(partial)
        slots.write(partial / SLOTS_FILE)


def read_stage_slots(folder: Path) -> Pool:
    """Slots of a finished stage."""
    if not (folder / SLOTS_FILE).is_file():
        raise UserError(f"stage checkpoint not found: {folder} (train the stage before this one first)")
    return Pool.read(folder / SLOTS_FILE)
