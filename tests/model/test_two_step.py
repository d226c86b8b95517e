"""A route outlives the call that decided it: embeddings made before, caches, other programs' decoding loops."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_llava import FAMILIES, write_base, write_stage
from transformers import DynamicCache

from llava.data.labels import conversation_ids
from llava.model.builder import load_pretrained_model
from llava.model.decision import beams
from llava.padding import pad

ASKED = ("is there a lesion", "where is the lesion in the left lung")
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def stage(request, tmp_path_factory):
    """``(tokenizer, model)`` of a stage over a base of each family."""
    folder = tmp_path_factory.mktemp("two-step")
    base = write_base(folder / "tiny-base", family=request.param)
    light = write_stage(folder / "llava-tiny_abd_chest", base)
    return load_pretrained_model(str(light), str(base), device="cpu")[:2]


def prompts(tokenizer, pictured=True, side="right", seed=0):
    rows = [
        torch.tensor(conversation_ids([("human", text)], tokenizer, "vicuna_v1", int(pictured))[0]) for text in ASKED
    ]
    ids, mask = pad(rows, side)
    pictures = torch.randn(len(ids), 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return ids, mask.long(), pictures


def prepare(model, ids, mask, pictures, **more):
    """Embeddings and mask, as contrastive decoding and attribution tools make them."""
    _, _, mask, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, pictures, **more)
    return embeds, mask


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


# -- embeddings --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_embeddings_made_before_keep_the_route_of_their_prompt(stage):
    tokenizer, model = stage
    ids, mask, pictures = prompts(tokenizer)
    expected = model(ids, attention_mask=mask, images=pictures, questions=list(ASKED)).logits
    embeds, wide = prepare(model, ids, mask, pictures)
    found = model(inputs_embeds=embeds, attention_mask=wide).logits
    close(found[wide.bool()], expected[wide.bool()])
    base = model(inputs_embeds=embeds, attention_mask=wide, route="none").logits
    assert not torch.allclose(base, expected, atol=1e-2)
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=wide, route=model.last_route).logits, found)


@torch.inference_mode()
def test_two_preparations_are_told_apart_whichever_comes_first(stage):
    """Contrastive decoding: a picture and its noised or missing twin, prepared one after the other."""
    tokenizer, model = stage
    ids, mask, pictures = prompts(tokenizer)
    _, _, noised = prompts(tokenizer, seed=7)
    expected = [model(ids, attention_mask=mask, images=each).logits for each in (pictures, noised)]
    made = [prepare(model, ids, mask, each) for each in (pictures, noised)]
    for number in (1, 0, 1):
        embeds, wide = made[number]
        close(model(inputs_embeds=embeds, attention_mask=wide).logits[wide.bool()], expected[number][wide.bool()])


def test_copies_rows_and_padded_batches_of_embeddings_are_known(stage):
    tokenizer, model = stage
    ids, mask, pictures = prompts(tokenizer)
    model.retriever.pool.changed()
    with torch.inference_mode():  # what the pool works out here must serve the gradients below
        model(ids, attention_mask=mask, images=pictures)
    embeds, wide = prepare(model, ids, mask, pictures)
    found = model(inputs_embeds=embeds, attention_mask=wide).logits.detach()
    leaf = embeds.detach().clone().requires_grad_()
    logits = model(inputs_embeds=leaf, attention_mask=wide).logits
    close(logits.detach(), found)
    logits.sum().backward()
    assert leaf.grad.abs().sum() > 0
    with torch.inference_mode():
        close(model(inputs_embeds=embeds[1:].double().float(), attention_mask=wide[1:]).logits, found[1:])
        zeros = torch.zeros(len(embeds), 3, embeds.shape[-1])
        left = torch.cat([zeros, embeds.flip(0)], 1)
        padded = torch.cat([torch.zeros(len(embeds), 3).long(), wide.flip(0)], 1)
        close(model(inputs_embeds=left, attention_mask=padded).logits[:, 3:].flip(0)[1], found[1])
        joined = torch.cat([embeds[:1], embeds[:1]])
        close(model(inputs_embeds=joined, attention_mask=wide[[0, 0]]).logits[1], found[0])


def test_embeddings_of_unknown_make_are_refused_with_the_ways_out(stage):
    tokenizer, model = stage
    ids, mask, pictures = prompts(tokenizer)
    embeds, wide = prepare(model, ids, mask, pictures)
    route = model.last_route
    noisy = embeds + 0.01
    for call in (model, model.generate, model.model):
        with pytest.raises(ValueError, match="route of these inputs_embeds is not known.*questions.*last_route.*none"):
            call(inputs_embeds=noisy, attention_mask=wide)
    close(model(inputs_embeds=noisy, attention_mask=wide, route=route).logits, model(
        inputs_embeds=noisy, attention_mask=wide, slot_indices=route.slot_indices, slot_weights=route.slot_weights
    ).logits)  # fmt: skip
    given = {"questions": list(ASKED), "image_query": model.image_query(model.vision_features(pictures), pictures)}
    close(model(inputs_embeds=noisy, attention_mask=wide, **given).logits, model(
        inputs_embeds=noisy, attention_mask=wide, route=route
    ).logits)  # fmt: skip
    with pytest.raises(ValueError, match="inputs_embeds is not known"):  # its pictures are not known
        model(inputs_embeds=noisy, attention_mask=wide, questions=list(ASKED))


def test_another_adapter_does_not_know_what_was_prepared_before(stage):
    tokenizer, model = stage
    ids, mask, pictures = prompts(tokenizer)
    embeds, wide = prepare(model, ids, mask, pictures)
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, images=pictures, use_cache=True).past_key_values
    adapter, step = model.retriever, torch.tensor([[5], [6]])
    other = copy.deepcopy(adapter)
    model.attach_adapter(other)
    try:
        with pytest.raises(ValueError, match="inputs_embeds is not known"):
            model(inputs_embeds=embeds, attention_mask=wide)
        with pytest.raises(ValueError, match="nothing is known of the route that filled this cache"):
            model(step, past_key_values=cache)
    finally:
        model.attach_adapter(adapter)


def test_generate_takes_prepared_embeddings(stage):
    tokenizer, model = stage
    ids, mask, pictures = prompts(tokenizer, side="left")
    expected = model.generate(ids, attention_mask=mask, images=pictures, questions=list(ASKED), **GREEDY)
    route = model.last_route
    before = model.config.tokenizer_padding_side
    model.config.tokenizer_padding_side = "left"
    try:
        embeds, wide = prepare(model, ids, mask, pictures)
    finally:
        model.config.tokenizer_padding_side = before
    assert torch.equal(model.generate(inputs_embeds=embeds, attention_mask=wide, **GREEDY), expected)
    assert torch.equal(model.last_route.slot_indices, route.slot_indices)


@torch.inference_mode()
def test_the_decoder_called_by_itself_follows_the_route(stage):
    tokenizer, model = stage
    ids, mask, pictures = prompts(tokenizer)
    embeds, wide = prepare(model, ids, mask, pictures)
    out = model.model(inputs_embeds=embeds, attention_mask=wide, output_hidden_states=True)
    whole = model(inputs_embeds=embeds, attention_mask=wide, output_hidden_states=True, output_attentions=True)
    close(out.last_hidden_state, whole.hidden_states[-1])
    base = model.model(inputs_embeds=embeds, attention_mask=wide, route="none").last_hidden_state
    assert not torch.allclose(base, out.last_hidden_state, atol=1e-2)
    text, mask, _ = prompts(tokenizer, pictured=False)
    found = model.model(input_ids=text, attention_mask=mask).last_hidden_state
    close(model.lm_head(found), model(text, attention_mask=mask, questions=list(ASKED)).logits)


# -- caches ------------------------------------------------------------------------------------------------------------


def decode(model, ids, mask, pictures, steps=4, masked=False, **more):
    """A loop of another program: the whole prompt, then token by token with the cache."""
    cache, tokens, inputs = None, [], ids
    for number in range(steps):
        more = {**more, "images": pictures} if pictures is not None else more  # at every step, as LLaVA's own does
        given = mask if masked or number == 0 else None
        out = model(inputs, attention_mask=given, past_key_values=cache, use_cache=True, **more)
        cache, last = out.past_key_values, mask.sum(1) - 1
        place = [-1] * len(ids)
        if number == 0:
            grown = out.logits.shape[1] - ids.shape[1]
            place = [int(end) + grown for end in last]
        inputs = torch.stack([out.logits[row, at] for row, at in enumerate(place)]).argmax(-1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        tokens.append(inputs)
    return torch.cat(tokens, 1)


@torch.inference_mode()
@pytest.mark.parametrize("masked", [True, False])
def test_another_programs_loop_gives_what_generate_gives(stage, masked):
    """Each row's own padding counts, too, whether the loop hands a mask of the text over or none."""
    tokenizer, model = stage
    ids, mask, pictures = prompts(tokenizer)
    expected = model.generate(ids, attention_mask=mask, images=pictures, questions=list(ASKED), **GREEDY)
    assert torch.equal(decode(model, ids, mask, pictures, masked=masked), expected)
    alone = [decode(model, row[None][keep[None].bool()][None], torch.ones(1, int(keep.sum())).long(), picture[None])
             for row, keep, picture in zip(ids, mask, pictures)]  # fmt: skip
    assert torch.equal(torch.cat(alone), expected)
    base = model.generate(ids, attention_mask=mask, images=pictures, route="none", **GREEDY)
    assert torch.equal(decode(model, ids, mask, pictures, masked=masked, route="none"), base)
    assert not torch.equal(base, expected)


@torch.inference_mode()
def test_interleaved_loops_keep_their_own_routes(stage):
    tokenizer, model = stage
    ids, _, pictures = prompts(tokenizer)
    first, second = ids[:1], ids[1:]
    step = torch.tensor([[5]])
    caches = [
        model(i, images=p, use_cache=True).past_key_values for i, p in ((first, pictures[:1]), (second, pictures[1:]))
    ]
    twin = copy.deepcopy(caches[0])
    found = [model(step, past_key_values=cache).logits for cache in (*caches, twin)]
    whole = model(torch.cat([first, step], 1), images=pictures[:1], questions=[ASKED[0]]).logits
    close(found[0][:, -1], whole[:, -1])
    close(found[2], found[0])
    whole = model(torch.cat([second, step], 1), images=pictures[1:], questions=[ASKED[1]]).logits
    close(found[1][:, -1], whole[:, -1])


@torch.inference_mode()
def test_an_empty_cache_is_a_prefill(stage):
    tokenizer, model = stage
    for pictured in (True, False):
        ids, mask, pictures = prompts(tokenizer, pictured)
        more = {"images": pictures} if pictured else {}
        expected = model(ids, attention_mask=mask, questions=list(ASKED), **more).logits
        cache = DynamicCache(config=model.config)
        assert torch.equal(model(ids, attention_mask=mask, past_key_values=cache, **more).logits, expected)
        assert cache.get_seq_length() == expected.shape[1]


@torch.inference_mode()
def test_a_cache_of_unknown_make_is_refused(stage):
    tokenizer, model = stage
    ids, mask, _ = prompts(tokenizer, pictured=False)
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    foreign = DynamicCache(config=model.config)
    for number, layer in enumerate(cache.layers):
        foreign.update(layer.keys, layer.values, number)
    step = torch.tensor([[5], [6]])
    with pytest.raises(ValueError, match="nothing is known of the route that filled this cache"):
        model(step, past_key_values=foreign)
    assert model(step, past_key_values=foreign, route="none").logits.isfinite().all()


@torch.inference_mode()
def test_a_cache_that_grew_to_beams_takes_its_routes_along(stage):
    tokenizer, model = stage
    ids, mask, pictures = prompts(tokenizer)
    cache = model(ids, attention_mask=mask, images=pictures, use_cache=True).past_key_values
    one = model(torch.tensor([[5], [6]]), past_key_values=copy.deepcopy(cache)).logits
    wide, three = copy.deepcopy(cache), copy.deepcopy(cache)
    wide.batch_repeat_interleave(2)
    found = model(torch.tensor([[5], [5], [6], [6]]), past_key_values=wide).logits
    close(found[::2], one)
    close(found[1::2], one)
    three.batch_select_indices(torch.tensor([0, 1, 1]))
    close(model(torch.tensor([[5], [6], [6]]), past_key_values=three).logits, one[[0, 1, 1]])
    with pytest.raises(ValueError, match=r"3 question\(s\) does not fit a batch of 4 row\(s\)"):
        model(torch.tensor([[5], [6], [6], [6]]), past_key_values=three)
    assert beams(6, 2, "a route") == 3
