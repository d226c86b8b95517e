"""Generic phantoms for training the tiny base: random bodies, random organs, random spots; no domain, no convention.

A base that has seen these pictures knows what a picture shows (how many spots, where, how large, of which look, what
the rim and the middle of the body look like) but none of the tasks' bodies, names or rules.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llava.toy.phantom_draw import LOOKS, Canvas, Spot, draw_spot, speckle

_SMALL_RADIUS = (0.040, 0.052)
_LARGE_RADIUS = (0.074, 0.094)
_APART = 0.012
_TRIES = 80
_SEEN_SHARE = 0.1
"""A patch shows a spot when the spot covers at least this share of it."""


@dataclass(frozen=True)
class GenericScene:
    """What one generic picture shows.

    Args:
        look: look of the spots, None when there are none.
        count: number of spots.
        large: whether they are large.
        right: whether they lie in the right half of the picture.
        lower: whether they lie in the lower half; None when they spread over both.
        bright_rim: whether the body has a bright rim (else a dark one).
        bright_core: whether the structure in the middle is bright (else dark).
        wide_core: whether it is wide.
        crossed: whether thin bright lines cross the body.
    """

    look: str | None
    count: int
    large: bool
    right: bool
    lower: bool | None
    bright_rim: bool
    bright_core: bool
    wide_core: bool
    crossed: bool


def random_scene(rng: np.random.Generator) -> GenericScene:
    """A scene with independent random attributes; one in eight has no spot."""
    count = 0 if rng.random() < 0.125 else int(rng.choice((1, 2, 3, 4), p=(0.5, 0.1, 0.3, 0.1)))
    flags = rng.random(7) < 0.5
    return GenericScene(
        look=LOOKS[int(rng.integers(len(LOOKS)))] if count else None,
        count=count,
        large=bool(flags[0]),
        right=bool(flags[1]),
        lower=bool(flags[2]) if count == 1 else None,
        bright_rim=bool(flags[3]),
        bright_core=bool(flags[4]),
        wide_core=bool(flags[5]),
        crossed=bool(flags[6]),
    )


def draw_generic(scene: GenericScene, size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[Spot]]:
    """Draw a generic scene in a random body.

    Returns:
        the picture, uint8 ``[size, size]``, and the spots where they have come to lie in it.
    """
    background = int(rng.integers(0, 40))
    canvas = Canvas(size, background)
    _draw_body(canvas, scene, rng)
    _draw_core(canvas, scene, rng)
    canvas.blur(2)
    spots = _place(scene, rng)
    for spot in spots:
        draw_spot(canvas, spot, rng)
    shift = (float(rng.uniform(-0.03, 0.03)), float(rng.uniform(-0.03, 0.03)))
    scale = float(rng.uniform(0.92, 1.06))
    moved = canvas.move(shift, scale, float(rng.uniform(-7, 7)), background)
    canvas.blur(1)
    noise = speckle(rng, size, int(rng.integers(4, 14)))
    picture = canvas.finish(noise, gain=float(rng.uniform(0.88, 1.06)), offset=int(rng.integers(-8, 9)))
    places = [(moved @ (spot.x, spot.y, 1)).tolist() for spot in spots]
    return picture, [Spot(spot.look, x, y, spot.radius * scale) for spot, (x, y) in zip(spots, places, strict=True)]


def patch_labels(scene: GenericScene, spots: list[Spot], patches: int) -> np.ndarray:
    """What each patch of the picture shows: 0 nothing, else 1 + the look, plus 4 when the spots are large.

    Args:
        patches: patches along a side.

    Returns:
        int64 array ``[patches, patches]``.
    """
    fine = 16
    axis = (np.arange(patches * fine) + 0.5) / (patches * fine)
    covered = np.zeros((patches * fine, patches * fine), bool)
    for spot in spots:
        covered |= (axis[None] - spot.x) ** 2 + (axis[:, None] - spot.y) ** 2 < spot.radius**2
    share = covered.reshape(patches, fine, patches, fine).mean(axis=(1, 3))
    kind = 1 + LOOKS.index(scene.look) + len(LOOKS) * scene.large if scene.look else 0
    return np.where(share > _SEEN_SHARE, kind, 0)


def _draw_body(canvas: Canvas, scene: GenericScene, rng: np.random.Generator) -> None:
    """Outline, rim and organs; what the spots lie on stays between dark and bright."""
    rx, ry = float(rng.uniform(0.36, 0.48)), float(rng.uniform(0.36, 0.50))
    tissue = int(rng.integers(55, 150))
    rim = int(rng.integers(150, 225)) if scene.bright_rim else int(rng.integers(8, 60))
    width = float(rng.uniform(0.03, 0.06))
    if rng.random() < 0.35:
        canvas.polygon(_box(rx, ry), rim)
        canvas.polygon(_box(rx - width, ry - width), tissue)
    else:
        canvas.ellipse(0.5, 0.5, rx, ry, rim)
        canvas.ellipse(0.5, 0.5, rx - width, ry - width, tissue)
    for _ in range(int(rng.integers(1, 4))):
        _draw_organ_pair(canvas, tissue, rng)
    lines = int(rng.integers(0, 7))
    for row in range(lines):
        y = 0.2 + 0.6 * row / lines
        canvas.arc(0.5, y, 0.36, float(rng.uniform(0.02, 0.1)), (190, 350), tissue + 22, 0.011)
    if scene.crossed:
        _draw_crossing(canvas, rng)


def _box(rx: float, ry: float) -> list[tuple[float, float]]:
    """A rectangle with cut corners."""
    cut = 0.45
    corners = [(-cut * rx, -ry), (cut * rx, -ry), (rx, -cut * ry), (rx, cut * ry)]
    corners += [(-x, -y) for x, y in corners]
    return [(0.5 + x, 0.5 + y) for x, y in corners]


def _draw_organ_pair(canvas: Canvas, tissue: int, rng: np.random.Generator) -> None:
    """An organ on each side, alike or not."""
    dx, y = float(rng.uniform(0.12, 0.28)), float(rng.uniform(0.25, 0.75))
    for x in (0.5 - dx, 0.5 + dx):
        if rng.random() < 0.4:
            dx, y = float(rng.uniform(0.12, 0.28)), float(rng.uniform(0.25, 0.75))
        grey = int(np.clip(tissue + rng.integers(-50, 60), 40, 165))
        rx, ry = rng.uniform(0.06, 0.2, 2).tolist()
        canvas.ellipse(x, y, rx, ry, grey, angle=float(rng.uniform(0, 180)))


def _draw_crossing(canvas: Canvas, rng: np.random.Generator) -> None:
    """Thin bright lines near the middle and the edges, as leads and tubes make them."""
    x = 0.5 + float(rng.uniform(-0.05, 0.05))
    canvas.line((x, 0.0), (0.5, float(rng.uniform(0.25, 0.45))), 245, 0.020)
    for side in (0.06, 0.94):
        drift = float(rng.uniform(-0.06, 0.06))
        canvas.line((side, 1.0), (side + drift, float(rng.uniform(0.2, 0.5))), 240, 0.013)


def _draw_core(canvas: Canvas, scene: GenericScene, rng: np.random.Generator) -> None:
    """The structure in the middle: single or a pair, narrow or wide, bright or dark."""
    grey = int(rng.integers(172, 236)) if scene.bright_core else int(rng.integers(12, 50))
    half = float(rng.uniform(0.065, 0.12) if scene.wide_core else rng.uniform(0.024, 0.042))
    high = half * float(rng.uniform(0.9, 2.2))
    x, y = 0.5 + float(rng.uniform(-0.03, 0.03)), float(rng.uniform(0.42, 0.68))
    if rng.random() < 0.4:
        for side in (-1, 1):
            canvas.ellipse(x + side * (half * 0.6), y, half * 0.55, high, grey, angle=-12 * side)
    else:
        canvas.ellipse(x, y, half, high, grey, angle=float(rng.uniform(-12, 12)))


def _place(scene: GenericScene, rng: np.random.Generator) -> list[Spot]:
    """Non-overlapping spots in one half of the picture."""
    if scene.look is None:
        return []
    ys = {True: (0.56, 0.76), False: (0.24, 0.44), None: (0.24, 0.76)}[scene.lower]
    radii = _LARGE_RADIUS if scene.large else _SMALL_RADIUS
    spots: list[Spot] = []
    while len(spots) < scene.count:
        spots = []
        for _ in range(_TRIES):
            x, y = float(rng.uniform(0.18, 0.38)), float(rng.uniform(*ys))
            spot = Spot(scene.look, 1 - x if scene.right else x, y, float(rng.uniform(*radii)))
            free = all(np.hypot(spot.x - s.x, spot.y - s.y) > spot.radius + s.radius + _APART for s in spots)
            if free and len(spots) < scene.count:
                spots.append(spot)
    return spots
