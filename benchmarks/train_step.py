"""What slots cost a training step, over the frozen base without any.

    python benchmarks/train_step.py --base output/llava-medical-base --json output/train_step.json

A step is forward and backward from embeddings, 4 samples with 4 answers' tokens each, and the optimizer of what trains.
Its contenders share the base's weights: the base, the base against itself, our slots on the attention outputs (with 3
and 1,000 stored tasks) and on all seven projections, PEFT's LoRA with as many weights, and the dense form of the public
prototype. They take a step in turn; the figures are medians (``benchmarks/parts/timing.py``).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts import on_cpu  # noqa: E402
from llava.utils import run_cli  # noqa: E402


def main() -> int:
    """Print the tables, and write the file."""
    return on_cpu.main(("train",), __doc__)


if __name__ == "__main__":
    run_cli(main)
