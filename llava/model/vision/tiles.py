"""Merge the projected tiles of one picture into one run of tokens, as ``mm_patch_merge_type`` says.

``flat`` concatenates the tiles. ``spatial`` puts the tiles of an any-resolution picture back on their grid behind the
overview tile; ``spatial_unpad`` also cuts the letter-box away and ends every row with the learned newline.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from llava.mm_utils import get_anyres_image_grid_shape


def merge_tiles(tiles: Tensor, size, config, side: int, tile_pixels: int, newline: Tensor | None) -> Tensor:
    """``[tiles, side * side, hidden] -> [tokens, hidden]``.

    Args:
        size: the picture's original ``(width, height)`` in pixels; needed for more than one tile of ``spatial*``.
        side: patches along one side of a tile. ``tile_pixels``: pixels along one side of a tile.
        newline: ``[hidden]``, the learned end-of-row feature of ``*unpad``.
    """
    merge = getattr(config, "mm_patch_merge_type", None) or "flat"
    if merge == "flat":
        return tiles.flatten(0, 1)
    if not merge.startswith("spatial"):
        raise ValueError(f"unknown mm_patch_merge_type {merge!r}; known: flat, spatial, spatial_unpad")
    unpad = "unpad" in merge
    if len(tiles) == 1:
        return torch.cat([tiles[0], newline[None].to(tiles)]) if unpad else tiles[0]
    if size is None:
        raise ValueError("an any-resolution picture needs its original size in image_sizes")
    width, height = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, tile_pixels)
    shape = {"rows": height, "columns": width, "y": side}
    if not unpad:
        across = rearrange(tiles[1:], "(rows columns) (y x) hidden -> (rows y columns x) hidden", **shape)
        return torch.cat([tiles[0], across])
    picture = rearrange(tiles[1:], "(rows columns) (y x) hidden -> hidden (rows y) (columns x)", **shape)
    picture = unpad_image(picture, size)
    ends = newline[:, None, None].to(picture).expand(-1, picture.shape[1], 1)
    lines = rearrange(torch.cat([picture, ends], dim=-1), "hidden y x -> (y x) hidden")
    return torch.cat([tiles[0], lines])


def unpad_image(tensor: Tensor, original_size: tuple[int, int]) -> Tensor:
    """Cut the letter-box off ``[channels, height, width]`` features of a picture of ``(width, height)`` pixels."""
    original_width, original_height = original_size
    height, width = tensor.shape[1:]
    if original_width / original_height > width / height:
        new_height = int(original_height * (width / original_width))
        margin = (height - new_height) // 2
        return tensor[:, margin : height - margin, :]
    new_width = int(original_width * (height / original_height))
    margin = (width - new_width) // 2
    return tensor[:, :, margin : width - margin]
