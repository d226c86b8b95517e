"""LLaVA's ``model_vqa``: the engine of ``model_vqa_loader`` with the defaults that LLaVA's users know.

Sampling at temperature 0.2 and up to 1024 new tokens, one question at a time. The conversation template is the
checkpoint's own unless ``--conv-mode`` is given: LLaVA's fixed ``llava_v1`` is wrong for Mistral checkpoints.

    python -m llava.eval.model_vqa --model-path MODEL --question-file QUESTIONS --image-folder IMAGES \\
        --answers-file answers.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval import model_vqa_loader
from llava.utils import run_cli

DEFAULTS = {"temperature": 0.2, "max_new_tokens": 1024, "batch_size": 1}


def main(argv: Sequence[str] | None = None) -> None:
    """Answer one chunk of the question file."""
    model_vqa_loader.main(argv, **DEFAULTS)


if __name__ == "__main__":
    run_cli(main)
