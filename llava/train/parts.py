"""Which weights LLaVA's own stages train: the parts of the model, as LLaVA's and LLaVA-NeXT's flags name them.

| flags | what trains |
| --- | --- |
| ``--tune_mm_mlp_adapter`` | the projector; with ``--mm_use_im_start_end`` the embeddings too |
| none | all but the tower |
| ``--freeze_backbone`` | projector, newline and head: LLaVA freezes the decoder's layers and embeddings |
| ``--lora_enable`` | a LoRA on the decoder, the projector and the newline |
| ``--freeze_mm_mlp_adapter`` | as otherwise, without the projector |
| ``--unfreeze_mm_vision_tower`` | as otherwise, with the tower's layers up to the one that is looked at |
| ``--mm_tunable_parts`` | the parts it names and nothing else |

New image start and end tokens train with whatever else does, because nothing else would ever give them a meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from llava.train.states import find_all_linear_names
from llava.utils import UserError

PARTS = {
    "mm_mlp_adapter": ("projector",),
    "mm_vision_tower": ("tower",),
    "mm_language_model": ("decoder", "head", "newline"),
}
"""LLaVA-NeXT's words for ``--mm_tunable_parts``."""

Parameters = dict[str, nn.Parameter]


def part_of(name: str) -> str:
    """The part of a LLaVA that a parameter belongs to."""
    for word, part in (("vision_tower", "tower"), ("mm_projector", "projector"), ("image_newline", "newline")):
        if word in name:
            return part
    return "head" if name.startswith("lm_head") else "decoder"


def check_parts(model_args: Any, args: Any) -> None:
    """Refuse flags that contradict each other.

    Raises:
        UserError: naming the two.
    """
    words = _tunable(model_args)
    if unknown := sorted(set(words) - set(PARTS)):
        raise UserError(f"--mm_tunable_parts: {unknown[0]!r} is no part; choose from {', '.join(PARTS)}")
    others = [
        name
        for name in ("tune_mm_mlp_adapter", "freeze_backbone", "unfreeze_mm_vision_tower", "freeze_mm_mlp_adapter")
        if getattr(model_args, name, False) or getattr(args, name, False)
    ]
    if words and others:
        raise UserError(f"--mm_tunable_parts names all that trains; leave out --{others[0]}")
    if "mm_language_model" in words and args.lora_enable:
        raise UserError("--mm_tunable_parts mm_language_model trains every weight; leave it out, or --lora_enable")
    parts = wanted_parts(model_args, args)
    if args.mm_projector_lr is not None and "projector" not in parts:
        raise UserError("--mm_projector_lr: the projector does not train; leave it out")
    if args.mm_vision_tower_lr is not None and "tower" not in parts:
        raise UserError("--mm_vision_tower_lr: the tower does not train; add --unfreeze_mm_vision_tower True")
    if args.bits != 16 and parts & {"decoder", "head"}:
        raise UserError(f"--bits {args.bits}: quantised weights cannot train; add --lora_enable True")
    if args.lora_bias != "none" and not args.lora_enable:
        raise UserError(f"--lora_bias {args.lora_bias} goes with --lora_enable True")
    if not parts and not args.lora_enable:
        raise UserError("nothing would train: the flags freeze every part; leave one of them out")


def wanted_parts(model_args: Any, args: Any) -> set[str]:
    """The parts that train whole: of ``projector``, ``newline``, ``decoder``, ``head``, ``tower``."""
    words = _tunable(model_args)
    if words:
        return {part for word in words for part in PARTS[word]}
    if model_args.tune_mm_mlp_adapter:
        parts = {"projector"}
    elif args.lora_enable:
        parts = {"projector", "newline"}
    else:
        parts = {"projector", "newline", "head", *([] if model_args.freeze_backbone else ["decoder"])}
    if args.freeze_mm_mlp_adapter:
        parts.discard("projector")
    if model_args.unfreeze_mm_vision_tower:
        parts.add("tower")
    return parts


def _tunable(model_args: Any) -> list[str]:
    return [word.strip() for word in (model_args.mm_tunable_parts or "").split(",") if word.strip()]


def trained_parameters(model: Any, model_args: Any, args: Any, new_tokens: int = 0) -> Parameters:
    """The parameters that train, by name, without those of a LoRA.

    Args:
        new_tokens: picture tokens that the tokenizer has got.
    """
    parts, tower = wanted_parts(model_args, args), model.get_vision_tower()
    blind = tower.unseen() if "tower" in parts else set()
    marks = bool(model.config.mm_use_im_start_end) and bool(new_tokens or model_args.tune_mm_mlp_adapter)
    linears = set(find_all_linear_names(model)) if args.lora_bias != "none" else set()

    def trains(name: str, parameter: nn.Parameter) -> bool:
        part = part_of(name)
        if part in parts:
            return id(parameter) not in blind
        if marks and "embed_tokens" in name:
            return True
        if marks and part == "head":
            return not model_args.tune_mm_mlp_adapter
        beside = part == "decoder" and name.endswith(".bias")
        return bool(linears) and beside and (args.lora_bias == "all" or name.split(".")[-2] in linears)

    return {name: parameter for name, parameter in model.named_parameters() if trains(name, parameter)}


def groups_of(trained: Parameters, args: Any) -> Sequence[nn.Parameter | Mapping[str, Any]]:
    """The parameters for the optimizer, with LLaVA's learning rates of their own."""
    rates = {"projector": args.mm_projector_lr, "tower": args.mm_vision_tower_lr}
    groups: list[nn.Parameter | Mapping[str, Any]] = []
    groups += [parameter for name, parameter in trained.items() if rates.get(part_of(name)) is None]
    for part, rate in rates.items():
        mine = [parameter for name, parameter in trained.items() if part_of(name) == part]
        if rate is not None and mine:
            groups.append({"params": mine, "lr": rate})
    return groups
