"""The medical base's rows: from SLAKE's training side alone, answers that stay true when a picture is mirrored."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava.data.rows import read_rows
from llava.toy.medical_rows import (
    ALIGN,
    IMAGES,
    INSTRUCT,
    MedicalRows,
    chosen,
    make_medical_rows,
    mirrored_text,
    question_weights,
    sheets,
    view,
)
from llava.utils import UserError

SMALL = MedicalRows(side=16, views=3, turns=2, mirrored=0.5, phantoms=4, phantom_turns=3)
QUESTIONS = (
    ("Where is the lesion?", "Left Lung"),
    ("Is there a nodule?", "Yes"),
    ("What is the organ on the right side?", "Liver"),
)


@pytest.fixture
def slake(tmp_path):
    """Four pictures with a white left half: two to train on, one to validate, one to test."""
    folder = tmp_path / "slake"
    number = 0
    for split, pictures in (("train", (0, 1)), ("validate", (2,)), ("test", (3,))):
        rows = []
        for picture in pictures:
            (folder / "imgs" / f"xmlab{picture}").mkdir(parents=True)
            pixels = np.zeros((24, 24, 3), np.uint8)
            pixels[:, :12] = 200
            Image.fromarray(pixels).save(folder / "imgs" / f"xmlab{picture}" / "source.jpg")
            for question, answer in QUESTIONS:
                answer = "No" if answer == "Yes" and picture else answer
                row = {"qid": number, "img_name": f"xmlab{picture}/source.jpg", "question": question, "answer": answer}
                rows.append({**row, "q_lang": "en", "modality": "X-Ray", "location": "Lung", "answer_type": "OPEN"})
                number += 1
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return folder


def made(folder, slake, config=SMALL):
    assert make_medical_rows(folder, slake, config)
    return {name: json.loads((folder / name).read_text()) for name in (ALIGN, INSTRUCT)}


def test_left_and_right_change_places_and_nothing_else():
    assert mirrored_text("Which is larger, Left lung or RIGHT lung?") == "Which is larger, Right lung or LEFT lung?"
    assert (
        mirrored_text("a left-sided effusion, brightly lit, copyright")
        == "a right-sided effusion, brightly lit, copyright"
    )
    assert mirrored_text("the rightmost rib") == "the leftmost rib"


@given(st.text())
def test_mirrored_twice_is_the_text_itself(text):
    assert mirrored_text(mirrored_text(text)) == text


def test_a_mirrored_view_is_the_view_the_other_way_round():
    pixels = np.zeros((24, 24, 3), np.uint8)
    pixels[:, :12] = 200
    plain, turned = (np.asarray(view(Image.fromarray(pixels), 16, side, np.random.default_rng(1))) for side in (0, 1))
    assert np.array_equal(plain[:, ::-1], turned) and plain[:, :4].mean() > turned[:, :4].mean() + 80


def test_questions_with_several_answers_are_chosen_more_often():
    from llava.data.raw.example import Example

    examples = [
        Example(number, f"{picture}.jpg", question, answer, "ct", "train")
        for number, (picture, question, answer) in enumerate(
            [(0, "same?", "Yes"), (1, "same?", "yes"), (0, "differs?", "yes"), (1, "differs?", "no")]
        )
    ]
    weights = question_weights(sheets(examples), 3.0)
    assert weights == {"same?": 1.0, "differs?": 3.0}
    rng = np.random.default_rng(0)
    drawn = [chosen([("same?", "yes"), ("differs?", "no")], weights, 1, rng)[0][0] for _ in range(2000)]
    assert drawn.count("differs?") / 2000 == pytest.approx(0.75, abs=0.03)


def test_rows_are_read_by_the_trainer_and_hold_no_test_picture(slake, tmp_path):
    rows = made(tmp_path / "data", slake)
    assert len(rows[INSTRUCT]) == 3 * SMALL.views + SMALL.phantoms == len(rows[ALIGN])
    for name in (ALIGN, INSTRUCT):
        read = read_rows(tmp_path / "data" / name)
        assert len(read) == len(rows[name])
        assert all((tmp_path / "data" / IMAGES / str(row["image"])).is_file() for row in rows[name])
    real = [row for row in rows[INSTRUCT] if row["image"].startswith("slake")]
    assert {row["image"].split("-")[1] for row in real} == {"0000", "0001", "0002"}  # three of the four pictures
    assert all(row["conversations"][0]["value"].startswith("<image>\n") for row in rows[INSTRUCT])
    assert all("<image>" not in turn["value"] for row in rows[INSTRUCT] for turn in row["conversations"][1:])


def test_the_side_in_an_answer_is_the_side_in_the_picture(slake, tmp_path):
    rows = made(tmp_path / "data", slake, MedicalRows(side=16, views=12, turns=3, mirrored=0.5, phantoms=0))
    sides = set()
    for row in rows[INSTRUCT]:
        pixels = np.asarray(Image.open(tmp_path / "data" / IMAGES / row["image"]).convert("L"), float)
        white = "left" if pixels[:, :5].mean() > pixels[:, -5:].mean() else "right"
        turns = row["conversations"]
        answers = {ask["value"].removeprefix("<image>\n"): say["value"] for ask, say in zip(turns[::2], turns[1::2])}
        assert answers["Where is the lesion?"] == f"{white} lung"
        other = "right" if white == "left" else "left"
        assert answers[f"What is the organ on the {other} side?"] == "liver"
        sides.add(white)
    assert sides == {"left", "right"}


def test_the_same_seed_gives_the_same_bytes_and_a_second_run_does_nothing(slake, tmp_path):
    made(tmp_path / "one", slake)
    made(tmp_path / "two", slake)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    assert not make_medical_rows(tmp_path / "one", slake, SMALL)
    with pytest.raises(UserError, match="made with other settings"):
        make_medical_rows(tmp_path / "one", slake, MedicalRows(seed=1))


def test_a_folder_that_is_something_else(slake, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="mine is not empty and holds no medical rows"):
        make_medical_rows(tmp_path / "mine", slake, SMALL)


def test_slake_without_pictures(slake, tmp_path):
    (slake / "imgs").rename(slake / "elsewhere")
    with pytest.raises(UserError, match="SLAKE's pictures not found"):
        make_medical_rows(tmp_path / "data", slake, SMALL)
    assert not (tmp_path / "data").exists()


def test_the_words_of_a_mirrored_view_are_those_of_the_other_side(slake, tmp_path):
    """Phantoms and pictures each say that the other kind is another word."""
    for file in slake.glob("*.json"):
        file.write_text(file.read_text().replace("Where is the lesion?", "Where is/are the abnormality located?"))
    rows = made(tmp_path / "data", slake, MedicalRows(side=16, views=6, turns=3, mirrored=0.5, phantoms=3))
    for row in rows[ALIGN]:
        drawn = row["image"].startswith("phantom")
        assert row["words"]["drawing"] is drawn and row["words"]["x-ray"] is not drawn
        if not drawn:
            pixels = np.asarray(Image.open(tmp_path / "data" / IMAGES / row["image"]).convert("L"), float)
            assert row["words"]["left"] is bool(pixels[:, :5].mean() > pixels[:, -5:].mean())
