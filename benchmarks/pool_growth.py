"""What a thousand stored tasks cost over three: reading and attaching them, a step of training, an answer, a stage.

    python benchmarks/pool_growth.py --json output/pool_growth.json

The model has random weights, each task slots of its own in a stage's folder. Contenders are pools of so many tasks, the
smallest one twice; they take a step in turn, and the figures are medians (``benchmarks/parts/timing.py``).

    attach   read a stage's slots, with all checksums, and put them on the model
    train    4 samples, with the optimizer of one task's slots
    decode   a step of one token for 16 questions, which take the tasks in turn
    write    the folder as a stage writes it: its own task's file, links to those before, the list of checksums

and beside them the bytes of each stage, those that are its own, and what reading it adds to the process's own memory.
"""

from __future__ import annotations

import copy
import gc
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
from llava import files  # noqa: E402
from llava.checkpoints.kinds import SLOTS_FILE  # noqa: E402
from llava.checkpoints.manifest import seal  # noqa: E402
from llava.cli import flag, parse  # noqa: E402
from llava.files import atomic_folder  # noqa: E402
from llava.heap import own_bytes, return_freed_memory  # noqa: E402
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
        self.files = {name: folder / f"{count} tasks" / SLOTS_FILE for name, count in self.sizes.items()}
        for count, file in dict(zip(self.sizes.values(), self.files.values(), strict=True)).items():
            pool = with_slots(self.model, shape, count).retriever.pool
            pool = pool.with_tasks(map(copy.deepcopy, pool.tasks))  # with numbers of their own
            _write_stage(pool.with_tasks(pool.tasks[:-1]), _before(file))
            _write_stage(pool, file, _before(file))

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
        file = self.files[name]
        written = file.parent.with_name(f"written, {name}") / SLOTS_FILE
        return partial(_write_stage, Pool.read(file), written, _before(file))

    @staticmethod
    def _attached(file: Path, model: Any) -> Any:
        files._KNOWN.clear()  # the checksums that this process knows: each attaching is a process's first
        model.attach_adapter(Retriever(Pool.read(file)))
        return model

    def sizes_in_memory(self) -> dict[str, dict[str, int]]:
        """Bytes of each stage's slots and of its own files, and what this process takes more of when they are read."""
        found = {}
        for name, file in self.files.items():
            before = _resident()
            pool = Pool.read(file)
            more = max(_resident() - before, 0)
            sizes = [(place.stat().st_size, place.stat().st_nlink) for place in file.parent.rglob("*.*")]
            own = sum(size for size, names in sizes if names == 1)
            found[name] = {"file_bytes": sum(size for size, _ in sizes), "own_bytes": own, "memory_bytes": more}
            del pool
        return found


PARTS = ("attach", "train", "decode", "write")


def _before(file: Path) -> Path:
    """The same of the stage before, which lacks the last task."""
    return file.parent.with_name(f"before {file.parent.name}") / SLOTS_FILE


def _write_stage(pool: Pool, file: Path, *earlier: Path) -> None:
    with atomic_folder(file.parent) as partial:
        pool.write_stage(partial / SLOTS_FILE, earlier)
        seal(partial)


def _resident() -> int:
    gc.collect()
    return_freed_memory()  # what an earlier pool took would be given to the next, which then seemed to take nothing
    return own_bytes()


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
            print(
                f"{name:<14} files {size['file_bytes'] / 1e6:>8.1f} MB, own {size['own_bytes'] / 1e6:>8.1f} MB, ",
                end="",
            )
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
