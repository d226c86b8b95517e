"""Bodies of chat completions: what they become, and what is refused with the field's name."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve.room import NAME, data_url

from llava.eval.generation import Generation
from llava.outside import parsed
from llava.serve.chat_request import ACTING, PASSED, UNMOVED, read_request
from llava.serve.question import Limits, Refused
from llava.utils import UserError

MODELS = (NAME, f"{NAME}-base")
ASKED = "is there a lesion"
NAMES = [*ACTING, *UNMOVED, *PASSED, "role", "content", "type", "text", "image_url", "url", "other"]


def text(words):
    return {"type": "text", "text": words}


def image(place, number=0, **more):
    return {"type": "image_url", "image_url": {"url": data_url(place.png(number)), **more}}


def body(*messages, **more):
    return {"model": NAME, "messages": list(messages) or [{"role": "user", "content": ASKED}], **more}


def read(value, **limits):
    return read_request(json.loads(json.dumps(value)), Limits(**limits), Generation(max_new_tokens=7), MODELS)


def test_a_conversation_with_pictures_in_two_turns(place):
    request = read(
        body(
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [image(place), text(ASKED)], "name": "ann"},
            {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": []},
            {"role": "user", "content": [text("and"), image(place, 1, detail="high"), image(place, 2), text("here?")]},
        )
    )
    question = request.question
    assert question.system == "Be brief." and [picture.size for picture in question.pictures] == [
        place.picture(number).size for number in (0, 1, 2)
    ]
    assert question.turns == (
        ("human", f"<image>\n{ASKED}"),
        ("gpt", "yes"),
        ("human", "and\n<image>\n<image>\nhere?"),
    )
    assert (request.model, request.stream, request.usage, question.base) == (NAME, False, False, False)


def test_a_text_may_place_its_pictures(place):
    content = [image(place), image(place, 1), text("left <image> and right <image-placeholder>: same?")]
    assert read(body({"role": "user", "content": content})).question.turns[0][1].startswith("left <image> and")


def test_what_acts():
    values = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 9, "seed": 4, "stop": "x", "stream": True}
    request = read(body(**values, stream_options={"include_usage": True}))
    question = request.question
    assert question.generation == Generation(temperature=0.5, top_p=0.9, max_new_tokens=9)
    assert (question.seed, question.stop, request.stream, request.usage) == (4, ("x",), True, True)
    assert read(body(max_completion_tokens=3, stop=["a", "b"])).question.stop == ("a", "b")
    assert read(body(max_completion_tokens=3, max_tokens=3)).question.generation.max_new_tokens == 3
    assert read(body() | {"model": MODELS[1]}).question.base
    assert read(body(seed=2**63 - 1)).question.seed == 2**63 - 1  # as clients draw them
    assert read(body(temperature=1e-45)).question.generation.temperature == 0  # no scores can be divided by it
    plain = read(body(n=1, presence_penalty=0.0, tools=[], user="ann", logprobs=False, temperature=None))
    assert plain.question.generation == Generation(max_new_tokens=7)


PICTURE = {"type": "image_url", "image_url": {"url": "https://127.0.0.1:9/a.png"}}


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"model": "gpt-4o"}, "model", "no model 'gpt-4o'"),
        ({"model": ["a"]}, "model", "a text in quotes"),
        ({"model": None}, "model", "missing"),
        ({"messages": None}, "messages", "missing"),
        ({"messages": []}, "messages", "a list"),
        ({"messages": "hello"}, "messages", "hello"),
        ({"messages": ["hello"]}, "messages", "entry 1"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "tool"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "nothing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "list of parts"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]", "text, image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages[0].content[0]", "file"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]", "missing"),
        ({"messages": [{"role": "user", "content": [text(5)]}]}, "messages[0].content[0]", "5"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "text"),
        ({"messages": [{"role": "user", "content": [PICTURE, text("a")]}]}, "messages[0].content", "fetches nothing"),
        ({"messages": [{"role": "user", "content": "see <image>"}]}, "messages[0].content", "1 times <image>"),
        ({"messages": [{"role": "assistant", "content": [PICTURE]}]}, "messages[0].content[0]", "may be: text"),
        ({"messages": [{"role": "user", "content": "a", "audio": {"id": 1}}]}, "messages[0].audio", "not known"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "a"}]},
            "messages[1]",
            "first place",
        ),
        ({"temperature": "hot"}, "temperature", "a number"),
        ({"temperature": 3}, "temperature", "2 at most"),
        ({"temperature": float("nan")}, "temperature", "a number"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"max_tokens": 0}, "max_tokens", "1 or more"),
        ({"max_tokens": 2.5}, "max_tokens", "an integer"),
        ({"max_tokens": 10**400}, "max_tokens", "an integer"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"n": 2}, "n", "leave it out"),
        ({"n": True}, "n", "leave it out"),
        ({"tools": [{"type": "function"}]}, "tools", "leave it out"),
        ({"response_format": {"type": "json_object"}}, "response_format", "leave it out"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stop": [1]}, "stop", "a text"),
        ({"stop": ["a"] * 5}, "stop", "4 texts"),
        ({"stop": "a" * 101}, "stop", "100 characters"),
        ({"logprob": True}, "logprob", "unknown field"),
    ],
)
def test_what_is_refused_says_where(change, param, said):
    with pytest.raises(Refused, match=said) as refused:
        read_request(body() | change, Limits(), Generation(), MODELS)
    assert refused.value.param == param and len(str(refused.value)) < 500


def test_too_many_pictures_are_refused_at_the_first_that_is_one_too_many(place):
    content = [*[image(place)] * 3, image(place) | {"image_url": {"url": "data:,"}}, text("a")]
    with pytest.raises(Refused, match="3 pictures; 2"):
        read(body({"role": "user", "content": content}), pictures=2)


@pytest.mark.parametrize("value", [[], "a", 5, None])
def test_a_body_that_is_no_object(value):
    with pytest.raises(Refused, match="JSON object"):
        read_request(value, Limits(), Generation(), MODELS)


def test_deep_nesting_is_refused_by_the_reader():
    with pytest.raises(UserError, match="nested"):
        parsed("[" * 100_000 + "]" * 100_000, "the body")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["user", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4), VALUES, VALUES)
def test_whatever_comes_is_read_or_refused(change, content, message):
    """With a field, a message's content or a message that is anything at all."""
    part = [{"type": "text", "text": ASKED}, content]
    for value in (body() | change, body({"role": "user", "content": part}), body(message), body({"role": message})):
        try:
            read_request(value, Limits(), Generation(), MODELS)
        except Refused as error:
            assert error.param is None or isinstance(error.param, str)
