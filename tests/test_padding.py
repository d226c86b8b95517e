"""The one padder: sides, values, masks, rows of vectors."""

from __future__ import annotations

import pytest
import torch

from llava.padding import filled, pad

ROWS = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([], dtype=torch.long)]


@pytest.mark.parametrize(
    "side, expected",
    [("right", [[1, 2, 3], [4, -100, -100], [-100] * 3]), ("left", [[1, 2, 3], [-100, -100, 4], [-100] * 3])],
)
def test_rows_of_numbers(side, expected):
    padded, mask = pad(ROWS, side, -100)
    assert padded.tolist() == expected and padded.dtype == torch.long
    assert mask.tolist() == [[value != -100 for value in row] for row in expected]


def test_rows_of_vectors_keep_their_type_and_gradient():
    rows = [torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True), torch.ones(3, 4, dtype=torch.bfloat16)]
    padded, mask = pad(rows, "left")
    assert padded.shape == (2, 3, 4) and padded.dtype == torch.bfloat16
    assert mask.tolist() == [[False, True, True], [True, True, True]]
    padded.sum().backward()
    assert torch.equal(rows[0].grad, torch.ones(2, 4, dtype=torch.bfloat16))


def test_what_cannot_be_padded_is_said():
    with pytest.raises(ValueError, match="no rows"):
        pad([])
    with pytest.raises(ValueError, match="left or right, not 'top'"):
        pad(ROWS, "top")


def test_rows_are_filled_to_a_width():
    assert filled([torch.tensor([1.0, 2.0]), torch.tensor([3.0])], 3, -1).tolist() == [[1, 2, -1], [3, -1, -1]]
    assert filled(ROWS[:1], 3).tolist() == [[1, 2, 3]]
