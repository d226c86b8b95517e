"""The one interface of vision towers, and how a tower's weights are read.

A tower is frozen unless a training stage unfreezes it. Its weights come either from the LLaVA checkpoint itself
(``vision_config`` in the checkpoint's config) or from the folder or hub name in ``mm_vision_tower``, loaded on demand
by ``load_model``. What kind of tower it is, its config says (``model_type``); each kind is one file of this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel

from llava.checkpoints.schemas import PICTURE_FILES, check_settings, has_processor
from llava.checkpoints.weights import first_line, lacking_tensors, weight_files
from llava.mm_utils import picture_side
from llava.outside import foreign
from llava.registry import Registry
from llava.utils import UserError

FEATURES = ("patch", "cls_patch")
"""LLaVA's ``mm_vision_select_feature``: patches alone, or with the tokens in front of them."""


_BEHIND_ALL_LAYERS = ("post_layernorm", "vision_tower.layernorm", "vision_tower.head")
"""Ends of names of what a tower does to its last layer, as CLIP, DINOv2 and SigLIP call it."""


_running: ContextVar[int | None] = ContextVar("layers that run", default=None)


class _Layers(nn.ModuleList):
    """A tower's layers, of which a pass may run the first alone (``first_layers``)."""

    def __iter__(self) -> Iterator[nn.Module]:
        return islice(super().__iter__(), _running.get())


@contextmanager
def first_layers(count: int | None) -> Iterator[None]:
    """In this thread the tower that is called meanwhile runs its first ``count`` layers; ``None``: all."""
    token = _running.set(count)
    try:
        yield
    finally:
        _running.reset(token)


class VisionTower(nn.Module):
    """Patches of one hidden layer: ``[images, 3, height, width] -> [images, patches, mm_hidden_size]``.

    Args:
        vision_tower: name or path of the tower; also found as ``mm_vision_tower`` in LLaVA's configs.
        args: object with ``mm_vision_select_layer`` (default -2) and ``mm_vision_select_feature`` (``patch`` drops the
            class token, ``cls_patch`` keeps it).
        delay_load: do not read weights from ``vision_tower`` yet.
        vision_config: dict of the tower's config; given when the checkpoint ships the tower's weights.

    Raises:
        UserError: a feature selection that this tower does not have.
    """

    name: ClassVar[str]
    """What this kind of tower is called."""
    model_types: ClassVar[tuple[str, ...]]
    """``model_type`` of the configs that are of this kind."""
    config_class: ClassVar[type[PretrainedConfig]]
    model_class: ClassVar[type[PreTrainedModel]]
    processor_class: ClassVar[Any]
    runs_layers: ClassVar[bool] = True
    """Whether its model goes through a list of like layers, of which those behind the chosen one need not run."""

    def __init__(
        self, vision_tower: str, args: object, delay_load: bool = False, vision_config: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.vision_tower_name = vision_tower
        layer = getattr(args, "mm_vision_select_layer", None)
        self.select_layer: int = -2 if layer is None else layer
        self.select_feature = getattr(args, "mm_vision_select_feature", None) or "patch"
        self.image_processor: BaseImageProcessor | None = None
        self.is_loaded = False
        self.check_selection()
        if vision_config is not None:
            self.vision_tower = self.model_class(self.config_class(**vision_config))
            self._finish_loading()
        elif not delay_load:
            self.load_model()

    def check_selection(self) -> None:
        """Refuse a feature selection that is unknown, and, of a loaded tower, a layer that it does not have."""
        if self.select_feature not in FEATURES:
            known = " or ".join(map(repr, FEATURES))
            raise UserError(f"mm_vision_select_feature must be {known}, not {self.select_feature!r}")
        if self.is_loaded and not -(self.layers + 1) <= self.select_layer <= self.layers:
            raise UserError(
                f"mm_vision_select_layer is {self.select_layer}; the tower has {self.layers} layers, give "
                f"-{self.layers} to -1"
            )

    @property
    def layers(self) -> int:
        """Layers that can be looked at, the embeddings not counted."""
        count: Any = self.vision_tower.config.num_hidden_layers
        return int(count)

    def load_model(self, device_map: str | dict[str, Any] | None = None) -> None:
        """Read the tower's weights and image processor from ``vision_tower_name`` (once).

        Raises:
            UserError: it cannot be read, is another kind of tower, or lacks tensors, which would be random otherwise.
        """
        if not self.is_loaded:
            self.vision_tower = self.read(self.vision_tower_name, device_map)
            self._finish_loading()
        if self.image_processor is None:
            self.image_processor = self.read_processor(self.vision_tower_name)

    def _finish_loading(self) -> None:
        self.vision_tower.requires_grad_(False)
        self.is_loaded = True
        self.check_selection()
        if self.runs_layers:
            self._layers.__class__ = _Layers

    @property
    def _layers(self) -> nn.ModuleList:
        return next((part for part in self.modules() if isinstance(part, nn.ModuleList)), nn.ModuleList())

    @property
    def depth(self) -> int:
        """Layers up to the chosen one, the embeddings not counted."""
        return self.select_layer if self.select_layer >= 0 else self.layers + 1 + self.select_layer

    @classmethod
    def read_config(cls, name: str) -> PretrainedConfig:
        """The config of the tower in a folder of its own, or of a hub model; ``OSError`` if it is not at hand."""
        return cls.config_class.from_pretrained(name)

    @classmethod
    def read(cls, name: str, device_map: str | dict[str, Any] | None = None) -> PreTrainedModel:
        """The tower in a folder of its own, or of a hub model, with every weight from its files.

        Raises:
            UserError: it cannot be read, or its files lack tensors or have other shapes.
        """
        try:
            if Path(name).is_dir():
                check_settings(Path(name), ("config.json",))
                weight_files(Path(name))  # refuses two sets of weights
            found = cls.config_class.get_config_dict(name)[0].get("model_type")
            if found not in (None, *cls.model_types):
                other = tower_kind(found, f"vision tower {name!r}").name
                raise UserError(f"vision tower {name!r} is a {other} tower and its name says {cls.name}; rename it")
            config = cls.read_config(name)
            loaded: Any = cls.model_class.from_pretrained(
                name, config=config, device_map=device_map, output_loading_info=True
            )
        except OSError as error:
            raise UserError(
                f"vision tower {name!r} cannot be read ({first_line(error)}); give a "
                "local folder in the checkpoint's config.json as mm_vision_tower"
            ) from error
        except RuntimeError as error:
            if "mismatch" not in str(error):
                raise
            raise UserError(
                f"vision tower {name!r}: tensors don't have the shapes that its config.json asks for; the config and "
                "the weights belong to different models"
            ) from error
        if lacking := lacking_tensors(loaded[1]):
            raise UserError(
                f"vision tower {name!r} lacks {len(lacking)} tensors, among them {', '.join(lacking[:4])}; copy the "
                "whole tower, with the names that transformers gives its tensors"
            )
        model: PreTrainedModel = loaded[0]
        return model

    @classmethod
    def read_processor(cls, name: str) -> BaseImageProcessor:
        """The image processor that lies beside a tower's weights."""
        check_settings(Path(name), PICTURE_FILES)
        with foreign(f"vision tower {name!r}: its image processor", "copy preprocessor_config.json again"):
            processor: BaseImageProcessor = cls.processor_class.from_pretrained(name)
        return processor

    @classmethod
    def default_processor(cls, config: PretrainedConfig) -> BaseImageProcessor:
        """What prepares pictures for a tower whose checkpoint ships no image processor."""
        size: Any = config.image_size
        processor: BaseImageProcessor = cls.processor_class(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )
        return processor

    @classmethod
    def shipped_processor(cls, folder: Path, config: PretrainedConfig) -> BaseImageProcessor:
        """The image processor of a checkpoint that ships its tower: its own, else the usual one for the tower."""
        if has_processor(folder):
            return cls.read_processor(str(folder))
        return cls.default_processor(config)

    @property
    def leading_tokens(self) -> int:
        """Tokens in front of the patches, such as the class token."""
        return 1

    def feature_select(self, image_forward_outs: Any) -> Tensor:
        """The chosen hidden layer of the tower's outputs, with or without the tokens in front of its patches."""
        return self._patches(_each_once(image_forward_outs.hidden_states, self.layers)[self.select_layer])

    def _patches(self, layer: Tensor) -> Tensor:
        """A hidden layer ``[images, leading + patches, hidden]`` without what is not asked for."""
        return layer[:, self.leading_tokens :] if self.select_feature == "patch" else layer

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(images, list):
            return [self.forward(image.unsqueeze(0))[0] for image in images]
        pixels = images.to(device=self.device, dtype=self.dtype)
        with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()):
            if not self.runs_layers or self.depth == 0:  # without a layer that runs none is noted
                return self.feature_select(self.vision_tower(pixels, output_hidden_states=True)).to(images.dtype)
            with first_layers(self.depth):
                outputs: Any = self.vision_tower(pixels, output_hidden_states=True)
            return self._patches(_each_once(outputs.hidden_states, self.depth)[-1]).to(images.dtype)

    def unseen(self) -> set[int]:
        """Ids of the parameters behind the chosen layer, which no gradient reaches."""
        named = self.named_modules()
        behind = [
            *list(self._layers)[self.depth :],
            *(part for name, part in named if name.endswith(_BEHIND_ALL_LAYERS)),
        ]
        return {id(parameter) for part in behind for parameter in part.parameters()}

    def tell(self, config: PretrainedConfig) -> None:
        """Write into a model's config what decides how many positions a picture takes."""
        config.mm_patches_per_side, config.mm_leading_tokens = self.num_patches_per_side, self.leading_tokens

    @property
    def trains(self) -> bool:
        """Whether a training stage has unfrozen any of its weights."""
        return any(parameter.requires_grad for parameter in self.vision_tower.parameters())

    @property
    def config(self) -> PretrainedConfig:
        return self.vision_tower.config if self.is_loaded else self.read_config(self.vision_tower_name)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vision_tower.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.vision_tower.parameters()).device

    @property
    def hidden_size(self) -> int:
        size: Any = self.config.hidden_size
        return int(size)

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures it looks at."""
        size: Any = self.config.image_size
        return picture_side(self.image_processor) or int(size)

    @property
    def num_patches_per_side(self) -> int:
        patch: Any = self.config.patch_size
        return self.image_size // int(patch)

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2

    @property
    def dummy_feature(self) -> Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)


def _each_once(states: Sequence[Tensor], layers: int) -> list[Tensor]:
    """What stands before the first layer and behind each of ``layers``: a language model once asked for its own layers
    has made transformers note each of these again."""
    return [states[0], *states[1 :: max((len(states) - 1) // max(layers, 1), 1)]]


def refuse_class_token(select_feature: str, name: str) -> None:
    """``UserError`` where a tower without a class token is asked for it."""
    if select_feature == "cls_patch":
        raise UserError(f"mm_vision_select_feature is 'cls_patch' and {name} has no class token; choose 'patch'")


TOWERS: Registry[type[VisionTower]] = Registry("vision tower", "llava.model.multimodal_encoder")
"""The kinds of towers; a further one is one file."""


def tower_kind(model_type: str | None, where: str) -> type[VisionTower]:
    """The kind of tower with a config's ``model_type``; CLIP where an old config names none.

    Raises:
        UserError: no tower of this type is known.
    """
    wanted = model_type or "clip_vision_model"
    for kind in TOWERS:
        if wanted in kind.model_types:
            return kind
    raise UserError(
        f"{where} is a {model_type!r}, and the towers known are {', '.join(TOWERS.names())}; name one of these in the "
        "checkpoint's config.json as mm_vision_tower"
    )
