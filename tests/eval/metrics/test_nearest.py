"""The nearest-question baseline by hand."""

from contextlib import closing

from llava.data.rows import parse_row
from llava.eval.metrics import score
from llava.eval.metrics.nearest import nearest_answers
from llava.eval.text_metrics import TextScorer


def row(number, question, answer, domain="abd", kind=None):
    domains = {name: name == domain for name in ("abd", "chest")}
    fields = {"question_id": number, "text": question, "gpt4_answer": answer, "domain": domains, "answer_type": kind}
    return parse_row(fields)


TRAIN = [
    row(0, "is there a mass?", "no"),
    row(1, "where is the mass?", "left lobe"),
    row(2, "Is there a MASS", "yes"),
    row(3, "what organ is this?", "liver", "chest"),
]


def test_the_nearest_question_by_hand():
    asked = ["Is there a mass?", "which organ?", "where?", "zebra", "is there an organ mass"]
    assert nearest_answers(asked, TRAIN) == ["no", "liver", "left lobe", "", "no"]  # of equals the first; or nothing
    assert nearest_answers(asked[:1], TRAIN[1:]) == ["yes"]
    assert nearest_answers([""], TRAIN) == [""]


def test_rare_words_count_more_and_long_questions_do_not():
    train = [row(0, "is it is it is it hepatic", "a"), row(1, "is it", "b"), row(2, "is it splenic", "c")]
    assert nearest_answers(["is it splenic hepatic"], train) == ["c"]
    assert nearest_answers(["is it is it is it"], train) == ["b"]


def test_it_stands_beside_the_majority_and_looks_at_all_training_rows():
    rows = [row(10, "what organ?", "liver", kind="OPEN"), row(11, "is there a mass?", "yes", kind="CLOSED")]
    answers = [{"question_id": r.id, "text": "no"} for r in rows]
    with closing(TextScorer(use_java=False)) as scorer:
        groups = score(rows, answers, TRAIN, scorer, draws=5)["groups"]
        alone = score(rows, answers, (), scorer, draws=5)["groups"]["overall"]["figures"]
    found = {name: figure["value"] for name, figure in groups["abd"]["figures"].items() if name.startswith("nearest")}
    assert found == {
        "nearest_closed_accuracy": 0.0,
        "nearest_open_exact_match": 1.0,  # the training question is of another domain
        "nearest_open_recall": 1.0,
        "nearest_exact_match": 0.5,
    }
    assert alone["nearest_exact_match"]["reason"] == "no training rows with an answer were given"
