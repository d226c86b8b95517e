"""What was computed of questions and pictures, kept on disk so that stage 1, stage 2 and reports compute it once.

An entry's name is a checksum over everything that decides its numbers: contents, never paths or dates. Lists are kept
whole, in their order, because a batch's make-up shows in the last bit of a picture's features.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import torch

from llava.files import atomic_write
from llava.utils import is_main_process, rank0_print

FORMAT = 2
"""Raised when the same content would give other numbers."""

_DIGEST = 32
"""A file begins with the SHA-256 of its name and the rest: torch does not notice every damage, nor an exchange."""


class QueryCache:
    """Entries of one folder; without a folder nothing is kept and nothing found."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = Path(folder) if folder else None

    def __bool__(self) -> bool:
        return self.folder is not None

    def read(self, kind: str, content: dict[str, Any]) -> Any:
        """The values of this content; None where there are none. A damaged file counts as none, and is said."""
        path = self._path(kind, content)
        if path is None or not os.path.isfile(path):
            return None
        try:
            data = path.read_bytes()
        except OSError as error:
            rank0_print(f"note: {path} cannot be read ({error.strerror}); its contents are computed again")
            return None
        if _digest(path, data[_DIGEST:]) != data[:_DIGEST]:
            rank0_print(f"note: {path} is damaged; its contents are computed again")
            return None
        return torch.load(io.BytesIO(data[_DIGEST:]), map_location="cpu", weights_only=True)["values"]

    def write(self, kind: str, content: dict[str, Any], values: Any) -> None:
        """Keep a tensor or a list; one process of a distributed run writes. A disk that refuses is said, no more."""
        path = self._path(kind, content)
        if path is None or not is_main_process():
            return
        packed = io.BytesIO()
        torch.save({"values": values}, packed)
        try:
            with atomic_write(path, "wb") as stream:
                stream.write(_digest(path, packed.getvalue()))
                stream.write(packed.getbuffer())
        except OSError as error:
            rank0_print(f"note: {path} cannot be written ({error.strerror}); it is not kept")

    def _path(self, kind: str, content: dict[str, Any]) -> Path | None:
        if self.folder is None:
            return None
        text = json.dumps({"format": FORMAT, "kind": kind, **content}, sort_keys=True)
        return self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.pt"


def _digest(path: Path, data: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + data).digest()
