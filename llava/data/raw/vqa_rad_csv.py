"""The csv form of VQA-RAD as a data set: the csv, the references that tell its organs, and where its pictures lie.

Your own data may come in this form too: a csv with a ``domain`` column needs no references.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llava.data.raw import RAW, RawOptions, Source
from llava.data.raw.dataset import AUTO
from llava.data.raw.example import TEST, Example, Report
from llava.data.raw.metadata_csv import has_split_column, read_metadata
from llava.data.raw.pictures import identify_pictures, picture_folder
from llava.data.raw.references import REFERENCE_NAME, fill_from_references, read_references
from llava.data.raw.vqa_rad import VqaRad
from llava.inside import Folder
from llava.utils import UserError, require_file

DEFAULT_METADATA = Path("data/train/metadata.csv")


@RAW.register
class VqaRadCsv(VqaRad):
    """``metadata.csv`` with reference JSONs; its domains are those that the rows name, its files those of VQA-RAD."""

    name = "vqa-rad-csv"
    row_fields = ()
    file_names = ()

    def named(self, options: RawOptions) -> Source | None:
        """``--metadata`` always means this form, the other files of it where no other form is asked for."""
        others = (options.test_metadata or options.reference) and options.dataset in (AUTO, self.name)
        if not options.metadata and not others:
            return None
        folder = Path(options.data_dir) if options.data_dir else None
        csv = (
            Path(options.metadata) if options.metadata else (folder or DEFAULT_METADATA.parent) / DEFAULT_METADATA.name
        )
        return self._of(csv, folder, options)

    def inside(self, place: Path, options: RawOptions) -> Source | None:
        csv = place if place.is_file() else place / DEFAULT_METADATA.name
        is_there = csv.suffix.lower() == ".csv" and csv.is_file()
        return self._of(csv, csv.parent, replace(options, test_metadata=None)) if is_there else None

    def default(self, options: RawOptions) -> Source | None:
        return self._of(DEFAULT_METADATA, None, options) if DEFAULT_METADATA.is_file() else None

    def _of(self, csv: Path, folder: Path | None, options: RawOptions) -> Source:
        """The source of a csv; ``folder`` is the data folder that was named or searched."""
        require_file(csv, "metadata csv", "export one with columns image, question, answer, or name it with --metadata")
        home = Path(os.environ.get(self.variable) or self.folder)
        pictures = [home / "images", csv.parent / "images", csv.parent]
        if folder:
            pictures.insert(0, folder / "images")
        second = Path(options.test_metadata) if options.test_metadata else None
        if second:
            require_file(second, "test csv", "name it with --test_metadata, or leave the flag out")
        return Source(
            self.name,
            csv,
            options.folders(pictures),
            test_metadata=second,
            references=_references(options.reference, csv.parent),
        )

    def read(self, source: Source, report: Report) -> tuple[list[Example], tuple[str, ...], Folder]:
        examples = read_metadata(source.path, report)
        split_is_known = has_split_column(source.path)
        if source.test_metadata:
            examples += read_metadata(source.test_metadata, report, split=TEST, first_id=len(examples))
            split_is_known = True
        _check_ids(examples, source.path)
        folder = picture_folder(examples, source.image_folders)
        examples = identify_pictures(examples, folder)
        if source.references:
            known = read_references(source.references, report)
            named = {reference.organ for reference in known}
            named |= {example.domain for example in examples if example.domain}
            examples = fill_from_references(examples, known, split_is_known, report)
        else:
            _require_domains(examples, source.path)
            named = {str(example.domain) for example in examples}
        if not any(example.split == TEST for example in examples):
            report.notes.append(
                "which rows are test rows is not known (a split column, --test_metadata, or references with the csv's "
                "own image names and phrase_type would say it): all rows train; the unseen-image split has test rows"
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


def _references(named: Sequence[str], beside: Path) -> tuple[Path, ...]:
    """Files as named (a folder stands for the vqa_*.json in it), else those beside the csv."""
    files: list[Path] = []
    for path in [Path(name) for name in named] or [beside]:
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(file for file in path.glob("*.json") if REFERENCE_NAME.fullmatch(file.name))
        if named and not found:
            raise UserError(f"no reference vqa_<ORGAN>.json in {path}")
        files.extend(found)
    return tuple(files)
