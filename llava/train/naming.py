"""Naming, a feature alignment without the decoder: the projector learns the words for what is seen.

Its rows say in ``words`` which words are true of a picture and which are not, ``{"liver": true, "spleen": false}``;
what isn't there is not known. A word that is only ever true, or only ever false, is left out. The loss is
``llava.model.naming``'s, the stage's folder that of feature alignment. A step costs a projection, so many passes over
the rows take less time than a few steps through a decoder; the features are kept where ``--feature_cache_mb`` allows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava.continual.methods import METHODS, Context
from llava.data.rows import Row
from llava.data.samples import TrainingSamples
from llava.model.naming import UNKNOWN, Naming
from llava.model.partitioned import gathered
from llava.outside import kind_of
from llava.train.align import Align
from llava.utils import UserError, rank0_print

FIELD = "words"


@METHODS.register
class NameWords(Align):
    name = "naming"
    answers = False

    def rows(self, context: Context, rows: list[Row]) -> list[Row]:
        rows = super().rows(context, rows)
        self.words = words_of(rows)
        return rows

    def begin(self, context: Context) -> Sequence[nn.Parameter | Mapping[str, Any]]:
        rank0_print(f"naming: {len(self.words)} words: {', '.join(self.words)}")
        context.model.naming = naming_of(context.model, context.tokenizer, self.words)
        return super().begin(context)

    def samples(self, context: Context, dataset: TrainingSamples) -> None:
        dataset.truths = torch.stack([truths(row, self.words) for row in dataset.rows])


def words_of(rows: Sequence[Row]) -> list[str]:
    """The words that are true of some rows' pictures and false of others', in the order of their first use.

    Raises:
        UserError: a row's ``words`` are no true and false words, or none is both.
    """
    found: dict[str, set[bool]] = defaultdict(set)
    for row in rows:
        for word, true in told(row).items():
            found[word].add(true)
    words = [word for word, values in found.items() if len(values) == 2]
    if not words:
        raise UserError(
            f"no word is true of one picture and false of another; rows for naming say so in '{FIELD}', such as "
            '{"liver": true, "spleen": false}'
        )
    return words


def told(row: Row) -> dict[str, bool]:
    """The words that a row says are true or false of its picture.

    Raises:
        UserError: they are none.
    """
    found = row.raw.get(FIELD, {})
    if not isinstance(found, dict):
        raise UserError(f"row {row.id!r}: '{FIELD}' is {kind_of(found)}; write words as {{\"liver\": true}}")
    for word, true in found.items():
        if not isinstance(true, bool) or not word.strip():
            raise UserError(f"row {row.id!r}: '{FIELD}' says {true!r} of {word!r}; write true or false of a word")
    return found


def truths(row: Row, words: Sequence[str]) -> Tensor:
    """What a row says of the words, ``[words]``: 1, 0 or ``UNKNOWN``."""
    known = told(row)
    return torch.tensor([float(known[word]) if word in known else UNKNOWN for word in words])


def naming_of(model: Any, tokenizer: Any, words: Sequence[str]) -> Naming:
    """The words as the decoder has them: each the mean of its tokens' embeddings, as they stand within a text."""
    table = model.get_input_embeddings().weight
    with gathered([table]), torch.no_grad():
        whole = table.detach().float()
        centre = whole.mean(0)
        reach = float((whole - centre).norm(dim=-1).mean())
        ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
        return Naming(torch.stack([whole[one].mean(0) for one in ids]), centre, reach)
