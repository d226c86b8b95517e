"""Products in which a row's numbers do not depend on the rows beside it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 16
"""Rows that are multiplied at a time, fewer filled up with zeros: one takes the time of two to three, sixteen too."""


class RowProducts:
    """``rows @ matrix.T`` with each row as if it were alone: ``[batch, dim], [n, dim] -> [batch, n]``.

    Matrix products pick their kernel by the number of rows, so a row's last bits would depend on its batch. Here that
    number is always the same. Whether a product treats all places of its rows alike is the machine's library's affair:
    it is tried once, and where it does not each row is multiplied by itself, which reads the matrix for each of them.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self._alike: dict[int, bool] = {}  # by number of threads, which decides how the work is cut

    def __call__(self, rows: Tensor) -> Tensor:
        if not self._places_are_alike():
            return torch.stack([self.matrix @ row.clone() for row in rows])
        return torch.cat([self._block(block)[: len(block)] for block in rows.split(BLOCK)])

    def _block(self, rows: Tensor) -> Tensor:
        return F.pad(rows, (0, 0, 0, BLOCK - len(rows))).contiguous() @ self.matrix.T

    def _places_are_alike(self) -> bool:
        threads = torch.get_num_threads()
        if threads not in self._alike:
            generator = torch.Generator().manual_seed(0)
            row = torch.randn(self.matrix.shape[1], generator=generator, dtype=torch.float64).to(self.matrix)
            found = self._block(row.expand(BLOCK, -1))
            self._alike[threads] = bool((found == found[0]).all())
        return self._alike[threads]
