"""What a published command line asks of a machine, and what this one has: said where they differ.

Also what a killed process left on it: a compilation that is locked for ever.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.devices import NO_TF32, cpu_has_bfloat16, gpu_has_bfloat16, gpu_has_tf32, has_accelerator
from llava.heap import bound_compiled_products
from llava.targets import remove
from llava.utils import rank0_print

CHECKPOINTING = "--gradient_checkpointing"


def without_auto(argv: Sequence[str], default: str | None = None) -> list[str]:
    """A command line with each ``auto`` in the words of this machine.

    ``--bf16 auto`` is said: bfloat16 where a GPU, or without one the CPU, multiplies it by itself, else float16 on a
    GPU, else float32. ``--gradient_checkpointing auto`` is left to an estimate, once the model is there
    (``llava.train.memory``). ``default`` is what a task sequence says of ``--bf16``, for a command that says nothing of
    precision.
    """
    if default is not None and not any(word.split("=", 1)[0] in ("--bf16", "--fp16") for word in argv):
        argv = ["--bf16", default, *argv]
    asking = ("--bf16=", f"{CHECKPOINTING}=")
    words = [word for given in argv for word in (given.split("=", 1) if given.startswith(asking) else [given])]
    found: list[str] = []
    for word in words:
        if word == "auto" and found and found[-1] == "--bf16":
            found[-1:] = _precision_here()
        elif word == "auto" and found and found[-1] == CHECKPOINTING:
            found[-1:] = [CHECKPOINTING, "False", "--checkpoint_if_needed", "True"]
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
    """Fit precision and device of a parsed command line to this machine, in place, and this process to a CPU.

    Without a GPU the run is on the CPU, in bfloat16 only where the CPU multiplies it by itself; ``--use_cpu True`` says
    that the CPU is meant, and then ``--bf16`` is taken at its word.
    """
    if asked.tf32 and not gpu_has_tf32():
        rank0_print(NO_TF32)
        asked.tf32 = None
    if asked.use_cpu or not has_accelerator():
        bound_compiled_products()
    if has_accelerator():
        return
    if asked.bf16 and not asked.use_cpu and not cpu_has_bfloat16():
        rank0_print("note: --bf16 True is left out: no GPU here, and this CPU has no bfloat16 units; float32 it is")
        asked.bf16 = False
    elif asked.bf16 and not asked.use_cpu:
        rank0_print("note: no GPU here; --bf16 True trains on the CPU, which has bfloat16 units")
    if asked.fp16:
        rank0_print("note: --fp16 True is left out: float16 is for GPUs, and there is none here; float32 it is")
        asked.fp16 = False
    asked.use_cpu = True


IDLE = 300
"""Seconds without a change in its folder after which a compilation that no process here holds is nobody's."""


def free_compilations() -> None:
    """Remove the locks that killed processes left on torch's compiled extensions: torch would wait for ever.

    A lock that a process of this machine has open stays, and so does one in a folder that was written to lately, which
    may be another machine's.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in {*root.glob("*/lock"), *root.glob("*/*/lock")}:
        changed = max(path.stat().st_mtime for path in (lock, *lock.parent.iterdir()) if path.exists())
        if time.time() - changed > IDLE and not _is_open(lock):
            remove(lock)
            rank0_print(f"note: {lock} was left by a killed compilation and is removed")


def _is_open(path: Path) -> bool:
    """Whether a process of this machine that can be looked at has a file open."""
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(handle) == str(path.resolve()):
                return True
        except OSError:  # closed meanwhile, or of a process that is gone
            continue
    return False
