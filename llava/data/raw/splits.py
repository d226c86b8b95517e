"""Which rows train and which test: repeats that leak are dropped, and a second split keeps whole pictures apart.

In VQA-RAD's official split 202 of the 203 test pictures are also training pictures, so it says nothing about pictures
never seen. The unseen-image split puts all questions of a picture, and of pictures tied to it, on one side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from llava.data.raw.example import TEST, TRAIN, Example, Report
from llava.folds import deal

TEST_FOLDS = (0, 1)
# Which of two equally filled folds takes the next picture: a domain of few pictures still trains, then tests.
FOLD_ORDER = (2, 3, 0, 4, 5, 6, 7, 1, 8, 9)


def drop_repeats(examples: Sequence[Example], report: Report) -> list[Example]:
    """Without the training rows that repeat (picture, question and answer) an earlier training row or a test row.

    Test rows all stay, also among each other, because their number is the published one.
    """
    first: dict[tuple[str, str, str], Example] = {}
    for example in examples:
        if example.split != TRAIN:
            first.setdefault(example.content(), example)
    kept = []
    for example in examples:
        original = first.setdefault(example.content(), example)
        if example.split == TRAIN and original is not example:
            leak = original.split != TRAIN
            report.drop(example, "leak: repeats a test row" if leak else "repeats a training row", same_as=original.id)
        else:
            kept.append(example)
    return kept


def unseen_split(examples: Sequence[Example], seed: int = 0) -> tuple[list[Example], dict[int | str, int]]:
    """The split by picture: about a fifth of each domain's rows, with their pictures, becomes the test set.

    Pictures are dealt into ten folds of about equal size per domain, in an order that depends on the seed and
    the picture names only; ``TEST_FOLDS`` are the test set, all of them serve cross-validation.

    Returns:
        The examples with their new ``split`` (a row that repeats another one is left out), and question id -> fold.
    """
    distinct = list({example.content(): example for example in reversed(examples)}.values())[::-1]
    group_of = picture_groups(distinct)
    folds = deal(
        [group_of[example.image] for example in distinct],
        FOLD_ORDER,
        seed,
        strata=[example.domain for example in distinct],
        by_rows=True,
    )
    fold_of = {example.id: fold for example, fold in zip(distinct, folds, strict=True)}
    split = [
        dataclasses.replace(example, split=TEST if fold_of[example.id] in TEST_FOLDS else TRAIN) for example in distinct
    ]
    return split, fold_of


def picture_groups(examples: Sequence[Example]) -> dict[str, str]:
    """Image name -> name of its group; images that share a link, directly or over others, are in one group."""
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    images = {example.image for example in examples}
    for example in examples:
        for link in (*example.links, *([example.picture] if example.picture else [])):
            parent[root(f"link {link}")] = root(f"image {example.image}")
    members: dict[str, list[str]] = {}
    for image in images:
        members.setdefault(root(f"image {image}"), []).append(image)
    return {image: min(group) for group in members.values() for image in group}
