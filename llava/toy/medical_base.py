"""The medical recipe of the tiny base: real radiology pictures and words beside the generic phantoms.

Pictures and questions come from SLAKE's training and validation rows (where its folder is at hand), words from the
glossary in ``llava.toy.medical_talk``, and the phantoms go on teaching to look closely. The tower learns on together
with the language model, since phantoms alone have not shown it real anatomy. No row or picture of VQA-RAD is read.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llava.data.raw.example import TEST, Report
from llava.data.raw.slake import IMAGE_FOLDERS, read_slake
from llava.image_io import load_image
from llava.mm_utils import expand2square
from llava.toy.medical_talk import MedicalText, sayable_pieces, spell
from llava.toy.phantom_talk import make_dialects, talk
from llava.toy.tiny_base import (
    PIXEL_MEAN,
    PIXEL_STD,
    Encoder,
    Loss,
    TinyBaseConfig,
    pack,
    packed_loss,
    tokenizer_texts,
)
from llava.toy.tiny_tower import GenericPictures, normalised
from llava.utils import UserError

MEDICAL = TinyBaseConfig(
    recipe="medical",
    image_size=112,
    patch_size=16,
    tower_width=160,
    tower_layers=4,
    tower_steps=350,
    tower_batch=32,
    hidden_size=256,
    intermediate_size=768,
    heads=4,
    vocab_size=3000,
    pictures=4000,
    steps=900,
    batch=12,
    lr=1.5e-3,
)
_MARGIN = 8 / 7
"""Pictures are kept this much larger than the model sees them; every view is a random cut."""

_REAL_QUESTIONS, _REAL_WORDS, _REAL_SPELLED = 9, 2, 3
_PHANTOM_QUESTIONS, _PHANTOM_WORDS, _PHANTOM_SPELLED = 5, 4, 4

Pairs = list[tuple[str, str]]


class RealPictures:
    """SLAKE's grey pictures ``[n, side, side]`` with the questions and answers about each."""

    def __init__(self, folder: Path, size: int):
        by_name: dict[str, Pairs] = defaultdict(list)
        for example in read_slake(folder, Report("slake")):
            if example.split != TEST:
                by_name[example.image].append((example.question, example.answer.lower()))
        image_folder = next((folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()), None)
        if image_folder is None:
            raise UserError(f"SLAKE's pictures not found: {folder}/imgs (place them there, or leave --slake_dir out)")
        self.size, self.side = size, round(size * _MARGIN)
        self.pairs = list(by_name.values())
        self.pixels = np.stack([self._open(image_folder / name) for name in by_name])

    def _open(self, path: Path) -> np.ndarray:
        square = expand2square(load_image(path), (round(255 * PIXEL_MEAN),) * 3)
        return np.asarray(square.convert("L").resize((self.side, self.side), Image.Resampling.BILINEAR))

    def view(self, index: int, rng: np.random.Generator) -> np.ndarray:
        """A random cut ``[size, size]`` with a little more or less contrast and brightness."""
        top, left = rng.integers(0, self.side - self.size + 1, 2)
        cut = self.pixels[index, top : top + self.size, left : left + self.size].astype(np.float32)
        middle = 255 * PIXEL_MEAN
        changed = (cut - middle) * rng.uniform(0.85, 1.15) + middle + rng.uniform(-12, 12)
        return np.clip(changed, 0, 255).astype(np.uint8)

    def questions(self, index: int, count: int, rng: np.random.Generator) -> Pairs:
        """Up to ``count`` different questions about a picture."""
        pairs = self.pairs[index]
        return [pairs[place] for place in rng.permutation(len(pairs))[:count]]


class MedicalCorpus:
    """What the medical base is trained on."""

    def __init__(self, config: TinyBaseConfig, pictures: GenericPictures, slake_dir: str | None):
        self.config, self.pictures = config, pictures
        self.real = RealPictures(Path(slake_dir), config.image_size) if slake_dir else None
        self.dialects, self.words = make_dialects(config.seed), MedicalText()

    def texts(self) -> list[str]:
        """What the tokenizer learns from."""
        rng = np.random.default_rng([self.config.seed, 5])
        texts = tokenizer_texts(self.pictures, self.dialects, self.config.seed)[::3]
        asked = [self.words.ask(rng) for _ in range(3000)]
        if self.real is not None:
            asked += [pair for pairs in self.real.pairs for pair in pairs] * 2
        texts += [f"\n{question} [/INST] {answer} </s>" for question, answer in asked]
        texts += [text for term in self.words.terms for text in (f" {term} </s>", f" {term}", f" {term}?")] * 6
        return texts

    def loss(self, model, tokenizer: PreTrainedTokenizerFast) -> Loss:
        """The loss of a step of the joint training of tower, projector and decoder, from the step's number alone."""
        encode = Encoder(tokenizer, self.config.conversation_version)
        pieces = sayable_pieces(tokenizer)
        tower = model.get_vision_tower().vision_tower
        tower.requires_grad_(True)

        def loss_of(step: int) -> Tensor:
            rng = np.random.default_rng([self.config.seed, 4, step])
            pixels, talks = zip(*(self._sample(place, pieces, rng) for place in range(self.config.batch)), strict=True)
            seen = normalised(torch.from_numpy(np.stack(pixels)), PIXEL_MEAN, PIXEL_STD)
            features = tower(pixel_values=seen).last_hidden_state[:, 1:]
            packed = pack(list(talks), encode, features.shape[1], tokenizer.pad_token_id)
            return packed_loss(model, features, packed, encode.prefix)

        return loss_of

    def _sample(self, place: int, pieces: list[str], rng: np.random.Generator) -> tuple[np.ndarray, Pairs]:
        """A picture with questions; two of three are real ones, where there are any."""
        if self.real is None or place % 3 == 2:
            index = int(rng.integers(len(self.pictures)))
            pairs = talk(self.pictures.scenes[index], self.dialects, _PHANTOM_QUESTIONS, rng)
            words, spelled = _PHANTOM_WORDS, _PHANTOM_SPELLED
            pixels = self.pictures.pixels[index].numpy()
        else:
            index = int(rng.integers(len(self.real.pairs)))
            pairs = self.real.questions(index, _REAL_QUESTIONS, rng)
            words, spelled = _REAL_WORDS, _REAL_SPELLED
            pixels = self.real.view(index, rng)
        pairs = pairs + [self.words.ask(rng) for _ in range(words)]
        return pixels, pairs + [spell(pieces, rng) for _ in range(spelled)]
