"""Flags of every command that answers questions with a loaded model: where it runs and in which form."""

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
