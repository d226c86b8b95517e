"""The config of a vision tower that a checkpoint ships: from its own config, the tower it names, or tensor shapes."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from llava.checkpoints.checkpoint import Checkpoint
from llava.checkpoints.kinds import TOWER_PREFIX
from llava.model.multimodal_encoder.builder import named_tower_config
from llava.utils import rank0_print

HEAD_WIDTH = 64
"""Width of an attention head in every published CLIP vision tower."""


def shipped_tower_config(checkpoint: Checkpoint, config: PretrainedConfig) -> dict[str, Any] | None:
    """The vision config of the tower whose weights a checkpoint holds, ``None`` if it holds none.

    Taken from the checkpoint's own config, else from the tower that ``mm_vision_tower`` names where that is at hand,
    else read off the tensors' shapes.
    """
    if checkpoint.config.get("vision_config") is not None:
        return checkpoint.llava_config["vision_config"]
    keys = [key for key in checkpoint.tensor_files if key.startswith(TOWER_PREFIX)]
    if not keys:
        return None
    name = getattr(config, "mm_vision_tower", None) or ""
    if name:
        try:
            return named_tower_config(name).to_dict()
        except OSError:
            rank0_print(f"note: {name} is not at hand; the vision tower's shape is read off the checkpoint's tensors")
    return tower_config_from_tensors(checkpoint, keys)


def tower_config_from_tensors(checkpoint: Checkpoint, keys: list[str]) -> dict[str, Any]:
    """A CLIP vision config from tensor shapes; heads are 64 wide and the activation is OpenAI's, as in LLaVA's."""

    def key(ending: str) -> str:
        return next(key for key in keys if key.endswith(ending))

    wanted = [key("patch_embedding.weight"), key("position_embedding.weight"), key("layers.0.mlp.fc1.weight")]
    tensors = checkpoint.read_tensors(wanted)
    (hidden, _, size, _), (positions, _), (inner, _) = (tensors[name].shape for name in wanted)
    side = round((positions - 1) ** 0.5)
    layers = {name.split(".layers.")[1].split(".")[0] for name in keys if ".layers." in name}
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(hidden // HEAD_WIDTH, 1),
        "patch_size": size,
        "image_size": side * size,
        "hidden_act": "quick_gelu",
        "model_type": "clip_vision_model",
    }
