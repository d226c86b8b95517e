"""The three domains of the phantom: abdomen (axial), chest (frontal), head (axial), and what things are called there.

The same look has another name in every domain, the same question another rule: left and right follow the radiological
convention in abdomen and chest (the picture's left is the patient's right) and the neurological one in the head (the
picture's left is the patient's left). So a learner that only keeps the last domain answers the earlier ones wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llava.toy.phantom_draw import Canvas, Spot, draw_spot, speckle

DOMAINS = ("abd", "chest", "head")
SMALL, LARGE = 0, 1
RADIUS = ((0.043, 0.050), (0.078, 0.088))
"""Radius of a small and of a large abnormality, as fractions of the picture's side."""

_APART = 0.015
_TRIES = 60


@dataclass(frozen=True)
class Scene:
    """What one phantom picture shows; every answer follows from it.

    Args:
        domain: name of the domain.
        modality: 0 or 1, which of the domain's two kinds of picture.
        enlarged: whether the organ of the domain (aorta, heart, ventricles) is enlarged.
        look: look of the abnormalities, None when there is none.
        count: number of abnormalities: none, one or three.
        large: ``LARGE`` or ``SMALL``.
        right: whether they lie in the right half of the picture.
        lower: whether they lie in the lower half of their region.
        seed: seeds everything else (positions, noise, contrast).
    """

    domain: str
    modality: int
    enlarged: bool
    look: str | None
    count: int
    large: int
    right: bool
    lower: bool
    seed: int


@dataclass(frozen=True)
class Domain:
    """Words and places of one domain.

    Args:
        modalities: name of picture kind 0 and 1.
        looks: name of each look.
        places: name by ``(lower, right)``.
        sides: word for an abnormality in the left and in the right half of the *picture*.
        grades: word for small and for large.
        counts: word for one and for three.
        densities: word for bright and for dark looks.
        organ: the phrase in "Is the ... enlarged?" with its verb.
        urgent: rule for "Does it need urgent treatment?".
        regions: where abnormalities lie in the left half of the picture: x range, upper y range, lower y range.
    """

    modalities: tuple[str, str]
    looks: dict[str, str]
    places: dict[tuple[bool, bool], str]
    sides: tuple[str, str]
    grades: tuple[str, str]
    counts: tuple[str, str]
    densities: tuple[str, str]
    organ: str
    urgent: Callable[[Scene], bool]
    regions: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]


VOCABULARY: dict[str, Domain] = {
    "abd": Domain(
        modalities=("ct", "mri"),
        looks={"bright": "stone", "dark": "cyst", "target": "mass", "ring": "abscess"},
        places={(False, False): "liver", (False, True): "spleen", (True, False): "kidney", (True, True): "kidney"},
        sides=("right", "left"),
        grades=("mild", "marked"),
        counts=("one", "several"),
        densities=("hyperdense", "hypodense"),
        organ="Is the aorta",
        urgent=lambda scene: scene.large == LARGE,
        regions=((0.22, 0.37), (0.34, 0.44), (0.58, 0.69)),
    ),
    "chest": Domain(
        modalities=("upright film", "portable film"),
        looks={"bright": "nodule", "dark": "pneumothorax", "target": "pneumonia", "ring": "cavity"},
        places={
            (False, False): "upper lobe",
            (False, True): "upper lobe",
            (True, False): "lower lobe",
            (True, True): "lower lobe",
        },
        sides=("right", "left"),
        grades=("minor", "extensive"),
        counts=("solitary", "multiple"),
        densities=("opaque", "lucent"),
        organ="Is the heart",
        urgent=lambda scene: scene.look in ("dark", "target"),
        regions=((0.21, 0.35), (0.29, 0.40), (0.56, 0.69)),
    ),
    "head": Domain(
        modalities=("t1", "t2"),
        looks={"bright": "haemorrhage", "dark": "infarct", "target": "tumour", "ring": "metastasis"},
        places={
            (False, False): "frontal lobe",
            (False, True): "frontal lobe",
            (True, False): "occipital lobe",
            (True, True): "occipital lobe",
        },
        sides=("left", "right"),
        grades=("grade 1", "grade 2"),
        counts=("1", "3"),
        densities=("hyperintense", "hypointense"),
        organ="Are the ventricles",
        urgent=lambda scene: scene.look in ("bright", "ring"),
        regions=((0.23, 0.36), (0.26, 0.37), (0.63, 0.74)),
    ),
}


def draw_scene(scene: Scene, size: int) -> np.ndarray:
    """The picture of a scene.

    Returns:
        uint8 array ``[size, size]``; the same bytes for the same scene and size.
    """
    rng = np.random.default_rng(scene.seed)
    canvas = Canvas(size, background=_BACKGROUND[scene.domain])
    _BODIES[scene.domain](canvas, scene, rng)
    canvas.blur(2)
    spot_rng = np.random.default_rng([scene.seed, 1])  # of its own, so that body and noise do not depend on the spots
    for spot in place_spots(scene, spot_rng):
        draw_spot(canvas, spot, spot_rng)
    shift = (float(rng.uniform(-0.025, 0.025)), float(rng.uniform(-0.025, 0.025)))
    canvas.move(shift, float(rng.uniform(0.94, 1.05)), float(rng.uniform(-5, 5)), _BACKGROUND[scene.domain])
    canvas.blur(1)
    noise = speckle(rng, size, int(rng.integers(5, 12)))
    return canvas.finish(noise, gain=float(rng.uniform(0.9, 1.05)), offset=int(rng.integers(-6, 7)))


def place_spots(scene: Scene, rng: np.random.Generator) -> list[Spot]:
    """Non-overlapping abnormalities in the scene's half; several of them spread over both levels of it."""
    if scene.look is None:
        return []
    xs, upper, lower = VOCABULARY[scene.domain].regions
    ys = (upper[0], lower[1]) if scene.count > 1 else (lower if scene.lower else upper)
    spots: list[Spot] = []
    while len(spots) < scene.count:
        spots = []
        for _ in range(_TRIES):
            x, y = float(rng.uniform(*xs)), float(rng.uniform(*ys))
            spot = Spot(scene.look, 1 - x if scene.right else x, y, float(rng.uniform(*RADIUS[scene.large])))
            if len(spots) < scene.count and _is_free(spot, spots):
                spots.append(spot)
    return spots


def _is_free(spot: Spot, spots: list[Spot]) -> bool:
    return all(np.hypot(spot.x - s.x, spot.y - s.y) > spot.radius + s.radius + _APART for s in spots)


def _jitter(rng: np.random.Generator, value: float, share: float = 0.06) -> float:
    return value * float(rng.uniform(1 - share, 1 + share))


def _abdomen(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    """Axial abdomen: fat ring, muscle, liver and spleen, kidneys, aorta and spine."""
    is_ct = scene.modality == 0
    fat, muscle, bone, vessel = (60, 112, 215, 168) if is_ct else (178, 74, 40, 20)
    organs = (138, 128, 150) if is_ct else (104, 128, 140)
    canvas.ellipse(0.5, 0.51, _jitter(rng, 0.45, 0.03), _jitter(rng, 0.37, 0.04), fat)
    canvas.ellipse(0.5, 0.51, 0.405, 0.325, muscle)
    canvas.ellipse(0.31, 0.42, _jitter(rng, 0.17), _jitter(rng, 0.16), organs[0], angle=-20)
    canvas.ellipse(0.71, 0.42, _jitter(rng, 0.12), _jitter(rng, 0.15), organs[1], angle=15)
    for x, angle in ((0.30, 30), (0.70, -30)):
        canvas.ellipse(x, 0.63, _jitter(rng, 0.085), _jitter(rng, 0.105), organs[2], angle=angle)
    canvas.ellipse(0.52, 0.33, 0.07, 0.05, fat // 2, angle=float(rng.uniform(-20, 20)))
    canvas.ellipse(0.5, 0.73, 0.075, 0.07, bone)
    canvas.ellipse(0.5, 0.79, 0.028, 0.024, muscle // 2)
    wide = 0.080 if scene.enlarged else 0.032
    canvas.ellipse(0.5, 0.565, wide, wide, vessel)


def _chest(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    """Frontal chest: shoulders, two lungs with ribs, mediastinum, heart, diaphragm; leads on a portable film."""
    canvas.ellipse(0.5, 0.62, 0.46, 0.60, 128)
    canvas.ellipse(0.5, 0.04, 0.11, 0.16, 120)
    for x, angle in ((0.29, 6), (0.71, -6)):
        canvas.ellipse(x, 0.50, _jitter(rng, 0.165, 0.04), _jitter(rng, 0.33, 0.04), 62, angle=angle)
    for row in range(6):
        y = 0.24 + 0.105 * row
        canvas.arc(0.29, y + 0.03, 0.17, 0.06, (200, 340), 88, 0.012)
        canvas.arc(0.71, y + 0.03, 0.17, 0.06, (200, 340), 88, 0.012)
    canvas.ellipse(0.5, 0.45, 0.065, 0.40, 176)
    half = 0.17 if scene.enlarged else 0.085
    canvas.ellipse(0.53, 0.66, half, _jitter(rng, 0.12), 186, angle=-12)
    for x in (0.28, 0.72):
        canvas.ellipse(x, 0.90, 0.21, 0.12, 165)
    canvas.line((0.14, 0.20), (0.46, 0.15), 150, 0.022)
    canvas.line((0.86, 0.20), (0.54, 0.15), 150, 0.022)
    if scene.modality == 1:
        drift = float(rng.uniform(-0.05, 0.05))
        canvas.line((0.02, 0.99), (0.10 + drift, 0.30), 240, 0.012)
        canvas.line((0.98, 0.99), (0.90 + drift, 0.30), 240, 0.012)
        canvas.line((0.5 + drift, 0.0), (0.5, 0.36), 250, 0.020)


def _head(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    """Axial head: scalp, skull, brain with sulci, midline and ventricles; fluid is dark on T1 and bright on T2."""
    brain, fluid, scalp = (132, 34, 210) if scene.modality == 0 else (96, 232, 150)
    canvas.ellipse(0.5, 0.5, _jitter(rng, 0.40, 0.03), _jitter(rng, 0.47, 0.02), scalp)
    canvas.ellipse(0.5, 0.5, 0.375, 0.44, 18)
    canvas.ellipse(0.5, 0.5, 0.345, 0.41, brain)
    for _ in range(22):
        angle = float(rng.uniform(0, 2 * np.pi))
        start = (0.5 + 0.345 * float(np.cos(angle)), 0.5 + 0.41 * float(np.sin(angle)))
        end = (0.5 + 0.28 * float(np.cos(angle + 0.1)), 0.5 + 0.345 * float(np.sin(angle + 0.1)))
        canvas.line(start, end, (brain + fluid) // 2, 0.012)
    canvas.line((0.5, 0.10), (0.5, 0.34), fluid, 0.010)
    canvas.line((0.5, 0.66), (0.5, 0.90), fluid, 0.010)
    wide, high = (0.052, 0.125) if scene.enlarged else (0.020, 0.075)
    canvas.ellipse(0.5 - wide - 0.008, 0.49, wide, high, fluid, angle=14)
    canvas.ellipse(0.5 + wide + 0.008, 0.49, wide, high, fluid, angle=-14)


_BACKGROUND = {"abd": 4, "chest": 26, "head": 2}
_BODIES = {"abd": _abdomen, "chest": _chest, "head": _head}
