"""What it saves that offsets act behind the picture alone (``--offset_scope question``), at seven questions a picture.

    python benchmarks/offset_scope.py --base output/llava-medical-base --json output/offset_scope.json

Fourteen questions about two pictures, in one batch; slots on all seven projections. "base" in the tables are offsets
that act everywhere (``--offset_scope all``). A training step begins with the tower's features; *behind, first epoch*
works out what stands in front of the questions, *later epochs* finds it kept. Of the answers, *first model* works it
out once a picture, *later models* finds what an earlier stage or the base left, *whole prompts* keeps nothing. They
take their turns; the figures are medians (``benchmarks/parts/timing.py``).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts import on_cpu  # noqa: E402
from llava.utils import run_cli  # noqa: E402


def main() -> int:
    """Print the tables, and write the file."""
    return on_cpu.main(("scope_training", "scope_answers"), __doc__)


if __name__ == "__main__":
    run_cli(main)
