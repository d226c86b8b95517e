"""Where a run reports to (``--report_to``): trackers that must be there, and what they know a stage by.

A stage of a task sequence is ``<sequence>[-<method>]/<task>``, with ``--run_name`` in place of the sequence where that
is given; one of LLaVA's own is its ``--run_name``, else its folder's name.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from pathlib import Path

from transformers import Trainer
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from llava.continual.methods import Context
from llava.files import atomic_write
from llava.outside import read_text
from llava.utils import UserError, rank0_print

PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml"}
"""Trackers whose package has another name."""
FOLDER = "runs"
"""Beside the stages: what TensorBoard reads. A stage's own work folder goes with its checkpoints."""
PLACE = "tensorboard.txt"
"""In the work folder: where the curves of its checkpoints lie, which other runs may have begun beside since."""
ALONE = ("all", "none")


def trackers_here(asked: str, published: bool) -> list[str]:
    """The trackers that ``--report_to`` names, with commas between several, before anything is loaded.

    Args:
        published: the command line is LLaVA's or the prototype's own. Those all ask for wandb, and run without it too.

    Raises:
        UserError: a name that is no tracker's, or one that is not installed; ``all`` or ``none`` beside others.
    """
    names = list(dict.fromkeys(re.split(r"[,\s]+", asked.strip(", ")))) if asked.strip(", ") else ["none"]
    if len(names) > 1 and (alone := [name for name in names if name in ALONE]):
        raise UserError(f"--report_to {asked}: {alone[0]!r} stands alone; leave it out, or the others")
    return [name for name in names if _is_here(name, published)] or ["none"]


def _is_here(name: str, published: bool) -> bool:
    """Whether a tracker can be reported to; ``False``: it is left out."""
    if name in ALONE or name in get_available_reporting_integrations():
        return True
    if name not in INTEGRATION_TO_CALLBACK:
        near = difflib.get_close_matches(name.lower(), [*INTEGRATION_TO_CALLBACK, *ALONE], n=1)
        known = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
        raise UserError(f"--report_to {name} is no tracker; {known}")
    if published and name == "wandb":
        rank0_print(f"note: --report_to {name} is left out: {name} is not installed")
        return False
    package = PACKAGES.get(name, name)
    raise UserError(f"--report_to {name}: not installed; pip install {package}, or give --report_to none")


def check_board(context: Context) -> None:
    """Look whether TensorBoard can write, where it is reported to: a run of hours would end at its first step.

    Raises:
        UserError: it cannot, or ``--run_name`` leads to a place that is not under its folder.
    """
    if "tensorboard" not in context.args.report_to or context.args.process_index != 0:
        return
    root, name = _board(context), _name(context)
    if name.startswith("/") or ".." in Path(name).parts:
        raise UserError(f"--run_name {context.args.run_name}: TensorBoard's files lie under this name; give no path")
    folder = (root / name).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except OSError as error:
        raise UserError(
            f"--report_to tensorboard cannot write to {folder} ({error.strerror}); "
            "set TENSORBOARD_LOGGING_DIR to another folder, or give --report_to none"
        ) from error


def name_run(trainer: Trainer, context: Context, checkpoint: str | None) -> None:
    """Tell the trainer's trackers what the stage is called, and TensorBoard where it writes.

    Args:
        checkpoint: that the run goes on from, and so with the curves up to its step; else they begin beside those of
            an earlier start.
    """
    name = _name(context)
    context.args.run_name = name
    boards = [one for one in trainer.callback_handler.callbacks if isinstance(one, TensorBoardCallback)]
    if not boards or context.args.process_index != 0:
        return
    noted = context.run.work / PLACE
    places = [_board(context) / name]
    while places[-1].is_dir():
        places.append(_board(context) / f"{name}-{len(places) + 1}")
    place = places[-1]
    if checkpoint and noted.is_file():
        place = Path(read_text(noted))
    elif checkpoint and len(places) > 1:
        place = places[-2]
    with atomic_write(noted) as stream:
        stream.write(str(place))
    for board in boards:
        board.logging_dir = str(place)
        if checkpoint:  # the steps after it come again
            step = int(checkpoint.rpartition("-")[2])
            board.tb_writer = board._SummaryWriter(log_dir=str(place), purge_step=step + 1)


def _name(context: Context) -> str:
    """What a stage is called."""
    series = context.sequence.learned_by(context.args.method) if context.task else context.run.folder.name
    return "/".join(filter(None, (context.args.run_name or series, context.task)))


def _board(context: Context) -> Path:
    """The folder of TensorBoard's files.

    Raises:
        UserError: it is to be no folder of a file system.
    """
    asked = os.environ.get("TENSORBOARD_LOGGING_DIR")
    if asked and "://" in asked:
        raise UserError(f"TENSORBOARD_LOGGING_DIR is {asked}; give a folder of this machine")
    return Path(asked or context.run.folder.parent / FOLDER).expanduser()
