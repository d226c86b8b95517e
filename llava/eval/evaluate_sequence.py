"""Evaluate a task sequence: answers by the base and by every stage, their scores, the accuracy matrix.

    python -m llava.eval.evaluate_sequence --sequence vqa-rad --base_model BASE

Everything that can be wrong is looked for before a model is loaded (``llava.eval.evaluation_check``). Then each device
loads the base once and answers its chunks of the test questions with the base alone and with one stage after the other.
What is finished is skipped, and killed work goes on where it stopped and ends with the same bytes: give the same
command again.

Under ``output/eval/<sequence>[-<method>][-<route>]``, for ``zero-shot`` and each stage: ``chunks/``, ``answers.jsonl``,
``scores.json``, ``rows.jsonl``; and ``accuracy_matrix.json`` with its picture, and with ``--page 1`` a page about
everything (``llava.eval.report``). Each stage's model card shows its row. Where the methods ``joint`` and
``individual`` are evaluated already, or this one with the task given, the matrix has the gaps to them.

With ``--pictures real blank shuffled`` the base and the last stage answer twice more, with blank pictures and with
other questions' ones, in folders ``blank`` and ``shuffled`` of their own. The loaded model, what the tower saw and the
encoded questions are shared; ``scores.json`` of the two then says how many answers change and what each metric loses.

Under a launcher of several processes (torchrun, DeepSpeed's, Slurm's), on one machine or on several with the same
folders, each process answers chunks of its own on a device of its own; the first checks, joins and scores.
"""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from llava.cli import parse
from llava.data.rows import write_jsonl
from llava.devices import has_accelerator, restricted_to, run_together, visible_devices
from llava.eval import eval_video_qa, report
from llava.eval.accuracy_matrix import DEFAULT_METRICS, MATRIX_NAME, fitting, write_matrix
from llava.eval.evaluation import Evaluation, Settings
from llava.eval.evaluation_record import write_evaluation_record
from llava.eval.ranks import Ranks
from llava.eval.score_schema import read_scores
from llava.eval.screen import screen
from llava.eval.shown_pictures import REAL
from llava.eval.text_metrics import TextScorer
from llava.locks import only_writer
from llava.slots.names import QUESTION
from llava.utils import UserError, in_a_line, quiet_libraries, run_cli


def main(argv: Sequence[str] | None = None) -> None:
    """Check, answer, score, draw."""
    words = list(sys.argv[1:] if argv is None else argv)
    settings = parse(Settings, words, __doc__)
    quiet_libraries()
    if settings.worker:
        number, count = map(int, settings.worker.split("/"))
        answer(Evaluation.of(settings, settings.chunks), number, count)
        return
    ranks = Ranks.here()
    with ExitStack() as stack:
        # Before torch is imported, which looking for devices needs: both take seconds.
        scorer = scorer_of(Evaluation.of(settings, 1), stack) if ranks.number == 0 else None
        devices = visible_devices()
        evaluation = Evaluation.of(settings, ranks.count if ranks.count > 1 else max(len(devices), 1))
        words = [*words, "--chunks", str(evaluation.chunks)]
        if scorer is None or ranks.count > 1:
            _evaluate_together(evaluation, devices, words, ranks, scorer)
            return
        begin(evaluation, ", ".join(devices) or "the CPU", stack)
        if len(devices) > 1:
            answer_on(devices[: evaluation.chunks], words)
        else:
            answer(evaluation)
        conclude(evaluation, scorer)


def _evaluate_together(
    evaluation: Evaluation, devices: Sequence[str], words: Sequence[str], ranks: Ranks, scorer: TextScorer | None
) -> None:
    """This process's part where a launcher has started several; the first has the scorer."""

    def check() -> None:
        if scorer is not None:
            begin(evaluation, f"{ranks.count} processes", stack)

    def work() -> None:
        if devices:
            answer_on([devices[ranks.place % len(devices)]], words, ranks.number, ranks.count)
        else:
            answer(evaluation, ranks.number, ranks.count)

    with ExitStack() as stack, ranks.together() as in_step:
        in_step(check)
        in_step(work)
        in_step(lambda: None if scorer is None else conclude(evaluation, scorer))


def scorer_of(evaluation: Evaluation, stack: ExitStack) -> TextScorer:
    """What will score the answers, until ``stack`` is closed; while they are still to come its Java loads METEOR's
    tables."""
    scorer = stack.enter_context(closing(TextScorer()))
    if not all(evaluation.answers_file(*found).is_file() for found in evaluation.passes):
        with suppress(OSError):  # is tried again, and told of, when it is needed
            scorer.start()
    return scorer


def begin(evaluation: Evaluation, places: str, stack: ExitStack) -> None:
    """Check everything, and hold the folder until ``stack`` is closed."""
    from llava.eval.evaluation_check import check_evaluation

    check_evaluation(evaluation)
    stack.enter_context(only_writer(evaluation.folder))
    say(f"{len(evaluation.models)} models, {evaluation.chunks} chunk(s) on {places}")


def conclude(evaluation: Evaluation, scorer: TextScorer) -> None:
    """Join the chunks of every model, score them, draw the accuracy matrix, print the screen of the last stage, and
    write the page where it is asked for."""
    for name, kind in evaluation.passes:
        merge(evaluation, name, kind)
    matrix, stages = score_answers(evaluation, scorer)
    write_evaluation_record(evaluation)
    print(screen(title(evaluation), read_scores(stages[-1])[0], matrix, where(evaluation)), flush=True)
    if evaluation.settings.page:
        write_page(evaluation.folder)


def write_page(folder: Path) -> None:
    """The page about an evaluation; where its files cannot be read or written, the results are whole all the same."""
    try:
        report.write_page(report.Arguments(outputs=[str(folder)]))
    except Exception as error:
        why = in_a_line(error)
        if why is None or isinstance(error, BrokenPipeError):
            raise
        again = f"python -m llava.eval.report {shlex.quote(str(folder))}"
        print(f"no page: {why}. The results are whole. Again: {again}", file=sys.stderr)


def score_answers(evaluation: Evaluation, scorer: TextScorer | None = None) -> tuple[dict[str, Any], list[Path]]:
    """Score the answers that are there, and draw the accuracy matrix; the stages themselves may be elsewhere.

    Args:
        scorer: see ``score_files``.

    Returns:
        the matrix, and the stages' scores.
    """
    from llava.continual.model_card import refresh_figures

    answered = {found: str(evaluation.answers_file(*found)) for found in evaluation.passes}
    say(f"scoring {len(answered)} answer files")
    sequence = evaluation.sequence
    train_files = [file for task in sequence.tasks for file in task.files]
    pictures: dict[str, dict[str, Path]] = {answered[name, REAL]: {} for name, _ in evaluation.models}
    for (name, kind), file in answered.items():
        if kind != REAL:
            pictures[answered[name, REAL]][kind] = Path(file)
    files = list(answered.values())
    eval_video_qa.score_files(
        eval_video_qa.Arguments(question_file=sequence.test, answers_file=files, train_file=train_files),
        pictures,
        tables=False,
        scorer=scorer,
    )
    scores = {name: evaluation.folder / name / eval_video_qa.SCORES_NAME for name, _ in evaluation.models}
    zero_shot = scores.pop(evaluation.ZERO_SHOT, None)
    metrics = sequence.metrics or DEFAULT_METRICS
    stages = list(scores.values())
    references = fitting(evaluation.references(eval_video_qa.SCORES_NAME), stages[-1], sequence.task_names, metrics)
    matrix = write_matrix(
        evaluation.folder, stages, sequence.task_names, metrics, zero_shot, references=references, tables=False
    )
    refresh_figures(evaluation.places.stages, matrix, evaluation.folder.name)
    return matrix, stages


def title(evaluation: Evaluation) -> str:
    """What was evaluated, in words."""
    settings = evaluation.settings
    route = f", route {settings.route}" if settings.route else ""
    return f"{settings.method} on {evaluation.sequence.name}{route}"


def where(evaluation: Evaluation) -> list[str]:
    """Where everything else lies."""
    return [f"every figure: {evaluation.folder / MATRIX_NAME} and */{eval_video_qa.SCORES_NAME} beside it"]


def answer(evaluation: Evaluation, number: int = 0, count: int = 1) -> None:
    """Answer every ``count``-th chunk from ``number`` on, with each model; the base is loaded where work is left."""

    @functools.cache
    def answerer():
        from llava.eval.answerer import Answerer
        from llava.eval.question_cache import QuestionCache

        # A GPU works a prefix out about as fast as it gets one from the main memory.
        shared = evaluation.sequence.keys.offset_scope == QUESTION and not has_accelerator()
        cache = QuestionCache(folder=evaluation.query_cache, prefixes=shared)
        return Answerer(evaluation.base, evaluation.loading, cache)

    for name, kind in evaluation.passes:
        for index in range(number, evaluation.chunks, count):
            evaluation.chunk(name, index, kind).write(answerer, quiet=number > 0)


def answer_on(devices: Sequence[str], words: Sequence[str], first: int = 0, count: int | None = None) -> None:
    """Answer with one process a device; none outlives this one.

    Args:
        first, count: number of the first of them among all that answer, and how many those are (default: they alone).

    Raises:
        UserError: one of them failed, after it has said why.
    """
    command = [sys.executable, "-m", "llava.eval.evaluate_sequence", *words]
    all_of_them = count or len(devices)
    failed = run_together(
        [
            ([*command, "--worker", f"{number}/{all_of_them}"], restricted_to(device))
            for number, device in enumerate(devices, first)
        ]
    )
    if failed:
        named = ", ".join(devices[place] for place in failed)
        raise UserError(f"answering failed on device {named} (message above); run the same command again")


def merge(evaluation: Evaluation, name: str, pictures: str) -> None:
    """Join a model's chunks of one kind of picture into one file of answers."""
    from llava.eval.answer_file import merge_answers

    chunks = [evaluation.chunk(name, index, pictures).answers_file for index in range(evaluation.chunks)]
    write_jsonl(evaluation.answers_file(name, pictures), merge_answers(evaluation.rows, chunks))


def say(text: str) -> None:
    print(f"[evaluate] {text}", flush=True)


if __name__ == "__main__":
    run_cli(main)
