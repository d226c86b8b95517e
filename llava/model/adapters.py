"""LoRA adapters and projector files over a base: what LLaVA's training writes when it does not write the whole model.

- ``mm_projector.bin``: the projector (and the token embeddings, where image start and end tokens were added).
- ``adapter_config.json`` with ``adapter_model.*``: a LoRA in PEFT's format; beside it ``non_lora_trainables.bin``, the
  projector and whatever else was trained in full.

On a quantised base the LoRA stays a LoRA: merging would round it away or fail. Either way the model that comes back is
the LLaVA class itself, with or without LoRA layers inside.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from llava.checkpoints.hf_layout import TO_LLAVA, renamed
from llava.checkpoints.kinds import ADAPTER_CONFIG, NON_LORA_FILE, PROJECTOR_FILE
from llava.checkpoints.schemas import read_settings
from llava.checkpoints.weights import load_bin
from llava.outside import foreign
from llava.utils import UserError, rank0_print

PEFT_PREFIX = "base_model.model."
HF_NAMES = re.compile(r"base_model\.model\.(model\.)?(language_model|multi_modal_projector)\.")
WHOLE_TABLE = re.compile(r"\b(embed_tokens|lm_head)\.(base_layer\.)?weight$")
NOT_DECODER = r".*(vision_tower|mm_projector|retriever|lm_head).*"


def adapter_base(folder: Path, model_base: str | None) -> str:
    """The base of a LoRA folder: ``model_base``, else the one its config names."""
    if model_base:
        return model_base
    named = read_settings(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not named:
        raise UserError(f"{folder} holds a LoRA adapter that names no base; give its base as --model-base")
    rank0_print(f"base of the LoRA: {named} ({ADAPTER_CONFIG} names it)")
    return str(named)


def extra_tensors(folder: Path) -> dict[str, Tensor]:
    """Tensors trained beside a LoRA, or the projector file's, under their names in the LLaVA model."""
    found: dict[str, Tensor] = {}
    for name in (PROJECTOR_FILE, NON_LORA_FILE):
        if (folder / name).is_file():
            state = load_bin(folder / name)
            found |= {_plain_name(key): value for key, value in state.items()}
    return found


def _plain_name(key: str) -> str:
    """``base_model.model.model.mm_projector.0.weight`` -> ``model.mm_projector.0.weight``."""
    key = key.removeprefix(PEFT_PREFIX)
    if key.startswith("model.model."):  # written by runs whose names carry one "model." too many
        key = key.removeprefix("model.")
    key = key.replace("vision_tower.vision_tower.vision_model.", "vision_tower.vision_tower.")
    return f"model.{key}" if key.startswith("mm_projector.") else key


def load_extra_tensors(model: PreTrainedModel, folder: Path, lacking: list[str]) -> None:
    """Put ``mm_projector.bin`` and ``non_lora_trainables.bin`` into the model.

    Args:
        lacking: names of tensors that the base did not have; all of them must come from these files.

    Raises:
        UserError: a tensor is still missing, has no place, or another shape.
    """
    state = extra_tensors(folder)
    still = sorted(set(lacking) - set(state))
    if still:
        raise UserError(
            f"{folder}: {len(still)} tensors are neither in the base nor in {PROJECTOR_FILE} or {NON_LORA_FILE} here, "
            f"among them {', '.join(still[:3])}; copy the file from the training run's final folder"
        )
    _fit_vocabulary(model, state)
    own = model.state_dict()
    unknown = sorted(set(state) - set(own))
    if unknown:
        raise UserError(f"{folder}: the model has no place for {len(unknown)} tensors, among them {unknown[0]}")
    wrong = [key for key, value in state.items() if own[key].shape != value.shape]
    if wrong:
        raise UserError(
            f"{folder}: {wrong[0]} is {tuple(state[wrong[0]].shape)}, the model has {tuple(own[wrong[0]].shape)}; "
            "give the base it was trained on"
        )
    with torch.no_grad():
        for key, value in state.items():
            own[key].copy_(value)


def _fit_vocabulary(model: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Grow the embeddings to the rows in the file (LLaVA adds image start and end tokens)."""
    rows = next((value.shape[0] for key, value in state.items() if key.endswith("embed_tokens.weight")), None)
    table: Any = model.get_input_embeddings()
    if rows and rows != table.weight.shape[0]:
        model.resize_token_embeddings(rows)


def apply_adapter(model: PreTrainedModel, folder: Path, merge: bool, trainable: bool = False) -> PreTrainedModel:
    """``model`` with the LoRA of ``folder`` in it: merged into its weights, or as LoRA layers.

    Raises:
        UserError: the adapter does not fit the base.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    state = _adapter_tensors(folder)
    read_settings(folder / ADAPTER_CONFIG)
    with foreign(folder / ADAPTER_CONFIG, "copy it again"):
        config = PeftConfig.from_pretrained(str(folder))
    if any(HF_NAMES.match(key) for key in state):
        with tempfile.TemporaryDirectory() as renamed_folder:
            _write_renamed(Path(renamed_folder), state, config)
            return apply_adapter(model, Path(renamed_folder), merge, trainable)
    if not any(re.match(NOT_DECODER, key) for key in state) and not config.exclude_modules:
        # LLaVA names layers by their last word, and the tower, which is attached here already, has a q_proj too.
        config.exclude_modules = NOT_DECODER
    try:
        wrapped = PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=trainable)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: the LoRA does not fit the base ({reason}); give the right --model-base") from error
    whole = any(WHOLE_TABLE.search(key) for key in state)  # else PEFT guesses, by the base's config
    places = get_peft_model_state_dict(wrapped, save_embedding_layers=whole).keys()
    odd = sorted(places ^ state.keys())
    if odd:
        raise UserError(
            f"{folder}: the LoRA does not fit the base; {len(odd)} tensors have no counterpart, among them {odd[0]}; "
            "give the right --model-base"
        )
    if merge:
        if any("embed_tokens" in key or "lm_head" in key for key in state):
            untie_head(model)
        rank0_print("LoRA merged into the base")
        return cast(PreTrainedModel, wrapped.merge_and_unload())
    return cast(PreTrainedModel, wrapped.get_base_model())


def untie_head(model: PreTrainedModel) -> None:
    """Give the output head a table of its own where it shares the token embeddings'.

    What a LoRA adds to one of the two would else be added to both, and the model would answer otherwise than it was
    trained to.
    """
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    table, head = (cast(Any, getattr(layer, "base_layer", layer)) for layer in layers)
    if head is None or head.weight is not table.weight:
        return
    head.weight = torch.nn.Parameter(table.weight.detach().clone(), requires_grad=table.weight.requires_grad)
    model.config.tie_word_embeddings = False
    rank0_print("the base's head and token embeddings are one table; each has its own now, because the LoRA is on one")


def _write_renamed(folder: Path, state: dict[str, Tensor], config: Any) -> None:
    """A LoRA of Hugging Face's classes under LLaVA's names; its targets are the very layers that it has tensors for."""
    named = {f"{PEFT_PREFIX}{renamed(key.removeprefix(PEFT_PREFIX), TO_LLAVA)}": value for key, value in state.items()}
    layers = {key.removeprefix(PEFT_PREFIX).split(".lora_")[0] for key in named}
    config.target_modules, config.exclude_modules = layers, None
    config.save_pretrained(str(folder))
    save_file({key: value.contiguous() for key, value in named.items()}, folder / "adapter_model.safetensors")


def _adapter_tensors(folder: Path) -> dict[str, Tensor]:
    safe, old = (folder / f"adapter_model.{ending}" for ending in ("safetensors", "bin"))
    if safe.is_file():
        return load_file(safe)
    if old.is_file():
        return load_bin(old)
    raise UserError(f"{folder}: {ADAPTER_CONFIG} is there, but no adapter_model.safetensors or .bin; copy it")
