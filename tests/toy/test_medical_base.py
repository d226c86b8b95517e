"""The medical recipe of the tiny base: its glossary, its pictures, and a base built from them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from raw_samples import write_slake
from tiny_recipe import SMALL

from llava.model.builder import load_pretrained_model
from llava.toy.medical_base import RealPictures
from llava.toy.medical_talk import (
    FINDINGS,
    REGIONS,
    MedicalText,
    medical_terms,
    sayable_pieces,
    spell,
    split_terms,
)
from llava.toy.tiny_base import train_tokenizer
from llava.utils import UserError

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path, *more: str) -> subprocess.CompletedProcess:
    sizes = {name: value for name, value in asdict(SMALL).items() if name not in ("recipe", "real_pictures")}
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    command = [sys.executable, "scripts/make_tiny_base.py", "--recipe=medical", "--output_dir", str(folder)]
    return subprocess.run([*command, *flags, *more], cwd=ROOT, capture_output=True, text=True, check=False)


def test_terms_are_clean_and_asked_once_each():
    terms = medical_terms()
    assert len(terms) == len(set(terms)) > 500
    assert all(term == " ".join(term.split()) and ";" not in term for term in terms)


def test_questions_about_words_have_the_right_answers():
    text, rng = MedicalText(), np.random.default_rng(0)
    regions = {
        term: {name for name, terms in REGIONS.items() if term in split_terms(terms)} for term, _ in text.structures
    }
    for _ in range(500):
        question, answer = text.ask(rng)
        if question.startswith("Where in the body is the "):
            assert answer in regions[question.removeprefix("Where in the body is the ").rstrip("?")]
        elif question.startswith("Where in the body is "):
            finding = question.removeprefix("Where in the body is ").removesuffix(" seen?")
            assert finding in split_terms(FINDINGS[answer])
        else:
            assert answer in question


def test_choices_of_two_terms_have_the_answer_in_either_place():
    text, rng = MedicalText(), np.random.default_rng(0)
    asked = [text.ask(rng) for _ in range(3000)]
    places = {question.index(answer) == 0 for question, answer in asked if ": which is a " in question}
    assert places == {True, False}


def test_every_token_that_is_text_gets_said():
    tokenizer = train_tokenizer(SMALL, [f" {term} </s>" for term in medical_terms()] + ["\n[/INST] über"])
    pieces = sayable_pieces(tokenizer)
    assert len(pieces) == len(set(pieces)) > 200
    assert not {"<s>", "</s>", "<unk>", "<pad>", " "} & set(pieces)
    rng = np.random.default_rng(0)
    said: set[int] = set()
    for _ in range(3000):
        question, answer = spell(pieces, rng)
        assert question == f"Say {answer}." and answer == answer.strip() != ""
        said.update(tokenizer(f" {answer}", add_special_tokens=False).input_ids)
    assert len(said) > 0.8 * len(pieces)


def slake(folder: Path) -> Path:
    """SLAKE's layout with pictures that open."""
    write_slake(folder)
    for number, path in enumerate(sorted((folder / "imgs").rglob("*.jpg"))):
        Image.new("L", (40, 30), 20 * number).save(path)
    return folder


def test_real_pictures_leave_the_test_rows_out_and_are_cut_to_size(tmp_path):
    folder = slake(tmp_path)
    pictures = RealPictures(folder, 32)
    files = [json.loads((folder / name).read_text()) for name in ("train.json", "validate.json")]
    assert len(pictures.pairs) == len({row["img_name"] for rows in files for row in rows})
    assert ("Which organ?", "liver") in pictures.pairs[0]
    view = pictures.view(0, np.random.default_rng(0))
    assert view.shape == (32, 32) and view.dtype == np.uint8


def test_missing_pictures_are_named(tmp_path):
    folder = slake(tmp_path)
    (folder / "imgs").rename(folder / "elsewhere")
    with pytest.raises(UserError, match="SLAKE's pictures not found"):
        RealPictures(folder, 32)


@pytest.mark.slow
def test_a_medical_base_is_built_with_and_without_slake(tmp_path):
    pictures = slake(tmp_path / "slake")
    with_pictures = build(tmp_path / "llava-with", f"--slake_dir={pictures}")
    assert with_pictures.returncode == 0, with_pictures.stderr
    without = build(tmp_path / "llava-without", f"--slake_dir={tmp_path / 'absent'}")
    assert without.returncode == 0, without.stderr
    assert "learns from phantoms and words alone" in without.stdout
    for name, real in (("llava-with", True), ("llava-without", False)):
        _, model, image_processor, _ = load_pretrained_model(str(tmp_path / name), None, name, device="cpu")
        assert model.config.tiny_base["recipe"] == "medical"
        assert model.config.tiny_base["real_pictures"] is real
        assert image_processor is not None
