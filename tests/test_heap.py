"""Memory that tensors leave free: kept for later ones, and given back when asked. By counts, not by time."""

import os
import subprocess
import sys

import pytest
import torch

from llava.heap import _COMPILED_KEPT as COMPILED
from llava.heap import _glibc

PROGRAM = """
import resource

import torch

from llava.heap import keep_freed_memory, return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1])

keep_freed_memory()
for round in range(8):
    if round == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del [torch.ones(700 << 10) for _ in range(100)][:]  # 280 MB, 70,000 pages
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
kept = resident()
return_freed_memory()
print(faults, kept - resident())
"""


SHAPES = """
import torch

from llava.heap import bound_compiled_products, own_bytes

bound_compiled_products()
layer = torch.nn.Linear(576, 576).bfloat16().requires_grad_(False)

def meet(lengths):
    for length in lengths:
        layer(torch.zeros(length, 576, dtype=torch.bfloat16))
    return own_bytes()

before = meet(range(200, 800))
print(meet(range(800, 1200)) - before)
"""


@pytest.mark.skipif(_glibc() is None, reason="another C library than glibc")
def test_what_is_free_is_kept_until_it_is_given_back():
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    faults, returned = map(int, found.stdout.split())
    assert faults < 1000 and returned > 60000  # five rounds asked for no page, and what they left free went back


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_without_glibc_nothing_happens(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    assert _glibc() is None


@pytest.mark.skipif(_glibc() is None or not torch.backends.mkldnn.is_available(), reason="no glibc or no oneDNN")
def test_rows_of_ever_other_lengths_take_no_more_and_more_memory():
    def growth(**variables):
        environ = {name: value for name, value in os.environ.items() if name not in COMPILED} | variables
        found = subprocess.run([sys.executable, "-c", SHAPES], capture_output=True, text=True, check=True, env=environ)
        return int(found.stdout)

    told = growth(**dict.fromkeys(COMPILED, "1024"))  # who says how many is taken at their word
    assert growth() < told / 3 + (4 << 20)
