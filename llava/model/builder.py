"""Load any checkpoint by its content; print which rule fired.

| found in the folder | what it is |
| --- | --- |
| ``slots.pth``, no weights | a stage checkpoint of this project: its slots over ``model_base`` (or the base it names) |
| ``slots.pth`` and weights | the same, self-contained (``--save_full_model``) |
| ``mm_projector.bin``, no weights | a projector for the language model in ``model_base`` |
| config with a LLaVA model type or architecture | a full LLaVA checkpoint (Llama or Mistral decoder) |
| any other config | a plain language model (no pictures) |

The folder's name breaks no tie here; ``model_name`` is accepted for LLaVA's callers and only checked.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers import CLIPImageProcessorPil as CLIPImageProcessor  # the one that needs no torchvision

from llava.model.checkpoint import (
    fingerprint,
    read_config,
    read_tensors,
    resolve_checkpoint,
    tensor_files,
    weight_files,
)
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.query_encoder import encoder_from_identity
from llava.model.language_model.slot_file import SlotFile, read_slot_file, retriever_from
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.utils import UserError, rank0_print

SLOTS_FILE = "slots.pth"
TOWER_PREFIX = "model.vision_tower."
DEFAULT_CONTEXT = 2048
LLAVA_TYPES = {"llava_llama": LlavaLlamaForCausalLM, "llava": LlavaLlamaForCausalLM}
LLAVA_ARCHITECTURES = {"LlavaLlamaForCausalLM": LlavaLlamaForCausalLM}


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
        model_path: checkpoint folder or hub name. model_base: base model of a light checkpoint.
        load_8bit, load_4bit: quantise the base with bitsandbytes; slots, projector and tower keep full precision.
        device_map, device: ``device_map`` is used on GPUs; on ``cpu`` everything is float32 on the CPU.
        dtype: of the weights; default: the checkpoint's own on a GPU, float32 on the CPU.

    Returns:
        ``(tokenizer, model, image_processor, context_len)``; ``image_processor`` is ``None`` for a text-only model.

    Raises:
        UserError: the folder is missing, is no checkpoint, needs a base, or does not fit its base.
    """
    folder = resolve_checkpoint(model_path)
    has_slots, has_weights = (folder / SLOTS_FILE).is_file(), bool(weight_files(folder))
    slots = read_slot_file(folder / SLOTS_FILE) if has_slots else None
    if has_slots and not has_weights:
        base = stage_base(folder, slots, model_base)
        rank0_print(f"loading slots of {[task.name for task in slots.tasks]} from {folder} over base {base}")
    elif (folder / "mm_projector.bin").is_file() and not has_weights:
        if model_base is None:
            raise UserError(f"{folder} holds only a projector; give its language model as --model-base")
        base = resolve_checkpoint(model_base)
        rank0_print(f"loading the projector in {folder} over the language model {base}")
    else:
        base = folder
        if not has_weights:
            raise UserError(f"{folder}: neither weights nor {SLOTS_FILE} found, so there is nothing to load")
    options = loading_options(load_8bit, load_4bit, device_map, device, use_flash_attn, attn_implementation, dtype)
    model, tokenizer, image_processor = load_base(base, config_from=folder, **options, **kwargs)
    if slots is not None:
        attach_slots(model, slots, base)
    if base != folder and (folder / "mm_projector.bin").is_file():
        _load_projector(model, folder / "mm_projector.bin")
    context = getattr(model.config, "max_sequence_length", None) or DEFAULT_CONTEXT
    return tokenizer, model.eval(), image_processor, context


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
        skipped = ["lm_head", "mm_projector", "vision_tower", "retriever"]
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=load_8bit,
            load_in_4bit=load_4bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype or (torch.float32 if device == "cpu" else torch.float16),
            llm_int8_skip_modules=skipped,
        )
    if device == "cpu":
        return {
            **options,
            "dtype": dtype or torch.float32,
            "device_map": {"": "cpu"} if load_8bit or load_4bit else None,
        }
    return {**options, "dtype": dtype or "auto", "device_map": device_map if device == "cuda" else {"": device}}


def attention(wanted: str | None, use_flash_attn: bool = False) -> str:
    """The attention implementation: SDPA unless another is asked for; FlashAttention only where it is installed."""
    from transformers.utils import is_flash_attn_2_available

    wanted = wanted or ("flash_attention_2" if use_flash_attn else "sdpa")
    if wanted == "flash_attention_2" and not is_flash_attn_2_available():
        rank0_print("FlashAttention is not installed or finds no GPU; using SDPA instead")
        return "sdpa"
    return wanted


def load_base(folder: Path, config_from: Path | None = None, **options):
    """A full checkpoint: ``(model, tokenizer, image_processor)``. ``config_from`` may name a projector's folder."""
    values = read_config(folder)
    model_class = llava_class(values)
    projector_only = config_from is not None and config_from != folder and (config_from / "mm_projector.bin").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if model_class is None and not projector_only:
        rank0_print(
            f"{folder}: model type {values.get('model_type')!r} is a plain language model, pictures are ignored"
        )
        return AutoModelForCausalLM.from_pretrained(folder, **options), tokenizer, None
    config = llava_config(config_from if projector_only else folder, weights=folder)
    rank0_print(f"{folder}: LLaVA checkpoint (model type {values.get('model_type')!r})")
    model, report = (model_class or LlavaLlamaForCausalLM).from_pretrained(
        folder, config=config, output_loading_info=True, **options
    )
    _check_loading(folder, report, projector_only)
    _sanitise_generation(model)
    tower = model.get_vision_tower()
    if tower is None:
        return model, tokenizer, None
    if tower.is_loaded:
        tower.image_processor = _shipped_image_processor(folder, tower)
    else:
        tower.load_model()
        tower.to(device=model.device, dtype=model.get_model().embed_tokens.weight.dtype)
    return model, tokenizer, tower.image_processor


def llava_class(values: dict):
    """The model class for a config, or ``None`` for a plain language model. ``UserError`` for other LLaVA layouts."""
    architectures = values.get("architectures") or []
    for name in architectures:
        if name in LLAVA_ARCHITECTURES:
            return LLAVA_ARCHITECTURES[name]
    if "LlavaForConditionalGeneration" in architectures or "text_config" in values:
        raise UserError("this checkpoint has the Hugging Face LLaVA layout; convert it to LLaVA's own layout first")
    return LLAVA_TYPES.get(values.get("model_type"))


def llava_config(folder: Path, weights: Path | None = None) -> LlavaConfig:
    """The config of a LLaVA checkpoint. Where its weights hold a vision tower, the config says so afterwards."""
    values = read_config(folder)
    values.pop("model_type", None)
    config = LlavaConfig.from_dict(values)
    has_tower = any(key.startswith(TOWER_PREFIX) for key in tensor_files(weights or folder))
    if has_tower and getattr(config, "vision_config", None) is None:
        name = getattr(config, "mm_vision_tower", None)
        config.vision_config = CLIPVisionTower(name, args=config, delay_load=True).config.to_dict()
    return config


def load_vision_tower(folder: Path, device: str = "cpu") -> CLIPVisionTower:
    """The tower of a LLaVA checkpoint without its language model, with ``image_processor`` set."""
    config = llava_config(folder)
    tower = CLIPVisionTower(
        getattr(config, "mm_vision_tower", None) or "",
        args=config,
        vision_config=getattr(config, "vision_config", None),
        delay_load=True,
    )
    if not tower.is_loaded:
        tower.load_model()
    else:
        keys = [key for key in tensor_files(folder) if key.startswith(TOWER_PREFIX)]
        state = {key.removeprefix(TOWER_PREFIX): value for key, value in read_tensors(folder, keys).items()}
        state = {key.replace(".vision_model.", "."): value.float() for key, value in state.items()}
        missing, unexpected = tower.load_state_dict(state, strict=False)
        if missing or unexpected:
            raise UserError(f"{folder}: vision tower weights do not fit; missing {missing}, unexpected {unexpected}")
        tower.image_processor = _shipped_image_processor(folder, tower)
    return tower.to(device).eval()


def stage_base(folder: Path, slots: SlotFile, model_base: str | None) -> Path:
    """The base of a light stage checkpoint: ``model_base``, else the path it was trained with."""
    name = model_base or slots.base.get("path")
    if not name:
        raise UserError(f"{folder} holds only slots; give the base model they were trained on as --model-base")
    return resolve_checkpoint(name)


def attach_slots(model, slots: SlotFile, base: Path, with_encoder: bool = True) -> None:
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
    retriever = retriever_from(slots)
    if with_encoder and slots.settings.uses_text and slots.settings.encoder:
        retriever.encode_text = encoder_from_identity(slots.settings.encoder, base)
    model.attach_retriever(retriever)


def _check_loading(folder: Path, report: dict, projector_only: bool) -> None:
    harmless = ("rotary_emb.inv_freq", "position_ids")
    missing = sorted(key for key in report["missing_keys"] if not key.endswith(harmless))
    if projector_only:
        missing = [key for key in missing if "mm_projector" not in key]
    unexpected = sorted(key for key in report["unexpected_keys"] if not key.endswith(harmless))
    for what, keys in (("lacks", missing), ("has no place for", unexpected)):
        if keys:
            raise UserError(f"{folder}: the checkpoint {what} {len(keys)} tensors, among them {', '.join(keys[:4])}")


def _load_projector(model, path: Path) -> None:
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = {key.split("mm_projector.")[-1]: value for key, value in state.items() if "mm_projector." in key}
    projector = model.get_model().mm_projector
    projector.load_state_dict({key: value.to(next(projector.parameters()).dtype) for key, value in state.items()})


def _sanitise_generation(model) -> None:
    """Published Vicuna settings carry a temperature without sampling, which newer transformers refuse to save."""
    settings = model.generation_config
    if settings is not None and not settings.do_sample:
        settings.temperature = settings.top_p = settings.top_k = None


def _shipped_image_processor(folder: Path, tower: CLIPVisionTower):
    if (folder / "preprocessor_config.json").is_file():
        return CLIPImageProcessor.from_pretrained(folder)
    size = tower.config.image_size
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
