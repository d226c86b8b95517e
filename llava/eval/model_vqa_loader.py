"""Answer a question file with a model: batched, left-padded, in chunks, resumable.

    python -m llava.eval.model_vqa_loader --model-path output/llava-vqa-rad_abd --model-base BASE \\
        --question-file data/test_vqa_rad.jsonl --image-folder data/vqa-rad/images --answers-file answers.jsonl

LLaVA's flags, and: any ``--batch-size``; greedy by default; a stage is asked as it was trained (template, answer
suffix, picture mode) unless ``--conv-mode``, ``--answer-suffix`` or ``--image_aspect_ratio`` is given. Killed and
started again with the same command, it goes on where it was and ends with the same file: batches are fixed by the
chunk, not by where the run stopped; questions of like length are answered together and written in their order. The
route each answer took is in its ``metadata``. ``--task-id`` (one task for all rows) and ``--route oracle`` (each row's
own domain, where the model has learned it) give the task away, for comparison; other values of ``--route`` choose a
router, ``none`` answers with the base model. ``--pictures blank``, ``shuffled`` (within the row's domain) and
``shuffled-across`` ask with another picture than the row's own (``llava.eval.shown_pictures``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llava.cli import MANY, SEEDS, fail, filled, flag, parse
from llava.data.rows import read_rows
from llava.eval.answer_chunk import Chunk
from llava.eval.generation import NO_ROUTE, ORACLE
from llava.eval.loading_flags import LoadingFlags, PromptFlags, asked_prompt, generation_of, loading_of
from llava.eval.shown_pictures import KINDS, REAL
from llava.inside import opened_to_links
from llava.utils import run_cli


@dataclass(kw_only=True)
class Arguments(PromptFlags, LoadingFlags):
    """LLaVA's flags with its defaults, and this project's routing flags."""

    model_path: str = flag(help="checkpoint folder or hub id")
    model_base: str | None = flag(None, "base model that a light checkpoint is applied to")
    image_folder: str = flag("", "folder of the rows' images")
    follow_links: bool = flag(False, "open pictures that are links out of their folder")
    question_file: str = flag()
    answers_file: str = "answer.jsonl"
    default_answer_suffix: str = flag("", "for a model that keeps none of its own")
    num_chunks: int = flag(1, least=1)
    chunk_idx: int = flag(0, least=0)
    temperature: float = flag(0.0, "0 is greedy", least=0)
    top_p: float | None = flag(None, above=0, most=1)
    num_beams: int = flag(1, least=1, most=MANY)
    max_new_tokens: int = flag(128, least=1, most=MANY)
    batch_size: int = flag(8, least=1, most=MANY)
    num_workers: int | None = flag(None, "threads that read images ahead (default: 4 beside a GPU)", least=0, most=1024)
    query_cache: str = flag("", "keeps queries and picture features for other processes, as training does")
    task_id: str | None = flag(None, "route every question to this task's slots")
    route: str | None = flag(None, f"router to use; {ORACLE!r}: the row's own domain, {NO_ROUTE!r}: no slots")
    refuse_unknown: bool = flag(
        False, "answer questions that fit no known task with a fixed refusal instead of the base model's words"
    )
    pictures: str = flag(REAL, "what each question is shown in place of its own picture", choices=KINDS)
    seed: int = flag(0, "for a temperature above 0, and for shuffled pictures", **SEEDS)
    stale: str = flag("refuse", "what to do with another run's answers file", choices=("refuse", "replace"))


Kind = TypeVar("Kind", bound=Arguments)


def parse_arguments(
    argv: Sequence[str] | None = None,
    kind: type[Kind] = Arguments,  # type: ignore[assignment]
    description: str | None = __doc__,
    **defaults: Any,
) -> Kind:
    """The command line of this command, or of one that adds flags to it; ``defaults`` replace those of the flags."""
    arguments = parse(kind, argv, description, **defaults)
    if arguments.task_id and arguments.route not in (None, ORACLE):
        fail("--task-id gives the task away, so it goes with --route oracle or none at all")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Answer one chunk of the question file."""
    eval_model(parse_arguments(argv))


def eval_model(args: Any) -> None:
    """The same from Python: ``args`` is any object with some of the flags as attributes."""
    write(chunk_of(filled(Arguments, args)))


def write(chunk: Chunk) -> None:
    """Answer what the chunk asks for; the model is loaded only where answers are missing."""
    from llava.eval.answerer import Answerer
    from llava.eval.question_cache import QuestionCache

    chunk.write(lambda: Answerer(chunk.base, chunk.loading, QuestionCache(folder=chunk.query_cache)))


def chunk_of(arguments: Arguments) -> Chunk:
    """What the command line asks for."""
    return Chunk(
        question_file=arguments.question_file,
        rows=read_rows(arguments.question_file),
        image_folder=opened_to_links(arguments.image_folder, arguments.follow_links) or "",
        answers_file=Path(arguments.answers_file),
        model=arguments.model_path,
        base=arguments.model_base,
        loading=loading_of(arguments),
        generation=generation_of(arguments),
        route=arguments.route,
        task=arguments.task_id,
        number=arguments.chunk_idx,
        count=arguments.num_chunks,
        asked=asked_prompt(arguments),
        defaults={"answer_suffix": arguments.default_answer_suffix},
        replace=arguments.stale == "replace",
        pictures=arguments.pictures,
        query_cache=arguments.query_cache,
    )


if __name__ == "__main__":
    run_cli(main)
