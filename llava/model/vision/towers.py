"""The config of a vision tower that a checkpoint ships: from its own config, the tower it names, or tensor shapes."""

from __future__ import annotations

from pathlib import Path

from llava.checkpoints.hf_layout import config_from_hf, is_hf_layout
from llava.checkpoints.kinds import TOWER_PREFIX
from llava.checkpoints.weights import read_config, read_tensors, tensor_files
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.utils import rank0_print

HEAD_WIDTH = 64
"""Width of an attention head in every published CLIP vision tower."""


def shipped_tower_config(folder: Path, config) -> dict | None:
    """The vision config of the tower whose weights a checkpoint holds, ``None`` if it holds none.

    Taken from the checkpoint's own config, else from the tower that ``mm_vision_tower`` names where that is at hand,
    else read off the tensors' shapes.
    """
    own = read_config(folder)
    if own.get("vision_config") is not None:
        return config_from_hf(own)["vision_config"] if is_hf_layout(own) else own["vision_config"]
    keys = [key for key in tensor_files(folder) if key.startswith(TOWER_PREFIX)]
    if not keys:
        return None
    name = getattr(config, "mm_vision_tower", None) or ""
    if name:
        try:
            return CLIPVisionTower(name, args=config, delay_load=True).config.to_dict()
        except OSError:
            rank0_print(f"note: {name} is not at hand; the vision tower's shape is read off the checkpoint's tensors")
    return tower_config_from_tensors(folder, keys)


def tower_config_from_tensors(folder: Path, keys: list[str]) -> dict:
    """A CLIP vision config from tensor shapes; heads are 64 wide and the activation is OpenAI's, as in LLaVA's."""

    def key(ending: str) -> str:
        return next(key for key in keys if key.endswith(ending))

    wanted = [key("patch_embedding.weight"), key("position_embedding.weight"), key("layers.0.mlp.fc1.weight")]
    tensors = read_tensors(folder, wanted)
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
