"""What a LLaVA config says where its file says nothing: programs written for LLaVA read these fields without asking.

Class attributes: they are read, but not written into ``config.json``, and a value in the file goes before.
"""

from __future__ import annotations

from typing import ClassVar


class LlavaFields:
    """LLaVA's fields with a default, for a config class to inherit.

    ``mm_projector_type``, ``mm_vision_tower`` and ``mm_hidden_size`` have none: a config without them means something.
    """

    mm_use_im_start_end: ClassVar[bool] = False
    mm_use_im_patch_token: ClassVar[bool] = False
    mm_patch_merge_type: ClassVar[str] = "flat"
    mm_vision_select_layer: ClassVar[int] = -2
    mm_vision_select_feature: ClassVar[str] = "patch"
    mm_projector_lr: ClassVar[float | None] = None
    use_mm_proj: ClassVar[bool] = True
    tune_mm_mlp_adapter: ClassVar[bool] = False
    freeze_mm_mlp_adapter: ClassVar[bool] = False
    image_aspect_ratio: ClassVar[str] = "square"
    image_grid_pinpoints: ClassVar[list[list[int]] | None] = None
    tokenizer_padding_side: ClassVar[str] = "right"
    tokenizer_model_max_length: ClassVar[int | None] = None
