"""The pretended GPU: it refuses what a GPU refuses, and counts what a GPU waits for."""

import pytest
import torch
from torch import nn

import pretend_gpu
from pretend_gpu import Log, MixedDevices, OnGpu, pretending


def on(device, *shape):
    return OnGpu(torch.ones(*shape), device)


def counts(log):
    return tuple(sum(found.values()) for found in (log.syncs, log.copies, log.kernels))


@pytest.mark.parametrize(
    "mix",
    [
        lambda: on("cuda:0", 2) + torch.ones(2),
        lambda: on("cuda:0", 2) + on("cuda:1", 2),
        lambda: torch.cat([on("cuda:0", 2), on("cuda:1", 2)]),
        lambda: on("cuda:0", 2)[OnGpu(torch.tensor([0]), "cuda:1")],
        lambda: nn.Linear(2, 2)(on("cuda:0", 2)),
    ],
)
def test_two_devices_in_one_operation_are_refused(mix):
    with pretending(Log()), pytest.raises(MixedDevices):
        mix()


@pytest.mark.parametrize(
    "do, syncs, copies, kernels",
    [
        (lambda x: x * 2 + 1, 0, 0, 2),
        (lambda x: x.reshape(2, 2).T[0], 0, 0, 0),
        (lambda x: x.tolist(), 1, 0, 0),
        (lambda x: float(x.sum()), 1, 0, 1),
        (lambda x: x.cpu(), 1, 0, 0),
        (lambda x: x.to("cpu"), 1, 0, 0),
        (lambda x: x[x > 0], 1, 0, 2),
        (lambda x: torch.arange(3).to(x.device), 0, 1, 0),
        (lambda x: torch.tensor([1.0], device=x.device), 0, 1, 0),
        (lambda x: x[[0, 1]], 0, 1, 1),
        (lambda x: torch.zeros(3, device=x.device), 0, 0, 1),
    ],
)
def test_syncs_copies_and_kernels_are_counted(do, syncs, copies, kernels):
    x = on("cuda:0", 4)
    with pretending(Log()) as log:
        do(x)
    assert counts(log) == (syncs, copies, kernels)


def test_a_moved_module_gives_the_same_numbers():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    expected = layer(x)
    pretend_gpu.move(layer, "cuda:1")
    with pretending(Log()):
        found = layer(OnGpu(x, "cuda:1"))
    assert found.device == torch.device("cuda:1") and torch.equal(found.numbers, expected)
