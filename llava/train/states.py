"""What a run has trained, as tensors on the CPU: gathered from all processes under ZeRO-3.

Beside the trainer's own there are LLaVA's helpers under their names, which other trainers import.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava.checkpoints.kinds import PROJECTOR_FILE
from llava.files import atomic_write
from llava.model.partitioned import gathered, optimizer_copy, set_optimizer_copy
from llava.utils import is_main_process, rank0_print

Named = Iterable[tuple[str, Tensor]]
"""Parameters with their names, as ``model.named_parameters()`` gives them."""

BESIDE_THE_DECODER = ("mm_projector", "vision_tower", "vision_resampler", "retriever")
PROJECTOR_KEYS = ("mm_projector", "vision_resampler", "image_newline")
EMBEDDING_KEYS = ("embed_tokens", "embed_in")


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that train, on the CPU; under ZeRO-3 every process must call this."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    exact = {name: copy for name, value in trained.items() if (copy := optimizer_copy(value)) is not None}
    with gathered([value for name, value in trained.items() if name not in exact]):
        return {name: exact.get(name, value).detach().float().cpu().clone() for name, value in trained.items()}


def begin_exactly(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Let DeepSpeed's optimizer step on ``values`` by parameter name, and not on their roundings to 16 bits."""
    named = dict(model.named_parameters())
    for name, value in values.items():
        set_optimizer_copy(named[name], value)


def all_finite(model: nn.Module) -> bool:
    """Whether every trained weight is a number; under ZeRO-3 every process must call this."""
    finite = True
    for parameter in model.parameters():
        if parameter.requires_grad:
            with gathered([parameter]):
                finite = finite and bool(torch.isfinite(parameter).all())
    return finite


def whole_state(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every weight of the model but the adapter's, on the CPU of the main process; all processes must call this.

    One tensor at a time, so that ZeRO-3 never holds the whole model on one device.

    Args:
        dtype: of the copies; None: as they are.
    """
    state, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.startswith("retriever.") or id(tensor) in seen:  # a tied head is the embeddings once more
            continue
        seen.add(id(tensor))
        with gathered([tensor]):
            if is_main_process():
                state[name] = tensor.detach().to("cpu", dtype).clone()
    return state


def save_whole_state(folder: Path, model: Any, state: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write the weights that ``whole_state`` gathered, so that the folder needs no base.

    Args:
        dtype: a LLaVA that trained as a whole, in the type that its weights are written in: its tower goes along under
            its own config, with the image processor.
    """
    if dtype is None:
        model.save_pretrained(folder, state_dict=state, with_slots=False)
        return
    tower = model.get_vision_tower()
    model.config.vision_config = tower.config.to_dict()
    model.save_pretrained(folder, state_dict=state, with_slots=False)
    model.config.dtype = dtype  # of the files; in memory the weights may be finer
    model.config.save_pretrained(folder)
    if tower.image_processor is not None:
        tower.image_processor.save_pretrained(folder)


def maybe_zero_3(param: Any, ignore_status: bool = False, name: str | None = None) -> Tensor:
    """A copy of a parameter on the CPU, whole; every process must call this.

    Args:
        ignore_status: do not say that another part of the program holds it gathered at the moment.
    """
    if hasattr(param, "ds_id") and not ignore_status and str(param.ds_status).rsplit(".", 1)[-1] != "NOT_AVAILABLE":
        rank0_print(f"note: {name or 'a parameter'} is gathered already while it is copied")
    with gathered([param]):
        whole: Tensor = param.detach().cpu().clone()
        return whole


def get_peft_state_maybe_zero_3(named_params: Named, bias: str) -> dict[str, Tensor]:
    """The LoRA's tensors, with the biases that train beside it.

    Args:
        bias: ``none``, ``all``, or ``lora_only`` for those of the layers that have a LoRA.

    Raises:
        NotImplementedError: another word.
    """
    if bias not in ("none", "all", "lora_only"):
        raise NotImplementedError(f"bias is {bias!r}; choose none, all or lora_only")
    params = dict(named_params)
    layers = {name.split("lora_")[0] for name in params if "lora_" in name}
    beside = {f"{layer}{inside}bias" for layer in layers for inside in ("", "base_layer.")}
    wanted = {
        name: value
        for name, value in params.items()
        if "lora_" in name or ("bias" in name and (bias == "all" or (bias == "lora_only" and name in beside)))
    }
    return {name: maybe_zero_3(value, ignore_status=True) for name, value in wanted.items()}


def get_peft_state_non_lora_maybe_zero_3(named_params: Named, require_grad_only: bool = True) -> dict[str, Tensor]:
    """What is no LoRA: with ``require_grad_only`` the part of it that trains."""
    return {
        name: maybe_zero_3(value, ignore_status=True)
        for name, value in named_params
        if "lora_" not in name and (value.requires_grad or not require_grad_only)
    }


def get_mm_adapter_state_maybe_zero_3(named_params: Named, keys_to_match: Sequence[str]) -> dict[str, Tensor]:
    """The parameters whose name holds one of some words, such as ``mm_projector``."""
    return {
        name: maybe_zero_3(value, ignore_status=True, name=name)
        for name, value in named_params
        if any(key in name for key in keys_to_match)
    }


def find_all_linear_names(model: nn.Module) -> list[str]:
    """Last words of the names of the decoder's linear layers, without the head's: what a LoRA of LLaVA is put on."""
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in BESIDE_THE_DECODER)
    }
    return sorted(names - {"lm_head"})


def projector_state(model: nn.Module, with_embeddings: bool = False) -> dict[str, Tensor]:
    """The tensors of ``mm_projector.bin``; every process must call this.

    Args:
        with_embeddings: the token embeddings too, which learn where image start and end tokens were added.
    """
    keys = PROJECTOR_KEYS + (EMBEDDING_KEYS if with_embeddings else ())
    return get_mm_adapter_state_maybe_zero_3(model.named_parameters(), keys)


def save_tensors(path: Path, state: dict[str, Tensor]) -> None:
    """Write tensors to a ``.bin`` file, which is whole or not there."""
    with atomic_write(path, "wb") as stream:
        torch.save(state, stream)


def safe_save_model_for_hf_trainer(trainer: Any, output_dir: str) -> None:
    """Write what a trainer (transformers' or LLaVA's) has trained; every process must call this.

    With ``args.tune_mm_mlp_adapter`` that is the projector and the config; from inside a folder called
    ``checkpoint-N`` the projector goes to ``mm_projector/checkpoint-N.bin`` beside it, as LLaVA has it. Else it is
    the whole model.
    """
    folder, args, model = Path(output_dir), trainer.args, trainer.model
    if not getattr(args, "tune_mm_mlp_adapter", False):
        state = whole_state(model)
        if args.should_save:
            save_whole_state(folder, model, state)
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(folder)
        return
    state = projector_state(model, bool(getattr(args, "use_im_start_end", False)))
    if args.should_save:
        model.config.save_pretrained(folder)
        beside = folder.name.startswith("checkpoint-")
        save_tensors(
            folder.parent / "mm_projector" / f"{folder.name}.bin" if beside else folder / PROJECTOR_FILE, state
        )
