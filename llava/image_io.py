"""Opens the pictures that hospitals and data sets really have, always as 8-bit RGB: one decoder for all places.

Greyscale, 16-bit, float, palette, RGBA, CMYK and EXIF-rotated files come out as they look in a viewer. Formats are told
by content and are those of ``FORMATS`` alone: Pillow would start Ghostscript for an EPS that is called ``.png``. Notes
beside healthy pixels (EXIF, texts, colour profiles) never make a picture unreadable. A file that is truncated, too
large or no picture raises ``UserError`` with its name, never a half-grey image. DICOM needs the ``dicom`` extra.
"""

from __future__ import annotations

import base64
import io
import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from llava.deep_grey import deep_bytes, is_deep
from llava.dicom import is_dicom, read_dicom
from llava.utils import UserError

FORMATS = ("PNG", "JPEG", "MPO", "TIFF", "BMP", "DIB", "GIF", "WEBP", "JPEG2000", "PPM", "AVIF", "ICO")
"""What is opened, by Pillow's names; none of them runs another program."""
MAX_PIXELS = 100_000_000
"""Pixels that a picture may have unless a flag or ``LLAVA_MAX_PIXELS`` says otherwise."""
BUDGET_VARIABLE = "LLAVA_MAX_PIXELS"
CHAT_MODES = ("Pad", "Crop", "Resize", "Default")
_CHAT_BACKGROUND, _CHAT_SIDE = (122, 116, 104), 336
"""CLIP's mean colour and picture edge, which LLaVA's demo has written out."""
# What Pillow raises on broken files: its readers of PNG, TIFF and notes raise more kinds than OSError.
_BROKEN: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, TypeError)
_BROKEN += (LookupError, AttributeError, ArithmeticError, RuntimeError, Image.DecompressionBombError)
_STRIP_SIDE = 4096
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_MARK, _PNG_PIXELS = b"\x89PNG\r\n\x1a\n", (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def load_image(path: str | os.PathLike) -> Image.Image:
    """Open ``path`` as an upright RGB picture.

    Args:
        path: a local file in one of ``FORMATS``, or DICOM. Of several frames the first is taken.

    Raises:
        UserError: the file is missing, truncated, no picture, too large, or DICOM without ``pydicom``.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"image file not found: {file} (check the file name and the image folder)")
    with open(file, "rb") as stream:
        return decode_image(stream, file)


def decode_image(data: bytes | BinaryIO, name: str | os.PathLike, quiet: bool = False) -> Image.Image:
    """The bytes of a picture's file as an upright RGB picture.

    Args:
        data: the bytes, or a stream at their start.
        name: file or address, for messages and for files whose ending says DICOM.
        quiet: do not say of which file the first of several frames is seen.

    Raises:
        UserError: as ``load_image``.
    """
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    if is_dicom(stream, name):
        return read_dicom(stream, name, max_pixels(), quiet)
    try:
        try:
            return _upright(_opened(stream, name))
        except _BROKEN as error:
            if isinstance(error, UserError):
                raise
            stream.seek(0)
            bare = _without_notes(stream.read())
            if bare is None:
                raise
            return _upright(_opened(io.BytesIO(bare), name))
    except _BROKEN as error:
        if isinstance(error, PermissionError | UserError):
            raise
        raise UserError(f"image file cannot be read: {name} ({_one_line(error)}; replace the file)") from error


def open_image(data: bytes, name: str) -> Image.Image:
    """A picture as its file has it, neither turned upright nor made RGB.

    Raises:
        UserError: as ``load_image``.
    """
    try:
        return _opened(io.BytesIO(data), name)
    except _BROKEN as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} holds no readable picture ({_one_line(error)})") from error


def max_pixels() -> int:
    """Pixels that a picture may have.

    Raises:
        UserError: ``LLAVA_MAX_PIXELS`` is no whole number above 0.
    """
    text = os.environ.get(BUDGET_VARIABLE) or str(MAX_PIXELS)
    if not text.isdecimal() or not int(text):
        raise UserError(f"{BUDGET_VARIABLE} is {text!r}; write a whole number of pixels")
    return int(text)


def allow_pixels(most: int | None) -> None:
    """Set how many pixels a picture may have, for this process and those that it starts; None leaves it."""
    if most is not None:
        if most < 1:
            raise UserError(f"--max_pixels is {most}; write a whole number of pixels")
        os.environ[BUDGET_VARIABLE] = str(most)


def _opened(stream: BinaryIO, name: str | os.PathLike) -> Image.Image:
    """The loaded picture of a stream, if its format and size are allowed."""
    Image.init()
    most = max_pixels()
    Image.MAX_IMAGE_PIXELS = max(most, Image.MAX_IMAGE_PIXELS or most)  # Pillow's own limit never comes before this one
    too_large = f"image file {name} has more than {most:,} pixels (make it smaller, or allow more with --max_pixels)"
    try:
        image = Image.open(stream, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError as error:
        raise ValueError(f"no picture of a format that is opened: {', '.join(FORMATS[:9])}, DICOM") from error
    except Image.DecompressionBombError as error:
        raise UserError(too_large) from error
    if image.width * image.height > most:
        raise UserError(too_large)
    image.load()
    return image


def _upright(image: Image.Image) -> Image.Image:
    """RGB, turned as the file's EXIF says; a note that can't be read turns nothing."""
    try:
        method = _UPRIGHT.get(int(image.getexif().get(_ORIENTATION) or 0))
    except _BROKEN:
        method = None
    picture = to_rgb(image)
    return picture if method is None else picture.transpose(method)


def _without_notes(data: bytes) -> bytes | None:
    """A PNG file with the chunks of its pixels alone; None for other files and where a chunk is cut off."""
    if not data.startswith(_PNG_MARK):
        return None
    kept, place = [_PNG_MARK], len(_PNG_MARK)
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] in _PNG_PIXELS:
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as 8-bit RGB: deep greys are stretched to their own range, transparency lies on black."""
    if is_deep(image):
        return Image.fromarray(deep_bytes(image)).convert("RGB")
    has_alpha = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if not has_alpha:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    background = Image.new("RGBA", layered.size, (0, 0, 0, 255))
    return Image.alpha_composite(background, layered).convert("RGB")


def expand2square(pil_img: Image.Image, background_color: tuple[int, ...]) -> Image.Image:
    """Letter-box to a square, the picture in the middle of ``background_color``; a square one is returned as it is.

    A strip whose square would be larger than ``MAX_PIXELS`` is made smaller first: 30,000 x 2 pixels take gigabytes.
    """
    width, height = pil_img.size
    if width == height:
        return pil_img
    side = max(width, height)
    if side**2 > max(MAX_PIXELS, 2 * width * height):
        width, height = (max(round(edge * _STRIP_SIDE / side), 1) for edge in (width, height))
        pil_img, side = pil_img.resize((width, height)), _STRIP_SIDE
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
