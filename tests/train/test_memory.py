"""Gradient checkpointing by need: the estimate at the shapes of a 7B model, on the GPU that there is."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llava.train import memory
from llava.train.memory import activation_bytes, settle_checkpointing

CONFIG = SimpleNamespace(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
GIGA = 10**9


class Model(nn.Module):
    """Of a 7B's size, with slots that train."""

    def __init__(self, whole=False):
        super().__init__()
        with torch.device("meta"):
            self.layers = nn.ParameterList([nn.Parameter(torch.empty(6_700_000_000, dtype=torch.bfloat16), whole)])
            self.slots = nn.Parameter(torch.empty(16_800_000))
        self.config = CONFIG

    def get_model(self):
        return self


def run(batch, world_size=1):
    return SimpleNamespace(
        bf16=True, fp16=False, world_size=world_size, per_device_train_batch_size=batch, gradient_checkpointing=None
    )


def test_activations_of_a_frozen_7b_are_as_counted_operator_by_operator():
    without_logits = SimpleNamespace(**{**vars(CONFIG), "vocab_size": 0})
    assert activation_bytes(without_logits, 636, 2, whole=False) == pytest.approx(2.66 * GIGA, rel=0.02)
    assert activation_bytes(CONFIG, 636, 2, whole=True) > activation_bytes(CONFIG, 636, 2, whole=False)


@pytest.mark.parametrize(
    ("batch", "free", "whole", "world_size", "stage", "on"),
    [
        (4, 80, False, 1, 0, False),
        (16, 80, False, 1, 0, False),
        (32, 80, False, 1, 0, True),
        (4, 24, False, 1, 0, True),
        (1, 24, False, 1, 0, False),
        (1, 12, False, 1, 2, True),
        (1, 12, False, 4, 3, False),  # a quarter of the weights each
        (1, 80, True, 1, 0, True),
    ],
)
def test_a_7b_is_checkpointed_where_a_step_would_not_fit(
    monkeypatch, capsys, batch, free, whole, world_size, stage, on
):
    monkeypatch.setattr(memory, "free_memory", lambda: free * GIGA)
    model, args = Model(whole), run(batch, world_size)
    monkeypatch.setattr(memory, "already_there", lambda parameters: 0)
    settle_checkpointing(model, 636, args, stage)
    assert args.gradient_checkpointing is on
    said = capsys.readouterr().out
    assert f"gradient checkpointing: {'on' if on else 'off'}" in said and f"{free}.0 GB that are free" in said


def test_without_a_gpu_nothing_is_checkpointed(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: None)
    settle_checkpointing(Model(), 636, args := run(4), 0)
    assert args.gradient_checkpointing is False
