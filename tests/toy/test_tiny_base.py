"""The tiny base: its glossary, its dialects, its packed training, and that a killed build ends in the same weights."""

from __future__ import annotations

import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_recipe import SMALL
from warm_python import warm_python

from llava.model.builder import load_pretrained_model
from llava.toy import tiny_base
from llava.toy.phantom_domains import DOMAINS, VOCABULARY
from llava.toy.phantom_generic import draw_generic, patch_labels, random_scene
from llava.toy.phantom_talk import GLOSSARY, make_dialects, talk
from llava.toy.tiny_base import Encoder, pack, packed_loss

ROOT = Path(__file__).resolve().parents[2]


def _command(folder: Path, **changes) -> list[str]:
    flags = [f"--{name}={value}" for name, value in (asdict(SMALL) | changes).items()]
    script = str(ROOT / "scripts/make_tiny_base.py")
    return [str(warm_python()), script, "--output_dir", str(folder), "--save_every=1", *flags]


def _build(folder: Path, **changes) -> subprocess.CompletedProcess:
    return subprocess.run(_command(folder, **changes), cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    done = _build(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def loaded(base):
    return load_pretrained_model(str(base), None, "llava-tiny", device="cpu")


def test_every_word_of_the_tasks_is_in_the_glossary():
    for domain in DOMAINS:
        words = VOCABULARY[domain]
        said = [*words.modalities, *words.looks.values(), *words.places.values(), *words.sides]
        said += [*words.grades, *words.counts, *words.densities]
        assert set(said) <= set(GLOSSARY)


def test_no_dialect_is_a_convention_of_the_tasks():
    for dialect in make_dialects(SMALL.seed):
        for words in VOCABULARY.values():
            assert all(dialect.looks[look] != name for look, name in words.looks.items())
            assert dialect.grades != words.grades and dialect.counts != words.counts
            assert dialect.densities != words.densities and dialect.kinds != words.modalities


def test_generic_pictures_and_talk_follow_from_the_seed():
    def once():
        rng = np.random.default_rng(5)
        scene = random_scene(rng)
        return draw_generic(scene, 32, rng)[0].tobytes(), talk(scene, make_dialects(0), 6, rng)

    assert once() == once()


def test_patch_labels_lie_where_the_spots_are():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = random_scene(rng)
        _, spots = draw_generic(scene, 64, rng)
        labels = patch_labels(scene, spots, 8)
        assert (labels > 0).any() == (scene.look is not None)
        if scene.look is not None:
            half = labels[:, 4:] if scene.right else labels[:, :4]
            assert (half > 0).sum() > (labels > 0).sum() / 2


@pytest.mark.slow
def test_the_tokenizer_says_every_text_and_names_its_special_tokens(loaded):
    tokenizer = loaded[0]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.unk_token_id)
    for text in ("haemorrhage", "Größe 3 µm\n"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.slow
def test_the_checkpoint_answers_a_question(loaded):
    tokenizer, model, processor, _ = loaded
    size = model.get_vision_tower().config.image_size
    assert processor.crop_size["height"] == size == SMALL.image_size
    prompt = torch.tensor([Encoder(tokenizer, "mistral_instruct").tokenizer("x")["input_ids"] + [-200]])
    answer = model.generate(prompt, images=torch.zeros(1, 3, size, size), max_new_tokens=3, do_sample=False)
    assert answer.shape[0] == 1 and answer.shape[1] <= 3


@pytest.mark.slow
def test_packed_questions_do_not_see_each_other(loaded):
    tokenizer, model, _, _ = loaded
    encode = Encoder(tokenizer, "mistral_instruct")
    features = torch.randn(1, SMALL.grid**2, SMALL.tower_width, generator=torch.Generator().manual_seed(0))
    pairs = [("Is the picture normal?", "yes"), ("On which side is the lesion?", "left")]

    def loss(chosen):
        packed = pack([chosen], encode, features.shape[1], tokenizer.pad_token_id)
        return packed_loss(model, features, packed, encode.prefix).item()

    counts = [sum(label != -100 for label in encode(*pair)[1]) for pair in pairs]
    alone = sum(loss([pair]) * count for pair, count in zip(pairs, counts, strict=True)) / sum(counts)
    assert loss(pairs) == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_a_finished_base_is_left_alone_and_other_settings_are_refused(base):
    before = (base / "model.safetensors").stat().st_mtime_ns
    again = _build(base)
    assert again.returncode == 0 and "already made" in again.stdout
    assert (base / "model.safetensors").stat().st_mtime_ns == before
    other = _build(base, steps=5)
    assert other.returncode != 0 and other.stderr.strip().count("\n") == 0 and "other settings" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tower", "language"])
def test_a_killed_build_ends_in_the_same_weights(base, tmp_path, stage):
    code = f"""
import sys, os, signal
sys.path.insert(0, {str(ROOT)!r})
sys.path.insert(0, {str(ROOT / "scripts")!r})
import llava.toy.tiny_base as tiny
real = tiny._save_state
def save(path, state):
    real(path, state)
    if path.name == "{stage}.pt" and state["step"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
tiny._save_state = save
import make_tiny_base
sys.argv = sys.argv[1:]
make_tiny_base.main()
"""
    command = _command(tmp_path / "tiny")
    killed = subprocess.run(
        [str(warm_python()), "-c", code, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "tiny").exists()
    assert _build(tmp_path / "tiny").returncode == 0
    whole, mended = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "tiny"))
    assert whole.keys() == mended.keys()
    assert all(torch.equal(whole[name], mended[name]) for name in whole)
    assert not list(tmp_path.glob(".*"))


def test_the_schedule_rises_and_falls():
    factors = [tiny_base._schedule(step, 100) for step in range(100)]
    assert max(factors) == pytest.approx(1.0) and factors[0] < 0.2 and factors[-1] < 0.05
