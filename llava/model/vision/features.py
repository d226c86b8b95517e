"""Features of picture files by the frozen vision tower alone, without the language model.

Used where the same pictures are needed many times: queries of a data file, and training, where every epoch would run
the frozen tower again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor

from llava.checkpoints.checkpoint import Checkpoint, Place
from llava.checkpoints.kinds import TOWER_PREFIX
from llava.image_io import load_image
from llava.inside import Folder, inside
from llava.model.configs import llava_config
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.tower import VisionTower
from llava.progress import Progress
from llava.utils import UserError


def load_vision_tower(place: Place, device: str = "cpu") -> VisionTower:
    """The tower of a LLaVA checkpoint without its language model, with ``image_processor`` set.

    Raises:
        UserError: the tower lacks tensors, or its kind is not known.
    """
    checkpoint = Checkpoint.open(place)
    config = llava_config(checkpoint)
    tower = build_vision_tower(config, delay_load=True)
    if not tower.is_loaded:
        tower.load_model()
        return tower.to(device).eval()
    state: dict[str, torch.Tensor] = {}
    names = checkpoint.llava_names
    places = [key for key, name in names.items() if name.startswith(TOWER_PREFIX)]
    for key, value in checkpoint.read_tensors(places).items():
        state[names[key].removeprefix(TOWER_PREFIX).replace(".vision_model.", ".")] = value.float()
    missing, unexpected = tower.load_state_dict(state, strict=False)
    unexpected = [key for key in unexpected if not key.endswith("position_ids")]
    if missing or unexpected:
        raise UserError(f"{checkpoint}: vision tower weights do not fit; missing {missing}, unexpected {unexpected}")
    tower.image_processor = tower.shipped_processor(checkpoint.folder, tower.config)
    return tower.to(device).eval()


@torch.no_grad()
def tower_features(
    names: list[str],
    tower: VisionTower,
    image_folder: Folder,
    preprocess: Callable[[list[Image.Image]], Tensor | list[Tensor]],
    batch_size: int = 16,
    purpose: str = "pictures",
) -> Iterator[tuple[str, Tensor, Tensor, tuple[int, int]]]:
    """For each picture file: its name, features ``[tiles, patches, mm_hidden_size]``, pixels ``[tiles, 3, h, w]`` and
    ``(width, height)``.

    Args:
        tower: with its weights; it runs where it is and in the type it has.
        preprocess: RGB pictures to pixels, ``[3, h, w]`` or ``[tiles, 3, h, w]`` each. purpose: in words.
    """
    for start in Progress(purpose, "batch", range(0, len(names), batch_size)):
        batch = names[start : start + batch_size]
        pictures = [load_image(inside(image_folder, name)) for name in batch]
        tiles = [tile if tile.dim() == 4 else tile[None] for tile in preprocess(pictures)]
        pixels = torch.cat(tiles).to(device=tower.device, dtype=tower.dtype)
        features = tower(pixels).split([len(tile) for tile in tiles])
        for name, picture, feature, tile in zip(batch, pictures, features, tiles, strict=True):
            yield name, feature, tile, picture.size


def on_device(features: list[list[Tensor]], device: torch.device) -> list[list[Tensor]]:
    """Features of each row's pictures ``[tiles, patches, size]`` on a device, in one copy."""
    flat = [picture for row in features for picture in row]
    if not flat:
        return features
    moved = iter(torch.cat(flat).to(device).split(list(map(len, flat))))
    return [[next(moved) for _ in row] for row in features]
