"""Take the projector out of a checkpoint (LLaVA's layout or Hugging Face's) as ``mm_projector.bin``.

    python scripts/extract_mm_projector.py --model-path llava-v1.5-7b --output projector/mm_projector.bin

The config is written beside it: a folder with both loads over its language model (``--model-base``).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.cli import flag, parse
from llava.files import atomic_write
from llava.utils import UserError, quiet_libraries, run_cli


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    model_path: str = flag(help="full checkpoint, folder or hub name")
    output: str = flag(help="file to write, such as projector/mm_projector.bin")


def main() -> None:
    """Command line."""
    arguments = parse(Arguments, description=__doc__)
    quiet_libraries()
    import torch

    from llava.checkpoints.checkpoint import Checkpoint
    from llava.checkpoints.kinds import PROJECTOR_PREFIX
    from llava.model.configs import llava_config

    checkpoint, output = Checkpoint.open(arguments.model_path), Path(arguments.output)
    names = checkpoint.llava_names
    wanted = [key for key, name in names.items() if name.startswith((PROJECTOR_PREFIX, "model.image_newline"))]
    if not wanted:
        raise UserError(
            f"{checkpoint} holds no projector tensors ({PROJECTOR_PREFIX}*); is it a full LLaVA checkpoint?"
        )
    state = {names[key]: value.clone() for key, value in checkpoint.read_tensors(wanted).items()}
    with atomic_write(output, "wb") as stream:
        torch.save(state, stream)
    if not (output.parent / "config.json").exists():
        config = llava_config(checkpoint)
        if not (getattr(config, "mm_vision_tower", None) or ""):
            print("note: the checkpoint ships its vision tower and names none; set mm_vision_tower in config.json")
        config.vision_config = None
        config.save_pretrained(output.parent)
    print(f"{output}: {len(state)} tensors of {checkpoint}")


if __name__ == "__main__":
    run_cli(main)
