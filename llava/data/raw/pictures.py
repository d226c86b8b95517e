"""Where the pictures of a raw data set are, and which of them are missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from llava.data.raw.example import Example
from llava.files import file_sha256
from llava.inside import Folder, inside
from llava.utils import UserError


def missing_images(examples: Sequence[Example], folder: Folder) -> list[str]:
    """Names of pictures that are not inside ``folder`` (or are empty files), in the order of the examples."""
    names = dict.fromkeys(example.image for example in examples)
    return [name for name in names if not _found(folder, name)]


def picture_folder(examples: Sequence[Example], folders: Sequence[Folder]) -> Folder:
    """The first folder that holds all pictures, else the one that holds most, else the first."""

    def held(folder: Folder) -> int:
        names = dict.fromkeys(example.image for example in examples)
        return sum(bool(_found(folder, name) or _found(folder, Path(name).name)) for name in names)

    counts = [held(folder) for folder in folders]
    return folders[counts.index(max(counts))]


def identify_pictures(examples: Sequence[Example], folder: Folder) -> list[Example]:
    """Examples with image names as they are in ``folder``, and ``picture`` set from the bytes of the file."""
    found: dict[str, tuple[str, str]] = {}
    for name in dict.fromkeys(example.image for example in examples):
        choices = ((choice, _found(folder, choice)) for choice in (name, Path(name).name))
        choice, place = next((pair for pair in choices if pair[1]), (name, None))
        found[name] = (choice, file_sha256(place) if place else "")
    return [
        dataclasses.replace(example, image=found[example.image][0], picture=found[example.image][1])
        for example in examples
    ]


def _found(folder: Folder, name: str) -> Path | None:
    """The picture's file; None where there is none, it is empty, or the name leads out of the folder."""
    try:
        path = inside(folder, name)
    except UserError:
        return None
    return path if path.is_file() and path.stat().st_size > 0 else None
