"""How long commands and imports take before they do anything: half of a short evaluation is its start.

    python benchmarks/startup.py --json output/startup.json

Each contender is a process of its own, started in turn: torch and transformers alone (the base), the same again, the
package, what an evaluation and a training import, and each command's help. The figures are medians
(``benchmarks/parts/timing.py``).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.parts.bench import machine, write  # noqa: E402
from benchmarks.parts.timing import AGAIN, BASE, ROUNDS, lines, measure, record  # noqa: E402
from llava.cli import flag, parse  # noqa: E402
from llava.utils import run_cli  # noqa: E402

LIBRARIES = ["-c", "import torch, transformers"]
CONTENDERS: dict[str, list[str]] = {
    BASE: LIBRARIES,
    AGAIN: LIBRARIES,
    "import llava": ["-c", "import llava"],
    "what answers": ["-c", "import llava.eval.answerer"],
    "what trains": ["-c", "import llava.train.train"],
    "train_prompt_key.py --help": ["train_prompt_key.py", "--help"],
    "train_mem --help": ["-m", "llava.train.train_mem", "--help"],
    "evaluate_sequence --help": ["-m", "llava.eval.evaluate_sequence", "--help"],
    "eval_video_qa --help": ["-m", "llava.eval.eval_video_qa", "--help"],
}


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    contenders: list[str] = flag(list(CONTENDERS)[2:], "what is started beside the base", choices=list(CONTENDERS)[2:])
    rounds: int = flag(ROUNDS, "starts of each", least=1)
    json: str | None = flag(None, "file for all figures")


def start(words: Sequence[str], environment: dict[str, str]) -> None:
    """Run a Python of this project to its end."""
    command = [sys.executable, *words]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    """Print a table, and write the file."""
    arguments = parse(Arguments, description=__doc__)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    names = [BASE, AGAIN, *arguments.contenders]
    steps = {name: partial(start, CONTENDERS[name], environment) for name in names}
    device = torch.device("cpu")
    found = measure(steps, device, rounds=arguments.rounds, uncounted=names)
    print("\n".join(lines("start", found)))
    if arguments.json:
        figures: dict[str, Any] = {**machine(device), **record(found)}
        write(Path(arguments.json), figures)


if __name__ == "__main__":
    run_cli(main)
