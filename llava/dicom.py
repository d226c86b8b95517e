"""DICOM pictures in the standard's order: stored values, modality, values of interest, then palette or photometry.

Of several frames the first is seen, which is said once. Values that are there but empty, infinite or of no meaning (a
window without a width, a slope of 0) are passed over, as viewers do. Needs the ``dicom`` extra, which brings the
decoders of compressed files.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from llava.deep_grey import stretch_to_bytes, window
from llava.utils import UserError, rank0_print

ENDINGS = (".dcm", ".dicom")
_NUMBERS = ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth")
_TABLES = ("ModalityLUTSequence", "VOILUTSequence")
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_TRANSFORMS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_SAID: list[str] = []
_LINEAR, _LINEAR_EXACT, _SIGMOID = "LINEAR", "LINEAR_EXACT", "SIGMOID"


def is_dicom(stream: BinaryIO, name: str | os.PathLike) -> bool:
    """True for a DICOM file, told by its ending, by the mark ``DICM`` at byte 128, or by the data elements it begins
    with where it lacks both. The stream is left at its start."""
    head = stream.read(132)
    stream.seek(0)
    if Path(name).suffix.lower() in ENDINGS or head[128:] == b"DICM":
        return True
    return head[:2] in (b"\x02\0", b"\x08\0") and head[2:4] in (b"\0\0", b"\x01\0", b"\x05\0", b"\x08\0", b"\x16\0")


def read_dicom(stream: BinaryIO, name: str | os.PathLike, most_pixels: int, quiet: bool = False) -> Image.Image:
    """The first frame of a DICOM file as RGB, shown as the file says.

    Args:
        name: of the file, for messages.
        most_pixels: of a frame; a larger one is not decoded.
        quiet: do not say that it has several.

    Raises:
        UserError: ``pydicom`` or a decoder is missing, the frame is too large, or the file holds no readable picture.
    """
    try:
        import pydicom
        from pydicom.pixels import pixel_array
    except ImportError as error:
        raise UserError(f"cannot read {name}: DICOM needs pydicom 3 (install: pip install '.[dicom]')") from error
    try:
        data = pydicom.dcmread(stream, force=True)
        _complete(data)
        rows, columns = int(data.Rows), int(data.Columns)
        if rows * columns <= most_pixels:
            stored = pixel_array(data, index=0)  # [height, width], or [height, width, 3] with colour already as RGB
            picture = Image.fromarray(_shown(stored, data)).convert("RGB")
            frames = int(data.get("NumberOfFrames") or 1)
    except Exception as error:  # pydicom and its decoders raise many kinds; each means this file can't be shown
        said = " ".join(str(error).split())[:300] or type(error).__name__
        mend = "; pip install '.[dicom]'" if "missing dependencies" in said or "require" in said else ""
        raise UserError(f"DICOM file cannot be read: {name} ({said}{mend})") from error
    if rows * columns > most_pixels:
        raise UserError(f"DICOM file {name} has {columns} x {rows} pixels, more than {most_pixels:,} (--max_pixels)")
    if frames > 1 and not quiet:
        _say_frames(Path(name).name, frames)
    return picture


def _complete(data: Any) -> None:
    """Fill in what a file without its first part lacks: how its values are written.

    Raises:
        ValueError: it holds no picture.
    """
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    missing = [name for name in ("Rows", "Columns") if name not in data]
    if not any(name in data for name in _PIXELS):
        missing.append(_PIXELS[0])
    if missing:
        raise ValueError(f"it holds no picture: no {', '.join(missing)}")
    if "TransferSyntaxUID" not in data.file_meta:
        implicit, little = data.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def _shown(stored: np.ndarray, data: Any) -> np.ndarray:
    """Bytes ``[height, width]`` or ``[height, width, 3]`` of a frame's stored values."""
    from pydicom.pixels import apply_color_lut

    photometric = data.get("PhotometricInterpretation")
    if photometric == "PALETTE COLOR":
        return _of_palette(apply_color_lut(stored, data))
    if stored.ndim == 3:
        return stored if stored.dtype == np.uint8 else stretch_to_bytes(stored)
    steps = _transforms(data)
    grey = _of_interest(_of_modality(stored, steps), stored, steps, data)
    return 255 - grey if photometric == "MONOCHROME1" else grey


def _transforms(data: Any) -> dict[str, Any]:
    """What decides how the first frame is shown: the file's own elements, then those that its functional groups say."""
    sources = [data]
    for name in _GROUPS:
        for transform in _TRANSFORMS:
            sources += [inner for group in _items(data, name)[:1] for inner in _items(group, transform)[:1]]
    little = data.original_encoding[1] is not False
    found: dict[str, Any] = {}
    for source in sources:
        for name in _NUMBERS:
            if numbers := _numbers(source, name):
                found[name] = numbers
        for name in _TABLES:
            if tables := [item for item in _items(source, name) if "LUTDescriptor" in item and "LUTData" in item]:
                found[name] = _table(tables[0], little)
        if source.get("VOILUTFunction"):
            found["VOILUTFunction"] = str(source.VOILUTFunction).strip().upper()
    return found


def _of_modality(stored: np.ndarray, steps: dict[str, Any]) -> np.ndarray:
    """Stored values in the modality's unit, such as HU: by the file's table, else by slope and intercept."""
    if "ModalityLUTSequence" in steps:
        return _looked_up(stored, *steps["ModalityLUTSequence"])[0]
    slope, intercept = (steps.get(name, [math.nan])[0] for name in ("RescaleSlope", "RescaleIntercept"))
    slope = slope if math.isfinite(slope) and slope else 1.0
    return stored.astype(np.float64) * slope + (intercept if math.isfinite(intercept) else 0.0)


def _of_interest(values: np.ndarray, stored: np.ndarray, steps: dict[str, Any], data: Any) -> np.ndarray:
    """Bytes of values in the modality's unit: by the file's table, else by its first window, else by their range."""
    if "VOILUTSequence" in steps:
        shown, table = _looked_up(values, *steps["VOILUTSequence"])
        return window(shown, float(table.min()), float(table.max()))
    function = steps.get("VOILUTFunction", _LINEAR)
    least = 1.0 if function == _LINEAR else 0.0
    for center, width in zip(steps.get("WindowCenter", ()), steps.get("WindowWidth", ())):
        if math.isfinite(center) and math.isfinite(width) and width > 0 and width >= least:
            return _windowed(values, center, width, function)
    kept = values[_is_picture(stored, data)]
    finite = kept[np.isfinite(kept)]
    return window(values, float(finite.min()), float(finite.max())) if finite.size else stretch_to_bytes(values)


def _table(item: Any, little: bool) -> tuple[int, np.ndarray]:
    """The first value that a look-up table is for, and its entries."""
    count, first, _ = (int(value) for value in item.LUTDescriptor)
    data, count = item.LUTData, count or 65536
    if isinstance(data, bytes):
        wide = len(data) >= 2 * count
        entries = np.frombuffer(data, ("<u2" if little else ">u2") if wide else "u1")
    else:
        entries = np.atleast_1d(np.asarray(data))
    return first, entries[:count].astype(np.float64)


def _looked_up(values: np.ndarray, first: int, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values through a table, those before and behind it as its ends; and the table."""
    if first > 32767 and values.min() < 0:  # it was written without its sign
        first -= 65536
    places = np.clip(np.nan_to_num(values.astype(np.float64)) - first, 0, len(entries) - 1).astype(np.int64)
    return entries[places], entries


def _windowed(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """The standard's three window functions (PS3.3, C.11.2.1.2 and C.11.2.1.3); an unknown one is linear."""
    if function == _SIGMOID:
        with np.errstate(over="ignore"):
            return np.rint(255.0 / (1.0 + np.exp(-4.0 * (values - center) / width))).astype(np.uint8)
    if function == _LINEAR_EXACT:
        return window(values, center - width / 2.0, center + width / 2.0)
    half = max(width - 1.0, 1e-6) / 2.0
    return window(values, center - 0.5 - half, center - 0.5 + half)


def _is_picture(stored: np.ndarray, data: Any) -> np.ndarray:
    """Where the stored values are no padding; everywhere, if all of them would be."""
    padding = _number(data, "PixelPaddingValue")
    if padding is None:
        return np.ones(stored.shape, dtype=bool)
    limit = _number(data, "PixelPaddingRangeLimit")
    low, high = sorted(_signed(value, data) for value in (padding, padding if limit is None else limit))
    picture = (stored < low) | (stored > high)
    return picture if picture.any() else np.ones(stored.shape, dtype=bool)


def _signed(value: float, data: Any) -> float:
    """A stored value that was written without the sign that the pixels have."""
    return value - 65536 if value > 32767 and data.get("PixelRepresentation") == 1 else value


def _of_palette(colours: np.ndarray) -> np.ndarray:
    """A palette's colours ``[height, width, 3 or 4]`` as bytes; 16-bit ones lose their lower half."""
    colours = colours[..., :3]
    if colours.dtype == np.uint8 or colours.max() <= 255:
        return colours.astype(np.uint8)
    return np.rint(colours.astype(np.float64) * (255.0 / 65535.0)).astype(np.uint8)


def _items(data: Any, name: str) -> list[Any]:
    return list(data[name].value or []) if name in data and data[name].VR == "SQ" else []


def _numbers(data: Any, name: str) -> list[float]:
    """The values of an element; what is no number is NaN."""
    value = data.get(name)
    values = [] if value is None else [value] if isinstance(value, str | float | int) else list(value)
    found = []
    for entry in values:
        try:
            found.append(float(entry))
        except (TypeError, ValueError):
            found.append(math.nan)
    return found


def _number(data: Any, name: str) -> float | None:
    values = [value for value in _numbers(data, name)[:1] if math.isfinite(value)]
    return values[0] if values else None


def _say_frames(name: str, frames: int) -> None:
    if not _SAID:
        _SAID.append(name)
        rank0_print(f"note: {name} has {frames} frames; the first is seen, as in all files of several")
