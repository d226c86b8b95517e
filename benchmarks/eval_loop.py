"""What slots cost an evaluation: 16 questions about 8 picture files, answered by the project's own loop.

    python benchmarks/eval_loop.py --base output/llava-medical-base --json output/eval_loop.json

Every picture is opened and looked at anew in each round. Contenders share the base's weights: the base, the base
against itself, our slots with 3 and with 1,000 stored tasks, the slots one question after the other, and LLaVA's own
loop, which looks at each question's picture anew. They take their turns; the figures are medians
(``benchmarks/parts/timing.py``).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts import on_cpu  # noqa: E402
from llava.utils import run_cli  # noqa: E402


def main() -> int:
    """Print the tables, and write the file."""
    return on_cpu.main(("eval",), __doc__)


if __name__ == "__main__":
    run_cli(main)
