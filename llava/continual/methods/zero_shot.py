"""The base as it is: nothing is trained, and every stage holds no slots.

It stands in a table as a method among others, so that what tasks contribute is read off the same way for all::

    y = W x

Paper: none; the row that forward transfer is measured against (Lopez-Paz and Ranzato, arXiv 1706.08840)
Keeps of past data: nothing
Grows with the tasks: nothing
Task at test time: not needed
"""

from __future__ import annotations

from dataclasses import replace

from llava.continual.methods import METHODS, Context, Recipe
from llava.slots.pool import Pool


@METHODS.register
class ZeroShot(Recipe):
    name = "zero_shot"
    trains = False

    def pool(self, context: Context) -> tuple[Pool, str]:
        settings = replace(context.keys.settings, features={}, text_dim=None, image_dim=None, encoder={})
        return Pool(settings, (), context.keys.base), ""

    def slots(self, context: Context) -> Pool:
        return context.pool
