"""The trainer: transformers' loop, with checkpoints that hold the slots in training and not the frozen base.

A checkpoint folder carries the mark ``complete`` once everything is in it; one without the mark is what a killed run
left behind and is never resumed from.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import torch
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llava.files import atomic_write, full_disk_named
from llava.train.deepspeed_config import checkpoint_world_size
from llava.utils import UserError

COMPLETE = "complete"
SLOTS_STATE = "trained_slots.pt"


class LLaVATrainer(Trainer):
    """``Trainer`` whose checkpoints are as small as what it trains."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trainable tensors only (gathered from all processes under ZeRO-3)."""
        state = trainable_state(self.model)
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            with atomic_write(Path(output_dir) / SLOTS_STATE, "wb") as stream:
                torch.save(state, stream)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        state = torch.load(Path(resume_from_checkpoint) / SLOTS_STATE, map_location="cpu", weights_only=True)
        parameters = dict((model or self.model).named_parameters())
        with torch.no_grad():
            for name, value in state.items():
                parameters[name].copy_(value)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Also the moment at which DeepSpeed's engine exists and has not loaded a checkpoint yet."""
        wrapped = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
        if wrapped is not None:
            _leave_frozen_out(wrapped.engine)
        return super().create_scheduler(num_training_steps, optimizer)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with full_disk_named(folder):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (folder / COMPLETE).touch()


def _leave_frozen_out(engine) -> None:
    """Make DeepSpeed's checkpoints leave the frozen base out, and loading them not ask for it."""
    save, load = engine.save_checkpoint, engine.load_checkpoint

    def save_trained(*args, **kwargs):
        return save(*args, **{**kwargs, "exclude_frozen_parameters": True})

    def load_trained(*args, **kwargs):
        return load(*args, **{**kwargs, "load_module_strict": False})

    engine.save_checkpoint, engine.load_checkpoint = save_trained, load_trained


def trainable_state(model) -> dict[str, torch.Tensor]:
    """Copies of the parameters that train, on the CPU; under ZeRO-3 every process must call this."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with gathered(list(trained.values())):
        return {name: parameter.detach().float().cpu().clone() for name, parameter in trained.items()}


@contextlib.contextmanager
def gathered(parameters: list[torch.nn.Parameter]):
    """The parameters whole, wherever ZeRO-3 has put their parts."""
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            yield
    else:
        yield


def last_complete_checkpoint(folder: Path, world_size: int) -> str | None:
    """The newest whole checkpoint in ``folder``, after removing what killed runs left half-written.

    Raises:
        UserError: it was written by another number of processes under DeepSpeed.
    """
    found = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    for broken in (path for path in found if not (path / COMPLETE).exists()):
        shutil.rmtree(broken, ignore_errors=True)
    whole = [path for path in found if (path / COMPLETE).exists()]
    if not whole:
        return None
    writers = checkpoint_world_size(whole[-1])
    if writers is not None and writers != world_size:
        raise UserError(
            f"{whole[-1]} was written by {writers} processes, this run has {world_size}; use {writers}, or remove "
            f"{folder} to start the task anew"
        )
    return str(whole[-1])
