"""DeepSpeed settings, looked at before anything is loaded, and DeepSpeed on a machine without a GPU."""

from __future__ import annotations

import json
import os
from pathlib import Path

from llava.utils import UserError, rank0_print, require_file

INTEGER_KEYS = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)


def check_deepspeed_config(path: str | os.PathLike) -> dict:
    """Read a DeepSpeed file and report floats where integers belong.

    A whole number written as a float (``5e8``) is taken by DeepSpeed and only reported; a fraction is a ``UserError``
    that names the key and the value to write.
    """
    found = require_file(path, "DeepSpeed settings", "scripts/zero3.json is the one that ships")
    try:
        values = json.loads(found.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{found}, line {error.lineno}: broken JSON ({error.msg})") from error
    zero = values.get("zero_optimization", {}) if isinstance(values, dict) else None
    if not isinstance(zero, dict):
        raise UserError(f"{found}: must be a JSON object, and its zero_optimization too (see scripts/zero3.json)")
    for key in INTEGER_KEYS:
        value = zero.get(key)
        if not isinstance(value, float):
            continue
        if value != int(value):
            raise UserError(
                f"{found}: zero_optimization.{key} is {value}, but DeepSpeed wants an integer; write {int(value)}"
            )
        rank0_print(f"note: {found}: zero_optimization.{key} is {value}; an integer is wanted, write {int(value)}")
    return values


def prepare_cpu_deepspeed() -> None:
    """Let DeepSpeed run on the CPU with gloo, also without its launcher. Called before the model is loaded."""
    import deepspeed
    from deepspeed import ops

    # Its shared-memory backend would be compiled at first use, for minutes and with a compiler that may be missing.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def checkpoint_world_size(checkpoint: Path) -> int | None:
    """How many processes wrote a DeepSpeed checkpoint, or ``None`` if it is none."""
    shards = list(checkpoint.glob("global_step*/*optim_states.pt"))
    return len(shards) or None
