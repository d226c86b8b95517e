"""What a checkpoint folder is, told by its content.

| found in the folder | kind |
| --- | --- |
| ``slots.pth`` | ``stage``: a stage checkpoint of this project, with weights beside it or light |
| ``adapter_config.json``, no weights | ``lora``: a LoRA adapter, mostly with ``non_lora_trainables.bin`` |
| ``mm_projector.bin``, no weights | ``projector``: a projector for the language model in ``model_base`` |
| a Hugging Face LLaVA config | ``hf``: transformers' own layout |
| a config that names LLaVA, or projector tensors | ``llava``: a full LLaVA checkpoint |
| any other config | ``plain``: a language model without pictures |

The folder's name decides only where the content allows two readings (an adapter beside full weights; a legacy
``model_type: llava`` that names no decoder). Each answer comes with the rule that gave it, for printing.
"""

from __future__ import annotations

from pathlib import Path

from llava.checkpoints.hf_layout import is_hf_layout
from llava.checkpoints.weights import read_config, tensor_files, weight_files
from llava.utils import UserError, rank0_print

SLOTS_FILE = "slots.pth"
TRAINING_FILE = "training.json"
ADAPTER_CONFIG = "adapter_config.json"
PROJECTOR_FILE = "mm_projector.bin"
NON_LORA_FILE = "non_lora_trainables.bin"
TOWER_PREFIX = "model.vision_tower."
PROJECTOR_PREFIX = "model.mm_projector."
LEGACY_TYPE = "llava"


def checkpoint_kind(folder: Path, name: str | None = None) -> tuple[str, str]:
    """``(kind, rule)`` of a folder, see the table above; ``name`` is the model's name, used for ties.

    Raises:
        UserError: the folder holds nothing that can be loaded.
    """
    has_weights = bool(weight_files(folder))
    if (folder / SLOTS_FILE).is_file():
        return "stage", f"{SLOTS_FILE} found"
    if (folder / ADAPTER_CONFIG).is_file():
        if not has_weights:
            return "lora", f"{ADAPTER_CONFIG} and no full weights found"
        if "lora" in (name or folder.name).lower():
            return "lora", f"{ADAPTER_CONFIG} and full weights found; the name holds 'lora'"
        rank0_print(f"note: {folder} holds full weights and {ADAPTER_CONFIG}; the adapter is left out")
    if not has_weights:
        if (folder / PROJECTOR_FILE).is_file():
            return "projector", f"{PROJECTOR_FILE} and no full weights found"
        raise UserError(
            f"{folder}: nothing to load (none of model*.safetensors, pytorch_model*.bin, {SLOTS_FILE}, "
            f"{ADAPTER_CONFIG}, {PROJECTOR_FILE}); check the path"
        )
    values = read_config(folder)
    if is_hf_layout(values):
        return "hf", "config.json has the Hugging Face LLaVA layout"
    if names_llava(values):
        return "llava", f"config.json says model type {values.get('model_type')!r}"
    if any(key.startswith(PROJECTOR_PREFIX) for key in tensor_files(folder)):
        return "llava", f"the weights hold {PROJECTOR_PREFIX}*"
    return "plain", f"model type {values.get('model_type')!r}, no projector, no vision tower"


def names_llava(values: dict) -> bool:
    """Whether ``config.json`` values are LLaVA's."""
    words = [values.get("model_type") or "", *(values.get("architectures") or [])]
    return any("llava" in word.lower() for word in words) or bool(values.get("mm_vision_tower"))


def language_family(values: dict, name: str = "") -> str:
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
