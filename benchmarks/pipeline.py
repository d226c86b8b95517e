"""How long a whole command of the pipeline takes, in this tree and in others.

    python benchmarks/pipeline.py --against ../llava-before --json output/pipeline.json -- bash cv805.sh

The command (``bash cv805.sh`` unless another is given) runs in turn with each tree's own files and package, from the
folder in which the benchmark is started, so that data and settings (``SEQUENCE``, ``BASE_MODEL``, ...) are the same.
Each run has an output folder of its own, with links to what is in ``--output_dir`` but for answers and caches: it finds
stages and bases, and nothing that it is to make. This tree stands in the table twice. The figures are medians
(``benchmarks/parts/timing.py``).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.parts.bench import machine, write  # noqa: E402
from benchmarks.parts.timing import AGAIN, BASE, ROUNDS, lines, measure, record  # noqa: E402
from llava.cli import flag, parse  # noqa: E402
from llava.utils import UserError, run_cli  # noqa: E402

LEFT_OUT = ("eval", "cache", "checkpoints", "benchmarks")
"""Folders that a run makes itself."""


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    command: list[str] = field(default_factory=list, metadata={"positional": True, "help": "what is run, after --"})
    against: list[str] = flag([], "other trees, such as checkouts of other commits")
    output_dir: str = flag("output", "holds the stages and bases that the command needs")
    rounds: int = flag(ROUNDS, "runs with each tree", least=1)
    json: str | None = flag(None, "file for all figures")


def run(command: Sequence[str], tree: Path, output: Path) -> None:
    """Run the command with a tree's files, into a fresh output folder.

    Raises:
        UserError: it fails.
    """
    words = [str(tree / word) if (tree / word).is_file() else word for word in command]
    with tempfile.TemporaryDirectory() as fresh:
        for entry in output.iterdir():
            if entry.name not in LEFT_OUT:
                (Path(fresh) / entry.name).symlink_to(entry.resolve())
        environment = {**os.environ, "OUTPUT_DIR": fresh, "PYTHONPATH": str(tree)}
        done = subprocess.run(words, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(words)} failed: {(done.stderr or done.stdout).strip()[-500:]}")


def main() -> None:
    """Print a table, and write the file."""
    arguments = parse(Arguments, description=__doc__)
    command, output = arguments.command or ["bash", "cv805.sh"], Path(arguments.output_dir)
    if not output.is_dir():
        raise UserError(f"--output_dir {output} is no folder; make stages first, with finetune_continual.sh")
    trees = {BASE: ROOT, AGAIN: ROOT, **{name: Path(name).resolve() for name in arguments.against}}
    steps = {name: partial(run, command, tree, output) for name, tree in trees.items()}
    device = torch.device("cpu")
    found = measure(steps, device, rounds=arguments.rounds, uncounted=steps)
    print("\n".join(lines(" ".join(command)[:33], found)))
    if arguments.json:
        figures: dict[str, Any] = {"command": command, **machine(device), **record(found)}
        write(Path(arguments.json), figures)


if __name__ == "__main__":
    run_cli(main)
