"""What is measured on a model: steps of training, prefill, decoding and evaluation, of all contenders in turn.

Every command that measures such steps (``gpu``, ``train_step``, ``decode``, ``eval_loop``) takes its parts from here
and prints and writes them alike.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.parts.contenders import (
    PREFIXES,
    Decoding,
    DenseTraining,
    OneByOne,
    Prefill,
    Shape,
    Training,
    TrainingOnPictures,
    routed_rank,
    trained_rank,
    with_lora,
    with_slots,
)
from benchmarks.parts.questions import Questions
from benchmarks.parts.timing import AGAIN, BASE, Found, Step, lines, measure, record
from llava.files import atomic_write
from llava.model.prefixes import PrefixStore
from llava.slots.names import ALL, QUESTION
from llava.slots.offsets import TARGETS
from llava.train.memory import activation_bytes
from llava.utils import rank0_print

FEW, MANY = 3, 1000
"""Numbers of stored tasks."""
SEVERAL = 7
"""Questions about a picture."""


@dataclass
class Table:
    """A part's measurements; ``items`` of ``what`` go into a step. ``more`` stands in the file beside them."""

    found: dict[str, Found]
    items: int
    what: str
    more: dict[str, Any] = field(default_factory=dict)


class Bench:
    """A model, and what is measured on it.

    Args:
        rounds: how often each contender takes its step. references: also measure what is only there to be compared
            with: the dense form of the public prototype, and loops that answer one question after the other.
    """

    def __init__(self, model: Any, shape: Shape, rounds: int, references: bool = False):
        self.model, self.shape, self.rounds, self.references = model, shape, rounds, references
        self.device = next(model.parameters()).device

    def train(self, until: float) -> Table:
        """Training steps; ``until`` as in ``measure``."""
        base = Training(self.model, self.shape)
        steps: dict[str, Step] = {BASE: base, AGAIN: base}
        for name, targets in (("o_proj", ("o_proj",)), ("seven targets", TARGETS)):
            # A stage trains with its own task's slots alone, whatever others are stored.
            steps[f"slots, {name}"] = Training(with_slots(self.model, self.shape, 1, targets), self.shape)
            lora = with_lora(self.model, trained_rank(self.shape), 1, targets)
            steps[f"LoRA, {name}"] = Training(lora, self.shape)
        if self.references:
            steps["dense offsets, o_proj"] = DenseTraining(self.model, self.shape)
        tokens, width = self.shape.train_rows * self.shape.positions, self.shape.dtype.itemsize
        guess = {"estimated_bytes": activation_bytes(self.model.config, tokens, width, whole=False)}
        rank0_print(f"a step is estimated to keep {guess['estimated_bytes'] / 1e9:.2f} GB (llava.train.memory)")
        return Table(measure(steps, self.device, until, self.rounds), self.shape.train_rows, "samples", guess)

    def prefill(self, until: float) -> Table:
        """First passes over a batch of questions."""
        return Table(measure(self._answering(Prefill), self.device, until, self.rounds), self.shape.rows, "questions")

    def decode(self, until: float) -> Table:
        """Steps of one token; three times as many rounds, because they are short."""
        found = measure(self._answering(Decoding), self.device, until, 3 * self.rounds)
        return Table(found, self.shape.rows, "tokens")

    def _answering(self, kind: Callable[..., Step]) -> dict[str, Step]:
        base = kind(self.model, self.shape)
        steps = {BASE: base, AGAIN: base}
        for tasks in (FEW, MANY):
            steps[f"slots, {tasks} tasks"] = kind(with_slots(self.model, self.shape, tasks), self.shape, tasks=tasks)
        for adapters in (FEW, self.shape.rows):
            lora = with_lora(self.model, routed_rank(self.shape), adapters)
            steps[f"LoRA, mixed batch of {adapters}"] = kind(lora, self.shape, adapters=adapters)
        if self.references:
            one, few = replace(self.shape, rows=1), with_slots(self.model, self.shape, FEW)
            steps["base, one by one"] = OneByOne(kind(self.model, one), self.shape.rows)
            steps[f"slots, {FEW} tasks, one by one"] = OneByOne(kind(few, one, tasks=FEW), self.shape.rows)
        return steps

    def eval(self, until: float) -> Table:
        """Whole evaluations by the project's own answerer, and whether a batch changes an answer."""
        self.model.eval()
        with tempfile.TemporaryDirectory() as folder:
            questions = Questions(Path(folder), self.shape, self.model)
            batched = lambda model: partial(questions.ask, model, self.shape.rows)  # noqa: E731
            few, many = (with_slots(self.model, self.shape, tasks) for tasks in (FEW, MANY))
            steps: dict[str, Step] = {BASE: batched(self.model), AGAIN: batched(self.model)}
            steps |= {f"slots, {FEW} tasks": batched(few), f"slots, {MANY} tasks": batched(many)}
            loops = {
                f"slots, {FEW} tasks, one by one": partial(questions.ask, few, 1),
                "base, LLaVA's loop": partial(questions.ask_in_a_loop, self.model),
            }
            found = measure(steps | loops, self.device, until, self.rounds, uncounted=loops)
            pairs = zip(questions.ask(few, self.shape.rows), questions.ask(few, 1), strict=True)
            alike = sum(one == other for one, other in pairs)
            rank0_print(f"{alike} of {self.shape.rows} answers of a batch are those of a batch of one")
        return Table(found, self.shape.rows, "questions", {"answers": self.shape.rows, "answers_alike": alike})

    def scope_training(self, until: float) -> Table:
        """Training steps on seven questions about each of two pictures; the base is offsets everywhere."""
        everywhere, behind = (with_slots(self.model, self.shape, 1, TARGETS, scope) for scope in (ALL, QUESTION))
        with tempfile.TemporaryDirectory() as folder:
            batch = self._several(folder).batch(self.model)
        base = TrainingOnPictures(everywhere, self.shape, batch)
        steps: dict[str, Step] = {BASE: base, AGAIN: base}
        steps["behind, first epoch"] = TrainingOnPictures(behind, self.shape, batch)
        again = with_slots(self.model, self.shape, 1, TARGETS, QUESTION)
        steps["behind, later epochs"] = TrainingOnPictures(again, self.shape, batch, keeps=True)
        return Table(measure(steps, self.device, until, self.rounds), len(batch["input_ids"]), "samples")

    def scope_answers(self, until: float) -> Table:
        """Answers to as many questions, pictures opened and looked at anew; the base is offsets everywhere."""
        self.model.eval()
        everywhere, behind = (with_slots(self.model, self.shape, FEW, TARGETS, scope) for scope in (ALL, QUESTION))
        with tempfile.TemporaryDirectory() as folder:
            questions = self._several(folder)
            rows = len(questions.rows)

            def ask(model: Any, prefixes: PrefixStore | None = None) -> list[str]:
                model.prefixes = prefixes
                return questions.ask(model, rows)

            kept = PrefixStore(PREFIXES)
            steps: dict[str, Step] = {BASE: partial(ask, everywhere), AGAIN: partial(ask, everywhere)}
            steps["behind, whole prompts"] = partial(ask, behind)
            steps["behind, first model"] = lambda: ask(behind, PrefixStore(PREFIXES))
            steps["behind, later models"] = lambda: ask(behind, kept)
            return Table(measure(steps, self.device, until, self.rounds), rows, "questions")

    def _several(self, folder: str) -> Questions:
        return Questions(Path(folder), replace(self.shape, rows=2 * SEVERAL), self.model, SEVERAL)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


def write(path: Path, figures: dict[str, Any]) -> None:
    """The figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        json.dump(figures, stream, indent=1)


def run_parts(bench: Bench, parts: Sequence[str], shape: str, end: float, file: str | None) -> int:
    """Print a table for each part, and write the file; 1 where a part failed.

    Args:
        shape: what the model is called. end: on ``time.monotonic``'s clock; parts that would begin later are left out.
    """
    figures: dict[str, Any] = {**machine(bench.device), "shape": shape, "parts": {}}
    rank0_print(f"{figures['device']}, torch {figures['torch']}; {shape}, {bench.shape.dtype}")
    failed: list[str] = []
    for left, part in zip(range(len(parts), 0, -1), parts):
        begun = time.monotonic()
        if begun > end:
            rank0_print(f"\n{part}: left out, the time is up")
            continue
        try:
            table = getattr(bench, part)(begun + (end - begun) / left)
        except Exception:  # the other parts have their figures all the same
            traceback.print_exc()
            failed.append(part)
        else:
            rank0_print("\n" + "\n".join(lines(part, table.found, table.items, table.what)))
            figures["parts"][part] = record(table.found) | table.more
            del table
        rank0_print(f"  {part} took {time.monotonic() - begun:.0f} s")
        if file:
            write(Path(file), figures)  # after each part: what is measured stays
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    if failed:
        rank0_print(f"\nfailed: {', '.join(failed)}")
    return 1 if failed else 0
