"""LLaVA-Med's published figures: its text form, and both rules where they part from the strict ones, by hand."""

import pytest

from llava.data.rows import parse_row
from llava.eval.metrics.base import Example, Group
from llava.eval.metrics.llava_med import llava_med_closed_accuracy, llava_med_open_recall, script_form
from llava.eval.text_metrics import TextScorer


def value(metric, prediction, reference, kind):
    row = parse_row({"question_id": 1, "text": "q?", "gpt4_answer": reference, "answer_type": kind})
    found = metric(Group([Example(row, prediction, {})], (), (), (), TextScorer(use_java=False)))
    return found.per_row[0]


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("Yes.", "yes"),
        ("X-ray", "x ray"),
        ("the X- ray - two-sided", "x ray twosided"),  # a hyphen beside a space makes all hyphens vanish
        ("1,000 ml (left/right)", "1000 ml leftright"),  # so does a comma in a number, with every mark
        ("left,right", "left right"),
        ("3.5 cm. none", "3.5 cm 0"),
        ("isnt A an", "isn't"),
        ("couldnt've 'ows'at somebody'd", "couldn't've 'ow's'at somebodyd"),
        (". " * 33, "."),  # of 33 full stops, 32 go
        ("", ""),
    ],
)
def test_the_scripts_form_of_a_text(text, form):
    assert script_form(text) == form


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("Yes, it is.", "yes", 1.0),
        ("yes and no", "no", 1.0),
        ("I know it is not", "no", 1.0),  # inside a word
        ("left", "left", 0.0),  # neither yes nor no
        ("left, no doubt", "left", 1.0),
        ("no", "yes", 0.0),
        ("", "yes", 0.0),
    ],
)
def test_closed_accuracy_by_hand(prediction, reference, right):
    assert value(llava_med_closed_accuracy, prediction, reference, "CLOSED") == right
    assert value(llava_med_closed_accuracy, prediction, reference, "OPEN") is None


@pytest.mark.parametrize(
    ("prediction", "reference", "recall"),
    [
        ("left lung", "the left lower lung", 2 / 3),
        ("left left left", "left lung", 3 / 4),  # said three times, counted three times
        ("left", "left left left", 1.0),
        ("right", "left", 0.0),
        ("", "left", 0.0),
        ("the", "the", 0.0),
    ],
)
def test_open_recall_by_hand(prediction, reference, recall):
    assert value(llava_med_open_recall, prediction, reference, "OPEN") == pytest.approx(recall)
    assert value(llava_med_open_recall, prediction, reference, "CLOSED") is None
