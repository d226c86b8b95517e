"""Convert a checkpoint between LLaVA's layout and Hugging Face's (LlavaForConditionalGeneration).

python scripts/convert_llava_weights.py --direction from_hf --source llava-1.5-7b-hf --target llava-1.5-7b
python scripts/convert_llava_weights.py --direction to_hf --source llava-med-v1.5 --target llava-med-v1.5-hf
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.cli import flag, parse
from llava.utils import quiet_libraries, run_cli


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    direction: str = flag(choices=("from_hf", "to_hf"))
    source: str = flag(help="checkpoint folder or hub name")
    target: str = flag(help="new folder")


def main() -> None:
    """Command line."""
    arguments = parse(Arguments, description=__doc__)
    quiet_libraries()
    from llava.checkpoints.weights import resolve_checkpoint
    from llava.model.convert import convert

    convert(resolve_checkpoint(arguments.source), Path(arguments.target), arguments.direction)


if __name__ == "__main__":
    run_cli(main)
