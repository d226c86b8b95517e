"""TF32: set for a GPU's products of float32 matrices alone, and left out, which is said, where there is none; and how
a tensor goes to a GPU."""

from types import SimpleNamespace

import pytest
import torch

from llava import devices
from llava.eval.loading_flags import LoadingFlags, loading_of
from llava.model import loading
from llava.train import machine


@pytest.fixture(autouse=True)
def as_before():
    before = devices.tf32_is_on()
    yield
    devices.set_tf32(before)


def test_only_the_gpus_products_are_rounded():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    expected = x @ x
    for wanted in (True, False, True):
        devices.set_tf32(wanted)
        assert devices.tf32_is_on() == wanted
        assert torch.equal(x @ x, expected)
    if hasattr(torch.backends, "fp32_precision"):
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
        assert torch.backends.mkldnn.matmul.fp32_precision != "tf32"


@pytest.mark.parametrize("gpu", [False, True])
def test_a_model_that_answers_is_loaded_with_it(monkeypatch, capsys, gpu):
    monkeypatch.setattr(loading, "gpu_has_tf32", lambda: gpu)
    devices.set_tf32(False)
    loading.settle_tf32(loading_of(LoadingFlags()).tf32)
    assert not devices.tf32_is_on() and capsys.readouterr().out == ""
    loading.settle_tf32(loading_of(LoadingFlags(tf32=True)).tf32)
    assert devices.tf32_is_on() == gpu and ("is left out" in capsys.readouterr().out) != gpu
    loading.settle_tf32(False)
    assert not devices.tf32_is_on()


@pytest.mark.parametrize("gpu", [False, True])
def test_training_on_a_gpu_without_it_goes_on_without_it(monkeypatch, capsys, gpu):
    """transformers would refuse the flag."""
    monkeypatch.setattr(machine, "gpu_has_tf32", lambda: gpu)
    monkeypatch.setattr(machine, "has_accelerator", lambda: True)
    asked = SimpleNamespace(tf32=True, bf16=False, fp16=False, use_cpu=False)
    machine.settle_machine(asked)
    assert asked.tf32 == (True if gpu else None) and ("is left out" in capsys.readouterr().out) != gpu


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("compiling", [False, True])
def test_what_is_copied_to_a_gpu_is_pinned_unless_that_cannot_be(monkeypatch, gradient, compiling):
    """A pinned copy has no gradient; under torch.compile making one is an error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    pinned = SimpleNamespace(to=lambda device, non_blocking: (device, non_blocking))
    given = SimpleNamespace(device=torch.device("cpu"), requires_grad=gradient, pin_memory=lambda: pinned)
    given.to = lambda device: device
    assert devices.moved(given, "cuda:1") == ("cuda:1" if gradient or compiling else ("cuda:1", True))
    assert devices.moved(given, "cpu") == "cpu"
