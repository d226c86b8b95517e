"""The body of OpenAI's chat completions as a question: every field acts, or is refused by name.

Pictures come as data URLs; nothing is fetched. Each stands in the conversation where the message shows it, or where the
message's text says ``<image>``. What OpenAI's clients send along without a meaning here (``user``, ``metadata``) is
passed over; what would change an answer there and cannot here (``n``, ``tools``, penalties) may only have the value
that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL.Image import Image

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.data.rows import GPT, HUMAN, with_pictures
from llava.eval.generation import Generation
from llava.outside import kind_of
from llava.schema import Wanted, an_object, list_of, number, whole, words, yes_or_no
from llava.serve.pictures import of_data_url
from llava.serve.question import Limits, Question, Refused, check_sizes
from llava.utils import UserError

MOST_STOPS, LONGEST_STOP = 4, 100
COLDEST = 1e-5
"""A temperature below it is 0: it draws the same, and scores that are divided by less are not finite."""
ACTING: dict[str, Wanted] = {
    "model": words(empty=False),
    "messages": list_of(an_object(), empty=False),
    "max_tokens": whole(1),
    "max_completion_tokens": whole(1),
    "temperature": number(0, 2),
    "top_p": number(above=0, most=1),
    "stop": words(empty=False) | list_of(words(empty=False)),
    "seed": whole(0, 2**63 - 1),
    "stream": yes_or_no,
    "stream_options": an_object({"include_usage": yes_or_no}),
}
UNMOVED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "store": (False,),
}
"""Fields that may be given with a value that asks for nothing."""
PASSED = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
ROLES = {"user": HUMAN, "assistant": GPT}
SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True)
class ChatRequest:
    """A question, and how its answer is wanted. ``model``: as it was asked for."""

    model: str
    question: Question
    stream: bool
    usage: bool


def read_request(body: Any, limits: Limits, generation: Generation, models: Sequence[str]) -> ChatRequest:
    """The request that a JSON value is.

    Args:
        generation: how answers are made where the request does not say. models: names that are answered to; the second,
            where there is one, is the base's.

    Raises:
        Refused: a field is unknown, missing, of another type, or asks for what cannot be had.
    """
    if not isinstance(body, dict):
        raise Refused(f"the body must be a JSON object, not {kind_of(body)}", None)
    given = {name: value for name, value in body.items() if value is not None}
    _check_fields(given)
    if given["model"] not in models:
        shown, known = given["model"][:80], ", ".join(models)
        raise Refused(f"there is no model {shown!r}; there is {known}", "model", "model_not_found")
    system, turns, pictures = _conversation(given["messages"], limits)
    most = given.get("max_completion_tokens", given.get("max_tokens", generation.max_new_tokens))
    temperature = float(given.get("temperature", generation.temperature))
    question = Question(
        turns=turns,
        pictures=pictures,
        generation=replace(
            generation,
            temperature=temperature if temperature >= COLDEST else 0.0,
            top_p=given.get("top_p", generation.top_p),
            max_new_tokens=most,
        ),
        stop=_stops(given.get("stop")),
        system=system,
        seed=given.get("seed"),
        base=given["model"] in models[1:],
    )
    usage = bool(given.get("stream_options", {}).get("include_usage"))
    return ChatRequest(given["model"], question, bool(given.get("stream")), usage)


def _check_fields(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in ACTING:
            _wanted(ACTING[name], value, name)
        elif name in UNMOVED:
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in UNMOVED[name]):
                raise Refused(f"{name} is not known here; leave it out", name, "unsupported_parameter")
        elif name not in PASSED:
            raise Refused(f"unknown field {name[:40]!r}; known: {', '.join(ACTING)}", name[:40], "unknown_parameter")
    for name in ("model", "messages"):
        if name not in given:
            raise Refused(f"{name} is missing", name, "missing_required_parameter")
    if "max_tokens" in given and given["max_tokens"] != given.get("max_completion_tokens", given["max_tokens"]):
        raise Refused("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")


def _wanted(wanted: Wanted, value: Any, name: str) -> None:
    try:
        wanted.check(value, name)
    except UserError as error:
        raise Refused(error, name, "invalid_type") from error


def _stops(given: Any) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else tuple(given or ())
    if len(stops) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in stops):
        raise Refused(f"stop may be {MOST_STOPS} texts of {LONGEST_STOP} characters at most", "stop")
    return stops


def _conversation(
    messages: Sequence[Mapping[str, Any]], limits: Limits
) -> tuple[str | None, tuple[tuple[str, str], ...], tuple[Image, ...]]:
    """System text, turns and pictures of a request's messages."""
    system: str | None = None
    turns: list[tuple[str, str]] = []
    pictures: list[Image] = []
    for place, message in enumerate(messages):
        where, role = f"messages[{place}]", message.get("role")
        for name, value in message.items():
            if name not in ("role", "content", "name") and value not in (None, [], {}):
                raise Refused(f"{where}.{name[:40]!r} is not known here; leave it out", f"{where}.{name[:40]}")
        if role in SYSTEM_ROLES:
            if place:
                raise Refused(f"{where} is a {role} message; one may stand, and only in the first place", where)
            system = "\n".join(text for _, text in _parts(message.get("content"), f"{where}.content", ("text",)))
        elif role == "assistant":
            parts = _parts(message.get("content"), f"{where}.content", ("text",))
            turns.append((GPT, "\n".join(text for _, text in parts)))
        elif role == "user":
            parts = _parts(message.get("content"), f"{where}.content", ("text", "image_url"))
            for kind, url in parts:
                if kind == "image_url":
                    try:
                        pictures.append(of_data_url(url, f"picture {len(pictures) + 1}", limits))
                        check_sizes([picture.size for picture in pictures], limits)
                    except Refused as error:
                        raise Refused(error, f"{where}.content") from error
            turns.append((HUMAN, _placed(parts, f"{where}.content")))
        else:
            known = ", ".join((*SYSTEM_ROLES[:1], *ROLES))
            raise Refused(f"{where}.role is {kind_of(role)}; known: {known}", f"{where}.role")
    return system, tuple(turns), tuple(pictures)


def _parts(content: Any, where: str, kinds: Sequence[str]) -> list[tuple[str, str]]:
    """``("text", text)`` and ``("image_url", url)`` of a message's content, in order."""
    if not isinstance(content, str | list | None):
        raise Refused(f"{where} is {kind_of(content)}; write a text, or a list of parts", where)
    found: list[tuple[str, str]] = []
    for place, part in enumerate([{"type": "text", "text": content}] if isinstance(content, str) else content or ()):
        here = where if isinstance(content, str) else f"{where}[{place}]"
        kind: Any = part.get("type") if isinstance(part, dict) else part
        if not isinstance(part, dict) or kind not in kinds:
            raise Refused(f"{here} is {kind_of(kind)}; parts of this message may be: {', '.join(kinds)}", here)
        value = part.get(kind)
        if kind == "image_url":
            value = value.get("url") if isinstance(value, dict) else value
        if value is None:
            raise Refused(f"{here}.{kind} is missing", here)
        _wanted(words(), value, here)
        found.append((kind, value))
    return found


def _placed(parts: Sequence[tuple[str, str]], where: str) -> str:
    """A user's text with one ``<image>`` for each picture: where the text has them, else where the parts stand."""
    texts = [text for kind, text in parts if kind == "text"]
    marked = "\n".join(DEFAULT_IMAGE_TOKEN if kind == "image_url" else text for kind, text in parts)
    try:
        alone = with_pictures("\n".join(texts), len(parts) - len(texts))
    except UserError as error:
        raise Refused(error, where) from error
    return alone if any(mark in text for text in texts for mark in (DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER)) else marked
