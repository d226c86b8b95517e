"""Run the cells of a benchmark that are not done yet; started by ``run_benchmark.sh``, one process for each device.

Each cell is the pipeline of the root scripts in this one process: keys (once for all cells of an order and a seed), the
stages one after the other, the evaluation. Whatever was finished before is skipped by each of them, and an interrupted
stage goes on from its checkpoint, so a killed benchmark ends with the bytes of an undisturbed one.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import merge_prompt_key
import train_prompt_key
from llava.cli import flag, parse, word
from llava.continual.benchmark import Benchmark, Cell
from llava.continual.places import MERGED, Places
from llava.continual.sequence import TaskSequence
from llava.devices import has_accelerator
from llava.eval import evaluate_sequence
from llava.eval.evaluation import Evaluation
from llava.locks import only_writer
from llava.train.train import train
from llava.utils import quiet_libraries, run_cli


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    benchmark: str = word("file of the benchmark")
    worker: int = flag(0, "number of this process among those that share the cells")
    workers: int = flag(1, "how many processes share the cells")


def main() -> None:
    args = parse(Arguments, description=__doc__)
    quiet_libraries()
    benchmark = Benchmark.read(args.benchmark)
    started = time.monotonic()
    mine = benchmark.cells[args.worker :: args.workers]
    for number, cell in enumerate(mine):
        say(benchmark, mine[number:], args, started)
        run_cell(benchmark, cell)
    say(benchmark, [], args, started)


def say(benchmark: Benchmark, todo: list[Cell], args: Arguments, started: float) -> None:
    """One line: how far the whole is, and how long the rest will take."""
    cells = benchmark.cells[args.worker :: args.workers]
    left = benchmark.time_left(todo)
    took, rest = duration(time.monotonic() - started), "" if left is None else f", about {duration(left)} left"
    now = f"; now {todo[0].place}" if todo else ""
    of = f" (process {args.worker + 1} of {args.workers})" if args.workers > 1 else ""
    print(f"[benchmark] {len(cells) - len(todo)} of {len(cells)} cells{of}, {took} so far{rest}{now}", flush=True)


def duration(seconds: float) -> str:
    """``1 h 05 min`` or ``3 min 20 s``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def run_cell(benchmark: Benchmark, cell: Cell) -> None:
    """Make a cell whole, unless it is."""
    started = time.monotonic()
    sequence = benchmark.prepare(cell)
    identity = benchmark.identity(cell, sequence)
    if benchmark.done(cell, identity):
        return
    file = benchmark.folder(cell) / "sequence.json"
    keys = fit_keys(benchmark, cell, sequence, file)
    places = Places(benchmark.folder(cell), sequence, cell.method)
    for task in sequence.task_names:
        words = ["--model_name_or_path", benchmark.base, "--sequence", file, "--method", cell.method, "--task", task]
        words += ["--retriever_state_dict", keys, "--output_dir", places.stage(task)]
        if before := places.stage_before(task):
            words += ["--previous_stage", before]
        words += ["--query_cache", benchmark.query_cache, "--save_strategy", "steps", "--report_to", "none"]
        words += [part for name, value in sequence.train.flags().items() for part in (f"--{name}", value)]
        words += on_gpu(words) if has_accelerator() else ["--use_cpu", "True"]
        call(train, *words, "--disable_tqdm", "True", *cell.flags)
    evaluate(benchmark, cell, file)
    benchmark.finish(cell, identity, time.monotonic() - started)


def on_gpu(words: list[object]) -> list[str]:
    """What ``finetune_continual.sh`` adds on a GPU."""
    found = ["--gradient_checkpointing", "auto", "--dataloader_num_workers", "4"]
    return found if "--bf16" in words else [*found, "--bf16", "auto"]


def fit_keys(benchmark: Benchmark, cell: Cell, sequence: TaskSequence, file: Path) -> Path:
    """The merged keys of the cell's order and seed, which the first cell that needs them makes."""
    folder = benchmark.key_folder(cell)
    with only_writer(folder, wait=True):
        for task in sequence.task_names:
            words = ["--task", task, "--sequence", file, "--model-base", benchmark.base]
            words += ["--save_path", folder / f"{task}.pth", "--cache_dir", benchmark.query_cache]
            if not (folder / MERGED).is_file():
                call(train_prompt_key.main, *words)
        if not (folder / MERGED).is_file():
            call(merge_prompt_key.main, "--sequence", file, "--key_dir", folder)
    return folder / MERGED


def evaluate(benchmark: Benchmark, cell: Cell, file: Path) -> None:
    """The cell's answers and scores, with the base's answers as another cell made them."""
    places = Places(benchmark.folder(cell), benchmark.sequence, cell.method)
    mine = places.evaluation(cell.route or None) / Evaluation.ZERO_SHOT
    if not cell.route:
        take_over(benchmark.zero_shot, mine)
    words = ["--sequence", file, "--base_model", benchmark.base, "--method", cell.method, "--route", cell.route]
    evaluate_sequence.main([str(word) for word in [*words, "--output_dir", benchmark.folder(cell)]])
    if not cell.route:
        take_over(mine, benchmark.zero_shot)


def take_over(source: Path, target: Path) -> None:
    """Copy a folder to where there is none yet; it appears whole."""
    if not source.is_dir() or target.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(target, wait=True), tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as partial:
        if not target.is_dir():
            shutil.copytree(source, Path(partial) / "copy")
            os.rename(Path(partial) / "copy", target)


def call(command: Callable[[], object], *words: object) -> None:
    """A command in this process, by its command line."""
    before, sys.argv = sys.argv, ["command", *map(str, words)]
    try:
        command()
    finally:
        sys.argv = before


if __name__ == "__main__":
    run_cli(main)
