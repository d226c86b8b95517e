"""What a published command line asks of a machine, and what this one has: said where they differ."""

from __future__ import annotations

from typing import Any

from llava.devices import cpu_has_bfloat16, has_accelerator
from llava.utils import rank0_print


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
