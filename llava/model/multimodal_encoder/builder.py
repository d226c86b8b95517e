"""Build the vision tower that a config names."""

from __future__ import annotations

from typing import Any

from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.utils import UserError


def build_vision_tower(vision_tower_cfg: object, **kwargs: Any) -> CLIPVisionTower:
    """The tower of ``vision_tower_cfg`` (a model config, or the model arguments of a training run).

    With ``vision_config`` in the config the checkpoint ships the tower, and its weights load with the checkpoint.
    Otherwise ``mm_vision_tower`` (or ``vision_tower``) names a CLIP folder or hub model.
    """
    name = getattr(vision_tower_cfg, "mm_vision_tower", None) or getattr(vision_tower_cfg, "vision_tower", None)
    shipped = getattr(vision_tower_cfg, "vision_config", None)
    if not name and shipped is None:
        raise UserError("the config names no vision tower; set mm_vision_tower to a CLIP folder or hub name")
    return CLIPVisionTower(name or "", args=vision_tower_cfg, vision_config=shipped, **kwargs)
