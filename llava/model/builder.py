"""Load any checkpoint by its content (``Checkpoint.kind``), over a base where it needs one; print which rule fired."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llava.checkpoints.checkpoint import Checkpoint, Place
from llava.checkpoints.hf_layout import TO_LLAVA as HF_TO_LLAVA
from llava.checkpoints.kinds import ADAPTER_CONFIG, PROJECTOR_PREFIX, SLOTS_FILE
from llava.checkpoints.schemas import check_settings
from llava.checkpoints.tokenizer import load_tokenizer
from llava.checkpoints.weights import HARMLESS, first_line, lacking_tensors, resolve_recorded
from llava.conversation import conv_mode_for
from llava.mm_utils import get_model_name_from_path
from llava.model.adapters import adapter_base, apply_adapter, load_extra_tensors
from llava.model.configs import FAMILIES, Config, Model, llava_config
from llava.model.loading import known_dtype, loading_options
from llava.model.saving import OWN_WEIGHTS, refuse_lost_slots, refuse_lost_weights
from llava.model.vision.features import load_vision_tower
from llava.model.vision.setup import add_picture_tokens
from llava.outside import foreign
from llava.slots.adapter import ADAPTERS, RETRIEVER, read_memory
from llava.slots.encoders import TextEncoder, encoder_from_identity
from llava.slots.offsets import target_features
from llava.slots.pool import Pool
from llava.utils import UserError, rank0_print

__all__ = ["SLOTS_FILE", "attach_slots", "load_base", "load_pretrained_model", "load_vision_tower", "llava_config"]

DEFAULT_CONTEXT = 2048
NEWLINE = "model.image_newline"


def load_pretrained_model(
    model_path: str,
    model_base: str | None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | dict[str, Any] | None = "auto",
    device: str = "cuda",
    use_flash_attn: bool = False,
    attn_implementation: str | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    overwrite_config: Mapping[str, Any] | None = None,
    multimodal: bool | None = None,
    use_flash_attention_2: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, BaseImageProcessor | None, int]:
    """Load a model for inference.

    Args:
        model_path: checkpoint folder or hub name. model_base: base model of a checkpoint that is none by itself.
        model_name: decides only where the content allows two readings (default: the folder's name).
        load_8bit, load_4bit: quantise the base with bitsandbytes; slots, projector and tower keep full precision.
        device_map, device: ``device_map`` is used on GPUs; on ``cpu`` everything is float32 on the CPU.
        dtype, torch_dtype: of the weights, also as ``"float16"`` or ``"auto"`` (the checkpoint's own); default: the
            checkpoint's own on a GPU, float32 on the CPU.
        overwrite_config: LLaVA-NeXT's: fields that replace the checkpoint's config, and a stage's prompt.
        multimodal: LLaVA-NeXT's; the content decides. use_flash_attention_2: another name of ``use_flash_attn``.
        kwargs: for ``from_pretrained``.

    Returns:
        ``(tokenizer, model, image_processor, context_len)``; ``image_processor`` is ``None`` for a text-only model.

    Raises:
        UserError: the folder is missing, is no checkpoint, needs a base, or does not fit its base; an unknown dtype.
    """
    dtype = known_dtype(torch_dtype if dtype is None else dtype)
    checkpoint = Checkpoint.open(model_path, model_name)
    kind, folder = checkpoint.kind, checkpoint.folder
    slots = Pool.read(folder / SLOTS_FILE) if kind == "stage" else None
    base = _base_of(checkpoint, slots, model_base, model_name)
    over_base = f" over base {base}" if base.folder != folder else ""
    rank0_print(f"{folder}: {_DESCRIPTION[kind]}{over_base} ({checkpoint.rule})")
    flash = use_flash_attn or use_flash_attention_2
    options = loading_options(load_8bit, load_4bit, device_map, device, flash, attn_implementation, dtype)
    options |= {"overwrite_config": overwrite_config, **kwargs}
    over = checkpoint if kind in ("lora", "projector") else None
    if slots is not None:
        model, tokenizer, image_processor = _load_stage(checkpoint, slots, base, model_base, options)
    else:
        if checkpoint.has_weights:
            refuse_lost_slots(checkpoint.config, folder)
        model, tokenizer, image_processor = load_base(base, config_from=over, **options)
        if kind == "lora":
            model = _with_lora(model, folder, options)
    context = getattr(model.config, "max_sequence_length", None) or DEFAULT_CONTEXT
    return tokenizer, model.eval(), image_processor, context


def load_stage(folder: Path, model_base: str | None = None, **options: Any) -> PreTrainedModel:
    """The model of a stage's folder with its slots; ``options`` are those of ``from_pretrained``.

    Raises:
        UserError: as ``load_pretrained_model``.
    """
    checkpoint, slots = Checkpoint.open(folder), Pool.read(folder / SLOTS_FILE)
    base = _base_of(checkpoint, slots, model_base, None)
    return _load_stage(checkpoint, slots, base, model_base, options)[0].eval()


def _load_stage(
    stage: Checkpoint, slots: Pool, base: Checkpoint, model_base: str | None, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, BaseImageProcessor | None]:
    model, tokenizer, image_processor = load_base(base, **options)
    if stage.has(ADAPTER_CONFIG):
        model = _with_lora(model, stage.folder, options)
    attach_slots(cast(Model, model), slots, base, read_memory(stage.folder))
    base_name = model_base or slots.base.get("path") or str(base)
    tell_prompt(model.config, slots, base_name, options.get("overwrite_config"))
    return model, tokenizer, image_processor


def _with_lora(model: PreTrainedModel, folder: Path, options: Mapping[str, Any]) -> PreTrainedModel:
    quantised = options.get("quantization_config") is not None
    if quantised:
        rank0_print("LoRA kept beside the base, which is quantised")
    return apply_adapter(model, folder, merge=not quantised)


_DESCRIPTION = {
    "stage": "slots of a continual run",
    "lora": "LoRA adapter",
    "projector": "projector",
    "hf": "Hugging Face LLaVA checkpoint",
    "llava": "LLaVA checkpoint",
    "plain": "plain language model, pictures are ignored",
}


def _base_of(checkpoint: Checkpoint, slots: Pool | None, model_base: str | None, name: str | None) -> Checkpoint:
    """The checkpoint that holds the full weights: itself, or its base, which goes by the same name in ties."""
    if slots is not None and not checkpoint.has_weights:
        refuse_lost_weights(checkpoint)
        recorded = slots.base.get("path")
        if not model_base and not recorded:
            raise UserError(f"{checkpoint} holds only slots; give the base model they were trained on as --model-base")
        model_base = model_base or resolve_recorded(str(recorded), checkpoint.folder)
    elif checkpoint.kind == "lora":
        model_base = adapter_base(checkpoint.folder, model_base)
    elif checkpoint.kind == "projector":
        if model_base is None:
            raise UserError(f"{checkpoint} holds only a projector; give its language model as --model-base")
    else:
        return checkpoint
    return Checkpoint.open(model_base, name)


def load_base(
    place: Place,
    config_from: Checkpoint | None = None,
    overwrite_config: Mapping[str, Any] | None = None,
    as_llava: bool = False,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, BaseImageProcessor | None]:
    """A checkpoint with full weights: ``(model, tokenizer, image_processor)``.

    Args:
        config_from: a projector's or LoRA's folder: its config and its tensors go over the base's.
        overwrite_config: fields that go over both.
        as_llava: a plain language model becomes LLaVA's class too, to which a tower and a projector can be given.
        options: for ``from_pretrained``.

    Raises:
        UserError: the checkpoint holds no full weights, or they do not fit its config.
    """
    checkpoint = Checkpoint.open(place)
    if not checkpoint.has_weights:
        described = _DESCRIPTION[checkpoint.kind]
        raise UserError(f"{checkpoint} is itself no full model ({described}); give the base it was trained on")
    tokenizer = load_tokenizer(checkpoint.folder)
    if checkpoint.kind == "plain" and config_from is None and not as_llava:
        options = {**options, **(overwrite_config or {})}
        with foreign(checkpoint.folder, "copy the model again"):
            return AutoModelForCausalLM.from_pretrained(checkpoint.folder, **options), tokenizer, None
    configured = _configured(checkpoint, config_from)
    config = llava_config(configured, weights=checkpoint)
    config.update(dict(overwrite_config or {}))
    vars(config).pop(OWN_WEIGHTS, None)  # of the files, not of what is trained over them
    if config_from is not None:
        config.vocab_size = checkpoint.vocab_size  # a longer one is in the tensors beside the adapter
        add_picture_tokens(config, tokenizer)  # the base's own has none
    model, report = _from_pretrained(FAMILIES[configured.family], checkpoint, config, options)
    lacking = _check_loading(checkpoint, report, config_from is not None)
    model.tokenizer = tokenizer
    image_processor = None if as_llava and checkpoint.kind == "plain" else _ready_tower(model, checkpoint)
    if config_from is not None:
        load_extra_tensors(model, config_from.folder, lacking)
    _sanitise_generation(model)
    return model, tokenizer, image_processor


def _configured(checkpoint: Checkpoint, config_from: Checkpoint | None) -> Checkpoint:
    """Where the LLaVA config is: beside the adapter, else in the base."""
    if config_from is None:
        return checkpoint
    if config_from.has("config.json"):
        return config_from
    if checkpoint.kind == "plain":
        raise UserError(
            f"{config_from} has no config.json and {checkpoint} is a plain language model, so the projector's type is "
            "unknown; copy config.json from the training run's final folder"
        )
    return checkpoint


def _from_pretrained(
    model_class: type[Model], checkpoint: Checkpoint, config: Config, options: dict[str, Any]
) -> tuple[Model, dict[str, Any]]:
    """``(model, loading report)``; what is wrong with the files becomes a ``UserError``."""
    folder = checkpoint.folder
    check_settings(folder, ("generation_config.json",))
    mapping: dict[str, Any] = {"key_mapping": HF_TO_LLAVA} if checkpoint.kind == "hf" else {}
    try:
        loaded: Any = model_class.from_pretrained(
            folder, config=config, output_loading_info=True, with_slots=False, **mapping, **options
        )
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{folder}: a pytorch_model*.bin file holds more than plain tensors and is not run; get the checkpoint as "
            "safetensors"
        ) from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the weights cannot be read ({first_line(error)}); copy them again") from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise UserError(
            f"{folder}: tensors don't have the shapes that config.json asks for ({first_line(error)}); the config "
            "and the weights belong to different models"
        ) from error
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        if isinstance(error, UserError) or "unexpected keyword argument" in str(error):  # one of the caller's
            raise
        raise UserError(
            f"{folder}: no model can be built as its config.json says ({first_line(error)}); copy it again"
        ) from error
    model, report = loaded
    if mapping and "quantization_config" not in options:
        model._weight_conversions = []  # saved again, it has LLaVA's names
    return model, report


def _ready_tower(model: Model, checkpoint: Checkpoint) -> BaseImageProcessor | None:
    """Load the vision tower if the checkpoint did not ship it; returns the image processor, ``None`` without tower."""
    tower = model.get_vision_tower()
    if tower is None:
        rank0_print(f"{checkpoint}: the config names no vision tower; pictures are ignored")
        return None
    if tower.is_loaded:
        tower.image_processor = tower.shipped_processor(checkpoint.folder, tower.config)
    else:
        tower.load_model()
        tower.to(device=model.device, dtype=model.get_input_embeddings().weight.dtype)
    tower.tell(model.config)
    return tower.image_processor


def check_slots_fit(config: Any, slots: Pool, base: Place) -> None:
    """Refuse slots that were made for another base than ``base``, or for a model of other shapes than ``config``'s.

    Raises:
        UserError: naming what differs.
    """
    checkpoint = Checkpoint.open(base)
    beside = checkpoint.has(SLOTS_FILE)  # the base's weights were written together with the slots, under other names
    if not beside and (found := checkpoint.other_than(slots.base)):
        raise UserError(
            f"the slots were trained on base {slots.base.get('path')}, and {checkpoint} is another: {found}; give the "
            "right --model-base, or restore it"
        )
    layers = config.num_hidden_layers
    if slots.settings.num_layers != layers:
        raise UserError(f"the slots are for {slots.settings.num_layers} layers, the base model has {layers}")
    for target, (in_, out) in slots.settings.features.items():
        has_in, has_out = target_features(config, target)
        if (in_, out) != (has_in, has_out):
            raise UserError(
                f"the slots are for {target} of {in_} -> {out} features, the base model has {has_in} -> {has_out}"
            )


def attach_slots(
    model: Model,
    slots: Pool,
    base: Place,
    memory: dict[str, torch.Tensor] | None = None,
    find_encoder: Callable[[dict[str, Any], Checkpoint], TextEncoder] = encoder_from_identity,
) -> None:
    """Give ``model`` the adapter that the slots of a file ask for, with its text encoder.

    Args:
        memory: tensors that the slots' stage keeps beside them.
        find_encoder: gives the encoder of an identity over a base; one that is at hand need not be read again.

    Raises:
        UserError: they were made for another base, an unknown adapter, or another text encoder is found here.
    """
    checkpoint = Checkpoint.open(base)
    check_slots_fit(model.config, slots, checkpoint)
    adapter = ADAPTERS.get(slots.adapter or RETRIEVER)(slots, memory or {})
    if slots.settings.uses_text and slots.settings.encoder:
        adapter.encode_text = find_encoder(slots.settings.encoder, checkpoint)
    if model.tokenizer is None:  # the model was not loaded here, and reads its questions from prompts
        model.tokenizer = load_tokenizer(checkpoint.folder)
    model.attach_adapter(adapter)
    model.stage_memory = dict(memory or {})


def tell_prompt(config, slots: Pool, base_name: str, overwrite: Mapping[str, Any] | None = None) -> None:
    """Put the stage's prompt into the model's config, so that whoever asks it finds it there.

    A stage of an older version keeps none: it is asked as its base is, whose name ``base_name`` ends with. What
    ``overwrite`` says of the config's template and picture mode goes over the stage's.
    """
    known = slots.prompt or {"conv_mode": conv_mode_for(config, get_model_name_from_path(base_name))}
    names = {"conv_mode": "conversation_version", "aspect_ratio": "image_aspect_ratio"}
    overwritten = {field: overwrite[name] for field, name in names.items() if overwrite and name in overwrite}
    known = {**known, **overwritten}
    config.prompt = known
    for field, name in names.items():
        if field in known:
            setattr(config, name, known[field])


def _check_loading(checkpoint: Checkpoint, report: Mapping[str, Any], with_extra: bool) -> list[str]:
    """Refuse a checkpoint with missing or surplus tensors, listing them.

    With ``with_extra`` the projector (and the newline of any-resolution pictures) may be missing: their names are
    returned, and ``load_extra_tensors`` must supply them.
    """
    problems = {"lacks": lacking_tensors(report)}
    problems["has no place for"] = sorted(key for key in report["unexpected_keys"] if not key.endswith(HARMLESS))
    problems["has another shape for"] = sorted(str(entry[0]) for entry in report.get("mismatched_keys", ()))
    supplied = [key for key in problems["lacks"] if with_extra and key.startswith((PROJECTOR_PREFIX, NEWLINE))]
    problems["lacks"] = [key for key in problems["lacks"] if key not in supplied]
    for what, keys in problems.items():
        if keys:
            raise UserError(
                f"{checkpoint}: the checkpoint {what} {len(keys)} tensors, among them {', '.join(keys[:4])}"
            )
    return supplied


def _sanitise_generation(model: PreTrainedModel) -> None:
    """Published Vicuna settings carry a temperature without sampling, which newer transformers refuse to save."""
    settings = model.generation_config
    if settings is not None and not settings.do_sample:
        settings.temperature = settings.top_p = settings.top_k = None
