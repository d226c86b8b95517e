"""LLaVA's training flags against what is trained: each acts, or is refused with the reason.

Stage 2 of the continual pipeline leaves the base frozen: flags of LLaVA's own stages may say there what the base is
already, and no more.
"""

from __future__ import annotations

import ast
from typing import Any

from llava.model.vision.setup import DEFAULTS, is_tower_of, settle
from llava.utils import UserError, rank0_print

FREE = "leave it out, or leave out --task to train LLaVA's own stages"
SAME_AS_BASE = tuple(DEFAULTS)
ATTENTIONS = (None, "sdpa", "eager", "flash_attention_2")
ALWAYS_FROZEN = {
    "pretrain_mm_mlp_adapter": None,
    "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": False,
    "mm_tunable_parts": None,
    "mm_projector_lr": None,
    "mm_vision_tower_lr": None,
    "lora_bias": "none",
}
"""Flags that train or replace a part of the base, with the value that does not."""


def check_flags(model_args: Any, data_args: Any, args: Any) -> None:
    """Refuse flags that nothing here stands behind, whatever is trained.

    Raises:
        UserError: naming the flag and the reason.
    """
    if args.lora_weight_path:
        raise UserError(
            "--lora_weight_path: LLaVA never reads it; merge the LoRA (scripts/merge_lora_weights.py) first"
        )
    if args.mpt_attn_impl is not None:
        raise UserError(
            "--mpt_attn_impl is for MPT decoders; Llama and Mistral decoders are trained here, leave it out"
        )
    if data_args.turns_apart and (model_args.attn_implementation or "").startswith("flash"):
        raise UserError("--turns_apart True needs a mask that FlashAttention does not take; use sdpa or eager")
    if model_args.attn_implementation not in ATTENTIONS:
        raise UserError(
            f"--attn_implementation is {model_args.attn_implementation!r}; choose {', '.join(filter(None, ATTENTIONS))}"
        )
    if args.lora_bias not in ("none", "all", "lora_only"):
        raise UserError(f"--lora_bias is {args.lora_bias!r}; choose none, all or lora_only")


def check_frozen_base(config: Any, model_args: Any, data_args: Any, args: Any) -> None:
    """Refuse, in stage 2, flags that would make another model of the base.

    Args:
        config: the base's.

    Raises:
        UserError: naming the flag, what it asks for and what the base has.
    """
    for name, nothing in ALWAYS_FROZEN.items():
        value = getattr(model_args, name, None) if hasattr(model_args, name) else getattr(args, name)
        if value != nothing:
            raise UserError(f"--{name} {value} changes the base, which stage 2 leaves frozen; {FREE}")
    tower, has = model_args.vision_tower, getattr(config, "mm_vision_tower", None)
    if tower and not has:
        rank0_print(f"note: --vision_tower {tower}: the base holds its tower and gives it no name; that one stays")
    elif tower and not is_tower_of(config, tower):
        raise UserError(f"--vision_tower {tower}: the base's tower is {has}; {FREE}")
    for name in SAME_AS_BASE:
        asked, has = getattr(model_args, name), getattr(config, name, None)
        if asked is not None and asked != has:
            raise UserError(f"--{name} {asked}: the base has {has}, and stage 2 leaves it frozen; {FREE}")
    if data_args.turns_apart:
        raise UserError(f"--turns_apart True: in stage 2 a row is one question, with one route; {FREE}")
    asked, has = pinpoints(data_args), getattr(config, "image_grid_pinpoints", None)
    if asked is not None and [list(one) for one in asked] != [list(one) for one in has or []]:
        raise UserError(f"--image_grid_pinpoints {asked}: the base has {has}, and stage 2 leaves it frozen; {FREE}")


def ask(config: Any, plain: bool, model_args: Any, data_args: Any) -> None:
    """Put what LLaVA's own training asks for into a config, in place.

    Args:
        plain: the base is a language model without pictures.

    Raises:
        UserError: a language model and no tower; a value that is not known.
    """
    if plain and not model_args.vision_tower:
        raise UserError(
            f"{model_args.model_name_or_path} is a language model without pictures; give its tower as --vision_tower, "
            "such as openai/clip-vit-large-patch14-336"
        )
    settle(config, model_args)
    if (asked := pinpoints(data_args)) is not None:
        config.image_grid_pinpoints = asked


def pinpoints(data_args: Any) -> list[list[int]] | None:
    """``--image_grid_pinpoints`` as a list of ``[width, height]``.

    Raises:
        UserError: it is no list of pairs.
    """
    text = data_args.image_grid_pinpoints
    if text is None:
        return None
    try:
        pairs = [[int(one) for one in pair] for pair in ast.literal_eval(text)]
    except (ValueError, SyntaxError, TypeError):
        pairs = []
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise UserError(f"--image_grid_pinpoints {text!r} is no list of sizes such as '[(336, 672), (672, 336)]'")
    return pairs
