"""Write what the loader reads, whatever its layout and files, as one checkpoint of safetensors that needs no other.

    python -m llava.model.consolidate --src checkpoints/llava-v1.5-7b --dst checkpoints/llava-v1.5-7b-whole

LLaVA's command, and ``scripts/merge_lora_weights.py`` with a base. The weights keep their precision (LLaVA's turn into
float16); the vision tower is written too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.cli import flag, parse
from llava.utils import UserError, quiet_libraries, run_cli


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    src: str = flag(help="checkpoint folder or hub id")
    dst: str = flag(help="new folder")


def consolidate_ckpt(src_path: str, dst_path: str, model_base: str | None = None) -> None:
    """Load ``src_path`` (a LoRA or a projector: over ``model_base``) and write it whole to the new folder ``dst_path``.

    Raises:
        UserError: it cannot be loaded, or holds slots, which no plain checkpoint can; ``dst_path`` is there already.
    """
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model
    from llava.model.saving import save_whole_model

    options: dict[str, Any] = {"device": "cpu", "dtype": "auto"}
    name = get_model_name_from_path(src_path)
    tokenizer, model, image_processor, _ = load_pretrained_model(src_path, model_base, name, **options)
    if getattr(model, "retriever", None) is not None:
        raise UserError(
            f"{src_path} holds slots, which route each question; they cannot be merged into the weights (a stage that "
            "needs no base: model.save_pretrained)"
        )
    made_of = [src_path] if model_base is None else [src_path, model_base]
    save_whole_model(Path(dst_path), tokenizer, model, image_processor, made_of=made_of)


def main() -> None:
    """Command line."""
    arguments = parse(Arguments, description=__doc__)
    quiet_libraries()
    consolidate_ckpt(arguments.src, arguments.dst)


if __name__ == "__main__":
    run_cli(main)
