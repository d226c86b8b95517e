"""Turns a conversation into token ids and training labels; prompts for generation come from the same code.

The rendered conversation is a list of segments (prompt, reply, prompt, …). Each segment contributes the tokens it adds
to the text before it, so that

- the ids equal what the tokenizer gives for the whole text (LLaVA's checkpoints were trained on those),
- the ids of an open prompt are exactly the first ids of the same prompt with its answer,
- the labels are the reply segments, whatever the answer holds (a separator, ``ASSISTANT:``, ``</s>``): nothing is
  searched for and no length is corrected by a constant.

The few texts in which a token would straddle the border (an answer that begins with a newline after a prompt that ends
with one) are tokenised segment by segment there; only then do the ids differ from the whole text's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import Conversation, Segment, SeparatorStyle, get_conversation, plain_question
from llava.mm_utils import bos_ids, parse_grid_pinpoints, picture_side
from llava.truncation import kept_tokens
from llava.utils import UserError

Turn = tuple[str, str]
HUMAN_NAMES = ("human", "user")
# Texts whose tokens don't merge with what follows; the first one that fits stands in for the prompt.
_ANCHORS = ("\n", ":", "]", "x")


def prompt_ids(
    question: str, tokenizer: Any, conv_mode: str, has_image: bool, use_im_start_end: bool = False
) -> list[int]:
    """Ids of a question with the assistant's turn open, for generation.

    Args:
        question: the question; ``<image>`` may stand anywhere in it and is put in front when it is missing.
        tokenizer: the model's tokenizer.
        conv_mode: a key of ``conv_templates``.
        has_image: whether a picture belongs to the question.
        use_im_start_end: the checkpoint's ``mm_use_im_start_end``.

    Returns:
        ids with ``IMAGE_TOKEN_INDEX`` in the picture's place.
    """
    return conversation_ids([("human", question)], tokenizer, conv_mode, int(has_image), use_im_start_end)[0]


def conversation_ids(
    conversations: Sequence[Turn],
    tokenizer: Any,
    conv_mode: str,
    images: int,
    use_im_start_end: bool = False,
    system: str | None = None,
) -> tuple[list[int], list[int]]:
    """Ids and labels of a whole conversation; arguments as in ``prompt_ids``.

    Args:
        conversations: ``("human", text)`` and ``("gpt", text)`` in turn, human first. Without a last answer the
            assistant's turn stays open.
        images: pictures that belong to the conversation; where no turn names ``<image>``, as many are put in front.
        system: replaces the template's system text.

    Returns:
        ``(input_ids, labels)`` of equal length; a label is the token itself inside a reply (its end mark included) and
        ``IGNORE_INDEX`` elsewhere. An empty reply leaves no label.

    Raises:
        UserError: turns out of order, ``<image>`` in a conversation without a picture, or a system text for a template
            that has no place for one.
    """
    conversation = build_conversation(conversations, conv_mode, images, use_im_start_end, system)
    return encode_segments(conversation.segments(), tokenizer)


def build_conversation(
    conversations: Sequence[Turn],
    conv_mode: str,
    images: int,
    use_im_start_end: bool = False,
    system: str | None = None,
) -> Conversation:
    """The template ``conv_mode`` filled with the turns, ``<image>`` placed as LLaVA's training places it."""
    conversation = get_conversation(conv_mode)
    if system is not None:
        conversation.system = _system_text(conversation, conv_mode, system)
    turns = _placed(conversations, images)
    for index, (speaker, text) in enumerate(turns):
        if (speaker in HUMAN_NAMES) != (index % 2 == 0):
            raise UserError(f"turns must alternate human, gpt; turn {index + 1} is {speaker!r}")
        if index % 2 == 0:
            text = _mark_image(text, conversation.version, use_im_start_end)
        conversation.append_message(conversation.roles[index % 2], text)
    if len(turns) % 2 == 1:
        conversation.append_message(conversation.roles[1], None)
    return conversation


def _system_text(conversation: Conversation, conv_mode: str, text: str) -> str:
    """``text`` in the place of the template's own system text; MPT's begins with a line that marks it."""
    if not conversation.system:
        raise UserError(
            f"template {conv_mode!r} has no place for a system turn (take the turn out, or choose another template)"
        )
    if conversation.sep_style is not SeparatorStyle.MPT:
        return text
    return conversation.system.partition("\n")[0] + "\n" + text


def _placed(conversations: Sequence[Turn], images: int) -> list[Turn]:
    """Human turns stripped, and ``<image>`` in front of the one that names it (of the first one when none does).

    LLaVA strips only the turn with the picture; here training and evaluation strip alike, so they can't differ.
    """
    marks = [text.count(DEFAULT_IMAGE_TOKEN) if speaker in HUMAN_NAMES else 0 for speaker, text in conversations]
    if not images:
        if sum(marks):
            raise UserError(f"the text holds {DEFAULT_IMAGE_TOKEN} but there is no image")
    elif marks and not sum(marks):
        marks[0] = images
    return [
        (speaker, place_image(text, count) if speaker in HUMAN_NAMES else text)
        for (speaker, text), count in zip(conversations, marks)
    ]


def place_image(text: str, count: int = 1) -> str:
    """``<image>`` and a newline, ``count`` times, in front of the stripped text, wherever the marks stood before.

    Marks with words between them stay where they are: the words say which picture is which.
    """
    between = text.split(DEFAULT_IMAGE_TOKEN)[1:-1]
    if any(part.strip() for part in between):
        return text.strip()
    return (f"{DEFAULT_IMAGE_TOKEN}\n" * count + plain_question(text)).strip()


def _mark_image(text: str, version: str, use_im_start_end: bool) -> str:
    mark = DEFAULT_IMAGE_TOKEN
    if use_im_start_end:
        mark = f"{DEFAULT_IM_START_TOKEN}{mark}{DEFAULT_IM_END_TOKEN}"
    if "mmtag" in version:
        mark = f"<Image>{mark}</Image>"
    return text.replace(DEFAULT_IMAGE_TOKEN, mark)


def encode_segments(segments: Sequence[Segment], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids and labels of rendered segments; ``<image>`` in a prompt segment becomes ``IMAGE_TOKEN_INDEX``."""
    ids = bos_ids(tokenizer)
    labels = [IGNORE_INDEX] * len(ids)
    stretch = _Stretch(tokenizer)
    for segment in segments:
        # An answer that spells out "<image>" means the word, not a picture.
        pieces = [segment.text] if segment.is_reply else segment.text.split(DEFAULT_IMAGE_TOKEN)
        for index, piece in enumerate(pieces):
            if index:
                ids.append(IMAGE_TOKEN_INDEX)
                labels.append(IGNORE_INDEX)
                stretch = _Stretch(tokenizer)
            added = stretch.add(piece)
            ids += added
            labels += added if segment.is_reply else [IGNORE_INDEX] * len(added)
    return ids, labels


class _Stretch:
    """Text between two pictures, tokenised as one while it grows."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.text = ""
        self.ids: list[int] = []

    def add(self, piece: str) -> list[int]:
        """The tokens that ``piece`` adds to the text so far."""
        if not piece:
            return []
        before, self.text = self.ids, self.text + piece
        self.ids = _encode(self.text, self.tokenizer)
        if self.ids[: len(before)] == before:
            return self.ids[len(before) :]
        return _continuation(piece, self.tokenizer)


def _encode(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _continuation(piece: str, tokenizer: Any) -> list[int]:
    """Tokens of ``piece`` as it stands inside a text, without the space that tokenizers put before a text's start."""
    for anchor in _ANCHORS:
        before, both = _encode(anchor, tokenizer), _encode(anchor + piece, tokenizer)
        if both[: len(before)] == before:
            return both[len(before) :]
    return _encode(piece, tokenizer)


def expanded_length(ids: Sequence[int], image_tokens: int) -> int:
    """Positions the ids take in the language model once each picture has become ``image_tokens`` features."""
    pictures = sum(token == IMAGE_TOKEN_INDEX for token in ids)
    return len(ids) + pictures * (image_tokens - 1)


def image_token_count(model_cfg: Any, image_processor: Any, aspect_ratio: str) -> int:
    """The most features one picture becomes, as far as the config tells; 1 where it tells nothing.

    A loaded tower has told its patches and the tokens in front of them (``mm_patches_per_side``,
    ``mm_leading_tokens``); else their size comes from ``vision_config``, or from the tower's name (``…-patch14-336``).
    """
    vision = getattr(model_cfg, "vision_config", None) or {}
    read = vision.get if isinstance(vision, dict) else lambda name: getattr(vision, name, None)
    named = re.search(r"patch-?(\d+)", str(getattr(model_cfg, "mm_vision_tower", None) or ""))
    patch = read("patch_size") or (int(named.group(1)) if named else None)
    size, told = read("image_size") or picture_side(image_processor), getattr(model_cfg, "mm_patches_per_side", None)
    if not size or not (patch or told):
        return 1
    side: int = told or int(size) // int(patch or size)
    leading: int = getattr(model_cfg, "mm_leading_tokens", 1)
    base = side * side + (leading if getattr(model_cfg, "mm_vision_select_feature", "patch") == "cls_patch" else 0)
    if aspect_ratio != "anyres":
        return base
    grids = [(width // size, height // size) for width, height in parse_grid_pinpoints(model_cfg.image_grid_pinpoints)]
    # Tiles, and one newline feature per row of patches.
    return base + max(columns * rows * side * side + rows * side for columns, rows in grids)


def truncate(ids: list[int], labels: list[int], max_length: int, image_tokens: int = 1) -> tuple[list[int], list[int]]:
    """Shorten a sample to ``max_length`` positions, features included, so that an answer stays.

    Later turns go first, then the end of the first question (see ``truncation``).

    Raises:
        UserError: the pictures alone leave no room for an answer.
    """
    pictures = {place for place, token in enumerate(ids) if token == IMAGE_TOKEN_INDEX}
    lengths = [image_tokens if place in pictures else 1 for place in range(len(ids))]
    kept = kept_tokens(lengths, [label != IGNORE_INDEX for label in labels], pictures, max_length)
    if ids and not kept:
        taken = image_tokens * max(len(pictures), 1)
        raise UserError(
            f"model_max_length {max_length} leaves no room for an answer beside {taken} image tokens "
            "(raise --model_max_length)"
        )
    return [ids[place] for place in kept], [labels[place] for place in kept]


def has_labels(labels: Sequence[int]) -> bool:
    """True when at least one position carries loss."""
    return any(label != IGNORE_INDEX for label in labels)
