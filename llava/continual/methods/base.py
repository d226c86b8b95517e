"""Recipes: what a continual method, or one of LLaVA's own training stages, does differently. One file each.

The trainer's loop is the same for all (``llava.train.train``)::

    recipe.files, recipe.rows     what the stage learns from
    recipe.pool                   which slots are in memory, before the base is loaded
    recipe.begin                  attach an adapter to the frozen base, say what trains
    recipe.samples                give the samples what else the loss needs
    recipe.start                  before the first step, with the rows one by one
    recipe.loss                   of every batch
    recipe.end                    after the last step, with the rows one by one
    recipe.write                  the stage's folder

``Options`` is a dataclass: its fields are the recipe's flags and its part of the run's record.

A recipe with ``needs_keys = False`` is no continual method: it trains weights of the model itself on the rows of
``--data_path``, without a task, keys or slots, and puts files of its own into the stage's folder (``more_files``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from llava.continual.methods.context import Context
from llava.continual.sequence import TaskSequence
from llava.data.rows import Row
from llava.data.samples import TrainingSamples
from llava.model.language_model import retriever  # noqa: F401 - registers the adapter that ships
from llava.slots.adapter import ADAPTERS, RETRIEVER
from llava.slots.pool import Pool

ParamGroup = Mapping[str, Any]
"""``params``, and settings of the optimizer for them alone, such as ``lr`` and ``weight_decay``."""


@dataclass
class NoOptions:
    """A recipe without flags of its own."""


class Recipe:
    """Defaults of a recipe: the current task's rows, a retriever over ``pool``, the answers' cross-entropy."""

    name: ClassVar[str] = ""
    Options: ClassVar[type] = NoOptions
    needs_keys: ClassVar[bool] = True
    answers: ClassVar[bool] = True
    """Whether the loss is the answers' cross-entropy, with or without more; else it is the model's for a batch."""
    trains: ClassVar[bool] = True
    """Whether steps are taken; where none are, ``begin``, ``start``, ``loss`` and ``end`` aren't called."""

    def files(self, sequence: TaskSequence, task: str) -> list[str]:
        """Training files of the stage that ends with ``task``."""
        return list(sequence.task(task).files)

    def rows(self, context: Context, rows: list[Row]) -> list[Row]:
        """The rows to train on, given those of ``files``."""
        return rows

    def pool(self, context: Context) -> tuple[Pool, str]:
        """The slots in memory while training, and the task whose slots train. Called before the base is loaded.

        Raises:
            UserError: the stage before and the keys do not go together.
        """
        if not self.needs_keys:
            return context.keys, ""
        raise NotImplementedError(f"recipe {self.name!r} must say which slots train")

    def begin(self, context: Context) -> Sequence[nn.Parameter | ParamGroup]:
        """Attach an adapter to ``context.model``, whose every weight is frozen, and return what trains.

        Parameters train with the command's settings; a group of them may have its own.
        """
        adapter: Any = ADAPTERS.get(context.pool.adapter or RETRIEVER)(context.pool, {})
        context.model.attach_adapter(adapter)
        parameters: list[nn.Parameter] = adapter.train_only(context.trained)
        return parameters

    def samples(self, context: Context, dataset: TrainingSamples) -> None:
        """Give the samples what the loss needs beside the answers; for the training rows and for those held out."""

    def start(self, context: Context, batches: Iterable[dict[str, Any]]) -> None:
        """Before the first step, and again where a killed run goes on: what is measured on the rows of the frozen
        model. ``batches`` give them one by one; what trains is as ``begin`` left it."""

    def writes_whole(self, context: Context) -> bool:
        """Whether the stage's folder holds every weight of the model: then they are not kept in ``context.state``."""
        return False

    def loss(self, context: Context, batch: dict[str, Any], outputs: Any, loss: Tensor) -> Tensor:
        """The loss of a batch, given the answers' cross-entropy; the logits of ``outputs`` are the answers' alone."""
        return loss

    def end(self, context: Context, batches: Iterable[dict[str, Any]]) -> None:
        """After the last step: work out what later stages need. ``batches`` give the rows one by one."""

    def slots(self, context: Context) -> Pool:
        """The slots of the stage checkpoint."""
        return context.trained_pool() if self.needs_keys else context.pool

    def write(self, context: Context) -> None:
        """Write the stage's folder."""
        model = context.model
        slots, log, more = self.slots(context), context.log_history, context.more_files
        context.run.write(slots, model.config, context.tokenizer, log, more, context.previous)
