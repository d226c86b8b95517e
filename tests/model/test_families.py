"""One implementation of pictures, offsets and routing for both decoders: Llama and Mistral behave alike."""

from __future__ import annotations

import argparse

import pytest
import torch
from tiny_llava import FAMILIES, LAYERS, make_tokenizer, write_base, write_stage

from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.language_model.retriever import Retriever
from llava.utils import UserError

QUESTIONS = ("is there a lesion", "what side", "where is the lesion in the left lung")


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def stage(request, tmp_path_factory):
    """A stage checkpoint over a tiny base of each family, loaded: ``(tokenizer, model, base's model)``."""
    folder = tmp_path_factory.mktemp("family")
    base = write_base(folder / "tiny-base", family=request.param)
    light = write_stage(folder / "llava-tiny_abd_chest", base)
    tokenizer, model, *_ = load_pretrained_model(str(light), str(base), device="cpu")
    _, plain, *_ = load_pretrained_model(str(base), None, device="cpu")
    assert type(model) is FAMILIES[request.param][1]
    return tokenizer, model, plain


def prompts(tokenizer, questions):
    """Left-padded ids and mask, and one picture each."""
    rows = [tokenizer_image_token(f"USER: <image>\n{text} ASSISTANT:", tokenizer) for text in questions]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    pictures = [torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(len(text))) for text in questions]
    return ids, mask, torch.stack(pictures)


def answer(loaded, questions, **more):
    tokenizer, model, *_ = loaded
    ids, mask, pictures = prompts(tokenizer, questions)
    output = model.generate(
        ids, attention_mask=mask, images=pictures, questions=list(questions), max_new_tokens=5, do_sample=False,
        pad_token_id=0, eos_token_id=None, **more,
    )  # fmt: skip
    return output.tolist(), model.last_route


def test_a_batch_answers_and_routes_as_one_by_one(stage):
    together, route = answer(stage, QUESTIONS)
    for number, question in enumerate(QUESTIONS):
        alone, own = answer(stage, [question])
        assert alone[0] == together[number]
        assert torch.equal(own.slot_indices[0].sort().values, route.slot_indices[number].sort().values)


def test_slots_change_the_answers_and_their_absence_does_not(stage):
    tokenizer, model, plain = stage
    ids, mask, pictures = prompts(tokenizer, QUESTIONS)
    retriever = model.retriever
    with torch.inference_mode():
        routed = model(
            input_ids=ids, attention_mask=mask, images=pictures, text_query=retriever.encode_questions(QUESTIONS)
        ).logits
        model.retriever = None
        try:
            without = model(input_ids=ids, attention_mask=mask, images=pictures).logits
        finally:
            model.retriever = retriever
        base = plain(input_ids=ids, attention_mask=mask, images=pictures).logits
    assert torch.equal(without, base)
    assert not torch.allclose(routed, base, atol=1e-2)


def test_the_offset_equals_a_dense_one_added_to_the_projection(stage):
    """The route of a single question, written into the base's output projections by hand."""
    tokenizer, model, plain = stage
    ids, mask, pictures = prompts(tokenizer, QUESTIONS[:1])
    answer(stage, QUESTIONS[:1])
    route, retriever = model.last_route, model.retriever
    assert isinstance(retriever, Retriever)
    A, B = (torch.cat([getattr(task, kind)["o_proj"] for task in retriever.pool.tasks]) for kind in "AB")
    before = [layer.self_attn.o_proj.weight.detach().clone() for layer in plain.model.layers]
    with torch.inference_mode():
        for number in range(LAYERS):
            for slot, weight in zip(route.slot_indices[0].tolist(), route.slot_weights[0].tolist(), strict=True):
                dense = A[slot, number].T @ B[slot, number]  # [out, in]
                plain.model.layers[number].self_attn.o_proj.weight += retriever.settings.scale * weight * dense
        by_hand = plain(input_ids=ids, images=pictures).logits
        for layer, weight in zip(plain.model.layers, before, strict=True):
            layer.self_attn.o_proj.weight.copy_(weight)
        query = retriever.encode_questions(QUESTIONS[:1])
        routed = model(input_ids=ids, images=pictures, text_query=query).logits
    assert torch.allclose(routed, by_hand, atol=1e-3, rtol=1e-4)


def test_the_route_holds_for_every_decoding_step(stage):
    """With a cache, and without one, where each step sees the whole text anew."""
    assert answer(stage, QUESTIONS)[0] == answer(stage, QUESTIONS, use_cache=False)[0]
    assert answer(stage, QUESTIONS, num_beams=2)[0] == [answer(stage, [q], num_beams=2)[0][0] for q in QUESTIONS]


def test_the_given_task_decides(stage):
    _, route = answer(stage, QUESTIONS, tasks=["chest"] * len(QUESTIONS))
    assert [route.describe(number)["task"] for number in range(len(QUESTIONS))] == ["chest"] * len(QUESTIONS)


def test_picture_tokens_start_as_the_mean_and_a_trained_projector_is_read(stage, tmp_path):
    """LLaVA's first stage on a decoder without pictures: tower, projector and tokens from the arguments."""
    tokenizer, model, plain = stage
    tower = plain.get_vision_tower()
    tower.vision_tower.save_pretrained(tmp_path)
    tower.image_processor.save_pretrained(tmp_path)
    projector = {key: value for key, value in plain.state_dict().items() if "mm_projector" in key}
    torch.save(projector, tmp_path / "mm_projector.bin")
    values = {"vision_tower": str(tmp_path), "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    values |= {"mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "flat", "mm_use_im_patch_token": False}
    values |= {"pretrain_mm_mlp_adapter": str(tmp_path / "mm_projector.bin"), "mm_use_im_start_end": True}
    arguments = argparse.Namespace(**values)
    blind = {**plain.config.to_dict(), "vision_config": None, "mm_vision_tower": None}
    fresh, own = type(plain)(type(plain.config).from_dict(blind)), make_tokenizer()
    fresh.get_model().initialize_vision_modules(arguments)
    assert torch.equal(fresh.get_model().mm_projector[0].weight, plain.get_model().mm_projector[0].weight)
    before = fresh.get_input_embeddings().weight.mean(0)
    fresh.initialize_vision_tokenizer(arguments, own)
    rows = fresh.get_input_embeddings().weight[own.convert_tokens_to_ids(["<im_start>", "<im_end>"])]
    assert torch.allclose(rows, before.expand(2, -1), atol=1e-6) and fresh.lm_head.weight.shape[0] == len(own)
    arguments.mm_projector_type = "linear"
    fresh = type(plain)(type(plain.config).from_dict(blind))
    with pytest.raises(UserError, match="mm_projector_type"):
        fresh.get_model().initialize_vision_modules(arguments)


def test_gradients_reach_slots_through_checkpointed_layers(stage):
    tokenizer, model, _ = stage
    ids, mask, pictures = prompts(tokenizer, QUESTIONS)
    parameters = model.retriever.train_only("abd")
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    try:
        query = model.retriever.encode_questions(QUESTIONS)
        labels = ids.masked_fill(ids < 3, -100)
        loss = model(input_ids=ids, attention_mask=mask, images=pictures, labels=labels, text_query=query).loss
        gradients = torch.autograd.grad(loss, parameters)
    finally:
        model.eval().gradient_checkpointing_disable()
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
