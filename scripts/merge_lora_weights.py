"""Merge a LoRA folder into its base and write a checkpoint that needs no other.

    python scripts/merge_lora_weights.py --model-path checkpoints/llava-lora --model-base lmsys/vicuna-7b-v1.5 \\
        --save-model-path checkpoints/llava-merged

Without ``--model-base`` the base is the one that ``adapter_config.json`` names. Slots of a continual run are not
merged: which of them act is decided for each question.
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

    model_path: str = flag(help="LoRA or projector folder")
    model_base: str | None = flag(None, "its base (default: the one the adapter names)")
    save_model_path: str = flag(help="new folder")


def main() -> None:
    """Command line."""
    arguments = parse(Arguments, description=__doc__)
    quiet_libraries()
    from llava.model.consolidate import consolidate_ckpt

    consolidate_ckpt(arguments.model_path, arguments.save_model_path, arguments.model_base)


if __name__ == "__main__":
    run_cli(main)
