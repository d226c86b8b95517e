"""The hand-out of a batch's pictures: every form that LLaVA's callers use gives each row exactly its own pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.model.vision.hand_out import _note_passed_over, are_modalities, check_modalities, hand_out, sizes_of


def picture(number, tiles=None):
    """A picture that is told by its number; ``[3, 2, 2]``, or ``[tiles, 3, 2, 2]``."""
    made = torch.full((3, 2, 2), float(number))
    made[0, 0, 0] += 0.5  # not blank
    return made if tiles is None else made.expand(tiles, 3, 2, 2).clone()


def blank():
    return torch.zeros(3, 2, 2)


def numbers(handed):
    """What each row got, by the pictures' numbers."""
    return [[int(made[0, 0, 1, 1]) for made in row] for row in handed.pictures]


def size(number):
    return (100 + number, 200 + number)


def expected(placeholders):
    """Numbers 1, 2, … in order, as many for each row as it has placeholders."""
    counter = iter(range(1, 1000))
    return [[next(counter) for _ in range(count)] for count in placeholders]


FORMS = {
    "list": lambda made: made,
    "nested": lambda made: [[one] for one in made],
    "none": lambda made: None,
    "stack": torch.stack,
    "one": lambda made: made[0],
}


def per_row(rows, draw):
    """An entry per row, in a form that ``draw`` chooses among those that a row of so many pictures can have."""
    entries = []
    for row in rows:
        forms = ["list", "nested"] + (["none"] if not row else ["stack"]) + (["one"] if len(row) == 1 else [])
        entries.append(FORMS[draw(st.sampled_from(forms))]([picture(number) for number in row]))
    return entries


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.data())
def test_each_row_gets_exactly_its_pictures(placeholders, data):
    rows = expected(placeholders)
    flat = [picture(number) for row in rows for number in row]
    entries = per_row(rows, data.draw)
    assert numbers(hand_out(entries, placeholders)) == rows
    assert numbers(hand_out(tuple(entries), placeholders)) == rows
    dummies = [blank() if not row and data.draw(st.booleans()) else entry for row, entry in zip(rows, entries)]
    assert numbers(hand_out(dummies, placeholders)) == rows
    assert numbers(hand_out(flat, placeholders)) == rows
    if flat:
        assert numbers(hand_out(torch.stack(flat), placeholders)) == rows
        assert numbers(hand_out(torch.stack(flat)[:, None], placeholders)) == rows
    # LLaVA's own loop: a row without <image> takes one of the flat list
    padded = [made for row in rows for made in ([picture(number) for number in row] or [blank()])]
    assert numbers(hand_out(padded, placeholders)) == rows
    if len(set(placeholders)) == 1 and flat:
        assert numbers(hand_out(torch.stack([torch.stack(padded)]).view(len(rows), -1, 3, 2, 2), placeholders)) == rows


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.data())
def test_tiles_stay_one_picture(placeholders, data):
    rows = expected(placeholders)
    made = {number: picture(number, data.draw(st.integers(1, 3))) for row in rows for number in row}
    flat = [made[number] for row in rows for number in row]
    nested = [[made[number] for number in row] for row in rows]
    for images in (nested, flat, [row or None for row in nested]):
        handed = hand_out(images, placeholders, anyres=True)
        assert numbers(handed) == rows
        assert [len(one) for row in handed.pictures for one in row] == [len(one) for one in flat]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.sampled_from([None, 2]))
def test_sizes_follow_their_pictures(placeholders, tiles):
    rows = expected(placeholders)
    wanted = [[size(number) for number in row] for row in rows]
    flat = [size for row in wanted for size in row]
    nested = [[picture(number, tiles) for number in row] for row in rows]
    pictures = [one for row in nested for one in row]
    forms = [wanted, flat, [list(map(list, row)) for row in wanted], [row or None for row in wanted]]
    forms += [torch.tensor(flat)] if flat else []
    for sizes in forms:
        for images in (nested, pictures):
            assert hand_out(images, placeholders, sizes, anyres=tiles is not None).sizes == wanted
        assert sizes_of(nested, sizes) == flat
    for nothing in (None, [], [None] * len(rows)):
        handed = hand_out(nested, placeholders, nothing, anyres=tiles is not None)
        assert handed.sizes == [[None] * count for count in placeholders]
    # dummies have sizes too
    padded = [one for row in nested for one in (row or [torch.zeros(1, 3, 2, 2)])]
    sizes = [one for row in wanted for one in (row or [(2, 2)])]
    assert hand_out(padded, placeholders, sizes, anyres=True).sizes == wanted


def test_one_size_holds_for_all_pictures_of_a_row():
    images = [[picture(1), picture(2)], None, picture(3)]
    found = hand_out(images, [2, 0, 1], [size(1), None, size(3)])
    assert found.sizes == [[size(1), size(1)], [], [size(3)]]
    assert hand_out(images[0], [2], size(7)).sizes == [[size(7), size(7)]]


@pytest.mark.parametrize("images", [None, [], (), [None], [None, None], [[], []]])
def test_no_pictures(images):
    handed = hand_out(images, [0, 0], [])
    assert handed.pictures == handed.sizes == [[], []]


@pytest.mark.parametrize(
    "images, placeholders, message",
    [
        ([picture(1)], [1, 1], r"row 1 .* 1 <image> placeholder\(s\) but 0 picture"),
        (picture(1), [1, 1], "row 1 .* but 0 picture"),
        ([picture(1), picture(2)], [1], "row 0 .* 1 <image> .* but 2 picture"),
        (torch.stack([picture(1), picture(2)]), [1], "row 0 .* 1 <image> .* but 2 picture"),
        ([picture(1), picture(2), picture(3)], [1, 1], "row 1 .* 1 <image> .* but 2 picture"),
        ([picture(1), None], [1, 1], "row 1 .* but 0 picture"),
        ([None, [picture(1), picture(2)]], [1, 1], "row 0 .* but 0 picture"),
        ([torch.stack([picture(1), picture(2)]), picture(3)], [1, 2], "row 0 .* but 2 picture"),
        ([[picture(1), picture(2)]], [1, 1], "row 0 .* but 2 picture.* in 1 entries"),
        ([picture(1), None], [1], "in 2 entries for 1 in 1 rows"),
        (None, [0, 1], "row 1 .* but 0 picture"),
        ([], [1], "row 0 .* but 0 picture"),
    ],
)
def test_what_does_not_fit_names_the_row(images, placeholders, message):
    with pytest.raises(ValueError, match=message):
        hand_out(images, placeholders)


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((1, 3, 2, 2), dtype=np.float32), "images are a ndarray"),
        ([np.zeros((3, 2, 2), dtype=np.float32)], "a picture of ndarray"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "a picture of torch.uint8; give tensors of floats"),
        ([torch.zeros(2, 2)], r"a tensor of shape \[2, 2\]"),
    ],
)
def test_what_is_no_picture_is_named(images, message):
    with pytest.raises(ValueError, match=message):
        hand_out(images, [1])


def test_sizes_of_another_number_are_refused_where_tiles_need_them():
    images, sizes = [picture(1, 2)], [size(1), size(2), size(3)]
    with pytest.raises(ValueError, match="image_sizes hold 3 sizes for 1 pictures"):
        hand_out(images, [1], sizes, anyres=True)
    assert hand_out([picture(1)], [1], sizes).sizes == [[None]]
    with pytest.raises(ValueError, match="image_sizes are"):
        hand_out(images, [1], [640], anyres=True)


def test_a_picture_that_is_passed_over_is_said_unless_it_is_blank(capsys):
    _note_passed_over.cache_clear()
    assert numbers(hand_out([blank(), picture(1)], [0, 1])) == [[], [1]]
    assert "passed over" not in capsys.readouterr().out
    for _ in range(2):
        assert numbers(hand_out([picture(1), picture(2)], [0, 1])) == [[], [2]]
    assert capsys.readouterr().out.count("passed over") == 1


def test_modalities_are_told_from_sizes():
    assert are_modalities(["image"]) and are_modalities("image")
    assert not are_modalities([(1, 2)]) and not are_modalities([]) and not are_modalities(None)
    check_modalities(["image", "text"])
    check_modalities(None)
    with pytest.raises(ValueError, match="'video'"):
        check_modalities(["image", "video"])
