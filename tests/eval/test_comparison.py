"""Two answer files against each other: differences by hand, what the interval is about, the command, the refusals."""

import json

import pytest

from llava.data.rows import question_row, write_jsonl
from llava.eval import eval_video_qa, text_metrics
from llava.utils import UserError

DOMAINS = ("abd", "chest")
REFERENCES = ["yes", "left lung", "no", "right", "yes", "no"]
TYPES = ["CLOSED", "OPEN", "CLOSED", "OPEN", "CLOSED", "CLOSED"]


@pytest.fixture
def questions(tmp_path):
    rows = [
        question_row(
            n, f"{n}.jpg", f"question {n}?", text, DOMAINS[n % 2], DOMAINS, answer_type=TYPES[n], question_type=labels
        )
        for n, (text, labels) in enumerate(zip(REFERENCES, ["PRES", ["POS", "PRES"], None, "POS", "PRES", []]))
    ]
    write_jsonl(tmp_path / "q.jsonl", rows)
    return tmp_path / "q.jsonl"


def write(folder, name, texts):
    write_jsonl(
        folder / name / "answers.jsonl",
        [{"question_id": n, "text": text, "model_id": "m"} for n, text in enumerate(texts)],
    )
    return str(folder / name / "answers.jsonl")


def run(questions, *words):
    eval_video_qa.main(["--question-file", str(questions), "--no-java", "--draws", "200", *map(str, words)])


def test_by_hand(tmp_path, questions, capsys):
    first = write(tmp_path, "a", REFERENCES)
    second = write(tmp_path, "b", ["Yes.", "lung", "yes", "right", "no", "no"])
    run(questions, "--compare", first, second, "--output-dir", tmp_path / "out")
    groups = json.loads((tmp_path / "out" / "comparison.json").read_text())["groups"]
    assert {name: group["rows"] for name, group in groups.items()} == {"overall": 6, "abd": 3, "chest": 3}
    overall = groups["overall"]
    assert overall["changed"]["value"] == 3 / 6  # "Yes." is the same answer
    exact = overall["figures"]["exact_match"]
    assert (exact["first"], exact["second"], exact["difference"], exact["n"]) == (1.0, 0.5, -0.5, 6)
    low, high = exact["ci95"]
    assert -1 <= low < -0.5 < high <= 0
    assert overall["figures"]["open_recall"]["difference"] == pytest.approx(-0.25)
    assert groups["abd"]["figures"]["exact_match"]["difference"] == pytest.approx(-2 / 3)
    assert groups["chest"]["figures"]["exact_match"]["difference"] == pytest.approx(-1 / 3)
    assert not {"majority_exact_match", "nearest_exact_match", "route_accuracy", "meteor"} & set(overall["figures"])
    assert not (tmp_path / "a" / "scores.json").exists()
    printed = capsys.readouterr().out
    assert f"{second} against {first}" in printed
    line = next(line for line in printed.splitlines() if line.startswith("exact_match"))
    assert line.split()[1:4] == ["1.000", "0.500", "-0.500"]


def test_the_interval_is_that_of_the_difference_on_the_same_questions(tmp_path, questions):
    """Where both always agree there is nothing to be unsure of, however unsure each figure is."""
    texts = ["yes", "x", "x", "right", "no", "x"]
    run(questions, "--compare", write(tmp_path, "a", texts), write(tmp_path, "b", texts), "--output-dir", tmp_path)
    overall = json.loads((tmp_path / "comparison.json").read_text())["groups"]["overall"]
    assert overall["changed"]["value"] == 0
    assert all(cell["difference"] == 0 and cell["ci95"] == [0, 0] for cell in overall["figures"].values())


def test_what_cannot_be_compared_is_refused(tmp_path, questions, capsys):
    first = write(tmp_path, "a", REFERENCES)
    for words, message in ((["--compare", first], "two answers files"), ([], "required: --answers-file")):
        with pytest.raises(SystemExit):
            run(questions, *words)
        assert message in capsys.readouterr().err
    short = write(tmp_path, "b", REFERENCES[:4])
    with pytest.raises(UserError, match="without an answer: 4, 5"):
        run(questions, "--compare", first, short)
    with pytest.raises(UserError, match="answer different questions"):
        run(questions, "--compare", first, short, "--allow-partial")


def test_scores_stand_by_answer_type_and_question_type_too(tmp_path, questions, capsys):
    answers = write(tmp_path, "a", ["yes", "left lung", "yes", "left", "no", "no"])
    run(questions, "--answers-file", answers, "--train-file", questions)
    scores = json.loads((tmp_path / "a" / "scores.json").read_text())

    def found(kind):
        return {name: (part["rows"], part["figures"]["exact_match"]["value"]) for name, part in scores[kind].items()}

    assert found("answer_types") == {"CLOSED": (4, 0.5), "OPEN": (2, 0.5)}
    assert found("question_types") == {"POS": (2, 0.5), "PRES": (3, pytest.approx(2 / 3))}  # one row has both labels
    assert (
        scores["answer_types"]["CLOSED"]["figures"]["majority_exact_match"]["value"] == 0.5
    )  # of closed training rows
    assert scores["groups"]["overall"]["figures"]["nearest_exact_match"]["value"] == 1.0  # the very same questions
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("question type")).split()[2:4] == ["rows", "exact_match"]
    assert next(line for line in lines if line.startswith("PRES")).split()[:3] == ["PRES", "3", "0.667"]


def test_scores_of_an_older_form_are_made_anew(tmp_path, questions):
    answers = write(tmp_path, "a", REFERENCES)
    run(questions, "--answers-file", answers)
    target = tmp_path / "a" / "scores.json"
    made = target.read_bytes()
    older = json.loads(made)
    older["format_version"] = 1
    del older["groups"]["overall"]["figures"]["nearest_exact_match"]
    target.write_text(json.dumps(older))
    run(questions, "--answers-file", answers)
    assert target.read_bytes() == made


class StubMeteor:
    """In the place of METEOR's process."""

    started = 0
    asked: list = []

    def __init__(self, java):
        StubMeteor.started += 1

    def rows(self, references, predictions):
        StubMeteor.asked += zip(references, predictions, strict=True)
        return text_metrics.np.ones((len(references), 23))

    ended = False

    def close(self):
        pass


def test_java_starts_once_for_all_files_and_aligns_each_pair_once(tmp_path, questions, monkeypatch):
    calls = []

    def tokenize(texts, java):
        if texts:
            calls.append(list(texts))
        return [" ".join(text_metrics.plain_tokens(text)) for text in texts]

    monkeypatch.setattr(text_metrics, "find_java", lambda: "java")
    monkeypatch.setattr(text_metrics, "ptb_tokenize", tokenize)
    monkeypatch.setattr(text_metrics, "MeteorProcess", StubMeteor)
    StubMeteor.started, StubMeteor.asked = 0, []
    files = [write(tmp_path, name, [name, *REFERENCES[1:]]) for name in ("a", "b")]
    words = ["--question-file", str(questions), "--draws", "5", "--answers-file", *files, "--compare", *files]
    eval_video_qa.main(words)
    assert len(calls) == 1 and StubMeteor.started == 1
    assert len(StubMeteor.asked) == len(set(StubMeteor.asked)) == 6  # four pairs of the references, and "yes" with a, b
