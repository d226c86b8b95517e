"""Experience replay: one adapter, trained on each task's rows and on a few rows of every task before.

Chaudhry et al., On Tiny Episodic Memories in Continual Learning (arXiv 1902.10486)::

    loss = cross-entropy over [this task's rows, k rows of each task before]

It keeps data of past tasks, which a hospital may not: ``--replay_keep questions`` keeps the questions and answers
alone, without their pictures.

Paper: Chaudhry et al. (arXiv 1902.10486)
Keeps of past data: a few rows of each task, or their questions and answers alone
Grows with the tasks: those rows
Task at test time: not needed
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.continual.methods import METHODS, Context
from llava.continual.methods.sequential import Sequential
from llava.data.rows import SYSTEM, Row, parse_row
from llava.utils import UserError

KEPT = ("rows", "questions")


@dataclass
class ReplayOptions:
    """What is kept of a task."""

    replay_rows: int = field(default=16, metadata={"help": "rows kept of each task"})
    replay_keep: str = field(
        default="rows", metadata={"help": "rows, or questions: without their pictures", "choices": KEPT}
    )


@METHODS.register
class Replay(Sequential):
    name = "replay"
    Options = ReplayOptions

    def rows(self, context: Context, rows: list[Row]) -> list[Row]:
        """This task's rows and the kept ones; what is kept of this task goes on to later stages."""
        if context.options.replay_rows < 0:
            raise UserError(f"--replay_rows is {context.options.replay_rows}; give 0 or more")
        kept = [] if context.previous is None else context.previous.kept_rows
        chosen = random.Random(context.seed).sample(range(len(rows)), min(context.options.replay_rows, len(rows)))
        fresh = [rows[number] for number in sorted(chosen)]
        if context.options.replay_keep == "questions":
            fresh = [without_picture(row) for row in fresh]
        context.run.kept_rows = [*kept, *fresh]
        return [*rows, *kept]


def without_picture(row: Row) -> Row:
    """The row's conversation alone, as an instruct row."""
    turns: list[dict[str, Any]] = [] if row.system is None else [{"from": SYSTEM, "value": row.system}]
    turns += [
        {"from": speaker, "value": text.replace(DEFAULT_IMAGE_TOKEN, "").strip()} for speaker, text in row.conversations
    ]
    return parse_row({"id": row.id, "conversations": turns}, f"row {row.id!r}")
