"""LLaVA's grouped order of samples, by hand, and in a run."""

import pytest
import torch

from llava.train.llava_trainer import (
    LengthGroupedSampler,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
    split_to_even_chunks,
)


def test_chunks_of_one_size_get_even_totals():
    # 9 -> first, 8 -> second; 4: the second is shorter (8) and then full; 1 goes to the first.
    assert split_to_even_chunks([0, 1, 2, 3], [9, 8, 4, 1], 2) == [[0, 3], [1, 2]]
    assert split_to_even_chunks([5, 6, 7], {5: 1, 6: 1, 7: 1}, 2) == [[5, 7], [6]]


def test_steps_are_sorted_by_length_and_dealt_to_the_processes():
    lengths = [3, 1, 4, 1, 5, 9, 2, 6]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    found = get_length_grouped_indices(lengths, 2, 2, torch.Generator().manual_seed(0))
    assert sorted(found[:4]) == sorted(order[:4]) and sorted(found) == list(range(8))
    for step in (found[:4], found[4:]):
        longest = max(step, key=lambda index: lengths[index])
        assert step[0] == longest
        totals = sorted([sum(lengths[index] for index in step[:2]), sum(lengths[index] for index in step[2:])])
        in_order = sorted((lengths[index] for index in step), reverse=True)
        assert totals == sorted([in_order[0] + in_order[3], in_order[1] + in_order[2]])


def test_one_process_sees_each_step_longest_first():
    lengths = [1, 2, 3, 4, 5, 6]
    found = get_length_grouped_indices(lengths, 3, 1, torch.Generator().manual_seed(1))
    assert all(step == sorted(step, reverse=True) for step in (found[:3], found[3:]))


def test_steps_hold_one_modality_and_a_last_mixed_one():
    lengths = [7, -3, 5, -2, 6, -9, 8, -4, 2]  # five with a picture, four without
    found = get_modality_length_grouped_indices(lengths, 2, 1, torch.Generator().manual_seed(3))
    assert sorted(found) == list(range(9))
    whole = [found[start : start + 2] for start in range(0, 6, 2)]
    assert all(len({lengths[index] > 0 for index in step}) == 1 for step in whole)
    assert found[6:] == sorted(found[6:]) and {lengths[index] > 0 for index in found[6:]} == {True, False}


@pytest.mark.parametrize("sign", [1, -1])
def test_one_modality_alone_is_grouped_by_length(sign):
    lengths = [4, 3, 2, 1]
    found = get_modality_length_grouped_indices([sign * one for one in lengths], 2, 1, torch.Generator().manual_seed(0))
    assert found == get_length_grouped_indices(lengths, 2, 1, torch.Generator().manual_seed(0))


def test_a_length_of_nothing_is_refused():
    with pytest.raises(ValueError, match="sample 1 has the length 0"):
        get_modality_length_grouped_indices([2, 0, -1], 1, 1)
    with pytest.raises(ValueError, match="lengths"):
        LengthGroupedSampler(1, 1)


def test_an_epochs_order_depends_on_seed_and_epoch_alone():
    first, second = (LengthGroupedSampler(2, 1, [5, -4, 3, -2, 1, 6], group_by_modality=True, seed=7) for _ in "ab")
    list(first)
    second.set_epoch(2)
    first.set_epoch(2)
    assert list(first) == list(second) and len(first) == 6
    second.set_epoch(1)
    assert list(first) != list(second)
    torch.manual_seed(0)
    plain = list(LengthGroupedSampler(2, 1, [5, 4, 3, 2]))
    torch.manual_seed(0)
    assert plain == get_length_grouped_indices([5, 4, 3, 2], 2, 1)
