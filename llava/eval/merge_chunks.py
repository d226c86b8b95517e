"""Join the answer files of chunks that ran in parallel into one, in the question file's order.

    python -m llava.eval.merge_chunks --question-file data/test_vqa_rad.jsonl \\
        --answers-file output/eval/answers.jsonl --chunks output/eval/chunks/4_*.jsonl

A missing chunk, an unanswered question or a chunk of another run is an error, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llava.cli import flag, parse
from llava.data.rows import read_rows, write_jsonl
from llava.eval.answer_file import merge_answers
from llava.utils import run_cli


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    question_file: str = flag()
    answers_file: str = flag(help="the file to write")
    chunks: list[str] = flag(help="answer files of all chunks")


def main(argv: Sequence[str] | None = None) -> None:
    """Merge and write."""
    arguments = parse(Arguments, argv, __doc__)
    answers = merge_answers(read_rows(arguments.question_file), arguments.chunks)
    write_jsonl(arguments.answers_file, answers)
    print(f"{arguments.answers_file}: {len(answers)} answers from {len(arguments.chunks)} chunk(s)")


if __name__ == "__main__":
    run_cli(main)
