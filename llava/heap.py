"""What becomes of the memory that tensors leave free on a CPU.

glibc maps every large block by itself and gives it back to the system as soon as it is free, so that every page of
every step's tensors is asked for and zeroed again. That can take half of a training step's time. And oneDNN, by which
torch multiplies, keeps a compiled product for each of the last thousand shapes that it met, and torch's own layer above
it another thousand: rows of ever other lengths bring ever other shapes.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Parameters of ``mallopt``, as ``malloc.h`` numbers them."""
_KEPT, _MAPPED = 512 << 20, 4 << 20
"""Bytes: free memory at the heap's end that is kept, and what is still mapped by itself: larger tensors of many sizes
leave gaps that a heap grows by, smaller ones are most of the pages."""
_COMPILED_KEPT = dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "128")
"""Compiled products that oneDNN and torch keep: more than a decoder's and a tower's layers have shapes, so that a step
compiles each once at most. One takes up to a megabyte, and 4 ms to compile."""


def bound_compiled_products() -> None:
    """Let no more compiled products be kept than some steps need, unless the environment says how many. It acts only
    before the process's first product."""
    for name, count in _COMPILED_KEPT.items():
        os.environ.setdefault(name, count)


def keep_freed_memory() -> None:
    """Let later tensors have what earlier ones leave free; with another C library than glibc nothing changes."""
    if library := _glibc():
        library.mallopt(_ARENA_MAX, 1)  # a backward pass, a thread of its own, takes what the forward pass left
        library.mallopt(_MMAP_THRESHOLD, _MAPPED)
        library.mallopt(_TRIM_THRESHOLD, _KEPT)


def return_freed_memory() -> None:
    """Give back what is free now, the gaps too that tensors of many sizes leave: without this a heap only grows."""
    if library := _glibc():
        library.malloc_trim(0)


def own_bytes() -> int:
    """Memory that this process has for itself, mapped files not counted; 0 where the system does not tell."""
    place = Path("/proc/self/statm")
    if not place.exists():
        return 0
    resident, shared = map(int, place.read_bytes().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
