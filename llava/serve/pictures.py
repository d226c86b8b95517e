"""Pictures that users hand over as bytes, and pictures as text for a page: nothing is written to a file or fetched."""

from __future__ import annotations

import base64
import binascii
import re

from PIL import Image

from llava.image_io import decode_image, expand2square, to_base64
from llava.serve.question import Limits, Refused
from llava.utils import UserError

DICOM_TYPE = "application/dicom"
KINDS = re.compile(rf"image/[\w.+-]+|{DICOM_TYPE}|application/octet-stream")
"""Content types of a data URL; what the bytes are is told by themselves."""
_THUMBNAIL, _BACKGROUND = 336, (24, 24, 27)


def opened(data: bytes, name: str, limits: Limits) -> Image.Image:
    """The bytes of a picture's file, upright and RGB, as ``llava.image_io.load_image`` opens the file.

    Args:
        name: of the file, for messages; its ending counts for DICOM.

    Raises:
        Refused: it is empty, too large, broken or no picture.
    """
    if not data:
        raise Refused(f"{name} is empty")
    if len(data) > limits.picture_bytes:
        raise Refused(f"{name} is larger than {limits.picture_bytes >> 20} MB")
    try:
        return decode_image(data, name, quiet=True)  # a log is not told how a user's file is called
    except UserError as error:
        raise Refused(error) from error


def of_data_url(url: str, name: str, limits: Limits) -> Image.Image:
    """The picture of a ``data:image/png;base64,...`` URL.

    Raises:
        Refused: another kind of URL, no base64, or as ``opened``.
    """
    scheme, _, rest = url.partition(":")
    if scheme.strip().lower() != "data":
        shown = url[:40] + ("…" if len(url) > 40 else "")
        raise Refused(f"{name} is {shown!r}, but this server fetches nothing; send the file as data:image/png;base64,…")
    head, comma, text = rest.partition(",")
    kind, *options = (part.strip().lower() for part in head.split(";"))
    if not comma or "base64" not in options:
        raise Refused(f"{name} is no data URL in base64; write data:image/png;base64,…")
    if not KINDS.fullmatch(kind):
        raise Refused(
            f"{name} is of type {kind[:40] or 'text/plain'!r}, which is no picture; send image/… or {DICOM_TYPE}"
        )
    if len(text) * 3 // 4 > limits.picture_bytes + 3:
        raise Refused(f"{name} is larger than {limits.picture_bytes >> 20} MB")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(f"{name} is broken base64 ({error})") from error
    return opened(data, f"{name}.dcm" if kind == DICOM_TYPE else name, limits)


def thumbnail(picture: Image.Image) -> str:
    """A small square of the picture as a data URL, for a page."""
    small = picture.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return f"data:image/png;base64,{to_base64(expand2square(small, _BACKGROUND))}"
