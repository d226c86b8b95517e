"""Paths that come out of data: each stays inside the folder that it is meant for, in reading and in writing.

A name may hold folders (``ct/12.png``), but it may not be an absolute path of elsewhere, climb (``..``), hold what no
file system takes (a NUL, a part of more than 255 bytes), or lead out of its folder through a link. A folder whose own
links may be followed is given as ``LinkedFolder``, which is what ``--follow_links`` makes of it.
"""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from typing import TypeAlias

from llava.utils import UserError

LONGEST = 255
"""Bytes of a part of a path, on every usual file system."""
LONGEST_PATH = 4096 - 256
"""Bytes of a whole path, with room for what is put behind it."""
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


class LinkedFolder(os.PathLike[str]):
    """A folder in which links may lead anywhere: the user says that whoever wrote it is trusted."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)

    def __fspath__(self) -> str:
        return self.path

    __str__ = __fspath__


Folder: TypeAlias = str | os.PathLike[str]


def opened_to_links(folder: str | None, follow_links: bool) -> Folder | None:
    """The folder that a command line names, with ``--follow_links`` or without."""
    return LinkedFolder(folder) if folder and follow_links else folder


def inside(folder: Folder, name: str, where: str = "") -> Path:
    """The path of ``name`` in ``folder``, for reading or for writing; it need not be there.

    A name from another system is found too: with backslashes, or with its accents put together in another way.

    Args:
        where: who says the name, for messages, such as ``row 7``.

    Raises:
        UserError: the name cannot stay inside, or a link leads out of the folder.
    """
    where = f"{where}: " if where else ""
    home = str(Path(folder).absolute()).rstrip("/") + "/"
    name = name.removeprefix(home) if name.startswith(home) else name
    parts = _parts(name, where)
    place = _spelled_as_there(Path(folder), name, parts)
    if len(os.fsencode(str(place.absolute()))) > LONGEST_PATH:
        raise UserError(f"{where}file name {_short(name)} makes too long a path; shorten it")
    if not isinstance(folder, LinkedFolder):
        _refuse_links_out(Path(folder), place, name, where)
    return place


def check_file_name(name: str, where: str) -> None:
    """Refuse a text that cannot be the name of one file or folder; ``where`` says whose it is.

    Raises:
        UserError: naming what is wrong.
    """
    if not name.strip() or name in (".", "..") or "/" in name or "\\" in name:
        raise UserError(f"{where} is {_short(name)}, which cannot name a folder; write it without '/' and '\\'")
    _check_part(name, name, f"{where}: ")


def _parts(name: str, where: str) -> list[str]:
    if name.startswith("/") or name.startswith("\\\\") or _DRIVE.match(name):
        raise UserError(f"{where}file name {_short(name)} is absolute; name it relative to its folder")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts:
        raise UserError(f"{where}file name {_short(name)} names no file")
    for part in parts:
        if ".." in part.split("\\"):
            raise UserError(f"{where}file name {_short(name)} leads out of its folder; files are named inside it")
        _check_part(part, name, where)
    return parts


def _check_part(part: str, name: str, where: str) -> None:
    try:
        size = len(os.fsencode(part))
    except UnicodeEncodeError as error:
        raise UserError(f"{where}file name {_short(name)} holds half a surrogate pair, which is no text") from error
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in part):
        raise UserError(f"{where}file name {_short(name)} holds a control character; rename the file")
    if size > LONGEST:
        raise UserError(f"{where}file name {_short(name)} has a part of {size} bytes; file systems take {LONGEST}")


def _spelled_as_there(folder: Path, name: str, parts: list[str]) -> Path:
    """The path as its file is spelled in the folder, where only the spelling of another system differs."""
    place = folder.joinpath(*parts)
    if name.isascii() and "\\" not in name:
        return place
    slashed = "/".join(parts).replace("\\", "/")
    for form in (name, slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD"))):
        found = folder.joinpath(*(part for part in form.split("/") if part not in ("", ".")))
        if os.path.lexists(found):
            return found
    return place


def _refuse_links_out(folder: Path, place: Path, name: str, where: str) -> None:
    home = os.path.realpath(folder)
    if os.path.commonpath([home, os.path.realpath(place)]) != home:
        raise UserError(
            f"{where}file {_short(name)} of {folder} is a link that leads out of the folder; copy the file there, or "
            "follow links with --follow_links if you trust the folder"
        )


def _short(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:57]}…")
