"""LLaVA's ``model_vqa_science``: ScienceQA's questions, with and without a picture, from LLaVA's instruct JSON.

    python -m llava.eval.model_vqa_science --model-path MODEL --question-file llava_test_CQM-A.json \\
        --image-folder IMAGES --answers-file answers.jsonl --single-pred-prompt

The engine and the flags of ``model_vqa_loader``, with LLaVA's defaults: temperature 0.2, up to 1024 new tokens, one
question at a time. ``--single-pred-prompt`` asks for the option's letter, in place of the answer suffix that a stage
was trained with; a stage is still routed by the question alone. The template is the checkpoint's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava.cli import filled, flag
from llava.eval import model_vqa_loader
from llava.eval.model_vqa import DEFAULTS
from llava.utils import rank0_print, run_cli

LETTER_ONLY = "Answer with the option's letter from the given choices directly."


@dataclass(kw_only=True)
class Arguments(model_vqa_loader.Arguments):
    """The loader's flags, and how an option is asked for."""

    single_pred_prompt: bool = flag(False, "ask for the option's letter and nothing else")
    answer_prompter: bool = flag(False, "accepted and without effect, as in LLaVA 1.2")


def main(argv: Sequence[str] | None = None) -> None:
    """Answer one chunk of the question file."""
    eval_model(model_vqa_loader.parse_arguments(argv, Arguments, __doc__, **DEFAULTS))


def eval_model(args: Any) -> None:
    """The same from Python: ``args`` is any object with some of the flags as attributes."""
    arguments = filled(Arguments, args, **DEFAULTS)
    if arguments.answer_prompter:
        rank0_print("note: --answer-prompter has no effect, as in LLaVA 1.2; --single-pred-prompt asks for the letter")
    if arguments.single_pred_prompt:
        arguments.answer_suffix = LETTER_ONLY
    model_vqa_loader.eval_model(arguments)


if __name__ == "__main__":
    run_cli(main)
