"""Rows as training samples and batches: ids, labels, pictures.

Notable points:
- everything that can be wrong with the data is looked for before the first step: missing pictures, rows whose text and
  picture don't fit, rows that no label is left of;
- a sample carries its own picture or none, so a text-only row or a stray ``<image>`` can't shift the pictures of its
  neighbours;
- pictures are kept in memory after preprocessing up to a byte limit, since many questions share one.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.labels import conversation_ids, expanded_length, has_labels, place_image, truncate
from llava.data.rows import HUMAN, Row
from llava.image_io import load_image
from llava.mm_utils import parse_grid_pinpoints, process_images
from llava.utils import UserError, rank0_print

MAX_UNLABELLED = 0.01
"""Share of rows without a label above which a run is stopped."""

CHECKED_ROWS = 20_000
"""Rows that are tokenised up front; of a larger file as many, evenly spread."""


class LazySupervisedDataset(Dataset):
    """One sample per row.

    Args:
        rows: training rows.
        tokenizer: the model's tokenizer.
        image_folder: folder that the rows' file names are relative to; None when no row has a picture.
        image_processor: the vision tower's image processor.
        model_cfg: the model's config (``image_aspect_ratio``, ``image_grid_pinpoints``, ``mm_use_im_start_end``,
            and what tells the number of features a picture becomes).
        conv_mode: a key of ``conv_templates``.
        text_queries: ``[N, d]`` query of each row, handed on in the sample.
        answer_suffix: put after each question on a line of its own, as evaluation puts it.
        features: per file name the frozen tower's features ``[tiles, patches, C]`` and the picture's size; where
            given, a sample carries these as ``image_features`` instead of ``image``, and no picture is opened.
        max_length: longest sample in positions, features of the picture included; None for no limit.
        cache_megabytes: memory for preprocessed pictures.

    A sample is a dict of ``input_ids`` ``[T]``, ``labels`` ``[T]``, ``image`` (``[3, H, W]``, ``[tiles, 3, H, W]`` or
    None), ``image_size`` ``(width, height)`` or None, and ``text_query`` ``[d]`` where given.

    Raises:
        UserError: a missing picture, a row whose text and picture don't fit, too many rows without a label.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: Any,
        image_folder: str | Path | None,
        image_processor: Any,
        model_cfg: Any,
        conv_mode: str,
        text_queries: torch.Tensor | None = None,
        *,
        image_queries: torch.Tensor | None = None,
        answer_suffix: str = "",
        features: dict[str, tuple[torch.Tensor, tuple[int, int]]] | None = None,
        max_length: int | None = None,
        cache_megabytes: int = 256,
    ) -> None:
        if not rows:
            raise UserError("the training data holds no rows")
        for kind, queries in (("text", text_queries), ("image", image_queries)):
            if queries is not None and len(queries) != len(rows):
                raise UserError(f"{len(queries)} {kind} queries for {len(rows)} rows")
        self.rows = list(rows)
        self.tokenizer = tokenizer
        self.image_folder = Path(image_folder) if image_folder is not None else None
        self.image_processor = image_processor
        self.model_cfg = model_cfg
        self.conv_mode = conv_mode
        self.text_queries, self.image_queries = text_queries, image_queries
        self.features = features
        self.answer_suffix = answer_suffix
        self.max_length = max_length
        self.image_tokens = image_token_count(model_cfg, image_processor)
        self._encoded: dict[int, tuple[list[int], list[int]]] = {}
        self._pictures = _PictureCache(cache_megabytes * 2**20)
        check_image_files(self.rows, self.image_folder)
        self.unlabelled = self._check_labels()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        ids, labels = self._encoded.get(index) or self._encode(index)
        sample = {"input_ids": torch.tensor(ids, dtype=torch.long), "labels": torch.tensor(labels, dtype=torch.long)}
        if self.features is not None:
            sample["image_features"], sample["image_size"] = self.features.get(row.image, (None, None))
        else:
            sample["image"], sample["image_size"] = self._picture(row)
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
        return [length if row.image else -length for length, row in zip(self.lengths, self.rows)]

    def _length(self, index: int) -> int:
        if index in self._encoded:
            return max(expanded_length(self._encoded[index][0], self.image_tokens), 1)
        row = self.rows[index]
        words = sum(len(text.split()) for _, text in row.conversations)
        return max(words * 3 // 2 + (self.image_tokens if row.image else 0), 1)

    def _encode(self, index: int) -> tuple[list[int], list[int]]:
        row = self.rows[index]
        im_start_end = bool(getattr(self.model_cfg, "mm_use_im_start_end", False))
        try:
            ids, labels = conversation_ids(
                self._turns(row), self.tokenizer, self.conv_mode, row.image is not None, im_start_end
            )
            pictures = ids.count(IMAGE_TOKEN_INDEX)
            if row.image is not None and pictures != 1:
                raise UserError(f"{pictures} times {DEFAULT_IMAGE_TOKEN} for one image (keep the first)")
            return truncate(ids, labels, self.max_length, self.image_tokens) if self.max_length else (ids, labels)
        except UserError as error:
            raise UserError(f"row {row.id!r}: {error}") from error

    def _turns(self, row: Row) -> Sequence[tuple[str, str]]:
        """The row's turns, with the suffix after each question (``<image>`` in front, so that it stays at the end)."""
        if not self.answer_suffix:
            return row.conversations
        return [
            (speaker, f"{place_image(text, text.count(DEFAULT_IMAGE_TOKEN))}\n{self.answer_suffix}")
            if speaker == HUMAN
            else (speaker, text)
            for speaker, text in row.conversations
        ]

    def _check_labels(self) -> int:
        """Tokenise the rows (or a spread of them), keep the result, and return how many have no label."""
        step = max(-(-len(self.rows) // CHECKED_ROWS), 1)
        for index in range(0, len(self.rows), step):
            self._encoded[index] = self._encode(index)
        empty = [self.rows[index].id for index, (_, labels) in self._encoded.items() if not has_labels(labels)]
        if not empty:
            return 0
        shown = ", ".join(repr(row_id) for row_id in empty[:5]) + (", …" if len(empty) > 5 else "")
        found = f"{len(empty)} of {len(self._encoded)} rows have no answer to learn from (row {shown})"
        if len(empty) > MAX_UNLABELLED * len(self._encoded):
            raise UserError(f"{found}; at most {MAX_UNLABELLED:.0%} may (fill in or drop these rows)")
        rank0_print(f"note: {found}; they carry no loss")
        return len(empty)

    def _picture(self, row: Row) -> tuple[torch.Tensor | None, tuple[int, int] | None]:
        if row.image is None:
            return None, None
        found = self._pictures.get(row.image)
        if found is None:
            try:
                image = load_image(self.image_folder / row.image)
            except UserError as error:
                raise UserError(f"row {row.id!r}: {error}") from error
            found = process_images([image], self.image_processor, self.model_cfg)[0], image.size
            self._pictures.put(row.image, found)
        return found


class _PictureCache:
    """Preprocessed pictures by file name; the ones used longest ago go first when the byte limit is reached."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.entries: OrderedDict[str, tuple[torch.Tensor, tuple[int, int]]] = OrderedDict()

    def get(self, name: str) -> tuple[torch.Tensor, tuple[int, int]] | None:
        if name not in self.entries:
            return None
        self.entries.move_to_end(name)
        return self.entries[name]

    def put(self, name: str, entry: tuple[torch.Tensor, tuple[int, int]]) -> None:
        self.entries[name] = entry
        self.used += entry[0].nbytes
        while self.used > self.limit:
            self.used -= self.entries.popitem(last=False)[1][0].nbytes


def check_image_files(rows: Sequence[Row], image_folder: str | Path | None) -> None:
    """Refuse rows whose picture is not there, before any of them is opened.

    Raises:
        UserError: names the first such row and file and counts the others.
    """
    pictured = [row for row in rows if row.image is not None]
    if not pictured:
        return
    if image_folder is None:
        raise UserError(f"row {pictured[0].id!r} names the image {pictured[0].image} (give --image_folder)")
    folder = Path(image_folder)
    if not folder.is_dir():
        raise UserError(f"image folder not found: {folder} (check --image_folder)")
    absent = {name for name in {row.image for row in pictured} if not (folder / name).is_file()}
    if not absent:
        return
    first = next(row for row in pictured if row.image in absent)
    others = f"; {len(absent)} files are missing in all" if len(absent) > 1 else ""
    raise UserError(f"row {first.id!r}: image file not found: {folder / first.image}{others} (check the image folder)")


def image_token_count(model_cfg: Any, image_processor: Any) -> int:
    """The most features one picture becomes, as far as the config tells; 1 where it tells nothing.

    The patch size comes from ``vision_config``, or from the tower's name (``…-patch14-336``).
    """
    vision = getattr(model_cfg, "vision_config", None) or {}
    read = vision.get if isinstance(vision, dict) else lambda name: getattr(vision, name, None)
    named = re.search(r"patch-?(\d+)", str(getattr(model_cfg, "mm_vision_tower", None) or ""))
    patch = read("patch_size") or (int(named.group(1)) if named else None)
    crop = getattr(image_processor, "crop_size", None)
    size = read("image_size") or (crop["height"] if crop else None)
    if not patch or not size:
        return 1
    side = int(size) // int(patch)
    base = side * side + (getattr(model_cfg, "mm_vision_select_feature", "patch") == "cls_patch")
    if getattr(model_cfg, "image_aspect_ratio", None) != "anyres":
        return base
    grids = [(width // size, height // size) for width, height in parse_grid_pinpoints(model_cfg.image_grid_pinpoints)]
    # Tiles, and one newline feature per row of patches.
    return base + max(columns * rows * side * side + rows * side for columns, rows in grids)


@dataclass
class DataCollatorForSupervisedDataset:
    """Samples to one right-padded batch.

    The batch holds ``input_ids``, ``labels`` and ``attention_mask`` ``[B, T]``; ``images`` ``[B, 3, H, W]`` when every
    sample has a picture of one shape, else a list with None for text-only rows; ``image_sizes`` (list of
    ``(width, height)`` or None); ``text_query`` and ``image_query`` ``[B, d]`` where the samples carry one.
    Samples with ``image_features`` give a list per sample of these instead of ``images``. The mask comes from the
    lengths, never from the padding id, which may be a real token.
    """

    tokenizer: Any

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(sample["input_ids"]) for sample in samples)
        padding = self.tokenizer.pad_token_id
        ids = torch.full((len(samples), longest), padding if padding is not None else 0, dtype=torch.long)
        labels = torch.full((len(samples), longest), IGNORE_INDEX, dtype=torch.long)
        mask = torch.zeros((len(samples), longest), dtype=torch.bool)
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            ids[row, :length], labels[row, :length], mask[row, :length] = sample["input_ids"], sample["labels"], True
        batch = {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": mask,
            "image_sizes": [sample["image_size"] for sample in samples],
        }
        if "image_features" in samples[0]:
            features = [sample["image_features"] for sample in samples]
            batch["image_features"] = [[] if feature is None else [feature] for feature in features]
        else:
            images = [sample["image"] for sample in samples]
            batch["images"] = torch.stack(images) if _stackable(images) else images
        for name in ("text_query", "image_query"):
            if name in samples[0]:
                batch[name] = torch.stack([sample[name] for sample in samples])
        return batch


def _stackable(images: list[torch.Tensor | None]) -> bool:
    if any(image is None for image in images):
        return False
    return all(image.dim() == 3 and image.shape == images[0].shape for image in images)
