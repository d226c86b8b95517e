"""The names by which a checkpoint folder is told: its files, its tensors, the words of its config."""

from __future__ import annotations

from typing import Any

from llava.utils import UserError, rank0_print

SLOTS_FILE = "slots.pth"
TRAINING_FILE = "training.json"
ADAPTER_CONFIG = "adapter_config.json"
PROJECTOR_FILE = "mm_projector.bin"
NON_LORA_FILE = "non_lora_trainables.bin"
TOWER_PREFIX = "model.vision_tower."
PROJECTOR_PREFIX = "model.mm_projector."
LEGACY_TYPE = "llava"


def names_llava(values: dict[str, Any]) -> bool:
    """Whether ``config.json`` values are LLaVA's."""
    words = [values.get("model_type") or "", *(values.get("architectures") or [])]
    return any("llava" in word.lower() for word in words) or bool(values.get("mm_vision_tower"))


def language_family(values: dict[str, Any], name: str = "") -> str:
    """The decoder of a config, ``llama`` or ``mistral``; the rule is printed where the name had to decide.

    Raises:
        UserError: another decoder.
    """
    words = [*(values.get("architectures") or []), values.get("model_type") or ""]
    for word in words:
        for family in ("mistral", "llama"):
            if family in word.lower():
                return family
    if values.get("model_type") == LEGACY_TYPE:
        family = "mistral" if "mistral" in name.lower() else "llama"
        why = f"the name {name!r} holds 'mistral'" if family == "mistral" else "LLaVA's default"
        rank0_print(f"config.json names no decoder (model type 'llava'): taken as {family}, {why}")
        return family
    raise UserError(
        f"the language model is {values.get('model_type')!r} ({', '.join(words)}); Llama and Mistral decoders are known"
    )
