"""DeepSpeed settings, looked at before anything is loaded, and DeepSpeed on a machine without a GPU."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from llava.utils import UserError, rank0_print, require_file

if TYPE_CHECKING:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from transformers import TrainingArguments


def check_deepspeed_config(path: str | os.PathLike) -> dict:
    """Read a DeepSpeed file and let DeepSpeed's own class look at its ``zero_optimization``.

    A whole number written as a float (``5e8``) is taken by DeepSpeed and only reported. Values ``"auto"`` are the
    trainer's to fill in.

    Raises:
        UserError: no JSON object, or a setting that DeepSpeed refuses; where it wants an integer, the message gives the
            one to write.
    """
    found = require_file(path, "DeepSpeed settings", "scripts/zero3.json is the one that ships")
    try:
        values = json.loads(found.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{found}, line {error.lineno}: broken JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{found}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    zero = values.get("zero_optimization") if isinstance(values, dict) else None
    if not isinstance(zero, dict):
        raise UserError(f"{found}: must be a JSON object, and its zero_optimization too (see scripts/zero3.json)")
    known = _zero_config(found, {name: value for name, value in zero.items() if value != "auto"})
    for name, field in type(known).model_fields.items():
        written = zero.get(field.alias or name)
        if isinstance(written, float) and type(getattr(known, name)) is int:
            where = f"zero_optimization.{field.alias or name}"
            rank0_print(f"note: {found}: {where} is {written}; an integer is wanted, write {int(written)}")
    return values


def check_agreement(args: TrainingArguments) -> None:
    """Compare DeepSpeed's file with the run's own settings, as the trainer noted them when it read both.

    Raises:
        UserError: the first setting in which they differ.
    """
    config = args.hf_deepspeed_config if args.deepspeed else None
    for mismatch in config.mismatches if config else []:
        in_file, _, in_run = mismatch.removeprefix("- ds ").partition(" vs hf ")
        raise UserError(f'{args.deepspeed}: {in_file}, but this run has {in_run}; write "auto" into the file')


def _zero_config(file: Path, zero: dict) -> DeepSpeedZeroConfig:
    """DeepSpeed's view of the section; its complaint becomes one line that names the setting."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        return DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{file}: {'.'.join(('zero_optimization', *map(str, first['loc'])))}"
        number = _whole_number(first["input"])
        if first["type"].startswith("int") and number is not None:
            message = f"{where} is {first['input']}, but DeepSpeed wants an integer; write {number}"
        elif first["type"] == "extra_forbidden":
            message = f"{where} is no setting that DeepSpeed knows; take it out (see scripts/zero3.json)"
        else:
            message = f"{where} is {first['input']!r}: {first['msg']}; change it (see scripts/zero3.json)"
        raise UserError(message) from error
    except AssertionError as error:  # two names of one setting
        raise UserError(f"{file}: zero_optimization: {error}; keep one of them") from error


def _whole_number(value: object) -> int | None:
    try:
        return int(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None


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
