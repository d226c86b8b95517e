"""Processes that train together make the same calls, whatever pictures their rows show: else one waits for ever."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny_llava import PIXELS, write_base

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model

SHOWN = [(True, True), (True, False), (False, False)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("blank") / "tiny-llava-base")


def calls(base, shown, parted, looked):
    """How often a training step over two rows calls what processes call together, and the projector's gradient."""
    model = load_pretrained_model(str(base), None, device="cpu")[1].train()
    core = model.get_model()
    core.mm_projector.requires_grad_(not parted)
    model.lm_head.requires_grad_(True)
    for weight in core.mm_projector.parameters() if parted else ():
        weight.ds_id = 0  # as ZeRO-3 marks weights in parts
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX if picture else 4, 5, 6 + row] for row, picture in enumerate(shown)])
    pictures = torch.rand(sum(shown), 3, PIXELS, PIXELS) if any(shown) else None
    given = {"images": pictures}
    if looked:
        rest = iter(torch.rand(2, 1, 4, model.config.mm_hidden_size))
        given = {"image_features": [[next(rest)] if picture else [] for picture in shown]}
    seen = Counter()
    parts = {"embeddings": core.embed_tokens, "projector": core.mm_projector, "tower": core.vision_tower}
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: seen.update([name]))
    model(ids, labels=ids.masked_fill(ids < 0, IGNORE_INDEX), **given).loss.backward()
    return seen, core.mm_projector[0].weight.grad


@pytest.mark.parametrize("looked", [False, True], ids=["pictures", "features"])
@pytest.mark.parametrize("parted", [False, True], ids=["trains", "in parts"])
def test_rows_with_and_without_pictures_make_the_same_calls(base, parted, looked):
    found = [calls(base, shown, parted, looked) for shown in SHOWN]
    expected = {"embeddings": 1, "projector": 1, **({} if looked else {"tower": 1})}
    assert [dict(seen) for seen, _ in found] == [expected] * len(SHOWN)
    if not parted:
        assert all(grad is not None for _, grad in found) and found[-1][1].abs().max() == 0 < found[0][1].abs().max()
