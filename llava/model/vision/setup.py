"""A decoder becomes a LLaVA: tower, projector and picture tokens as a training command asks for them.

What a command leaves open (``None``, or no such argument) a LLaVA keeps as it is; a decoder without pictures gets
LLaVA's defaults.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llava.checkpoints.weights import load_bin
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_projector.builder import build_vision_projector, load_projector
from llava.model.partitioned import gathered
from llava.model.vocabulary import grow_embeddings
from llava.utils import UserError, rank0_print

DEFAULTS: dict[str, Any] = {
    "mm_vision_select_layer": -1,
    "mm_vision_select_feature": "patch",
    "mm_projector_type": "linear",
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": True,
}
"""LLaVA's, for what a command leaves open about a decoder that has no pictures yet."""

MARKS = [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
MERGES = ("flat", "spatial", "spatial_unpad")


def settle(config: Any, model_args: Any) -> None:
    """Put what is asked for into a config, and LLaVA's defaults where neither it nor the command says anything.

    Raises:
        UserError: an unknown projector, or an unknown way to merge tiles.
    """
    has_pictures = bool(getattr(config, "mm_vision_tower", None) or getattr(config, "vision_config", None))
    for name, default in DEFAULTS.items():
        asked = getattr(model_args, name, None)
        if asked is None:
            asked = getattr(config, name, default) if has_pictures else default
        setattr(config, name, asked)
    if config.mm_patch_merge_type not in MERGES:
        raise UserError(f"mm_patch_merge_type is {config.mm_patch_merge_type!r}; choose from {', '.join(MERGES)}")
    if not re.fullmatch(r"linear|identity|mlp[1-9]\d*x_gelu", config.mm_projector_type or "linear"):
        raise UserError(f"mm_projector_type is {config.mm_projector_type!r}; known: linear, mlp<N>x_gelu, identity")
    wanted = getattr(model_args, "vision_tower", None)
    if wanted and not is_tower_of(config, wanted):
        config.mm_vision_tower = wanted
        vars(config).pop("vision_config", None)  # that of another tower


def is_tower_of(config: Any, name: str) -> bool:
    """Whether a config's tower is the one called ``name``, in whatever folder it lies."""
    own = getattr(config, "mm_vision_tower", None) or ""
    return bool(own) and own.rstrip("/").rsplit("/", 1)[-1] == name.rstrip("/").rsplit("/", 1)[-1]


def initialize_vision_modules(model: Any, model_args: Any) -> None:
    """Give a decoder (``LlavaMetaModel``) the tower and the projector that ``model_args`` names.

    A tower or projector that is there stays, unless another is asked for.

    Raises:
        UserError: no tower is named; one that cannot be read; a layer that it does not have; a projector file that does
            not fit.
    """
    config, tower = model.config, model.get_vision_tower()
    before = (config.mm_projector_type, config.mm_hidden_size) if tower is not None else None
    settle(config, model_args)
    if tower is not None and not (
        getattr(config, "vision_config", None) or is_tower_of(config, tower.vision_tower_name)
    ):
        tower = None  # another one is asked for
    like: Tensor = model.embed_tokens.weight
    start = torch.get_rng_state()
    if tower is None:
        tower = model.vision_tower = build_vision_tower(config, delay_load=True)
    if not tower.is_loaded:
        tower.load_model()
        tower.to(device=like.device, dtype=like.dtype)
    tower.select_layer, tower.select_feature = config.mm_vision_select_layer, config.mm_vision_select_feature
    tower.check_selection()
    tower.tell(config)
    config.mm_hidden_size, config.use_mm_proj = tower.hidden_size, True
    if config.mm_projector_type == "identity" and config.mm_hidden_size != config.hidden_size:
        raise UserError(
            f"mm_projector_type is 'identity', but the tower's features are {config.mm_hidden_size} wide and the "
            f"decoder is {config.hidden_size}; choose linear or mlp2x_gelu"
        )
    torch.set_rng_state(start)  # loading a tower draws numbers too, and under ZeRO-3 others
    if before != (config.mm_projector_type, config.mm_hidden_size):
        if before is not None:
            rank0_print(f"note: a new projector of type {config.mm_projector_type} takes the place of {before[0]}")
        model.mm_projector = build_vision_projector(config).to(device=like.device, dtype=like.dtype)
    if "unpad" in config.mm_patch_merge_type and getattr(model, "image_newline", None) is None:
        newline = torch.randn(config.hidden_size) / config.hidden_size**0.5
        model.image_newline = nn.Parameter(newline.to(device=like.device, dtype=like.dtype))
    path = getattr(model_args, "pretrain_mm_mlp_adapter", None)
    if path:
        _read_trained(model, path)


def _read_trained(model: Any, path: str) -> None:
    """Projector and newline of an ``mm_projector.bin``, wherever ZeRO-3 has put them."""
    if not Path(path).is_file():
        raise UserError(f"projector file not found: {path} (check --pretrain_mm_mlp_adapter)")
    with torch.no_grad(), gathered(list(model.mm_projector.parameters()), write=True):
        load_projector(model.mm_projector, path)
    newline = next((value for key, value in load_bin(Path(path)).items() if key.endswith("image_newline")), None)
    if newline is not None and getattr(model, "image_newline", None) is not None:
        with torch.no_grad(), gathered([model.image_newline], write=True):
            model.image_newline.copy_(newline)


def initialize_vision_tokenizer(model: Any, model_args: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Add the picture tokens that a LLaVA's prompts hold; returns how many are new.

    Their embeddings start as the mean of the others, or as ``pretrain_mm_mlp_adapter`` has learned them. With
    ``tune_mm_mlp_adapter`` the embeddings train where image start and end tokens are used, and the head does not.

    Raises:
        UserError: the projector file holds embeddings of another width.
    """
    config = model.config
    for name in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        asked = getattr(model_args, name, None)
        setattr(config, name, getattr(config, name) if asked is None else asked)
    added = add_picture_tokens(config, tokenizer)
    grow_embeddings(model, tokenizer, added)
    path, marks = getattr(model_args, "pretrain_mm_mlp_adapter", None), bool(config.mm_use_im_start_end)
    if marks and path:
        _read_embeddings(model, path, [tokenizer.get_vocab()[mark] for mark in MARKS])
    if getattr(model_args, "tune_mm_mlp_adapter", False) and (marks or config.mm_use_im_patch_token):
        model.get_input_embeddings().requires_grad_(marks)
        if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
            model.get_output_embeddings().requires_grad_(False)
    return added


def add_picture_tokens(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Give a tokenizer the picture tokens that a config asks for, in LLaVA's order; returns how many are new."""
    tokens = [DEFAULT_IMAGE_PATCH_TOKEN] if config.mm_use_im_patch_token else []
    return tokenizer.add_tokens([*tokens, *(MARKS if config.mm_use_im_start_end else [])], special_tokens=True)


def _read_embeddings(model: Any, path: str, ids: list[int]) -> None:
    """The marks' rows of the embeddings in a projector file: of a whole table, or the last ones of what there is."""
    table = next((value for key, value in load_bin(Path(path)).items() if key.endswith("embed_tokens.weight")), None)
    if table is None:
        return
    own: Tensor = model.get_input_embeddings().weight
    if table.shape[1] != model.config.hidden_size:
        raise UserError(
            f"{path} holds embeddings of width {table.shape[1]}, the model's are {model.config.hidden_size}"
        )
    whole = len(table) > max(ids)
    with torch.no_grad(), gathered([own], write=True):
        own[ids] = (table[ids] if whole else table[-len(ids) :]).to(own)
