"""Where a run reports to (``--report_to``): trackers that must be there, and what they know a stage by.

A stage of a task sequence is ``<sequence>[-<method>]/<task>``, with ``--run_name`` in place of the sequence where that
is given; one of LLaVA's own is its ``--run_name``, else its folder's name.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from transformers import Trainer
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from llava.continual.methods import Context
from llava.utils import UserError, rank0_print

PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml"}
"""Trackers whose package has another name."""
FOLDER = "runs"
"""Beside the stages: what TensorBoard reads. A stage's own work folder goes with its checkpoints."""


def trackers_here(asked: str, published: bool) -> str:
    """What ``--report_to`` comes to, before anything is loaded.

    Args:
        published: the command line is LLaVA's or the prototype's own. Those all ask for wandb, and run without it too.

    Raises:
        UserError: a name that is no tracker's, or one that is not installed.
    """
    if asked in ("all", "none") or asked in get_available_reporting_integrations():
        return asked
    if asked not in INTEGRATION_TO_CALLBACK:
        near = difflib.get_close_matches(asked, INTEGRATION_TO_CALLBACK, n=1)
        known = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
        raise UserError(f"--report_to {asked} is no tracker; {known}")
    if published and asked == "wandb":
        rank0_print(f"note: --report_to {asked} is left out: {asked} is not installed")
        return "none"
    package = PACKAGES.get(asked, asked)
    raise UserError(f"--report_to {asked}: not installed; pip install {package}, or give --report_to none")


def name_run(trainer: Trainer, context: Context, goes_on: bool) -> None:
    """Tell the trainer's trackers what the stage is called, and TensorBoard where it writes.

    Args:
        goes_on: from a checkpoint, and so with the curves that are there; else beside those of an earlier start.
    """
    folder, task, args = context.run.folder, context.task, context.args
    series = context.sequence.learned_by(args.method) if task else folder.name
    name = "/".join(filter(None, (args.run_name or series, task)))
    args.run_name = name
    root = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or folder.parent / FOLDER).expanduser()
    places = [root / name]
    while places[-1].is_dir():
        places.append(root / f"{name}-{len(places) + 1}")
    place = places[-2] if goes_on and len(places) > 1 else places[-1]
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(place)
