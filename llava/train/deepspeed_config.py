"""DeepSpeed settings, looked at before anything is loaded, and DeepSpeed on a machine without a GPU."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.outside import foreign, read_object
from llava.schema import Wanted, an_object, check_fields, number, refuse_unknown, whole, words, yes_or_no
from llava.utils import UserError, rank0_print

if TYPE_CHECKING:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from transformers import TrainingArguments


BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
SECTIONS = (
    *("zero_optimization", "fp16", "bf16", "optimizer", "scheduler", "gradient_clipping", *BATCHES),
    *("amp", "torch_autocast", "data_types", "communication_data_type", "activation_checkpointing", "aio"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "flops_profiler", "comms_logger", "autotuning"),
    *("tensorboard", "wandb", "comet", "csv_monitor", "checkpoint", "compile", "timers", "elasticity", "pipeline"),
    *("tensor_parallel", "expert_parallel", "sequence_parallel_size", "hybrid_engine", "sparse_attention"),
    *("sparse_gradients", "compression_training", "weight_quantization", "data_efficiency", "curriculum_learning"),
    *("progressive_layer_drop", "eigenvalue", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("nebula", "datastates_ckpt", "train_steps", "fp32_allreduce", "quantize_training", "bfloat16"),
)
"""Sections of a DeepSpeed file, the usual ones first."""
_AUTO = words(("auto",))
_OBJECTS = (
    *("fp16", "bf16", "bfloat16", "zero_optimization", "activation_checkpointing", "aio", "checkpoint", "compile"),
    *("timers", "comms_logger", "tensorboard", "wandb", "comet", "csv_monitor", "data_types", "tensor_parallel"),
    *("autotuning", "data_efficiency", "hybrid_engine", "weight_quantization", "torch_autocast", "expert_parallel"),
    *("amp", "pipeline", "compression_training"),
)
_FLAGS = ("wall_clock_breakdown", "memory_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
_STEPS: dict[str, Wanted] = {"type": words(empty=False), "params": an_object(), "legacy_fusion": yes_or_no}
SCHEMA: dict[str, Wanted] = {
    **dict.fromkeys(BATCHES, whole(1) | _AUTO),
    "gradient_clipping": number(0) | _AUTO,
    "steps_per_print": number(1) | _AUTO,
    **dict.fromkeys(_OBJECTS, an_object()),
    **dict.fromkeys(_FLAGS, yes_or_no | _AUTO),
    **dict.fromkeys(("optimizer", "scheduler"), an_object(_STEPS)),
    "flops_profiler": an_object({"enabled": yes_or_no}),
}
"""What DeepSpeed takes as it is, and fails on later or in other words."""


def check_deepspeed_config(path: str | os.PathLike) -> dict:
    """Read a DeepSpeed file and let DeepSpeed's own classes look at it.

    A whole number written as a float (``5e8``) is taken by DeepSpeed and only reported. Values ``"auto"`` are the
    trainer's to fill in.

    Raises:
        UserError: no JSON object, or a setting that DeepSpeed refuses; where it wants an integer, the message gives the
            one to write.
    """
    found = Path(path)
    values = read_object(found, "DeepSpeed settings", "scripts/zero3.json is the one that ships", bare=True)
    zero = values.get("zero_optimization")
    if not isinstance(zero, dict):
        raise UserError(f"{found}: must be a JSON object, and its zero_optimization too (see scripts/zero3.json)")
    refuse_unknown(values, _sections(), str(found), "setting")
    known = _zero_config(found, {name: value for name, value in zero.items() if value != "auto"})
    for name, field in type(known).model_fields.items():
        written = zero.get(field.alias or name)
        if isinstance(written, float) and type(getattr(known, name)) is int:
            where = f"zero_optimization.{field.alias or name}"
            rank0_print(f"note: {found}: {where} is {written}; an integer is wanted, write {int(written)}")
    check_fields(values, SCHEMA, str(found), closed=False)
    for name in ("optimizer", "scheduler"):
        if values.get(name) is not None:
            check_fields(values[name], _STEPS, f"{found}: {name}", needed=("type",))
    _check_whole(found, values)
    return values


def _sections() -> list[str]:
    """Names that may stand at the top of a file: DeepSpeed takes no notice of others."""
    from deepspeed.runtime import config, constants

    own = [value for module in (constants, config) for name, value in vars(module).items() if name.isupper()]
    names = {name for name in own if isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_]+", name)}
    return [*SECTIONS, *sorted(names - set(SECTIONS))]


def _check_whole(file: Path, values: dict[str, Any]) -> None:
    """All sections as DeepSpeed reads them, ``"auto"`` left out; batches are compared with the run's own later.

    Raises:
        UserError: what DeepSpeed refuses.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    said = {name: value for name, value in _without_auto(values).items() if name not in BATCHES}
    with foreign(file, "change it (see scripts/zero3.json)", "DeepSpeed refuses it"):
        try:
            DeepSpeedConfig({**said, "train_micro_batch_size_per_gpu": 1})
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                f"{file}: {'.'.join(map(str, first['loc']))} is {first['input']!r}: {first['msg']} ({error.title}); "
                "change it (see scripts/zero3.json)"
            ) from error


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_auto(part) for name, part in value.items() if part != "auto"}
    return value


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
