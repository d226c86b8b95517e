"""The LLaVA config and model class of a checkpoint folder, of either layout."""

from __future__ import annotations

from pathlib import Path

from llava.checkpoints.hf_layout import config_from_hf, is_hf_layout
from llava.checkpoints.kinds import language_family
from llava.checkpoints.weights import read_config, weight_files
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from llava.model.vision.towers import shipped_tower_config

FAMILIES = {"llama": LlavaLlamaForCausalLM, "mistral": LlavaMistralForCausalLM}
CONFIGS = {"llama": LlavaConfig, "mistral": LlavaMistralConfig}


def llava_config(folder: Path, weights: Path | None = None, name: str | None = None):
    """The LLaVA config of a folder, of either layout.

    Where the weights (in ``weights``, default ``folder``) hold a vision tower, the config says so afterwards.
    """
    values = read_config(folder)
    if is_hf_layout(values):
        values = config_from_hf(values)
    family = language_family(values, name or folder.name)
    config = CONFIGS[family].from_dict({key: value for key, value in values.items() if key != "model_type"})
    if getattr(config, "vision_config", None) is None and weight_files(weights or folder):
        config.vision_config = shipped_tower_config(weights or folder, config)
    return config
