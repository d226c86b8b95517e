"""Hand a batch's pictures, and their sizes, out to its samples."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Images = Tensor | Sequence[Tensor | None]


def hand_out(images: Images, anyres: bool) -> list[list[Tensor]]:
    """Pictures per sample, ``[tiles, 3, h, w]`` each.

    Args:
        images: a batch ``[batch, 3, h, w]`` or one entry per sample: ``None`` (no image), ``[3, h, w]``,
            ``[tiles, 3, h, w]`` (tiles of one picture with ``anyres``, else several pictures), or a list of those.
    """
    return [_pictures(entry, anyres) for entry in images]


def _pictures(entry, anyres: bool) -> list[Tensor]:
    if entry is None:
        return []
    if isinstance(entry, (list, tuple)):
        return [picture for part in entry for picture in _pictures(part, anyres)]
    if entry.dim() == 3:
        return [entry.unsqueeze(0)]
    return [entry] if anyres else [picture.unsqueeze(0) for picture in entry]


def sizes_per_picture(features: list[list[Tensor]], image_sizes) -> list[tuple[int, int] | None]:
    """One original size per picture; ``image_sizes`` has an entry per sample (a size, or a list of them)."""
    sizes: list[tuple[int, int] | None] = []
    for index, sample in enumerate(features):
        entry = None if image_sizes is None else image_sizes[index]
        many = isinstance(entry, (list, tuple)) and len(entry) > 0 and isinstance(entry[0], (list, tuple))
        sizes += list(entry) if many else [entry] * len(sample)
    return sizes
