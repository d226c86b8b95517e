"""The Hugging Face layout of LLaVA (``LlavaForConditionalGeneration``), as names and config fields, both ways.

| Hugging Face | LLaVA |
| --- | --- |
| ``language_model.model.*``, ``language_model.lm_head.*`` | ``model.*``, ``lm_head.*`` |
| ``multi_modal_projector.linear_{1,2}.*`` | ``model.mm_projector.{0,2}.*`` |
| ``vision_tower.[vision_model.]*`` | ``model.vision_tower.vision_tower.[vision_model.]*`` |
| ``image_newline`` (1.6) | ``model.image_newline`` |
| ``text_config``, ``vision_config`` | the config itself, ``vision_config`` |
| ``image_grid_pinpoints`` in (height, width) | in (width, height) |

Only names and plain dicts here; ``convert`` moves the tensors, ``builder`` loads them directly.
"""

from __future__ import annotations

import re
from typing import Any

from llava.outside import foreign
from llava.utils import UserError

HF_ARCHITECTURES = ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")
TEXT_FAMILIES = ("llama", "mistral")
DEFAULT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

# By (hidden size, patch size, picture size): the name LLaVA's own code looks for. Here the shipped weights are used.
KNOWN_TOWERS = {
    (1024, 14, 336): "openai/clip-vit-large-patch14-336",
    (1024, 14, 224): "openai/clip-vit-large-patch14",
}
# In order; the first pattern that fits names the tensor. Written with "^" and groups, as transformers' key_mapping
# takes them too. The second spelling of a part is the one that models have in memory.
TO_LLAVA = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.(?:model\.)?": "model.",
    r"^(?:model\.)?multi_modal_projector\.linear_1\.": "model.mm_projector.0.",
    r"^(?:model\.)?multi_modal_projector\.linear_2\.": "model.mm_projector.2.",
    r"^(?:model\.)?vision_tower\.(?!vision_tower)": "model.vision_tower.vision_tower.",
    r"^image_newline": "model.image_newline",
}
TO_HF = {
    r"^lm_head\.": "language_model.lm_head.",
    r"^model\.mm_projector\.0\.": "multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "multi_modal_projector.linear_2.",
    r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?": "vision_tower.vision_model.",
    r"^model\.image_newline": "image_newline",
    r"^model\.": "language_model.model.",
}
# What a LLaVA config has no word for elsewhere: kept under one key, so that there and back is the same config.
KEPT_KEY = "llava"
KEPT = (
    "image_aspect_ratio",
    "conversation_version",
    "mm_vision_tower",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "mm_hidden_size",
    "mm_use_im_start_end",
    "mm_use_im_patch_token",
    "mm_patch_merge_type",
    "use_mm_proj",
)


def is_hf_layout(values: dict[str, Any]) -> bool:
    """Whether ``config.json`` values are Hugging Face's LLaVA config (which shares ``model_type: llava`` with ours)."""
    named = any(name in HF_ARCHITECTURES for name in values.get("architectures") or [])
    return named or ("text_config" in values and "vision_config" in values)


def renamed(key: str, table: dict[str, str]) -> str:
    """``key`` after the first fitting pattern of ``TO_LLAVA`` or ``TO_HF``."""
    for pattern, replacement in table.items():
        name, count = re.subn(pattern, replacement, key)
        if count:
            return name
    return key


def config_from_hf(values: dict[str, Any]) -> dict[str, Any]:
    """LLaVA config values from Hugging Face's.

    Raises:
        UserError: a decoder, a vision tower or a projector that LLaVA has no name for.
    """
    text, vision = dict(values.get("text_config") or {}), dict(values.get("vision_config") or {})
    family, tower = text.get("model_type", "llama"), vision.get("model_type", "clip_vision_model")
    layer, anyres = values.get("vision_feature_layer", -2), "LlavaNext" in str(values.get("architectures"))
    anyres = anyres or values.get("model_type") == "llava_next"
    plain_projector = values.get("projector_hidden_act", "gelu") == "gelu"
    plain_projector = plain_projector and values.get("multimodal_projector_bias") is not False
    for fits, problem in (
        (family in TEXT_FAMILIES, f"the language model is {family!r} (llama and mistral are known)"),
        (tower == "clip_vision_model", f"the vision tower is {tower!r} (clip_vision_model is known)"),
        (isinstance(layer, int), f"vision_feature_layer is {layer!r} (one layer is known)"),
        (plain_projector, "the projector is not two linear layers with GELU and bias"),
    ):
        if not fits:
            raise UserError(f"cannot read this Hugging Face LLaVA checkpoint: {problem}")
    text, vision = _parsed(values, anyres)
    select = values.get("vision_feature_select_strategy", "default")
    result = {
        **text,
        "model_type": f"llava_{family}",
        "architectures": ["LlavaLlamaForCausalLM" if family == "llama" else "LlavaMistralForCausalLM"],
        "vision_config": vision,
        "mm_vision_tower": KNOWN_TOWERS.get((vision["hidden_size"], vision["patch_size"], vision["image_size"]), ""),
        "mm_hidden_size": vision["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": layer,
        "mm_vision_select_feature": "patch" if select == "default" else "cls_patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tokenizer_padding_side": "right",
        "image_aspect_ratio": "pad",
        "dtype": values.get("dtype") or values.get("torch_dtype"),
        "tie_word_embeddings": values.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
    }
    if anyres:
        pinpoints = values.get("image_grid_pinpoints") or DEFAULT_PINPOINTS
        result["image_grid_pinpoints"] = [[width, height] for height, width in pinpoints]
        result |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    return {**result, **(values.get(KEPT_KEY) or {})}


def config_to_hf(values: dict[str, Any], vision: dict[str, Any], image_token: int) -> dict[str, Any]:
    """Hugging Face's config values from LLaVA's; ``vision`` is the tower's config, ``image_token`` the id of <image>.

    Raises:
        UserError: a projector or tile layout that Hugging Face's classes don't have.
    """
    if values.get("mm_projector_type") != "mlp2x_gelu":
        raise UserError(
            f"mm_projector_type is {values.get('mm_projector_type')!r}; the Hugging Face layout has mlp2x_gelu only"
        )
    anyres, merge = values.get("image_aspect_ratio") == "anyres", values.get("mm_patch_merge_type") or "flat"
    if anyres and merge != "spatial_unpad":
        raise UserError(f"anyres with mm_patch_merge_type {merge!r}; the Hugging Face layout has spatial_unpad only")
    family = "mistral" if "mistral" in values["model_type"] else "llama"
    outside = ("architectures", "vision_config", "retriever", *KEPT)
    text = {k: v for k, v in values.items() if k not in outside and not k.startswith(("mm_", "image_"))}
    dtype = text.pop("dtype", None)
    select = values.get("mm_vision_select_feature") or "patch"
    side = vision["image_size"] // vision["patch_size"]
    result = {
        "architectures": [HF_ARCHITECTURES[anyres]],
        "model_type": "llava_next" if anyres else "llava",
        "text_config": {**text, "model_type": family},
        "vision_config": {**vision, "model_type": "clip_vision_model"},
        "image_token_index": image_token,
        "image_seq_length": side**2 + (select == "cls_patch"),
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": values.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default" if select == "patch" else "full",
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
        "dtype": dtype,
        KEPT_KEY: {key: values[key] for key in KEPT if values.get(key) is not None},
    }
    if anyres:
        result["image_grid_pinpoints"] = [[height, width] for width, height in values["image_grid_pinpoints"]]
    return result


def _parsed(values: dict[str, Any], anyres: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Text and vision config as transformers reads them: published configs leave its defaults out."""
    from transformers import LlavaConfig, LlavaNextConfig

    with foreign("config.json of the Hugging Face LLaVA checkpoint", "copy it again"):
        config: Any = (LlavaNextConfig if anyres else LlavaConfig).from_dict(values)
    text, vision = (
        {key: value for key, value in part.to_dict().items() if key not in ("architectures", "transformers_version")}
        for part in (config.text_config, config.vision_config)
    )
    return text, vision
