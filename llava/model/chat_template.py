"""A conversation template as the chat template (Jinja) that transformers and serving engines read.

``apply_chat_template(messages, add_generation_prompt=True)`` renders what the template renders for the same turns: the
picture's marks in front of their turn, wherever they stand in it, the user's text stripped, the template's own system
text and examples. A ``system`` message takes the place of the system text. What a tokenizer makes of the text is
compared before a template is kept: one that would give other ids than the evaluation's is none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, SeparatorStyle, get_conversation
from llava.mm_utils import bos_ids, tokenizer_image_token

_CHATML_SYSTEM = "<|im_start|>system\n"
_ORDER = "turns must be user and assistant by turns, after at most one system message"
_SAID = """
{%- macro said(content, mark) -%}
{%- set found = namespace(text='', marks=0) -%}
{%- if content is string -%}
{%- set found.text = content -%}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' or part.type == 'image_url' -%}
{%- set found.marks = found.marks + 1 -%}
{%- else -%}
{%- set found.text = found.text + part.text -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set found.marks = found.marks + found.text.split(IMAGE) | length - 1 -%}
{%- set plain = found.text.replace(IMAGE, '') | trim -%}
{%- if plain -%}
{{- (mark + NEWLINE) * found.marks + plain -}}
{%- else -%}
{{- ([mark] * found.marks) | join(NEWLINE) -}}
{%- endif -%}
{%- endmacro -%}
{%- macro text(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}{%- for part in content -%}{{- part.text -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
_LOOP = """
{%- set told = namespace(system=SYSTEM, turns=messages) -%}
{%- if messages and messages[0].role == 'system' -%}
{%- set told.system = SYSTEM_MARK + text(messages[0].content) -%}
{%- set told.turns = messages[1:] -%}
{%- endif -%}
{{- BOS -}}
HEAD
{%- for turn in told.turns -%}
{%- if turn.role != ['user', 'assistant'][loop.index0 % 2] -%}
{{- raise_exception(ORDER) -}}
{%- endif -%}
{%- if turn.role == 'user' -%}
{%- set words = said(turn.content, MARK) -%}
USER
{%- else -%}
{%- set words = text(turn.content) -%}
ASSISTANT
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- OPEN -}}
{%- endif -%}
"""


def chat_template(conv_mode: str, use_im_start_end: bool = False, with_bos: bool = True) -> str:
    """The Jinja source of a conversation template.

    Args:
        conv_mode: a key of ``conv_templates``.
        use_im_start_end: the checkpoint's ``mm_use_im_start_end``.
        with_bos: write the tokenizer's beginning-of-text token in front, as text.
    """
    conversation = get_conversation(conv_mode)
    mark = DEFAULT_IMAGE_TOKEN
    if use_im_start_end:
        mark = f"{DEFAULT_IM_START_TOKEN}{mark}{DEFAULT_IM_END_TOKEN}"
    if "mmtag" in conversation.version:
        mark = f"<Image>{mark}</Image>"
    parts = _PARTS[conversation.sep_style](conversation)
    chatml = conversation.system.startswith(_CHATML_SYSTEM)
    words = {
        "SYSTEM_MARK": _quoted(_CHATML_SYSTEM if chatml else ""),
        "SYSTEM": _quoted(conversation.system),
        "BOS": "bos_token" if with_bos else "''",
        "ORDER": _quoted(_ORDER),
        "MARK": _quoted(mark),
        "IMAGE": _quoted(DEFAULT_IMAGE_TOKEN),
        "NEWLINE": _quoted("\n"),
    }
    source = _SAID + _LOOP
    for name, value in {**parts, **words}.items():  # SYSTEM_MARK before SYSTEM
        source = source.replace(name, value)
    return source.replace("\n", "")


def _quoted(text: str) -> str:
    return json.dumps(text)


def _role_parts(conversation: Conversation, colon: str, ends: tuple[str, str]) -> dict[str, str]:
    examples = "".join(_examples(conversation, colon, ends))
    space = " " if colon else ""

    def turn(number: int) -> str:
        role, end = conversation.roles[number] + colon, ends[number]
        words = f"{{{{- {_quoted(space)} + words + {_quoted(end)} -}}}}"
        return f"{{{{- {_quoted(role)} -}}}}{{%- if words -%}}{words}{{%- endif -%}}"

    return {
        "HEAD": f"{{{{- told.system + {_quoted(conversation.sep + examples)} -}}}}",
        "USER": turn(0),
        "ASSISTANT": turn(1),
        "OPEN": _quoted(conversation.roles[1] + colon),
    }


def _examples(conversation: Conversation, colon: str, ends: tuple[str, str]) -> Iterator[str]:
    for number, (role, text) in enumerate(conversation.messages):
        yield f"{role}{colon}{' ' if colon else ''}{text}{ends[number % 2]}"


def _single(conversation: Conversation) -> dict[str, str]:
    return _role_parts(conversation, ":", (conversation.sep, conversation.sep))


def _two(conversation: Conversation) -> dict[str, str]:
    return _role_parts(conversation, ":", (conversation.sep, conversation.sep2 or ""))


def _mpt(conversation: Conversation) -> dict[str, str]:
    return _role_parts(conversation, "", (conversation.sep, conversation.sep))


def _llama_2(conversation: Conversation) -> dict[str, str]:
    system = '"<<SYS>>\\n" + told.system + "\\n<</SYS>>\\n\\n" if told.system else ""'
    first = f"{{{{- '[INST] ' + ({system}) + words + ' [/INST]' -}}}}"
    later = f"{{{{- {_quoted(conversation.sep)} + '[INST] ' + words + ' [/INST]' -}}}}"
    return {
        "HEAD": "",
        "USER": f"{{%- if loop.first -%}}{first}{{%- else -%}}{later}{{%- endif -%}}",
        "ASSISTANT": f"{{{{- ' ' + words + {_quoted(' ' + (conversation.sep2 or ''))} -}}}}",
        "OPEN": "''",
    }


def _plain(conversation: Conversation) -> dict[str, str]:
    """Pictures then caption; the user's words are dropped."""
    return {
        "HEAD": "{{- told.system -}}",
        "USER": "{{- IMAGE * (words.split(IMAGE) | length - 1) -}}",
        "ASSISTANT": f"{{{{- words + {_quoted(conversation.sep)} -}}}}",
        "OPEN": "''",
    }


_PARTS = {
    SeparatorStyle.SINGLE: _single,
    SeparatorStyle.TWO: _two,
    SeparatorStyle.MPT: _mpt,
    SeparatorStyle.LLAMA_2: _llama_2,
    SeparatorStyle.PLAIN: _plain,
}


def faithful_template(tokenizer: PreTrainedTokenizerBase, conv_mode: str, use_im_start_end: bool = False) -> str | None:
    """The chat template of ``conv_mode`` that gives the evaluation's ids with this tokenizer, ``None`` if none does.

    Args:
        tokenizer: with ``<image>`` as a token of its own.
    """
    for with_bos in (True, False) if bos_ids(tokenizer) else (False,):
        source = chat_template(conv_mode, use_im_start_end, with_bos)
        if all(_same_ids(tokenizer, source, not with_bos, conv_mode, use_im_start_end, turns) for turns in _PROBES):
            return source
    return None


_IMAGE = f"{DEFAULT_IMAGE_TOKEN}\n"
_PROBES = (
    [f"{_IMAGE}Is there a lesion?"],
    [f"{_IMAGE}What side?", "left", "where"],
    ["what is this", "Yes, a scan.", f"{_IMAGE}{_IMAGE}(a) compare"],
)


def _same_ids(
    tokenizer: Any, source: str, special: bool, conv_mode: str, use_im_start_end: bool, turns: Sequence[str]
) -> bool:
    """Whether some turns, the last one a question, get the ids that the evaluation gives them."""
    conversation = get_conversation(conv_mode)
    mark = f"{DEFAULT_IM_START_TOKEN}{DEFAULT_IMAGE_TOKEN}{DEFAULT_IM_END_TOKEN}" if use_im_start_end else ""
    messages = []
    for number, words in enumerate(turns):
        shown = words.replace(DEFAULT_IMAGE_TOKEN, mark) if mark else words
        if "mmtag" in conversation.version:
            shown = shown.replace(mark or DEFAULT_IMAGE_TOKEN, f"<Image>{mark or DEFAULT_IMAGE_TOKEN}</Image>")
        conversation.append_message(conversation.roles[number % 2], shown)
        messages.append({"role": ("user", "assistant")[number % 2], "content": words})
    conversation.append_message(conversation.roles[1], None)
    text = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=True)
    image = tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
    wanted = tokenizer_image_token(conversation.get_prompt(), tokenizer)
    found: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return found == [image if token == IMAGE_TOKEN_INDEX else token for token in wanted]
