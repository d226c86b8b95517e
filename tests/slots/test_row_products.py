"""Products in blocks: every row's bits are those that it has alone, wherever it stands."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.slots.row_products import BLOCK, RowProducts


def numbers(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(dtype)


MATRICES = {
    "keys": RowProducts(numbers(333, 208)),
    "weights": RowProducts(numbers(47, 1024, dtype=torch.float32).T.contiguous().T),
    "one": RowProducts(numbers(1, 3)),
}
"""Asked again and again, as a router's are."""


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(list(MATRICES)), batch=st.lists(st.integers(0, 39), min_size=1, max_size=50))
def test_a_row_is_what_it_is_alone_in_every_place(name, batch):
    products = MATRICES[name]
    rows = numbers(40, products.matrix.shape[1]).to(products.matrix.dtype)
    alone = torch.cat([products(row[None]) for row in rows])
    assert torch.equal(products(rows[batch]), alone[batch])
    torch.testing.assert_close(alone, rows @ products.matrix.T, rtol=1e-5, atol=1e-4)


def test_rows_that_lie_in_columns_have_the_same_bits():
    """A full block of them, which nothing is added to, too."""
    products = RowProducts(numbers(1, 208, dtype=torch.float32))
    rows = numbers(BLOCK + 5, 208, dtype=torch.float32)
    assert torch.equal(products(rows.T.contiguous().T), torch.cat([products(row[None]) for row in rows]))


def test_the_matrix_is_read_once_for_sixteen_rows(monkeypatch):
    products, asked = RowProducts(numbers(30, 8)), []
    block = RowProducts._block
    monkeypatch.setattr(RowProducts, "_block", lambda self, rows: asked.append(len(rows)) or block(self, rows))
    products(numbers(2 * BLOCK + 1, 8))
    assert asked == [BLOCK, BLOCK, BLOCK, 1]  # the first finds out whether places are alike
    products(numbers(3, 8))
    assert asked[4:] == [3]


@pytest.mark.parametrize("threads", [1, 2])
def test_where_a_library_treats_places_differently_each_row_is_multiplied_by_itself(monkeypatch, threads):
    def uneven(self, rows):
        return rows @ self.matrix.T + torch.arange(BLOCK, dtype=rows.dtype)[: len(rows), None] * 1e-15

    monkeypatch.setattr(RowProducts, "_block", uneven)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        products, rows = RowProducts(numbers(30, 8)), numbers(20, 8)
        assert torch.equal(products(rows), torch.stack([products.matrix @ row.clone() for row in rows]))
    finally:
        torch.set_num_threads(before)
