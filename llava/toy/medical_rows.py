"""What the medical base is trained on: SLAKE's training and validation rows and generated phantoms, as LLaVA's rows.

Each picture is shown in several views (a random cut, other contrast, some of them mirrored with the sides in question
and answer mended), each with its own choice of questions, several turns a row. Questions that have different answers on
different pictures are chosen more often, and every phantom is another picture: an answer must be looked for. No row or
picture of VQA-RAD and none of SLAKE's test split is read.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.raw.example import TEST, Example, Report
from llava.data.raw.slake import IMAGE_FOLDERS, read_slake
from llava.data.rows import GPT, HUMAN
from llava.files import atomic_folder, file_sha256, values_sha256
from llava.image_io import load_image
from llava.inside import inside
from llava.mm_utils import expand2square
from llava.outside import read_object
from llava.progress import Progress
from llava.toy.medical_facts import MODALITIES, Facts, asked_again, common_findings, facts_of, told, words_of
from llava.toy.phantom_generic import draw_generic, random_scene
from llava.toy.phantom_talk import ask_plainly, scene_words
from llava.utils import UserError

ALIGN, INSTRUCT, IMAGES, SETTINGS = "align.json", "instruct.json", "images", "settings.json"
MARGIN = 8 / 7
"""Pictures are cut from a square this much larger than the view."""

ASKED = "Describe the picture."
"""In front of a caption; alignment (``--version plain``) reads the caption alone."""

DRAWING = "drawing"
"""The word for a phantom."""

_SIDES = {"left": "right", "right": "left"}
_SIDE = re.compile(r"\b(left|right)(?=\b|sided|most)", re.IGNORECASE)
_MODALITIES = {"ct": "CT", "mri": "MRI", "xray": "X-ray"}

Pair = tuple[str, str]


@dataclass(frozen=True)
class MedicalRows:
    """How many rows are made and of what.

    Args:
        views: of each SLAKE picture. turns: questions of a view. side: pixels of a view along a side.
        mirrored: share of the views that are mirrored.
        reworded: further questions of a view, in other words than SLAKE's (``llava.toy.medical_facts``).
        told: facts in the caption of a view.
        valued: how much more often a question with several answers is chosen than one with a single answer.
        phantoms: generated pictures, each with ``phantom_turns`` questions.
    """

    seed: int = 0
    side: int = 256
    views: int = 3
    turns: int = 6
    reworded: int = 5
    told: int = 12
    mirrored: float = 0.3
    valued: float = 3.0
    phantoms: int = 120
    phantom_turns: int = 6


@dataclass(frozen=True)
class Sheet:
    """A SLAKE picture with all that is asked about it."""

    image: str
    title: str
    pairs: list[Pair]
    facts: Facts


def mirrored_text(text: str) -> str:
    """``text`` with left and right exchanged, each in its own case."""

    def other(match: re.Match[str]) -> str:
        word = match[0]
        swapped = _SIDES[word.lower()]
        return swapped.upper() if word.isupper() else swapped.capitalize() if word[0].isupper() else swapped

    return _SIDE.sub(other, text)


def sheets(examples: Sequence[Example]) -> list[Sheet]:
    """The pictures of SLAKE's training and validation rows, in the order of the files; answers in lower case."""
    pairs: dict[str, list[Pair]] = defaultdict(list)
    titles: dict[str, str] = {}
    taken: dict[str, tuple[str, str]] = {}
    for example in examples:
        if example.split == TEST:
            continue
        place = str(example.extra.get("location", "")).replace("_", " ").lower()
        taken[example.image] = str(example.domain), place
        titles[example.image] = f"{_MODALITIES[str(example.domain)]} of the {place or 'body'}"
        pairs[example.image].append((example.question, example.answer.lower()))
    return [Sheet(image, titles[image], found, facts_of(*taken[image], found)) for image, found in pairs.items()]


def question_weights(found: Sequence[Sheet], valued: float) -> dict[str, float]:
    """How often to choose each question: 1, or ``valued`` where pictures give it different answers."""
    answers: dict[str, set[str]] = defaultdict(set)
    for sheet in found:
        for question, answer in sheet.pairs:
            answers[question].add(answer)
    return {question: valued if len(each) > 1 else 1.0 for question, each in answers.items()}


def chosen(pairs: Sequence[Pair], weights: dict[str, float], count: int, rng: np.random.Generator) -> list[Pair]:
    """``count`` different pairs (all where there are fewer), by weight, in random order."""
    share = np.array([weights[question] for question, _ in pairs])
    places = rng.choice(len(pairs), size=min(count, len(pairs)), replace=False, p=share / share.sum())
    return [pairs[place] for place in places]


def view(picture: Image.Image, side: int, mirrored: bool, rng: np.random.Generator) -> Image.Image:
    """A random cut ``side`` pixels wide of the padded picture, with a little more or less contrast and brightness."""
    large = round(side * MARGIN)
    square = expand2square(picture, (0, 0, 0)).resize((large, large), Image.Resampling.BILINEAR)
    left, top = (int(place) for place in rng.integers(0, large - side + 1, 2))
    grey = np.asarray(square.crop((left, top, left + side, top + side)), np.float32)
    changed = (grey - 128) * rng.uniform(0.85, 1.15) + 128 + rng.uniform(-12, 12)
    pixels = np.clip(changed, 0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels[:, ::-1] if mirrored else pixels))


def instruct_row(name: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    """A conversation about one picture, as LLaVA packs it."""
    turns = []
    for number, (question, answer) in enumerate(pairs):
        mark = f"{DEFAULT_IMAGE_TOKEN}\n" if number == 0 else ""
        turns += [{"from": HUMAN, "value": mark + question}, {"from": GPT, "value": answer}]
    return {"id": Path(name).stem, "image": name, "conversations": turns}


def align_row(name: str, told: str, pairs: Sequence[Pair], words: dict[str, bool]) -> dict[str, Any]:
    """A caption of one picture: what is known of it, and some of what is asked about it with the answers.

    ``words`` tells which words are true of the picture and which are not (``llava.train.naming``).
    """
    caption = " ".join([told, *(f"{question} {answer}." for question, answer in pairs)])
    turns = [{"from": HUMAN, "value": f"{DEFAULT_IMAGE_TOKEN}\n{ASKED}"}, {"from": GPT, "value": caption}]
    return {"id": Path(name).stem, "image": name, "conversations": turns, "words": words}


def read_inputs(slake: Path) -> tuple[list[Sheet], dict[str, str]]:
    """SLAKE's ``sheets``, and the checksums of its files and of their pictures.

    Raises:
        UserError: SLAKE cannot be read.
    """
    report = Report("slake")
    found = sheets(read_slake(slake, report))
    files = {Path(name).name: checksum for name, checksum in report.inputs.items()}
    pictures = {sheet.image: file_sha256(inside(_pictures(slake), sheet.image)) for sheet in found}
    return found, {**files, "pictures": values_sha256(pictures)}


def _pictures(slake: Path) -> Path:
    found = next((slake / name for name in IMAGE_FOLDERS if (slake / name).is_dir()), None)
    if found is None:
        raise UserError(f"SLAKE's pictures not found: {slake}/imgs (place them there)")
    return found


def make_medical_rows(folder: Path, slake: Path, config: MedicalRows) -> bool:
    """Write ``align.json``, ``instruct.json`` and ``images/`` to ``folder``; False where they are there already.

    Raises:
        UserError: SLAKE cannot be read, or ``folder`` holds something else.
    """
    found, inputs = read_inputs(slake)
    settings = {**asdict(config), "inputs": inputs}
    if (folder / SETTINGS).is_file():
        kept = read_object(folder / SETTINGS)
        rows = {name: file_sha256(folder / name) for name in (ALIGN, INSTRUCT) if (folder / name).is_file()}
        if kept == {**settings, "rows": rows}:
            return False
        raise UserError(f"{folder} holds rows made with other settings; remove it or choose another folder")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no medical rows; choose another folder")
    with atomic_folder(folder) as partial:
        (partial / IMAGES).mkdir()
        made = [*_real(partial, _pictures(slake), found, config), *_phantoms(partial, config)]
        order = np.random.default_rng([config.seed, 3]).permutation(len(made))
        rows = {}
        for name, column in ((ALIGN, 0), (INSTRUCT, 1)):
            lines = [made[place][column] for place in order]
            (partial / name).write_text(json.dumps(lines, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            rows[name] = file_sha256(partial / name)
        (partial / SETTINGS).write_text(json.dumps({**settings, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    return True


def _real(
    folder: Path, pictures: Path, found: Sequence[Sheet], config: MedicalRows
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    weights = question_weights(found, config.valued)
    common = common_findings([sheet.facts for sheet in found])
    for number, sheet in enumerate(Progress("pictures with their answers", "picture", found)):
        picture = load_image(inside(pictures, sheet.image))
        for place in range(config.views):
            rng = np.random.default_rng([config.seed, 1, number, place])
            mirrored = bool(rng.random() < config.mirrored)
            asked = chosen(sheet.pairs, weights, config.turns, rng)
            asked += asked_again(sheet.facts, common, config.reworded, rng)
            pairs = [asked[place] for place in rng.permutation(len(asked))]
            if mirrored:
                pairs = [(mirrored_text(question), mirrored_text(answer)) for question, answer in pairs]
            name = f"slake-{number:04d}-{place}.jpg"
            view(picture, config.side, mirrored, rng).save(folder / IMAGES / name, quality=92)
            caption = told(sheet.facts, common, config.told, rng)
            caption = mirrored_text(caption) if mirrored else caption
            words = {DRAWING: False, **words_of(sheet.facts, common)}
            if mirrored:
                words = {mirrored_text(word): true for word, true in words.items()}
            yield align_row(name, caption, pairs[:2], words), instruct_row(name, [*pairs, (ASKED, caption)])


def _phantoms(folder: Path, config: MedicalRows) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for number in Progress("drawings", "picture", range(config.phantoms)):
        rng = np.random.default_rng([config.seed, 2, number])
        scene = random_scene(rng)
        pixels, _ = draw_generic(scene, config.side, rng)
        pairs = list(dict(ask_plainly(scene, rng) for _ in range(config.phantom_turns)).items())
        name = f"phantom-{number:05d}.jpg"
        Image.fromarray(pixels).convert("RGB").save(folder / IMAGES / name, quality=92)
        words = {DRAWING: True, **dict.fromkeys(MODALITIES, False), **scene_words(scene)}
        yield align_row(name, f"{DRAWING} of a body.", pairs[:3], words), instruct_row(name, pairs)
