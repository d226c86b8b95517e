"""Pictures that hold words: the scores and the loss against values worked out by hand."""

import math

import pytest
import torch

from llava.model.naming import EDGE, SHARPNESS, SLOPE, UNKNOWN, Naming

CENTRE = torch.tensor([1.0, 0.0, 0.0])
WORDS = CENTRE + torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 5.0]])
PICTURE = CENTRE + 3 * torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
"""Two places: one holds the first word, the other none."""


def naming(reach=3.0):
    return Naming(WORDS, CENTRE, reach)


def test_one_place_is_enough_for_a_word():
    """Cosines 1 and 0 for the first word, 0 and 0 for the second; lengths count for nothing."""
    first = (math.log(math.exp(SHARPNESS) + 1) - math.log(2)) / SHARPNESS
    assert naming().scores(PICTURE).tolist() == pytest.approx([first, 0.0], abs=1e-6)
    assert naming().scores(CENTRE + 7 * (PICTURE - CENTRE)).tolist() == pytest.approx([first, 0.0], abs=1e-6)


def test_the_loss_is_over_what_is_known():
    first, second = naming().scores(PICTURE).tolist()
    told = math.log(1 + math.exp(-SLOPE * (first - EDGE)))
    denied = math.log(1 + math.exp(SLOPE * (second - EDGE)))
    known = naming().loss([PICTURE, PICTURE], torch.tensor([[1.0, UNKNOWN], [UNKNOWN, 0.0]]))
    assert float(known) == pytest.approx((told + denied) / 2, rel=1e-5)


def test_a_batch_of_which_nothing_is_known_costs_its_lengths_alone():
    unknown = naming().loss([PICTURE], torch.tensor([[UNKNOWN, UNKNOWN]]))
    assert float(unknown) == pytest.approx(0.0, abs=1e-6)  # the picture is as far from the centre as words are


def test_embeddings_are_kept_as_far_from_the_centre_as_words_are():
    sure = torch.tensor([[1.0, 0.0]])
    near, far = (float(naming(reach).loss([PICTURE], sure)) for reach in (3.0, 1.0))
    assert far - near == pytest.approx((3 / 1 - 1) ** 2, rel=1e-5)


def test_the_words_are_no_weights():
    """A checkpoint of a model that was taught words holds nothing of them."""
    assert not naming().state_dict() and not list(naming().parameters())


def test_a_picture_learns_its_words():
    torch.manual_seed(0)
    picture = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.Adam([picture], lr=0.1)
    truths = torch.tensor([[1.0, 0.0]])
    for _ in range(100):
        optimizer.zero_grad()
        naming().loss([picture], truths).backward()
        optimizer.step()
    assert (naming().scores(picture) > EDGE).tolist() == [True, False]
    assert torch.allclose((picture - CENTRE).norm(dim=-1), torch.tensor(3.0), atol=0.5)
