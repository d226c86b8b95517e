"""Where the pictures of a raw data set are, and which of them are missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from llava.data.raw.example import Example
from llava.files import file_sha256


def missing_images(examples: Sequence[Example], folder: Path) -> list[str]:
    """Names of pictures that are not in ``folder`` (or are empty files), in the order of the examples."""
    names = dict.fromkeys(example.image for example in examples)
    return [name for name in names if not _is_picture(folder / name)]


def picture_folder(examples: Sequence[Example], folders: Sequence[Path]) -> Path:
    """The first folder that holds all pictures, else the one that holds most, else the first."""

    def held(folder: Path) -> int:
        names = dict.fromkeys(example.image for example in examples)
        return sum(_is_picture(folder / name) or _is_picture(folder / Path(name).name) for name in names)

    counts = [held(folder) for folder in folders]
    return folders[counts.index(max(counts))]


def identify_pictures(examples: Sequence[Example], folder: Path) -> list[Example]:
    """Examples with image names as they are in ``folder``, and ``picture`` set from the bytes of the file."""
    found: dict[str, tuple[str, str]] = {}
    for name in dict.fromkeys(example.image for example in examples):
        inside = next((choice for choice in (name, Path(name).name) if _is_picture(folder / choice)), None)
        found[name] = (inside, file_sha256(folder / inside)) if inside else (name, "")
    return [
        dataclasses.replace(example, image=found[example.image][0], picture=found[example.image][1])
        for example in examples
    ]


def _is_picture(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0
