"""Grey values of more than eight bits as bytes: which of them are a picture's, and where black and white lie."""

from __future__ import annotations

import struct

import numpy as np
from PIL import Image

_PHOTOMETRIC, _SAMPLE_FORMAT, _NO_DATA = 262, 339, 42113
_WHITE_IS_ZERO, _UNSIGNED = 0, 1


def is_deep(image: Image.Image) -> bool:
    """Whether a Pillow picture has one band of 16 or 32 bits."""
    return image.mode.startswith(("I", "F"))


def deep_bytes(image: Image.Image) -> np.ndarray:
    """A deep grey picture ``[H, W]`` as bytes, its own range from black to white.

    A TIFF's own tags are heeded: 32-bit values without a sign, white that is zero, and the value that stands for no
    data, which is shown black like NaN and counts for no range.
    """
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if values.dtype == np.int32 and _first(tags.get(_SAMPLE_FORMAT, _UNSIGNED)) == _UNSIGNED and tags:
        values = values.view(np.uint32)
    numbers = values.astype(np.float64)
    filler = _number(tags.get(_NO_DATA))
    if filler is not None:
        numbers[numbers == filler] = np.nan
    if tags and _first(tags.get(_PHOTOMETRIC)) == _WHITE_IS_ZERO:
        numbers = -numbers
    return stretch_to_bytes(numbers)


def stretch_to_bytes(values: np.ndarray) -> np.ndarray:
    """Map ``[min, max]`` of an array linearly to ``[0, 255]``; a constant array becomes zeros.

    NaN becomes 0 and counts for no range, as infinities do, which become black and white.
    """
    numbers = values.astype(np.float64)
    finite = numbers[np.isfinite(numbers)]
    if not finite.size:
        return np.zeros(numbers.shape, dtype=np.uint8)
    return window(numbers, float(finite.min()), float(finite.max()))


def window(numbers: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map ``[low, high]`` linearly to ``[0, 255]``, what lies outside to its ends and NaN to 0."""
    if high <= low:
        return np.zeros(numbers.shape, dtype=np.uint8)
    with np.errstate(over="ignore", invalid="ignore"):
        shares = (np.clip(numbers, low, high) - low) * (255.0 / (high - low))
    return np.rint(np.nan_to_num(shares, nan=0.0, posinf=255.0, neginf=0.0)).astype(np.uint8)


def _first(value: object) -> object:
    return value[0] if isinstance(value, tuple) and value else value


def _number(text: object) -> float | None:
    """The value of TIFF's tag for no data, which is written as text."""
    try:
        return float(str(text).strip("\0 "))
    except (ValueError, struct.error):
        return None
