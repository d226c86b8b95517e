"""New tokens: the embeddings grow, and the new rows start as the mean of the old ones."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llava.model.partitioned import gathered


def grow_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, added: int) -> None:
    """Fit the embeddings, and the head where it has a table of its own, to a tokenizer that has got ``added`` tokens.

    Rows that a checkpoint has beyond its tokenizer are used before any are added.
    """
    if added <= 0:
        return
    if len(tokenizer) > model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    start, end = len(tokenizer) - added, len(tokenizer)
    parts = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    tables: list[Any] = list({id(part.weight): part.weight for part in parts}.values())  # tied ones are one table
    with torch.no_grad(), gathered(tables, write=True):
        for table in tables:
            table[start:end] = table[:start].mean(0)
