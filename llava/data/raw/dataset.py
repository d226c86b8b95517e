"""What a raw data set is: how it is found, how it is read, and which files come out of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llava.data.raw.example import TEST, TRAIN, VALIDATE, Example, Report
from llava.data.raw.outputs import lines_of, split_files
from llava.data.raw.pictures import picture_folder
from llava.inside import Folder, LinkedFolder
from llava.utils import UserError

AUTO = "auto"


@dataclass(frozen=True)
class RawOptions:
    """What the user said of the raw input.

    Attributes:
        dataset: name of a data set, or ``"auto"`` to tell by content.
        data_dir: folder (or the file itself); default: each data set's own place.
        metadata, test_metadata, reference: files of the csv form.
        image_dir: folder of the pictures. follow_links: links in it may lead out of it.
    """

    dataset: str = AUTO
    data_dir: str | None = None
    metadata: str | None = None
    test_metadata: str | None = None
    reference: Sequence[str] = ()
    image_dir: str | None = None
    follow_links: bool = False

    def folders(self, usual: Sequence[Path]) -> tuple[Folder, ...]:
        """Where the pictures may be: the folder that was named, else the usual ones."""
        named = [Path(self.image_dir)] if self.image_dir else usual
        return tuple(LinkedFolder(folder) if self.follow_links else folder for folder in named)


@dataclass(frozen=True)
class Source:
    """A raw data set on disk.

    Attributes:
        dataset: name of the data set.
        path: its file or its folder.
        image_folders: where its pictures may be; the first that holds them is taken.
        test_metadata: second csv with the test rows.
        references: the reference JSONs of the csv form.
    """

    dataset: str
    path: Path
    image_folders: tuple[Folder, ...]
    test_metadata: Path | None = None
    references: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Fused:
    """What comes out of a data set.

    Attributes:
        files: name of each file to write (folders allowed) -> its text.
        splits: name -> examples, for the table of counts.
    """

    files: dict[str, str]
    splits: dict[str, list[Example]]


class RawDataset:
    """A raw data set whose rows tell which they are; a subclass says what is its own.

    Attributes:
        name: of ``--dataset``, of the report and in front of the output files.
        title: what messages call it.
        row_fields: fields by which a JSON row is told; a file is the data set's that has most of them in its first row.
        file_names: JSON files of a data folder to look at.
        image_folders: folders beside the file in which the pictures may be; ``""`` is the file's own.
        variable, folder: environment variable that names its folder, and the folder taken without it.
        what_to_place: advice for the user who has not placed it.
        domains: task names, in the order of the rows' ``domain`` field.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    row_fields: ClassVar[tuple[str, ...]] = ()
    file_names: ClassVar[tuple[str, ...]] = ()
    image_folders: ClassVar[tuple[str, ...]] = ("images", "")
    variable: ClassVar[str] = ""
    folder: ClassVar[str] = ""
    what_to_place: ClassVar[str] = ""
    domains: ClassVar[tuple[str, ...]] = ()

    # -- finding -------------------------------------------------------------------------------------------------------

    def named(self, options: RawOptions) -> Source | None:
        """The source when flags of this data set alone name its files."""
        return None

    def homes(self) -> list[Path]:
        """Folders to look into when the user names none.

        Raises:
            UserError: the environment variable names no folder.
        """
        named = os.environ.get(self.variable) if self.variable else None
        if named and not Path(named).is_dir():
            raise UserError(f"{self.variable} names no folder: {named} (correct or unset it)")
        return [Path(named or self.folder)] if named or self.folder else []

    def source(self, file: Path, options: RawOptions) -> Source:
        """The source of a JSON file whose first row has this data set's fields."""
        return Source(self.name, file, self.pictures(file.parent, options))

    def inside(self, place: Path, options: RawOptions) -> Source | None:
        """The source in a folder or file when it is no JSON that ``row_fields`` tell."""
        return None

    def default(self, options: RawOptions) -> Source | None:
        """The source in a place of its own, when nothing was named and its homes are empty."""
        return None

    def pictures(self, folder: Path, options: RawOptions) -> tuple[Folder, ...]:
        """Folders that may hold the pictures of a data set that lies in ``folder``."""
        return options.folders([folder / name for name in self.image_folders])

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, source: Source, report: Report) -> tuple[list[Example], tuple[str, ...], Folder]:
        """All examples with their domain, the domain names, and the folder that holds the pictures.

        Image names are mended where only the folder before them is wrong; missing pictures are left to the caller.
        """
        examples = self.examples(source, report)
        return examples, self.domains, picture_folder(examples, source.image_folders)

    def examples(self, source: Source, report: Report) -> list[Example]:
        """The examples in the order of the raw file, each with its domain and split; slips go into ``report``."""
        raise NotImplementedError(f"raw data set {self.name!r} must say how its examples are read")

    # -- writing -------------------------------------------------------------------------------------------------------

    @property
    def report_name(self) -> str:
        """File name of the report."""
        return f"{self.name}_fusion_report.json"

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Training file and the test file that may not stand beside it from another run."""
        return ((f"{self.name}_train_combined.jsonl", f"{self.name}_test.jsonl"),)

    def fuse(self, examples: Sequence[Example], domains: Sequence[str], seed: int, report: Report) -> Fused:
        """The files: by default each split as it was published, all names starting with the data set's.

        Args:
            seed: for a split that is dealt.
        """
        splits = {name: [row for row in examples if row.split == name] for name in (TRAIN, VALIDATE, TEST)}
        splits = {name: rows for name, rows in splits.items() if rows}
        names = (f"{self.name}_train_combined.jsonl", f"{self.name}_train_{{}}.jsonl", f"{self.name}_test.jsonl")
        files = split_files(examples, domains, *names)
        if VALIDATE in splits:
            files[f"{self.name}_validate.jsonl"] = lines_of(splits[VALIDATE], domains)
        return Fused(files, splits)
