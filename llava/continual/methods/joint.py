"""The upper reference: one adapter trained on the data of all tasks at once, which a stream never allows::

    loss = cross-entropy over the rows of every task so far

Paper: none; the usual upper reference, multi-task training (Caruana, Machine Learning 1997)
Keeps of past data: every row, with its picture
Grows with the tasks: the rows
Task at test time: not needed
"""

from __future__ import annotations

from llava.continual.methods import METHODS, Context, Recipe
from llava.continual.methods.sequential import SHARED, single_adapter
from llava.continual.sequence import TaskSequence
from llava.slots.pool import Pool


@METHODS.register
class Joint(Recipe):
    name = "joint"

    def files(self, sequence: TaskSequence, task: str) -> list[str]:
        names = sequence.task_names
        return [file for name in names[: names.index(task) + 1] for file in sequence.task(name).files]

    def pool(self, context: Context) -> tuple[Pool, str]:
        return single_adapter(context.keys), SHARED
