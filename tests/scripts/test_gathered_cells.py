"""Cells of a benchmark that were made on another machine: under other paths, without stages, without Java."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_cells
from tiny_world import run_main, write_sequence

from llava.cli import parse
from llava.continual import model_card
from llava.continual.benchmark import Benchmark
from llava.data.answers import with_checksum
from llava.data.rows import write_jsonl
from llava.eval import evaluate_sequence, scored, text_metrics
from llava.eval.evaluation import Evaluation, Settings
from scripts import run_cells

RUNS = [{"method": "joint"}, {"method": "retrieval"}, {"name": "given", "method": "retrieval", "route": "oracle"}]


class Killed(BaseException):
    """Stands for a kill."""


def machine(folder, base):
    """A benchmark with its data and base, all in a folder of its own; returns its file and what names the places."""
    folder.mkdir()
    sequence = write_sequence(folder, ("abd", "chest"), rows=6)
    values = json.loads(sequence.read_text())
    values |= {"keys": {"rank": 2, "top_k": 2, "text_encoder": str(shutil.copytree(base, folder / "encoder"))}}
    sequence.write_text(json.dumps({**values, "metrics": ["exact_match", "meteor"]}))
    file = folder / "short.json"
    file.write_text(json.dumps({"sequence": str(sequence), "seeds": [0], "rows": 4, "runs": RUNS}))
    return file, {"BASE_MODEL": str(shutil.copytree(base, folder / "base")), "OUTPUT_DIR": str(folder / "output")}


def answer(argv):
    """Stands for an evaluation: made-up answers, with their real scores."""
    evaluation = Evaluation.of(parse(Settings, argv), 1)
    for name, kind in evaluation.passes:
        rows = [
            {"question_id": row.id, "prompt": row.conversations[0][1], "text": "yes it is", "model_id": name}
            for row in evaluation.rows
        ]
        write_jsonl(evaluation.answers_file(name, kind), [with_checksum({**row, "metadata": {}}) for row in rows])
    evaluate_sequence.score_answers(evaluation)


@pytest.fixture
def gathered(world, tmp_path, monkeypatch):
    """A benchmark here, whose cells another machine without Java has made; they come without their stages."""
    with monkeypatch.context() as there:
        file, environ = machine(tmp_path / "there", world.base)
        for name, value in environ.items():
            there.setenv(name, value)
        tiny_cells.stand_in(there.setattr)
        there.setattr(evaluate_sequence, "main", answer)
        there.setattr(model_card, "refresh_figures", lambda *rest: None)
        java_is(there, False)
        run_main(run_cells.main, file)
        made = Benchmark.read(file)
    file, environ = machine(tmp_path / "here", world.base)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    found = Benchmark.read(file)
    for cell in found.cells:
        shutil.copytree(
            made.folder(cell), found.folder(cell), ignore=shutil.ignore_patterns("llava-*_*", "checkpoints")
        )
        shutil.copytree(made.matrix(cell).parent, found.matrix(cell).parent, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "there")
    monkeypatch.setattr(run_cells, "call", lambda *words: pytest.fail("a stage is trained again"))
    monkeypatch.setattr(evaluate_sequence, "main", lambda *words: pytest.fail("a question is answered again"))
    return file


class Meteor:
    """Stands for METEOR's process."""

    ended = False

    def __init__(self, java):
        pass

    def rows(self, references, predictions):
        return np.ones((len(references), 23))

    def close(self):
        pass


def java_is(monkeypatch, there):
    """Whether a Java is found, which is none: what it would do is done here."""
    monkeypatch.setattr(text_metrics, "find_java", lambda: "java" if there else None)
    monkeypatch.setattr(scored, "_java", text_metrics.find_java)
    monkeypatch.setattr(text_metrics, "ptb_tokenize", lambda texts, java: [text.lower() for text in texts])
    monkeypatch.setattr(text_metrics, "MeteorProcess", Meteor)


def files(file, pattern):
    benchmark = Benchmark.read(file)
    return {path.relative_to(benchmark.root): path.read_bytes() for path in sorted(benchmark.root.glob(pattern))}


def test_what_is_whole_is_accepted_wherever_it_was_made(gathered, monkeypatch, capsys):
    java_is(monkeypatch, False)
    before = files(gathered, "*/*/*/eval/**/*.json")
    assert len(before) == 3 * 4
    run_main(run_cells.main, gathered)
    assert "[benchmark] 3 of 3 cells" in capsys.readouterr().out and files(gathered, "*/*/*/eval/**/*.json") == before


def test_what_java_adds_is_made_of_the_answers_that_came(gathered, monkeypatch, capsys):
    java_is(monkeypatch, True)
    answers, benchmark = files(gathered, "**/answers.jsonl"), Benchmark.read(gathered)
    assert len(answers) == 9 and not list(benchmark.root.glob("**/slots.pth"))
    run_main(run_cells.main, gathered)
    assert capsys.readouterr().out.count("its scores are incomplete") == 3
    for cell in benchmark.cells:
        matrix = benchmark.matrix(cell).read_text()
        assert json.loads(matrix)["metrics"]["meteor"]["summary"] is not None and str(gathered.parent) in matrix
    assert files(gathered, "**/answers.jsonl") == answers and not list(benchmark.root.glob("*/*/*/llava-*"))
    monkeypatch.setattr(evaluate_sequence, "score_answers", lambda *rest: pytest.fail("it is scored already"))
    run_main(run_cells.main, gathered)


@pytest.mark.parametrize("missing", ["accuracy_matrix.json", "rows.jsonl", "scores.json"])
def test_scores_that_did_not_come_are_made_of_the_answers(gathered, monkeypatch, missing):
    """Also where that is killed before its end."""
    java_is(monkeypatch, False)
    wanted = files(gathered, "*/*/*/eval/**/rows.jsonl")
    for path in Benchmark.read(gathered).root.glob(f"**/{missing}"):
        path.unlink()

    def killed(*rest, **more):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(evaluate_sequence, "write_matrix", killed)
        run_main(run_cells.main, gathered)
    run_main(run_cells.main, gathered)
    assert files(gathered, "*/*/*/eval/**/rows.jsonl") == wanted and len(files(gathered, "*/*/*/eval/*/*.json")) == 3


def test_answers_that_are_not_those_of_the_cell_are_not_scored(gathered, monkeypatch):
    for path in (found := Benchmark.read(gathered)).root.glob("joint/**/answers.jsonl"):
        path.write_text(path.read_text().replace("yes it is", "no it is not"))
    found.matrix(found.cells[0]).unlink()
    java_is(monkeypatch, False)
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        run_main(run_cells.main, gathered)


def test_another_encoder_under_the_same_name_is_another_cell(gathered):
    benchmark = Benchmark.read(gathered)
    cell = benchmark.cells[0]
    sequence = benchmark.sequence_of(cell)
    before = benchmark.identity(cell, sequence), benchmark.key_identity(sequence)
    Path(sequence.keys.text_encoder, "tokenizer_config.json").write_text("{}")
    assert benchmark.identity(cell, sequence) != before[0] and benchmark.key_identity(sequence) != before[1]
