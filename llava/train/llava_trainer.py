"""The trainer: transformers' loop, with checkpoints that hold the slots in training and not the frozen base.

A checkpoint folder carries the mark ``complete`` once everything is in it; one without the mark is what a killed run
left behind and is never resumed from.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llava.continual.methods import Context, Recipe
from llava.files import atomic_write, system_errors_named
from llava.train.deepspeed_config import checkpoint_world_size
from llava.train.sampling import (
    LengthGroupedSampler,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
    split_to_even_chunks,
)
from llava.train.states import (
    get_mm_adapter_state_maybe_zero_3,
    maybe_zero_3,
    safe_save_model_for_hf_trainer,
    trainable_state,
)
from llava.utils import UserError, is_main_process

# Beside this module's own names those that LLaVA has here, which other trainers import.
__all__ = [
    "LLaVATrainer",
    "LengthGroupedSampler",
    "get_length_grouped_indices",
    "get_mm_adapter_state_maybe_zero_3",
    "get_modality_length_grouped_indices",
    "last_complete_checkpoint",
    "maybe_zero_3",
    "split_groups",
    "split_to_even_chunks",
]

COMPLETE = "complete"
SLOTS_STATE = "trained_slots.pt"


class LLaVATrainer(Trainer):
    """``Trainer`` that asks a recipe for its loss, and whose checkpoints are as small as what it trains.

    Without a recipe it is what other programs take from LLaVA: transformers' trainer with LLaVA's sampler, a learning
    rate of the projector's own (``args.mm_projector_lr``) and, with ``args.tune_mm_mlp_adapter``, checkpoints that
    hold the projector alone.

    Args:
        recipe, context: the continual method, and the stage as it sees it.
        tokenizer: LLaVA's word for ``processing_class``.

    Attributes:
        groups: parameters with optimizer settings of their own (``ParamGroup``); the others have the command's.
    """

    def __init__(self, *args, recipe: Recipe | None = None, context: Context | None = None, tokenizer=None, **kwargs):
        if tokenizer is not None:
            kwargs.setdefault("processing_class", tokenizer)
        super().__init__(*args, **kwargs)
        self.recipe, self.context = recipe, context
        self.groups: list[Mapping[str, Any]] = []
        rate = getattr(self.args, "mm_projector_lr", None)
        if recipe is None and rate is not None:
            named = self.model.named_parameters()
            mine = [value for name, value in named if "mm_projector" in name and value.requires_grad]
            self.groups = [{"params": mine, "lr": rate}]

    def _get_train_sampler(self, train_dataset=None):
        """LLaVA's grouped order where ``--group_by_modality_length`` asks for it."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not getattr(self.args, "group_by_modality_length", False) or dataset is None:
            return super()._get_train_sampler(train_dataset)
        steps = self.args.world_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(
            self.args.train_batch_size,
            steps,
            dataset.modality_lengths,
            group_by_modality=True,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The recipe's loss in training, the answers' cross-entropy in evaluation."""
        if self.recipe is not None:
            inputs = {**inputs, "answers_only": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and self.recipe is not None:
            loss = self.recipe.loss(self.context, inputs, outputs, loss)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model=None):
        """The optimizer, with the groups that have settings of their own behind the others."""
        made = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not made and self.groups:
            split_groups(optimizer, self.groups)
        return optimizer

    def single_rows(self) -> Iterator[dict[str, Any]]:
        """The training rows one by one, as batches on the model's device; nothing is done or shown before the first."""
        loader = DataLoader(self.train_dataset, batch_size=1, collate_fn=self.data_collator)
        shown = tqdm(loader, desc=f"end of {self.context.task}", unit="row", disable=not is_main_process(), leave=False)
        for batch in shown:
            yield self._prepare_inputs(batch)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trainable tensors only (gathered from all processes under ZeRO-3)."""
        if self.recipe is None and getattr(self.args, "tune_mm_mlp_adapter", False):
            safe_save_model_for_hf_trainer(self, output_dir or self.args.output_dir)
            return
        if self.recipe is None:
            super().save_model(output_dir, _internal_call)
            return
        if self.args.deepspeed and self.recipe.writes_whole(self.context):
            return  # DeepSpeed's own checkpoint holds every trained weight already
        state = trainable_state(self.model)
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            with atomic_write(Path(output_dir) / SLOTS_STATE, "wb") as stream:
                torch.save(state, stream)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.recipe is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        state = torch.load(Path(resume_from_checkpoint) / SLOTS_STATE, map_location="cpu", weights_only=True)
        parameters = dict((model or self.model).named_parameters())
        with torch.no_grad():
            for name, value in state.items():
                parameters[name].copy_(value)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Also the moment at which DeepSpeed's engine exists and has not loaded a checkpoint yet."""
        wrapped = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
        if wrapped is not None and self.recipe is not None:
            _leave_frozen_out(wrapped.engine)
        return super().create_scheduler(num_training_steps, optimizer)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with system_errors_named(folder):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (folder / COMPLETE).touch()


def split_groups(optimizer, groups: list[Mapping[str, Any]]) -> None:
    """Take each of ``groups`` out of the optimizer's own groups, whose other settings it keeps.

    Raises:
        UserError: DeepSpeed's file names the optimizer, which knows nothing of groups here.
    """
    if not hasattr(optimizer, "add_param_group"):
        raise UserError("this method trains with several learning rates; leave the optimizer out of DeepSpeed's json")
    for group in groups:
        wanted = {id(parameter) for parameter in group["params"]}
        for own in list(optimizer.param_groups):
            mine = [parameter for parameter in own["params"] if id(parameter) in wanted]
            if mine:
                own["params"] = [parameter for parameter in own["params"] if id(parameter) not in wanted]
                optimizer.param_groups.append({**own, **group, "params": mine})
    optimizer.param_groups = [own for own in optimizer.param_groups if own["params"]]


def _leave_frozen_out(engine) -> None:
    """Make DeepSpeed's checkpoints leave the frozen base out, and loading them not ask for it."""
    save, load = engine.save_checkpoint, engine.load_checkpoint

    def save_trained(*args, **kwargs):
        return save(*args, **{**kwargs, "exclude_frozen_parameters": True})

    def load_trained(*args, **kwargs):
        return load(*args, **{**kwargs, "load_module_strict": False})

    engine.save_checkpoint, engine.load_checkpoint = save_trained, load_trained


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
