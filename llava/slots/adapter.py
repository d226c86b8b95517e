"""Adapters: what acts on the frozen model, per question. All that the model's architecture knows of the slots.

An adapter **decides** a route for each question and **acts** on it: with low-rank offsets on projections, with prefix
embeddings in front of the prompt, or with both. The retriever is the one that ships; a continual method may bring its
own, and registers it under the name that its slot files carry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from llava.files import atomic_write
from llava.registry import Registry
from llava.slots.file import content_sha256
from llava.slots.offsets import WeightOffset
from llava.slots.pool import Pool
from llava.slots.queries import Query
from llava.slots.route import Route
from llava.slots.settings import RetrieverSettings
from llava.utils import UserError

MEMORY_FILE = "memory.pth"
_CHECKSUM = "checksum of the rest"
RETRIEVER = "retriever"
"""The adapter of slot files that name none."""


@dataclass(frozen=True)
class Action:
    """What a route does to a batch: an ``offset`` on projections, a ``prefix`` ``[batch, length, hidden]``, or both."""

    offset: WeightOffset | None = None
    prefix: Tensor | None = None


@runtime_checkable
class Adapter(Protocol):
    """What ``llava.model.llava_arch`` asks of an adapter, which is a module of its own parameters."""

    encode_text: Callable[[Sequence[str]], Tensor] | None
    """Questions to text queries ``[batch, text_dim]``; set by whoever loads the model."""

    router_name: str
    """The router that decides, where the adapter has one; set by whoever asks."""

    @property
    def settings(self) -> RetrieverSettings:
        """The query space, and the projections that offsets act on (``targets``)."""

    @property
    def active(self) -> bool:
        """Whether it would act on any question."""

    @property
    def known_tasks(self) -> list[str]:
        """Tasks that a question can be given to, in slot order."""

    def encode_questions(self, questions: Sequence[str]) -> Tensor:
        """Text queries of plain questions, by ``encode_text``; ``ValueError`` without one."""

    def decide(self, query: Query, tasks: Sequence[str | None] | None = None) -> Route | None:
        """The route of each question. ``tasks``: the true task of each where it is given, ``None`` where not."""

    def act(self, route: Route, dtype: torch.dtype) -> Action:
        """What the route does. Called at prefill and, with the route's indices and weights alone, at later steps."""


class AdapterKind(Protocol):
    """A class of adapters, as registered."""

    name: str

    def __call__(self, pool: Pool, memory: dict[str, Tensor]) -> Any:
        """An adapter over the slots of a file, with the tensors that its stage keeps."""


ADAPTERS: Registry[AdapterKind] = Registry("adapter", "llava.continual.methods")


def write_memory(folder: Path, memory: dict[str, Tensor]) -> None:
    """Write the tensors that a stage's method keeps beside the slots, with their checksum."""
    kept = {**memory, _CHECKSUM: _checksum(memory)}
    with atomic_write(folder / MEMORY_FILE, "wb") as stream:
        torch.save(kept, stream)


def read_memory(folder: Path) -> dict[str, Tensor]:
    """The tensors that a stage's method keeps beside the slots; empty where it keeps none.

    Raises:
        UserError: the file is damaged or holds more than plain tensors.
    """
    path = folder / MEMORY_FILE
    if not path.is_file():
        return {}
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise UserError(
            f"{path}: cannot be read as a file of plain tensors ({reason}); train the stage again"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path}: holds something else than tensors by name; train the stage again")
    kept = found.pop(_CHECKSUM, None)  # files of earlier versions have none
    if kept is not None and not torch.equal(kept, _checksum(found)):
        raise UserError(f"{path}: is damaged, its checksum is not that of what it holds; train the stage again")
    return found


def _checksum(memory: dict[str, Tensor]) -> Tensor:
    return torch.tensor(list(content_sha256(dict(sorted(memory.items()))).encode()), dtype=torch.uint8)
