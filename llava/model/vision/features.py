"""Features of picture files by the frozen vision tower alone, without the language model.

Used where the same pictures are needed many times: queries of a data file, and training, where every epoch would run
the frozen tower again (``llava.model.vision.sights``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from llava.checkpoints.checkpoint import Checkpoint, Place
from llava.checkpoints.kinds import TOWER_PREFIX
from llava.devices import moved
from llava.model.configs import llava_config
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.tower import VisionTower
from llava.utils import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


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


def ahead(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """``function`` of each item, in order, worked out by so many threads while others are used; 0: when it is asked."""
    if not workers:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        coming: deque[Future[Result]] = deque()
        for item in items:
            coming.append(pool.submit(function, item))
            if len(coming) > 2 * workers:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def on_device(features: list[list[Tensor]], device: torch.device) -> list[list[Tensor]]:
    """Features of each row's pictures ``[tiles, patches, size]`` on a device, in one copy."""
    flat = [picture for row in features for picture in row]
    if not flat:
        return features
    there = iter(moved(torch.cat(flat), device).split(list(map(len, flat))))
    return [[next(there) for _ in row] for row in features]
