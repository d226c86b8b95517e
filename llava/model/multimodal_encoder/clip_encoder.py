"""OpenAI's CLIP as a vision tower, as LLaVA-1.5 and LLaVA-Med use it."""

from __future__ import annotations

from transformers import (
    CLIPImageProcessorPil,  # the one that needs no torchvision
    CLIPVisionConfig,
    CLIPVisionModel,
)

from llava.model.multimodal_encoder.tower import TOWERS, VisionTower


@TOWERS.register
class CLIPVisionTower(VisionTower):
    """CLIP's patches; its config is that of a whole CLIP or of its vision half."""

    name = "clip"
    model_types = ("clip", "clip_vision_model")
    config_class = CLIPVisionConfig
    model_class = CLIPVisionModel
    processor_class = CLIPImageProcessorPil
