"""Score answer files against their question file: a table per domain, and ``scores.json`` with every figure.

    python -m llava.eval.eval_video_qa --question-file data/test_vqa_rad.jsonl \\
        --answers-file output/eval/vqa-rad/*/answers.jsonl --train-file data/train_abd.jsonl data/train_chest.jsonl

Every answers file gets a ``scores.json`` and a ``rows.jsonl`` (the value of each metric for each row), beside itself
or under ``--output-dir/<model_id>/``. All files are scored in one process, so Java starts once. A file whose scores
are already there, from the same inputs and versions, is not scored again. Ids must match: a missing, surplus or double
answer is an error that names it. Where rows share an id, their answers are told apart by the position they name, or by
their order (``llava.eval.answer_match``).

The answer rows of the public prototype (``pred_response``, ``gt_response``) are read too, and its flags are known:
``--pred-path``, ``--gt-file``, and ``--output-json`` for a further file of the caption metrics in its form.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import llava
from llava.cli import SEEDS, fail, flag, parse, spelled
from llava.data.answers import parse_answer
from llava.data.jsonl import json_values
from llava.data.metric_names import METRICS, metric_names
from llava.data.rows import Row, read_rows, write_jsonl
from llava.eval.answer_match import answers_of, missing_rows, some, taken_by_order
from llava.eval.metrics import OVERALL, normalise, score
from llava.eval.score_schema import read_scores
from llava.eval.statistics import DRAWS, SEED
from llava.eval.text_metrics import TextScorer
from llava.files import atomic_write, file_sha256
from llava.inside import check_file_name
from llava.utils import UserError, require_file, run_cli

FORMAT_VERSION = 1
SCORES_NAME = "scores.json"
ROWS_NAME = "rows.jsonl"
ANSWER_NAMES = ("text", "answer", "pred", "pred_response")
"""Where a prediction may stand, as the prototype looks for it: this project's name first."""
PROTOTYPE_NAMES = {**{f"bleu_{n}": f"Bleu_{n}" for n in range(1, 5)}, "meteor": "METEOR", "rouge_l": "ROUGE_L"}
PROTOTYPE_NAMES["cider"] = "CIDEr"


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    question_file: str = flag(help="question rows with reference answers and domains", aliases=spelled("gt_file"))
    answers_file: list[str] = flag(help="one answers file per model or stage", aliases=spelled("pred_path"))
    train_file: list[str] = flag([], "training rows, for the majority baselines", empty=True)
    output_dir: str | None = flag(None, "write <output-dir>/<model_id>/scores.json (default: beside the answers)")
    output_json: str | None = flag(None, "write the caption metrics there too, as the prototype did (one answers file)")
    allow_partial: bool = flag(False, "score the answered questions only")
    no_java: bool = flag(False, "plain tokenizer, no METEOR")
    draws: int = flag(DRAWS, "bootstrap draws", least=1, most=10**6)
    seed: int = flag(SEED, "seed of the bootstrap", **SEEDS)
    force: bool = flag(False, "score again what is already scored")


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """The command line."""
    arguments = parse(Arguments, argv, __doc__)
    if arguments.draws < 2:
        fail("--draws must be at least 2")
    if arguments.output_json and len(arguments.answers_file) > 1:
        fail("--output-json is one file; give one answers file with it")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Score every answers file and print its table."""
    score_files(parse_arguments(argv))


def score_files(arguments: Arguments) -> None:
    """Score answers files and print their tables; Java starts once for all.

    Raises:
        UserError: a file is missing, or does not answer the questions (see ``match_answers``).
    """
    rows = read_rows(arguments.question_file)
    train_rows = [row for path in arguments.train_file for row in read_rows(path)]
    jobs = [_Job(path, rows, arguments) for path in arguments.answers_file]
    _refuse_shared_outputs(jobs)
    with closing(TextScorer(use_java=False if arguments.no_java else None)) as scorer:
        for job in jobs:
            scores = job.finished_scores(scorer.tokenizer)
            if scores is None:
                scores = job.score(train_rows, scorer)
            else:
                print(f"{job.target} is up to date")
            if arguments.output_json:
                write_caption_scores(Path(arguments.output_json), scores)
            print(score_table(scores), flush=True)


class _Job:
    """One answers file, checked against the question rows, and the place of its scores."""

    def __init__(self, path: str, rows: Sequence[Row], arguments: Arguments):
        self.arguments = arguments
        self.path = Path(path)
        answers = load_answers(self.path)
        self.rows, self.answers = match_answers(rows, answers, self.path, arguments.allow_partial)
        self.missing = len(rows) - len(self.rows)
        self.model_id = model_id_of(answers, self.path)
        folder = Path(arguments.output_dir) / self.model_id if arguments.output_dir else self.path.parent
        self.target = folder / SCORES_NAME
        if arguments.output_json and Path(arguments.output_json).resolve() == self.target.resolve():
            raise UserError(f"--output-json {self.target} is where all scores go; give the file another name")

    def provenance(self, tokenizer: str) -> dict[str, Any]:
        """What the scores follow from: equal provenance means equal scores."""
        arguments = self.arguments
        return {
            "package": {name: package_version(name) for name in ("llava", "pycocoevalcap", "numpy")},
            "question_file": _fingerprint(arguments.question_file),
            "answers_file": _fingerprint(self.path),
            "train_files": [_fingerprint(path) for path in arguments.train_file],
            "tokenizer": tokenizer,
            "draws": arguments.draws,
            "seed": arguments.seed,
            "unanswered_questions": self.missing,
            **_plugins(),
        }

    def finished_scores(self, tokenizer: str) -> dict[str, Any] | None:
        """The scores already on disk if they follow from the same inputs, else None."""
        if self.arguments.force or not self.target.is_file() or not self.target.with_name(ROWS_NAME).is_file():
            return None
        try:
            scores, _ = read_scores(self.target)
        except UserError:  # an older or foreign file: it is replaced
            return None
        return scores if _checksums(scores["provenance"]) == _checksums(self.provenance(tokenizer)) else None

    def score(self, train_rows: Sequence[Row], scorer: TextScorer) -> dict[str, Any]:
        """Score, write ``rows.jsonl`` and then ``scores.json``, return the scores."""
        arguments = self.arguments
        found = score(self.rows, self.answers, train_rows, scorer, arguments.draws, arguments.seed)
        per_row, by_domain = found.pop("per_row"), found.pop("by_domain")
        scores = {
            "format_version": FORMAT_VERSION,
            "model_id": self.model_id,
            **found,
            "rows_file": ROWS_NAME,
            "provenance": self.provenance(scorer.tokenizer),
        }
        write_jsonl(self.target.with_name(ROWS_NAME), _row_values(self.rows, self.answers, per_row, by_domain))
        with atomic_write(self.target) as stream:
            json.dump(scores, stream, indent=1, ensure_ascii=False, allow_nan=False)
            stream.write("\n")
        print(f"wrote {self.target}")
        return scores


# -- reading ---------------------------------------------------------------------------------------------------------


def load_answers(path: Path) -> list[dict[str, Any]]:
    """Answer rows, in this project's form or one of the prototype's (another name in place of ``text``)."""
    source = require_file(path, "answer file", "check the path, or run the evaluation first")
    answers = [parse_answer(_in_our_form(value), where) for where, value in json_values(source)]
    if not answers:
        raise UserError(f"{source}: the file holds no answers")
    return answers


def _in_our_form(value: Any) -> Any:
    """An answer with its prediction as ``text``; the prototype's may be a number."""
    names = value if isinstance(value, dict) else {}
    name = next((name for name in ANSWER_NAMES if name in names), ANSWER_NAMES[0])
    if name == ANSWER_NAMES[0]:
        return value
    said = value[name]
    is_number = isinstance(said, int | float) and not isinstance(said, bool)
    return {**value, "text": str(said) if is_number else said}


def match_answers(
    rows: Sequence[Row], answers: Sequence[Mapping[str, Any]], path: Path, allow_partial: bool = False
) -> tuple[list[Row], list[Mapping[str, Any]]]:
    """Rows and answers paired (see ``answers_of``), in the question file's order.

    Raises:
        UserError: a row answered twice, an answer to none, or (unless ``allow_partial``) a row without an answer; a
            row's ``gt_response`` that differs from the question file's reference.
    """
    found = answers_of(rows, answers, path)
    unsure = taken_by_order(rows, found)
    missing = missing_rows(rows, found)
    if missing and not allow_partial:
        raise UserError(
            f"{path}: questions without an answer: {some(missing)} (finish the run, or --allow-partial"
            f"{'; ' + unsure if unsure else ''})"
        )
    if unsure:
        print(f"{path}: {unsure}")
    pairs = [(row, answer) for row, answer in zip(rows, found, strict=True) if answer is not None]
    if not pairs:
        raise UserError(f"{path}: none of the questions is answered")
    for row, answer in pairs:
        reference = answer.get("gt_response")
        if reference is not None and row.answer is not None and normalise(str(reference)) != normalise(row.answer):
            raise UserError(
                f"{path}: question_id {row.id!r} has gt_response {reference!r} but the question file says "
                f"{row.answer!r} (score against the question file that the answers were made from)"
            )
    return [row for row, _ in pairs], [answer for _, answer in pairs]


def model_id_of(answers: Sequence[Mapping[str, Any]], path: Path) -> str:
    """The one ``model_id`` of an answers file; the file's own name where rows have none.

    Raises:
        UserError: answers of several models in one file, or an id that cannot name a folder.
    """
    names = {str(answer.get("model_id") or path.stem) for answer in answers}
    if len(names) != 1:
        raise UserError(
            f"{path}: answers of several models in one file: {some(sorted(names))} (give one file per model)"
        )
    name = names.pop()
    check_file_name(name, f"{path}: model_id")
    return name


def _refuse_shared_outputs(jobs: Sequence[_Job]) -> None:
    places: dict[Path, Path] = {}
    for job in jobs:
        other = places.setdefault(job.target, job.path)
        if other is not job.path:
            raise UserError(
                f"{other} and {job.path} would both write {job.target} (keep them in folders of their own, "
                f"and with --output-dir give them different model_ids)"
            )


# -- writing ---------------------------------------------------------------------------------------------------------


def package_version(name: str) -> str:
    """A package's version; this package's own also when it runs from the checkout."""
    if name == "llava":
        return llava.__version__
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _plugins() -> dict[str, Any]:
    """The files of metrics from outside the package, where there are some: other code means other scores."""
    own = [metric for metric in METRICS if not metric.__module__.startswith("llava.")]
    files = {metric.name: str(sys.modules[metric.__module__].__file__) for metric in own}
    return {"plugins": {name: _fingerprint(file) for name, file in sorted(files.items())}} if files else {}


def _fingerprint(path: str | Path) -> dict[str, str]:
    return {"path": str(path), "sha256": file_sha256(path)}


def _checksums(provenance: Any) -> Any:
    """Provenance without paths: a file that was moved is still the same file."""
    if isinstance(provenance, dict):
        return {key: _checksums(value) for key, value in provenance.items() if key != "path"}
    return [_checksums(value) for value in provenance] if isinstance(provenance, list) else provenance


def write_caption_scores(path: Path, scores: Mapping[str, Any]) -> None:
    """The caption metrics alone, as the prototype wrote them: ``{group: {"Bleu_1": value, ...}}``, ``overall`` first.

    A metric that is missing (METEOR without Java) is left out.
    """
    groups = scores["groups"]
    found = {}
    for name in [OVERALL, *sorted(groups.keys() - {OVERALL})]:
        figures = groups[name]["figures"]
        values = {theirs: figures[ours]["value"] for ours, theirs in PROTOTYPE_NAMES.items()}
        found[name] = {theirs: value for theirs, value in values.items() if value is not None}
    with atomic_write(path) as stream:
        json.dump(found, stream, indent=4, ensure_ascii=False, allow_nan=False)
        stream.write("\n")
    print(f"wrote {path}")


def _row_values(
    rows: Sequence[Row],
    answers: Sequence[Mapping[str, Any]],
    per_row: Mapping[str, list],
    by_domain: Sequence[Mapping[str, Mapping[str, float]]],
) -> Iterator[dict[str, Any]]:
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        yield {
            "question_id": row.id,
            **({} if row.position is None else {"position": row.position}),
            "domain": row.domain,
            "answer_type": row.answer_type,
            "question": row.question,
            "reference": row.answer,
            "prediction": answer["text"],
            "scores": {name: column[number] for name, column in per_row.items() if column[number] is not None},
            **({"scores_by_domain": by_domain[number]} if by_domain[number] else {}),
        }


def score_table(scores: Mapping[str, Any]) -> str:
    """The scores as text: one line a metric, one column a group, values with their 95 % intervals."""
    groups = scores["groups"]
    names = [OVERALL, *sorted(groups.keys() - {OVERALL})]
    lines = [["", *names], ["rows", *(str(groups[name]["rows"]) for name in names)]]
    lines.append(["  of them closed", *(str(groups[name]["closed_rows"]) for name in names)])
    for metric in metric_names():
        figures = [groups[name]["figures"][metric] for name in names]
        if any(figure["value"] is not None for figure in figures):
            lines.append([metric, *map(_cell, figures)])
    lines.append(["empty answers", *(str(groups[name]["empty_answers"]) for name in names)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(names) + 1)]
    text = [
        line[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    ]
    tokenizer = scores["tokenizer"].split(" (")[0]
    title = f"\n{scores['model_id']}  (95 % bootstrap interval in brackets; tokenizer: {tokenizer})"
    several, none = scores.get("rows_of_several_domains"), scores.get("rows_of_no_domain")
    reasons = [f"rows of several domains, counted under each and overall once: {several}"] if several else []
    reasons += [f"rows of no domain, counted overall alone: {none}"] if none else []
    reasons += [
        f"{metric}: missing, {figure['reason']}"
        for metric, figure in groups[OVERALL]["figures"].items()
        if figure["value"] is None
    ]
    return "\n".join([title, *text, *reasons])


def _cell(figure: Mapping[str, Any]) -> str:
    if figure["value"] is None:
        return "-"
    low, high = figure["ci95"]
    return f"{figure['value']:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    run_cli(main)
