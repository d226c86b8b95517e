"""Flags of every command that answers questions with a loaded model: where it runs, in which form, how it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llava.cli import flag
from llava.devices import check_device, default_device, readers
from llava.eval.generation import Generation, Loading
from llava.image_io import allow_pixels

LOADING = ("device", "device_map", "load_8bit", "load_4bit", "attn_implementation", "dtype", "tf32")
DTYPES = ("auto", "float32", "bfloat16", "float16")
GENERATION = ("temperature", "top_p", "num_beams", "max_new_tokens", "batch_size", "seed", "refuse_unknown")


@dataclass(kw_only=True)
class LoadingFlags:
    """Where the model runs and in which form."""

    device: str | None = flag(None, "cuda or cpu (default: cuda where there is one)")
    device_map: str | None = flag(
        None, "auto: a model too large for one GPU on all of them (default: on one)", choices=("auto",)
    )
    load_8bit: bool = False
    load_4bit: bool = False
    attn_implementation: str | None = flag(
        None,
        "default: sdpa, which also stands in for a FlashAttention that is not installed",
        choices=("sdpa", "flash_attention_2", "eager"),
    )
    dtype: str | None = flag(
        None, "of the weights (default: the checkpoint's own on a GPU, float32 on the CPU)", choices=DTYPES
    )
    tf32: bool | None = flag(None, "products of float32 matrices in TF32, on NVIDIA GPUs since Ampere (default: no)")
    max_pixels: int | None = flag(
        None, "pixels that a picture may have (default: LLAVA_MAX_PIXELS or 100 million)", least=1
    )


@dataclass(kw_only=True)
class PromptFlags:
    """How it is asked; what is not given, the stage or the base decides."""

    conv_mode: str | None = flag(None, "conversation template (default: the checkpoint's own)")
    answer_suffix: str | None = flag(
        None, "appended to each question on a line of its own (default: the stage's own; '' for none)"
    )
    image_aspect_ratio: str | None = flag(
        None, "pad, square or anyres: what becomes of pictures that are not square (default: the checkpoint's own)"
    )


def loading_of(arguments: Any) -> Loading:
    """Where and in which form a command line wants the model; its limit for pictures holds from here on.

    Raises:
        UserError: a device that is not here.
    """
    allow_pixels(getattr(arguments, "max_pixels", None))
    if arguments.device:
        check_device(arguments.device)
    return Loading(**_given(arguments, LOADING))


def generation_of(arguments: Any) -> Generation:
    """How a command line wants answers generated."""
    workers = getattr(arguments, "num_workers", 0)
    if workers is None:
        workers = readers(default_device(arguments.device))
    return Generation(**_given(arguments, GENERATION), workers=workers)


def asked_prompt(arguments: Any) -> dict[str, Any]:
    """The fields of the prompt that a command line names; those that it leaves to the checkpoint are not in it."""
    asked: dict[str, Any] = {} if arguments.answer_suffix is None else {"answer_suffix": arguments.answer_suffix}
    asked |= {"conv_mode": arguments.conv_mode} if arguments.conv_mode else {}
    return asked | ({"aspect_ratio": arguments.image_aspect_ratio} if arguments.image_aspect_ratio else {})


def _given(arguments: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
