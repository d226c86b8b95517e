"""Continual methods: one file each, found by its name. See ``base`` for what a method is and ``docs/extending.md``."""

from __future__ import annotations

from llava.continual.methods.base import NoOptions, ParamGroup, Recipe
from llava.continual.methods.context import Context
from llava.registry import Registry

METHODS: Registry[type[Recipe]] = Registry("method", __name__)

__all__ = ["METHODS", "Context", "NoOptions", "ParamGroup", "Recipe"]
