"""How a model is asked: one object for training and for answering, and the only code that turns a row into its inputs.

A ``Prompt`` holds what decides the token ids and the pixels of a question beside the model itself. Key files and
stages keep it, every answer reads it, so a stage is asked as it was trained. ``PromptEncoder`` is a prompt bound to
one model's tokenizer and image processor.
"""

from __future__ import annotations

import difflib
import functools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_mode_for, get_conversation
from llava.data.labels import Turn, conversation_ids, image_token_count, place_image, truncate
from llava.data.rows import ANSWER_STYLES, HUMAN, Row, in_lower_case, wrong_count
from llava.image_io import load_image
from llava.inside import Folder, inside
from llava.mm_utils import parse_grid_pinpoints, process_images
from llava.utils import UserError

ASPECT_RATIOS = ("pad", "square", "anyres")
"""What becomes of a picture that is not square: letter-boxed, resized and cropped, or cut into tiles."""

Picture = tuple[Tensor, tuple[int, int]]
"""Pixels ``[3, H, W]`` or ``[tiles, 3, H, W]``, and the file's ``(width, height)``."""


@dataclass(frozen=True)
class Prompt:
    """How questions are put to a model.

    Args:
        conv_mode: a key of ``conv_templates``.
        answer_suffix: put after each question on a line of its own; empty for none.
        answer_style: how answers are taught, ``as_is`` or ``lower``.
        aspect_ratio: ``pad``, ``square`` or ``anyres``, LLaVA's ``image_aspect_ratio``.
        max_length: longest training sample in positions, features of the picture included; None for no limit.

    Raises:
        UserError: an unknown template, style or picture mode, or a limit below 1.
    """

    conv_mode: str
    answer_suffix: str = ""
    answer_style: str = "as_is"
    aspect_ratio: str = "square"
    max_length: int | None = None

    def __post_init__(self) -> None:
        get_conversation(self.conv_mode)
        check_aspect_ratio(self.aspect_ratio)
        if self.answer_style not in ANSWER_STYLES:
            raise UserError(f"answer style {self.answer_style!r} is not known; choose from {', '.join(ANSWER_STYLES)}")
        if not isinstance(self.answer_suffix, str):
            raise UserError(f"the answer suffix is {self.answer_suffix!r}; give a text, or an empty one for none")
        if self.max_length is not None and (type(self.max_length) is not int or self.max_length < 1):
            raise UserError(f"the longest sample is {self.max_length!r} positions; give an integer of 1 or more")

    @classmethod
    def of(cls, config: Any, name: str, defaults: Mapping[str, Any] | None = None, **asked: Any) -> Prompt:
        """The prompt of a model: what is asked for, else what its stage keeps, else what its base says.

        Args:
            config: the model's config (``image_aspect_ratio``, ``conversation_version``, and ``prompt`` of a stage).
            name: folder name of the base, which LLaVA's rules on the template read.
            defaults: fields that hold where a stage keeps none.
            asked: fields that override all others; None asks for nothing.

        Raises:
            UserError: as the class; and ``anyres`` for a base without ``image_grid_pinpoints``.
        """
        values = {**(defaults or {}), **(getattr(config, "prompt", None) or {})}
        values |= {field: value for field, value in asked.items() if value is not None}
        if "aspect_ratio" not in values:
            values["aspect_ratio"] = getattr(config, "image_aspect_ratio", None) or "square"
        if "conv_mode" not in values:
            values["conv_mode"] = conv_mode_for(config, name)
        check_aspect_ratio(values["aspect_ratio"], config)
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Prompt:
        """The prompt that ``to_dict`` gave.

        Raises:
            UserError: a field that this version does not know, or a bad value.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise UserError(
                f"the prompt has an unknown field {unknown[0]!r}; it was written by a newer version, update"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for files and records."""
        return asdict(self)

    def tell(self, config: Any) -> None:
        """Write the prompt into a model's config, where the model and other programs look for it."""
        config.image_aspect_ratio = self.aspect_ratio
        config.conversation_version = self.conv_mode
        config.prompt = self.to_dict()

    def difference(self, other: Mapping[str, Any]) -> str:
        """What decides an answer and is not as in ``other``: ``"aspect_ratio is 'pad', was 'square'"``; else empty."""
        names = [field.name for field in fields(self) if field.name != "max_length"]
        mine = self.to_dict()
        found = [name for name in names if name in other and other[name] != mine[name]]
        if "conv_mode" in found and get_conversation(mine["conv_mode"]) == get_conversation(other["conv_mode"]):
            found.remove("conv_mode")  # two names of one template, such as v1 and vicuna_v1
        return "; ".join(f"{name} is {mine[name]!r}, was {other[name]!r}" for name in found)


def check_aspect_ratio(mode: Any, config: Any = None) -> None:
    """Refuse a picture mode that is not known, or that the model of ``config`` cannot do.

    Raises:
        UserError: naming the nearest mode there is.
    """
    if mode not in ASPECT_RATIOS:
        near = difflib.get_close_matches(str(mode), ASPECT_RATIOS, 1, cutoff=0.0)[0]
        known = ", ".join(ASPECT_RATIOS)
        raise UserError(f"image_aspect_ratio {mode!r} is not known; did you mean {near!r}? (choose from {known})")
    if mode == "anyres" and config is not None:
        pinpoints = getattr(config, "image_grid_pinpoints", None)
        if not pinpoints:
            raise UserError(
                "image_aspect_ratio 'anyres' needs a base whose config.json has image_grid_pinpoints; "
                "this one has none (choose pad or square)"
            )
        parse_grid_pinpoints(pinpoints)


def pixels_of(pictures: Sequence[Any], image_processor: Any, config: Any, aspect_ratio: str) -> Tensor | list[Tensor]:
    """RGB pictures as the vision tower wants them under a picture mode, whatever the config's own mode is.

    Returns:
        as ``process_images``: ``[B, 3, H, W]``, or ``[B, tiles, 3, H, W]``, or a list where shapes differ.
    """
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    view = SimpleNamespace(image_aspect_ratio=aspect_ratio, image_grid_pinpoints=pinpoints)
    return process_images(list(pictures), image_processor, view)


class Sample(NamedTuple):
    """A row as model inputs; ``labels`` are ``IGNORE_INDEX`` outside of answers, ``pictures`` in their ids' order."""

    input_ids: list[int]
    labels: list[int]
    pictures: list[Picture]


class PromptEncoder:
    """Rows and conversations as ids, labels and pixels, for one prompt and one model.

    Args:
        prompt: how to ask.
        tokenizer, image_processor: the model's; no image processor for a model without a vision tower.
        config: the model's config (``mm_use_im_start_end``, ``image_grid_pinpoints``, and what tells the number of
            features a picture becomes); its own picture mode and template are not read.
        image_folder: folder that the rows' file names are relative to.
        cache_megabytes: memory for preprocessed pictures, since many questions share one.
    """

    def __init__(
        self,
        prompt: Prompt,
        tokenizer: Any,
        image_processor: Any,
        config: Any,
        image_folder: Folder | None = None,
        cache_megabytes: int = 256,
    ) -> None:
        self.prompt, self.tokenizer, self.image_processor, self.config = prompt, tokenizer, image_processor, config
        self.image_folder = image_folder
        self.im_start_end = bool(getattr(config, "mm_use_im_start_end", False))
        self.pictures = PictureCache(cache_megabytes * 2**20)

    @functools.cached_property
    def image_tokens(self) -> int:
        """The most features one picture becomes in the language model."""
        return image_token_count(self.config, self.image_processor, self.prompt.aspect_ratio)

    def check(self, rows: Sequence[Row]) -> None:
        """``UserError`` for a row with a system turn that the template has no place for, before any is asked."""
        spoken = next((row for row in rows if row.system is not None), None)
        if spoken is not None:
            self.tokens(spoken, answer=False)

    def encode(self, row: Row, answer: bool) -> Sample:
        """A row for training (``answer``: all its turns, with labels) or for answering (its first question, open).

        Raises:
            UserError: naming the row: text and picture don't fit, the picture is damaged, no room for an answer.
        """
        ids, labels = self.tokens(row, answer)
        return Sample(ids, labels, [self.picture(row, name) for name in pictures_of(row, ids)])

    def tokens(self, row: Row, answer: bool) -> tuple[list[int], list[int]]:
        """Ids and labels of ``encode``; training samples are cut to the prompt's length, questions never are."""
        styled = in_lower_case(row) if self.prompt.answer_style == "lower" else row
        turns, images = (styled.conversations, row.images) if answer else (styled.conversations[:1], row.shown)
        try:
            ids, labels = self.conversation(turns, len(images), row.system)
            if ids.count(IMAGE_TOKEN_INDEX) != len(images):
                raise UserError(wrong_count(ids.count(IMAGE_TOKEN_INDEX), len(images)))
            limit = self.prompt.max_length if answer else None
            return truncate(ids, labels, limit, self.image_tokens) if limit else (ids, labels)
        except UserError as error:
            raise UserError(f"row {row.id!r}: {error}") from error

    def conversation(
        self, turns: Sequence[Turn], images: int, system: str | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of turns, the suffix after each question; without a last answer the prompt stays open.

        Args:
            images: pictures that belong to the turns. system: replaces the template's system text.
        """
        if images and self.image_processor is None:
            raise UserError("it has a picture but the model has no vision tower (is it a LLaVA checkpoint?)")
        asked = [(who, self._with_suffix(text) if who == HUMAN else text) for who, text in turns]
        return conversation_ids(asked, self.tokenizer, self.prompt.conv_mode, images, self.im_start_end, system)

    def _with_suffix(self, text: str) -> str:
        """The question with ``<image>`` in front, so that the suffix stands at the end."""
        if not self.prompt.answer_suffix:
            return text
        return f"{place_image(text, text.count(DEFAULT_IMAGE_TOKEN))}\n{self.prompt.answer_suffix}"

    def pixels(self, pictures: Sequence[Any]) -> Tensor | list[Tensor]:
        """RGB pictures as ``pixels_of`` gives them."""
        return pixels_of(pictures, self.image_processor, self.config, self.prompt.aspect_ratio)

    def picture(self, row: Row, name: str) -> Picture:
        """Pixels and size of one of a row's pictures, opened once while the cache holds it."""
        found = self.pictures.get(name)
        if found is None:
            found = self.open_picture(row, name)
            self.pictures.put(name, found)
        return found

    def open_picture(self, row: Row, name: str) -> Picture:
        """Pixels and size of one of a row's pictures, from its file; safe to call from several threads.

        Raises:
            UserError: naming row and file, if the picture cannot be read.
        """
        try:
            picture = load_image(inside(self.image_folder or "", name))
        except UserError as error:
            raise UserError(f"row {row.id!r}: {error}") from error
        return self.pixels([picture])[0], picture.size


def pictures_of(row: Row, ids: Sequence[int]) -> tuple[str, ...]:
    """The row's pictures that ids have a place for; those of turns that were cut off are left out."""
    return row.images[: list(ids).count(IMAGE_TOKEN_INDEX)]


class PictureCache:
    """Preprocessed pictures by file name; the ones used longest ago go first when the byte limit is reached."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.entries: OrderedDict[str, Picture] = OrderedDict()

    def get(self, name: str) -> Picture | None:
        """The picture, which counts as used now; None where it is not held."""
        if name not in self.entries:
            return None
        self.entries.move_to_end(name)
        return self.entries[name]

    def put(self, name: str, entry: Picture) -> None:
        """Hold a picture as long as the limit allows."""
        self.entries[name] = entry
        self.used += entry[0].nbytes
        while self.used > self.limit:
            self.used -= self.entries.popitem(last=False)[1][0].nbytes
