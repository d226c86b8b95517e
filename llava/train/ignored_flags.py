"""Flags that LLaVA's, the prototype's and older transformers' scripts pass, and that change nothing here.

They are taken, so that published command lines run, and said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from llava.utils import rank0_print

FIRST_QUESTION = "a row is routed by its first question (the prototype's firstq), never by an answer"
NO_EFFECT = "it has no effect here"


def ignored(why: str = NO_EFFECT, **more: Any) -> Any:
    """A flag with any number of values; ``why`` is said where it is given."""
    about = {"help": f"ignored: {why}", "nargs": "*", "metavar": "ANY", **more}
    return dataclasses.field(default=None, metadata=about)


@dataclass
class IgnoredArguments:
    """Flags without effect."""

    disable_task_id: str | None = ignored("a task trains its own slots; answering never sees which task it is")
    preprare_retreival_version: str | None = ignored(FIRST_QUESTION)
    prepare_retrieval_version: str | None = ignored(FIRST_QUESTION)
    save_safetensors: str | None = ignored()
    overwrite_output_dir: str | None = ignored()
    logging_dir: str | None = ignored()


def ignored_beside(taken: Container[str]) -> type:
    """``IgnoredArguments`` without the flags that mean something: a method's options, or of this transformers."""
    entries = [
        (entry.name, str | None, dataclasses.field(default=None, metadata=entry.metadata))
        for entry in dataclasses.fields(IgnoredArguments)
        if entry.name not in taken
    ]
    return dataclasses.make_dataclass("IgnoredArguments", entries)


def say_ignored(given: Any) -> None:
    """One note for each flag that was given."""
    for entry in dataclasses.fields(given):
        if getattr(given, entry.name) is not None:
            why = entry.metadata["help"].removeprefix("ignored: ")
            rank0_print(f"note: --{entry.name} is accepted and ignored: {why}")
