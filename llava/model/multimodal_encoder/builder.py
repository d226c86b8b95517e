"""Build the vision tower that a config names, by what its own config says it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from llava.checkpoints.schemas import read_settings
from llava.model.multimodal_encoder.tower import VisionTower, tower_kind
from llava.utils import UserError

NAMES = {
    r"siglip": "siglip_vision_model",
    r"dinov2.*registers": "dinov2_with_registers",
    r"dinov2": "dinov2",
    r"^efficientnet-lite\d$": "efficientnet_lite",
}
"""Hub and package names by what they hold, for towers that are not at hand yet; all others are CLIP's."""


def build_vision_tower(vision_tower_cfg: object, **kwargs: Any) -> VisionTower:
    """The tower of ``vision_tower_cfg`` (a model config, or the model arguments of a training run).

    With ``vision_config`` in the config the checkpoint ships the tower, and its weights load with the checkpoint.
    Otherwise ``mm_vision_tower`` (or ``vision_tower``) names a folder, a hub model or a package's weights.

    Raises:
        UserError: no tower is named, or its kind is not known.
    """
    name = getattr(vision_tower_cfg, "mm_vision_tower", None) or getattr(vision_tower_cfg, "vision_tower", None)
    shipped = getattr(vision_tower_cfg, "vision_config", None)
    if shipped is not None:
        kind = tower_kind(shipped.get("model_type"), "the tower of the checkpoint's vision_config")
        return kind(name or "", args=vision_tower_cfg, vision_config=shipped, **kwargs)
    if not name:
        raise UserError("the config names no vision tower; set mm_vision_tower to a tower's folder or hub name")
    return named_tower_kind(name)(name, args=vision_tower_cfg, **kwargs)


def named_tower_kind(name: str) -> type[VisionTower]:
    """The kind of the tower in a folder, by its config; of one that is not at hand, by its name.

    Raises:
        UserError: its kind is not known.
    """
    if (Path(name) / "config.json").is_file():
        values = read_settings(Path(name) / "config.json")
        return tower_kind(values.get("model_type"), f"vision tower {name!r}")
    found = next((kind for pattern, kind in NAMES.items() if re.search(pattern, name.lower())), None)
    return tower_kind(found, name)


def named_tower_config(name: str) -> PretrainedConfig:
    """The config of the tower in a folder of its own, or of a hub model.

    Raises:
        OSError: it is not at hand.
        UserError: its kind is not known.
    """
    return named_tower_kind(name).read_config(name)
