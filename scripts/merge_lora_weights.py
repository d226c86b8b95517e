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
from llava.utils import UserError, quiet_libraries, run_cli


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
    from llava.checkpoints.card import NOT_CLINICAL, PIPELINE, TAGS, public_name, write_card
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model
    from llava.model.saving import save_whole_model

    name = get_model_name_from_path(arguments.model_path)
    tokenizer, model, image_processor, _ = load_pretrained_model(
        arguments.model_path, arguments.model_base, name, device="cpu", dtype="auto"
    )
    if getattr(model, "retriever", None) is not None:
        raise UserError(f"{arguments.model_path} holds slots, which route each question; there is no LoRA to merge")
    target = Path(arguments.save_model_path)
    save_whole_model(target, tokenizer, model, image_processor)
    adapter, base = public_name(arguments.model_path), public_name(arguments.model_base)
    over = f" over `{base}`" if base else ""
    about = f"# {target.name}\n\n`{adapter}`{over}, merged into one checkpoint.\n\n{NOT_CLINICAL}"
    front = {"base_model": base or adapter, "library_name": "llava", "pipeline_tag": PIPELINE, "tags": list(TAGS)}
    write_card(target, front, {"about": about})


if __name__ == "__main__":
    run_cli(main)
