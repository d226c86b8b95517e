"""Recipes: what a continual method, or one of LLaVA's own training stages, does differently. One file each.

The trainer's loop is the same for all (``llava.train.train``)::

    recipe.files, recipe.rows     what the stage learns from
    recipe.pool                   which slots are in memory, before the base is loaded
    recipe.begin                  attach an adapter to the frozen base, say what trains
    recipe.loss                   of every batch
    recipe.end                    after the last step, with the rows one by one
    recipe.write                  the stage's folder

``Options`` is a dataclass: its fields are the recipe's flags and its part of the run's record.

A recipe with ``needs_keys = False`` is no continual method: it trains weights of the model itself on the rows of
``--data_path``, without a task, keys or slots, and puts files of its own into the stage's folder (``more_files``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from llava.checkpoints.checkpoint import Checkpoint
from llava.continual.run import Run
from llava.continual.sequence import TaskSequence
from llava.data.rows import Row
from llava.model.language_model.retriever import Retriever
from llava.slots.pool import Pool

ParamGroup = Mapping[str, Any]
"""``params``, and settings of the optimizer for them alone, such as ``lr`` and ``weight_decay``."""


@dataclass
class NoOptions:
    """A recipe without flags of its own."""


@dataclass
class Context:
    """One stage in training, as its recipe sees it.

    Attributes:
        options: the recipe's ``Options``, filled from the command line.
        seed: of this task's run; it depends on the task's name, not on its place in the sequence.
        run: the stage that comes out of it; what the recipe keeps goes into ``run.memory`` and ``run.kept_rows``.
        previous: the stage before, ``None`` at the first task.
        keys: merged keys and initial offsets of all tasks; without slots for a recipe that needs no keys.
        base: folder of the frozen base; ``base_name`` is what the command calls it.
        pool: the slots in memory, once ``recipe.pool`` has given them; ``trained`` names the task whose slots train.
        model: the frozen base, once it is loaded.
        state: trained tensors on the CPU by parameter name, after the last step (whole, also under ZeRO-3).
        more_files: what else puts files into the stage's folder (a LoRA, the base's weights).
        model_args, args, new_tokens: for LLaVA's stages the command's groups, and how many tokens are new.
    """

    sequence: TaskSequence
    task: str
    options: Any
    seed: int
    run: Run
    previous: Run | None
    keys: Pool
    base: Checkpoint
    base_name: str
    pool: Pool = field(init=False)
    trained: str = ""
    model: Any = None
    tokenizer: Any = None
    state: dict[str, Tensor] = field(default_factory=dict)
    log_history: list[dict[str, Any]] = field(default_factory=list)
    more_files: list[Callable[[Path], None]] = field(default_factory=list)
    model_args: Any = None
    args: Any = None
    new_tokens: int = 0

    def adapter_state(self) -> dict[str, Tensor]:
        """The trained tensors of the adapter, without the model's prefix."""
        prefix = "retriever."
        return {name.removeprefix(prefix): value for name, value in self.state.items() if name.startswith(prefix)}

    def trained_pool(self) -> Pool:
        """``pool`` with the trained offsets in the place of the initial ones."""
        task = self.pool.task(self.trained)
        state = self.adapter_state()
        offsets = {
            kind: {name.rsplit(".", 1)[1]: value for name, value in state.items() if f".{kind}." in name}
            for kind in ("A", "B")
        }
        new = task.copy(trained=True, **{kind: found for kind, found in offsets.items() if found})
        return self.pool.with_tasks([new if one.name == task.name else one for one in self.pool.tasks])


class Recipe:
    """Defaults of a recipe: the current task's rows, a retriever over ``pool``, the answers' cross-entropy."""

    name: ClassVar[str] = ""
    Options: ClassVar[type] = NoOptions
    needs_keys: ClassVar[bool] = True

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
        adapter = Retriever(context.pool)
        context.model.attach_adapter(adapter)
        return adapter.train_only(context.trained)

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
        context.run.write(self.slots(context), model.config, context.tokenizer, context.log_history, context.more_files)
