"""Splits by picture: all rows of a picture go to one side.

The draw depends on the pictures' names and the seed alone: not on the rows' order, nor on other pictures' rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence


def shuffled(pictures: Iterable[object], seed: int | None = None) -> list[str]:
    """Each picture's name once, in the order of checksums over seed and name."""
    prefix = "" if seed is None else f"{seed}:"
    names = {str(picture) for picture in pictures}
    return sorted(names, key=lambda name: hashlib.sha256(f"{prefix}{name}".encode()).digest())


def held_out(pictures: Sequence[object], share: float, seed: int) -> list[bool]:
    """Whether each row is held out, given its picture; ``share`` is of the pictures, not of the rows."""
    names = shuffled(pictures, seed)
    out = set(names[: int(round(share * len(names)))])
    return [str(picture) in out for picture in pictures]


def deal(
    pictures: Sequence[object],
    folds: Sequence[int],
    seed: int | None = None,
    strata: Sequence[Hashable] | None = None,
    by_rows: bool = False,
) -> list[int]:
    """The fold of each row, given its picture: pictures are dealt one by one to the fold that is emptiest so far.

    Args:
        folds: their numbers; of equally filled ones the first named takes the next picture.
        strata: of each row; every stratum is dealt on its own. A picture belongs to that of its first row.
        by_rows: fill the folds with equally many rows, instead of equally many pictures.
    """
    names = [str(picture) for picture in pictures]
    sizes = Counter(names)
    stratum: dict[str, Hashable] = {}
    for place, name in enumerate(names):
        stratum.setdefault(name, strata[place] if strata is not None else None)
    filled: Counter[tuple[Hashable, int]] = Counter()
    fold_of: dict[str, int] = {}
    for name in shuffled(names, seed):
        fold = min(folds, key=lambda number: filled[stratum[name], number])
        filled[stratum[name], fold] += sizes[name] if by_rows else 1
        fold_of[name] = fold
    return [fold_of[name] for name in names]
