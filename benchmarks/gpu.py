"""What slots cost a LLaVA-1.5-7B on a GPU: training, prefill, decoding and evaluation, in one command.

    python benchmarks/gpu.py --json output/gpu.json

The model has random weights in bfloat16, made on the device: nothing is downloaded or loaded. Its contenders share
them: the frozen base, the base against itself, our slots on the attention outputs or on all seven projections, with 3
and with 1,000 stored tasks, and PEFT's LoRA, alone or as a mixed batch. Each takes a step in every round, in turn; the
figures are medians of at least 9 rounds, and where the base is not within 3 % of itself no ratio counts. A step's
kernels, copies, its memory beyond what lay there, and how often the host waits for the GPU are counted beside.

    train     4 samples of 636 positions, 4 of them answers, with the optimizer of what trains
    prefill   16 questions of 636 positions
    decode    one token for 16 questions
    eval      16 questions about 8 picture files, with the tower: 4 tokens each, in one
              batch, one by one, and in LLaVA's own loop

``--minutes`` bounds the whole: parts that would begin later are left out, rounds are cut short, and the table says how
many there were.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts.contenders import (  # noqa: E402
    SEVEN_BILLION,
    TINY,
    Decoding,
    Prefill,
    Shape,
    Training,
    random_model,
    routed_rank,
    trained_rank,
    with_lora,
    with_slots,
)
from benchmarks.parts.questions import Questions  # noqa: E402
from benchmarks.parts.timing import AGAIN, BASE, ROUNDS, Found, Step, lines, measure, record  # noqa: E402
from llava.cli import flag, parse  # noqa: E402
from llava.devices import default_device, has_accelerator  # noqa: E402
from llava.files import atomic_write  # noqa: E402
from llava.slots.offsets import TARGETS  # noqa: E402
from llava.train.memory import activation_bytes  # noqa: E402
from llava.utils import UserError, rank0_print, run_cli  # noqa: E402

FEW, MANY = 3, 1000
"""Numbers of stored tasks."""


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
        rounds: how often each contender takes its step.
    """

    def __init__(self, shape: Shape, device: torch.device, rounds: int):
        self.shape, self.device, self.rounds = shape, device, rounds
        self.model = random_model(shape, device)

    def train(self, until: float) -> Table:
        """Training steps; ``until`` as in ``measure``."""
        base = Training(self.model, self.shape)
        steps: dict[str, Step] = {BASE: base, AGAIN: base}
        for name, tasks, targets in (
            ("o_proj", FEW, ("o_proj",)),
            (f"o_proj, {MANY} tasks", MANY, ("o_proj",)),
            ("seven targets", FEW, TARGETS),
        ):
            steps[f"slots, {name}"] = Training(with_slots(self.model, self.shape, tasks, targets), self.shape)
        for name, targets in (("o_proj", ("o_proj",)), ("seven targets", TARGETS)):
            lora = with_lora(self.model, trained_rank(self.shape), 1, targets)
            steps[f"LoRA, {name}"] = Training(lora, self.shape)
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


PARTS = ("train", "decode", "prefill", "eval")


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    parts: list[str] = flag(list(PARTS), "what is measured", choices=PARTS)
    minutes: float = flag(8.0, "that it may take in all", above=0)
    rounds: int = flag(ROUNDS, "steps of each contender; fewer where the time is up", least=1)
    json: str | None = flag(None, "file for all figures")
    device: str | None = flag(None, "default: the GPU")
    tiny: bool = flag(False, "a model of a few thousand weights, on the CPU too: a test of the benchmark itself")


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


def write(path: Path, figures: dict[str, Any]) -> None:
    """The figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        json.dump(figures, stream, indent=1)


def main() -> int:
    """Print a table for each part, and write the file; 1 where a part failed."""
    start = time.monotonic()
    arguments = parse(Arguments, description=__doc__)
    if not has_accelerator() and not arguments.tiny:
        raise UserError("no GPU here, and this measures one; --tiny tries the benchmark itself on the CPU")
    device = torch.device(default_device(arguments.device))
    end = start + 60 * arguments.minutes
    shape = TINY if arguments.tiny else SEVEN_BILLION
    torch.manual_seed(0)
    bench = Bench(shape, device, arguments.rounds)
    figures: dict[str, Any] = {**machine(device), "shape": "tiny" if arguments.tiny else "LLaVA-1.5-7B", "parts": {}}
    rank0_print(f"{figures['device']}, torch {figures['torch']}; {figures['shape']}, {shape.dtype}")
    failed: list[str] = []
    for left, part in zip(range(len(arguments.parts), 0, -1), arguments.parts):
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
        if arguments.json:
            write(Path(arguments.json), figures)  # after each part: what is measured stays
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if failed:
        rank0_print(f"\nfailed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_cli(main)
