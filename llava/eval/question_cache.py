"""What a model's frozen parts make of pictures and questions, kept for every stage that is asked about them.

All stages over one base share its vision tower and their text encoder: each picture is opened once and goes through the
tower once, by itself, so that nothing depends on which questions are answered together; each question is encoded once.
With a folder what was seen is kept for other processes too, and found where the training of stages left it.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava.checkpoints.manifest import manifest_of
from llava.continual.queries import SIGHTS, text_queries
from llava.continual.query_cache import QueryCache
from llava.data.prompt import Picture, PromptEncoder
from llava.data.rows import Row
from llava.files import file_sha256
from llava.inside import inside
from llava.model.vision.sights import Sight, SightStore, eye_of, see
from llava.slots.encoders import KEPT_BYTES, SentenceEncoder, TextEncoder, encoder_from_identity

MEGABYTES = 2048
"""Memory for features, about 1700 pictures of LLaVA-1.5 in half precision; as much again for a model's prefixes."""

RECENT = 64
"""Pictures beyond that memory that are kept while their neighbours are asked about."""


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
        folder: of queries and sights on the disk (``llava.continual.queries``); empty: none.
        prefixes: whether models keep what they make of all in front of a question (``llava.model.prefixes``), in as
            much memory again, and in the folder: for a base and stages whose offsets act behind the picture alone.

    Attributes:
        device: where questions are encoded; set by whoever asks.
    """

    device: str = "cpu"

    def __init__(
        self, megabytes: int = MEGABYTES, folder: str | os.PathLike[str] | None = None, prefixes: bool = False
    ) -> None:
        self.limit, self.used = megabytes * 2**20, 0
        self.folder = Path(folder) if folder else None
        self.prefixes = prefixes
        self.stores: dict[str, SightStore | None] = {}
        self.sights: dict[tuple, Sight] = {}
        self.recent: OrderedDict[tuple, Sight] = OrderedDict()
        self.blanks: dict[bytes, Sight] = {}
        self.coming: dict[tuple, Future[tuple[Sight | Picture, str]]] = {}
        self.encoders: dict[str, TextEncoder] = {}
        self.model: Callable[[], Any] = lambda: None
        self.places: tuple[str, str | None] = ("", None)

    def look_with(self, model: Any, place: str = "", base: str | None = None) -> None:
        """Look with this model's tower from now on; what another one saw is forgotten.

        Args:
            place, base: where it was loaded from, and over which; nothing is kept on the disk where that is not known.
        """
        if self.model() is not model:
            for kept in (self.sights, self.recent, self.blanks, self.coming, self.stores):
                kept.clear()
            self.used, self.model, self.places = 0, weakref.ref(model), (place, base)

    def encoder(self, identity: dict[str, Any], base: Any) -> TextEncoder:
        """The text encoder of this identity; it remembers the questions it has encoded."""
        name = json.dumps(identity, sort_keys=True)
        if name not in self.encoders:
            self.encoders[name] = encoder_from_identity(identity, base).to(self.device)
        return self.encoders[name]

    def encode_ahead(self, rows: Sequence[Row], adapter: Any) -> None:
        """Have the text queries of all rows before the first is answered, from the disk where they lie there.

        Only where an encoder computes them: a mean over a table takes less time than a file.
        """
        if adapter is None or not adapter.active or not isinstance(adapter.encode_text, SentenceEncoder):
            return
        encoder = adapter.encode_text
        new = [row for row in rows if not encoder.knows(row.question)]
        if new and 4 * encoder.dim * len(new) <= KEPT_BYTES:
            found = text_queries(new, encoder.identity, None, lambda: encoder, QueryCache(self.folder), self.device)
            encoder.remember([row.question for row in new], found)

    def read_ahead(self, rows: Sequence[Row], encoder: PromptEncoder, pool: ThreadPoolExecutor) -> None:
        """Open the rows' pictures that are not known yet while something else is worked on."""
        for row in rows:
            for name in row.shown:
                key = _key(name, encoder)
                if self._known(key) is None and key not in self.coming:
                    self.coming[key] = pool.submit(self._open, row, name, encoder, self._store(encoder))

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
        coming, store = self.coming.pop(key, None), self._store(encoder)
        opened, checksum = self._open(row, name, encoder, store) if coming is None else coming.result()
        if isinstance(opened, Sight):
            return self._keep(key, opened)
        pixels, size = opened
        if not isinstance(encoder, BlankEncoder):
            seen = self._seen(pixels, size, model)
            return self._keep(key, store.keep(_file(name, encoder), checksum, seen) if store else seen)
        alike = hashlib.sha256(str(pixels.shape).encode() + pixels.numpy().tobytes()).digest()
        if alike not in self.blanks:  # most blanks have the same pixels
            self.blanks[alike] = self._seen(pixels, size, model)
        self.sights[key] = replace(self.blanks[alike], size=size)
        return self.sights[key]

    @staticmethod
    def _open(row: Row, name: str, encoder: PromptEncoder, store: SightStore | None) -> tuple[Sight | Picture, str]:
        """A picture's sight from the disk, else its pixels and size; and with a store its file's checksum.

        Safe to call from several threads.
        """
        if store is None:
            return encoder.open_picture(row, name), ""
        checksum = file_sha256(_file(name, encoder))
        return store.get(checksum) or encoder.open_picture(row, name), checksum

    @staticmethod
    def _seen(pixels: Tensor, size: tuple[int, int], model: Any) -> Sight:
        return see(model.get_vision_tower(), pixels, size, model.get_model().embed_tokens.weight.dtype)

    def _store(self, encoder: PromptEncoder) -> SightStore | None:
        """Where sights are kept on the disk; blanks are too few to be worth it."""
        place, base = self.places
        if self.folder is None or not place or isinstance(encoder, BlankEncoder):
            return None
        mode, model = encoder.prompt.aspect_ratio, self.model()
        if mode not in self.stores:
            tower, dtype = model.get_vision_tower(), model.get_model().embed_tokens.weight.dtype
            attention = str(getattr(tower.config, "_attn_implementation", "sdpa"))
            eye = eye_of(contents_of(place, base), model.config, mode, tower.device, dtype, attention)
            self.stores[mode] = SightStore(self.folder / SIGHTS, eye)
        return self.stores[mode]

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


def contents_of(place: str, base: str | None) -> dict[str, Any]:
    """What the weights of a model come from that was loaded from a place, over a base where it has one."""
    return {"base": manifest_of(place)} if base is None else {"base": manifest_of(base), "over": manifest_of(place)}


def _key(name: str, encoder: PromptEncoder) -> tuple:
    return str(encoder.image_folder), name, encoder.prompt.aspect_ratio, isinstance(encoder, BlankEncoder)


def _file(name: str, encoder: PromptEncoder) -> Path:
    return inside(encoder.image_folder or "", name)
