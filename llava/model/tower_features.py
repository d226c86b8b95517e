"""Features of picture files by the frozen vision tower alone, without the language model.

Used where the same pictures are needed many times: queries of a data file, and training, where every epoch would run
the frozen tower again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from llava.image_io import load_image
from llava.mm_utils import process_images
from llava.model.builder import llava_config, load_vision_tower
from llava.utils import is_main_process


@torch.no_grad()
def tower_features(
    names: list[str],
    base: Path,
    image_folder: str | Path,
    batch_size: int = 16,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    purpose: str = "pictures",
) -> Iterator[tuple[str, Tensor, Tensor, tuple[int, int]]]:
    """For each picture file: its name, features ``[tiles, patches, mm_hidden_size]``, pixels ``[tiles, 3, h, w]`` and
    ``(width, height)``.

    Args:
        base: checkpoint folder that names or ships the tower. purpose: what the progress bar says.
    """
    tower, config = load_vision_tower(base, device).to(dtype), llava_config(base)
    starts = range(0, len(names), batch_size)
    for start in tqdm(starts, desc=purpose, unit="batch", disable=not is_main_process(), leave=False):
        batch = names[start : start + batch_size]
        pictures = [load_image(Path(image_folder) / name) for name in batch]
        pixels = process_images(pictures, tower.image_processor, config)
        tiles = [tile if tile.dim() == 4 else tile[None] for tile in pixels]
        features = tower(torch.cat(tiles).to(device=device, dtype=dtype)).split([len(tile) for tile in tiles])
        for name, picture, feature, tile in zip(batch, pictures, features, tiles, strict=True):
            yield name, feature, tile, picture.size
