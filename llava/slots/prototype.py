"""Read the slots of the public prototype's checkpoints.

They hold ``retriever.keys`` ``[1, groups, pool, part]`` and ``retriever.weight_offset_components``
``[pool, 2, layers * rank * hidden]``: row 0 is ``A`` (output side), row 1 is ``B`` (input side), each seen as
``[layers, rank, hidden]``, for ``o_proj`` with scaling 1. Its merged key file holds ``keys`` alone. The prototype
weighs slots by ``cos / sum cos``, which is kept (``weighting: distance``) for checkpoints that were trained with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.checkpoints.checkpoint import Checkpoint
from llava.checkpoints.weights import load_bin
from llava.slots.encoders import load_text_encoder
from llava.slots.pool import Pool
from llava.slots.settings import RetrieverSettings
from llava.slots.task_slots import TaskSlots
from llava.utils import UserError

KEYS, COMPONENTS = "retriever.keys", "retriever.weight_offset_components"


def import_prototype(
    source: str | Path,
    ranges: dict[str, tuple[int, int]],
    base: Path,
    base_name: str,
    text_encoder: str | None,
    top_k: int = 4,
) -> Pool:
    """The prototype's slots as a pool.

    Args:
        source: a checkpoint folder, a ``.bin``/``.pth`` state dict, or a bare key file (then no slot is trained).
        ranges: first and one past the last slot of each task. base: folder of the base model they were trained on.
        text_encoder: of the keys' queries; ``None`` leaves it open (routing then needs ``text_query``).

    Raises:
        UserError: tensors are missing or do not fit each other, the ranges, the base or the encoder.
    """
    found = _read(Path(source))
    keys = found.get(KEYS)
    if keys is None or keys.dim() != 4 or keys.shape[0] != 1:
        shape = "none" if keys is None else tuple(keys.shape)
        raise UserError(f"{source}: expected {KEYS!r} of shape [1, groups, slots, part], found {shape}")
    keys = keys[0].float()  # [groups, pool, part]
    if not torch.isfinite(keys).all():
        raise UserError(f"{source}: the keys hold NaN or infinite numbers")
    groups, pool, part = keys.shape
    _check_ranges(source, ranges, pool)
    checkpoint = Checkpoint(base)
    config = checkpoint.config
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    a, b = _components(source, found.get(COMPONENTS), pool, layers, hidden)
    settings = RetrieverSettings(
        num_layers=layers,
        features={"o_proj": (hidden, hidden)},
        text_dim=groups * part,
        query_mode="text",
        groups=groups,
        rank=8 if a is None else a.shape[2],
        top_k=top_k,
        image_weight=0.0,
        router="keys",
        weighting="distance",
        encoder=_encoder(text_encoder, base, groups * part),
    )
    tasks = [
        TaskSlots(
            name,
            start,
            stop,
            text_keys=keys[:, start:stop].clone(),
            trained=a is not None and bool(a[start:stop].any()),
            A={} if a is None else {"o_proj": a[start:stop].clone()},
            B={} if b is None else {"o_proj": b[start:stop].clone()},
            info={"imported": Path(source).name},
        )
        for name, (start, stop) in ranges.items()
    ]
    return Pool(settings, tasks, checkpoint.identity(base_name))


def _read(source: Path) -> dict[str, Tensor]:
    """The two tensors, by the names they have in a full checkpoint."""
    names = {"keys": KEYS, "weight_offset_components": COMPONENTS, KEYS: KEYS, COMPONENTS: COMPONENTS}
    if source.is_dir():
        checkpoint = Checkpoint(source)
        return checkpoint.read_tensors(name for name in (KEYS, COMPONENTS) if name in checkpoint.tensor_files)
    if not source.is_file():
        raise UserError(f"prototype checkpoint not found: {source}")
    return {
        names[name]: value for name, value in load_bin(source).items() if name in names and isinstance(value, Tensor)
    }


def _check_ranges(source: str | Path, ranges: dict[str, tuple[int, int]], pool: int) -> None:
    taken: dict[int, str] = {}
    for task, (start, stop) in ranges.items():
        if not 0 <= start < stop <= pool:
            raise UserError(f"{source}: holds {pool} slots, but task {task!r} is said to be at {start}:{stop}")
        for slot in range(start, stop):
            if slot in taken:
                raise UserError(f"slot {slot} is given to both {taken[slot]!r} and {task!r}")
            taken[slot] = task


def _components(
    source: str | Path, tensor: Tensor | None, pool: int, layers: int, hidden: int
) -> tuple[Tensor | None, Tensor | None]:
    """``A`` and ``B``, each ``[pool, layers, rank, hidden]``; ``None`` for a bare key file."""
    if tensor is None:
        return None, None
    if tensor.dim() != 3 or tensor.shape[:2] != (pool, 2) or tensor.shape[2] % (layers * hidden):
        raise UserError(
            f"{source}: {COMPONENTS!r} has shape {tuple(tensor.shape)}; for this base model it must be "
            f"[{pool}, 2, {layers} * rank * {hidden}]"
        )
    tensor = tensor.float().unflatten(2, (layers, -1, hidden))
    if not torch.isfinite(tensor).all():
        raise UserError(f"{source}: {COMPONENTS!r} holds NaN or infinite numbers")
    return tensor[:, 0], tensor[:, 1]


def _encoder(choice: str | None, base: Path, dim: int) -> dict[str, Any]:
    if choice is None:
        return {}
    identity = load_text_encoder(choice, base).identity
    if identity["dim"] != dim:
        raise UserError(f"the keys are for queries of {dim} dimensions, encoder {choice!r} gives {identity['dim']}")
    return identity
