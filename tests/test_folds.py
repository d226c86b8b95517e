"""Splits by picture: together, by names alone, and the very splits that earlier versions drew."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from llava.folds import deal, held_out, shuffled

PICTURES = [f"{(number * 7) % 23}.png" for number in range(60)]
ROWS = [name if number % 11 else number for number, name in enumerate(PICTURES)]  # some rows have no picture


def places(marks):
    return [place for place, mark in enumerate(marks) if mark]


def test_the_splits_are_those_of_earlier_versions():
    assert places(held_out(ROWS, 0.2, 42)) == [7, 8, 10, 12, 16, 23, 30, 31, 35, 39, 46, 53, 54, 56, 58]
    assert places(held_out(ROWS, 0.1, 7)) == [2, 20, 25, 33, 43, 48]
    assert deal(PICTURES, range(10))[:23] == [1, 5, 4, 7, 2, 7, 9, 0, 1, 4, 6, 2, 9, 5, 0, 3, 2, 8, 0, 3, 6, 1, 8]
    assert deal(PICTURES, range(5))[:23] == [1, 0, 4, 2, 2, 2, 4, 0, 1, 4, 1, 2, 4, 0, 0, 3, 2, 3, 0, 3, 1, 1, 3]
    assert deal(["a", "b", 3, "a"], range(3)) == [2, 0, 1, 2]


@given(st.lists(st.integers(0, 9), max_size=40), st.randoms(use_true_random=False))
def test_a_picture_stays_whole_whatever_the_rows_order(pictures, random):
    folds = deal(pictures, range(3), seed=1)
    by_picture = dict(zip(pictures, folds, strict=True))
    assert folds == [by_picture[picture] for picture in pictures]
    mixed = random.sample(pictures, len(pictures))
    assert deal(mixed, range(3), seed=1) == [by_picture[picture] for picture in mixed]
    sizes = Counter(by_picture.values())
    assert not sizes or max(sizes.values()) - min(sizes[number] for number in range(3)) <= 1


def test_rows_are_balanced_per_stratum_and_the_order_breaks_ties():
    pictures = ["big"] * 6 + [f"small{number}" for number in range(6)]
    fold = dict(zip(pictures, deal(pictures, (1, 0), seed=0, by_rows=True), strict=True))
    assert Counter(fold.values())[fold["big"]] <= 2  # it fills half of the rows by itself, but for a first small one
    strata = ["x"] * 6 + ["y"] * 6
    fold = dict(zip(pictures, deal(pictures, (1, 0), seed=0, strata=strata, by_rows=True), strict=True))
    assert fold["big"] == 1
    assert Counter(number for name, number in fold.items() if name != "big") == {0: 3, 1: 3}


def test_held_out_is_a_share_of_the_pictures():
    assert sum(held_out(PICTURES, 0.0, 1)) == 0
    assert all(held_out(PICTURES, 1.0, 1))
    assert len({name for name, out in zip(PICTURES, held_out(PICTURES, 0.5, 1), strict=True) if out}) == 12
    assert held_out([], 0.5, 1) == []


def test_seeds_draw_differently():
    assert shuffled(PICTURES, 1) != shuffled(PICTURES, 2) != shuffled(PICTURES)
    assert sorted(shuffled(PICTURES, 1)) == sorted(set(PICTURES))
