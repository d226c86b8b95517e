"""Flags of every command that answers questions with a loaded model: where it runs, in which form, how it is asked."""

from __future__ import annotations

import argparse


def add_loading_flags(parser: argparse.ArgumentParser) -> None:
    """``--device``, ``--load-8bit``, ``--load-4bit`` and ``--attn_implementation``."""
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--load-8bit", action="store_true")
    parser.add_argument("--load-4bit", action="store_true")
    parser.add_argument(
        "--attn_implementation",
        "--attn-implementation",
        choices=("sdpa", "flash_attention_2", "eager"),
        help="default: sdpa, which also stands in for a FlashAttention that is not installed",
    )


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """``--conv-mode``, ``--answer-suffix`` and ``--image_aspect_ratio``; not given, the stage or the base decides."""
    parser.add_argument("--conv-mode", help="conversation template (default: the checkpoint's own)")
    parser.add_argument(
        "--answer-suffix", help="appended to each question on a line of its own (default: the stage's own; '' for none)"
    )
    parser.add_argument(
        "--image_aspect_ratio",
        "--image-aspect-ratio",
        help="pad, square or anyres: what becomes of pictures that are not square (default: the checkpoint's own)",
    )
