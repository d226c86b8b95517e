"""One stage in training, as its recipe sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llava.checkpoints.checkpoint import Checkpoint
from llava.continual.run import Run
from llava.continual.sequence import TaskSequence
from llava.slots.pool import Pool


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
