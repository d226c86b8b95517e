"""DINOv2 as a vision tower (arXiv 2304.07193), with or without registers (arXiv 2309.16588)."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import (
    BitImageProcessorPil,  # the one that needs no torchvision
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PretrainedConfig,
    PreTrainedModel,
)

from llava.model.multimodal_encoder.tower import TOWERS, VisionTower


@TOWERS.register
class DinoV2VisionTower(VisionTower):
    """DINOv2's patches. Position embeddings are interpolated to the size that its image processor gives pictures."""

    name = "dinov2"
    model_types = ("dinov2",)
    config_class: ClassVar[type[PretrainedConfig]] = Dinov2Config
    model_class: ClassVar[type[PreTrainedModel]] = Dinov2Model
    processor_class = BitImageProcessorPil


@TOWERS.register
class DinoV2RegistersVisionTower(DinoV2VisionTower):
    """DINOv2 with registers, which stand between the class token and the patches and count as tokens in front."""

    name = "dinov2_with_registers"
    model_types = ("dinov2_with_registers",)
    config_class = Dinov2WithRegistersConfig
    model_class = Dinov2WithRegistersModel

    @property
    def leading_tokens(self) -> int:
        registers: Any = self.vision_tower.config.num_register_tokens
        return 1 + int(registers)
