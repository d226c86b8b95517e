"""The frozen CLIP vision tower.

Its weights come either from the LLaVA checkpoint itself (``vision_config`` in the checkpoint's config) or from the
folder or hub name in ``mm_vision_tower``, loaded on demand by ``load_model``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil as CLIPImageProcessor  # the one that needs no torchvision
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.utils import UserError


class CLIPVisionTower(nn.Module):
    """CLIP patches of one hidden layer: ``[images, 3, height, width] -> [images, patches, mm_hidden_size]``.

    Args:
        vision_tower: name or path of the CLIP model; also found as ``mm_vision_tower`` in LLaVA's configs.
        args: object with ``mm_vision_select_layer`` (default -2) and ``mm_vision_select_feature`` (``patch`` drops the
            class token, ``cls_patch`` keeps it).
        vision_config: dict of a ``CLIPVisionConfig``; given when the checkpoint ships the tower's weights.
        delay_load: do not read weights from ``vision_tower`` yet.
    """

    def __init__(self, vision_tower: str, args, vision_config: dict | None = None, delay_load: bool = False):
        super().__init__()
        self.vision_tower_name = vision_tower
        self.select_layer = getattr(args, "mm_vision_select_layer", None)
        self.select_layer = -2 if self.select_layer is None else self.select_layer
        self.select_feature = getattr(args, "mm_vision_select_feature", None) or "patch"
        if self.select_feature not in ("patch", "cls_patch"):
            raise ValueError(f"mm_vision_select_feature must be 'patch' or 'cls_patch', not {self.select_feature!r}")
        self.image_processor = None
        self.is_loaded = False
        if vision_config is not None:
            self.vision_tower = CLIPVisionModel(CLIPVisionConfig(**vision_config))
            self._finish_loading()
        elif not delay_load:
            self.load_model()

    def load_model(self, device_map=None) -> None:
        """Read the tower's weights and image processor from ``vision_tower_name`` (once)."""
        if not self.is_loaded:
            try:
                self.vision_tower = CLIPVisionModel.from_pretrained(self.vision_tower_name, device_map=device_map)
            except OSError as error:
                raise UserError(
                    f"vision tower {self.vision_tower_name!r} cannot be read ({str(error).splitlines()[0]}); give a "
                    "local folder in the checkpoint's config.json as mm_vision_tower"
                ) from error
            self._finish_loading()
        if self.image_processor is None:
            self.image_processor = CLIPImageProcessor.from_pretrained(self.vision_tower_name)

    def _finish_loading(self) -> None:
        self.vision_tower.requires_grad_(False)
        self.is_loaded = True

    def feature_select(self, outputs) -> Tensor:
        """The chosen hidden layer of a CLIP output, with or without its class token."""
        features = outputs.hidden_states[self.select_layer]  # [images, 1 + patches, mm_hidden_size]
        return features[:, 1:] if self.select_feature == "patch" else features

    @torch.no_grad()
    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(images, list):
            return [self.forward(image.unsqueeze(0))[0] for image in images]
        outputs = self.vision_tower(images.to(device=self.device, dtype=self.dtype), output_hidden_states=True)
        return self.feature_select(outputs).to(images.dtype)

    @property
    def config(self) -> CLIPVisionConfig:
        if self.is_loaded:
            return self.vision_tower.config
        return CLIPVisionConfig.from_pretrained(self.vision_tower_name)

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.embeddings.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.embeddings.patch_embedding.weight.device

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2

    @property
    def dummy_feature(self) -> Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)


def shipped_image_processor(folder: Path, vision: CLIPVisionConfig) -> CLIPImageProcessor:
    """The image processor of a checkpoint that ships its tower: its own, else CLIP's for the tower's picture size."""
    if (folder / "preprocessor_config.json").is_file():
        return CLIPImageProcessor.from_pretrained(folder)
    size = vision.image_size
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
