"""Offsets that act behind the picture alone: everything up to its end is the frozen base's, however it is asked."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_llava import FAMILIES, HIDDEN, PIXELS, VISION
from transformers import CLIPVisionConfig

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.language_model.retriever import Retriever
from llava.padding import pad
from llava.slots.offsets import target_features
from llava.slots.pool import Pool
from llava.slots.settings import RetrieverSettings

WORDS, PATCHES, SLOTS, TOP_K = 60, (PIXELS // 8) ** 2, 4, 2
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
PICTURE = [IMAGE_TOKEN_INDEX]
HEAD = [1, 7, 8]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
ROWS = {
    "one": HEAD + PICTURE + [9, 10, 11],
    "longer": HEAD + PICTURE + [12, 13, 14, 15, 16, 17],
    "two": HEAD + PICTURE + [18] + PICTURE + [19, 20],
    "none": [1, 21, 22, 23, 24],
}


def make_model(scope="question", family="llama", **fields):
    """A random model in float64 with one trained task of slots on several projections."""
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=VISION, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=PIXELS,
        patch_size=8,
    )  # fmt: skip
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=WORDS, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, vision_config=tower.to_dict(), mm_hidden_size=VISION, mm_projector_type="linear",
    )  # fmt: skip
    model = model_class(config).eval().requires_grad_(False).double()
    settings = RetrieverSettings(
        num_layers=2, features={target: target_features(config, target) for target in TARGETS}, text_dim=8,
        query_mode="text", rank=2, top_k=TOP_K, router="keys", offset_scope=scope, **fields,
    )  # fmt: skip
    pool = Pool(settings)
    task = pool.append("abd", SLOTS)
    task.text_keys.normal_()
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.normal_(std=0.3)
    task.trained = True
    model.attach_adapter(Retriever(pool))
    model.retriever.double()
    return model


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request):
    return make_model(family=request.param)


def batch_of(*names, side="right", labels=False, seed=0):
    """Rows, their pictures and queries; with ``labels`` the last two words of each are answers."""
    rows = [torch.tensor(ROWS[name]) for name in names]
    ids, mask = pad(rows, side)
    generator = torch.Generator().manual_seed(seed)
    pictures = [
        [torch.randn(3, PIXELS, PIXELS, generator=generator).double() for _ in range(row.tolist().count(-200))]
        for row in rows
    ]
    batch = {"input_ids": ids, "attention_mask": mask.long(), "images": pictures}
    batch["text_query"] = torch.randn(len(rows), 8, generator=generator).double()
    if labels:
        known = [torch.cat([torch.full_like(row[:-2], IGNORE_INDEX), row[-2:]]) for row in rows]
        batch["labels"] = pad(known, side, IGNORE_INDEX)[0]
    return batch


def spliced_length(name):
    return len(ROWS[name]) + ROWS[name].count(IMAGE_TOKEN_INDEX) * (PATCHES - 1)


def head_length(name):
    """Positions up to the end of a row's last picture."""
    if IMAGE_TOKEN_INDEX not in ROWS[name]:
        return 0
    return spliced_length(name) - ROWS[name][::-1].index(IMAGE_TOKEN_INDEX)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("side", ["right", "left"])
def test_all_up_to_the_picture_is_the_bases_bit_for_bit(model, side):
    """Hidden states, keys and values; behind it the offsets act, and in a row without picture everywhere."""
    model.config.tokenizer_padding_side = side
    names = tuple(ROWS)
    batch = batch_of(*names, side=side)
    asked = {"output_hidden_states": True, "use_cache": True}
    found, base = model(**batch, **asked), model(**batch, **asked, route="none")
    lengths = [spliced_length(name) for name in names]
    for row, name in enumerate(names):
        first = max(lengths) - lengths[row] if side == "left" else 0
        before, behind = slice(first, first + head_length(name)), first + head_length(name)
        for mine, theirs in zip(found.hidden_states, base.hidden_states, strict=True):
            assert torch.equal(mine[row, before], theirs[row, before])
        for mine, theirs in zip(found.past_key_values.layers, base.past_key_values.layers, strict=True):
            assert torch.equal(mine.keys[row, :, before], theirs.keys[row, :, before])
            assert torch.equal(mine.values[row, :, before], theirs.values[row, :, before])
        assert not torch.allclose(found.logits[row, behind], base.logits[row, behind])
    model.config.tokenizer_padding_side = "right"


def test_behind_the_picture_the_offsets_are_those_of_scope_all():
    """The question over the base's keys and values: the same as decoding it, offsets on, behind the base's prefill."""
    scoped, whole = make_model("question"), make_model("all")
    batch = batch_of("one")
    expected = scoped(**batch).logits
    head = {**batch, "input_ids": batch["input_ids"][:, :4], "attention_mask": batch["attention_mask"][:, :4]}
    cache = whole(**head, route="none", use_cache=True).past_key_values
    route = whole.route(batch["text_query"], None)
    close(
        whole(batch["input_ids"][:, 4:], past_key_values=cache, route=route).logits, expected[:, head_length("one") :]
    )
    assert not torch.allclose(whole(**batch).logits, expected)
    words = batch_of("none")
    close(scoped(**words).logits, whole(**words).logits)


def test_rows_are_the_same_in_any_batch(model):
    names = tuple(ROWS)
    whole = batch_of(*names)
    logits = model(**whole).logits
    for row, name in enumerate(names):
        alone = {key: value[row : row + 1] for key, value in whole.items()}
        width = len(ROWS[name])
        alone |= {key: alone[key][:, :width] for key in ("input_ids", "attention_mask")}
        close(model(**alone).logits[0], logits[row, : spliced_length(name)])


@pytest.mark.parametrize("beams", [1, 2])
def test_answers_are_those_of_the_whole_prompt_at_every_step(model, beams):
    """``generate`` pads on the left and keeps a cache; without one every step works the whole prompt out again."""
    batch = batch_of("one", "two", "none", side="left")
    options = {**GREEDY, "num_beams": beams}
    found = model.generate(**batch, **options)
    assert torch.equal(found, model.generate(**batch, **options, use_cache=False))
    assert not torch.equal(found, make_model("all", type(model).__name__[5:-11].lower()).generate(**batch, **options))
    alone = {
        key: value[:1, -7:] if key != "images" and key != "text_query" else value[:1] for key, value in batch.items()
    }
    assert torch.equal(model.generate(**alone, **options), found[:1])


def test_prepared_embeddings_keep_their_scope(model):
    """However they are padded; others are refused unless the route says where the pictures end."""
    batch = batch_of("one", "two", "none")
    expected = model(**batch).logits
    args = (batch["input_ids"], None, batch["attention_mask"], None, None, batch["images"])
    _, _, mask, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(*args, text_query=batch["text_query"])
    route = model.last_route
    expected, real = expected[mask.bool()], mask.bool()
    close(model(inputs_embeds=embeds, attention_mask=mask).logits[real], expected)
    hidden = model.model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    close(model.lm_head(hidden)[real], expected)
    wider = torch.nn.functional.pad(embeds, (0, 0, 3, 0))
    seen = torch.nn.functional.pad(mask, (3, 0))
    found = model(inputs_embeds=wider, attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp(min=0)).logits
    close(found[:, 3:][real], expected)
    noisy = embeds + 1e-12
    close(model(inputs_embeds=noisy, attention_mask=mask, route=route).logits[real], expected)
    with pytest.raises(ValueError, match="behind the last picture.*starts="):
        model(inputs_embeds=noisy, attention_mask=mask, route=dataclasses.replace(route, starts=None))


def test_settings_of_older_files_mean_all_and_unknown_words_are_refused():
    values = make_model().retriever.settings.to_dict()
    assert values["offset_scope"] == "question"
    del values["offset_scope"]
    assert RetrieverSettings.from_dict(values).offset_scope == "all"
    with pytest.raises(ValueError, match="offset_scope"):
        RetrieverSettings.from_dict({**values, "offset_scope": "picture"})
