"""SigLIP as a vision tower (arXiv 2303.15343), as LLaVA-NeXT's later models use it."""

from __future__ import annotations

from transformers import (
    BaseImageProcessor,
    PretrainedConfig,
    SiglipImageProcessorPil,  # the one that needs no torchvision
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava.model.multimodal_encoder.tower import TOWERS, VisionTower, refuse_class_token


@TOWERS.register
class SigLipVisionTower(VisionTower):
    """SigLIP's patches; it has no class token, so ``cls_patch`` is refused."""

    name = "siglip"
    model_types = ("siglip", "siglip_vision_model")
    config_class = SiglipVisionConfig
    model_class = SiglipVisionModel
    processor_class = SiglipImageProcessorPil

    def check_selection(self) -> None:
        super().check_selection()
        refuse_class_token(self.select_feature, "SigLIP")

    @classmethod
    def default_processor(cls, config: PretrainedConfig) -> BaseImageProcessor:
        size = config.image_size
        processor: BaseImageProcessor = cls.processor_class(size={"height": size, "width": size})
        return processor

    @property
    def leading_tokens(self) -> int:
        return 0
