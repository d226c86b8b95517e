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

import torch

from llava.model.checkpoint import read_config, read_tensors, tensor_files, weight_files
from llava.model.hf_layout import TO_LLAVA as HF_TO_LLAVA
from llava.model.hf_layout import config_from_hf, is_hf_layout, renamed
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower, shipped_image_processor
from llava.utils import UserError, rank0_print

SLOTS_FILE = "slots.pth"
ADAPTER_CONFIG = "adapter_config.json"
PROJECTOR_FILE = "mm_projector.bin"
NON_LORA_FILE = "non_lora_trainables.bin"
TOWER_PREFIX = "model.vision_tower."
PROJECTOR_PREFIX = "model.mm_projector."

FAMILIES = {"llama": LlavaLlamaForCausalLM, "mistral": LlavaMistralForCausalLM}
CONFIGS = {"llama": LlavaConfig, "mistral": LlavaMistralConfig}
LEGACY_TYPE = "llava"
HEAD_WIDTH = 64
"""Width of an attention head in every published CLIP vision tower."""


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
    if _names_llava(values):
        return "llava", f"config.json says model type {values.get('model_type')!r}"
    if any(key.startswith(PROJECTOR_PREFIX) for key in tensor_files(folder)):
        return "llava", f"the weights hold {PROJECTOR_PREFIX}*"
    return "plain", f"model type {values.get('model_type')!r}, no projector, no vision tower"


def _names_llava(values: dict) -> bool:
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


def llava_class(values: dict, name: str = ""):
    """The model class for a config, or ``None`` for a plain language model."""
    if not (is_hf_layout(values) or _names_llava(values)):
        return None
    return FAMILIES[language_family(values.get("text_config") or values, name)]


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


def load_vision_tower(folder: Path, device: str = "cpu") -> CLIPVisionTower:
    """The tower of a LLaVA checkpoint without its language model, with ``image_processor`` set."""
    config = llava_config(folder)
    shipped = getattr(config, "vision_config", None)
    name = getattr(config, "mm_vision_tower", None) or ""
    tower = CLIPVisionTower(name, args=config, vision_config=shipped, delay_load=True)
    if shipped is None:
        tower.load_model()
        return tower.to(device).eval()
    state: dict[str, torch.Tensor] = {}
    table = HF_TO_LLAVA if is_hf_layout(read_config(folder)) else {}
    names = {key: renamed(key, table) for key in tensor_files(folder)}
    places = [key for key, name in names.items() if name.startswith(TOWER_PREFIX)]
    for key, value in read_tensors(folder, places).items():
        state[names[key].removeprefix(TOWER_PREFIX).replace(".vision_model.", ".")] = value.float()
    missing, unexpected = tower.load_state_dict(state, strict=False)
    unexpected = [key for key in unexpected if not key.endswith("position_ids")]
    if missing or unexpected:
        raise UserError(f"{folder}: vision tower weights do not fit; missing {missing}, unexpected {unexpected}")
    tower.image_processor = shipped_image_processor(folder, tower.config)
    return tower.to(device).eval()
