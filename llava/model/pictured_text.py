"""Pictures of a batch and their place in the text: the vision half of a LLaVA model, for every back-end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llava.model.splice import count_placeholders, splice
from llava.model.vision.hand_out import Images, check_modalities, hand_out, read_entries, sizes_of
from llava.model.vision.tiles import merge_tiles
from llava.utils import UserError, rank0_print


class PicturedText:
    """Hands pictures out to rows, encodes them, and splices them into the text.

    Mixed into a causal language model with ``get_model()`` (tower, projector, embeddings) and ``config``.

    Attributes:
        prompts_cut: how many rows were longer than the model's window, ``config.tokenizer_model_max_length``.
    """

    get_model: Callable[[], Any]
    config: Any
    training: bool
    prompts_cut = 0

    def get_vision_tower(self):
        return self.get_model().get_vision_tower()

    # -- pictures ------------------------------------------------------------------------------------------------

    def hand_out(self, input_ids, attention_mask, images: Images | None, image_sizes=None, modalities=None):
        """``(images, image_sizes)`` with one list per row (see ``vision.hand_out``); ``(None, None)`` without any.

        Raises:
            ValueError: as ``vision.hand_out``; a placeholder without a picture, or without a vision tower; a video.
        """
        check_modalities(modalities)
        if input_ids is None or (input_ids.shape[1] == 1 and images is None):
            return images, image_sizes
        wanted, tower = count_placeholders(input_ids, attention_mask), self.get_vision_tower()
        if tower is None and any(wanted):
            raise UserError(f"row {wanted.index(max(wanted))} has an <image>, but the model has no vision tower")
        if tower is None:
            return None, None
        handed = hand_out(images, wanted, image_sizes, self._anyres)
        if not any(wanted):
            return None, None
        return [[picture.to(tower.device) for picture in row] for row in handed.pictures], handed.sizes

    def read_images(self, images: Images) -> list[list[Tensor]]:
        """The pictures ``[tiles, 3, h, w]`` of each entry of ``images``."""
        return read_entries(images, self._anyres)

    @property
    def _anyres(self) -> bool:
        return getattr(self.config, "image_aspect_ratio", None) == "anyres"

    def vision_features(self, images: Images) -> list[list[Tensor]]:
        """Tower features per sample and image: ``[[ [tiles, patches, mm_hidden_size], ...], ...]``.

        ``images`` have an entry per sample, as ``hand_out`` gives them.
        """
        pictures = self.read_images(images)
        flat = [picture for sample in pictures for picture in sample]
        if not flat:
            return [[] for _ in pictures]
        tower, dtype = self.get_vision_tower(), self.get_model().embed_tokens.weight.dtype
        if self.training:
            pieces = iter(tower(torch.cat(flat).to(dtype)).split([len(picture) for picture in flat]))
        else:  # each picture by itself: kernels are picked by batch size, and a route must not depend on its batch
            pieces = iter([tower(picture.to(dtype)) for picture in flat])
        return [[next(pieces) for _ in sample] for sample in pictures]

    def project_features(self, features: list[list[Tensor]], image_sizes=None) -> list[list[Tensor]]:
        """Projected features per sample and image: ``[tokens, hidden]``, tiles merged as the config says."""
        model, sizes = self.get_model(), sizes_of(features, image_sizes)
        newline = getattr(model, "image_newline", None)
        flat = [picture for sample in features for picture in sample]
        if not flat:
            return features
        projected = model.mm_projector(torch.cat(flat)).split([len(picture) for picture in flat])
        tower = self.get_vision_tower()
        merged = iter(
            merge_tiles(tiles, size, self.config, tower.num_patches_per_side, tower.image_size, newline)
            for tiles, size in zip(projected, sizes, strict=True)
        )
        return [[next(merged) for _ in sample] for sample in features]

    def encode_images(self, images: Tensor) -> Tensor:
        """LLaVA's helper: ``[images, 3, h, w] -> [images, patches, hidden]``, of any float type."""
        dtype = self.get_model().embed_tokens.weight.dtype
        return self.get_model().mm_projector(self.get_vision_tower()(images.to(dtype)))

    # -- text and pictures together --------------------------------------------------------------------------------

    def _splice(self, input_ids, attention_mask, labels, features, padding_side=None, prefix=None):
        """``splice.splice`` with this model's embeddings, window and padding side."""
        side = padding_side or getattr(self.config, "tokenizer_padding_side", None) or "right"
        window = getattr(self.config, "tokenizer_model_max_length", None)
        embed = self.get_model().embed_tokens
        spliced = splice(embed, input_ids, attention_mask, labels, features, side, window, prefix)
        cut = [lost for lost in spliced.cut if lost]
        if cut and not self.prompts_cut:
            rank0_print(
                f"note: a prompt is longer than the model's window of {window} positions; {max(cut)} tokens are cut "
                "from the end of its question (said once)"
            )
        self.prompts_cut += len(cut)
        return spliced
