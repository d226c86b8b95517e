"""LLaVA's order of training samples: batches of one modality and of like length (``--group_by_modality_length``).

Names and signatures are LLaVA's, because other trainers import them. A batch of long and short samples pads; one of
rows with and without pictures runs the tower for a part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


def split_to_even_chunks(indices: Sequence[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """``indices`` dealt out to ``num_chunks`` lists of one size, each next one to the list that is shortest so far.

    Where they cannot be of one size they are dealt out in turn.
    """
    size, rest = divmod(len(indices), num_chunks)
    if rest:
        return [list(indices[start::num_chunks]) for start in range(num_chunks)]
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals = [0.0] * num_chunks
    for index in indices:
        shortest = totals.index(min(totals))
        chunks[shortest].append(index)
        totals[shortest] = float("inf") if len(chunks[shortest]) == size else totals[shortest] + lengths[index]
    return chunks


def get_length_grouped_indices(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
    merge: bool = True,
) -> list[int]:
    """A random order in which the samples of one step over all processes are sorted by length, longest first.

    Args:
        lengths: of each sample.
        batch_size: samples a process takes in a step. world_size: processes, times the steps that are accumulated.
        generator: of the order; None for torch's own.
        merge: kept for LLaVA's callers; the order is always one list.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    indices: list[int] = []
    for step in _chunks(order, world_size * batch_size):
        step = sorted(step, key=lambda index: lengths[index], reverse=True)
        for chunk in split_to_even_chunks(step, lengths, world_size):
            indices += chunk
    return indices


def get_modality_length_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator | None = None
) -> list[int]:
    """As ``get_length_grouped_indices``, with steps that hold rows of one modality only, but for a last mixed one.

    Args:
        lengths: of each sample, negative for one without a picture.

    Raises:
        ValueError: a length of 0, which tells no modality.
    """
    if not all(lengths):
        raise ValueError(f"sample {list(lengths).index(0)} has the length 0; give 1 or more, negative for text")
    kinds = [[index for index, length in enumerate(lengths) if (length > 0) == pictured] for pictured in (True, False)]
    if not all(kinds):
        return get_length_grouped_indices([abs(length) for length in lengths], batch_size, world_size, generator)
    steps, rest = [], []
    for members in kinds:
        sizes = [abs(lengths[index]) for index in members]
        order = get_length_grouped_indices(sizes, batch_size, world_size, generator)
        *whole, last = _chunks([members[place] for place in order], world_size * batch_size)
        steps += whole
        rest += last
    shuffled = [steps[place] for place in torch.randperm(len(steps), generator=generator).tolist()]
    return [index for step in [*shuffled, sorted(rest)] for index in step]


def _chunks(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


class LengthGroupedSampler(Sampler[int]):
    """The order above, anew in each epoch.

    Args:
        batch_size, world_size, lengths, generator: see ``get_length_grouped_indices``.
        group_by_modality: ``lengths`` are negative for samples without a picture, which get steps of their own.
        seed: in place of a generator: the order of an epoch then depends on it and on the epoch alone, so a run that
            goes on in the middle of one meets the same samples.

    Raises:
        ValueError: no lengths.
    """

    def __init__(
        self,
        batch_size: int,
        world_size: int,
        lengths: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        group_by_modality: bool = False,
        seed: int | None = None,
    ) -> None:
        if lengths is None:
            raise ValueError("LengthGroupedSampler needs the samples' lengths")
        self.batch_size, self.world_size, self.lengths = batch_size, world_size, lengths
        self.generator, self.group_by_modality, self.seed = generator, group_by_modality, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's order comes next; the trainer says so."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = self.generator
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
        ordered = get_modality_length_grouped_indices if self.group_by_modality else get_length_grouped_indices
        return iter(ordered(self.lengths, self.batch_size, self.world_size, generator=generator))
