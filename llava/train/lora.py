"""A LoRA on the decoder (``--lora_enable``), and quantised bases (``--bits 4`` or ``8``) in training.

The LoRA is LLaVA's: on every linear layer of the decoder, with its ``lora_*`` flags. Beside slots it is one for all
tasks and goes on from stage to stage, so it learns and forgets like any fine-tuning: with it the slots keep their
isolation, the model as a whole does not. Without the flag only slots train.

The stage checkpoint then also holds ``adapter_config.json`` and ``adapter_model.safetensors``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from llava.checkpoints.kinds import ADAPTER_CONFIG
from llava.devices import default_device
from llava.model.adapters import PEFT_PREFIX, apply_adapter
from llava.model.loading import quantization_config
from llava.outside import foreign, read_object
from llava.train.arguments import TrainingArguments
from llava.train.states import find_all_linear_names
from llava.utils import UserError, rank0_print

ADAPTER = "default"  # PEFT's name for the only adapter of a model


def add_lora(
    model: nn.Module, args: TrainingArguments, previous: Path | None, base: str, beside_slots: bool = True
) -> LoraConfig | None:
    """Put LoRA layers into the decoder, in training; the model itself stays the object it is.

    Args:
        previous: the stage before, whose LoRA goes on. base: what the adapter's config names as its base.

    Returns:
        the adapter's config, ``None`` without ``--lora_enable``.

    Raises:
        UserError: the stage before has a LoRA that this run would leave out.
    """
    continued = previous is not None and (previous / ADAPTER_CONFIG).is_file()
    if not args.lora_enable:
        if continued:
            raise UserError(f"{previous} was trained with a LoRA; add --lora_enable True to go on with it")
        return None
    if continued:
        apply_adapter(model, previous, merge=False, trainable=True)
        with foreign(previous / ADAPTER_CONFIG, "copy it again"):
            config = PeftConfig.from_pretrained(str(previous))
    else:
        config = LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            bias="none",  # biases that train are kept with what else trains in full
            target_modules=decoder_linears(model),
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
        )
        with torch.random.fork_rng():  # the same start with and without DeepSpeed, which draws numbers of its own
            torch.manual_seed(args.seed)
            get_peft_model(model, config)
    count = sum(value.numel() for name, value in model.named_parameters() if ".lora_" in name)
    shared = " beside the slots; they are shared by all tasks, so tasks can forget" if beside_slots else ""
    rank0_print(f"LoRA: {count:,} weights train{shared}")
    return config


def decoder_linears(model: nn.Module) -> str:
    """A pattern for the decoder's linear layers (quantised ones are linear too): not tower, projector or head."""
    return rf"model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(find_all_linear_names(model))})"


def save_lora(folder: Path, config: LoraConfig, state: dict[str, torch.Tensor]) -> None:
    """Write the adapter files of a trained state (names as in the model, see ``trainable_state``)."""
    tensors = {
        f"{PEFT_PREFIX}{name.replace(f'.{ADAPTER}.', '.')}": value.contiguous()
        for name, value in state.items()
        if ".lora_" in name
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def base_options(args: TrainingArguments, dtype: torch.dtype) -> dict:
    """Arguments of ``load_base`` for ``--bits``: full precision, or quantised on the one device of this process.

    Raises:
        UserError: another number of bits, or ZeRO-3, which cannot partition quantised tensors.
    """
    if args.save_full_model and (args.lora_enable or args.bits != 16):
        raise UserError("--save_full_model writes plain weights; leave it out with --lora_enable and --bits 4 or 8")
    if args.bits == 16:
        return {"dtype": dtype}
    if args.bits not in (4, 8):
        raise UserError(f"--bits {args.bits}: choose 4, 8 or 16")
    if zero_stage(args.deepspeed) == 3:
        raise UserError(f"--bits {args.bits} does not go with ZeRO-3 ({args.deepspeed}); use scripts/zero2.json")
    place = device_of(args)
    quantised = quantization_config(args.bits, dtype, args.double_quant, args.quant_type)
    return {"dtype": dtype, "device_map": {"": place}, "quantization_config": quantised}


def device_of(args: TrainingArguments) -> str | int:
    """The one device of this process: the number of its GPU, or ``cpu``."""
    device = default_device(use_cpu=args.use_cpu)
    return device if device == "cpu" else int(os.environ.get("LOCAL_RANK", "0"))


def zero_stage(deepspeed) -> int:
    """The stage that DeepSpeed's file (or its values) names; 0 without one."""
    if not deepspeed:
        return 0
    values = deepspeed if isinstance(deepspeed, dict) else read_object(deepspeed, "DeepSpeed settings")
    return values.get("zero_optimization", {}).get("stage", 0)


@contextlib.contextmanager
def slots_count_as_adapters(model: nn.Module) -> Iterator[None]:
    """While a trainer is built: transformers trains quantised models only with PEFT's adapters on them.

    Slots are adapters too, though not PEFT's: gradients go through the quantised layers, into the slots alone.
    """
    if not getattr(model, "is_quantized", False):
        yield
        return
    before = getattr(model, "_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        model._hf_peft_config_loaded = before
