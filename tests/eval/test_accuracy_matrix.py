"""The accuracy matrix from stages' scores: values by hand, intervals, refusals, the picture."""

import json
import sys

import pytest
from PIL import Image

from llava.data.rows import question_row, write_jsonl
from llava.eval import accuracy_matrix, eval_video_qa
from llava.utils import UserError

TASKS = ("abd", "chest")
# Right answers out of four per task: zero-shot, after abd, after chest.
RIGHT = {"tiny-base": (1, 0), "llava-tiny_abd": (4, 1), "llava-tiny_abd_chest": (2, 3)}


def write_questions(path, answer="yes"):
    domains = [task for task in TASKS for _ in range(4)]
    write_jsonl(path, [question_row(n, "a.jpg", f"q {n}?", answer, task, TASKS) for n, task in enumerate(domains)])
    return path


def score(folder, questions, model, right, *more):
    texts = ["yes" if number % 4 < right[number // 4] else "no" for number in range(8)]
    rows = [{"question_id": n, "text": text, "model_id": model} for n, text in enumerate(texts)]
    write_jsonl(folder / model / "answers.jsonl", rows)
    files = ["--question-file", str(questions), "--answers-file", str(folder / model / "answers.jsonl")]
    eval_video_qa.main([*files, "--no-java", "--draws", "50", *more])
    return str(folder / model / "scores.json")


@pytest.fixture
def scores(tmp_path):
    questions = write_questions(tmp_path / "q.jsonl")
    return [score(tmp_path, questions, model, right) for model, right in RIGHT.items()]


def run(folder, scores, *more, zero_shot=True, tasks=TASKS):
    first = ["--zero-shot", scores[0]] if zero_shot else []
    names = ["--scores", *scores[1:], "--tasks", *tasks, "--output-dir", str(folder), "--draws", "200"]
    accuracy_matrix.main([*names, *first, *more])
    return json.loads((folder / "accuracy_matrix.json").read_text())


def test_by_hand(tmp_path, scores, capsys):
    result = run(tmp_path, scores, "--metrics", "exact_match", "bleu_1", "meteor")
    exact = result["metrics"]["exact_match"]
    assert exact["matrix"] == [[1.0, 0.25], [0.5, 0.75]]
    assert exact["zero_shot"] == [0.25, 0.0]
    assert exact["n"] == [4, 4]
    figures = {name: figure["value"] for name, figure in exact["summary"].items()}
    expected = {"average_final": 0.625, "learning_accuracy": 0.875, "bwt": -0.5, "forgetting": 0.5, "fwt": 0.25}
    assert figures == {**expected, "average_over_stages": (1.0 + 0.625) / 2}
    assert exact["learning_curve"]["value"] == [1.0, 0.625] and len(exact["learning_curve"]["ci95"]) == 2
    assert exact["references"] == {}
    low, high = exact["summary"]["bwt"]["ci95"]
    assert -1 <= low < -0.5 < high <= 0
    assert result["stages"] == ["llava-tiny_abd", "llava-tiny_abd_chest"]
    assert result["zero_shot_model"] == "tiny-base"
    assert result["formulas"]["bwt"]
    assert len(result["provenance"]["question_file"]["sha256"]) == 64
    assert result["metrics"]["bleu_1"]["summary"]["bwt"]["ci95"] is None
    assert result["metrics"]["meteor"]["summary"] is None
    assert "switched off" in result["metrics"]["meteor"]["reason"]
    printed = capsys.readouterr().out
    assert "after chest" in printed
    assert "BWT               -0.500" in printed


def test_a_row_of_two_tasks_stands_in_both_columns_with_its_interval(tmp_path):
    questions = tmp_path / "q.jsonl"
    domains = [{"abd": True}, {"abd": True, "chest": True}, {"chest": True}, {"abd": False}]
    rows = [
        {"question_id": n, "text": "q?", "gpt4_answer": "yes", "domain": domain} for n, domain in enumerate(domains)
    ]
    write_jsonl(questions, rows)
    scores = []
    for model, texts in (("m1", "yes no no yes"), ("m2", "no yes yes yes")):
        answers = [{"question_id": n, "text": text, "model_id": model} for n, text in enumerate(texts.split())]
        write_jsonl(tmp_path / model / "answers.jsonl", answers)
        files = ["--question-file", questions, "--answers-file", tmp_path / model / "answers.jsonl"]
        eval_video_qa.main([*map(str, files), "--no-java", "--draws", "50", "--train-file", str(questions)])
        scores.append(str(tmp_path / model / "scores.json"))
    result = run(tmp_path, [scores[0], *scores], "--metrics", "exact_match", "majority_exact_match", zero_shot=False)
    exact = result["metrics"]["exact_match"]
    assert exact["matrix"] == [[0.5, 0.0], [0.5, 1.0]] and exact["n"] == [2, 2]
    assert exact["summary"]["bwt"] == {"value": 0.0, "ci95": [-1.0, 1.0]}
    assert result["metrics"]["majority_exact_match"]["matrix"] == [[1.0, 1.0], [1.0, 1.0]]


def test_gaps_to_other_methods_final_scores(tmp_path, scores, capsys):
    joint = score(tmp_path, tmp_path / "q.jsonl", "llava-tiny-joint", (3, 4))
    result = run(tmp_path, scores, "--reference", f"joint={joint}", f"task_given={scores[2]}")
    assert result["references"] == {"joint": "llava-tiny-joint", "task_given": "llava-tiny_abd_chest"}
    exact = result["metrics"]["exact_match"]
    assert exact["references"]["joint"] == [0.75, 1.0] and exact["matrix"] == [[1.0, 0.25], [0.5, 0.75]]
    gap = exact["summary"]["gap_to_joint"]
    assert gap["value"] == 0.25 and gap["ci95"][0] <= 0.25 <= gap["ci95"][1]
    assert exact["summary"]["gap_to_task_given"] == {"value": 0.0, "ci95": [0.0, 0.0]}  # paired: the same answers
    printed = capsys.readouterr().out
    assert "gap to joint" in printed and "seen so far" in printed
    with pytest.raises(UserError, match="'joint' is not NAME=FILE"):
        run(tmp_path, scores, "--reference", "joint")


def test_references_that_were_scored_otherwise_are_left_out_with_the_reason(tmp_path, scores, capsys):
    other = write_questions(tmp_path / "other.jsonl", answer="no")
    files = {"joint": scores[1], "individual": score(tmp_path, other, "foreign", (1, 1))}
    assert accuracy_matrix.fitting(files, scores[2], TASKS, ["exact_match"]) == {"joint": scores[1]}
    assert "note: no gap to individual: " in capsys.readouterr().out


def test_one_stage_has_no_transfer(tmp_path, scores):
    result = run(tmp_path, scores[1:2] * 2, zero_shot=False, tasks=["abd"])
    exact = result["metrics"]["exact_match"]
    assert exact["zero_shot"] is None
    assert exact["summary"]["average_final"]["value"] == 1.0
    assert exact["summary"]["bwt"] == {"value": None, "ci95": None}


def test_the_same_scores_give_the_same_file(tmp_path, scores):
    run(tmp_path, scores)
    first = (tmp_path / "accuracy_matrix.json").read_bytes()
    run(tmp_path, scores)
    assert (tmp_path / "accuracy_matrix.json").read_bytes() == first


def test_the_heat_map_is_a_picture(tmp_path, scores):
    pytest.importorskip("matplotlib")
    run(tmp_path, scores)
    with Image.open(tmp_path / "accuracy_matrix.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300


def test_without_matplotlib_the_rest_is_written(tmp_path, scores, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(tmp_path, scores)
    assert "no heat map" in capsys.readouterr().out
    assert not (tmp_path / "accuracy_matrix.png").exists()


def test_a_shipped_sequence_names_tasks_and_metrics(tmp_path):
    domains = ("abd", "chest", "head")
    questions = tmp_path / "q.jsonl"
    write_jsonl(questions, [question_row(n, "a.jpg", "q?", "yes", domains[n // 4], domains) for n in range(12)])
    stages = []
    for model in ("m1", "m2", "m3"):
        answers = tmp_path / model / "answers.jsonl"
        write_jsonl(answers, [{"question_id": n, "text": "yes", "model_id": model} for n in range(12)])
        eval_video_qa.main(["--question-file", str(questions), "--answers-file", str(answers), "--no-java"])
        stages.append(str(tmp_path / model / "scores.json"))
    more = ["--scores", *stages, "--sequence", "vqa-rad", "--output-dir", str(tmp_path), "--draws", "50"]
    accuracy_matrix.main(more)
    result = json.loads((tmp_path / "accuracy_matrix.json").read_text())
    assert result["tasks"] == list(domains)
    assert {"exact_match", "rouge_l", "cider"} <= set(result["metrics"])


def test_what_does_not_fit_together_is_refused(tmp_path, scores):
    with pytest.raises(UserError, match="1 stages for 2 tasks"):
        run(tmp_path, scores[:2])
    with pytest.raises(UserError, match="no scores for task 'head'"):
        run(tmp_path, scores, tasks=["abd", "head"])
    with pytest.raises(UserError, match="unknown metric 'bleu_9'"):
        run(tmp_path, scores, "--metrics", "bleu_9")
    with pytest.raises(UserError, match="not found"):
        run(tmp_path, [*scores[:2], str(tmp_path / "absent.json")])
    other = write_questions(tmp_path / "other.jsonl", answer="no")
    foreign = score(tmp_path, other, "foreign", (1, 1))
    with pytest.raises(UserError, match="differ in question_file"):
        run(tmp_path, [*scores[:2], foreign])
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(UserError, match="not a scores file"):
        run(tmp_path, [*scores[:2], str(tmp_path / "broken.json")])
    (tmp_path / "llava-tiny_abd" / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="row values not found"):
        run(tmp_path, scores)
    assert not (tmp_path / "accuracy_matrix.json").exists()
