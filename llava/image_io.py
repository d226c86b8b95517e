"""Opens the pictures that hospitals and data sets really have, always as 8-bit RGB.

Greyscale, 16-bit, float, palette, RGBA, CMYK and EXIF-rotated files come out as they look in a viewer. A file that is
truncated or no picture raises ``UserError`` with its name, never a half-grey image. DICOM needs the ``dicom`` extra.
"""

from __future__ import annotations

import base64
import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from llava.utils import UserError

DICOM_ENDINGS = (".dcm", ".dicom")
CHAT_MODES = ("Pad", "Crop", "Resize", "Default")
_CHAT_BACKGROUND, _CHAT_SIDE = (122, 116, 104), 336
"""CLIP's mean colour and picture edge, which LLaVA's demo has written out."""
# What Pillow raises on broken files: SyntaxError and struct.error come from its PNG and TIFF readers.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def load_image(path: str | os.PathLike) -> Image.Image:
    """Open ``path`` as an upright RGB picture.

    Args:
        path: a local file in any format Pillow reads, or DICOM. Of several frames the first is taken.

    Raises:
        UserError: the file is missing, truncated, no picture, or DICOM without ``pydicom``.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"image file not found: {file} (check the file name and the image folder)")
    if is_dicom(file):
        return load_dicom(file)
    try:
        with Image.open(file) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except _BROKEN as error:
        if isinstance(error, PermissionError):
            raise
        raise UserError(f"image file cannot be read: {file} ({_one_line(error)}; replace the file)") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as 8-bit RGB: deep greys are stretched to their own range, transparency lies on black."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(stretch_to_bytes(np.asarray(image))).convert("RGB")
    has_alpha = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if not has_alpha:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    background = Image.new("RGBA", layered.size, (0, 0, 0, 255))
    return Image.alpha_composite(background, layered).convert("RGB")


def expand2square(pil_img: Image.Image, background_color: tuple[int, ...]) -> Image.Image:
    """Letter-box to a square, the picture in the middle of ``background_color``; a square one is returned as it is."""
    width, height = pil_img.size
    if width == height:
        return pil_img
    side = max(width, height)
    canvas = Image.new(pil_img.mode, (side, side), background_color)
    canvas.paste(pil_img, ((side - width) // 2, (side - height) // 2))
    return canvas


def shown_in_chat(image: Image.Image, mode: str, max_len: int = 1344, min_len: int = 672) -> Image.Image:
    """A picture of a conversation as LLaVA's web demo shows and sends it, RGB.

    Args:
        mode: ``Pad`` (letter-boxed to a square), ``Resize`` (squashed to 336 x 336), ``Crop`` or ``Default`` (as it is;
            the image processor crops later).
        max_len: pictures with a longer edge are made smaller: the short edge to ``min_len`` at most, the long one to
            ``max_len`` at most.

    Raises:
        UserError: an unknown mode.
    """
    if mode not in CHAT_MODES:
        raise UserError(f"unknown image_process_mode {mode!r} (choose from {', '.join(CHAT_MODES)})")
    picture = to_rgb(image)
    if mode == "Pad":
        picture = expand2square(picture, _CHAT_BACKGROUND)
    elif mode == "Resize":
        picture = picture.resize((_CHAT_SIDE, _CHAT_SIDE))
    if max(picture.size) <= max_len:
        return picture
    longer, shorter = max(picture.size), min(picture.size)
    ratio = longer / shorter
    short_edge = int(min(max_len / ratio, min_len, shorter))
    edges = short_edge, int(short_edge * ratio)
    return picture.resize(edges if picture.height > picture.width else edges[::-1])


def to_base64(image: Image.Image, image_format: str = "PNG") -> str:
    """The picture as the base64 text of a file of ``image_format``."""
    stream = io.BytesIO()
    image.save(stream, format=image_format)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def stretch_to_bytes(values: np.ndarray) -> np.ndarray:
    """Map ``[min, max]`` of an array linearly to ``[0, 255]``; a constant array becomes zeros."""
    numbers = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(numbers.min()), float(numbers.max())
    return _window(numbers, low, high)


def _window(numbers: np.ndarray, low: float, high: float) -> np.ndarray:
    if high <= low:
        return np.zeros(numbers.shape, dtype=np.uint8)
    return np.rint((np.clip(numbers, low, high) - low) * (255.0 / (high - low))).astype(np.uint8)


def is_dicom(path: Path) -> bool:
    """True for a DICOM file, told by its ending or by the mark ``DICM`` at byte 128."""
    if path.suffix.lower() in DICOM_ENDINGS:
        return True
    with open(path, "rb") as stream:
        head = stream.read(132)
    return head[128:] == b"DICM"


def load_dicom(path: str | os.PathLike) -> Image.Image:
    """The first frame of a DICOM file, with its own window where it names one, as RGB.

    Raises:
        UserError: ``pydicom`` is missing, or the file holds no readable picture.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array
    except ImportError as error:
        raise UserError(f"cannot read {path}: DICOM needs pydicom 3 (install: pip install '.[dicom]')") from error
    try:
        data = pydicom.dcmread(path)
        pixels = pixel_array(data, index=0)  # [height, width] or [height, width, 3], colour already as RGB
        if pixels.ndim == 3:
            return Image.fromarray(pixels if pixels.dtype == np.uint8 else stretch_to_bytes(pixels)).convert("RGB")
        values = np.asarray(apply_modality_lut(pixels, data), dtype=np.float64)
        if "VOILUTSequence" in data:
            grey = stretch_to_bytes(apply_voi_lut(pixels, data))
        else:
            grey = _window(values, *_window_range(data, values, pixels))
    except Exception as error:  # pydicom's decoders raise many kinds; each one means this file cannot be shown
        raise UserError(f"DICOM file cannot be read: {path} ({_one_line(error)})") from error
    if data.get("PhotometricInterpretation") == "MONOCHROME1":
        grey = 255 - grey
    return Image.fromarray(grey).convert("RGB")


def _window_range(data: Any, values: np.ndarray, pixels: np.ndarray) -> tuple[float, float]:
    """Lowest and highest value to show: the file's first window (DICOM's LINEAR function), else its data's range."""
    if "WindowCenter" in data and "WindowWidth" in data:
        center, width = (float(np.atleast_1d(data[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
        half = max(width - 1.0, 1e-6) / 2.0
        return center - 0.5 - half, center - 0.5 + half
    if "PixelPaddingValue" in data and (kept := values[pixels != data.PixelPaddingValue]).size:
        values = kept
    return float(values.min()), float(values.max())


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
