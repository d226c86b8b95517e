"""The LLaVA config of a checkpoint folder, of either layout, and the class of its decoder."""

from __future__ import annotations

import copy
from typing import TypeAlias

from llava.checkpoints.checkpoint import Checkpoint, Place
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from llava.model.vision.towers import shipped_tower_config
from llava.outside import foreign

Model: TypeAlias = LlavaLlamaForCausalLM | LlavaMistralForCausalLM
Config: TypeAlias = LlavaConfig | LlavaMistralConfig
FAMILIES: dict[str, type[Model]] = {"llama": LlavaLlamaForCausalLM, "mistral": LlavaMistralForCausalLM}
CONFIGS: dict[str, type[Config]] = {"llama": LlavaConfig, "mistral": LlavaMistralConfig}


def llava_config(place: Place, weights: Checkpoint | None = None) -> Config:
    """The LLaVA config of a checkpoint, of either layout.

    Where the weights (in ``weights``, default: the same checkpoint) hold a vision tower, the config says so afterwards.
    """
    checkpoint = Checkpoint.open(place)
    weights = weights or checkpoint
    values = {key: value for key, value in checkpoint.llava_config.items() if key != "model_type"}
    with foreign(checkpoint.folder / "config.json", "copy it again"):
        config = CONFIGS[checkpoint.family].from_dict(copy.deepcopy(values))  # which completes nested values in place
    if getattr(config, "vision_config", None) is None and weights.has_weights:
        config.vision_config = shipped_tower_config(weights, config)
    return config
