"""Answer files that survive a kill: chunks of the questions, resuming, merging.

An answer file grows in the order of its questions, row by row, so what is there is a prefix of what will be there.
Each row's ``metadata`` names its *run*: a checksum over the model's files, the question file and every setting that
decides an answer; and where several rows have one ``question_id``, the row's *position* in the question file. A file is
resumed only by the run that began it, and chunks merge only within one run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from llava.checkpoints.kinds import ADAPTER_CONFIG
from llava.checkpoints.manifest import local_folder
from llava.checkpoints.schemas import read_settings
from llava.data.answers import read_answers, with_checksum
from llava.data.rows import Row
from llava.eval.answer_match import answers_of, missing_rows, position_of
from llava.locks import only_writer
from llava.targets import open_in_place, remove, replaceable
from llava.utils import UserError

RUN_LENGTH = 16


def split_evenly(total: int, parts: int) -> list[range]:
    """``parts`` consecutive ranges that cover ``total``; their lengths differ by at most one (some may be empty)."""
    if parts < 1:
        raise UserError(f"the number of chunks must be at least 1, not {parts}")
    edges = [total * part // parts for part in range(parts + 1)]
    return [range(start, stop) for start, stop in zip(edges, edges[1:])]


def chunk_range(total: int, chunks: int, index: int) -> range:
    """Row numbers of one chunk.

    Raises:
        UserError: the index is not one of ``0 .. chunks - 1``.
    """
    parts = split_evenly(total, chunks)
    if not 0 <= index < chunks:
        raise UserError(f"--chunk-idx {index} is not one of 0 to {chunks - 1} (--num-chunks is {chunks})")
    return parts[index]


def batches(total: int, size: int) -> list[range]:
    """Consecutive ranges of ``size`` rows. Fixed by the chunk alone: a resumed run batches as an undisturbed one."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def run_id(settings: Mapping[str, Any]) -> str:
    """A short checksum of everything that decides the answers."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:RUN_LENGTH]


def base_of(model: str) -> str | None:
    """The base that a checkpoint of its own parts names in its configs, where it lies there; ``None`` without one."""
    folder = local_folder(model)
    files = [] if folder is None else [folder / name for name in (ADAPTER_CONFIG, "config.json")]
    named = [read_settings(file).get("base_model_name_or_path") for file in files if file.is_file()]
    name = next(filter(None, named), None)
    if folder is None or name is None:
        return None
    places = [Path(name), *(parent / name for parent in folder.resolve().parents)]
    return str(next((place for place in places if place.is_dir()), name))


def answer_row(row: Row, text: str, model_id: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """An answer in the seed's format; the same model and question always give the same ``answer_id``."""
    import shortuuid

    place = {} if row.position is None else {"position": row.position}
    name = "/".join(map(str, (model_id, row.id, *place.values())))
    return {
        "question_id": row.id,
        "prompt": row.conversations[0][1],
        "text": text,
        "answer_id": shortuuid.uuid(name=name),
        "model_id": model_id,
        "metadata": {**metadata, **place},
    }


@contextmanager
def appending(
    path: str | Path, rows: Sequence[Row], model_id: str, run: str, replace: bool = False
) -> Iterator[tuple[int, IO[bytes]]]:
    """Open an answer file to go on with it: yields how many rows are answered already, and the file to write to.

    A torn last line is cut off. Only one process writes at a time: a second one is refused. A run that fails before its
    first answer leaves no file.

    Args:
        rows: the questions that the file is to answer, in order.
        replace: start again when the file was begun by another run, instead of refusing.

    Raises:
        UserError: the file holds something else than the first answers of this run.
    """
    target = replaceable(path)
    if target is None:  # a device or a pipe: nothing of it can be read again
        with open_in_place(path) as stream:
            yield 0, stream
        return
    with _opened(target) as stream:
        _cut_torn_line(stream)
        done, reason = progress(target, rows, model_id, run, replace)
        if reason:
            print(f"{target}: {reason}; starting again", flush=True)
            stream.truncate(0)
        yield done, stream


def append(stream: IO[bytes], answers: Sequence[Mapping[str, Any]]) -> None:
    """Write answers, each with its checksum, and hand them to the system, so that a kill loses none of them."""
    lines = "".join(json.dumps(with_checksum(answer), ensure_ascii=False, allow_nan=False) + "\n" for answer in answers)
    stream.write(lines.encode("utf-8"))
    stream.flush()


@contextmanager
def _opened(target: Path) -> Iterator[IO[bytes]]:
    """The file for this process alone; one that is still empty when the block fails is removed."""
    with only_writer(target):
        try:
            with open(target, "a+b") as stream:
                yield stream
        except BaseException:
            if target.is_file() and target.stat().st_size == 0:
                remove(target)
            raise


def _cut_torn_line(stream: IO[bytes]) -> None:
    stream.seek(0)
    data = stream.read()
    stream.truncate(data.rfind(b"\n") + 1)
    stream.seek(0, os.SEEK_END)


def progress(
    path: str | Path, rows: Sequence[Row], model_id: str, run: str, replace: bool = False
) -> tuple[int, str | None]:
    """How many rows a file answers already, and why it must be started again, or ``None``.

    Raises:
        UserError: it must, and is not to be replaced.
    """
    if replaceable(path) is None or not Path(path).is_file():
        return 0, None
    try:
        answers = read_answers(path, partial_last_line=True)
        reason = _mismatch(answers, rows, model_id, run)
    except UserError as error:
        reason = f"it cannot be resumed ({error})"
    if reason and not replace:
        raise UserError(f"{path}: {reason}; delete the file, choose another, or start again with --stale replace")
    return (0, reason) if reason else (len(answers), None)


def _mismatch(answers: Sequence[Mapping[str, Any]], rows: Sequence[Row], model_id: str, run: str) -> str | None:
    """Why a file of these answers cannot be gone on with, or None."""
    if len(answers) > len(rows):
        return f"it has {len(answers)} answers, more than the {len(rows)} questions of this run"
    for number, (answer, row) in enumerate(zip(answers, rows, strict=False), start=1):
        if answer.get("model_id") != model_id:
            return f"line {number} is by model {answer.get('model_id')!r}, this run's is {model_id!r}"
        same = (answer["question_id"], position_of(answer)) == (row.id, row.position)
        if not same or answer.get("prompt") != row.conversations[0][1]:
            return f"line {number} answers question_id {answer['question_id']!r} of another question file or chunk"
        if (answer.get("metadata") or {}).get("run") != run:
            return f"line {number} was made with other model weights or settings, or of other pictures"
    return None


def merge_answers(rows: Sequence[Row], chunks: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The chunks' answers in the questions' order.

    Raises:
        UserError: a chunk is missing; chunks of different models or runs; a question without an answer, answered
            twice, or unknown; rows of one id whose answers name no position.
    """
    answers: list[dict[str, Any]] = []
    origin: tuple[Any, Any] | None = None
    for path in chunks:
        if not Path(path).is_file():
            raise UserError(f"missing chunk: {path} (run it again: python -m llava.eval.model_vqa_loader …)")
        for answer in read_answers(path, partial_last_line=True):
            mark = answer.get("model_id"), (answer.get("metadata") or {}).get("run")
            origin = origin or mark
            if mark != origin:
                raise UserError(f"{path}: chunks of different runs, {origin} and {mark} (delete the stale chunk)")
            answers.append(answer)
    found = answers_of(rows, answers, "the chunks", by_order=False)
    if missing := missing_rows(rows, found):
        raise UserError(
            f"{len(missing)} of {len(rows)} questions have no answer, the first is question_id {missing[0]} "
            f"(a chunk is unfinished: run the evaluation again)"
        )
    return [answer for answer in found if answer is not None]
