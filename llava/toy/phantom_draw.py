"""Drawing for phantoms: a supersampled grey canvas in unit coordinates, bodies of three domains, abnormalities.

Everything is drawn with integer arithmetic on 8-bit images (OpenCV's fixed-point paths) from a seeded generator, so the
same seed gives the same bytes. Coordinates are fractions of the side: x grows to the right, y downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

SUPERSAMPLE = 4
"""Pictures are drawn this many times larger and averaged down, which smooths the edges."""

LOOKS = ("bright", "dark", "ring", "target")
"""How an abnormality can look. What such a look is called depends on the domain."""


@dataclass(frozen=True)
class Spot:
    """One abnormality: its look, its centre and radius as fractions of the side."""

    look: str
    x: float
    y: float
    radius: float


class Canvas:
    """A square 8-bit grey picture drawn in unit coordinates.

    Args:
        size: side of the finished picture in pixels.
        background: grey value to start from.
    """

    def __init__(self, size: int, background: int = 0) -> None:
        self.size = size
        self.side = size * SUPERSAMPLE
        self.grey: np.ndarray = np.full((self.side, self.side), background, np.uint8)

    def _length(self, value: float) -> int:
        return max(1, round(value * self.side))

    def _point(self, x: float, y: float) -> tuple[int, int]:
        return round(x * self.side), round(y * self.side)

    def ellipse(self, x: float, y: float, rx: float, ry: float, grey: int, angle: float = 0, width: float = 0) -> None:
        """Fill an ellipse, or draw its outline when ``width`` is not zero."""
        thickness = self._length(width) if width else -1
        axes = (self._length(rx), self._length(ry))
        cv2.ellipse(self.grey, self._point(x, y), axes, angle, 0, 360, int(grey), thickness)

    def arc(self, x: float, y: float, rx: float, ry: float, span: tuple[float, float], grey: int, width: float) -> None:
        """Draw the outline of an ellipse between two angles in degrees (0 is right, 90 is down)."""
        axes = (self._length(rx), self._length(ry))
        cv2.ellipse(self.grey, self._point(x, y), axes, 0, *span, int(grey), self._length(width))

    def line(self, start: tuple[float, float], end: tuple[float, float], grey: int, width: float) -> None:
        """Draw a straight line."""
        cv2.line(self.grey, self._point(*start), self._point(*end), int(grey), self._length(width))

    def polygon(self, points: Sequence[tuple[float, float]], grey: int) -> None:
        """Fill a polygon."""
        corners = np.array([self._point(x, y) for x, y in points], np.int32)
        cv2.fillPoly(self.grey, [corners], int(grey))

    def blur(self, radius: int) -> None:
        """Blur by a Gaussian of ``2 * radius + 1`` pixels of the large picture."""
        self.grey = cv2.GaussianBlur(self.grey, (2 * radius + 1, 2 * radius + 1), 0)

    def move(self, shift: tuple[float, float], scale: float, degrees: float, border: int) -> np.ndarray:
        """Shift, scale and turn the picture about its centre; ``border`` fills what comes into view.

        Returns:
            the affine map ``[2, 3]`` from old to new positions, in fractions of the side.
        """
        middle = self.side / 2
        matrix = cv2.getRotationMatrix2D((middle, middle), degrees, scale)
        matrix[:, 2] += np.array(shift) * self.side
        self.grey = cv2.warpAffine(self.grey, matrix, (self.side, self.side), borderValue=int(border))
        return matrix * np.array([1, 1, 1 / self.side])

    def finish(self, noise: np.ndarray, gain: float = 1.0, offset: int = 0) -> np.ndarray:
        """The picture at its final size: averaged down, contrast changed, noise added.

        Args:
            noise: int array ``[size, size]`` added to the grey values.

        Returns:
            uint8 array ``[size, size]``.
        """
        small = cv2.resize(self.grey, (self.size, self.size), interpolation=cv2.INTER_AREA)
        values = np.rint((small.astype(np.float64) - 128) * gain).astype(np.int64) + 128 + offset + noise
        return np.clip(values, 0, 255).astype(np.uint8)


def draw_spot(canvas: Canvas, spot: Spot, rng: np.random.Generator) -> None:
    """Draw one abnormality: a bright or dark disc, a bright ring about a dark hole, a dark ring about a bright core."""
    turn, ratio = float(rng.uniform(0, 180)), float(rng.uniform(0.88, 1.0))
    bright, dark = int(rng.integers(228, 256)), int(rng.integers(0, 14))
    outer, inner = (bright, dark) if spot.look in ("bright", "ring") else (dark, bright)
    canvas.ellipse(spot.x, spot.y, spot.radius, spot.radius * ratio, outer, turn)
    if spot.look in ("ring", "target"):
        core = spot.radius * 0.58
        canvas.ellipse(spot.x, spot.y, core, core * ratio, inner, turn)


def speckle(rng: np.random.Generator, size: int, strength: int) -> np.ndarray:
    """Integer noise ``[size, size]`` between ``-strength`` and ``strength``, peaked at zero."""
    return rng.integers(-strength, strength + 1, (2, size, size)).sum(axis=0) // 2
