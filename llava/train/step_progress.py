"""How far a training is, in place of transformers' bar and of the dictionaries that it prints."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from llava.progress import Progress


class StepProgress(TrainerCallback):
    """Shows the steps with the last logged loss, and the batches of a validation with the loss that it ends with.

    Args:
        title: of the run. lines: lines on a terminal too.
    """

    def __init__(self, title: str, lines: bool = False) -> None:
        self.title, self.lines = title, lines
        self.steps: Progress | None = None
        self.batches: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step
        self.steps = Progress(self.title, "step", total=state.max_steps, done=done, lines=self.lines, stays=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.steps is not None:
            self.steps.advance(state.global_step - self.steps.done)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self.batches is None:
            total = len(eval_dataloader) if isinstance(eval_dataloader, Sized) else None
            self.batches = Progress(f"{self.title}, validation", "batch", total=total, lines=self.lines)
        self.batches.advance()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.batches is not None:
            self.batches.close()
        self.batches = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.steps is None:
            return
        found = logs or {}
        if "loss" in found:
            self.steps.figures["loss"] = found["loss"]
        if "eval_loss" in found:
            self.steps.say(f"{self.title}: validation loss {found['eval_loss']:.4g} after step {state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.steps is not None:
            self.steps.close()
        self.steps = None


def show_steps(trainer: Trainer, title: str) -> None:
    """Let a trainer show its steps this way, and no other."""
    for theirs in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
        trainer.remove_callback(theirs)
    trainer.add_callback(StepProgress(title, lines=bool(trainer.args.disable_tqdm)))
