"""Keys and values in buffers with room: what transformers' own cache holds, bit for bit, whatever is done to them."""

import copy

import pytest
import torch
from tiny_llava import write_base
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer

from llava.model import grown_cache as module
from llava.model.builder import load_pretrained_model
from llava.model.grown_cache import BLOCK, GrownLayer, grown_cache

LLAMA = LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=8)


def equal(grown, plain):
    return all(
        torch.equal(mine.keys, other.keys) and torch.equal(mine.values, other.values)
        for mine, other in zip(grown.layers, plain.layers, strict=True)
    )


def put(cache, rows, new, seed, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    for layer in range(2):
        keys, values = (torch.randn(rows, 2, new, 4, generator=random).to(dtype) for _ in range(2))
        cache.update(keys, values, layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_holds_what_a_dynamic_cache_holds(dtype):
    grown, plain = grown_cache(LLAMA), DynamicCache(config=LLAMA)
    assert {type(layer) for layer in grown.layers} == {GrownLayer} and grown.get_seq_length() == 0
    picks = {
        40: lambda cache: cache.crop(-3),
        70: lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
        75: lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        80: lambda cache: cache.batch_repeat_interleave(2),
    }
    with torch.no_grad():
        rows = 3
        for step in range(2 * BLOCK + 20):
            if step in picks:
                picks[step](grown)
                picks[step](plain)
                rows = len(plain.layers[0].keys)
            for cache in (grown, plain):
                put(cache, rows, 5 if step == 0 else 1, step, dtype)
            assert equal(grown, plain) and grown.get_seq_length() == plain.get_seq_length()
        twin = copy.deepcopy(grown)
        put(twin, rows, 1, 1000, dtype)
        assert equal(grown, plain) and twin.get_seq_length() == plain.get_seq_length() + 1
        put(grown, rows, 1, 1001, dtype)
        put(plain, rows, 1, 1000, dtype)
        assert equal(twin, plain) and not equal(grown, plain)


def test_with_gradients_nothing_is_written_into():
    grown, plain = grown_cache(LLAMA), DynamicCache(config=LLAMA)
    for cache in (grown, plain):
        with torch.no_grad():
            put(cache, 1, 3, 0)
        new = torch.ones(1, 2, 1, 4, requires_grad=True)
        keys, _ = cache.update(new * 2, new, 0)
        cache.update(new, new, 1)
        keys.sum().backward()
        assert torch.equal(new.grad, torch.full_like(new, 2))
        with torch.no_grad():
            put(cache, 1, 1, 1)
    assert equal(grown, plain)


def test_what_inference_mode_began_goes_on_outside_of_it():
    """Nothing outside may write into buffers that were made in it; transformers' cache goes on."""
    grown, plain = grown_cache(LLAMA), DynamicCache(config=LLAMA)
    for cache in (grown, plain):
        with torch.inference_mode():
            put(cache, 1, 3, 0)
            put(cache, 1, 1, 1)
        with torch.no_grad():
            put(cache, 1, 1, 2)
            put(cache, 1, 1, 3)
        with torch.inference_mode():
            put(cache, 1, 1, 4)
    assert equal(grown, plain)


def test_a_token_is_written_alone():
    """A buffer stays where it is until it is full."""
    cache = grown_cache(LLAMA)
    with torch.no_grad():
        put(cache, 1, BLOCK, 0)
        places = set()
        for step in range(BLOCK):
            put(cache, 1, 1, step)
            places.add(cache.layers[0].keys.data_ptr())
        assert len(places) == 1
        put(cache, 1, 1, 0)
        assert cache.layers[0].keys.data_ptr() not in places


def test_layers_that_see_a_window_stay_as_they_are():
    config = MistralConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, sliding_window=4)
    assert not any(isinstance(layer, GrownLayer) for layer in grown_cache(config).layers)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_pretrained_model(str(write_base(tmp_path_factory.mktemp("base") / "tiny-llava")), None, device="cpu")[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_answers_and_their_scores_are_the_same_bit_for_bit(model, monkeypatch, dtype, attention):
    monkeypatch.setattr(module, "BLOCK", 4)
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation(attention)
    ids = torch.randint(5, 50, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    asked = {"attention_mask": mask, "max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    asked |= {"output_scores": True, "return_dict_in_generate": True, "pad_token_id": 0}
    for rows in (slice(0, 1), slice(0, 3)):
        mine = model.generate(ids[rows], **asked | {"attention_mask": mask[rows]})
        plain = model.generate(ids[rows], past_key_values=DynamicCache(), **asked | {"attention_mask": mask[rows]})
        assert isinstance(mine.past_key_values.layers[0], GrownLayer)
        assert type(plain.past_key_values.layers[0]) is DynamicLayer
        assert torch.equal(mine.sequences, plain.sequences)
        assert all(torch.equal(one, other) for one, other in zip(mine.scores, plain.scores, strict=True))


def test_several_beams_keep_transformers_cache(model):
    ids = torch.randint(5, 50, (1, 7), generator=torch.Generator().manual_seed(0))
    found = model.generate(ids, max_new_tokens=3, num_beams=2, return_dict_in_generate=True, pad_token_id=0)
    assert type(found.past_key_values.layers[0]) is DynamicLayer
