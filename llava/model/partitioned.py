"""ZeRO-3 and parameters in parts: whole for a while, or never in parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


@contextlib.contextmanager
def gathered(parameters: Sequence[Tensor], write: bool = False) -> Iterator[None]:
    """The parameters whole, on every process, while the context lasts; all processes must enter it.

    Args:
        write: what the main process writes into them meanwhile is kept; every process may write the same.
    """
    parts: list[Any] = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts, modifier_rank=0 if write else None):
        yield


@contextlib.contextmanager
def never_parted() -> Iterator[None]:
    """What is loaded meanwhile stays whole on every process, though the run itself is under ZeRO-3."""
    from transformers.integrations import deepspeed as integration

    reference = integration._hf_deepspeed_config_weak_ref
    config = reference() if reference is not None else None
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            integration.set_hf_deepspeed_config(config)


def optimizer_copy(parameter: Tensor) -> Tensor | None:
    """The whole float32 copy that DeepSpeed's optimizer steps on, of which the parameter is a rounding in 16 bits;
    ``None`` where there is none. Every process must call this."""
    if not _has_optimizer_copy(parameter):
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    found: Tensor | None = safe_get_full_fp32_param(parameter)
    return found


def set_optimizer_copy(parameter: Tensor, value: Tensor) -> None:
    """Write into that copy, where there is one. Every process must call this."""
    if _has_optimizer_copy(parameter):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value.to(parameter.device))


def _has_optimizer_copy(parameter: Tensor) -> bool:
    return hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")


def size_of(parameter: Tensor) -> int:
    """How many numbers a parameter has in all its parts."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
