"""Calls that no one here makes: what does not fit is refused, and no row takes the route of another."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_llava import write_base, write_stage
from tiny_world import make_world
from transformers import DynamicCache, GenerationConfig

from llava.data.labels import conversation_ids
from llava.model.builder import load_pretrained_model
from llava.padding import pad

ASKED = ("is there a lesion", "where is the lesion in the left lung", "what side is the lung")
GREEDY = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    base = write_base(folder / "tiny-base")
    light = write_stage(folder / "llava-tiny_abd_chest", base)
    return load_pretrained_model(str(light), str(base), device="cpu")[:2]


def prompts(tokenizer, asked=ASKED, side="right"):
    rows = [torch.tensor(conversation_ids([("human", text)], tokenizer, "vicuna_v1", 1)[0]) for text in asked]
    ids, mask = pad(rows, side)
    return ids, mask.long(), torch.randn(len(ids), 3, 16, 16, generator=torch.Generator().manual_seed(0))


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


# -- caches ------------------------------------------------------------------------------------------------------------


def _swapped(cache):
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    return [2, 0, 1]


def _picked(cache):
    cache.batch_select_indices(torch.tensor([2, 1]))
    return [2, 1]


def _beams_dropped(cache):
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 1, 5]))
    return [0, 0, 2]


@torch.inference_mode()
@pytest.mark.parametrize("change", [_swapped, _picked, _beams_dropped])
@pytest.mark.parametrize("copied", [False, True])
def test_rows_picked_from_a_cache_keep_their_own_routes(stage, change, copied):
    tokenizer, model = stage
    ids, mask, pictures = prompts(tokenizer)
    step = torch.tensor([[5], [6], [7]])
    expected = model(
        step, past_key_values=model(ids, attention_mask=mask, images=pictures, use_cache=True).past_key_values
    ).logits
    cache = model(ids, attention_mask=mask, images=pictures, use_cache=True).past_key_values
    if copied:
        cache = copy.deepcopy(cache)
    rows = change(cache)
    assert isinstance(cache, DynamicCache)
    close(model(step[rows], past_key_values=cache).logits, expected[rows])


@torch.inference_mode()
def test_a_cropped_cache_goes_on(stage):
    tokenizer, model = stage
    ids, mask, pictures = prompts(tokenizer)
    cache = model(ids, attention_mask=mask, images=pictures, use_cache=True).past_key_values
    step = torch.tensor([[5], [6], [7]])
    expected = model(step, past_key_values=cache).logits
    cache.crop(-1)
    close(model(step, past_key_values=cache).logits, expected)


# -- what is given -----------------------------------------------------------------------------------------------------


def test_a_route_of_other_questions_is_refused(stage):
    tokenizer, model = stage
    ids, mask, pictures = prompts(tokenizer)
    model.generate(ids[:2], attention_mask=mask[:2], images=pictures[:2], **GREEDY)
    two = model.last_route
    rows = {"attention_mask": mask[[0, 1, 2, 0]], "images": pictures[[0, 1, 2, 0]], "route": two}
    for call in (lambda: model.generate(ids[[0, 1, 2, 0]], **rows, **GREEDY), lambda: model(ids[[0, 1, 2, 0]], **rows)):
        with pytest.raises(ValueError, match=r"the route is of 2 question\(s\), for 4 prompt\(s\)"):
            call()
    with pytest.raises(ValueError, match=r"the route is of 2 question\(s\), for 4 prompt\(s\)"):
        model.model(inputs_embeds=torch.zeros(4, 3, 32), route=two)
    model.generate(ids[:1], attention_mask=mask[:1], images=pictures[:1], **GREEDY)  # of one: for all, as broadcast
    with torch.no_grad():
        assert model(ids, attention_mask=mask, images=pictures, route=model.last_route).logits.isfinite().all()


def test_what_is_given_is_given_for_every_row(stage):
    tokenizer, model = stage
    ids, mask, pictures = prompts(tokenizer, ASKED[:2])
    kept = {"attention_mask": mask, "images": pictures, **GREEDY}
    for more, said in (
        ({"tasks": ["abd"]}, r"1 task\(s\) for 2 prompt"),
        ({"tasks": "abd"}, r"1 task\(s\) for 2 prompt"),
        ({"tasks": ["abd"] * 3}, r"3 task\(s\) for 2 prompt"),
        ({"questions": "ab"}, r"1 question\(s\) for 2 prompt"),
        ({"questions": ["what side", None]}, "question of row 1 is None"),
        ({"text_query": torch.zeros(1, 32)}, r"1 text_query row\(s\) for 2 prompt"),
        ({"image_query": torch.zeros(1, 16)}, r"1 image_query row\(s\) for 2 prompt"),
    ):
        with pytest.raises(ValueError, match=said):
            model.generate(ids, **kept, **more)
    one = {"attention_mask": mask[:1], "images": pictures[:1], **GREEDY}
    expected = model.generate(ids[:1], questions=[ASKED[1]], **one), model.last_route.slot_weights
    assert torch.equal(model.generate(ids[:1], questions=ASKED[1], **one), expected[0])
    assert torch.equal(model.last_route.slot_weights, expected[1])


def test_prompts_of_another_shape_are_named(stage):
    tokenizer, model = stage
    ids, mask, pictures = prompts(tokenizer)
    for given, said in (
        ({"inputs": ids[0]}, r"input_ids are \[\d+\]; give a tensor of shape \[batch, tokens\]"),
        ({"inputs": ids.tolist()}, "input_ids are list"),
        ({"inputs": ids, "attention_mask": mask[:1]}, r"attention_mask is \[1, \d+\], for input_ids \[3, "),
        ({"inputs": ids, "attention_mask": mask[:, 1:]}, "attention_mask is "),
    ):
        with pytest.raises(ValueError, match=said):
            model.generate(images=pictures, **given, **GREEDY)
    with pytest.raises(ValueError, match="attention_mask is "):
        model(ids, attention_mask=mask[:, 1:], images=pictures)
    with pytest.raises(ValueError, match="pictures need an attention_mask of shape"):
        model(ids, attention_mask=mask[:, None, None], images=pictures)


@torch.inference_mode()
def test_a_mask_of_who_sees_whom_hides_no_question(stage):
    tokenizer, model = stage
    rows = [torch.tensor(conversation_ids([("human", text)], tokenizer, "vicuna_v1", 0)[0]) for text in ASKED]
    ids, keep = pad(rows, "right")
    seen = torch.ones(ids.shape[1], ids.shape[1]).tril().bool() & keep[:, None, None]
    four = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = model(ids, attention_mask=keep.long()).logits
    close(model(ids, attention_mask=four).logits[keep], expected[keep])


def test_an_assistant_model_is_refused_before_anything_is_changed(stage):
    tokenizer, model = stage
    ids, mask, pictures = prompts(tokenizer, ASKED[:1])
    kept = {"attention_mask": mask, "images": pictures, **GREEDY}
    early = GenerationConfig(assistant_early_exit=1, **GREEDY)
    before = model.generate(ids, **kept)
    for more in ({"assistant_model": model}, {"assistant_early_exit": 1}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="knows no assistant model"):
            model.generate(ids, **kept, **more)
    with pytest.raises(ValueError, match="knows no assistant model"):
        model.generate(ids, attention_mask=mask, images=pictures, generation_config=early)
    assert model.model.config.num_hidden_layers == len(model.model.layers)
    assert torch.equal(model.generate(ids, **kept), before)


# -- parts -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_a_layer_called_by_itself_does_not_answer_as_the_base(stage):
    tokenizer, model = stage
    ids, mask, pictures = prompts(tokenizer)
    embeds = model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, pictures)[4]
    places = torch.arange(embeds.shape[1])[None]
    more = {"position_embeddings": model.model.rotary_emb(embeds, places), "position_ids": places}
    with pytest.raises(ValueError, match="layer with slots was called by itself"):
        model.model.layers[0](embeds, **more)
    assert model.model.layers[0](embeds, weight_offset=None, **more) is not None


@torch.inference_mode()
def test_the_decoder_takes_its_arguments_by_place(stage):
    tokenizer, model = stage
    ids, mask, pictures = prompts(tokenizer)
    _, _, wide, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, pictures)
    expected = model.model(inputs_embeds=embeds, attention_mask=wide).last_hidden_state
    assert torch.equal(model.model(None, wide, None, None, embeds).last_hidden_state, expected)


def test_foreign_embeddings_do_not_lose_the_prefix_of_a_stage_that_has_one(tmp_path):
    world = make_world(tmp_path, ("abd",))
    world.train("abd", tmp_path / "llava-l2p", None, "--method", "l2p")
    tokenizer, model = load_pretrained_model(str(tmp_path / "llava-l2p"), str(world.base), device="cpu")[:2]
    model.requires_grad_(False)
    ids, mask, pictures = prompts(tokenizer)
    asked = {"questions": list(ASKED), "image_query": model.image_query(model.vision_features(pictures), pictures)}
    given = model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, pictures)
    expected = model(ids, attention_mask=mask, images=pictures).logits
    found = model(inputs_embeds=given[4], attention_mask=given[2], **asked).logits
    close(found[given[2].bool()], expected[given[2].bool()])
    given = model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, pictures, route="none")
    with pytest.raises(ValueError, match="puts embeddings in front of each prompt"):
        model(inputs_embeds=given[4] + 0.01, attention_mask=given[2], **asked)
