"""The scoring command: what it writes, what it refuses, and the public floors on the real VQA-RAD test split."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from real_data import vqa_rad_rows

from llava.data.rows import question_row, write_jsonl
from llava.eval import eval_video_qa, text_metrics
from llava.utils import UserError

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = ("abd", "chest")
ANSWERS = ["yes", "left lung", "no", "right"]


@pytest.fixture
def questions(tmp_path):
    rows = [
        question_row(number, f"{number}.jpg", f"question {number}?", text, DOMAINS[number % 2], DOMAINS)
        for number, text in enumerate(ANSWERS)
    ]
    path = tmp_path / "questions.jsonl"
    write_jsonl(path, rows)
    return path


def write_answers(path, texts=ANSWERS, model_id="llava-a", ids=None, **more):
    ids = range(len(texts)) if ids is None else ids
    rows = [{"question_id": i, "text": t, "model_id": model_id, **more} for i, t in zip(ids, texts, strict=True)]
    write_jsonl(path, rows)
    return path


def run(questions, *answers, more=()):
    eval_video_qa.main(
        ["--question-file", str(questions), "--answers-file", *map(str, answers), "--no-java", "--draws", "50", *more]
    )


def test_several_stages_are_scored_in_one_call(tmp_path, questions, capsys):
    a = write_answers(tmp_path / "a.jsonl", model_id="llava-a")
    b = write_answers(tmp_path / "b.jsonl", ["no"] * 4, model_id="llava-a_b")
    out = tmp_path / "out"
    run(questions, a, b, more=["--output-dir", str(out), "--train-file", str(questions)])
    printed = capsys.readouterr().out
    assert "llava-a_b" in printed
    assert "exact_match" in printed
    assert "meteor: missing" in printed
    first = json.loads((out / "llava-a" / "scores.json").read_text())
    second = json.loads((out / "llava-a_b" / "scores.json").read_text())
    assert first["groups"]["overall"]["figures"]["exact_match"]["value"] == 1.0
    assert second["groups"]["overall"]["figures"]["exact_match"]["value"] == 0.25
    for figure in first["groups"]["abd"]["figures"].values():
        assert {"value", "n", "ci95", "formula"} <= figure.keys()
    provenance = first["provenance"]
    assert provenance["package"]["llava"]
    assert len(provenance["question_file"]["sha256"]) == 64
    assert provenance["tokenizer"].startswith("plain")
    rows = [json.loads(line) for line in (out / "llava-a" / "rows.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [0, 1, 2, 3]
    assert rows[1]["scores"]["exact_match"] == 1.0


def test_finished_scores_are_kept_until_an_input_changes(tmp_path, questions, capsys):
    a = write_answers(tmp_path / "a.jsonl")
    target = tmp_path / "scores.json"
    run(questions, a)
    first = target.read_bytes()
    time = target.stat().st_mtime_ns
    capsys.readouterr()
    run(questions, a)
    assert "up to date" in capsys.readouterr().out
    assert target.stat().st_mtime_ns == time
    run(questions, a, more=["--force"])
    assert target.read_bytes() == first
    write_answers(a, ["no"] * 4)
    run(questions, a)
    assert target.read_bytes() != first
    target.write_text("{")
    run(questions, a)
    assert json.loads(target.read_text())["model_id"] == "llava-a"


def test_scores_that_a_failed_process_left_incomplete_are_made_again(tmp_path, questions, monkeypatch):
    a = write_answers(tmp_path / "a.jsonl")
    with monkeypatch.context() as patched:
        patched.setattr(text_metrics, "NO_JAVA", f"{text_metrics.METEOR_FAILED}: no memory")
        patched.setattr(text_metrics, "JAVA_OFF", f"{text_metrics.METEOR_FAILED}: no memory")
        run(questions, a)
    broken = (tmp_path / "scores.json").read_text()
    run(questions, a)
    assert "no memory" in broken and "no memory" not in (tmp_path / "scores.json").read_text()


def test_prototype_rows_are_read(tmp_path, questions):
    path = tmp_path / "proto.jsonl"
    rows = [
        {"question_id": str(i), "pred_response": t, "gt_response": t, "model_id": "m", "metadata": {}}
        for i, t in enumerate(ANSWERS)
    ]
    write_jsonl(path, rows)
    run(questions, path)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["groups"]["overall"]["figures"]["exact_match"]["value"] == 1.0
    rows[2]["gt_response"] = "something else"
    write_jsonl(path, rows)
    with pytest.raises(UserError, match="question_id 2 has gt_response"):
        run(questions, path)
    path.write_text(json.dumps(rows[0]) + '\n{"pred_response": "x"}\n')
    with pytest.raises(UserError, match="line 2"):
        run(questions, path)


@pytest.mark.parametrize("indent", [None, 1], ids=["one line", "spread"])
def test_prototype_rows_as_a_list_and_numbers_as_predictions(tmp_path, questions, indent):
    path = tmp_path / "proto.json"
    rows = [{"question_id": i, "pred_response": t} for i, t in enumerate([*ANSWERS[:3], 4])]
    path.write_text(json.dumps(rows, indent=indent))
    run(questions, path)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["groups"]["overall"]["figures"]["exact_match"]["value"] == 0.75


@pytest.mark.parametrize(
    ("field", "value"), [("pred_response", None), ("pred_response", True), ("question_id", [0]), ("metadata", "x")]
)
def test_a_bad_prototype_row_is_named(tmp_path, questions, field, value):
    write_jsonl(tmp_path / "proto.jsonl", [{"question_id": 0, "pred_response": "yes", **{field: value}}])
    with pytest.raises(UserError, match="proto.jsonl line 1: field"):
        run(questions, tmp_path / "proto.jsonl", more=["--allow-partial"])


MED_DOMAINS = ("chest_xray", "mri", "ct_scan", "histology", "gross")


def med_rows(*domains):
    """Rows as LLaVA-Med's own evaluation file has them."""
    return [
        {
            "question_id": number,
            "image": f"{number}.jpg",
            "pair_id": str(number),
            "text": f"What is seen in {number}?\n<image>",
            "gpt4_answer": "yes",
            "fig_caption": "A figure.",
            "in_text_mention": None,
            "domain": {name: name in true for name in MED_DOMAINS},
            "type": "conversation",
            "fig_label": "Fig. 1",
        }
        for number, true in enumerate(domains)
    ]


def test_llava_meds_own_file_is_scored_and_what_counts_twice_is_said(tmp_path, capsys):
    questions = tmp_path / "qa.jsonl"
    write_jsonl(questions, med_rows(("histology", "gross"), ("mri",), ("gross",), ()))
    run(
        questions,
        write_answers(tmp_path / "a.jsonl", ["yes", "no", "no", "yes"]),
        more=["--train-file", str(questions)],
    )
    printed = capsys.readouterr().out
    assert "rows of several domains, counted under each and overall once: 1" in printed
    assert "rows of no domain, counted overall alone: 1" in printed
    groups = json.loads((tmp_path / "scores.json").read_text())["groups"]
    found = {name: (group["rows"], group["figures"]["exact_match"]["value"]) for name, group in groups.items()}
    assert found == {"overall": (4, 0.5), "gross": (2, 0.5), "histology": (1, 1.0), "mri": (1, 0.0)}
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["domain"] for row in rows] == [None, "mri", "gross", None]
    assert [set(row.get("scores_by_domain", ())) for row in rows] == [{"histology", "gross"}, set(), set(), set()]
    assert rows[3]["scores"]["exact_match"] == rows[0]["scores"]["exact_match"] == 1.0


def repeated(tmp_path):
    """A question file in which pictures are ids: three rows of one, one of another."""
    path = tmp_path / "mme.jsonl"
    names = ("a.jpg", "a.jpg", "b.jpg", "a.jpg")
    rows = [
        {"question_id": name, "image": name, "text": f"Is it {number}?\n<image>", "gpt4_answer": text}
        for number, (name, text) in enumerate(zip(names, ANSWERS, strict=True))
    ]
    write_jsonl(path, rows)
    return path, [row["question_id"] for row in rows]


def test_rows_that_share_an_id_are_scored_each_against_its_own_answer(tmp_path, capsys):
    questions, ids = repeated(tmp_path)
    path = write_answers(tmp_path / "a.jsonl", ids=ids)  # as LLaVA's own loader leaves them: no position
    run(questions, path)
    groups = json.loads((tmp_path / "scores.json").read_text())["groups"]
    assert (groups["overall"]["rows"], groups["overall"]["figures"]["exact_match"]["value"]) == (4, 1.0)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row.get("position") for row in rows] == [0, 1, None, 3]
    write_answers(path, ANSWERS[:3], ids=ids[:3])
    with pytest.raises(UserError, match=r"without an answer: a.jpg \(position 3\) .*a.jpg has fewer answers than rows"):
        run(questions, path)
    run(questions, path, more=["--allow-partial"])
    assert "a.jpg has fewer answers than rows, and they name no position" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ids", "texts", "message"),
    [
        ([0, 1, 2], ["a"] * 3, "without an answer: 3"),
        ([0, 1, 2, 3, 77, 5], ["a"] * 6, "lacks: 5, 77"),
        ([0, 1, 2, 3, 3], ["a"] * 5, "3"),
    ],
)
def test_ids_that_do_not_match_are_named(tmp_path, questions, ids, texts, message):
    path = tmp_path / "a.jsonl"
    write_answers(path, texts, ids=ids)
    with pytest.raises(UserError, match=message):
        run(questions, path)
    assert not (tmp_path / "scores.json").exists()


def test_allow_partial_scores_the_answered_questions(tmp_path, questions):
    path = write_answers(tmp_path / "a.jsonl", ["yes", "no"], ids=[0, 2])
    run(questions, path, more=["--allow-partial"])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["groups"]["overall"]["rows"] == 2
    assert scores["provenance"]["unanswered_questions"] == 2


def test_two_files_for_one_place_are_refused(tmp_path, questions):
    a, b = write_answers(tmp_path / "a.jsonl"), write_answers(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="would both write"):
        run(questions, a, b)


def test_answers_of_two_models_in_one_file_are_refused(tmp_path, questions):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"question_id": i, "text": "x", "model_id": f"m{i}"} for i in range(4)])
    with pytest.raises(UserError, match="several models"):
        run(questions, path)
    write_answers(path, model_id="../elsewhere")
    with pytest.raises(UserError, match="cannot name a folder"):
        run(questions, path)


def run_command(*arguments):
    command = [sys.executable, "-m", "llava.eval.eval_video_qa", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_bad_input_is_one_line_and_an_exit_code(tmp_path, questions):
    good = write_answers(tmp_path / "good.jsonl")
    broken, empty = tmp_path / "broken.jsonl", tmp_path / "empty.jsonl"
    broken.write_text(good.read_text().splitlines()[0] + '\n{"question_id": 1, "te\n')
    empty.write_text("")
    cases = [
        (questions, tmp_path / "absent.jsonl", "not found"),
        (questions, broken, "broken.jsonl line 2"),
        (questions, empty, "empty.jsonl"),
        (tmp_path / "absent_questions.jsonl", good, "not found"),
    ]
    for question_file, answers, message in cases:
        done = run_command("--question-file", question_file, "--answers-file", answers, "--no-java")
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list(tmp_path.rglob("scores.json"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_write_permission_is_one_line(tmp_path, questions):
    good = write_answers(tmp_path / "good.jsonl")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    done = run_command("--question-file", questions, "--answers-file", good, "--no-java", "--output-dir", locked)
    assert done.returncode == 2
    assert "permission denied" in done.stderr


def test_the_public_floor_of_vqa_rad(tmp_path):
    # The data set's card: always "no" is right for 48.9 % of the 272 closed test rows; the nearest question's answer
    # for 52.2 % of the closed and 14.0 % of the open ones (among equally near ones its choice may be another).
    rows = vqa_rad_rows()
    questions, train = tmp_path / "test.jsonl", tmp_path / "train.jsonl"
    write_jsonl(questions, rows["test"])
    write_jsonl(train, rows["train"])
    answers = write_answers(tmp_path / "no.jsonl", ["no"] * 451, ids=[row["question_id"] for row in rows["test"]])
    run(questions, answers, more=["--train-file", str(train)])
    groups = json.loads((tmp_path / "scores.json").read_text())["groups"]
    closed = groups["overall"]["figures"]["closed_accuracy"]
    assert round(closed["value"], 3) == 0.489
    assert closed["n"] == 272
    assert groups["overall"]["figures"]["majority_closed_accuracy"]["value"] == closed["value"]
    assert [groups[name]["rows"] for name in ("overall", "abd", "chest", "head")] == [451, 158, 174, 119]
    nearest = [groups["overall"]["figures"][f"nearest_{name}"] for name in ("closed_accuracy", "open_exact_match")]
    assert [figure["value"] for figure in nearest] == pytest.approx([0.522, 0.140], abs=0.01)


# -- the prototype's command line --------------------------------------------------------------------------------------


def prototype_answers(path):
    rows = [{"question_id": n, "pred_response": text, "gt_response": text} for n, text in enumerate(ANSWERS)]
    write_jsonl(path, rows)
    return path


def test_the_prototypes_flags_score_as_ours_and_write_its_file(tmp_path, questions, capsys):
    answers = prototype_answers(tmp_path / "merged_predictions.jsonl")
    scores = tmp_path / "nlp_metrics_scores.json"
    words = ["--pred-path", answers, "--gt-file", questions, "--output-json", scores, "--no-java", "--draws", 50]
    eval_video_qa.main([*map(str, words)])
    own = json.loads((tmp_path / "scores.json").read_text())["groups"]
    theirs = json.loads(scores.read_text())
    names = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]  # METEOR needs Java
    assert list(theirs) == ["overall", "abd", "chest"] and all(list(found) == names for found in theirs.values())
    for group, found in theirs.items():
        for name, value in found.items():
            assert value == own[group]["figures"][name.lower()]["value"]
    assert theirs["overall"]["ROUGE_L"] == 1.0
    assert f"wrote {scores}" in capsys.readouterr().out
    scores.unlink()
    eval_video_qa.main([*map(str, words)])  # scored already: the file is written all the same
    assert json.loads(scores.read_text()) == theirs and "is up to date" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["answer", "pred", "pred_response"])
def test_predictions_under_the_prototypes_names(tmp_path, questions, name):
    """It takes the first of text, answer, pred and pred_response that the first row has."""
    rows = [{"question_id": n, name: text} for n, text in enumerate(ANSWERS)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    run(questions, tmp_path / "a.jsonl")
    figures = json.loads((tmp_path / "scores.json").read_text())["groups"]["overall"]["figures"]
    assert figures["exact_match"]["value"] == 1.0
    assert eval_video_qa.load_answers(write_answers(tmp_path / "b.jsonl", answer="no"))[0]["text"] == ANSWERS[0]


def test_the_prototypes_command_runs_as_a_file(tmp_path, questions):
    """``python llava/eval/eval_video_qa.py`` puts the package's own folder on the path, where other names lie."""
    answers = prototype_answers(tmp_path / "merged_predictions.jsonl")
    words = ["--pred-path", answers, "--gt-file", questions, "--output-json", tmp_path / "s.json", "--no-java"]
    command = [sys.executable, "llava/eval/eval_video_qa.py", *map(str, words)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and (tmp_path / "s.json").is_file(), done.stderr


def test_one_file_for_several_answers_or_over_all_scores_is_refused(tmp_path, questions, capsys):
    a, b = (prototype_answers(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    with pytest.raises(SystemExit):
        run(questions, a, b, more=["--output-json", str(tmp_path / "s.json")])
    assert "--output-json is one file; give one answers file" in capsys.readouterr().err
    with pytest.raises(UserError, match="is where all scores go"):
        run(questions, a, more=["--output-json", str(tmp_path / "scores.json")])
