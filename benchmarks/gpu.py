"""What slots cost a LLaVA-1.5-7B on a GPU: training, prefill, decoding and evaluation, in one command.

    python benchmarks/gpu.py --json output/gpu.json

The model has random weights in bfloat16, made on the device: nothing is downloaded or loaded. Its contenders share
them: the frozen base, the base against itself, our slots, in training a task's own on the attention outputs or on all
seven projections, in answering those of 3 and of 1,000 stored tasks, and PEFT's LoRA, alone or as a mixed batch. Each
takes a step in every round, in turn; the figures are medians of at least 9 rounds, and where the base is not within 3 %
of itself no ratio counts. A step's kernels, copies, its memory beyond what lay there, and how often the host waits for
the GPU are counted beside.

    train     4 samples of 636 positions, 4 of them answers, with the optimizer of what trains
    prefill   16 questions of 636 positions
    decode    one token for 16 questions
    eval      16 questions about 8 picture files, with the tower: 4 tokens each, in one
              batch, one by one, and in LLaVA's own loop

``--minutes`` bounds the whole: parts that would begin later are left out, rounds are cut short, and the table says how
many there were.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts.bench import Bench, run_parts  # noqa: E402
from benchmarks.parts.contenders import SEVEN_BILLION, TINY, random_model  # noqa: E402
from benchmarks.parts.timing import ROUNDS  # noqa: E402
from llava.cli import flag, parse  # noqa: E402
from llava.devices import default_device, has_accelerator  # noqa: E402
from llava.utils import UserError, run_cli  # noqa: E402

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


def main() -> int:
    """Print a table for each part, and write the file; 1 where a part failed."""
    start = time.monotonic()
    arguments = parse(Arguments, description=__doc__)
    if not has_accelerator() and not arguments.tiny:
        raise UserError("no GPU here, and this measures one; --tiny tries the benchmark itself on the CPU")
    device = torch.device(default_device(arguments.device))
    shape, name = (TINY, "tiny") if arguments.tiny else (SEVEN_BILLION, "LLaVA-1.5-7B")
    torch.manual_seed(0)
    bench = Bench(random_model(shape, device), shape, arguments.rounds)
    return run_parts(bench, arguments.parts, name, start + 60 * arguments.minutes, arguments.json)


if __name__ == "__main__":
    run_cli(main)
