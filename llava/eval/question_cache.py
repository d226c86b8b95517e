"""What a model's frozen parts make of pictures and questions, kept for every stage that is asked about them.

All stages over one base share its vision tower and their text encoder: each picture is opened once and goes through the
tower once, by itself, so that nothing depends on which questions are answered together; each question is encoded once.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava.data.prompt import Picture, PromptEncoder
from llava.data.rows import Row
from llava.slots.encoders import TextEncoder, encoder_from_identity
from llava.slots.names import KINDS
from llava.slots.picture_query import image_queries, image_query_dim

MEGABYTES = 2048
"""Memory for features, about 1700 pictures of LLaVA-1.5 in half precision; as much again for a model's prefixes."""

RECENT = 64
"""Pictures beyond that memory that are kept while their neighbours are asked about."""


@dataclass(frozen=True)
class Sight:
    """A picture as the tower saw it, on the CPU.

    Attributes:
        features: ``[tiles, patches, mm_hidden_size]``.
        queries: by kind the image query ``[image_dim]``.
        size: ``(width, height)`` of the file.
    """

    features: Tensor
    queries: dict[str, Tensor]
    size: tuple[int, int]


class BlankEncoder(PromptEncoder):
    """Shows a blank in place of each picture: its size, in the colour that LLaVA pads with."""

    def open_picture(self, row: Row, name: str) -> Picture:
        """Pixels of the blank, and the file's size; a picture that cannot be read is still an error."""
        _, size = super().open_picture(row, name)
        colour = tuple(int(mean * 255) for mean in self.image_processor.image_mean)
        return self.pixels([Image.new("RGB", size, colour)])[0], size


class QuestionCache:
    """Sights and text encoders of one base model.

    What is kept first stays: stages ask about the same pictures in the same order, where dropping the oldest would drop
    each picture just before it is needed.

    Args:
        megabytes: memory for pictures; those that find no room are looked at again for each stage.
    """

    def __init__(self, megabytes: int = MEGABYTES) -> None:
        self.limit, self.used = megabytes * 2**20, 0
        self.sights: dict[tuple, Sight] = {}
        self.recent: OrderedDict[tuple, Sight] = OrderedDict()
        self.blanks: dict[bytes, Sight] = {}
        self.coming: dict[tuple, Future[Picture]] = {}
        self.encoders: dict[str, TextEncoder] = {}
        self.model: Callable[[], Any] = lambda: None

    def look_with(self, model: Any) -> None:
        """Look with this model's tower from now on; what another one saw is forgotten."""
        if self.model() is not model:
            for kept in (self.sights, self.recent, self.blanks, self.coming):
                kept.clear()
            self.used, self.model = 0, weakref.ref(model)

    def encoder(self, identity: dict[str, Any], base: Any) -> TextEncoder:
        """The text encoder of this identity; it remembers the questions it has encoded."""
        name = json.dumps(identity, sort_keys=True)
        if name not in self.encoders:
            self.encoders[name] = encoder_from_identity(identity, base)
        return self.encoders[name]

    def read_ahead(self, rows: Sequence[Row], encoder: PromptEncoder, pool: ThreadPoolExecutor) -> None:
        """Open the rows' pictures that are not known yet while something else is worked on."""
        for row in rows:
            for name in row.shown:
                key = _key(name, encoder)
                if self._known(key) is None and key not in self.coming:
                    self.coming[key] = pool.submit(encoder.open_picture, row, name)

    @staticmethod
    def names(row: Row, encoder: PromptEncoder) -> list[tuple]:
        """What tells the pictures of the row's question from all others."""
        return [_key(name, encoder) for name in row.shown]

    def look(self, row: Row, encoder: PromptEncoder, model: Any) -> list[Sight]:
        """The pictures of the row's question as ``model`` sees them.

        Raises:
            UserError: a picture cannot be read, naming row and file.
        """
        return [self._look(row, name, encoder, model) for name in row.shown]

    @torch.no_grad()
    def _look(self, row: Row, name: str, encoder: PromptEncoder, model: Any) -> Sight:
        key = _key(name, encoder)
        if (found := self._known(key)) is not None:
            return found
        ahead = self.coming.pop(key, None)
        pixels, size = encoder.open_picture(row, name) if ahead is None else ahead.result()
        if not isinstance(encoder, BlankEncoder):
            return self._keep(key, self._seen(pixels, size, model))
        alike = hashlib.sha256(str(pixels.shape).encode() + pixels.numpy().tobytes()).digest()
        if alike not in self.blanks:  # most blanks have the same pixels
            self.blanks[alike] = self._seen(pixels, size, model)
        self.sights[key] = replace(self.blanks[alike], size=size)
        return self.sights[key]

    @staticmethod
    def _seen(pixels: Tensor, size: tuple[int, int], model: Any) -> Sight:
        pixels = pixels.to(model.device)
        features = model.vision_features([pixels])[0][0]
        tiles = pixels if pixels.dim() == 4 else pixels[None]
        queries = {
            kind: image_queries(kind, [[features]], [[tiles]], image_query_dim(kind, features.shape[-1]))[0].cpu()
            for kind in KINDS
        }
        return Sight(features.cpu(), queries, size)

    def _known(self, key: tuple) -> Sight | None:
        return self.sights.get(key) or self.recent.get(key)

    def _keep(self, key: tuple, sight: Sight) -> Sight:
        taken = sight.features.nbytes
        if self.used + taken <= self.limit:
            self.sights[key] = sight
            self.used += taken
            return sight
        self.recent[key] = sight
        if len(self.recent) > RECENT:
            self.recent.popitem(last=False)
        return sight


def _key(name: str, encoder: PromptEncoder) -> tuple:
    return str(encoder.image_folder), name, encoder.prompt.aspect_ratio, isinstance(encoder, BlankEncoder)
