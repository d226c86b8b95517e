"""LLaVA's and LLaVA-NeXT's loading flags as options of ``from_pretrained``: device, dtype, bits, attention, TF32."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available

from llava.devices import NO_TF32, gpu_has_tf32, set_tf32
from llava.utils import UserError, rank0_print

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "half": torch.float16,
}


def loading_options(
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | dict[str, Any] | None = "auto",
    device: str = "cuda",
    use_flash_attn: bool = False,
    attn_implementation: str | None = None,
    dtype: torch.dtype | str | None = None,
) -> dict[str, Any]:
    """Keyword arguments for ``from_pretrained`` from LLaVA's loading flags."""
    options: dict[str, Any] = {"attn_implementation": attention(attn_implementation, use_flash_attn)}
    if load_8bit and load_4bit:
        raise UserError("choose one of --load-8bit and --load-4bit")
    if load_8bit or load_4bit:
        compute = dtype if isinstance(dtype, torch.dtype) else (torch.float32 if device == "cpu" else torch.float16)
        options["quantization_config"] = quantization_config(8 if load_8bit else 4, compute)
    if device == "cpu":
        return {
            **options,
            "dtype": dtype or torch.float32,
            "device_map": {"": "cpu"} if load_8bit or load_4bit else None,
        }
    return {**options, "dtype": dtype or "auto", "device_map": device_map if device == "cuda" else {"": device}}


def known_dtype(value: torch.dtype | str | None) -> torch.dtype | str | None:
    """A dtype by its name (``float16``, ``torch.float16``, ``fp16``); ``auto`` and None as they are.

    Raises:
        UserError: another name, or a type that weights do not have.
    """
    if value is None or value == "auto" or (isinstance(value, torch.dtype) and value.is_floating_point):
        return value
    found = DTYPES.get(str(value).lower().removeprefix("torch."))
    if found is None:
        raise UserError(f"torch_dtype {value!r} is not known; choose from auto, {', '.join(DTYPES)}")
    return found


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


def settle_tf32(wanted: bool | None) -> None:
    """Let the GPU multiply float32 as ``--tf32`` says; without a GPU that knows TF32 it is left out, which is said."""
    if wanted and not gpu_has_tf32():
        rank0_print(NO_TF32)
    elif wanted is not None:
        set_tf32(wanted)


def attention(wanted: str | None, use_flash_attn: bool = False) -> str:
    """The attention implementation: SDPA unless another is asked for; FlashAttention only where it is installed."""
    wanted = wanted or ("flash_attention_2" if use_flash_attn else "sdpa")
    if wanted == "flash_attention_2" and not is_flash_attn_2_available():
        rank0_print("FlashAttention is not installed or finds no GPU; using SDPA instead")
        return "sdpa"
    return wanted
