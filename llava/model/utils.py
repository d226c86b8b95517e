"""LLaVA's ``auto_upgrade``: let the config of a checkpoint from LLaVA's first weeks say that it is a LLaVA.

Its ``model_type`` is ``llama``. This project's loader knows such a checkpoint by its content and needs no upgrade;
transformers' auto classes go by the config alone.
"""

from __future__ import annotations

import json

from llava.checkpoints.checkpoint import Checkpoint
from llava.checkpoints.kinds import names_llava
from llava.checkpoints.manifest import changing
from llava.files import atomic_write
from llava.utils import UserError, rank0_print

ARCHITECTURE, MODEL_TYPE = "LlavaLlamaForCausalLM", "llava_llama"


def auto_upgrade(config: str) -> None:
    """Rewrite ``config.json`` of the folder ``config`` if it is such a checkpoint, after asking on the terminal.

    Raises:
        UserError: the upgrade is refused, or there is no such folder.
    """
    checkpoint = Checkpoint.open(config)
    words = f"{checkpoint.config.get('model_type')} {checkpoint.config.get('architectures')}".lower()
    if "llava" in words or "llama" not in words or not _is_llava(checkpoint):
        return
    rank0_print(f"{checkpoint} is a LLaVA whose config.json says model type {checkpoint.config.get('model_type')!r}")
    if input("Write LLaVA's model type into it? [Y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError(f"{checkpoint}: config.json was left as it is; transformers will load a plain Llama")
    values = {**checkpoint.config, "model_type": MODEL_TYPE, "architectures": [ARCHITECTURE]}
    path = checkpoint.folder / "config.json"
    with changing(path), atomic_write(path) as stream:
        json.dump(values, stream, indent=2)
        stream.write("\n")
    rank0_print("config.json is upgraded")


def _is_llava(checkpoint: Checkpoint) -> bool:
    return names_llava(checkpoint.config) or checkpoint.kind == "llava"
