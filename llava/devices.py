"""Where models run: the only module that knows kinds of accelerators by name.

To torch, NVIDIA's CUDA and AMD's ROCm are both ``cuda``. Everything else takes the device it is given, or that of the
tensors at hand.
"""

from __future__ import annotations


def has_accelerator() -> bool:
    """Whether torch sees a GPU."""
    import torch  # here, so that a command line's --help answers at once

    return torch.cuda.is_available()


def default_device(requested: str | None = None, use_cpu: bool = False) -> str:
    """The device asked for, else the accelerator where there is one, else the CPU.

    Args:
        use_cpu: leave the accelerator alone when none was asked for.
    """
    return requested or ("cuda" if has_accelerator() and not use_cpu else "cpu")
