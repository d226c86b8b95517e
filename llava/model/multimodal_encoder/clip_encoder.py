"""The frozen CLIP vision tower.

Its weights come either from the LLaVA checkpoint itself (``vision_config`` in the checkpoint's config) or from the
folder or hub name in ``mm_vision_tower``, loaded on demand by ``load_model``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil as CLIPImageProcessor  # the one that needs no torchvision
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava.checkpoints.weights import first_line, lacking_tensors, weight_files
from llava.utils import UserError

TOWER_TYPES = ("clip", "clip_vision_model")
"""``model_type`` of the configs a tower is read from: a whole CLIP, or its vision half."""


class CLIPVisionTower(nn.Module):
    """CLIP patches of one hidden layer: ``[images, 3, height, width] -> [images, patches, mm_hidden_size]``.

    Args:
        vision_tower: name or path of the CLIP model; also found as ``mm_vision_tower`` in LLaVA's configs.
        args: object with ``mm_vision_select_layer`` (default -2) and ``mm_vision_select_feature`` (``patch`` drops the
            class token, ``cls_patch`` keeps it).
        vision_config: dict of a ``CLIPVisionConfig``; given when the checkpoint ships the tower's weights.
        delay_load: do not read weights from ``vision_tower`` yet.
    """

    def __init__(
        self, vision_tower: str, args: object, vision_config: dict[str, Any] | None = None, delay_load: bool = False
    ) -> None:
        super().__init__()
        self.vision_tower_name = vision_tower
        layer = getattr(args, "mm_vision_select_layer", None)
        self.select_layer: int = -2 if layer is None else layer
        self.select_feature = getattr(args, "mm_vision_select_feature", None) or "patch"
        if self.select_feature not in ("patch", "cls_patch"):
            raise ValueError(f"mm_vision_select_feature must be 'patch' or 'cls_patch', not {self.select_feature!r}")
        self.image_processor: CLIPImageProcessor | None = None
        self.is_loaded = False
        if vision_config is not None:
            self.vision_tower = CLIPVisionModel(CLIPVisionConfig(**vision_config))
            self._finish_loading()
        elif not delay_load:
            self.load_model()

    def load_model(self, device_map: str | dict[str, Any] | None = None) -> None:
        """Read the tower's weights and image processor from ``vision_tower_name`` (once).

        Raises:
            UserError: it cannot be read, is no CLIP tower, or lacks tensors, which would be random otherwise.
        """
        if not self.is_loaded:
            self.vision_tower = read_named_tower(self.vision_tower_name, device_map)
            self._finish_loading()
        if self.image_processor is None:
            self.image_processor = CLIPImageProcessor.from_pretrained(self.vision_tower_name)

    def _finish_loading(self) -> None:
        self.vision_tower.requires_grad_(False)
        self.is_loaded = True

    def feature_select(self, outputs: BaseModelOutputWithPooling) -> Tensor:
        """The chosen hidden layer of a CLIP output, with or without its class token."""
        layers: Any = outputs.hidden_states  # asked for in ``forward``
        # A language model that was once asked for its own layers has made transformers note each of these again.
        layers = [layers[0], *layers[1 :: max((len(layers) - 1) // self.config.num_hidden_layers, 1)]]
        features: Tensor = layers[self.select_layer]  # [images, 1 + patches, mm_hidden_size]
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
        return named_tower_config(self.vision_tower_name)

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
        config: Any = self.config  # its sizes are plain numbers in every CLIP
        return config.image_size // config.patch_size

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2

    @property
    def dummy_feature(self) -> Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)


def named_tower_config(name: str) -> CLIPVisionConfig:
    """The config of the CLIP tower in a folder of its own, or of a hub model.

    Raises:
        OSError: it is not at hand.
        UserError: it is no CLIP tower.
    """
    model_type = CLIPVisionConfig.get_config_dict(name)[0].get("model_type")
    if model_type not in (None, *TOWER_TYPES):
        raise UserError(
            f"vision tower {name!r} is a {model_type!r}, and CLIP towers are known; name a CLIP folder in the "
            "checkpoint's config.json as mm_vision_tower"
        )
    return CLIPVisionConfig.from_pretrained(name)


def read_named_tower(name: str, device_map: str | dict[str, Any] | None = None) -> CLIPVisionModel:
    """The CLIP tower in a folder of its own, or of a hub model, with every weight from its files.

    Raises:
        UserError: it cannot be read, is no CLIP tower, or its files lack tensors or have other shapes.
    """
    try:
        named_tower_config(name)
        if Path(name).is_dir():
            weight_files(Path(name))  # refuses two sets of weights
        loaded: Any = CLIPVisionModel.from_pretrained(name, device_map=device_map, output_loading_info=True)
    except OSError as error:
        raise UserError(
            f"vision tower {name!r} cannot be read ({first_line(error)}); give a "
            "local folder in the checkpoint's config.json as mm_vision_tower"
        ) from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise UserError(
            f"vision tower {name!r}: tensors don't have the shapes that its config.json asks for; the config and the "
            "weights belong to different models"
        ) from error
    model: CLIPVisionModel = loaded[0]
    if lacking := lacking_tensors(loaded[1]):
        raise UserError(
            f"vision tower {name!r} lacks {len(lacking)} tensors, among them {', '.join(lacking[:4])}; copy the whole "
            "tower, with the names that transformers gives its tensors"
        )
    return model


def shipped_image_processor(folder: Path, vision: CLIPVisionConfig) -> CLIPImageProcessor:
    """The image processor of a checkpoint that ships its tower: its own, else CLIP's for the tower's picture size."""
    if (folder / "preprocessor_config.json").is_file():
        return CLIPImageProcessor.from_pretrained(folder)
    size: Any = vision.image_size
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
