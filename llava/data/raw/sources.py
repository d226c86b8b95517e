"""Finds the raw input: what the flags name, what the content of a folder tells, or what lies in a default place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava.data.raw import RAW, RawDataset, RawOptions, Source
from llava.data.raw.dataset import AUTO
from llava.data.rows import json_values
from llava.utils import UserError, require_file

DATASETS = ("vqa-rad", "vqa-rad-csv", "slake")
"""Data sets that ship, in the order in which they are looked for; others follow by name."""


def data_sets() -> list[RawDataset]:
    """One object of every registered data set, in the order in which they are looked for."""
    names = RAW.names()
    return [RAW.get(name)() for name in (*DATASETS, *(name for name in names if name not in DATASETS))]


def find_source(options: RawOptions) -> Source:
    """The raw input that the user named, or the first one found in the default places.

    Raises:
        UserError: nothing there; the message says what to place where.
    """
    known = data_sets()
    names = [data_set.name for data_set in known]
    if options.dataset not in (AUTO, *names):
        raise UserError(f"unknown dataset {options.dataset!r} (choose from {AUTO}, {', '.join(names)})")
    chosen = [data_set for data_set in known if options.dataset in (AUTO, data_set.name)]
    source = next(filter(None, (data_set.named(options) for data_set in known)), None)
    if source is None and options.data_dir:
        source = _source_in(Path(options.data_dir), known, chosen, options)
    elif source is None:
        source = _in_default_places(known, chosen, options)
    if source is None:
        raise UserError(f"{_not_found(chosen, options)}: {chosen[0].what_to_place}")
    return source


def _in_default_places(known: Sequence[RawDataset], chosen: Sequence[RawDataset], options: RawOptions) -> Source | None:
    for data_set in chosen:
        for folder in data_set.homes():
            if source := _source_in(folder, known, chosen, options):
                return source
        if source := data_set.default(options):
            return source
    return None


def _not_found(chosen: Sequence[RawDataset], options: RawOptions) -> str:
    if options.data_dir:
        titles = " or ".join(dict.fromkeys(data_set.title for data_set in chosen))
        return f"no {titles if options.dataset == AUTO else options.dataset} input in {options.data_dir}"
    own = "raw" if options.dataset == AUTO else chosen[0].title
    return f"no {own} input found"


def _source_in(
    place: Path, known: Sequence[RawDataset], chosen: Sequence[RawDataset], options: RawOptions
) -> Source | None:
    """The source in a folder or file, told by content; None when it is not there."""
    if not place.exists():
        return None
    names = dict.fromkeys(name for data_set in known for name in data_set.file_names)
    for file in [place] if place.is_file() else [place / name for name in names]:
        owner = _owner_of(file, known) if file.is_file() else None
        if owner is not None and owner in chosen:
            return owner.source(file, options)
    return next(filter(None, (data_set.inside(place, options) for data_set in chosen)), None)


def _owner_of(file: Path, known: Sequence[RawDataset]) -> RawDataset | None:
    """The data set to which the first row of a JSON belongs; None for a file that is no JSON."""
    if file.suffix.lower() not in (".json", ".jsonl"):
        return None
    require_file(file, "raw JSON", "check the path")
    _, first = next(json_values(file), ("", None))
    if first is None:
        raise UserError(f"{file}: the file holds no rows")
    told = [data_set for data_set in known if data_set.row_fields]
    if isinstance(first, dict):
        shared = [len(first.keys() & set(data_set.row_fields)) for data_set in told]
        if max(shared):
            return told[shared.index(max(shared))]
    fields = ", ".join(first) if isinstance(first, dict) else type(first).__name__
    forms = " nor ".join(f"{data_set.title} ({', '.join(data_set.row_fields)})" for data_set in told)
    raise UserError(f"{file}: neither {forms} rows: {fields}")
