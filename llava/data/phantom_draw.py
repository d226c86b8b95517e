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

LOOKS = ("bright", "dark", "spiky", "ring")
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
        self.grey = np.full((self.side, self.side), background, np.uint8)

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

    def move(self, shift: tuple[float, float], scale: float, degrees: float, border: int) -> None:
        """Shift, scale and turn the picture about its centre; ``border`` fills what comes into view."""
        middle = self.side / 2
        matrix = cv2.getRotationMatrix2D((middle, middle), degrees, scale)
        matrix[:, 2] += np.array(shift) * self.side
        self.grey = cv2.warpAffine(self.grey, matrix, (self.side, self.side), borderValue=int(border))

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
    """Draw one abnormality with a slightly random outline."""
    x, y, radius = spot.x, spot.y, spot.radius
    turn = float(rng.uniform(0, 180))
    ratio = float(rng.uniform(0.88, 1.0))
    if spot.look == "bright":
        canvas.ellipse(x, y, radius, radius * ratio, rng.integers(228, 256), turn)
    elif spot.look == "dark":
        canvas.ellipse(x, y, radius, radius * ratio, rng.integers(0, 14), turn)
    elif spot.look == "ring":
        canvas.ellipse(x, y, radius, radius * ratio, rng.integers(228, 256), turn)
        canvas.ellipse(x, y, radius * 0.6, radius * 0.6 * ratio, rng.integers(0, 14), turn)
    else:
        canvas.polygon(_star(x, y, radius, rng), int(rng.integers(200, 256)))


def _star(x: float, y: float, radius: float, rng: np.random.Generator) -> list[tuple[float, float]]:
    """The corners of a star with four to six rays."""
    rays = int(rng.integers(4, 7))
    angles = np.arange(2 * rays) * np.pi / rays + rng.uniform(0, np.pi)
    reach = np.where(np.arange(2 * rays) % 2 == 0, radius * 1.5, radius * 0.45)
    return [(x + float(r * np.cos(a)), y + float(r * np.sin(a))) for r, a in zip(reach, angles, strict=True)]


def speckle(rng: np.random.Generator, size: int, strength: int) -> np.ndarray:
    """Integer noise ``[size, size]`` between ``-strength`` and ``strength``, peaked at zero."""
    return rng.integers(-strength, strength + 1, (2, size, size)).sum(axis=0) // 2
