"""Run the cells of a benchmark that are not done yet, and print its table; started by ``run_benchmark.sh``.

Each cell is the pipeline of the root scripts in one process: keys (once for all cells of an order and a seed), the
stages one after the other, the evaluation. Whatever was finished before is skipped by each of them, and an interrupted
stage goes on from its checkpoint, so a killed benchmark ends with the bytes of an undisturbed one.

With several workers each is a process, and takes whatever cell no other one makes; a lock beside the cell's folder says
which, and that of a dead process counts no more. A cell that fails stops no other.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import merge_prompt_key
import train_prompt_key
from llava.checkpoints.kinds import TRAINING_FILE
from llava.cli import flag, parse, word
from llava.continual.benchmark import SEQUENCE, Benchmark, Cell
from llava.continual.benchmark_marks import Marks
from llava.continual.places import MERGED, Places
from llava.continual.sequence import TaskSequence
from llava.devices import has_accelerator, restricted_to, run_together, visible_devices
from llava.eval import benchmark_table, evaluate_sequence
from llava.eval.evaluation import Evaluation, Settings
from llava.eval.scored import scores_are_whole
from llava.files import atomic_folder, atomic_write
from llava.locks import only_writer
from llava.outside import read_text
from llava.progress import duration
from llava.train.train import train
from llava.utils import UserError, quiet_libraries, run_cli

POLL = 2.0
"""Seconds between two looks at what the others do."""
MOST_READERS = 4
MADE_OF = "made_of"
"""File beside keys that says what they are made of."""

FAILURES = (UserError, OSError, RuntimeError, ArithmeticError, ValueError, SystemExit)
"""What a cell may end in without stopping the others: bad input, the machine, torch, numbers, a command's own exit."""


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    benchmark: str = word("file of the benchmark")
    workers: str = flag("", "processes that share the cells (default: the file's, else one a device)")
    worker_since: float | None = flag(None, "when the command was given, for its own use: this process is a worker")


def main() -> None:
    args = parse(Arguments, description=__doc__)
    quiet_libraries()
    benchmark = Benchmark.read(args.benchmark)
    if args.worker_since is not None:
        work(benchmark, int(args.workers), args.worker_since)
        return
    devices = visible_devices()
    wanted = args.workers or str(benchmark.values.get("workers") or max(1, len(devices)))
    if not wanted.isdigit() or int(wanted) < 1:
        raise UserError(f"WORKERS is {wanted!r}; give a whole number of 1 or more, or leave it empty")
    failed = None
    try:
        if wanted == "1":
            work(benchmark, 1, time.time())
        else:
            work_together(args.benchmark, int(wanted), devices)
    except UserError as error:
        failed = error
    benchmark_table.main([args.benchmark])
    if failed is not None:
        raise failed


def work_together(file: str, count: int, devices: list[str]) -> None:
    """Start the workers, which take turns with the devices, and wait for them; none outlives this process.

    Raises:
        UserError: one of them failed, after it has said why.
    """
    threads = str(max(1, (os.cpu_count() or 1) // count))
    own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    words = [sys.executable, __file__, file, "--workers", str(count), "--worker-since", str(time.time())]
    turns = [restricted_to(devices[number % len(devices)]) if devices else {} for number in range(count)]
    failed = run_together([(words, {**own, **turn}) for turn in turns])
    if failed:
        raise UserError(f"{len(failed)} of {count} processes failed (messages above); give the same command again")


def work(benchmark: Benchmark, workers: int, since: float) -> None:
    """Make cells until all are whole or have failed, whoever makes them.

    Raises:
        UserError: cells failed.
    """
    marks, started, waiting = Marks(benchmark, since), time.monotonic(), False
    checked: set[Path] = set()

    def left() -> list[Cell]:
        return [cell for cell in benchmark.cells if cell.place not in checked and not marks.failed(cell)]

    while todo := left():
        taken = any(take(benchmark, marks, cell, checked, workers, started) for cell in todo)
        if not taken and left():
            if not waiting:
                print("[benchmark] other processes make the rest; waiting for them", flush=True)
            waiting = True
            time.sleep(POLL)
    print(progress(marks, workers, started), flush=True)
    if failed := [(cell, why) for cell in benchmark.cells if (why := marks.failed(cell))]:
        told = "; ".join(f"{cell.place}: {why.splitlines()[-1]}" for cell, why in failed)
        raise UserError(f"{len(failed)} of {len(benchmark.cells)} cells failed ({told}); give the same command again")


def take(benchmark: Benchmark, marks: Marks, cell: Cell, checked: set[Path], workers: int, started: float) -> bool:
    """Make a cell whole, unless it is, or another process makes it, or its learning rate or stages are not there yet.

    Returns:
        whether it took its time, and others may have gone on meanwhile.
    """
    trials = benchmark.trials(cell)
    if failed := next(filter(marks.failed, trials), None):
        marks.fail(cell, f"its learning rate is not known, as {failed.place} failed")
        return False
    if not checked.issuperset(trial.place for trial in trials):  # what other rows once said of them does not count
        return False
    with ExitStack() as stack:
        try:
            stack.enter_context(only_writer(benchmark.folder(cell)))
        except UserError:  # another process makes it
            return False
        begun = time.monotonic()
        try:
            sequence = benchmark.prepare(cell)
            identity = benchmark.identity(cell, sequence)
            if marks.answered(cell, identity):
                score_again(benchmark, cell, marks)
            if marks.done(cell, identity):
                checked.add(cell.place)
                return False
            teacher = marks.teacher(cell)
            if teacher and teacher.place not in checked and not marks.failed(teacher):  # another process makes it
                return False
            print(progress(marks, workers, started, cell), flush=True)
            run_cell(benchmark, cell, sequence, workers, teacher)
            marks.finish(cell, identity, time.monotonic() - begun)
            checked.add(cell.place)
        except FAILURES as error:
            if not isinstance(error, UserError):
                traceback.print_exc()
            print(f"[benchmark] {cell.place} failed: {error}", flush=True)
            marks.fail(cell, f"{type(error).__name__}: {error}")
        gc.collect()  # a model of this cell goes before the next one is loaded
        return True


def progress(marks: Marks, workers: int, started: float, now: Cell | None = None) -> str:
    """One line: how far the whole is, and how long the rest will take."""
    cells = marks.benchmark.cells
    todo = [cell for cell in cells if not marks.fresh(cell)]
    left = marks.time_left(todo, workers) if todo else None
    took, rest = duration(time.monotonic() - started), "" if left is None else f", about {duration(left)} left"
    doing = f"; now {now.place}" if now else ""
    return f"[benchmark] {len(cells) - len(todo)} of {len(cells)} cells, {took} so far{rest}{doing}"


def run_cell(
    benchmark: Benchmark, cell: Cell, sequence: TaskSequence, workers: int = 1, teacher: Cell | None = None
) -> None:
    """Keys, stages and evaluation of a cell; the stages of ``teacher``, which are the same, are not trained again."""
    file = benchmark.folder(cell) / SEQUENCE
    keys = fit_keys(benchmark, cell, sequence, file)
    places = Places(benchmark.folder(cell), sequence, cell.method)
    for task in sequence.task_names:
        if teacher:
            take_over(Places(benchmark.folder(teacher), sequence, cell.method).stage(task), places.stage(task))
        words = ["--model_name_or_path", benchmark.base, "--sequence", file, "--method", cell.method, "--task", task]
        words += ["--retriever_state_dict", keys, "--output_dir", places.stage(task)]
        if before := places.stage_before(task):
            words += ["--previous_stage", before]
        words += ["--query_cache", benchmark.query_cache, "--save_strategy", "steps", "--report_to", "none"]
        words += [part for name, value in sequence.train.flags().items() for part in (f"--{name}", value)]
        words += on_gpu(words, workers) if has_accelerator() else ["--use_cpu", "True"]
        call(train, *words, "--disable_tqdm", "True", *cell.flags)
    evaluate(benchmark, cell)


def on_gpu(words: list[object], workers: int) -> list[str]:
    """What ``finetune_continual.sh`` adds on a GPU, with as many readers of pictures as there are cores for."""
    readers = min(MOST_READERS, (os.cpu_count() or 1) // workers)
    found = ["--gradient_checkpointing", "auto", "--dataloader_num_workers", str(readers if readers > 1 else 0)]
    return found if "--bf16" in words else [*found, "--bf16", "auto"]


def fit_keys(benchmark: Benchmark, cell: Cell, sequence: TaskSequence, file: Path) -> Path:
    """The merged keys of the cell's order and seed, which the first cell that needs them makes."""
    folder, identity = benchmark.key_folder(cell), benchmark.key_identity(sequence)
    mark = folder / MADE_OF
    with only_writer(folder, wait=True):
        if not mark.is_file() or read_text(mark) != identity:
            shutil.rmtree(folder, ignore_errors=True)
            with atomic_write(mark) as stream:
                stream.write(identity)
        if not (folder / MERGED).is_file():
            for task in sequence.task_names:
                words = ["--task", task, "--sequence", file, "--model-base", benchmark.base]
                words += ["--save_path", folder / f"{task}.pth", "--cache_dir", benchmark.query_cache]
                call(train_prompt_key.main, *words)
            call(merge_prompt_key.main, "--sequence", file, "--key_dir", folder)
    return folder / MERGED


def evaluate(benchmark: Benchmark, cell: Cell) -> None:
    """The cell's answers and scores, with the base's answers as another cell was given them."""
    words = asked(benchmark, cell)
    shared = base_answers(benchmark, Evaluation.of(parse(Settings, words), 1))
    for mine, kept in shared.items():
        renew(mine, kept)
    evaluate_sequence.main(words)
    for mine, kept in shared.items():
        renew(kept, mine)


def asked(benchmark: Benchmark, cell: Cell) -> list[str]:
    """The command line of the cell's evaluation."""
    folder = benchmark.folder(cell)
    words: list[object] = ["--sequence", folder / SEQUENCE, "--base_model", benchmark.base, "--method", cell.method]
    words += ["--route", cell.route, "--output_dir", folder, "--query_cache", benchmark.query_cache]
    words += ["--zero_shot", not cell.trial, "--chunks", max(1, len(visible_devices()))]
    words += ["--pictures", *cell.pictures] if cell.pictures else []
    return list(map(str, words))


def score_again(benchmark: Benchmark, cell: Cell, marks: Marks) -> None:
    """Score the answers of a cell where scores are missing, or lack what they would not if they were made here. That
    needs no stage: the cell may have come from another machine, without them."""
    if marks.whole(cell) and scores_are_whole(benchmark.matrix(cell).parent):
        return
    print(f"[benchmark] {cell.place}: its scores are incomplete; scoring its answers", flush=True)
    evaluate_sequence.score_answers(Evaluation.of(parse(Settings, asked(benchmark, cell)), 1))
    marks.renew(cell)


def base_answers(benchmark: Benchmark, evaluation: Evaluation) -> dict[Path, Path]:
    """An evaluation's files of answers by the base alone, each with its place among those that all cells share: in a
    folder of the run that gives them, so that other questions, pictures, weights or settings have other places."""
    kinds = [kind for name, kind in evaluation.passes if name == Evaluation.ZERO_SHOT]
    chunks = [
        evaluation.chunk(Evaluation.ZERO_SHOT, number, kind) for kind in kinds for number in range(evaluation.chunks)
    ]
    return {chunk.answers_file: benchmark.zero_shot / chunk.run / chunk.answers_file.name for chunk in chunks}


def renew(target: Path, source: Path) -> None:
    """Give a file the contents of another one that is there."""
    if source.is_file() and not (target.is_file() and target.read_bytes() == source.read_bytes()):
        with atomic_write(target, "wb") as stream:
            stream.write(source.read_bytes())


def take_over(source: Path, target: Path) -> None:
    """Copy a stage to where there is none yet, or one that was trained otherwise; it appears whole."""
    if not source.is_dir() or (target.is_dir() and same_training(source, target)):
        return
    with only_writer(target, wait=True), atomic_folder(target) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)


def same_training(*stages: Path) -> bool:
    """Whether some stages have the same record, with the checksums of their slots in it."""
    files = [stage / TRAINING_FILE for stage in stages]
    return len({file.read_bytes() if file.is_file() else None for file in files}) == 1


def call(command: Callable[[], object], *words: object) -> None:
    """A command in this process, by its command line."""
    before, sys.argv = sys.argv, ["command", *map(str, words)]
    try:
        command()
    finally:
        sys.argv = before


if __name__ == "__main__":
    run_cli(main)
