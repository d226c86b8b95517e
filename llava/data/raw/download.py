"""Fetching files over HTTP so that nothing half-done is ever taken for the real thing.

``pooch`` downloads to a temporary file, which takes its place only when its checksum agrees. A zip of pictures is
unpacked beside its target, checked as a whole, and only then moved.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from llava.files import atomic_write, file_sha256, temporary_folder
from llava.targets import remove
from llava.utils import UserError


class Unreachable(Exception):
    """The server cannot be reached, or says no; the message says why."""


def fetch(url: str, target: Path, sha256: str | None, timeout: float = 30.0, attempts: int = 4) -> bool:
    """Download ``url`` to ``target``.

    Args:
        url: http or https address.
        target: file to make; one that is there with the right checksum is kept.
        sha256: expected checksum; None when the server makes the file anew each time (a zip made on demand), which
            the caller then checks by its content.
        timeout: seconds without a byte after which a connection counts as broken.
        attempts: downloads to try, until one comes through whole and right.

    Returns:
        Whether something was downloaded.

    Raises:
        Unreachable: all attempts failed.
        UserError: the address is none, or the checksum does not agree. Nothing is left behind in either case.
    """
    import pooch
    from requests.exceptions import RequestException

    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url!r} is no http or https address")
    if target.is_file() and (sha256 is None or file_sha256(target) == sha256):
        return False
    source = pooch.create(
        target.parent,
        base_url="",
        registry={target.name: sha256},
        urls={target.name: url},
        retry_if_failed=attempts - 1,
    )
    try:
        source.fetch(target.name, downloader=pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=timeout))
    except RequestException as error:
        raise Unreachable(f"{url}: {_reason(error)}") from error
    except PermissionError as error:
        raise error.__cause__ or error from None  # the system's own, which says which folder
    except ValueError as error:
        raise UserError(f"{url}: {' '.join(str(error).split())} Run the command again.") from error
    return True


def unpack_pictures(archive: Path, folder: Path, wanted: re.Pattern[str], accept: Callable[[Path], bool]) -> int:
    """Unpack the pictures of a zip into ``folder``, flat, if ``accept`` likes them; other files of the folder stay.

    Args:
        archive: the zip; removed when it is broken or not accepted, so that the next run fetches it anew.
        folder: where the pictures go.
        wanted: full match of a file name (without folders) to unpack.
        accept: called with the temporary folder that holds the unpacked pictures.

    Returns:
        How many pictures were unpacked.

    Raises:
        UserError: no zip, a broken one, or not the expected pictures.
    """
    with temporary_folder(folder) as place:
        try:
            with zipfile.ZipFile(archive) as opened:
                for member in opened.infolist():
                    name = member.filename.replace("\\", "/").rsplit("/", 1)[-1]
                    if wanted.fullmatch(name):
                        with opened.open(member) as source, open(place / name, "wb") as copy:
                            shutil.copyfileobj(source, copy)
        except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
            remove(archive)
            raise UserError(
                f"{archive} is no whole zip file ({error}); it was removed, run the command again"
            ) from error
        if not accept(place):
            count = len(list(place.iterdir()))
            remove(archive)
            raise UserError(f"{archive}: its {count} pictures are not the expected ones; it was removed, run again")
        folder.mkdir(exist_ok=True)
        names = sorted(path.name for path in place.iterdir())
        for name in names:
            with atomic_write(folder / name, "wb") as stream:
                stream.write((place / name).read_bytes())
    return len(names)


def pictures_sha256(folder: Path, wanted: re.Pattern[str]) -> str:
    """One checksum for all pictures of a folder: of the lines ``<sha256>  <name>`` in the order of their names."""
    digest = hashlib.sha256()
    names = sorted(path.name for path in folder.iterdir() if wanted.fullmatch(path.name)) if folder.is_dir() else []
    for name in names:
        digest.update(f"{file_sha256(folder / name)}  {name}\n".encode())
    return digest.hexdigest()


def _reason(error: BaseException) -> str:
    """What the server or, at the bottom of the libraries' errors, the system said."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"the server answered {response.status_code} {response.reason}"
    while error.__context__ is not None:
        error = error.__context__
    return str(error) or type(error).__name__
