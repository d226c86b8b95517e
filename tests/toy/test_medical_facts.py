"""SLAKE's answers as facts, and the facts in other words: what is agreed to is true, what is denied is not."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.toy.medical_facts import (
    FINDINGS,
    MODALITIES,
    PLANES,
    REGIONS,
    Facts,
    asked_again,
    common_findings,
    facts_of,
    words_of,
)

CHEST = [
    ("What modality is used to take this image?", "x-ray"),
    ("What diseases are included in the picture?", "Cardiomegal, pulmonary nodule".lower()),
    ("Does the picture contain liver?", "no"),
    ("Are/Is there kidneys in the picture?", "no"),
    ("Does the picture contain the organ that could receive sound?", "no"),
    ("Are there abnormalities in this image?", "yes"),
    ("Is the lung healthy?", "no"),
    ("Does the heart look abnormal?", "yes"),
    ("Which side of lung is abnormal in this image,left or right?", "left"),
    ("In what plane is this image scanned?", "coronal plane"),
]


def test_answers_become_facts():
    assert facts_of("xray", "Lung", CHEST) == Facts(
        modality="x-ray",
        region="chest",
        plane="coronal",
        findings={"cardiomegaly", "nodule"},
        organs={"liver": False, "kidney": False},
        normal={"lung": False, "heart": False},
        side="left",
    )


@pytest.mark.parametrize(
    ("place", "region"),
    [("Brain_Tissue", "head"), ("Chest_heart", "chest"), ("Pelvic Cavity", "pelvis"), ("Neck", "neck"), ("Leg", "")],
)
def test_places_become_regions(place, region):
    assert facts_of("ct", place, []).region == region


@pytest.mark.parametrize(
    ("answer", "findings"),
    [
        ("none", set()),
        ("brian edema, brain non-enhancing tumor", {"brain edema", "brain tumor"}),
        ("noudle", {"nodule"}),
    ],
)
def test_a_list_of_diseases_is_read_whole(answer, findings):
    assert facts_of("mri", "Brain", [("What diseases are included in the picture?", answer)]).findings == findings


@pytest.mark.parametrize(
    ("answer", "side"),
    [("left lung, lower right", "left"), ("left", ""), ("right lung", "right"), ("both lung", ""), ("liver", "")],
)
def test_a_side_is_the_patients(answer, side):
    """``left`` alone may be the picture's left, which is the patient's right."""
    assert facts_of("xray", "Lung", [("Where is/are the abnormality located?", answer)]).side == side


@given(seed=st.integers(0, 999), count=st.integers(0, 12))
def test_what_is_said_of_a_picture_is_true(seed, count):
    facts = facts_of("xray", "Lung", CHEST)
    said = asked_again(facts, {"chest": sorted(FINDINGS)}, count, np.random.default_rng(seed))
    assert len(said) == len(dict(said)) <= count
    for question, answer in said:
        if answer not in ("yes", "no"):
            assert answer in ("x-ray", "coronal", "left")
            continue
        for names, true in ((MODALITIES, "x-ray"), (REGIONS, "chest"), (PLANES, "coronal")):
            for name, words in names.items():
                if (
                    any(re.search(rf"\b{re.escape(word)}[ ?]", question) for word in words)
                    and "evidence" not in question
                ):
                    if not any(word in question for found in FINDINGS.values() for word in found):
                        assert (answer == "yes") == (name == true), question
        if "liver" in question or "kidney" in question:
            assert answer == "no", question
        if "enlarge" in question or "cardiomegaly" in question:
            assert answer == "yes", question
        if "left lung" in question or "right lung" in question:
            assert (answer == "yes") == ("left" in question), question
        if re.search(r"\bthe heart (?:normal|appear|look|unremarkable)", question):
            assert answer == "no", question


def test_nothing_is_denied_that_a_reader_may_name_instead():
    """A nodule may be called a mass, so neither is denied beside the other; nor is anything of another region."""
    facts = facts_of("xray", "Lung", [CHEST[1]])
    common = common_findings(
        [facts, Facts("x-ray", "chest", findings={"mass"}), Facts("ct", "abdomen", findings={"liver cancer"})]
    )
    assert common == {"chest": ["cardiomegaly", "mass", "nodule"], "abdomen": ["liver cancer"]}
    for seed in range(50):
        assert not any(
            answer == "no" and any(word in question for word in ("mass", "liver"))
            for question, answer in asked_again(facts, common, 9, np.random.default_rng(seed))
        )


def test_nothing_is_said_of_findings_that_no_answer_lists():
    facts = facts_of("mri", "Brain", [])
    for seed in range(50):
        said = asked_again(facts, {"head": ["brain edema"]}, 9, np.random.default_rng(seed))
        assert not any("edema" in question for question, _ in said)


def test_words_say_what_is_true_of_a_picture_and_what_is_only_of_others():
    facts = facts_of("xray", "Lung", CHEST)
    words = words_of(facts, {"chest": ["cardiomegaly", "effusion"]})
    assert (words["x-ray"], words["ct"], words["chest"], words["abdomen"], words["coronal"]) == (1, 0, 1, 0, 1)
    assert (words["cardiomegaly"], words["effusion"], words["abnormal"], words["left"], words["right"]) == (
        1,
        0,
        1,
        1,
        0,
    )
    assert "t1" not in words and words["liver"] is False  # a weighting is not asked of an X-ray


def test_nothing_is_known_of_a_picture_without_answers_but_what_it_is():
    assert {word for word, true in words_of(facts_of("mri", "", []), {}).items() if true} == {"mri"}
