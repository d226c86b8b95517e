"""Rows as training samples and batches: ids, labels, pictures.

Notable points:
- everything that can be wrong with the data is looked for before the first step: missing pictures, rows whose text and
  picture don't fit, rows that no label is left of;
- a sample carries its own picture or none, so a text-only row or a stray ``<image>`` can't shift the pictures of its
  neighbours;
- ids, labels and pixels are the prompt encoder's, which answering uses too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from llava.constants import IGNORE_INDEX, NO_SEGMENT
from llava.data.apart import turns_apart
from llava.data.labels import expanded_length, has_labels
from llava.data.prompt import Picture, PromptEncoder, pictures_of
from llava.data.rows import Row
from llava.devices import OnHost
from llava.files import file_sha256
from llava.inside import Folder, inside
from llava.padding import pad
from llava.utils import UserError, rank0_print

Features = dict[str, Picture]
"""Per file name the tower's features ``[tiles, patches, C]`` and the picture's ``(width, height)``."""

MAX_UNLABELLED = 0.01
"""Share of rows without a label above which a run is stopped."""

CHECKED_ROWS = 20_000
"""Rows that are tokenised up front; of a larger file as many, evenly spread."""


class TrainingSamples(Dataset):
    """One sample per row.

    Args:
        rows: training rows.
        encoder: turns a row into ids, labels and pixels, as answering does.
        apart: the turns of a row do not see each other (``llava.data.apart``).

    A sample is a dict of ``input_ids`` ``[T]``, ``labels`` ``[T]``, ``image`` (``[3, H, W]`` or ``[tiles, 3, H, W]``),
    ``image_size`` ``(width, height)``, ``segments`` ``[T]`` where turns are apart, and what ``add`` gave the dataset.
    Without a picture ``image`` and ``image_size`` are None, with several they are lists.

    Attributes:
        named: samples also say which pictures they show: ``picture_names``, their files' names.
        truths: ``[N, words]``, what each row says of some words (``llava.model.naming``); samples carry theirs.

    Raises:
        UserError: a missing picture, a row whose text and picture don't fit, too many rows without a label.
    """

    def __init__(self, rows: Sequence[Row], encoder: PromptEncoder, apart: bool = False) -> None:
        if not rows:
            raise UserError("the training data holds no rows")
        self.rows, self.encoder, self.apart = list(rows), encoder, apart
        self.text_queries: torch.Tensor | None = None
        self.image_queries: torch.Tensor | None = None
        self.features: Features | None = None
        self.named = False
        self.truths: torch.Tensor | None = None
        self._encoded: dict[int, tuple[list[int], ...]] = {}
        check_image_files(self.rows, encoder.image_folder)
        encoder.check(self.rows)
        self.unlabelled = self._check_labels()

    def add(
        self,
        text_queries: torch.Tensor | None = None,
        image_queries: torch.Tensor | None = None,
        features: Features | None = None,
    ) -> TrainingSamples:
        """Give samples what was computed ahead of training; returns the dataset.

        Args:
            text_queries, image_queries: ``[N, d]``, the query of each row: ``text_query`` and ``image_query`` ``[d]``.
            features: per file name the frozen tower's features ``[tiles, patches, C]`` and the picture's size; a
                sample carries a list of these as ``image_features`` instead of ``image``, and no picture is opened.

        Raises:
            UserError: another number of queries than rows.
        """
        for kind, queries in (("text", text_queries), ("image", image_queries)):
            if queries is not None and len(queries) != len(self.rows):
                raise UserError(f"{len(queries)} {kind} queries for {len(self.rows)} rows")
        self.text_queries, self.image_queries, self.features = text_queries, image_queries, features
        return self

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        ids, *others = self._encoded.get(index) or self._encode(index)
        named = zip(("input_ids", "labels", "segments"), (ids, *others), strict=False)
        sample: dict[str, Any] = {name: torch.tensor(values, dtype=torch.long) for name, values in named}
        names = pictures_of(row, ids)
        if self.features is not None:
            seen = [self.features[name] for name in names]
            sample["image_features"] = [features for features, _ in seen]
        else:
            seen = [self.encoder.picture(row, name) for name in names]
            sample["image"] = one_or_all([pixels for pixels, _ in seen])
        if self.named:
            sample["picture_names"] = names
        sample["image_size"] = one_or_all([size for _, size in seen])
        if self.truths is not None:
            sample["truths"] = self.truths[index]
        if self.text_queries is not None:
            sample["text_query"] = self.text_queries[index]
        if self.image_queries is not None:
            sample["image_query"] = self.image_queries[index]
        return sample

    @property
    def lengths(self) -> list[int]:
        """Positions each sample takes, features included; words and a half for rows that were not tokenised yet."""
        return [self._length(index) for index in range(len(self.rows))]

    @property
    def modality_lengths(self) -> list[int]:
        """As ``lengths``, negative for text-only rows: what LLaVA's grouped sampler reads."""
        return [length if row.images else -length for length, row in zip(self.lengths, self.rows)]

    def _length(self, index: int) -> int:
        if index in self._encoded:
            return max(expanded_length(self._encoded[index][0], self.encoder.image_tokens), 1)
        row = self.rows[index]
        words = sum(len(text.split()) for _, text in row.conversations)
        return max(words * 3 // 2 + self.encoder.image_tokens * len(row.images), 1)

    def _encode(self, index: int) -> tuple[list[int], ...]:
        row = self.rows[index]
        return turns_apart(row, self.encoder) if self.apart else self.encoder.tokens(row, answer=True)

    def _check_labels(self) -> int:
        """Tokenise the rows (or a spread of them), keep the result, and return how many have no label."""
        step = max(-(-len(self.rows) // CHECKED_ROWS), 1)
        for index in range(0, len(self.rows), step):
            self._encoded[index] = self._encode(index)
        empty = [self.rows[index].id for index, (_, labels, *_) in self._encoded.items() if not has_labels(labels)]
        if not empty:
            return 0
        shown = ", ".join(repr(row_id) for row_id in empty[:5]) + (", …" if len(empty) > 5 else "")
        found = f"{len(empty)} of {len(self._encoded)} rows have no answer to learn from (row {shown})"
        if len(empty) > MAX_UNLABELLED * len(self._encoded):
            raise UserError(f"{found}; at most {MAX_UNLABELLED:.0%} may (fill in or drop these rows)")
        rank0_print(f"note: {found}; they carry no loss")
        return len(empty)


def check_image_files(rows: Sequence[Row], image_folder: Folder | None) -> None:
    """Refuse rows whose picture is not there, before any of them is opened.

    Raises:
        UserError: names the first such row and file and counts the others; a name leads out of the folder.
    """
    pictured = [row for row in rows if row.images]
    if not pictured:
        return
    if image_folder is None:
        raise UserError(f"row {pictured[0].id!r} names the image {pictured[0].image} (give --image_folder)")
    folder = Path(image_folder)
    if not folder.is_dir():
        raise UserError(f"image folder not found: {folder} (check --image_folder)")
    named = {name: row for row in reversed(pictured) for name in row.images}
    absent = {name for name, row in named.items() if not inside(image_folder, name, f"row {row.id!r}").is_file()}
    if not absent:
        return
    row, first = next((row, name) for row in pictured for name in row.images if name in absent)
    others = f"; {len(absent)} files are missing in all" if len(absent) > 1 else ""
    raise UserError(f"row {row.id!r}: image file not found: {folder / first}{others} (check the image folder)")


def picture_names(rows: Sequence[Row]) -> list[str]:
    """The rows' picture files, each once, in the order of their first use."""
    return list(dict.fromkeys(name for row in rows for name in row.images))


def picture_groups(rows: Sequence[Row]) -> list[str]:
    """What each row is about, for splits by picture: rows that share a picture, directly or by others, are one group.

    A row with one picture of its own is about that picture, one without about itself.
    """
    leader: dict[str, str] = {}

    def group(name: str) -> str:
        while leader.setdefault(name, name) != name:
            leader[name] = leader[leader[name]]  # shortens the way for the next
            name = leader[name]
        return name

    for row in rows:
        for name in row.images[1:]:
            first, second = sorted((group(row.images[0]), group(name)))  # whatever the rows' order
            leader[second] = first
    return [group(row.images[0]) if row.images else f"row {row.id}" for row in rows]


def pictures_checksum(rows: Sequence[Row], image_folder: Folder | None) -> str | None:
    """16 hex digits over the contents of the rows' pictures, whatever their folder is called; None without any.

    Raises:
        UserError: a picture is missing.
    """
    names = picture_names(rows)
    if not names:
        return None
    digest = hashlib.sha256()
    try:
        for name in sorted(names):
            digest.update(f"{name}:{file_sha256(inside(image_folder or '', name))}\n".encode())
    except FileNotFoundError:
        check_image_files(rows, image_folder)  # names the row and counts the others
        raise
    return digest.hexdigest()[:16]


@dataclass
class DataCollatorForSupervisedDataset:
    """Samples to one right-padded batch.

    The batch holds ``input_ids``, ``labels`` and ``attention_mask`` ``[B, T]``; ``images`` ``[B, 3, H, W]`` when every
    sample has one picture of one shape, else a list with None for text-only rows and a list for several pictures;
    ``image_sizes`` (list of ``(width, height)``, None, or a list of them); where the samples carry one, ``text_query``
    and ``image_query`` ``[B, d]``, ``segments`` ``[B, T]`` and ``truths`` ``[B, words]``. Samples with
    ``image_features`` give a list per sample of these instead of ``images``; ``picture_names`` are a list too. The mask
    comes from the lengths, never from the padding id, which may be a real token.

    Args:
        hold_queries: give queries as ``OnHost``, so that no trainer moves or casts them.
    """

    tokenizer: Any
    hold_queries: bool = False

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        ids, mask = pad([sample["input_ids"] for sample in samples], value=self.tokenizer.pad_token_id or 0)
        labels, _ = pad([sample["labels"] for sample in samples], value=IGNORE_INDEX)
        batch = {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": mask,
            "image_sizes": [sample.get("image_size") for sample in samples],
        }
        if "picture_names" in samples[0]:
            batch["picture_names"] = [sample["picture_names"] for sample in samples]
        if "segments" in samples[0]:
            batch["segments"] = pad([sample["segments"] for sample in samples], value=NO_SEGMENT)[0]
        if "image_features" in samples[0]:
            batch["image_features"] = [sample["image_features"] for sample in samples]
        else:
            images = [sample.get("image") for sample in samples]
            batch["images"] = torch.stack(images) if _stackable(images) else images
        if "truths" in samples[0]:
            batch["truths"] = torch.stack([sample["truths"] for sample in samples])
        for name in ("text_query", "image_query"):
            if name in samples[0]:
                queries = torch.stack([sample[name] for sample in samples])
                batch[name] = OnHost(queries) if self.hold_queries else queries
        return batch


def one_or_all(values: list[Any]) -> Any:
    """What a sample says of its pictures: None, the one value, or all of them."""
    return values if len(values) > 1 else next(iter(values), None)


def _stackable(images: list[Any]) -> bool:
    if not all(isinstance(image, torch.Tensor) for image in images):
        return False
    return all(image.dim() == 3 and image.shape == images[0].shape for image in images)
