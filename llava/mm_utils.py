"""LLaVA's helpers for pictures and prompts: letter-box, any-resolution tiles, ``<image>`` in token ids, stop words.

Names, arguments and results are LLaVA's, so that scripts written against it run; ``load_image`` is in ``image_io``.
"""

from __future__ import annotations

import ast
import base64
import math
import re
from pathlib import PurePath
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.image_io import MAX_PIXELS, expand2square, load_image, open_image, to_rgb
from llava.utils import UserError

__all__ = [
    "KeywordsStoppingCriteria",
    "bos_ids",
    "divide_to_patches",
    "expand2square",
    "get_anyres_image_grid_shape",
    "get_model_name_from_path",
    "load_image",
    "load_image_from_base64",
    "process_anyres_image",
    "process_images",
    "resize_and_pad_image",
    "select_best_resolution",
    "tokenizer_image_token",
]

Size = tuple[int, int]
_KEPT_OF_STRIP = 16
"""Widths that are kept of a strip's length."""


def select_best_resolution(original_size: Size, possible_resolutions: list[Size]) -> Size:
    """The ``(width, height)`` that keeps most of the picture's pixels and, among equals, wastes the least area."""

    def fitness(resolution: Size) -> tuple[int, int]:
        width, height = resolution
        scale = min(width / original_size[0], height / original_size[1])
        shown = int(original_size[0] * scale) * int(original_size[1] * scale)
        kept = min(shown, original_size[0] * original_size[1])
        return kept, -(width * height - kept)

    width, height = max(possible_resolutions, key=fitness)
    return width, height


def resize_and_pad_image(image: Image.Image, target_resolution: Size) -> Image.Image:
    """Scale to fit ``target_resolution`` with the aspect ratio kept, centred on black."""
    width, height = image.size
    target_width, target_height = target_resolution
    if target_width / width < target_height / height:
        new_size = (target_width, min(math.ceil(height * target_width / width), target_height))
    else:
        new_size = (min(math.ceil(width * target_height / height), target_width), target_height)
    canvas = Image.new("RGB", (target_width, target_height), (0, 0, 0))
    canvas.paste(image.resize(new_size), ((target_width - new_size[0]) // 2, (target_height - new_size[1]) // 2))
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Square tiles of ``patch_size`` pixels, row by row."""
    width, height = image.size
    corners = [(left, top) for top in range(0, height, patch_size) for left in range(0, width, patch_size)]
    return [image.crop((left, top, left + patch_size, top + patch_size)) for left, top in corners]


def parse_grid_pinpoints(grid_pinpoints: str | list[Size]) -> list[Size]:
    """``image_grid_pinpoints`` of a config, a list or its text, as ``(width, height)`` pairs."""
    try:
        pairs = ast.literal_eval(grid_pinpoints) if isinstance(grid_pinpoints, str) else grid_pinpoints
        return [(int(width), int(height)) for width, height in pairs]
    except (ValueError, TypeError, SyntaxError) as error:
        raise UserError(
            f"image_grid_pinpoints must be a list of [width, height] pairs, not {grid_pinpoints!r} (mend config.json)"
        ) from error


def get_anyres_image_grid_shape(image_size: Size, grid_pinpoints: str | list[Size], patch_size: int) -> Size:
    """How many tiles of ``patch_size`` pixels the best resolution has, as ``(columns, rows)``."""
    width, height = select_best_resolution(image_size, parse_grid_pinpoints(grid_pinpoints))
    return width // patch_size, height // patch_size


def process_anyres_image(image: Image.Image, processor: Any, grid_pinpoints: str | list[Size]) -> torch.Tensor:
    """The whole picture squashed to one tile, then the tiles of its best resolution: ``[tiles, 3, H, W]``."""
    best = select_best_resolution(image.size, parse_grid_pinpoints(grid_pinpoints))
    edge = processor.size.get("shortest_edge") or processor.size["height"]
    tiles = divide_to_patches(resize_and_pad_image(image, best), picture_side(processor) or edge)
    return torch.stack([_pixels(tile, processor) for tile in [image.resize((edge, edge)), *tiles]])


def picture_side(processor: Any) -> int | None:
    """Side in pixels of the square pictures that an image processor gives; ``None`` without a processor."""
    sizes = [getattr(processor, name, None) for name in ("crop_size", "size")]
    return next((int(size["height"]) for size in sizes if size and size.get("height")), None)


def _pixels(image: Image.Image, processor: Any) -> torch.Tensor:
    return processor.preprocess(image, return_tensors="pt")["pixel_values"][0]  # [3, H, W]


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """Decode a base64 picture.

    Raises:
        UserError: the text is no base64 or holds no picture.
    """
    try:
        data = base64.b64decode(image)
    except ValueError as error:
        raise UserError("the base64 text holds no readable picture (send the bytes of an image file)") from error
    return open_image(data, "the base64 text")


def process_images(
    images: list[Image.Image], image_processor: Any, model_cfg: Any
) -> torch.Tensor | list[torch.Tensor]:
    """Pictures as the model wants them, after ``model_cfg.image_aspect_ratio``.

    ``pad`` letter-boxes with the processor's mean colour, ``anyres`` makes tiles, anything else resizes and crops the
    centre as CLIP does (the borders of a wide picture are lost).

    Returns:
        ``[B, 3, H, W]`` (``anyres``: ``[B, tiles, 3, H, W]``) when all shapes agree, else a list of tensors.
    """
    mode = getattr(model_cfg, "image_aspect_ratio", None)
    pictures = [image if image.mode == "RGB" else to_rgb(image) for image in images]
    if mode == "anyres":
        tensors = [process_anyres_image(image, image_processor, model_cfg.image_grid_pinpoints) for image in pictures]
    elif mode == "pad":
        background = tuple(int(mean * 255) for mean in image_processor.image_mean)
        tensors = [_pixels(expand2square(image, background), image_processor) for image in pictures]
    else:
        tensors = [_pixels(_without_far_ends(image, image_processor), image_processor) for image in pictures]
    same = tensors and all(tensor.shape == tensors[0].shape for tensor in tensors)
    return torch.stack(tensors) if same else tensors


def _without_far_ends(image: Image.Image, processor: Any) -> Image.Image:
    """The middle of a strip of which the processor would make gigabytes and keep the middle; others as they are."""
    edge = (processor.size or {}).get("shortest_edge")
    shorter, longer = sorted(image.size)
    if not edge or not getattr(processor, "do_center_crop", False) or longer * edge**2 / shorter <= MAX_PIXELS:
        return image
    width, height = (min(side, shorter * _KEPT_OF_STRIP) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def bos_ids(tokenizer: Any) -> list[int]:
    """``[bos]`` if the tokenizer puts a beginning-of-text token in front by itself, else ``[]``."""
    ids = tokenizer("")["input_ids"]
    return list(ids[:1]) if ids and ids[0] == tokenizer.bos_token_id else []


def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> list[int] | torch.Tensor:
    """Token ids of a prompt with ``image_token_index`` where ``<image>`` stands.

    The stretches between pictures are tokenised one by one, as LLaVA's checkpoints saw them, and one
    beginning-of-text token is kept in front.

    Raises:
        ValueError: ``return_tensors`` is neither ``None`` nor ``"pt"``.
    """
    ids = bos_ids(tokenizer)
    for index, stretch in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        ids += [image_token_index] if index else []
        ids += tokenizer(stretch, add_special_tokens=False)["input_ids"]
    if return_tensors is None:
        return ids
    if return_tensors != "pt":
        raise ValueError(f"unsupported tensor type: {return_tensors} (use 'pt')")
    return torch.tensor(ids, dtype=torch.long)


def get_model_name_from_path(model_path: str) -> str:
    """The folder's name; for ``…/name/checkpoint-N`` it is ``name_checkpoint-N``."""
    parts = [part for part in PurePath(re.sub(r"[\\/]+", "/", model_path.strip())).parts if part != "/"]
    if not parts:
        raise UserError("the model path is empty (give a folder or a hub id with --model-path)")
    if parts[-1].startswith("checkpoint-") and len(parts) > 1:
        return f"{parts[-2]}_{parts[-1]}"
    return parts[-1]


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stop a row when its newest tokens are, or spell, one of the keywords; ``generate`` ends when all rows have.

    Args:
        keywords: texts that end an answer, such as ``"</s>"`` or ``"###"``.
        tokenizer: the model's tokenizer.
        input_ids: the prompt, ``[B, T]``; it is skipped where ``generate`` returns it in front of the new tokens.
    """

    def __init__(self, keywords: list[str], tokenizer: Any, input_ids: torch.Tensor) -> None:
        self.keywords = keywords
        self.tokenizer = tokenizer
        self.prompt = input_ids.cpu()
        self.keyword_ids = [tokenizer(keyword, add_special_tokens=False)["input_ids"] for keyword in keywords]
        # A keyword may be spelt with more tokens than on its own: every byte could be one, plus a leading space.
        self.max_keyword_len = max((len(keyword.encode()) + 1 for keyword in keywords), default=0)

    def call_for_batch(self, output_ids: torch.Tensor, scores: Any = None, **kwargs: Any) -> bool:
        """True when the one row ``output_ids`` ``[1, T]`` ends with a keyword."""
        output_ids = output_ids.cpu()
        tail = output_ids[0, self._start(output_ids) :][-self.max_keyword_len :].tolist() if self.keywords else []
        if any(ids and tail[-len(ids) :] == ids for ids in self.keyword_ids):
            return True
        text = self.tokenizer.decode(tail, skip_special_tokens=True) if tail else ""
        return any(keyword in text for keyword in self.keywords)

    def __call__(self, output_ids: torch.Tensor, scores: Any = None, **kwargs: Any) -> torch.Tensor:
        """Which rows are done: ``[B]`` booleans."""
        host = output_ids.cpu()  # once for all rows
        done = [self.call_for_batch(host[row : row + 1], scores) for row in range(len(host))]
        return torch.tensor(done, dtype=torch.bool, device=output_ids.device)

    def _start(self, output_ids: torch.Tensor) -> int:
        """Where the new tokens begin; 0 when ``generate`` ran on embeddings and returns new tokens only."""
        length = self.prompt.shape[1]
        if output_ids.shape[1] < length:
            return 0
        echoed = (self.prompt == output_ids[0, :length]).all(dim=1).any()
        return length if echoed else 0
