"""Where models run: the only module that knows kinds of accelerators by name.

To torch, NVIDIA's CUDA and AMD's ROCm are both ``cuda``. Everything else takes the device it is given, or that of the
tensors at hand.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava.utils import UserError


@dataclass(frozen=True)
class OnHost:
    """A tensor of a training batch that stays where and what it is: trainers move tensors to a device, and DeepSpeed's
    casts them, but routes are decided on the host by exact queries."""

    tensor: Any


def has_accelerator() -> bool:
    """Whether torch sees a GPU."""
    import torch  # here, so that a command line's --help answers at once

    return torch.cuda.is_available()


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 by itself; others do it in software, many times slower than float32."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def gpu_has_bfloat16() -> bool:
    """Whether the GPU multiplies bfloat16 by itself: NVIDIA's since Ampere, AMD's since MI200."""
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False)


NO_TF32 = "note: --tf32 True is left out: TF32 is a mode of NVIDIA GPUs since Ampere, and there is none here"


def gpu_has_tf32() -> bool:
    """Whether the GPU multiplies float32 in TF32: NVIDIA's since Ampere."""
    import torch

    return torch.version.cuda is not None and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8


def set_tf32(wanted: bool) -> None:
    """Let the GPU's products of float32 matrices be TF32, or not; what the CPU multiplies stays as it is."""
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        matmul.fp32_precision = cudnn.conv.fp32_precision = "tf32" if wanted else "ieee"  # type: ignore[attr-defined]
    else:  # before torch 2.9
        matmul.allow_tf32 = cudnn.allow_tf32 = wanted


def tf32_is_on() -> bool:
    """Whether the GPU's products of float32 matrices are TF32."""
    import torch

    matmul = torch.backends.cuda.matmul
    return bool(matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32)


def arithmetic(device: Any) -> list[str]:
    """What decides the last bits of a product on a device: the GPU's kind, or the CPU's instructions and threads."""
    import torch

    kind = torch.device(device).type
    if kind == "cpu":
        return [kind, torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads"]
    return [kind, torch.cuda.get_device_name(device) if kind == "cuda" and torch.cuda.is_available() else ""]


def moved(tensor: Any, device: Any) -> Any:
    """``tensor`` on a device; to a GPU over pinned memory, so that the host goes on meanwhile."""
    import torch

    # A pinned copy has no gradient, and torch.compile cannot trace how it is made.
    plain = tensor.device.type == "cpu" and not tensor.requires_grad and not torch.compiler.is_compiling()
    if plain and torch.device(device).type == "cuda" and torch.cuda.is_available():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def readers(device: Any) -> int:
    """Threads that it pays to read pictures ahead with: none beside a model that has the CPU itself to run on."""
    import torch

    return 0 if torch.device(device).type == "cpu" else min(4, os.cpu_count() or 1)


def free_memory() -> int | None:
    """Bytes that are free on this process's accelerator; ``None`` without one."""
    import torch

    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


def default_device(requested: str | None = None, use_cpu: bool = False) -> str:
    """The device asked for, else the accelerator where there is one, else the CPU.

    Args:
        use_cpu: leave the accelerator alone when none was asked for.

    Raises:
        UserError: the device asked for is not here.
    """
    if requested:
        check_device(requested)
    return requested or ("cuda" if has_accelerator() and not use_cpu else "cpu")


def check_device(name: str) -> None:
    """Refuse a device that is not here, before anything is loaded for it.

    Raises:
        UserError: it is no device's name, or there is none of this kind or number.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name!r} is no device; give cpu, or an accelerator as torch names it") from error
    if device.type in ("cpu", "meta"):
        if name != "cpu":
            raise UserError(f"--device {name!r}: models run on cpu or on an accelerator; give one of them")
        return
    kind = getattr(torch, device.type, None)
    count = kind.device_count() if kind is not None and hasattr(kind, "device_count") and kind.is_available() else 0
    if (device.index or 0) >= count:
        raise UserError(f"--device {name!r}: {count} of this kind are here; give another, or leave the flag out")


VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
"""Variables that say which accelerators a process may use: NVIDIA's, AMD's."""


def visible_devices() -> list[str]:
    """Names of the accelerators that this process may use; empty: the CPU.

    They are the ones that the environment names, in its words, else (or where it says ``all``) all there are.
    """
    named = next((os.environ[name] for name in VISIBLE if name in os.environ), "all")
    if named.strip() != "all":
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def accelerator_names() -> list[str]:
    """Models of the accelerators that this process sees, each once, with their number: ``2 x NVIDIA H100``."""
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]


def restricted_to(device: str) -> dict[str, str]:
    """Variables that let a process see one of ``visible_devices`` alone."""
    return dict.fromkeys(VISIBLE, device)


def run_together(commands: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> list[int]:
    """Run commands at the same time, such as one a device, and tell which of them failed, by their places.

    None outlives this process, which ends where it is told to end (SIGTERM).

    Args:
        commands: words of each, and what is added to this process's environment for it.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    workers: list[subprocess.Popen] = []
    try:
        for words, own in commands:
            workers.append(subprocess.Popen(words, env={**os.environ, **own}))
        return [place for place, worker in enumerate(workers) if worker.wait() != 0]
    finally:
        for worker in workers:
            worker.terminate()
