"""The screen at the end of an evaluation: its text, and that it fits whatever a sequence's tasks are."""

import json
import unicodedata

import pytest

from llava.data.rows import question_row, write_jsonl
from llava.eval import eval_video_qa
from llava.eval.accuracy_matrix import build, load_stage
from llava.eval.screen import COLUMNS, LINES, screen

PLACE = "every figure: output/eval/" + "a-folder-whose-name-is-long/" * 6 + "accuracy_matrix.json"


def evaluated(folder, tasks, rows=8, metrics=("exact_match", "rouge_l")):
    """Scores of the last stage and the matrix of generated answers: of each task's rows more and more are right."""
    questions = folder / "questions.jsonl"
    domains = [task for task in tasks for _ in range(rows)]
    write_jsonl(questions, [question_row(n, "a", f"is it {n}?", "yes", task, tasks) for n, task in enumerate(domains)])
    files = []
    for stage in range(len(tasks) + 1):
        right = [n % rows < (stage + 3 if n // rows < stage else 2) for n in range(len(domains))]
        texts = ["yes" if hit else "no" for hit in right]
        answers = [{"question_id": n, "text": text, "model_id": f"m{stage}"} for n, text in enumerate(texts)]
        write_jsonl(folder / f"m{stage}" / "answers.jsonl", answers)
        files.append(str(folder / f"m{stage}" / "answers.jsonl"))
    arguments = eval_video_qa.Arguments(
        question_file=str(questions), answers_file=files, train_file=[str(questions)], no_java=True, draws=20
    )
    eval_video_qa.score_files(arguments, tables=False)
    stages = [folder / f"m{stage}" / "scores.json" for stage in range(len(tasks) + 1)]
    first, *others = [load_stage(path, tasks) for path in stages]
    return json.loads(stages[-1].read_text()), build(others, tasks, metrics, first, draws=20)


def with_own_intervals(found):
    """The same with intervals that no generator of random numbers has made."""
    if isinstance(found, list):
        return [with_own_intervals(part) for part in found]
    if not isinstance(found, dict):
        return found
    found = {name: with_own_intervals(part) for name, part in found.items()}
    if found.get("ci95") is not None and isinstance(found.get("value"), float):
        found["ci95"] = sorted([found["value"] / 2, found["value"]])
    return found


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    scores, matrix = map(with_own_intervals, evaluated(tmp_path_factory.mktemp("three"), ["abd", "chest", "head"]))
    overall = {"changed": {"value": 0.5, "ci95": [0.25, 0.75]}}
    overall["figures"] = {"exact_match": {"real": 0.75, "shown": 0.5, "drop": 0.25, "ci95": [0.125, 0.375]}}
    scores["pictures"] = {"blank": {"groups": {"overall": overall}}}
    return scores, matrix


def test_the_text_of_a_run(three):
    text = screen("retrieval on tiny", *three, ["every figure: output/eval/tiny"])
    assert text == TEXT


def lines_of(text):
    lines = text.splitlines()
    assert len(lines) <= LINES and max(map(len, lines)) <= COLUMNS
    return lines


def test_many_tasks_with_long_names_still_fit(three):
    scores, matrix = three
    tasks = [f"a-task-with-a-long-name-{number}" for number in range(24)]
    groups = {"overall": scores["groups"]["overall"], **dict.fromkeys(tasks, scores["groups"]["abd"])}
    gaps = {f"gap_to_{name}": {"value": 0.125, "ci95": [0.0, 0.25]} for name in ("joint", "given", "a", "b")}
    found = matrix["metrics"]["exact_match"]
    found = {**found, "matrix": [[0.5] * 24] * 24, "zero_shot": [0.25] * 24, "summary": {**found["summary"], **gaps}}
    found["learning_curve"] = {"value": [0.5] * 24}
    pictures = dict.fromkeys(("blank", "shuffled", "shuffled-across"), scores["pictures"]["blank"])
    many = {"tasks": tasks, "metrics": {"exact_match": found}}
    text = screen("retrieval on " + "long" * 30, {"groups": groups, "pictures": pictures}, many, ["where"])
    lines = lines_of(text)
    assert len(lines) == LINES
    assert lines[1].startswith("retrieval on longlong") and lines[1].endswith("..")
    assert lines[2].split()[-5:] == ["a-task..name-0", "a-task..name-1", "21", "more", "a-task..ame-23"]
    assert [line for line in lines if line.endswith(" more")], "stages"
    assert "gap to given          +0.125 [+0.00, +0.25]" in lines and lines[-1] == "where"


def test_domains_that_are_no_tasks_follow_the_tasks_and_intervals_give_way_before_columns(three):
    scores, matrix = three
    groups = {**scores["groups"], "\u8179\u90e8\n": scores["groups"]["abd"]}
    text = screen("retrieval on tiny", {**scores, "groups": groups}, matrix)
    assert lines_of(text)[2:5] == [
        "after the last stage             overall    abd  chest   head  \u8179\u90e8?",
        "questions                             24      8      8      8      8",
        "exact match           0.750 [0.38, 0.75]  0.750  0.750  0.750  0.750",
    ]


def test_accents_take_no_column_of_their_own(three):
    scores, matrix = three
    names = ["e\u0301" * 14, "\u0e01\u0e30\u0e42\u0e2b\u0e25\u0e01\u0e28\u0e35\u0e23\u0e29\u0e30", "e\u0301" * 20]
    groups = {"overall": scores["groups"]["overall"], **dict.fromkeys(names, scores["groups"]["abd"])}
    text = screen("retrieval on tiny", {**scores, "groups": groups}, {**matrix, "tasks": names})
    heading, row = text.splitlines()[2:4]
    marks = sum(unicodedata.category(letter) == "Mn" for letter in heading)
    assert len(heading) - marks == len(row) and names[0] in heading
    assert "..e" in heading, "what is left of a long name begins with a letter"


def test_one_question_is_one(three):
    scores, matrix = three
    overall = {**scores["groups"]["overall"], "rows": 1, "closed_rows": 1}
    text = screen("retrieval on tiny", {**scores, "groups": {**scores["groups"], "overall": overall}}, matrix)
    assert text.startswith("\nretrieval on tiny: 1 question, 1 of them closed;")


def test_what_is_not_there_is_left_out_or_said(three):
    scores, matrix = three
    found = {**matrix["metrics"]["exact_match"], "summary": None, "learning_curve": None, "reason": "no such rows"}
    found["matrix"] = [[None, *row[1:]] for row in found["matrix"]]
    lines = lines_of(screen("retrieval on tiny", scores, {**matrix, "metrics": {"exact_match": found}}))
    assert "no summary: no such rows" in lines and not any("BWT" in line for line in lines)
    assert "after abd        -  0.250  0.250            -" in lines


def test_a_name_of_a_file_is_never_cut(three):
    assert screen("retrieval on tiny", *three, [PLACE]).endswith(f"\n{PLACE}")


TEXT = """
retrieval on tiny: 24 questions, 24 of them closed; 95 % intervals in brackets
after the last stage             overall                 abd               chest                head
questions                             24                   8                   8                   8
exact match           0.750 [0.38, 0.75]  0.750 [0.38, 0.75]  0.750 [0.38, 0.75]  0.750 [0.38, 0.75]
closed accuracy       0.750 [0.38, 0.75]  0.750 [0.38, 0.75]  0.750 [0.38, 0.75]  0.750 [0.38, 0.75]
  its majority        1.000 [0.50, 1.00]  1.000 [0.50, 1.00]  1.000 [0.50, 1.00]  1.000 [0.50, 1.00]
BLEU-1                0.750 [0.37, 0.75]  0.750 [0.37, 0.75]  0.750 [0.37, 0.75]  0.750 [0.37, 0.75]
ROUGE-L               0.750 [0.38, 0.75]  0.750 [0.38, 0.75]  0.750 [0.38, 0.75]  0.750 [0.38, 0.75]
CIDEr                 0.000 [0.00, 0.00]  0.000 [0.00, 0.00]  0.000 [0.00, 0.00]  0.000 [0.00, 0.00]
no open recall: no such rows; no METEOR: Java was switched off, and METEOR needs it; no route accu..
blank pictures: 0.500 [0.25, 0.75] of the answers change; exact match drop +0.250 [+0.12, +0.38]

exact match    abd  chest   head  seen so far
zero-shot    0.250  0.250  0.250
after abd    0.500  0.250  0.250        0.500
after chest  0.625  0.625  0.250        0.625
after head   0.750  0.750  0.750        0.750
average final         0.750 [0.38, 0.75]
BWT                   +0.188 [+0.09, +0.19]
forgetting            -0.125 [-0.12, -0.06]
FWT                   +0.000 [+0.00, +0.00]

every figure: output/eval/tiny"""
