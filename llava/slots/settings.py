"""The settings of a pool of slots, as key files and checkpoints store them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from llava.slots.names import ALL, KINDS, ORACLE, QUERY_MODES, ROUTERS, SCOPES
from llava.slots.offsets import TARGETS


@dataclass
class RetrieverSettings:
    """Everything about a pool but its numbers. Stored in key files and in a checkpoint's config.

    ``features`` gives ``(in, out)`` per target projection. ``encoder`` is the text encoder's identity. ``image_query``
    says what the image query is made of (see ``picture_query``). ``unknown_share`` of a task's own held-out questions
    may count as unknown (see ``unknown``); 0 lets every question take a route. ``offset_scope`` says which positions
    offsets act on: with ``question`` those behind a row's last picture, so that all before is the frozen base's alone.
    """

    num_layers: int
    features: dict[str, tuple[int, int]]
    text_dim: int | None = None
    image_dim: int | None = None
    query_mode: str = "text+image"
    image_query: str = "tower"
    groups: int = 4
    rank: int = 8
    top_k: int = 4
    tau: float = 0.1
    scale: float = 1.0
    image_weight: float = 0.5
    router: str = "gaussian"
    weighting: str = "softmax"
    unknown_share: float = 0.005
    offset_scope: str = ALL
    encoder: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.features = {target: (in_, out) for target, (in_, out) in self.features.items()}
        if unknown := set(self.features) - set(TARGETS):
            raise ValueError(f"unknown target projection {sorted(unknown)[0]!r}; known: {', '.join(TARGETS)}")
        if self.query_mode not in QUERY_MODES:
            raise ValueError(f"query_mode must be one of {QUERY_MODES}, not {self.query_mode!r}")
        if self.image_query not in KINDS:
            raise ValueError(f"image_query must be one of {KINDS}, not {self.image_query!r}")
        if self.router != ORACLE:
            ROUTERS.get(self.router)
        if self.weighting not in ("softmax", "distance"):
            raise ValueError(f"weighting must be 'softmax' or 'distance', not {self.weighting!r}")
        if self.offset_scope not in SCOPES:
            raise ValueError(f"offset_scope must be one of {SCOPES}, not {self.offset_scope!r}")
        if not 0 <= self.unknown_share < 1:
            raise ValueError(f"unknown_share must be at least 0 and below 1, not {self.unknown_share}")
        for name in ("num_layers", "groups", "rank", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be 1 or more")
        if not self.tau > 0:
            raise ValueError(f"tau is {self.tau}, it must be above 0")
        for name, dim in (("text", self.text_dim), ("image", self.image_dim)):
            if dim is not None and dim % self.groups:
                raise ValueError(f"{name} queries have {dim} dimensions, which {self.groups} groups do not divide")

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.features)

    @property
    def uses_text(self) -> bool:
        return "text" in self.query_mode and self.text_dim is not None

    @property
    def uses_images(self) -> bool:
        return "image" in self.query_mode and self.image_dim is not None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RetrieverSettings:
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})
