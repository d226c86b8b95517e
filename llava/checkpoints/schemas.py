"""What is asked of the JSON files of a checkpoint folder before anything is built from them.

They are other people's: fields that nothing here looks at pass as they are, and a value that would fail, or build
another model, deep inside a library is refused by file, field and value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava.outside import read_object
from llava.schema import Wanted, an_object, check_fields, list_of, number, whole, words, yes_or_no
from llava.utils import UserError

WIDE = 2**20
"""Widths, heads and layers beyond this are of no model."""
_count, _positive, _text, _name = whole(1, WIDE), number(above=0), words(), words(empty=False)
_token_ids = whole(-1) | list_of(whole(-1))
_side = whole(1, WIDE) | list_of(whole(1, WIDE), 2)
_token = _text | an_object({"content": _text})

VISION: dict[str, Wanted] = {
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels"), _count
    ),
    "image_size": _side,
    "patch_size": _side,
    "hidden_act": _name,
    "model_type": _name,
    "layer_norm_eps": _positive,
    "attention_dropout": number(0, 1),
}
DECODER: dict[str, Wanted] = {
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"), _count
    ),
    "head_dim": _count,
    "vocab_size": whole(1),
    "max_position_embeddings": whole(1),
    "sliding_window": whole(1),
    "rms_norm_eps": _positive,
    "rope_theta": _positive,
    "attention_dropout": number(0, 1),
    "hidden_act": _name,
    "model_type": _name,
    "tie_word_embeddings": yes_or_no,
    "attention_bias": yes_or_no,
    "use_cache": yes_or_no,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _token_ids),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "quantization_config"), an_object()),
    **dict.fromkeys(("torch_dtype", "dtype"), _text),
}
CONFIG: dict[str, Wanted] = {
    **DECODER,
    "architectures": list_of(_text),
    "text_config": an_object(DECODER),
    "vision_config": an_object(VISION),
    "mm_vision_tower": _text,
    "mm_hidden_size": _count,
    "mm_projector_type": _text,
    "mm_vision_select_layer": whole(-WIDE, WIDE),
    "mm_vision_select_feature": _text,
    "mm_patch_merge_type": _text,
    **dict.fromkeys(("mm_use_im_start_end", "mm_use_im_patch_token", "use_mm_proj"), yes_or_no),
    "image_aspect_ratio": _text,
    "image_grid_pinpoints": list_of(list_of(whole(1, WIDE), 2)) | _text,
    "tokenizer_model_max_length": whole(1, None),
    "max_sequence_length": whole(1),
    "tokenizer_padding_side": words(("left", "right")),
    "conversation_version": _text,
    "image_token_index": whole(),
    "image_token_id": whole(),
    "vision_feature_layer": whole(-WIDE, WIDE) | list_of(whole(-WIDE, WIDE)),
    "vision_feature_select_strategy": _text,
    "projector_hidden_act": _name,
    "multimodal_projector_bias": yes_or_no,
    "base_model_name_or_path": _text,
    **dict.fromkeys(("prompt", "llava", "retriever"), an_object()),
}
TOKENIZER: dict[str, Wanted] = {
    "tokenizer_class": _text,
    "model_max_length": number(above=0),
    **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), _token),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "legacy", "clean_up_tokenization_spaces"), yes_or_no),
    "padding_side": words(("left", "right")),
    "truncation_side": words(("left", "right")),
    "chat_template": _text | list_of(an_object()) | an_object(),
    "added_tokens_decoder": an_object(),
}
_colours = list_of(number(), 3)
_size = whole(1, WIDE) | an_object(dict.fromkeys(("height", "width", "shortest_edge", "longest_edge"), whole(1, 2**40)))
PICTURES: dict[str, Wanted] = {
    "image_mean": _colours,
    "image_std": list_of(number(above=0), 3),
    "size": _size,
    "crop_size": _size,
    "rescale_factor": _positive,
    "resample": whole(0, 5),
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), yes_or_no),
    "image_processor_type": _text,
}
PROCESSOR: dict[str, Wanted] = {"image_processor": an_object(PICTURES), "processor_class": _text}
ADAPTER: dict[str, Wanted] = {
    "peft_type": _name,
    "task_type": _text,
    "base_model_name_or_path": _text,
    "r": whole(1, WIDE),
    "lora_alpha": number(),
    "lora_dropout": number(0, 1),
    "bias": words(("none", "all", "lora_only")),
    "target_modules": _text | list_of(_text),
    "exclude_modules": _text | list_of(_text),
    "modules_to_save": list_of(_text),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode"), yes_or_no),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "auto_mapping"), an_object()),
}
GENERATION: dict[str, Wanted] = {
    "temperature": number(0),
    "top_p": number(0, 1),
    "top_k": whole(0),
    "max_length": whole(1),
    "max_new_tokens": whole(1),
    "do_sample": yes_or_no,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _token_ids),
}
INDEX: dict[str, Wanted] = {"metadata": an_object(), "weight_map": an_object()}

FILES: dict[str, dict[str, Wanted]] = {
    "config.json": CONFIG,
    "tokenizer_config.json": TOKENIZER,
    "special_tokens_map.json": {},
    "added_tokens.json": {},
    "preprocessor_config.json": PICTURES,
    "processor_config.json": PROCESSOR,
    "generation_config.json": GENERATION,
    "adapter_config.json": ADAPTER,
}
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
GENERATION_FILE = "generation_config.json"
PICTURE_FILES = ("preprocessor_config.json", "processor_config.json")


def read_settings(path: Path) -> dict[str, Any]:
    """One JSON file of a checkpoint folder, known by its name.

    Raises:
        UserError: it is broken, no object, or a field is not what the file's schema says.
    """
    schema = INDEX if path.name.endswith(".index.json") else FILES.get(path.name, {})
    values = read_object(path, "file", "copy it again", bare=True)
    check_fields(values, schema, str(path), closed=False)
    if schema is CONFIG:
        _check_heads(values, f"{path}: ")
        for name in ("text_config", "vision_config"):
            _check_heads(values.get(name) or {}, f"{path}: {name}: ")
    return values


def check_settings(folder: Path, names: tuple[str, ...]) -> None:
    """Read those of some files that a folder has, for a library that reads them again.

    Raises:
        UserError: as ``read_settings``.
    """
    for name in names:
        if (folder / name).is_file():
            read_settings(folder / name)


def has_processor(folder: Path) -> bool:
    """Whether a folder says how pictures are prepared: in a file of its own, or, as of transformers 5, in a larger one.

    Raises:
        UserError: as ``read_settings``.
    """
    own, whole_one = (folder / name for name in PICTURE_FILES)
    return own.is_file() or (whole_one.is_file() and bool(read_settings(whole_one).get("image_processor")))


def _check_heads(values: dict[str, Any], where: str) -> None:
    """The heads of attention must divide its width, and be shared evenly."""
    width, heads, shared = (values.get(name) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if width and heads and not values.get("head_dim") and width % heads:
        raise UserError(f"{where}num_attention_heads is {heads}, which does not divide hidden_size {width}")
    if heads and shared and heads % shared:
        raise UserError(f"{where}num_key_value_heads is {shared}, which does not divide num_attention_heads {heads}")
