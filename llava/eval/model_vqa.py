"""LLaVA's ``model_vqa``: the engine of ``model_vqa_loader`` with the defaults that LLaVA's users know.

Sampling at temperature 0.2 and up to 1024 new tokens, one question at a time. The conversation template is the
checkpoint's own unless ``--conv-mode`` is given: LLaVA's fixed ``llava_v1`` is wrong for Mistral checkpoints.

    python -m llava.eval.model_vqa --model-path MODEL --question-file QUESTIONS --image-folder IMAGES \\
        --answers-file answers.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava.cli import filled
from llava.eval import model_vqa_loader
from llava.utils import run_cli

DEFAULTS: dict[str, Any] = {"temperature": 0.2, "max_new_tokens": 1024, "batch_size": 1}


def main(argv: Sequence[str] | None = None) -> None:
    """Answer one chunk of the question file."""
    eval_model(model_vqa_loader.parse_arguments(argv, description=__doc__, **DEFAULTS))


def eval_model(args: Any) -> None:
    """The same from Python: ``args`` is any object with some of the flags as attributes."""
    model_vqa_loader.eval_model(filled(model_vqa_loader.Arguments, args, **DEFAULTS))


if __name__ == "__main__":
    run_cli(main)
