"""The embedded radiology phantom: three tasks whose answers can only be had from drawn pictures.

- balanced per question: every answer of a question has the same number of rows (within one) in a domain's training and
  test part, so neither the majority answer nor guessing from the question goes far;
- deterministic: the same seed and sizes give the same bytes;
- atomic: built in a temporary folder that is renamed when complete, so a killed run leaves nothing half-written.

The answers of a domain depend on its own conventions, see ``llava.toy.phantom_domains``.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from llava.data.rows import question_row, write_jsonl
from llava.outside import read_object
from llava.toy.phantom_domains import DOMAINS, LARGE, SMALL, Scene, draw_scene
from llava.toy.phantom_draw import LOOKS
from llava.toy.phantom_questions import QUESTIONS, Question
from llava.utils import UserError

FORMAT_VERSION = 2
MANIFEST = "phantom.json"
SPLITS = ("train", "test", "validation")
"""Parts of a domain, each on pictures of its own: settings are chosen on validation, results reported on test."""
NORMAL_SHARE = 6
"""One picture in this many shows nothing abnormal."""


@dataclass(frozen=True)
class PhantomConfig:
    """How much to generate.

    Args:
        seed: of everything random.
        size: side of the pictures in pixels.
        train_rows: training rows of a task.
        train_images: training pictures of a task.
        test_rows: test rows of a task, on pictures of their own; as many validation rows.
        test_images: test pictures of a task; as many validation pictures.
    """

    seed: int = 0
    size: int = 64
    train_rows: int = 600
    train_images: int = 150
    test_rows: int = 120
    test_images: int = 40

    def check(self) -> None:
        """Raises: UserError: a size that cannot be drawn or too few rows to balance."""
        if self.size < 32:
            raise UserError(f"--size {self.size} is too small to see anything: use 32 pixels or more")
        for name, rows, images in (
            ("train", self.train_rows, self.train_images),
            ("test", self.test_rows, self.test_images),
        ):
            if rows < len(QUESTIONS) or images < 2 * NORMAL_SHARE:
                least = f"at least {len(QUESTIONS)} rows and {2 * NORMAL_SHARE} pictures"
                raise UserError(f"--{name}_rows {rows} with --{name}_images {images}: a task needs {least}")


def make_phantom(folder: str | Path, config: PhantomConfig) -> bool:
    """Write ``images/``, ``train_<task>.jsonl`` for each task, ``validation.jsonl`` and ``test.jsonl`` into ``folder``.

    Returns:
        False when the folder already holds exactly this dataset, which is then left alone.

    Raises:
        UserError: the folder holds something that is not a phantom.
    """
    config.check()
    target = Path(folder)
    manifest = {"format_version": FORMAT_VERSION, **asdict(config)}
    if _holds(target, manifest):
        return False
    building = target.with_name(f".{target.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    (building / "images").mkdir(parents=True)
    _build(building, config)
    (building / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    if target.exists():
        shutil.rmtree(target)
    building.rename(target)
    return True


def _holds(target: Path, manifest: dict[str, Any]) -> bool:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    found = target / MANIFEST
    if not found.is_file():
        raise UserError(f"{target} exists and is not a phantom dataset (no {MANIFEST}); choose another --output_dir")
    return read_object(found) == manifest


def _build(folder: Path, config: PhantomConfig) -> None:
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)  # by file
    for domain in DOMAINS:
        for split in SPLITS:
            scenes, part = build_part(domain, split, config)
            _write_images(folder / "images", scenes, config.size)
            rows[f"train_{domain}" if split == "train" else split] += part
    for name, lines in rows.items():
        write_jsonl(folder / f"{name}.jsonl", lines)


def _write_images(folder: Path, scenes: dict[str, Scene], size: int) -> None:
    for name, scene in scenes.items():
        (folder / name).write_bytes(png_bytes(draw_scene(scene, size)))


def png_bytes(picture: np.ndarray) -> bytes:
    """A uint8 picture as the bytes of a PNG file."""
    return cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 6])[1].tobytes()


def build_part(domain: str, split: str, config: PhantomConfig) -> tuple[dict[str, Scene], list[dict[str, Any]]]:
    """Scenes and rows of one part of a domain, see ``SPLITS``.

    Returns:
        the scenes by image name, and the question rows in a shuffled order.
    """
    rng = np.random.default_rng([config.seed, DOMAINS.index(domain), SPLITS.index(split)])
    row_count, image_count = (
        (config.train_rows, config.train_images) if split == "train" else (config.test_rows, config.test_images)
    )
    scenes = {f"{domain}_{split}_{i:04d}.png": scene for i, scene in enumerate(make_scenes(domain, image_count, rng))}
    picked = pick_rows(scenes, row_count, rng)
    rng.shuffle(picked)
    rows = [
        question_row(
            f"{domain}-{split}-{index:04d}",
            image,
            question.text_for(domain),
            question.answer_for(scenes[image]),
            domain,
            DOMAINS,
            answer_type="CLOSED" if question.closed else "OPEN",
            question_type=question.name,
            split=split,
        )
        for index, (image, question) in enumerate(picked)
    ]
    return scenes, rows


def make_scenes(domain: str, count: int, rng: np.random.Generator) -> list[Scene]:
    """Scenes whose attributes are balanced one by one and combined at random."""
    columns = {
        "look": _shuffled([None] * (count // NORMAL_SHARE), LOOKS, count, rng),
        "modality": _shuffled([], (0, 1), count, rng),
        "enlarged": _shuffled([], (False, True), count, rng),
        "count": _shuffled([], (1, 3), count, rng),
        "large": _shuffled([], (SMALL, LARGE), count, rng),
        "right": _shuffled([], (False, True), count, rng),
        "lower": _shuffled([], (False, True), count, rng),
    }
    scenes = []
    for values in zip(*columns.values(), strict=True):
        known = dict(zip(columns, values, strict=True))
        if known["look"] is None:
            known["count"] = 0
        scenes.append(Scene(domain=domain, seed=int(rng.integers(2**31)), **known))
    return scenes


def _shuffled(first: list[Any], values: tuple[Any, ...], count: int, rng: np.random.Generator) -> list[Any]:
    """``first``, then ``values`` over and over up to ``count`` entries, in random order."""
    turn = cycle(values)
    column = list(first) + [next(turn) for _ in range(count - len(first))]
    return [column[i] for i in rng.permutation(count)]


def pick_rows(scenes: dict[str, Scene], count: int, rng: np.random.Generator) -> list[tuple[str, Question]]:
    """Choose ``count`` pairs of picture and question: equal answers per question, pictures used evenly.

    An answer that too few pictures have gets a row for each of them and no more.
    """
    used: dict[str, int] = defaultdict(int)
    picked: list[tuple[str, Question]] = []
    for question, share in zip(QUESTIONS, _split_evenly(count, len(QUESTIONS)), strict=True):
        by_answer: dict[str, list[str]] = defaultdict(list)
        for image, scene in scenes.items():
            if question.fits(scene):
                by_answer[question.answer_for(scene)].append(image)
        for images, wanted in zip(by_answer.values(), _split_evenly(share, len(by_answer)), strict=True):
            order = [images[i] for i in rng.permutation(len(images))]
            for image in sorted(order, key=used.__getitem__)[:wanted]:
                used[image] += 1
                picked.append((image, question))
    return picked


def _split_evenly(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]
