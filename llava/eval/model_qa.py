"""LLaVA's ``model_qa``: questions without pictures.

    python -m llava.eval.model_qa --model-name MODEL --question-file questions.jsonl --answers-file answers.jsonl

The engine and the flags of ``model_vqa_loader``, with LLaVA's defaults: temperature 0.7, up to 1024 new tokens, one
question at a time. The model is a LLaVA or a stage; the template is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava.cli import flag, spelled
from llava.eval import model_vqa_loader
from llava.utils import run_cli

DEFAULTS: dict[str, Any] = {"temperature": 0.7, "max_new_tokens": 1024, "batch_size": 1}


@dataclass(kw_only=True)
class Arguments(model_vqa_loader.Arguments):
    """The loader's flags; the model is called ``--model-name`` too."""

    model_path: str = flag(help="checkpoint folder or hub id", aliases=spelled("model_name"))


def main(argv: Sequence[str] | None = None) -> None:
    """Answer one chunk of the question file."""
    model_vqa_loader.eval_model(model_vqa_loader.parse_arguments(argv, Arguments, __doc__, **DEFAULTS))


def eval_model(model_name: str, questions_file: str, answers_file: str) -> None:
    """The same from Python, with all defaults."""
    main(["--model-name", model_name, "--question-file", questions_file, "--answers-file", answers_file])


if __name__ == "__main__":
    run_cli(main)
