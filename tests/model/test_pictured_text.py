"""Pictures of a batch, as LLaVA's callers give them, on a base and on a stage, Llama and Mistral."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny_llava import FAMILIES, HIDDEN, PIXELS, write_base, write_stage

from llava.constants import IGNORE_INDEX
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.utils import UserError

MARK = -200
ONE, TWO, TEXT = [1, 20, MARK, 30, 31], [1, 25, MARK, 40, MARK, 41, 42], [1, 50, 51, 52]


@pytest.fixture(scope="module", params=[(family, kind) for family in sorted(FAMILIES) for kind in ("base", "stage")])
def model(request, tmp_path_factory):
    """A base and a stage of each family; the stage routes on questions and pictures."""
    family, kind = request.param
    folder = tmp_path_factory.mktemp("pictured")
    base = write_base(folder / "llava-base", family=family)
    place = base if kind == "base" else write_stage(folder / "llava-stage", base)
    return load_pretrained_model(str(place), str(base), device="cpu")[1]


def picture(number):
    return torch.randn(3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(number))


A, B, C, D = map(picture, range(4))
DUMMY = torch.zeros(3, PIXELS, PIXELS)


def batch(*rows):
    """Left-padded ids and mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def queries(model, count):
    """Text queries, where the model routes."""
    if model.retriever is None:
        return {}
    return {"text_query": torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(9))}


def logits(model, rows, images, **more):
    with torch.no_grad():
        return model(**batch(*rows), images=images, **queries(model, len(rows)), **more).logits


def answer(model, rows, images, **more):
    prompts = batch(*rows)
    output = model.generate(
        prompts.pop("input_ids"), **prompts, images=images, max_new_tokens=2, do_sample=False, pad_token_id=0,
        eos_token_id=None, output_logits=True, return_dict_in_generate=True, **queries(model, len(rows)), **more,
    )  # fmt: skip
    return output.sequences.tolist(), torch.stack(output.logits), model.last_route


def same_answers(one, other):
    assert one[0] == other[0] and torch.equal(one[1], other[1])
    if one[2] is not None:
        assert torch.equal(one[2].slot_indices, other[2].slot_indices)
        assert torch.equal(one[2].slot_weights, other[2].slot_weights)


STACK = torch.stack
FORMS = {  # rows, an entry per row, and other forms of the same
    "one prompt, one picture": ([ONE], [A], [A[None], [A], [A[None]], [[A]], A, A[None, None]]),
    "one prompt, two pictures": ([TWO], [[A, B]], [STACK([A, B]), [A, B], [STACK([A, B])], STACK([A, B])[None]]),
    "a picture each": ([ONE, ONE], [A, B], [STACK([A, B]), [A[None], B[None]], [[A], [B]], STACK([A, B])[:, None]]),
    "two and one": ([TWO, ONE], [[A, B], C], [[A, B, C], STACK([A, B, C]), [STACK([A, B]), C], [[A, B], [C]]]),
    "text and one": (
        [TEXT, ONE],
        [None, A],
        [[A], A[None], [DUMMY, A], [DUMMY[None], A], [[], [A]], STACK([DUMMY, A])],
    ),
    "two and text": ([TWO, TEXT], [[A, B], None], [[A, B], [A, B, DUMMY], [STACK([A, B]), DUMMY], STACK([A, B])]),
    "text alone": ([TEXT], None, [[], [None], [DUMMY], DUMMY[None], [[]]]),
    "text twice": ([TEXT, TEXT[:3]], None, [[], [None, None], [DUMMY, DUMMY], STACK([DUMMY, DUMMY])]),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_answer_of_an_entry_per_row(model, name):
    rows, entries, forms = FORMS[name]
    wanted, generated = logits(model, rows, entries), answer(model, rows, entries)
    for images in forms:
        assert torch.equal(logits(model, rows, images), wanted)
        same_answers(answer(model, rows, images), generated)


def test_each_row_of_a_batch_answers_as_alone(model):
    """A dummy changes neither the answer of its row nor its route, and no row sees another's picture."""
    rows = [TEXT, TWO, ONE]
    together = answer(model, rows, [DUMMY, A, B, C])
    text = answer(model, [TEXT], None)
    for images in ([A, B, C], [None, [A, B], C], [DUMMY, STACK([A, B]), C]):
        same_answers(answer(model, rows, images), together)
    assert together[0][0] == text[0][0]
    changed = answer(model, rows, [DUMMY, A, D, C])[1]
    torch.testing.assert_close(changed[:, [0, 2]], together[1][:, [0, 2]])
    assert not torch.allclose(changed[:, 1], together[1][:, 1])


def test_a_dummy_is_not_in_the_image_query(model):
    images, _ = model.hand_out(**batch(TEXT, ONE), images=[A, B])
    assert [len(row) for row in images] == [0, 1]
    query = model.image_query(model.vision_features(images), images)
    assert query is None if model.retriever is None else not query[0].any() and query[1].any()


@pytest.mark.parametrize(
    "rows, images, message",
    [
        ([ONE, ONE], [A], "row 1 .* 1 <image> .* 0 picture"),
        ([ONE, ONE], A[None], "row 1 .* 1 <image> .* 0 picture"),
        ([ONE], [A, B], "row 0 .* 1 <image> .* 2 picture"),
        ([ONE], STACK([A, B]), "row 0 .* 1 <image> .* 2 picture"),
        ([TEXT, ONE], None, "row 1 .* 1 <image> .* 0 picture"),
        ([TEXT, ONE], [], "row 1 .* 1 <image> .* 0 picture"),
        ([TWO, ONE], [A, B], "row 0 .* 2 <image> .* 1 picture"),
    ],
)
def test_a_mismatch_names_the_row_and_drops_no_answer(model, rows, images, message):
    with pytest.raises(ValueError, match=message):
        logits(model, rows, images)
    with pytest.raises(ValueError, match=message):
        answer(model, rows, images)
    with pytest.raises(ValueError, match=message):
        model.prepare_inputs_labels_for_multimodal(batch(*rows)["input_ids"], None, None, None, None, images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pictures_of_another_type_than_the_models(model, dtype):
    rounded = [picture.to(dtype).float() for picture in (A, B)]
    given = [picture.to(dtype) for picture in (A, B)]
    same_answers(answer(model, [ONE, ONE], given), answer(model, [ONE, ONE], rounded))
    assert torch.equal(model.encode_images(torch.stack(given)), model.encode_images(torch.stack(rounded)))


def test_what_is_no_picture_is_refused(model):
    with pytest.raises(ValueError, match=r"torch.uint8"):
        logits(model, [ONE], torch.zeros(1, 3, PIXELS, PIXELS, dtype=torch.uint8))
    with pytest.raises(ValueError, match="ndarray"):
        logits(model, [ONE], A[None].numpy())
    with pytest.raises(ValueError, match="'video'"):
        logits(model, [ONE], [A], modalities=["video"])
    with pytest.raises(ValueError, match="'video'"):
        answer(model, [ONE], [A], modalities=["video"])


def test_later_steps_take_the_pictures_along(model):
    """LLaVA's callers that decode by hand pass the same pictures at every step; they count in the first."""
    given = {"images": [A, B], **queries(model, 2), "use_cache": True}
    rows = [ONE, ONE[:2] + [MARK] + ONE[3:]]
    with torch.no_grad():
        first = model(**batch(*rows), **given)
        token = first.logits[:, -1].argmax(-1, keepdim=True)
        alone = model(token, past_key_values=first.past_key_values, use_cache=False, **queries(model, 2)).logits
        first = model(**batch(*rows), **given)
        along = model(token, past_key_values=first.past_key_values, images=[A, B], **queries(model, 2)).logits
    assert torch.equal(alone, along)


def test_a_model_without_a_tower_ignores_pictures_but_not_their_places(model):
    tower, model.get_model().vision_tower = model.get_vision_tower(), None
    try:
        assert torch.equal(logits(model, [TEXT], [A]), logits(model, [TEXT], None))
        with pytest.raises(UserError, match="row 1 .* no vision tower"):
            logits(model, [TEXT, ONE], [A])
    finally:
        model.get_model().vision_tower = tower


# -- LLaVA's two-step call ---------------------------------------------------------------------------------------------


CALLS = {
    "LLaVA 1.1": lambda images, sizes: ((images,), {}),
    "LLaVA 1.2": lambda images, sizes: ((images, sizes), {}),
    "LLaVA 1.2 by name": lambda images, sizes: ((images,), {"image_sizes": sizes}),
    "LLaVA-NeXT": lambda images, sizes: ((images, ["image"], sizes), {}),
    "LLaVA-NeXT without sizes": lambda images, sizes: ((images, ["image"]), {}),
    "LLaVA-NeXT by name": lambda images, sizes: ((images,), {"modalities": ["image"], "image_sizes": sizes}),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mask_type", [None, torch.long, torch.bool])
def test_the_splice_by_itself(model, call, mask_type):
    given = batch(TEXT, ONE)
    ids, mask = given["input_ids"], None if mask_type is None else given["attention_mask"].to(mask_type)
    places = torch.arange(ids.shape[1]).expand_as(ids)
    positional, named = CALLS[call]([DUMMY, A], [(16, 16), (20, 16)])
    features = model.encode_images(A[None])[0]  # [patches, hidden]
    for positions, labels in ((None, None), (places, ids)):
        found = model.prepare_inputs_labels_for_multimodal(ids, positions, mask, "cache", labels, *positional, **named)
        new_ids, new_positions, new_mask, cache, embeds, new_labels = found
        assert new_ids is None and cache == "cache" and embeds.shape == (2, 4 + len(features), HIDDEN)
        torch.testing.assert_close(embeds[1, 2 : 2 + len(features)], features)
        assert (new_positions is None) == (positions is None) and (new_labels is None) == (labels is None)
        if mask is None:
            assert new_mask is None
        else:
            assert new_mask.dtype == mask_type and new_mask.sum(1).tolist() == [len(TEXT), 4 + len(features)]
        if labels is not None:
            assert new_labels.shape == new_positions.shape == embeds.shape[:2]
            assert (new_labels[1, 2 : 2 + len(features)] == IGNORE_INDEX).all()


def test_the_splice_by_itself_leaves_alone_what_it_has_nothing_for(model):
    ids = batch(TEXT)["input_ids"]
    for images, given in ((None, ids), ([A], ids[:, :1])):
        found = model.prepare_inputs_labels_for_multimodal(given, None, None, None, None, images)
        assert found[0] is given and found[1:] == (None,) * 5
    embeds = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, [DUMMY])[4]
    assert torch.equal(embeds, model.get_input_embeddings()(ids))


# -- any-resolution tiles ----------------------------------------------------------------------------------------------


SIZES = [(40, 20), (20, 40), (30, 30)]
ANYRES = {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[32, 16], [16, 32], [32, 32]],
    "mm_patch_merge_type": "spatial",
}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def tiled(request, tmp_path_factory):
    """A stage that sees tiles, and three pictures as LLaVA's ``process_images`` gives them."""
    folder = tmp_path_factory.mktemp("tiled")
    base = write_base(folder / "llava-base", family=request.param)
    stage = write_stage(folder / "llava-stage", base)
    _, model, processor, _ = load_pretrained_model(str(stage), None, device="cpu", overwrite_config=ANYRES)
    noise = [torch.randint(0, 255, (height, width, 3), dtype=torch.uint8).numpy() for width, height in SIZES]
    pictures = process_images([Image.fromarray(pixels) for pixels in noise], processor, model.config)
    assert [len(picture) for picture in pictures] == [3, 3, 5]
    return model, pictures


def test_tiles_in_every_form(tiled):
    model, (wide, high, square) = tiled
    one, two = SIZES[:2]
    dummy = torch.zeros(1, 3, PIXELS, PIXELS)
    rows = [ONE, ONE]
    wanted = answer(model, rows, [[wide], [high]], image_sizes=[[one], [two]])
    for images, sizes in [
        ([wide, high], [one, two]),  # LLaVA's own call
        (torch.stack([wide, high]), [list(one), list(two)]),
        (torch.stack([wide, high]), torch.tensor([one, two])),
        ([[wide], [high]], [one, two]),
    ]:
        same_answers(answer(model, rows, images, image_sizes=sizes, modalities=["image"]), wanted)
    rows, wanted = [TWO, TEXT, ONE], None
    for images, sizes in [
        ([[wide, high], None, square], [[one, two], None, SIZES[2]]),
        ([wide, high, square], SIZES),
        ([wide, high, dummy, square], [one, two, (PIXELS, PIXELS), SIZES[2]]),
        ([[wide, high], dummy, [square]], [[one, two], [(PIXELS, PIXELS)], [SIZES[2]]]),
    ]:
        found = answer(model, rows, images, image_sizes=sizes)
        wanted = wanted or found
        same_answers(found, wanted)


def test_tiles_without_sizes_are_refused(tiled):
    model, (wide, high, _) = tiled
    with pytest.raises(ValueError, match="needs its original size in image_sizes"):
        answer(model, [ONE], [wide])
    with pytest.raises(ValueError, match="image_sizes hold 2 sizes for 1 pictures"):
        answer(model, [ONE], [wide], image_sizes=SIZES[:2])
    with pytest.raises(ValueError, match="row 0 .* 1 <image> .* 2 picture"):
        answer(model, [ONE], [wide, high], image_sizes=SIZES[:2])
