"""The model that a run begins with: the frozen base of stage 2, or the LLaVA that its own stages train.

A language model and a tower become a LLaVA here: the decoder's weights in LLaVA's class, a new projector (the same for
every run of one seed, however many processes), picture tokens where they are asked for, LLaVA's words in the config.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from llava.continual.methods import Context, Recipe
from llava.data.prompt import Prompt
from llava.model.builder import check_slots_fit, load_base
from llava.model.configs import llava_config
from llava.model.loading import attention
from llava.model.vision.setup import initialize_vision_tokenizer, is_tower_of
from llava.train.flags import ask, pinpoints
from llava.train.lora import base_options, device_of, zero_stage
from llava.train.preprocess import smart_tokenizer_and_embedding_resize
from llava.train.stage_data import base_dtype
from llava.utils import UserError

Loaded = tuple[Any, PreTrainedTokenizerBase, BaseImageProcessor]


def load_for_training(
    recipe: Recipe, context: Context, prompt: Prompt, model_args: Any, data_args: Any, args: Any
) -> Loaded:
    """``(model, tokenizer, image_processor)`` with every weight frozen.

    Raises:
        UserError: the base does not fit the slots, or cannot become what the command asks for.
    """
    # Weights that train are kept in float32; DeepSpeed keeps such a copy by itself.
    whole = recipe.writes_whole(context) and not args.deepspeed
    options = base_options(args, torch.float32 if whole else base_dtype(args))
    if recipe.needs_keys and device_of(args) != "cpu" and zero_stage(args.deepspeed) < 3:
        # Straight onto its GPU: processes would else all hold the base in the host's memory first.
        options.setdefault("device_map", {"": device_of(args)})
    options["attn_implementation"] = attention(model_args.attn_implementation)
    loaded: Any = load_base(context.base, as_llava=not recipe.needs_keys, **options)
    model, tokenizer, image_processor = loaded
    if recipe.needs_keys:
        model.requires_grad_(False)
        check_slots_fit(model.config, context.pool, context.base)
        return model, tokenizer, image_processor
    _refuse_lost_tower(recipe, context, model_args)
    with torch.random.fork_rng():  # DeepSpeed draws numbers of its own
        torch.manual_seed(args.seed)
        if (asked := pinpoints(data_args)) is not None:
            model.config.image_grid_pinpoints = asked
        model.get_model().initialize_vision_modules(model_args)
    _settle_padding(model, tokenizer, prompt)
    context.new_tokens = initialize_vision_tokenizer(model, model_args, tokenizer)
    model.requires_grad_(False)
    _tell(model, tokenizer, model_args, args)
    return model, tokenizer, model.get_vision_tower().image_processor


def asked_config(context_base: Any, needs_keys: bool, model_args: Any, data_args: Any) -> Any:
    """The config as the run will have it, before the weights are there.

    Raises:
        UserError: as ``flags.ask``.
    """
    config = llava_config(context_base)
    if not needs_keys:
        ask(config, context_base.kind == "plain", model_args, data_args)
    return config


def _refuse_lost_tower(recipe: Recipe, context: Context, model_args: Any) -> None:
    """A projector or LoRA goes over its base, whose tower would come back with it."""
    wanted = model_args.vision_tower
    if recipe.writes_whole(context) or context.base.kind == "plain" or not wanted:
        return
    if not is_tower_of(llava_config(context.base), wanted):
        raise UserError(
            f"--vision_tower {wanted} is not the tower of {context.base_name}, and a projector or LoRA is kept without "
            "a tower; train the whole model, or begin with the language model"
        )


def _settle_padding(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> None:
    """A padding token, as LLaVA gives one: a new ``[PAD]`` under ``v0``, else the unknown or the closing token."""
    if tokenizer.pad_token is not None:
        return
    if prompt.conv_mode == "v0":
        smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, model)
    else:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def _tell(model: Any, tokenizer: PreTrainedTokenizerBase, model_args: Any, args: Any) -> None:
    """LLaVA's further words in the config: they end up in ``config.json``."""
    config = model.config
    config.architectures = [type(model).__name__]
    config.tune_mm_mlp_adapter = bool(model_args.tune_mm_mlp_adapter)
    config.freeze_mm_mlp_adapter = bool(args.freeze_mm_mlp_adapter)
    config.unfreeze_mm_vision_tower = bool(model_args.unfreeze_mm_vision_tower)
    config.mm_projector_lr = args.mm_projector_lr
    config.tokenizer_model_max_length = args.model_max_length
    config.tokenizer_padding_side = "right"
    tokenizer.model_max_length, tokenizer.padding_side = args.model_max_length, "right"
