"""Conversation templates exactly as LLaVA renders them, and the rule that picks one for a checkpoint.

Notable points:
- a conversation is rendered as *segments*: stretches of prompt and stretches of reply. The prompt is their
  concatenation, and the label mask of training is read off the same segments, so the two can't drift apart;
- an empty or missing message is an open turn: the prompt then ends where the model is to go on;
- a first message given as a tuple ``(text, image, mode)`` gets ``<image>`` put in front, as LLaVA's demo does.

The system texts and the two-message example of ``v0`` are LLaVA's prompts word for word: checkpoints were trained on
them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import zip_longest
from typing import Any, NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.utils import UserError, rank0_print


class SeparatorStyle(Enum):
    """How turns are joined."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()


class Segment(NamedTuple):
    """A stretch of the rendered prompt.

    ``is_reply`` marks what the assistant says, its end mark included; a template's own examples are no replies.
    """

    text: str
    is_reply: bool


@dataclass
class Conversation:
    """A template with the messages said so far.

    Args:
        system: text in front of the first turn (LLAMA_2: wrapped into the first instruction; MPT: with its mark).
        roles: names of the user and of the assistant as they stand in the prompt.
        messages: ``[role, text]`` pairs in order; a text of ``None`` or ``""`` is an open turn.
        offset: number of messages that belong to the template (few-shot examples).
        sep_style, sep, sep2: how turns end.
        version: LLaVA's version tag; ``mmtag`` in it puts ``<Image>`` and ``</Image>`` around the picture.
        skip_next: kept for LLaVA's web server; unused here.
    """

    system: str
    roles: tuple[str, str]
    messages: list[list[Any]] = field(default_factory=list)
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False

    def append_message(self, role: str, message: Any) -> None:
        """Add one turn; ``message=None`` leaves it open for the model."""
        self.messages.append([role, message])

    def copy(self) -> Conversation:
        """An independent conversation with the same template and messages."""
        return Conversation(
            system=self.system,
            roles=self.roles,
            messages=[[role, message] for role, message in self.messages],
            offset=self.offset,
            sep_style=self.sep_style,
            sep=self.sep,
            sep2=self.sep2,
            version=self.version,
        )

    def dict(self) -> dict[str, Any]:
        """Plain containers for a log line; pictures are left out."""
        return {
            "system": self.system,
            "roles": self.roles,
            "messages": [[role, _text_of(message)] for role, message in self.messages],
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }

    def process_image(
        self,
        image: Any,
        image_process_mode: str,
        return_pil: bool = False,
        image_format: str = "PNG",
        max_len: int = 1344,
        min_len: int = 672,
    ) -> Any:
        """A picture (Pillow) as LLaVA's web demo sends it: base64 text, or Pillow with ``return_pil``.

        Raises:
            UserError: an unknown ``image_process_mode`` (see ``image_io.shown_in_chat``).
        """
        from llava.image_io import shown_in_chat, to_base64

        shown = shown_in_chat(image, image_process_mode, max_len, min_len)
        return shown if return_pil else to_base64(shown, image_format)

    def get_images(self, return_pil: bool = False) -> list[Any]:
        """The pictures of the user's tuple messages after the template's own, as ``process_image`` gives them."""
        said = [message for _, message in self.messages[self.offset :: 2] if isinstance(message, tuple)]
        return [self.process_image(image, mode, return_pil) for _, image, mode in said]

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """``[question, answer]`` pairs for Gradio's chat box; a picture is an ``<img>`` in front of its question."""
        texts = [self._shown(message) for _, message in self.messages[self.offset :]]
        return [list(pair) for pair in zip_longest(texts[::2], texts[1::2])]

    def _shown(self, message: Any) -> str | None:
        if not isinstance(message, tuple):
            return message
        text, image, _ = message
        picture = self.process_image(image, "Default", image_format="JPEG")
        mark = f'<img src="data:image/jpeg;base64,{picture}" alt="user upload image" />'
        return mark + text.replace(DEFAULT_IMAGE_TOKEN, "").strip()

    def get_prompt(self) -> str:
        """The rendered text, as LLaVA's ``get_prompt`` gives it."""
        return "".join(segment.text for segment in self.segments())

    def segments(self) -> list[Segment]:
        """The rendered text as alternating prompt and reply segments; neighbours of one kind are joined."""
        turns = [(role, _text_of(message)) for role, message in _with_leading_image(self)]
        return _join_neighbours(_RENDERERS[self.sep_style](self, turns))


Turns = list[tuple[str, str | None]]


def _text_of(message: Any) -> str | None:
    return message[0] if isinstance(message, tuple) else message


def _with_leading_image(conversation: Conversation) -> list[Any]:
    """The messages, with ``<image>`` in front where the first one carries a picture."""
    messages = list(conversation.messages)
    if not messages or not isinstance(messages[0][1], tuple):
        return messages
    role, first = messages[0]
    text = first[0].replace(DEFAULT_IMAGE_TOKEN, "").strip()
    if "mmtag" not in conversation.version:
        return [[role, f"{DEFAULT_IMAGE_TOKEN}\n{text}"], *messages[1:]]
    shown = [conversation.roles[0], f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"]
    return [shown, [conversation.roles[1], "Received."], [role, text], *messages[1:]]


def _join_neighbours(segments: list[Segment]) -> list[Segment]:
    joined: list[Segment] = []
    for segment in segments:
        if not segment.text:
            continue
        if joined and joined[-1].is_reply == segment.is_reply:
            segment = Segment(joined.pop().text + segment.text, segment.is_reply)
        joined.append(segment)
    return joined


def _role_then_text(conversation: Conversation, turns: Turns, head: str, colon: str, ends: tuple[str, str]):
    """Turns written as role, ``colon``, space, text, end; the space belongs to the reply, as tokenizers see it."""
    segments = [Segment(head, False)]
    space = " " if colon else ""
    for index, (role, text) in enumerate(turns):
        segments.append(Segment(role + colon, False))
        if text:
            is_reply = role == conversation.roles[1] and index >= conversation.offset
            segments.append(Segment(space + text + ends[index % 2], is_reply))
    return segments


def _render_single(conversation: Conversation, turns: Turns) -> list[Segment]:
    head = conversation.system + conversation.sep
    return _role_then_text(conversation, turns, head, ":", (conversation.sep, conversation.sep))


def _render_two(conversation: Conversation, turns: Turns) -> list[Segment]:
    head = conversation.system + conversation.sep
    return _role_then_text(conversation, turns, head, ":", (conversation.sep, conversation.sep2 or ""))


def _render_mpt(conversation: Conversation, turns: Turns) -> list[Segment]:
    head = conversation.system + conversation.sep
    return _role_then_text(conversation, turns, head, "", (conversation.sep, conversation.sep))


def _render_llama_2(conversation: Conversation, turns: Turns) -> list[Segment]:
    if turns and (not turns[0][1] or turns[0][0] != conversation.roles[0]):
        raise UserError("a llama_2 conversation must begin with a question of the user")
    system = f"<<SYS>>\n{conversation.system}\n<</SYS>>\n\n" if conversation.system else ""
    segments = []
    for index, (_, text) in enumerate(turns):
        if not text:
            continue
        if index % 2 == 1:
            segments.append(Segment(f" {text} {conversation.sep2}", True))
            continue
        # The tokenizer puts the very first <s>, so the text starts without one.
        start, system_here = ("", system) if index == 0 else (conversation.sep, "")
        segments.append(Segment(f"{start}[INST] {system_here}{text} [/INST]", False))
    return segments


def _render_plain(conversation: Conversation, turns: Turns) -> list[Segment]:
    """Picture then caption: the user's text is dropped, as in LLaVA's projector pre-training."""
    segments = [Segment(conversation.system, False)]
    for index, (_, text) in enumerate(turns):
        if text and index % 2 == 0:
            segments.append(Segment(DEFAULT_IMAGE_TOKEN * text.count(DEFAULT_IMAGE_TOKEN), False))
        elif text:
            segments.append(Segment(text + conversation.sep, True))
    return segments


_RENDERERS = {
    SeparatorStyle.SINGLE: _render_single,
    SeparatorStyle.TWO: _render_two,
    SeparatorStyle.MPT: _render_mpt,
    SeparatorStyle.LLAMA_2: _render_llama_2,
    SeparatorStyle.PLAIN: _render_plain,
}

_POLITE = "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
_SYSTEM = "A chat between a curious {0} and an artificial intelligence assistant. " + _POLITE
_SYSTEM_USER, _SYSTEM_HUMAN = _SYSTEM.format("user"), _SYSTEM.format("human")
# LLaVA has no space before "The visual content"; its checkpoints expect it so.
_SYSTEM_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_SYSTEM_LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_SYSTEM_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_SYSTEM_MPT = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
_V0_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"
_V0_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, such "
    "as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and "
    "will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between renewable "
    "and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
    "finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources "
    "are not, and their depletion can lead to economic and social instability.\n"
)

_LOWER, _UPPER = ("Human", "Assistant"), ("USER", "ASSISTANT")
_CHATML_ROLES = ("<|im_start|>user\n", "<|im_start|>assistant\n")


def _two(system: str, version: str) -> Conversation:
    return Conversation(system, _UPPER, sep_style=SeparatorStyle.TWO, sep=" ", sep2="</s>", version=version)


def _llama_2(system: str, sep: str) -> Conversation:
    return Conversation(system, _UPPER, sep_style=SeparatorStyle.LLAMA_2, sep=sep, sep2="</s>", version="llama_v2")


def _chatml(system: str) -> Conversation:
    return Conversation(system, _CHATML_ROLES, sep_style=SeparatorStyle.MPT, sep="<|im_end|>", version="mpt")


conv_vicuna_v0 = Conversation(
    _SYSTEM_HUMAN, _LOWER, messages=[["Human", _V0_QUESTION], ["Assistant", _V0_ANSWER]], offset=2
)
conv_vicuna_v1 = _two(_SYSTEM_USER, "v1")
conv_llama_2 = _llama_2(_SYSTEM_LLAMA_2, "<s>")
conv_llava_llama_2 = _llama_2(_SYSTEM_LLAVA_LLAMA_2, "<s>")
conv_mistral_instruct = _llama_2("", "")
conv_mpt = _chatml(_SYSTEM_MPT)
conv_chatml_direct = _chatml("<|im_start|>system\nAnswer the questions.")
conv_llava_plain = Conversation("", ("", ""), sep_style=SeparatorStyle.PLAIN, sep="\n")
conv_llava_v0 = Conversation(_SYSTEM_HUMAN, _LOWER)
conv_llava_v0_mmtag = Conversation(_SYSTEM_MMTAG, _LOWER, version="v0_mmtag")
conv_llava_v1 = _two(_SYSTEM_HUMAN, "v1")
conv_llava_v1_mmtag = _two(_SYSTEM_MMTAG, "v1_mmtag")

default_conversation = conv_vicuna_v1
conv_templates: dict[str, Conversation] = {
    "default": conv_vicuna_v0,
    "v0": conv_vicuna_v0,
    "v1": conv_vicuna_v1,
    "vicuna_v1": conv_vicuna_v1,
    "llama_2": conv_llama_2,
    "mistral_instruct": conv_mistral_instruct,
    "chatml_direct": conv_chatml_direct,
    "mistral_direct": conv_chatml_direct,
    "plain": conv_llava_plain,
    "v0_plain": conv_llava_plain,
    "llava_v0": conv_llava_v0,
    "v0_mmtag": conv_llava_v0_mmtag,
    "llava_v1": conv_llava_v1,
    "v1_mmtag": conv_llava_v1_mmtag,
    "llava_llama_2": conv_llava_llama_2,
    "mpt": conv_mpt,
}


def get_conversation(conv_mode: str) -> Conversation:
    """A fresh copy of the template ``conv_mode``.

    Raises:
        UserError: the name is no template (LLaVA falls back to ``vicuna_v1`` without a word).
    """
    if conv_mode not in conv_templates:
        known = ", ".join(sorted(conv_templates))
        raise UserError(f"unknown conversation template {conv_mode!r} (choose from {known})")
    return conv_templates[conv_mode].copy()


def plain_question(text: str) -> str:
    """A question without ``<image>`` and surrounding white space: what is encoded into a text query."""
    return text.replace(DEFAULT_IMAGE_TOKEN, "").strip()


_NAME_RULES = (
    ("llama-2", re.compile(r"llama-2"), "llava_llama_2"),
    ("mistral", re.compile(r"mistral"), "mistral_instruct"),
    ("v1.6-34b", re.compile(r"v1\.6-34b"), "chatml_direct"),
    ("v1", re.compile(r"v1"), "llava_v1"),
    # A word of its own, because "mpt" also stands in "prompt" and "attempt".
    ("mpt", re.compile(r"(?<![a-z])mpt(?![a-z])"), "mpt"),
)


def conv_mode_for(config: Any, model_name: str) -> str:
    """The template for a checkpoint; the rule that fired is printed.

    In order: ``config.conversation_version``; a Mistral language model by ``model_type``; LLaVA's rules on the
    folder name; the layout (an early LLaVA has a linear projector or ``mm_use_im_start_end`` and means ``llava_v0``,
    all others ``vicuna_v1``).

    Raises:
        UserError: ``conversation_version`` names no template.
    """
    mode, rule = _choose_mode(config, model_name.lower())
    rank0_print(f"conversation template: {mode} ({rule})")
    return mode


def _choose_mode(config: Any, name: str) -> tuple[str, str]:
    explicit = getattr(config, "conversation_version", None)
    if explicit:
        get_conversation(explicit)
        return explicit, "config.conversation_version"
    if "mistral" in (getattr(config, "model_type", None) or ""):
        return "mistral_instruct", f"config.model_type is {config.model_type}"
    for word, pattern, mode in _NAME_RULES:
        if pattern.search(name):
            return mode, f"the folder name holds {word!r}"
    early = getattr(config, "mm_use_im_start_end", False) or getattr(config, "mm_projector_type", "linear") == "linear"
    if early:
        return "llava_v0", "no name rule; linear projector or im_start_end tokens as in early LLaVA"
    return "vicuna_v1", "no name rule; projector as in LLaVA-1.5"
