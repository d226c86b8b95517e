"""Flags of every command that answers questions with a loaded model: where it runs, in which form, how it is asked."""

from __future__ import annotations

from dataclasses import dataclass

from llava.cli import flag


@dataclass(kw_only=True)
class LoadingFlags:
    """Where the model runs and in which form."""

    device: str | None = flag(None, "cuda or cpu (default: cuda where there is one)")
    load_8bit: bool = False
    load_4bit: bool = False
    attn_implementation: str | None = flag(
        None,
        "default: sdpa, which also stands in for a FlashAttention that is not installed",
        choices=("sdpa", "flash_attention_2", "eager"),
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
