"""Load any checkpoint by its content (``layouts``), over a base where it needs one; print which rule fired."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llava.checkpoints.hf_layout import TO_LLAVA as HF_TO_LLAVA
from llava.checkpoints.kinds import ADAPTER_CONFIG, PROJECTOR_PREFIX, SLOTS_FILE, checkpoint_kind, language_family
from llava.checkpoints.tokenizer import load_tokenizer
from llava.checkpoints.weights import fingerprint, read_config, resolve_checkpoint, weight_files
from llava.model.adapters import adapter_base, apply_adapter, load_extra_tensors
from llava.model.configs import FAMILIES, llava_config
from llava.model.language_model.retriever import Retriever
from llava.model.multimodal_encoder.clip_encoder import shipped_image_processor
from llava.model.vision.features import load_vision_tower
from llava.slots.encoders import encoder_from_identity
from llava.slots.offsets import target_features
from llava.slots.pool import Pool
from llava.utils import UserError, rank0_print

__all__ = ["SLOTS_FILE", "attach_slots", "load_base", "load_pretrained_model", "load_vision_tower", "llava_config"]

DEFAULT_CONTEXT = 2048
NEWLINE = "model.image_newline"
HARMLESS = ("rotary_emb.inv_freq", "position_ids")
"""Endings of tensors that old checkpoints hold and the model computes, or the reverse."""


def load_pretrained_model(
    model_path: str,
    model_base: str | None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | dict | None = "auto",
    device: str = "cuda",
    use_flash_attn: bool = False,
    attn_implementation: str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs,
):
    """Load a model for inference.

    Args:
        model_path: checkpoint folder or hub name. model_base: base model of a checkpoint that is none by itself.
        model_name: decides only where the content allows two readings (default: the folder's name).
        load_8bit, load_4bit: quantise the base with bitsandbytes; slots, projector and tower keep full precision.
        device_map, device: ``device_map`` is used on GPUs; on ``cpu`` everything is float32 on the CPU.
        dtype: of the weights; default: the checkpoint's own on a GPU, float32 on the CPU.

    Returns:
        ``(tokenizer, model, image_processor, context_len)``; ``image_processor`` is ``None`` for a text-only model.

    Raises:
        UserError: the folder is missing, is no checkpoint, needs a base, or does not fit its base.
    """
    folder = resolve_checkpoint(model_path)
    kind, rule = checkpoint_kind(folder, model_name)
    slots = Pool.read(folder / SLOTS_FILE) if kind == "stage" else None
    base = _base_of(folder, kind, slots, model_base)
    rank0_print(f"{folder}: {_DESCRIPTION[kind]}{f' over base {base}' if base != folder else ''} ({rule})")
    options = loading_options(load_8bit, load_4bit, device_map, device, use_flash_attn, attn_implementation, dtype)
    over = folder if kind in ("lora", "projector") else None
    model, tokenizer, image_processor = load_base(base, config_from=over, name=model_name, **options, **kwargs)
    if kind == "lora" or (kind == "stage" and (folder / ADAPTER_CONFIG).is_file()):
        quantised = load_8bit or load_4bit
        model = apply_adapter(model, folder, merge=not quantised)
        if quantised:
            rank0_print("LoRA kept beside the base, which is quantised")
    if slots is not None:
        attach_slots(model, slots, base)
    context = getattr(model.config, "max_sequence_length", None) or DEFAULT_CONTEXT
    return tokenizer, model.eval(), image_processor, context


_DESCRIPTION = {
    "stage": "slots of a continual run",
    "lora": "LoRA adapter",
    "projector": "projector",
    "hf": "Hugging Face LLaVA checkpoint",
    "llava": "LLaVA checkpoint",
    "plain": "plain language model, pictures are ignored",
}


def _base_of(folder: Path, kind: str, slots: Pool | None, model_base: str | None) -> Path:
    """The folder that holds the full weights: the checkpoint itself, or its base."""
    if kind == "stage" and not weight_files(folder):
        return stage_base(folder, slots, model_base)
    if kind == "lora":
        return resolve_checkpoint(adapter_base(folder, model_base))
    if kind == "projector":
        if model_base is None:
            raise UserError(f"{folder} holds only a projector; give its language model as --model-base")
        return resolve_checkpoint(model_base)
    return folder


def loading_options(
    load_8bit=False,
    load_4bit=False,
    device_map="auto",
    device="cuda",
    use_flash_attn=False,
    attn_implementation=None,
    dtype=None,
) -> dict:
    """Keyword arguments for ``from_pretrained`` from LLaVA's loading flags."""
    options: dict = {"attn_implementation": attention(attn_implementation, use_flash_attn)}
    if load_8bit and load_4bit:
        raise UserError("choose one of --load-8bit and --load-4bit")
    if load_8bit or load_4bit:
        compute = dtype or (torch.float32 if device == "cpu" else torch.float16)
        options["quantization_config"] = quantization_config(8 if load_8bit else 4, compute)
    if device == "cpu":
        return {
            **options,
            "dtype": dtype or torch.float32,
            "device_map": {"": "cpu"} if load_8bit or load_4bit else None,
        }
    return {**options, "dtype": dtype or "auto", "device_map": device_map if device == "cuda" else {"": device}}


def quantization_config(
    bits: int, compute: torch.dtype, double_quant: bool = True, quant_type: str = "nf4"
) -> BitsAndBytesConfig:
    """Bitsandbytes settings for the decoder; head, projector, tower and slots keep their precision."""
    return BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=["lm_head", "model.mm_projector", "model.vision_tower", "retriever"],
    )


def attention(wanted: str | None, use_flash_attn: bool = False) -> str:
    """The attention implementation: SDPA unless another is asked for; FlashAttention only where it is installed."""
    from transformers.utils import is_flash_attn_2_available

    wanted = wanted or ("flash_attention_2" if use_flash_attn else "sdpa")
    if wanted == "flash_attention_2" and not is_flash_attn_2_available():
        rank0_print("FlashAttention is not installed or finds no GPU; using SDPA instead")
        return "sdpa"
    return wanted


def load_base(folder: Path, config_from: Path | None = None, name: str | None = None, **options):
    """A checkpoint with full weights: ``(model, tokenizer, image_processor)``.

    Args:
        config_from: a projector's or LoRA's folder: its config and its tensors go over the base's.
        options: for ``from_pretrained``.
    """
    kind, _ = checkpoint_kind(folder, name)
    if not weight_files(folder):
        raise UserError(f"{folder} is itself no full model ({_DESCRIPTION[kind]}); give the base it was trained on")
    tokenizer = load_tokenizer(folder)
    if kind == "plain" and config_from is None:
        return AutoModelForCausalLM.from_pretrained(folder, **options), tokenizer, None
    config = llava_config(_config_folder(folder, config_from, kind), weights=folder, name=name)
    if config_from is not None:
        config.vocab_size = _vocabulary(folder)  # a longer one is in the tensors beside the adapter
    model_class = FAMILIES[language_family({"model_type": config.model_type})]
    model, report = _from_pretrained(model_class, folder, config, kind, options)
    lacking = _check_loading(folder, report, config_from is not None)
    image_processor = _ready_tower(model, folder)
    if config_from is not None:
        load_extra_tensors(model, config_from, lacking)
    _sanitise_generation(model)
    return model, tokenizer, image_processor


def _config_folder(folder: Path, config_from: Path | None, kind: str) -> Path:
    """Where the LLaVA config is: beside the adapter, else in the base."""
    if config_from is None:
        return folder
    if (config_from / "config.json").is_file():
        return config_from
    if kind == "plain":
        raise UserError(
            f"{config_from} has no config.json and {folder} is a plain language model, so the projector's type is "
            "unknown; copy config.json from the training run's final folder"
        )
    return folder


def _from_pretrained(model_class, folder: Path, config, kind: str, options: dict):
    """``(model, loading report)``; what is wrong with the files becomes a ``UserError``."""
    mapping = {"key_mapping": HF_TO_LLAVA} if kind == "hf" else {}
    try:
        model, report = model_class.from_pretrained(
            folder, config=config, output_loading_info=True, **mapping, **options
        )
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{folder}: a pytorch_model*.bin file holds more than plain tensors and is not run; get the checkpoint as "
            "safetensors"
        ) from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the weights cannot be read ({_first_line(error)}); copy them again") from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise UserError(
            f"{folder}: tensors don't have the shapes that config.json asks for ({_first_line(error)}); the config "
            "and the weights belong to different models"
        ) from error
    if mapping and "quantization_config" not in options:
        model._weight_conversions = []  # saved again, it has LLaVA's names
    return model, report


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _vocabulary(folder: Path) -> int:
    values = read_config(folder)
    return (values.get("text_config") or values).get("vocab_size", 32000)


def _ready_tower(model, folder: Path):
    """Load the vision tower if the checkpoint did not ship it; returns the image processor, ``None`` without tower."""
    tower = model.get_vision_tower()
    if tower is None:
        rank0_print(f"{folder}: the config names no vision tower; pictures are ignored")
        return None
    if tower.is_loaded:
        tower.image_processor = shipped_image_processor(folder, tower.config)
    else:
        tower.load_model()
        tower.to(device=model.device, dtype=model.get_model().embed_tokens.weight.dtype)
    return tower.image_processor


def stage_base(folder: Path, slots: Pool, model_base: str | None) -> Path:
    """The base of a light stage checkpoint: ``model_base``, else the path it was trained with."""
    name = model_base or slots.base.get("path")
    if not name:
        raise UserError(f"{folder} holds only slots; give the base model they were trained on as --model-base")
    return resolve_checkpoint(name)


def attach_slots(model, slots: Pool, base: Path, with_encoder: bool = True) -> None:
    """Give ``model`` the slots of a file made for ``base``; refuses another base or shape by name."""
    expected = slots.base.get("fingerprint")
    if expected and expected != fingerprint(base):
        raise UserError(
            f"the slots were trained on base {slots.base.get('path')} ({expected}), but {base} is {fingerprint(base)}; "
            "give the right --model-base"
        )
    layers = model.config.num_hidden_layers
    if slots.settings.num_layers != layers:
        raise UserError(f"the slots are for {slots.settings.num_layers} layers, the base model has {layers}")
    for target, (in_, out) in slots.settings.features.items():
        has_in, has_out = target_features(model.config, target)
        if (in_, out) != (has_in, has_out):
            raise UserError(
                f"the slots are for {target} of {in_} -> {out} features, the base model has {has_in} -> {has_out}"
            )
    retriever = Retriever(slots)
    if with_encoder and slots.settings.uses_text and slots.settings.encoder:
        retriever.encode_text = encoder_from_identity(slots.settings.encoder, base)
    model.attach_retriever(retriever)


def _check_loading(folder: Path, report: dict, with_extra: bool) -> list[str]:
    """Refuse a checkpoint with missing or surplus tensors, listing them.

    With ``with_extra`` the projector (and the newline of any-resolution pictures) may be missing: their names are
    returned, and ``load_extra_tensors`` must supply them.
    """
    problems = {}
    for what, kind in (("lacks", "missing_keys"), ("has no place for", "unexpected_keys")):
        problems[what] = sorted(key for key in report[kind] if not key.endswith(HARMLESS))
    problems["has another shape for"] = sorted(str(entry[0]) for entry in report.get("mismatched_keys", ()))
    supplied = [key for key in problems["lacks"] if with_extra and key.startswith((PROJECTOR_PREFIX, NEWLINE))]
    problems["lacks"] = [key for key in problems["lacks"] if key not in supplied]
    for what, keys in problems.items():
        if keys:
            raise UserError(f"{folder}: the checkpoint {what} {len(keys)} tensors, among them {', '.join(keys[:4])}")
    return supplied


def _sanitise_generation(model) -> None:
    """Published Vicuna settings carry a temperature without sampling, which newer transformers refuse to save."""
    settings = model.generation_config
    if settings is not None and not settings.do_sample:
        settings.temperature = settings.top_p = settings.top_k = None
