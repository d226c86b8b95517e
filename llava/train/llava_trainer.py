"""The trainer: transformers' loop, with checkpoints that hold the slots in training and not the frozen base.

A checkpoint folder carries the mark ``complete`` once everything is in it (see ``checkpoint_mark``), and the losses so
far: what a resumed run reports is the whole run's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from llava.continual.methods import Context, Recipe
from llava.files import atomic_write, system_errors_named
from llava.heap import keep_freed_memory, own_bytes, return_freed_memory
from llava.outside import read_object
from llava.progress import Progress
from llava.train.checkpoint_mark import last_complete_checkpoint, mark_complete
from llava.train.sampling import (
    LengthGroupedSampler,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
    split_to_even_chunks,
)
from llava.train.states import (
    begin_exactly,
    get_mm_adapter_state_maybe_zero_3,
    maybe_zero_3,
    safe_save_model_for_hf_trainer,
    trainable_state,
)
from llava.utils import UserError

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

SLOTS_STATE = "trained_slots.pt"
LOSSES = "losses.json"
KEPT = 10 << 28
"""Bytes by which a training on a CPU may outgrow what it needs between two steps, before it gives back what is free."""


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
        exact: what trains, as it was before DeepSpeed rounded it; may be left empty.
    """

    def __init__(self, *args, recipe: Recipe | None = None, context: Context | None = None, tokenizer=None, **kwargs):
        if tokenizer is not None:
            kwargs.setdefault("processing_class", tokenizer)
        super().__init__(*args, **kwargs)
        if self.args.device.type == "cpu":
            self.add_callback(_FreedMemory())
        self.recipe, self.context = recipe, context
        self.groups: list[Mapping[str, Any]] = []
        self.exact: dict[str, torch.Tensor] = {}
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
            whole = self.recipe.loss(self.context, inputs, outputs, loss)
            parts = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            # A cross-entropy of answers is a step's share already; everything else of the loss counts once a step.
            share = loss if self.recipe.answers else 0.0
            loss = whole if parts == 1 else share + (whole - share) / parts
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
        for batch in Progress(f"rows of {self.context.task}", "row", loader):
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
            begin_exactly(self.model, self.exact)
        return super().create_scheduler(num_training_steps, optimizer)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with system_errors_named(folder):
            super()._save_checkpoint(model, trial)
        losses = self._losses()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with atomic_write(folder / LOSSES) as stream:
                json.dump(losses, stream)
            mark_complete(folder)

    def _losses(self) -> dict[str, Any]:
        """The losses so far: logged ones as the log has them, the others by process; every process must call this."""
        unlogged = self.accelerator.gather(self._tr_loss.reshape(1)).tolist()
        return {"unlogged": unlogged, "logged": self._total_loss_scalar, "last": self._globalstep_last_logged}

    def _finish_without_steps(self) -> TrainOutput:
        """What transformers does after the last step, in a run that was killed there."""
        self._total_loss_scalar += self._tr_loss.item()
        metrics = {"train_runtime": 0.0, "train_samples_per_second": 0.0, "train_steps_per_second": 0.0}
        metrics |= {"total_flos": self.state.total_flos, "train_loss": 0.0}
        self.log(metrics)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        return TrainOutput(self.state.global_step, 0.0, metrics)

    def train(self, resume_from_checkpoint=None, *args, **kwargs) -> TrainOutput:
        """As transformers', with the training loss of the whole run, also of one that goes on from a checkpoint."""
        if isinstance(resume_from_checkpoint, str):
            self.add_callback(_TakeUp(self, Path(resume_from_checkpoint) / LOSSES))
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        except _AllStepsTaken:
            output = self._finish_without_steps()
        loss = self._total_loss_scalar / max(self.state.global_step, 1)
        for logged in self.state.log_history[-1:]:
            if "train_loss" in logged:
                logged["train_loss"] = loss
        return output._replace(training_loss=loss, metrics={**output.metrics, "train_loss": loss})


class _FreedMemory(TrainerCallback):
    """Keeps on a CPU the memory that a step's tensors leave free for the next steps, and the heap from growing."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.needed = 0
        keep_freed_memory()

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save or own_bytes() > self.needed + KEPT:  # a checkpoint takes memory of its own
            return_freed_memory()
            self.needed = own_bytes()


class _AllStepsTaken(Exception):
    """A run goes on from the checkpoint of its last step. Transformers would take a further one."""


class _TakeUp(TrainerCallback):
    """Gives a trainer the losses of the steps before the checkpoint that it goes on from.

    Args:
        file: the checkpoint's; those of earlier versions have none.
    """

    def __init__(self, trainer: LLaVATrainer, file: Path) -> None:
        self.trainer, self.file = trainer, file

    def on_train_begin(self, args, state, control, **kwargs):
        if self.file.is_file():
            losses = read_object(self.file)
            self.trainer._tr_loss += self._own(losses["unlogged"])
            self.trainer._total_loss_scalar = losses["logged"]
            self.trainer._globalstep_last_logged = losses["last"]
        if state.global_step >= state.max_steps > 0:
            raise _AllStepsTaken

    def _own(self, unlogged: list[float] | float) -> float:
        """This process's share; the average, where others were there or an earlier version kept no more."""
        if isinstance(unlogged, float):
            return unlogged
        args = self.trainer.args
        return unlogged[args.process_index] if len(unlogged) == args.world_size else sum(unlogged) / len(unlogged)


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
