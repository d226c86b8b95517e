"""What slots cost an answer: the first pass over 16 questions, and a step of one token for each.

    python benchmarks/decode.py --base output/llava-medical-base --json output/decode.json

Contenders share the base's weights: the base, the base against itself, our slots with 3 stored tasks, whose slots all
questions of a batch share, and with 1,000, where each question gathers its own; PEFT's LoRA as a mixed batch of 3 and
of 16 adapters; base and slots one question after the other. They take a step in turn; the figures are medians
(``benchmarks/parts/timing.py``).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts import on_cpu  # noqa: E402
from llava.utils import run_cli  # noqa: E402


def main() -> int:
    """Print the tables, and write the file."""
    return on_cpu.main(("prefill", "decode"), __doc__)


if __name__ == "__main__":
    run_cli(main)
