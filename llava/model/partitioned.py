"""Parameters whole, wherever ZeRO-3 has put their parts."""

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
