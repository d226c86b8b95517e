"""Finds the raw input, by content and in the default places, reads it, and checks that its pictures are there."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.data.raw import metadata_csv, references, slake, vqa_rad
from llava.data.raw.example import TEST, Example, Report
from llava.data.rows import json_values
from llava.files import file_sha256
from llava.utils import UserError, require_file

VQA_RAD, VQA_RAD_CSV, SLAKE = "vqa-rad", "vqa-rad-csv", "slake"
DATASETS = (VQA_RAD, VQA_RAD_CSV, SLAKE)
DEFAULT_METADATA = Path("data/train/metadata.csv")
WHAT_TO_PLACE = (
    "place VQA_RAD_Dataset_Public.json and images/ in data/vqa-rad (python scripts/download_vqa_rad.py fetches them) "
    "or set VQA_RAD_DIR, or place metadata.csv with vqa_ABD.json, vqa_CHEST.json, vqa_HEAD.json in data/train"
)


@dataclass(frozen=True)
class Source:
    """A raw data set on disk.

    Attributes:
        dataset: one of ``DATASETS``.
        path: the authors' JSON, the csv, or SLAKE's folder.
        image_folders: where its pictures may be; the first that holds them is taken.
        test_metadata: second csv with the test rows.
        references: the reference JSONs of the csv form.
    """

    dataset: str
    path: Path
    image_folders: tuple[Path, ...]
    test_metadata: Path | None = None
    references: tuple[Path, ...] = ()


def find_source(
    dataset: str = "auto",
    data_dir: str | None = None,
    metadata: str | None = None,
    test_metadata: str | None = None,
    reference: Sequence[str] = (),
    image_dir: str | None = None,
) -> Source:
    """The raw input that the user named, or the first one found in the default places.

    Args:
        dataset: one of ``DATASETS``, or ``"auto"`` to tell by content.
        data_dir: folder (or the authors' JSON itself); default ``VQA_RAD_DIR`` or ``data/vqa-rad``, for SLAKE
            ``SLAKE_DIR`` or ``data/slake``.
        metadata, test_metadata, reference: files of the csv form.
        image_dir: folder of the pictures.

    Raises:
        UserError: nothing there; the message says what to place where.
    """
    if dataset not in ("auto", *DATASETS):
        raise UserError(f"unknown dataset {dataset!r} (choose from auto, {', '.join(DATASETS)})")
    if metadata or (test_metadata or reference) and dataset in ("auto", VQA_RAD_CSV):
        return _csv_source(data_dir, metadata, test_metadata, reference, image_dir)
    for folder in [Path(data_dir)] if data_dir else _default_folders(dataset):
        source = _source_in(folder, dataset, image_dir, reference)
        if source:
            return source
    if data_dir:
        wanted = "VQA-RAD or SLAKE" if dataset == "auto" else dataset
        raise UserError(f"no {wanted} input in {data_dir}: {WHAT_TO_PLACE}")
    if dataset in ("auto", VQA_RAD_CSV) and DEFAULT_METADATA.is_file():
        return _csv_source(None, None, None, (), image_dir)
    if dataset in ("auto", SLAKE) and (folder := Path(os.environ.get("SLAKE_DIR") or "data/slake")).is_dir():
        return Source(SLAKE, folder, _slake_images(folder, image_dir))
    if dataset == SLAKE:
        raise UserError(
            "no SLAKE input found: place train.json, validate.json, test.json and imgs/ in data/slake or set SLAKE_DIR"
        )
    raise UserError(f"no raw input found: {WHAT_TO_PLACE}")


def read_source(source: Source, report: Report) -> tuple[list[Example], tuple[str, ...], Path]:
    """All examples of a source with their domain, the domain names, and the folder that holds the pictures.

    Image names are mended where only the folder before them is wrong; pictures that are missing are left to
    ``missing_images``.
    """
    if source.dataset == VQA_RAD:
        examples, domains = vqa_rad.read_vqa_rad(source.path, report), vqa_rad.DOMAINS
    elif source.dataset == SLAKE:
        examples, domains = slake.read_slake(source.path, report), slake.DOMAINS
    else:
        return _read_csv(source, report)
    folder = _picture_folder(examples, source.image_folders)
    return examples, domains, folder


def missing_images(examples: Sequence[Example], folder: Path) -> list[str]:
    """Names of pictures that are not in ``folder`` (or are empty files), in the order of the examples."""
    names = dict.fromkeys(example.image for example in examples)
    return [name for name in names if not _is_picture(folder / name)]


def _read_csv(source: Source, report: Report) -> tuple[list[Example], tuple[str, ...], Path]:
    examples = metadata_csv.read_metadata(source.path, report)
    split_is_known = metadata_csv.has_split_column(source.path)
    if source.test_metadata:
        examples += metadata_csv.read_metadata(source.test_metadata, report, split=TEST, first_id=len(examples))
        split_is_known = True
    _check_ids(examples, source.path)
    folder = _picture_folder(examples, source.image_folders)
    examples = _identify_pictures(examples, folder)
    if source.references:
        known = references.read_references(source.references, report)
        named = {reference.organ for reference in known}
        named |= {example.domain for example in examples if example.domain}
        examples = references.fill_from_references(examples, known, split_is_known, report)
    else:
        _require_domains(examples, source.path)
        named = {str(example.domain) for example in examples}
    if not any(example.split == TEST for example in examples):
        report.notes.append(
            "which rows are test rows is not known (a split column, --test_metadata, or references with the csv's own "
            "image names and phrase_type would say it): all rows train; the unseen-image split has test rows"
        )
    return examples, tuple(sorted(named)), folder


def _check_ids(examples: Sequence[Example], path: Path) -> None:
    seen: set[str] = set()
    for example in examples:
        if str(example.id) in seen:
            raise UserError(f"{path}: question_id {example.id!r} is used twice")
        seen.add(str(example.id))


def _require_domains(examples: Sequence[Example], path: Path) -> None:
    without = next((example for example in examples if example.domain is None), None)
    if without:
        raise UserError(
            f"{path}: row {without.id} has no domain and there are no reference JSONs: place vqa_ABD.json, "
            "vqa_CHEST.json, vqa_HEAD.json beside the csv, name them with --reference, or add a 'domain' column"
        )


def _identify_pictures(examples: Sequence[Example], folder: Path) -> list[Example]:
    """Examples with image names as they are in ``folder``, and ``picture`` set from the bytes of the file."""
    found: dict[str, tuple[str, str]] = {}
    for name in dict.fromkeys(example.image for example in examples):
        inside = next((choice for choice in (name, Path(name).name) if _is_picture(folder / choice)), None)
        found[name] = (inside, file_sha256(folder / inside)) if inside else (name, "")
    return [
        dataclasses.replace(example, image=found[example.image][0], picture=found[example.image][1])
        for example in examples
    ]


def _picture_folder(examples: Sequence[Example], folders: Sequence[Path]) -> Path:
    """The first folder that holds all pictures, else the first that holds any, else the first."""

    def held(folder: Path) -> int:
        names = dict.fromkeys(example.image for example in examples)
        return sum(_is_picture(folder / name) or _is_picture(folder / Path(name).name) for name in names)

    counts = [held(folder) for folder in folders]
    return folders[counts.index(max(counts))]


def _is_picture(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _default_folders(dataset: str) -> list[Path]:
    if dataset == SLAKE:
        return []
    named = os.environ.get("VQA_RAD_DIR")
    if named and not Path(named).is_dir():
        raise UserError(f"VQA_RAD_DIR names no folder: {named} (correct or unset it)")
    return [Path(named)] if named else [Path("data/vqa-rad")]


def _source_in(place: Path, dataset: str, image_dir: str | None, reference: Sequence[str]) -> Source | None:
    """The source in a folder or file, told by content; None when it is not there."""
    if not place.exists():
        return None
    folder = place if place.is_dir() else place.parent
    names = (*vqa_rad.FILE_NAMES, slake.SPLIT_FILES["train"])
    for path in [place] if place.is_file() else [folder / name for name in names]:
        kind = _kind_of(path) if path.is_file() else None
        if kind == VQA_RAD and dataset in ("auto", VQA_RAD):
            return Source(VQA_RAD, path, (Path(image_dir),) if image_dir else (folder / "images", folder))
        if kind == SLAKE and dataset in ("auto", SLAKE):
            return Source(SLAKE, folder, _slake_images(folder, image_dir))
    csv = place if place.is_file() else folder / DEFAULT_METADATA.name
    if csv.suffix.lower() == ".csv" and csv.is_file() and dataset in ("auto", VQA_RAD_CSV):
        return _csv_source(str(folder), str(csv), None, reference, image_dir)
    return None


def _kind_of(path: Path) -> str | None:
    """Which data set a JSON holds, by the fields of its first row."""
    if path.suffix.lower() not in (".json", ".jsonl"):
        return None
    require_file(path, "raw JSON", "check the path")
    _, first = next(json_values(path), ("", None))
    if first is None:
        raise UserError(f"{path}: the file holds no rows")
    if isinstance(first, dict) and {"img_name", "modality"} & first.keys():
        return SLAKE
    if isinstance(first, dict) and {"image_name", "image_organ"} & first.keys():
        return VQA_RAD
    fields = ", ".join(first) if isinstance(first, dict) else type(first).__name__
    raise UserError(f"{path}: neither VQA-RAD (image_name, image_organ) nor SLAKE (img_name, modality) rows: {fields}")


def _slake_images(folder: Path, image_dir: str | None) -> tuple[Path, ...]:
    return (Path(image_dir),) if image_dir else tuple(folder / name for name in slake.IMAGE_FOLDERS)


def _csv_source(
    data_dir: str | None,
    metadata: str | None,
    test_metadata: str | None,
    reference: Sequence[str],
    image_dir: str | None,
) -> Source:
    csv = Path(metadata) if metadata else Path(data_dir) / DEFAULT_METADATA.name if data_dir else DEFAULT_METADATA
    require_file(csv, "metadata csv", "export one with columns image, question, answer, or name it with --metadata")
    home = Path(os.environ.get("VQA_RAD_DIR") or "data/vqa-rad")
    folders = [home / "images", csv.parent / "images", csv.parent]
    if data_dir:
        folders.insert(0, Path(data_dir) / "images")
    second = Path(test_metadata) if test_metadata else None
    if second:
        require_file(second, "test csv", "name it with --test_metadata, or leave the flag out")
    return Source(
        VQA_RAD_CSV,
        csv,
        (Path(image_dir),) if image_dir else tuple(folders),
        test_metadata=second,
        references=_references(reference, csv.parent),
    )


def _references(named: Sequence[str], beside: Path) -> tuple[Path, ...]:
    """Files as named (a folder stands for the vqa_*.json in it), else those beside the csv."""
    files: list[Path] = []
    for path in [Path(name) for name in named] or [beside]:
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(file for file in path.glob("*.json") if references.REFERENCE_NAME.fullmatch(file.name))
        if named and not inside:
            raise UserError(f"no reference vqa_<ORGAN>.json in {path}")
        files.extend(inside)
    return tuple(files)
