"""Hand a batch's pictures, and their sizes, out to its rows: every form in which LLaVA's callers give them.

A row takes as many pictures as it has ``<image>`` placeholders. How the pictures belong to the rows is read off their
number, and never guessed: where no reading fits, ``hand_out`` raises and names the row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from torch import Tensor

from llava.utils import rank0_print

Images = Tensor | Sequence[Any]
Size = tuple[int, int]
KNOWN_MODALITIES = ("image", "text")


class Handed(NamedTuple):
    """What each row got: ``pictures`` ``[tiles, 3, h, w]`` and their original ``(width, height)``, where given."""

    pictures: list[list[Tensor]]
    sizes: list[list[Size | None]]


def hand_out(
    images: Images | None, placeholders: Sequence[int], image_sizes: Any = None, anyres: bool = False
) -> Handed:
    """Give every row of a batch its own pictures.

    ``images`` may be

    - ``None``, an empty list, or a list of ``None``: no pictures;
    - one tensor ``[n, 3, h, w]`` or ``[n, tiles, 3, h, w]``, or a single picture ``[3, h, w]``;
    - a list with an entry per row: ``None``, ``[3, h, w]``, ``[n, 3, h, w]``, or a list of those;
    - a flat list of all pictures in the batch.

    ``[n, 3, h, w]`` inside a list (or of a five-dimensional tensor) is ``n`` pictures; with ``anyres`` it is one
    picture of ``n`` tiles. The first of these readings that fits is taken:

    1. an entry per row, each with as many pictures as its row has placeholders;
    2. as many single pictures as the batch has placeholders: in order, row after row;
    3. an entry per row, where those of rows without a placeholder are dummies, which are passed over;
    4. single pictures in order, one of them a dummy for each row without a placeholder (LLaVA's own training).

    A batch without any placeholder passes everything over. A picture passed over that is not blank is noted once.

    ``image_sizes`` follows the pictures: one size per picture, or an entry per row or per entry of ``images`` (a size,
    a list of sizes, ``None``), also as a tensor ``[n, 2]``; ``None`` or empty where it is not known.

    Args:
        placeholders: how many ``<image>`` each row has. anyres: pictures come as tiles ``[tiles, 3, h, w]``.

    Raises:
        ValueError: no reading fits, naming the first row that comes out short (or gets too many); an entry is no
            tensor of floats, or has another number of dimensions; ``image_sizes`` has another number of sizes.
    """
    entries = read_entries(images, anyres)
    counts = [len(entry) for entry in entries]
    nested = isinstance(images, (list, tuple)) and not all(isinstance(entry, Tensor) for entry in images)
    singles = not nested and all(count == 1 for count in counts)
    flat = [picture for entry in entries for picture in entry]
    shares = _shares(counts, singles, placeholders)
    taken = {index for share in shares for index in share}
    if any(index not in taken and not _blank(picture) for index, picture in enumerate(flat)):
        _note_passed_over()
    sizes = _sizes(image_sizes, counts, shares, needed=anyres)
    return Handed([[flat[index] for index in share] for share in shares], sizes)


def read_entries(images: Images | None, anyres: bool) -> list[list[Tensor]]:
    """The pictures ``[tiles, 3, h, w]`` of each entry of ``images`` (see ``hand_out``)."""
    if images is None:
        return []
    if isinstance(images, Tensor) and images.dim() == 3:
        images = images[None]
    if not isinstance(images, (Tensor, list, tuple)):
        raise ValueError(f"images are a {type(images).__name__}; give tensors, as process_images makes them")
    return [_pictures(entry, anyres) for entry in images]


def _pictures(entry: Any, anyres: bool) -> list[Tensor]:
    if entry is None:
        return []
    if isinstance(entry, (list, tuple)):
        return [picture for part in entry for picture in _pictures(part, anyres)]
    if not isinstance(entry, Tensor) or not entry.is_floating_point():
        found = entry.dtype if isinstance(entry, Tensor) else type(entry).__name__
        raise ValueError(f"images hold a picture of {found}; give tensors of floats, as process_images makes them")
    if entry.dim() not in (3, 4):
        raise ValueError(f"images hold a tensor of shape {list(entry.shape)}; a picture is [3, h, w] or [n, 3, h, w]")
    if entry.dim() == 3:
        return [entry[None]]
    return [entry] if anyres else list(entry[:, None])


def _shares(counts: list[int], singles: bool, placeholders: Sequence[int]) -> list[list[int]]:
    """For each row the places of its pictures among all pictures of the batch."""
    total, wanted, per_row = sum(counts), sum(placeholders), len(counts) == len(placeholders)
    if wanted == 0:
        return [[] for _ in placeholders]
    if per_row and counts == list(placeholders):
        return _in_order(placeholders, counts)
    if singles and total == wanted:
        return _in_order(placeholders, placeholders)
    if per_row and all(have == want or want == 0 for have, want in zip(counts, placeholders, strict=True)):
        return _in_order(placeholders, counts)
    if singles and total == sum(max(want, 1) for want in placeholders):
        return _in_order(placeholders, [max(want, 1) for want in placeholders])
    raise ValueError(_mismatch(counts, singles, placeholders))


def _in_order(placeholders: Sequence[int], steps: Sequence[int]) -> list[list[int]]:
    """For each row the first ``placeholders`` of the ``steps`` pictures that are its turn."""
    starts = [0, *accumulate(steps)]
    return [list(range(start, start + want)) for start, want in zip(starts, placeholders)]


def _mismatch(counts: list[int], singles: bool, placeholders: Sequence[int]) -> str:
    rows, total, wanted = len(placeholders), sum(counts), sum(placeholders)
    last = max(row for row, want in enumerate(placeholders) if want)
    if len(counts) == rows:
        given = counts
    elif singles:  # as far as they reach, in order; what is left over goes to the last row
        left = [total - before for before in [0, *accumulate(placeholders)]]
        given = [max(min(want, rest), 0) for want, rest in zip(placeholders, left)]
        given[last] += max(total - wanted, 0)
    else:
        given = [*counts, *[0] * rows][:rows]
    row = next((row for row, want in enumerate(placeholders) if want and given[row] != want), last)
    return (
        f"row {row} of the batch has {placeholders[row]} <image> placeholder(s) but {given[row]} picture(s); in all "
        f"{total} in {len(counts)} entries for {wanted} in {rows} rows (give an entry per row, or one flat list)"
    )


def _blank(picture: Tensor) -> bool:
    """Whether every channel has one value all over, as the dummies of LLaVA's callers do."""
    return bool((picture == picture[..., :1, :1]).all())


@functools.cache
def _note_passed_over() -> None:
    rank0_print("note: a row without <image> came with a picture, which is passed over (said once)")


# -- sizes -----------------------------------------------------------------------------------------------------------


def sizes_of(features: list[list[Tensor]], image_sizes: Any) -> list[Size | None]:
    """One original ``(width, height)`` (or None) per picture of ``features``; ``image_sizes`` as in ``hand_out``.

    Raises:
        ValueError: another number of sizes, where tiles need theirs.
    """
    shares = _in_order(counts := [len(row) for row in features], counts)
    tiled = any(len(picture) > 1 for row in features for picture in row)
    return [size for row in _sizes(image_sizes, counts, shares, tiled) for size in row]


def _sizes(image_sizes: Any, counts: list[int], shares: list[list[int]], needed: bool) -> list[list[Size | None]]:
    """The sizes of each row's pictures, given for all pictures or for those that rows take; all None if unfitting."""
    entries, taken = _size_entries(image_sizes), [len(share) for share in shares]
    if any(entries) and (spread := _spread(entries, counts)) is not None:
        return [[spread[index] for index in share] for share in shares]
    if any(entries) and (spread := _spread(entries, taken)) is not None:
        return [[spread[index] for index in share] for share in _in_order(taken, taken)]
    if any(entries) and needed:
        count = sum(len(entry or ()) for entry in entries)
        raise ValueError(f"image_sizes hold {count} sizes for {sum(taken)} pictures (give one for each)")
    return [[None] * count for count in taken]


def _spread(entries: list[list[Size | None] | None], counts: list[int]) -> list[Size | None] | None:
    """A size for each of ``sum(counts)`` pictures, in order; None where ``entries`` do not fit.

    They fit as a list for each of ``counts``, or one by one, or as one size for all pictures of a count.
    """
    flat = [size for entry in entries for size in entry or ()]
    paired = list(zip(entries, counts, strict=True)) if len(entries) == len(counts) else []
    if paired and all(entry is None or len(entry) == count for entry, count in paired):
        return [size for entry, count in paired for size in entry or [None] * count]
    if len(flat) == sum(counts):
        return flat
    if paired and all(entry is None or len(entry) == 1 or not count for entry, count in paired):
        return [(entry or [None])[0] for entry, count in paired for _ in range(count)]
    return None


def _size_entries(image_sizes: Any) -> list[list[Size | None] | None]:
    """Per entry a list of ``(width, height)``, or None where it says nothing."""
    plain = _plain(image_sizes)
    if plain is None or _is_size(plain):
        return [] if plain is None else [[tuple(plain)]]
    if not isinstance(plain, list) or any(not isinstance(entry, (list, type(None))) for entry in plain):
        raise ValueError(f"image_sizes are {image_sizes!r}; give (width, height) of each picture")
    return [_size_list(entry) if entry else None for entry in plain]


def _size_list(entry: list) -> list[Size | None]:
    return [tuple(entry)] if _is_size(entry) else [None if size is None else tuple(size) for size in entry]


def _plain(value: Any) -> Any:
    """Tensors and arrays in lists as numbers in lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _is_size(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(part, (int, float)) for part in value)
    )


# -- modalities ------------------------------------------------------------------------------------------------------


def are_modalities(value: Any) -> bool:
    """Whether an argument is LLaVA-NeXT's ``modalities``, such as ``["image"]``, and not sizes."""
    return isinstance(value, str) or (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(name, str) for name in value)
    )


def check_modalities(modalities: Any) -> None:
    """Accept LLaVA-NeXT's ``modalities`` where they are pictures or text.

    Raises:
        ValueError: another one, such as ``video``.
    """
    given = [modalities] if isinstance(modalities, str) else modalities or ()
    for name in given:
        if name not in KNOWN_MODALITIES:
            raise ValueError(
                f"modalities hold {name!r}; this model sees pictures (give 'image', or the frames as such)"
            )
