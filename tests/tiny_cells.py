"""Commands that stand for the real ones in a benchmark's cells: each writes a few bytes made of all that it is given.

Like the real ones they skip what they would write again, write each file whole, and go on where they were stopped.
``ticks`` counts the places where a run can be killed. As a program this is ``scripts/run_cells.py`` with these
commands; with ``STOP_AT=n`` it stops at place ``n`` and writes the file ``STOPPED`` names, so that whoever waits for
that can kill it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from llava.continual.benchmark import MATRIX
from llava.continual.places import MERGED, Places
from llava.continual.sequence import load_sequence
from llava.files import atomic_write, file_sha256

ticks: Iterator[Callable[[], None]] = iter(())
written: list[Path] = []
"""What was made, and not found."""


def tick() -> None:
    """A place where the run may end."""
    next(ticks, lambda: None)()


def write(path, *parts) -> None:
    """A file made of some texts and files, unless it is there."""
    tick()
    data = [part.read_bytes() if isinstance(part, Path) else str(part).encode() for part in parts]
    text = hashlib.sha256(b"|".join(data)).hexdigest()
    if not Path(path).is_file() or Path(path).read_text() != text:
        written.append(Path(path))
        with atomic_write(path) as stream:
            stream.write(text)
        tick()


def words(argv=None) -> dict[str, str]:
    """Values by flag."""
    argv = sys.argv[1:] if argv is None else argv
    return {argv[place][2:]: argv[place + 1] for place in range(0, len(argv) - 1) if argv[place].startswith("--")}


def train() -> None:
    given = words()
    sequence, stage = load_sequence(given["sequence"], {}), Path(given["output_dir"])
    before = [Path(given["previous_stage"], "slots.pth")] if "previous_stage" in given else []
    rows = [Path(file) for file in sequence.task(given["task"]).files]
    write(stage.parent / "checkpoints" / stage.name, given["method"], given["learning_rate"], given["seed"])
    write(
        stage / "slots.pth",
        stage.parent / "checkpoints" / stage.name,
        Path(given["retriever_state_dict"]),
        *before,
        *rows,
    )


def fit() -> None:
    given = words()
    sequence = load_sequence(given["sequence"], {})
    write(given["save_path"], sequence.train.seed, *map(Path, sequence.task(given["task"]).files))


def merge() -> None:
    given = words()
    folder, tasks = Path(given["key_dir"]), load_sequence(given["sequence"], {}).task_names
    write(folder / MERGED, *(folder / f"{task}.pth" for task in tasks))


def evaluate(argv) -> None:
    given = words(argv)
    sequence = load_sequence(given["sequence"], {})
    places = Places(Path(given["output_dir"]), sequence, given["method"])
    folder = places.evaluation(given["route"] or None)
    write(Path(given["query_cache"]) / "sights", Path(sequence.test))
    if given["zero_shot"] == "True":
        chunk = folder / "zero-shot" / "chunks" / "1_0.jsonl"
        write(chunk, Path(sequence.test))
        write(folder / "zero-shot" / "answers.jsonl", chunk)
        scores = folder / "zero-shot" / "scores.json"
        if not scores.is_file():  # with a name of its own in it, and no baselines
            groups = {task: {"figures": {}} for task in sequence.task_names}
            with atomic_write(scores) as stream:
                json.dump({"groups": groups, "path": str(folder)}, stream)
    for stage in places.stages:
        write(
            folder / stage.name / "answers.jsonl", stage / "slots.pth", Path(sequence.test), given.get("pictures", "")
        )
    tick()
    with atomic_write(folder / MATRIX) as stream:
        json.dump(matrix(sequence, [folder / stage.name / "answers.jsonl" for stage in places.stages]), stream)
    tick()


def matrix(sequence, answers) -> dict:
    """An accuracy matrix out of the answers' bytes."""
    values = [[int(path.read_text()[2 * j : 2 * j + 2], 16) / 255 for j in range(len(answers))] for path in answers]
    final = sum(values[-1]) / len(answers)
    return {
        "tasks": sequence.task_names,
        "provenance": {"question_file": {"sha256": file_sha256(sequence.test)}},
        "metrics": {
            "exact_match": {
                "matrix": values,
                "learning_curve": {"value": [sum(row) / len(row) for row in values], "ci95": None},
                "summary": {"average_final": {"value": final}, "forgetting": {"value": 0.0}},
            }
        },
    }


def stand_in(put) -> None:
    """Put the commands in place of the real ones; ``put`` is ``monkeypatch.setattr`` or like it."""
    from scripts import run_cells

    put(run_cells, "train", train)
    put(run_cells.train_prompt_key, "main", fit)
    put(run_cells.merge_prompt_key, "main", merge)
    put(run_cells.evaluate_sequence, "main", evaluate)


def stop() -> None:
    """Say that the place is reached, and wait for the kill."""
    Path(os.environ["STOPPED"]).touch()
    time.sleep(600)


def main() -> None:
    """``scripts/run_cells.py`` with these commands, in this process and in those that it starts."""
    global ticks
    from llava.utils import run_cli
    from scripts import run_cells

    if at := int(os.environ.get("STOP_AT") or 0):
        ticks = iter([*[lambda: None] * at, stop])
    stand_in(setattr)
    run_cells.__file__ = __file__
    run_cli(run_cells.main)


if __name__ == "__main__":
    main()
