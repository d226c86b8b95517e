"""What a published command line asks of a machine, and what this one has: said where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava.devices import cpu_has_bfloat16, gpu_has_bfloat16, has_accelerator
from llava.utils import rank0_print


def with_precision(argv: Sequence[str], default: str | None = None) -> list[str]:
    """A command line with ``--bf16 auto`` in the words of this machine, which are said.

    It is bfloat16 where a GPU, or without one the CPU, multiplies it by itself, else float16 on a GPU, else float32.
    ``default`` is what a task sequence says, for a command that says nothing of precision.
    """
    if default is not None and not any(word.split("=", 1)[0] in ("--bf16", "--fp16") for word in argv):
        argv = ["--bf16", default, *argv]
    words = [word for given in argv for word in (given.split("=", 1) if given.startswith("--bf16=") else [given])]
    found: list[str] = []
    for word in words:
        if word == "auto" and found and found[-1] == "--bf16":
            found[-1:] = _precision_here()
        else:
            found.append(word)
    return found


def _precision_here() -> list[str]:
    if has_accelerator():
        kind = "bfloat16" if gpu_has_bfloat16() else "float16"
        rank0_print(f"precision: {kind}, which this GPU has")
    else:
        kind = "bfloat16" if cpu_has_bfloat16() else "float32"
        rank0_print(
            f"precision: {kind}; no GPU here, and this CPU has {'' if kind == 'bfloat16' else 'no '}bfloat16 units"
        )
    return ["--bf16", str(kind == "bfloat16"), "--fp16", str(kind == "float16")]


def settle_machine(asked: Any) -> None:
    """Fit precision and device of a parsed command line to this machine, in place.

    Without a GPU the run is on the CPU, in bfloat16 only where the CPU multiplies it by itself; ``--use_cpu True`` says
    that the CPU is meant, and then ``--bf16`` is taken at its word.
    """
    if has_accelerator():
        return
    if asked.tf32:
        rank0_print("note: --tf32 True is left out: TF32 is a mode of NVIDIA GPUs, and there is none here")
        asked.tf32 = None
    if asked.bf16 and not asked.use_cpu and not cpu_has_bfloat16():
        rank0_print("note: --bf16 True is left out: no GPU here, and this CPU has no bfloat16 units; float32 it is")
        asked.bf16 = False
    elif asked.bf16 and not asked.use_cpu:
        rank0_print("note: no GPU here; --bf16 True trains on the CPU, which has bfloat16 units")
    if asked.fp16:
        rank0_print("note: --fp16 True is left out: float16 is for GPUs, and there is none here; float32 it is")
        asked.fp16 = False
    asked.use_cpu = True
