"""The image query: tower features, the picture's edges, or both."""

import pytest
import torch
from tiny_llava import GROUPS, HIDDEN, SLOTS, VISION, write_base, write_stage

from llava.model.builder import load_pretrained_model
from llava.slots.picture_query import PICTURE_DIM, describe_picture, image_queries, image_query_dim, joined_query
from llava.slots.pool import Pool
from llava.slots.queries import TaskStatistics


def picture(seed, size=48):
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed))


def test_brightness_and_contrast_cancel_out():
    torch.testing.assert_close(describe_picture(picture(1) * 0.3 + 2), describe_picture(picture(1)), atol=1e-3, rtol=0)


def test_stripes_fall_into_the_bin_of_their_direction():
    upright = torch.zeros(3, 64, 64)
    upright[:, :, ::8] = 1  # brightness changes from left to right: direction 0
    bins = describe_picture(upright).view(8, 6, 6).square().sum((1, 2))
    assert bins.argmax() == 0 and bins[0] > 0.99
    assert describe_picture(upright.transpose(1, 2)).view(8, 6, 6).square().sum((1, 2)).argmax() == 4


def test_a_flat_picture_gives_zeros_and_others_unit_length():
    assert not describe_picture(torch.full((3, 32, 32), 0.4)).any()
    assert describe_picture(picture(2)).norm().item() == pytest.approx(1, abs=1e-6)
    assert describe_picture(picture(2, size=8)).isfinite().all()  # smaller than the descriptor's own grid


@pytest.mark.parametrize("kind", ["tower", "picture", "tower+picture"])
def test_each_sample_is_described_by_itself_and_a_missing_picture_gives_zeros(kind):
    pixels = [[picture(1)[None]], [], [picture(2)[None], picture(3)[None]]]
    features = [[torch.full((1, 4, 5), float(i))] * len(sample) for i, sample in enumerate(pixels, start=1)]
    dim = image_query_dim(kind, 5)
    found = image_queries(kind, features, pixels, dim)
    assert found.shape == (3, dim) and not found[1].any()
    for number in range(3):
        assert torch.equal(image_queries(kind, [features[number]], [pixels[number]], dim)[0], found[number])


@pytest.mark.parametrize("kind", ["tower", "picture", "tower+picture"])
def test_two_pictures_are_the_mean_of_theirs_with_each_part_of_unit_length(kind):
    pixels = [picture(seed)[None] for seed in (1, 2)]
    features = [torch.rand(1, 4, 5, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)]
    dim = image_query_dim(kind, 5)
    each = [image_queries(kind, [[one]], [[tiles]], dim)[0] for one, tiles in zip(features, pixels, strict=True)]
    both = image_queries(kind, [features, features[:1], []], [pixels, pixels[:1], []], dim)
    assert torch.equal(both[0], joined_query(kind, each)) and torch.equal(both[1], each[0]) and not both[2].any()
    assert torch.equal(both[0], image_queries(kind, [features[::-1]], [pixels[::-1]], dim)[0])
    parts = {"tower": [], "picture": [both[0]], "tower+picture": [both[0][:5], both[0][5:]]}[kind]
    for part in parts:
        assert part.norm().item() == pytest.approx(1, abs=1e-6)
    if kind == "tower":
        torch.testing.assert_close(both[0], torch.stack(each).mean(0))


def test_missing_pixels_are_refused_by_name():
    with pytest.raises(ValueError, match="need the pictures' pixels"):
        image_queries("picture", [[torch.zeros(1, 4, 5)] * 2], [[]], PICTURE_DIM)
    with pytest.raises(ValueError, match="need the pictures' pixels"):
        image_queries("picture", [[torch.zeros(1, 4, 5)]], [[]], PICTURE_DIM)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, and a stage whose slots route on tower and picture."""
    folder = tmp_path_factory.mktemp("picture")
    base = write_base(folder / "llava-base")
    stage = write_stage(folder / "llava-stage", base)
    slots = Pool.read(stage / "slots.pth")
    slots.settings.image_query = "tower+picture"
    slots.settings.image_dim = dim = image_query_dim("tower+picture", VISION)
    generator = torch.Generator().manual_seed(5)
    for task in slots.tasks:
        task.image_keys = torch.randn(GROUPS, SLOTS, dim // GROUPS, generator=generator)
        task.statistics = TaskStatistics.of(torch.randn(40, HIDDEN + dim, generator=generator))
    slots.write(stage / "slots.pth")
    return base, stage


def test_pixels_and_precomputed_features_take_the_same_route(place):
    base, stage = place
    _, model, _, _ = load_pretrained_model(str(stage), str(base), device="cpu")
    ids = torch.tensor([[1, 20, -200, 30, 31], [1, 25, -200, 40, 41]])
    pixels = torch.stack([picture(1, 16), picture(2, 16)])
    text_query = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.vision_features(pixels)
        query = model.image_query(features, pixels)
        direct = model(ids, images=pixels, text_query=text_query).logits
        ahead = model(ids, image_features=features, image_query=query, text_query=text_query).logits
        without = model(ids, image_features=features, image_query=query.flip(0), text_query=text_query).logits
    assert torch.equal(direct, ahead) and not torch.allclose(direct, without)
    with pytest.raises(ValueError, match="pixels"):
        model(ids, image_features=features, text_query=text_query)
