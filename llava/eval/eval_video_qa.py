"""Score answer files against their question file: a table per domain, and ``scores.json`` with every figure.

    python -m llava.eval.eval_video_qa --question-file data/test_vqa_rad.jsonl \\
        --answers-file output/eval/vqa-rad/*/answers.jsonl --train-file data/train_abd.jsonl data/train_chest.jsonl

Every answers file gets a ``scores.json`` and a ``rows.jsonl`` (the value of each metric for each row), beside itself
or under ``--output-dir/<model_id>/``. All files are scored in one process, so Java starts once. A file whose scores
are already there, from the same inputs and versions, is not scored again. Ids must match: a missing, surplus or double
answer is an error that names it. Where rows share an id, their answers are told apart by the position they name, or by
their order (``llava.eval.answer_match``).

``--train-file`` adds what is reached without looking: the commonest training answer, and the answer of the training
question nearest in words. ``--compare A B`` compares two answer files by a paired bootstrap, also without scoring any;
with ``--output-dir`` the comparison is written to ``comparison.json`` there.

The answer rows of the public prototype (``pred_response``, ``gt_response``) are read too, and its flags are known:
``--pred-path``, ``--gt-file``, and ``--output-json`` for a further file of the caption metrics in its form.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import llava
from llava.cli import SEEDS, fail, flag, parse, spelled
from llava.data.answers import CHECKSUM, parse_answer
from llava.data.jsonl import json_values
from llava.data.metric_names import METRICS
from llava.data.rows import Row, read_rows, write_jsonl
from llava.eval.answer_match import answers_of, missing_rows, some, taken_by_order
from llava.eval.comparison import compare, comparison_table, drops, pictures_table
from llava.eval.metrics import OVERALL, normalise, score
from llava.eval.metrics.scoring import Prepared
from llava.eval.score_schema import read_scores
from llava.eval.score_table import score_table
from llava.eval.statistics import DRAWS, SEED
from llava.eval.text_metrics import METEOR_FAILED, TextScorer
from llava.files import atomic_write, file_sha256, values_sha256
from llava.inside import check_file_name
from llava.progress import Progress
from llava.utils import UserError, require_file, run_cli

FORMAT_VERSION = 2
SCORES_NAME = "scores.json"
ROWS_NAME = "rows.jsonl"
COMPARISON_NAME = "comparison.json"
ANSWER_NAMES = ("text", "answer", "pred", "pred_response")
"""Where a prediction may stand, as the prototype looks for it: this project's name first."""
PROTOTYPE_NAMES = {**{f"bleu_{n}": f"Bleu_{n}" for n in range(1, 5)}, "meteor": "METEOR", "rouge_l": "ROUGE_L"}
PROTOTYPE_NAMES["cider"] = "CIDEr"


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    question_file: str = flag(help="question rows with reference answers and domains", aliases=spelled("gt_file"))
    answers_file: list[str] = flag([], "one answers file per model or stage", aliases=spelled("pred_path"))
    compare: list[str] = flag([], "two answers files: the second against the first")
    train_file: list[str] = flag([], "training rows, for the majority and nearest-question baselines", empty=True)
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
    if len(arguments.compare) not in (0, 2):
        fail("--compare takes two answers files")
    if not arguments.answers_file and not arguments.compare:
        fail("the following arguments are required: --answers-file, or --compare")
    if arguments.output_json and len(arguments.answers_file) > 1:
        fail("--output-json is one file; give one answers file with it")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Score every answers file and print its table, then the comparison."""
    score_files(parse_arguments(argv))


def score_files(
    arguments: Arguments,
    pictures: Mapping[str, Mapping[str, Path]] | None = None,
    tables: bool = True,
    scorer: TextScorer | None = None,
) -> None:
    """Score answers files and print their tables; Java starts once for all.

    Args:
        pictures: of an answers file by kind the file of the same model's answers to other pictures; its scores say what
            the pictures contribute.
        tables: False prints none.
        scorer: the one to use, and to leave open; one is started and ended here otherwise.

    Raises:
        UserError: a file is missing, or does not answer the questions (see ``match_answers``).
    """
    rows = read_rows(arguments.question_file)
    train_rows = [row for path in arguments.train_file for row in read_rows(path)]
    jobs = [_Job(path, rows, arguments, (pictures or {}).get(path)) for path in arguments.answers_file]
    compared = [_Answers(path, rows, arguments.allow_partial) for path in arguments.compare]
    _refuse_shared_outputs(jobs)
    use_java = False if arguments.no_java else None
    with closing(TextScorer(use_java)) if scorer is None else nullcontext(scorer) as scorer:
        finished = [job.finished_scores(scorer.tokenizer) for job in jobs]
        left = [job for job, found in zip(jobs, finished, strict=True) if found is None]
        scorer.tokenize([text for job in left for part in (job, *job.pictures.values()) for text in part.texts()])
        shown = Progress("scoring", "file", jobs, quiet=tables)  # tables show how far it is
        for job, scores in zip(shown, finished, strict=True):
            if scores is None:
                scores = job.score(train_rows, scorer)
            else:
                print(f"{job.target} is up to date")
            if arguments.output_json:
                write_caption_scores(Path(arguments.output_json), scores)
            if not tables:
                continue
            print(score_table(scores), flush=True)
            if scores.get("pictures"):
                print(pictures_table(scores["pictures"]), flush=True)
        if compared:
            _compare(compared, arguments, scorer)


def _compare(files: Sequence[_Answers], arguments: Arguments, scorer: TextScorer) -> None:
    """Print the comparison of two answers files, and write it where there is a folder for it."""
    first, second = files
    found = _compared(first, second, arguments, scorer)
    print(f"\n{second.path} against {first.path}")
    print(comparison_table(found, ("first", "second")), flush=True)
    if arguments.output_dir:
        provenance = {
            "question_file": _fingerprint(arguments.question_file),
            "first": _fingerprint(first.path),
            "second": _fingerprint(second.path),
            "tokenizer": scorer.tokenizer,
            "draws": arguments.draws,
            "seed": arguments.seed,
        }
        result = {"format_version": FORMAT_VERSION, "groups": found, "provenance": provenance}
        _write(Path(arguments.output_dir) / COMPARISON_NAME, result)


def _compared(first: _Answers, second: _Answers, arguments: Arguments, scorer: TextScorer) -> dict[str, Any]:
    """See ``compare``.

    Raises:
        UserError: the two don't answer the same questions.
    """
    if [row.key for row in first.rows] != [row.key for row in second.rows]:
        raise UserError(f"{first.path} and {second.path} answer different questions (finish both runs)")
    scorer.tokenize([*first.texts(), *second.texts()])
    mine, theirs = (Prepared.of(side.rows, side.answers, (), scorer) for side in (first, second))
    return compare(mine, theirs, arguments.draws, arguments.seed)


class _Answers:
    """One answers file, checked against the question rows."""

    def __init__(self, path: str | Path, rows: Sequence[Row], allow_partial: bool):
        self.path = Path(path)
        self.given = load_answers(self.path)
        self.rows, self.answers = match_answers(rows, self.given, self.path, allow_partial)
        self.missing = len(rows) - len(self.rows)

    def texts(self) -> Iterable[str]:
        """References and predictions."""
        return (text for row, answer in zip(self.rows, self.answers) for text in (row.answer or "", answer["text"]))


class _Job(_Answers):
    """An answers file to be scored, the same model's answers to other pictures, and the place of the scores."""

    def __init__(self, path: str, rows: Sequence[Row], arguments: Arguments, pictures: Mapping[str, Path] | None):
        super().__init__(path, rows, arguments.allow_partial)
        self.arguments = arguments
        others = {} if pictures is None else pictures
        self.pictures = {kind: _Answers(other, rows, arguments.allow_partial) for kind, other in others.items()}
        self.model_id = model_id_of(self.given, self.path)
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
            **(
                {"pictures": {kind: _fingerprint(p.path) for kind, p in self.pictures.items()}} if self.pictures else {}
            ),
            **_plugins(),
        }

    def finished_scores(self, tokenizer: str) -> dict[str, Any] | None:
        """The scores already on disk if they follow from the same inputs, else None."""
        if self.arguments.force or not self.target.is_file() or not self.target.with_name(ROWS_NAME).is_file():
            return None
        try:
            scores, _ = read_scores(self.target)
        except UserError:  # an older, foreign or damaged file: it is replaced
            return None
        same = scores.get("format_version") == FORMAT_VERSION and not _failed(scores)
        return scores if same and _checksums(scores["provenance"]) == _checksums(self.provenance(tokenizer)) else None

    def score(self, train_rows: Sequence[Row], scorer: TextScorer) -> dict[str, Any]:
        """Score, write ``rows.jsonl`` and then ``scores.json``, return the scores."""
        arguments = self.arguments
        found = score(self.rows, self.answers, train_rows, scorer, arguments.draws, arguments.seed)
        per_row, by_domain = found.pop("per_row"), found.pop("by_domain")
        scores = {
            "format_version": FORMAT_VERSION,
            "model_id": self.model_id,
            **found,
            **({"pictures": self.compare_pictures(scorer)} if self.pictures else {}),
            "rows_file": ROWS_NAME,
            "provenance": self.provenance(scorer.tokenizer),
        }
        write_jsonl(self.target.with_name(ROWS_NAME), _row_values(self.rows, self.answers, per_row, by_domain))
        scores["rows_sha256"] = file_sha256(self.target.with_name(ROWS_NAME))
        scores[CHECKSUM] = values_sha256(scores)
        _write(self.target, scores)
        return scores

    def compare_pictures(self, scorer: TextScorer) -> dict[str, Any]:
        """By kind of picture shown in place of the real ones, what is lost."""
        kinds = self.pictures.items()
        return {kind: {"groups": drops(_compared(self, other, self.arguments, scorer))} for kind, other in kinds}


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


def _failed(scores: Mapping[str, Any]) -> bool:
    """Whether figures are missing because a process ended, which another time it may not."""
    figures = (figure for group in scores["groups"].values() for figure in group["figures"].values())
    return any(str(figure.get("reason", "")).startswith(METEOR_FAILED) for figure in figures)


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


def _write(path: Path, value: Mapping[str, Any]) -> None:
    with atomic_write(path) as stream:
        json.dump(value, stream, indent=1, ensure_ascii=False, allow_nan=False)
        stream.write("\n")
    print(f"wrote {path}")


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


if __name__ == "__main__":
    run_cli(main)
