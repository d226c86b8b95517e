"""What each row of a batch asks, read back from the token ids of its prompt.

Programs written for LLaVA hand over a rendered prompt and no question, so a stage that routes on the question finds it
there: the ids become text again, the text is taken apart by the template that it was rendered with (the stage's own is
tried first), and of the last user turn the pictures and the stage's answer suffix are taken away. What is left is what
an evaluation encodes, character for character.

How a template looks is not written down here: each is rendered with marks in the place of the texts, and what stands
between the marks is what is searched for. White space at a turn's border never counts, since questions are stripped.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import Conversation, conv_templates, plain_question
from llava.utils import rank0_print

_PICTURE = re.compile(
    f"(?:<Image>)?(?:{DEFAULT_IM_START_TOKEN})?{DEFAULT_IMAGE_TOKEN}(?: ?{DEFAULT_IM_END_TOKEN})?(?: ?</Image>)?"
)
_SYSTEM_INSIDE = re.compile(r"\A\s*<<SYS>>.*?<</SYS>>", re.DOTALL)
_TOKENIZING = threading.Lock()
"""A fast tokenizer may not be used by two threads at once."""


class QuestionReader:
    """Questions of prompts, for one tokenizer; safe to use from several threads."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._told = False

    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        prompt: Mapping[str, Any] | None = None,
        pad_token_id: int | None = None,
    ) -> list[str]:
        """The plain question of each row of ``input_ids`` ``[batch, length]``.

        It is the last user turn. With ``labels`` ``[batch, length]`` it is the turn before the first label, so that a
        conversation of several turns, all of them labelled, is routed by its first question, as in training.

        Args:
            attention_mask: ``[batch, length]``; without it padding is known by the tokenizer's or the given id.
            prompt: the stage's (``conv_mode``, ``answer_suffix``).
        """
        prompt = prompt or {}
        own, suffix = prompt.get("conv_mode"), prompt.get("answer_suffix") or ""
        pads = {self.tokenizer.pad_token_id, pad_token_id} - {None}
        rows = input_ids.tolist()
        masks = [[1] * len(row) for row in rows] if attention_mask is None else attention_mask.tolist()
        row_labels = [None] * len(rows) if labels is None else labels.tolist()
        found = []
        for ids, mask, targets in zip(rows, masks, row_labels, strict=True):
            start, end = _inside(ids, mask, pads if attention_mask is None else set())
            kept = [place for place in range(start, end) if mask[place]]
            first = next((place for place in kept if targets and targets[place] != IGNORE_INDEX), None)
            text = prompt_text([ids[place] for place in kept], self.tokenizer)
            before = None if first is None else prompt_text([ids[p] for p in kept if p < first], self.tokenizer)
            turn = user_turn(text if before is None else before, own, ended=before is not None)
            if turn is None and before is not None:  # everything is labelled, or the mask is another program's
                turn = user_turn(text, own, until=len(before))
            found.append(_plain(self._whole(before or text) if turn is None else turn, suffix))
        return found

    def _whole(self, text: str) -> str:
        if not self._told:
            self._told = True
            rank0_print("note: a prompt follows none of LLaVA's templates; the whole of it is routed as the question")
        for token in filter(None, (self.tokenizer.bos_token, self.tokenizer.eos_token)):
            text = text.strip().removeprefix(token).removesuffix(token)
        return text


def _inside(ids: Sequence[int], mask: Sequence[int], pads: set[int]) -> tuple[int, int]:
    """``[start, end)`` of a row without the padding at its ends."""
    start, end = 0, len(ids)
    while start < end and (not mask[start] or ids[start] in pads):
        start += 1
    while start < end and (not mask[end - 1] or ids[end - 1] in pads):
        end -= 1
    return start, end


def _plain(turn: str, suffix: str) -> str:
    """A user turn without pictures and the answer suffix: the question as an evaluation encodes it."""
    text, suffix = _PICTURE.sub("", turn).strip(), suffix.rstrip()
    if suffix:
        text = "" if text == suffix.strip() else text.removesuffix(f"\n{suffix}")
    return plain_question(text)


# -- ids to text -------------------------------------------------------------------------------------------------------


def prompt_text(ids: Sequence[int], tokenizer: Any) -> str:
    """The rendered text of ``ids``, with ``<image>`` in the pictures' places and no beginning-of-text token.

    Stretches between pictures were tokenized one by one, and are read so: each loses the space that a tokenizer puts in
    front of a text, and no other.
    """
    rest = list(ids)
    while rest and rest[0] == tokenizer.bos_token_id:
        rest.pop(0)
    stretches: list[list[int]] = [[]]
    for token in rest:
        if token == IMAGE_TOKEN_INDEX:
            stretches.append([])
        elif token >= 0:
            stretches[-1].append(token)
    with _TOKENIZING:
        texts = [_text(stretch, tokenizer) for stretch in stretches]
        behind = [_spaced(text, stretch, tokenizer) for text, stretch in zip(texts[1:], stretches[1:], strict=True)]
    return DEFAULT_IMAGE_TOKEN.join([texts[0], *behind])


def _text(ids: list[int], tokenizer: Any) -> str:
    """The text that has these ids: decoded as a whole, or between special tokens, where some write a space anew."""
    whole = _decoded(ids, tokenizer)
    if not any(token in tokenizer.all_special_ids for token in ids) or _ids(whole, tokenizer) == ids:
        return whole
    parts = "".join(_decoded(part, tokenizer) for part in _split(ids, set(tokenizer.all_special_ids)))
    return parts if _ids(parts, tokenizer) == ids else whole


def _spaced(text: str, ids: list[int], tokenizer: Any) -> str:
    """The text behind a picture, with the space that it most likely began with where the ids can't tell."""
    spaced = f" {text}"
    return spaced if text and not text[0].isspace() and _ids(spaced, tokenizer) == ids else text


def _decoded(ids: list[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _split(ids: list[int], special: set[int]) -> Iterator[list[int]]:
    """Runs of ordinary tokens, and special tokens one by one."""
    run: list[int] = []
    for token in ids:
        if token not in special:
            run.append(token)
            continue
        yield from ([run, [token]] if run else [[token]])
        run = []
    if run:
        yield run


# -- text to turns -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Marks:
    """What stands around the texts of a template: ``head`` before the first, the patterns before the others."""

    head: str
    opening: str
    later: str
    reply: str

    @classmethod
    def of(cls, template: Conversation) -> _Marks | None:
        """The marks of a template; ``None`` where its prompts hold no question (``plain``)."""
        bare = template.copy()
        bare.system = ""
        rendered, unled = _rendered(template), _rendered(bare)
        if rendered is None or unled is None:
            return None
        head, reply, later = rendered
        common = 0
        while common < min(len(later), len(unled[0])) and later[-1 - common] == unled[0][-1 - common]:
            common += 1
        opening = later[len(later) - common :].strip().removeprefix(template.sep.strip()).strip()
        end = later.rstrip().removesuffix(opening).strip().removesuffix("<s>")
        after = f"{_loose(end)}\\s*(?:<s>\\s*)?{_loose(opening)}"
        name = reply.strip().removeprefix(template.sep.strip()).strip()
        return cls(head.strip(), _loose(opening), after, rf"\A\s*{_loose(name)}|{_loose(reply.strip())}")

    def turn(self, text: str, until: int | None, strict: bool, must_be_open: bool) -> str | None:
        """The last user turn of ``text``, or ``None`` where the template does not fit.

        Args:
            until: the first turn, or the last of those that begin before this place.
            strict: the text must begin as the template does; otherwise another system text may stand there.
            must_be_open: the text must end where the assistant is to speak.
        """
        if strict:
            if not text.startswith(self.head):
                return None
            start = len(self.head)
        else:
            opened = re.search(self.opening, text)
            if opened is None:
                return None
            start = opened.end()
        while replied := re.search(self.reply, text[start:]):
            rest = start + replied.end()
            later = re.search(self.later, text[rest:])  # inside a question it means nothing: no reply stands before it
            if later is None or (until is not None and rest + later.end() >= until):
                break
            start = rest + later.end()
        body = _SYSTEM_INSIDE.sub("", text[start:])
        ended = re.search(rf"(?:{self.reply})\s*\Z", body) if until is None else None
        if must_be_open:
            return None if ended is None else body[: ended.start()]
        ended = ended or re.search(self.reply, body)
        if ended is not None:
            return body[: ended.start()]
        return body if strict else None


def _rendered(template: Conversation) -> tuple[str, str, str] | None:
    """What a template writes before the first text, before the reply, and before the next question."""
    marks = ("\0", "\1", "\2")
    conversation = template.copy()
    for role, mark in zip((0, 1, 0), marks, strict=True):
        conversation.append_message(conversation.roles[role], mark)
    parts = re.split("[\0\1\2]", conversation.get_prompt())
    return (parts[0], parts[1], parts[2]) if len(parts) == 4 else None


def _loose(text: str) -> str:
    """A pattern for ``text`` with any white space between tokens that end and begin with angle brackets."""
    return re.escape(text).replace("><", r">\s*<")


_FITS = ((True, True), (True, False), (False, True), (False, False))
"""In which order a template is tried: ``strict`` and ``must_be_open`` of ``_Marks.turn``."""


def user_turn(text: str, own: str | None = None, until: int | None = None, ended: bool = False) -> str | None:
    """The last user turn of a rendered prompt, as it stands there; ``None`` where no template fits.

    Args:
        until: the last turn that begins before this place, or the first turn. ended: the assistant is to speak next.
        own: the template to try first. Then come those whose system text is there, the longest first, and then those
            whose roles alone are there, since programs write system texts of their own.
    """
    names = [own] if own in conv_templates else []
    marks = [_Marks.of(conv_templates[name]) for name in names]
    others = {_Marks.of(template) for template in conv_templates.values()} - {None, *marks}
    ordered = [*filter(None, marks), *sorted(filter(None, others), key=lambda each: (-len(each.head), each.head))]
    text = text.strip()
    for strict, must_be_open in ((True, True), (False, True)) if ended else _FITS:
        for each in ordered:
            found = each.turn(text, until, strict, must_be_open)
            if found is not None:
                return found
    return None
