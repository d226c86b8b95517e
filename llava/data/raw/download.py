"""Fetching files over HTTP so that nothing half-done is ever taken for the real thing.

A download goes to ``<name>.part``, which a later run resumes, and takes its place only when its checksum agrees. A zip
of pictures is unpacked beside its target, checked as a whole, and only then moved.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import ssl
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from llava.files import file_sha256
from llava.utils import UserError

CHUNK = 1 << 16
HTTP_RANGE_NOT_SATISFIABLE = 416
NETWORK_ERRORS = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)
PASSING_STATUS = (408, 429, 500, 502, 503, 504)


class Unreachable(Exception):
    """The server cannot be reached, or says no; the message says why."""


def fetch(url: str, target: Path, sha256: str | None, timeout: float = 30.0, attempts: int = 4) -> bool:
    """Download ``url`` to ``target``, resuming ``<target>.part`` of an earlier run.

    Args:
        url: http or https address.
        target: file to make; one that is there with the right checksum is kept.
        sha256: expected checksum; None when the server makes the file anew each time (a zip made on demand), which
            the caller then checks by its content.
        timeout: seconds without a byte after which a connection counts as broken.
        attempts: connections to try; each goes on where the last one stopped.

    Returns:
        Whether something was downloaded.

    Raises:
        Unreachable: all attempts failed; the part stays for the next run.
        UserError: the address is none, or the checksum does not agree (the part is removed then).
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url!r} is no http or https address")
    if target.is_file() and (sha256 is None or file_sha256(target) == sha256):
        return False
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(attempts):
        try:
            _transfer(url, part, timeout)
            break
        except (OSError, http.client.HTTPException) as error:
            _reraise_local(error)
            passing = not isinstance(error, urllib.error.HTTPError) or error.code in PASSING_STATUS
            if attempt + 1 == attempts or not passing:
                raise Unreachable(f"{url}: {_reason(error)}") from error
            time.sleep(0.2 * 2**attempt)
    found = file_sha256(part)
    if sha256 is not None and found != sha256:
        part.unlink()
        raise UserError(f"{url}: checksum is {found}, expected {sha256} (the part was removed; run the command again)")
    os.replace(part, target)
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        place = Path(temporary)
        try:
            with zipfile.ZipFile(archive) as opened:
                for member in opened.infolist():
                    name = member.filename.replace("\\", "/").rsplit("/", 1)[-1]
                    if wanted.fullmatch(name):
                        with opened.open(member) as source, open(place / name, "wb") as copy:
                            shutil.copyfileobj(source, copy)
        except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
            archive.unlink()
            raise UserError(
                f"{archive} is no whole zip file ({error}); it was removed, run the command again"
            ) from error
        if not accept(place):
            count = len(list(place.iterdir()))
            archive.unlink()
            raise UserError(f"{archive}: its {count} pictures are not the expected ones; it was removed, run again")
        folder.mkdir(exist_ok=True)
        names = sorted(path.name for path in place.iterdir())
        for name in names:
            os.replace(place / name, folder / name)
    return len(names)


def pictures_sha256(folder: Path, wanted: re.Pattern[str]) -> str:
    """One checksum for all pictures of a folder: of the lines ``<sha256>  <name>`` in the order of their names."""
    digest = hashlib.sha256()
    names = sorted(path.name for path in folder.iterdir() if wanted.fullmatch(path.name)) if folder.is_dir() else []
    for name in names:
        digest.update(f"{file_sha256(folder / name)}  {name}\n".encode())
    return digest.hexdigest()


def _transfer(url: str, part: Path, timeout: float) -> None:
    """Append what is missing to ``part``; raises ``OSError`` or ``HTTPException`` when the connection breaks."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "python-urllib"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != HTTP_RANGE_NOT_SATISFIABLE or not have:
            raise
        if error.headers.get("Content-Range", "").strip() == f"bytes */{have}":
            return  # the part is already whole
        part.unlink()
        raise ConnectionError("the part did not fit the file and was removed") from error
    with response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT and _starts_at(response, have)
        expected = response.headers.get("Content-Length")
        written = 0
        with open(part, "ab" if resumed else "wb") as stream:
            while chunk := response.read(CHUNK):
                stream.write(chunk)
                written += len(chunk)
    if expected is not None and written < int(expected):
        raise ConnectionError(f"connection closed after {written} of {expected} bytes")


def _starts_at(response: http.client.HTTPResponse, offset: int) -> bool:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return bool(found) and int(found.group(1)) == offset


def _reraise_local(error: Exception) -> None:
    """A full disk or a missing permission is not the server's doing: those errors name a local file or ENOSPC."""
    if not isinstance(error, NETWORK_ERRORS):
        raise error


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    reason = getattr(error, "reason", error)
    return str(reason) or type(error).__name__
