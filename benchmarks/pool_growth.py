"""What a thousand stored tasks cost over three: reading and attaching them, a training step, an answer, a stage's file.

    python benchmarks/pool_growth.py --json output/pool_growth.json

The model has random weights, each task slots of its own in a file as a stage keeps it. Contenders are pools of so many
tasks, the smallest one twice; they take a step in turn, and the figures are medians (``benchmarks/parts/timing.py``).

    attach   read the file and put its slots on the model
    train    4 samples, with the optimizer of one task's slots
    decode   a step of one token for 16 questions, which take the tasks in turn
    write    the file, as a stage writes it

and beside them the size of each file, and what reading it adds to the memory of the process: slots are not copied until
a question uses them.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts.bench import machine, write  # noqa: E402
from benchmarks.parts.contenders import SMALL, TINY, Decoding, Shape, Training, random_model, sharing, with_slots  # noqa: E402
from benchmarks.parts.timing import AGAIN, BASE, ROUNDS, Found, lines, measure, record  # noqa: E402
from llava.cli import flag, parse  # noqa: E402
from llava.model.language_model.retriever import Retriever  # noqa: E402
from llava.slots.pool import Pool  # noqa: E402
from llava.utils import run_cli  # noqa: E402

NARROW = replace(SMALL, decoder={**SMALL.decoder, "num_hidden_layers": 4}, rank=4)
"""A thousand tasks are 600 MB."""
SHAPES = {"narrow": NARROW, "tiny": TINY}


class Growth:
    """Pools of several sizes over one model, and the files that they were read from, in ``folder``."""

    def __init__(self, shape: Shape, tasks: list[int], folder: Path, rounds: int):
        self.shape, self.rounds = shape, rounds
        self.model = random_model(shape, torch.device("cpu"))
        self.sizes = {BASE: tasks[0], AGAIN: tasks[0], **{f"{count:,} tasks": count for count in tasks[1:]}}
        self.files = {name: folder / f"{count}.pth" for name, count in self.sizes.items()}
        for count, file in dict(zip(self.sizes.values(), self.files.values(), strict=True)).items():
            pool = with_slots(self.model, shape, count).retriever.pool
            pool.with_tasks(map(copy.deepcopy, pool.tasks)).write(file)  # with numbers of their own

    def measure(self, part: str) -> dict[str, Found]:
        """All contenders' steps of a part."""
        steps = {name: getattr(self, part)(name) for name in self.sizes}
        return measure(steps, torch.device("cpu"), rounds=self.rounds, uncounted=steps)

    def attach(self, name: str) -> Callable[[], Any]:
        return partial(self._attached, self.files[name], sharing(self.model))

    def train(self, name: str) -> Callable[[], Any]:
        return Training(self._attached(self.files[name], sharing(self.model)), self.shape)

    def decode(self, name: str) -> Callable[[], Any]:
        model = self._attached(self.files[name], sharing(self.model))
        return Decoding(model, self.shape, tasks=self.sizes[name])

    def write(self, name: str) -> Callable[[], Any]:
        pool, file = Pool.read(self.files[name]), self.files[name]
        return partial(pool.write, file.with_name(f"written-{file.name}"))

    @staticmethod
    def _attached(file: Path, model: Any) -> Any:
        model.attach_adapter(Retriever(Pool.read(file)))
        return model

    def sizes_in_memory(self) -> dict[str, dict[str, int]]:
        """Bytes of each pool's file, and what this process takes more of when it is read."""
        found = {}
        for name, file in self.files.items():
            before = _resident()
            pool = Pool.read(file)
            found[name] = {"file_bytes": file.stat().st_size, "memory_bytes": max(_resident() - before, 0)}
            del pool
        return found


PARTS = ("attach", "train", "decode", "write")


def _resident() -> int:
    """Bytes of this process that are in memory; 0 where the system does not tell."""
    place = Path("/proc/self/statm")
    return int(place.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE") if place.exists() else 0


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    tasks: list[int] = flag([3, 1000], "numbers of stored tasks, the smallest first")
    parts: list[str] = flag(list(PARTS), "what is measured", choices=PARTS)
    shape: str = flag("narrow", "narrow: 4 layers of a 135M decoder; tiny: a test of it", choices=tuple(SHAPES))
    rounds: int = flag(ROUNDS, "steps of each contender", least=1)
    threads: int = flag(1, "of torch", least=1)
    json: str | None = flag(None, "file for all figures")


def main() -> None:
    """Print a table for each part, and write the file."""
    arguments = parse(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        growth = Growth(SHAPES[arguments.shape], arguments.tasks, Path(folder), arguments.rounds)
        sizes = growth.sizes_in_memory()
        figures: dict[str, Any] = {**machine(device), "shape": arguments.shape, "sizes": sizes, "parts": {}}
        for name, size in sizes.items():
            print(f"{name:<14} file {size['file_bytes'] / 1e6:>9.1f} MB, ", end="")
            print(f"memory {size['memory_bytes'] / 1e6:>9.1f} MB more")
        for part in arguments.parts:
            begun = time.monotonic()
            found = growth.measure(part)
            print("\n" + "\n".join(lines(part, found)))
            print(f"  {part} took {time.monotonic() - begun:.0f} s")
            figures["parts"][part] = record(found)
    if arguments.json:
        write(Path(arguments.json), figures)


if __name__ == "__main__":
    run_cli(main)
