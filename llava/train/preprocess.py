"""LLaVA's data functions under their names and signatures, for trainers that import them.

Ids and labels come from ``llava.data.labels``, the project's one labelling code, and pictures from the prompt encoder:
what LLaVA computes by subtracting constants, and drops with a warning where they do not fit, is read off the rendered
conversation here. As in LLaVA the template is ``llava.conversation.default_conversation``, which the caller sets. A
``v0`` conversation is rendered as it is asked at evaluation, not in the ``### Human:`` lines of LLaVA's first trainer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import LongTensor, Tensor, tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llava import conversation
from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
)
from llava.conversation import SeparatorStyle
from llava.data.labels import encode_segments, place_image
from llava.data.prompt import Prompt, PromptEncoder
from llava.data.rows import read_rows
from llava.data.samples import DataCollatorForSupervisedDataset, TrainingSamples
from llava.model.vocabulary import grow_embeddings
from llava.padding import pad
from llava.utils import UserError

Turns = list[dict[str, str]]
"""One conversation as LLaVA's files have it: ``{"from": "human" or "gpt", "value": text}`` in turn."""

NO_LIMIT = 10**9  # tokenizers without a limit name a huge one


def smart_tokenizer_and_embedding_resize(
    special_tokens_dict: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    """Add special tokens to the tokenizer, and rows of their own, the mean of the others, to embeddings and head."""
    grow_embeddings(model, tokenizer, tokenizer.add_special_tokens(dict(special_tokens_dict)))


def preprocess_multimodal(sources: list[Turns], data_args: Any) -> list[Turns]:
    """Put ``<image>`` in front of the turn that holds it, with the marks that the template or the model has; in place.

    Args:
        data_args: ``is_multimodal`` (false: nothing is changed) and ``mm_use_im_start_end``.
    """
    if not data_args.is_multimodal:
        return sources
    mark = DEFAULT_IMAGE_TOKEN
    if getattr(data_args, "mm_use_im_start_end", False):
        mark = f"{DEFAULT_IM_START_TOKEN}{mark}{DEFAULT_IM_END_TOKEN}"
    if "mmtag" in conversation.default_conversation.version:
        mark = f"<Image>{mark}</Image>"
    for turn in (turn for source in sources for turn in source):
        if count := turn["value"].count(DEFAULT_IMAGE_TOKEN):
            turn["value"] = place_image(turn["value"], count).replace(DEFAULT_IMAGE_TOKEN, mark)
    return sources


def preprocess_llama_2(
    sources: list[Turns], tokenizer: PreTrainedTokenizerBase, has_image: bool = False
) -> dict[str, Tensor]:
    """``preprocess`` with a template of Llama 2's or Mistral's style."""
    return _stacked(sources, tokenizer, has_image, SeparatorStyle.LLAMA_2)


def preprocess_v1(
    sources: list[Turns], tokenizer: PreTrainedTokenizerBase, has_image: bool = False
) -> dict[str, Tensor]:
    """``preprocess`` with a template of Vicuna's style."""
    return _stacked(sources, tokenizer, has_image, SeparatorStyle.TWO)


def preprocess_mpt(
    sources: list[Turns], tokenizer: PreTrainedTokenizerBase, has_image: bool = False
) -> dict[str, Tensor]:
    """``preprocess`` with a template of ChatML's style."""
    return _stacked(sources, tokenizer, has_image or _has_mark(sources), SeparatorStyle.MPT)


def preprocess_plain(sources: list[Turns], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Tensor]]:
    """Picture and caption, for the projector's pre-training: lists of ids and labels, one entry a conversation.

    Raises:
        UserError: a conversation is no question with ``<image>`` and its caption.
    """
    for source in sources:
        if len(source) != 2 or DEFAULT_IMAGE_TOKEN not in source[0]["value"]:
            raise UserError(f"a plain conversation is <image> and a caption, found {len(source)} turns; use version v1")
    pairs = [_encoded(source, tokenizer, True) for source in sources]
    return {"input_ids": [tensor(ids) for ids, _ in pairs], "labels": [tensor(labels) for _, labels in pairs]}


def preprocess(
    sources: list[Turns], tokenizer: PreTrainedTokenizerBase, has_image: bool = False
) -> dict[str, Tensor] | dict[str, list[Tensor]]:
    """Ids and labels ``[conversations, T]`` of conversations, rendered with ``conversation.default_conversation``.

    Args:
        has_image: ``<image>`` stands for a picture, and nothing is cut; text alone is cut to the tokenizer's limit.

    Raises:
        UserError: turns out of order, or ``<image>`` without ``has_image``.
    """
    style = conversation.default_conversation.sep_style
    if style is SeparatorStyle.PLAIN:
        return preprocess_plain(sources, tokenizer)
    return _stacked(sources, tokenizer, has_image, style)


def _stacked(
    sources: list[Turns], tokenizer: PreTrainedTokenizerBase, has_image: bool, style: SeparatorStyle
) -> dict[str, Tensor]:
    found = conversation.default_conversation.sep_style
    if found is not style:
        raise UserError(f"default_conversation has the style {found.name}, not {style.name}; call preprocess")
    if not has_image and _has_mark(sources):
        raise UserError(f"the text holds {DEFAULT_IMAGE_TOKEN} but has_image is False; give the picture, or drop it")
    limit = None if has_image else min(tokenizer.model_max_length, NO_LIMIT)
    pairs = [_encoded(source, tokenizer, has_image) for source in sources]
    filling = tokenizer.pad_token_id or 0
    return {
        "input_ids": pad([LongTensor(ids[:limit]) for ids, _ in pairs], value=filling)[0],
        "labels": pad([LongTensor(labels[:limit]) for _, labels in pairs], value=IGNORE_INDEX)[0],
    }


def _has_mark(sources: list[Turns]) -> bool:
    return any(DEFAULT_IMAGE_TOKEN in turn["value"] for source in sources for turn in source if turn["from"] != "gpt")


def _encoded(source: Turns, tokenizer: PreTrainedTokenizerBase, has_image: bool) -> tuple[list[int], list[int]]:
    """Ids and labels of one conversation as it stands; a first turn by the model is left out."""
    template = conversation.default_conversation.copy()
    turns = source[1:] if source[0]["from"] == "gpt" else source
    for number, turn in enumerate(turns):
        if turn["from"] != ("human", "gpt")[number % 2]:
            raise UserError(f"turns must alternate human, gpt; turn {number + 1} is {turn['from']!r}")
        template.append_message(template.roles[number % 2], turn["value"])
    return encode_segments(template.segments(), tokenizer)


class LazySupervisedDataset(TrainingSamples):
    """LLaVA's dataset: the rows of a file as samples, rendered with ``conversation.default_conversation``.

    Args:
        data_path: rows, LLaVA's JSON or the project's question rows.
        data_args: ``image_folder``, ``image_processor``, ``image_aspect_ratio``, ``image_grid_pinpoints`` and
            ``mm_use_im_start_end``, as far as they are there.

    Raises:
        UserError: as ``TrainingSamples``; and a template that is not one of ``conv_templates``.
    """

    def __init__(self, data_path: str, tokenizer: PreTrainedTokenizerBase, data_args: Any) -> None:
        def asked(name: str, default: Any = None) -> Any:
            return getattr(data_args, name, None) or default

        limit = tokenizer.model_max_length if tokenizer.model_max_length < NO_LIMIT else None
        prompt = Prompt(_default_name(), aspect_ratio=asked("image_aspect_ratio", "square"), max_length=limit)
        config = SimpleNamespace(
            mm_use_im_start_end=asked("mm_use_im_start_end", False), image_grid_pinpoints=asked("image_grid_pinpoints")
        )
        encoder = PromptEncoder(prompt, tokenizer, asked("image_processor"), config, asked("image_folder"))
        super().__init__(read_rows(data_path, require_answer=True), encoder)
        self.tokenizer, self.data_args = tokenizer, data_args
        self.list_data_dict = [copy.deepcopy(row.raw) for row in self.rows]


def _default_name() -> str:
    default = conversation.default_conversation
    names = [name for name, template in conversation.conv_templates.items() if template is default]
    if not names:
        raise UserError("llava.conversation.default_conversation is none of conv_templates; add it there under a name")
    return names[0]


def make_supervised_data_module(tokenizer: PreTrainedTokenizerBase, data_args: Any) -> dict[str, Any]:
    """Dataset and collator as a trainer's keyword arguments; ``data_args.data_path`` names the rows."""
    return {
        "train_dataset": LazySupervisedDataset(data_args.data_path, tokenizer, data_args),
        "eval_dataset": None,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer),
    }
