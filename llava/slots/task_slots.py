"""A task's slots: the one body that is trained, routed to, and written to a file."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llava.slots.queries import TaskStatistics
from llava.slots.settings import RetrieverSettings
from llava.slots.unknown import TaskExtent
from llava.utils import UserError

Offsets = Mapping[str, Tensor] | nn.ParameterDict
FIELDS = (
    "name",
    "start",
    "stop",
    "text_keys",
    "image_keys",
    "statistics",
    "feature_statistics",
    "extent",
    "held_out",
    "trained",
    "A",
    "B",
    "info",
    "recorded_checksum",
)


class TaskSlots(nn.Module):
    """``count`` keys and low-rank offsets of one task, and what the routers know of it.

    Args:
        name: of the task. start, stop: its slots in the task sequence, which may have gaps where tasks are missing.
        text_keys, image_keys: ``[groups, count, part]``, or ``None`` where the queries have no such part.
        statistics, feature_statistics: sums over its queries and over their random features (router ``ridge``).
        extent: tells questions that fit no known task.
        held_out: queries ``text`` and ``image`` that were kept from fitting, to measure routing when merging.
        A, B: offsets per target, ``[count, layers, rank, out]`` and ``[count, layers, rank, in]``; empty while a key
            file has none yet. Their order is kept.
        info: plain values about how the slots were made.
        recorded_checksum: written beside the tensors; ``None`` for a task that was not read from a file.
    """

    stays = True
    """Whether frozen slots stay where and what they are when a model moves or changes its type: questions are routed on
    the host, and the offsets that they use are copied to the device (see ``resident``)."""

    def __init__(
        self,
        name: str,
        start: int,
        stop: int,
        text_keys: Tensor | None = None,
        image_keys: Tensor | None = None,
        statistics: TaskStatistics | None = None,
        feature_statistics: TaskStatistics | None = None,
        extent: TaskExtent | None = None,
        held_out: dict[str, Tensor] | None = None,
        trained: bool = False,
        A: Offsets | None = None,
        B: Offsets | None = None,
        info: dict[str, Any] | None = None,
        recorded_checksum: str | None = None,
    ):
        super().__init__()
        self.name, self.start, self.stop = name, start, stop
        self.A, self.B = _frozen(A), _frozen(B)
        self.text_keys, self.image_keys = text_keys, image_keys  # no buffers: they are never moved or rounded
        self.statistics, self.feature_statistics, self.extent = statistics, feature_statistics, extent
        self.held_out, self.trained = held_out, trained
        self.info: dict[str, Any] = {} if info is None else info
        self.recorded_checksum = recorded_checksum

    @classmethod
    def empty(cls, settings: RetrieverSettings, name: str, start: int, count: int) -> TaskSlots:
        """Untrained slots whose keys and offsets are 0, in the shapes that the settings ask for."""
        text, image = key_shapes(settings, count)
        return cls(
            name,
            start,
            start + count,
            text_keys=None if text is None else torch.zeros(text),
            image_keys=None if image is None else torch.zeros(image),
            A={target: torch.zeros(shape) for target, (_, shape) in offset_shapes(settings, count).items()},
            B={target: torch.zeros(shape) for target, (shape, _) in offset_shapes(settings, count).items()},
        )

    @property
    def count(self) -> int:
        """How many slots the task has."""
        return self.stop - self.start

    def copy(self, **changes: Any) -> TaskSlots:
        """The same slots with some fields changed. Tensors are shared with this task, not copied."""
        return TaskSlots(**{**{name: getattr(self, name) for name in FIELDS}, **changes})

    def init_offsets(self, settings: RetrieverSettings, generator: torch.Generator) -> None:
        """``A = 0`` (an untrained slot changes nothing), ``B`` uniform in ``+-1/sqrt(in)``."""
        for target, (b_shape, a_shape) in sorted(offset_shapes(settings, self.count).items()):
            bound = 1 / math.sqrt(b_shape[-1])
            values = torch.empty(b_shape).uniform_(-bound, bound, generator=generator)
            self.A[target] = nn.Parameter(torch.zeros(a_shape), requires_grad=False)
            self.B[target] = nn.Parameter(values, requires_grad=False)

    def _apply(self, fn: Any, recurse: bool = True) -> TaskSlots:
        if not self.stays or any(parameter.requires_grad for parameter in self.parameters()):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, targets: tuple[str, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Copies of all of the task's offsets, ``B`` then ``A`` per target, ``[layers, count, rank, features]``.

        A call, so that ZeRO-3 gathers the parameters.
        """
        sides = (side[target].transpose(0, 1) for target in targets for side in (self.B, self.A))
        return tuple(side.to(dtype, copy=True, memory_format=torch.contiguous_format) for side in sides)

    def not_finite(self) -> list[str]:
        """Names of the tensors that hold NaN or infinite numbers."""
        return [name for name, tensor in self.tensors().items() if not _is_finite(tensor)]

    def check(self, settings: RetrieverSettings) -> None:
        """``UserError`` where keys or offsets don't have the shapes that the settings ask for."""
        for keys, shape in zip((self.text_keys, self.image_keys), key_shapes(settings, self.count), strict=True):
            if (None if keys is None else tuple(keys.shape)) != shape:
                raise UserError(
                    f"task {self.name!r}: keys of shape {_words(keys)}, but the settings ask for {shape or 'none'}"
                )
        wanted = offset_shapes(settings, self.count)
        for kind, offsets, side in (("A", self.A, 1), ("B", self.B, 0)):
            for target, tensor in offsets.items():
                expected = wanted[target][side] if target in wanted else None
                if tuple(tensor.shape) != expected:
                    raise UserError(
                        f"task {self.name!r}: offset {kind} of {target} has shape {_words(tensor)}, but the settings "
                        f"ask for {expected or 'none'}"
                    )
        for target, (kind, offsets) in itertools.product(wanted, (("A", self.A), ("B", self.B))):
            if (self.A or self.B) and target not in offsets:
                raise UserError(f"task {self.name!r}: no offset {kind} of {target}, but the settings ask for one")

    def tensors(self) -> dict[str, Tensor]:
        """All of the task's tensors that a route or an answer depends on, by name."""
        parts: dict[str, Tensor | None] = {"text_keys": self.text_keys, "image_keys": self.image_keys}
        for name, found in (("statistics", self.statistics), ("feature_statistics", self.feature_statistics)):
            if found is not None:
                parts |= {f"{name}.total": found.total, f"{name}.scatter": found.scatter}
        if self.extent is not None:
            parts |= {f"extent.{name}": tensor for name, tensor in self.extent.tensors().items()}
        for kind, tensors in (("A", self.A), ("B", self.B)):
            parts |= {f"{kind}.{target}": tensor for target, tensor in tensors.items()}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def checksum(self) -> str:
        """16 hex digits over everything a route or an answer depends on, whatever the task and its file are called."""
        digest = hashlib.sha256(str((self.trained, self.statistics and self.statistics.count)).encode())
        for name, tensor in sorted(self.tensors().items()):
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{name}:{plain.dtype}:{tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


def key_shapes(
    settings: RetrieverSettings, count: int
) -> tuple[tuple[int, int, int] | None, tuple[int, int, int] | None]:
    """Shapes of the text and image keys of ``count`` slots; ``None`` where the queries have no such part."""

    def shape(dim: int | None) -> tuple[int, int, int] | None:
        return None if dim is None else (settings.groups, count, dim // settings.groups)

    text_dim = settings.text_dim if settings.uses_text else None
    image_dim = settings.image_dim if settings.uses_images else None
    return shape(text_dim), shape(image_dim)


def offset_shapes(settings: RetrieverSettings, count: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of ``B`` and ``A`` of ``count`` slots, per target, in the order in which they are stored."""
    shape = (count, settings.num_layers, settings.rank)
    return {target: ((*shape, in_), (*shape, out)) for target, (in_, out) in sorted(settings.features.items())}


def _frozen(offsets: Offsets | None) -> nn.ParameterDict:
    items = () if offsets is None else offsets.items()
    return nn.ParameterDict(OrderedDict((t, nn.Parameter(v.detach(), requires_grad=False)) for t, v in items))


def _is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite: such a one spoils the sum, which takes a twentieth of the time. The sum of
    large numbers may be infinite too."""
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())


def _words(tensor: Tensor | None) -> str:
    return "none" if tensor is None else str(tuple(tensor.shape))
