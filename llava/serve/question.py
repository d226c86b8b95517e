"""What may be asked of a service, and what comes back: questions, answers, limits, and how they are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL.Image import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import plain_question
from llava.data.labels import Turn
from llava.data.rows import HUMAN, wrong_count
from llava.eval.generation import Generation
from llava.utils import UserError


class Refused(UserError):
    """A question that is not answered.

    Args:
        param: which part of it is wrong: ``messages``, ``model``, … code: a word for programs.
    """

    def __init__(self, message: object, param: str | None = "messages", code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class Busy(UserError):
    """As many questions wait as may."""


class ModelFailed(Exception):
    """A question could not be answered for no fault of its own; what happened is in the log alone."""

    def __init__(self) -> None:
        super().__init__("the model failed; the server's log says why")


@dataclass(frozen=True)
class Limits:
    """What one question may be, and how many there may be.

    Args:
        pictures: of a conversation. picture_bytes: of their files together. pixels: of the pictures together.
        characters: of all turns together. new_tokens: of an answer. at_once: questions that are answered or wait.
    """

    pictures: int = 8
    picture_bytes: int = 32 * 2**20
    pixels: int = 32_000_000
    characters: int = 20_000
    new_tokens: int = 1024
    at_once: int = 8


@dataclass(frozen=True)
class Question:
    """What is asked: the turns of a conversation, a human's last, about pictures (RGB).

    Args:
        turns: ``("human", text)``, ``("gpt", text)``, …; human turns hold one ``<image>`` for each picture, or none do.
        stop: texts that end the answer and are no part of it.
        system: replaces the template's system text.
        seed: for a temperature above 0; ``None`` draws anew each time.
        base: the model under the stage answers.
    """

    turns: tuple[Turn, ...]
    pictures: tuple[Image, ...] = ()
    generation: Generation = field(default_factory=Generation)
    stop: tuple[str, ...] = ()
    system: str | None = None
    seed: int | None = None
    base: bool = False


@dataclass(frozen=True)
class Answer:
    """An answer as ``Answerer.ask`` gives it, and how it ended.

    Attributes:
        route: ``Route.describe``; ``None`` where the base answered.
        finish: ``stop`` (it was complete), ``length`` (no more tokens were allowed) or ``stopped`` (on request).
        prompt_tokens: positions of the prompt, those of the pictures included. new_tokens: of the answer.
    """

    text: str
    route: dict[str, Any] | None
    finish: Literal["stop", "length", "stopped"]
    prompt_tokens: int
    new_tokens: int


def check(question: Question, limits: Limits) -> None:
    """Refuse a question that passes a limit, or whose text and pictures do not fit.

    Raises:
        Refused: what is wrong with it.
    """
    said = [text for who, text in question.turns if who == HUMAN]
    if not question.turns or question.turns[-1][0] != HUMAN:
        raise Refused("the last turn must be a question")
    if not plain_question(question.turns[-1][1]):
        raise Refused("the last question is empty; write one")
    characters = sum(len(text) for _, text in question.turns) + len(question.system or "")
    if characters > limits.characters:
        raise Refused(f"the conversation has {characters:,} characters; {limits.characters:,} may be asked")
    if DEFAULT_IMAGE_TOKEN in (question.system or ""):
        raise Refused(f"the system text names {DEFAULT_IMAGE_TOKEN}; put pictures into a user's turn")
    count, named = len(question.pictures), sum(text.count(DEFAULT_IMAGE_TOKEN) for text in said)
    if named not in (0, count):
        raise Refused(f"the question holds {wrong_count(named, count)}")
    check_sizes([picture.size for picture in question.pictures], limits)
    if question.generation.max_new_tokens > limits.new_tokens:
        raise Refused(f"an answer may have {limits.new_tokens} tokens, not more", "max_tokens")


def check_sizes(sizes: Sequence[tuple[int, int]], limits: Limits) -> None:
    """Refuse more pictures, or more pixels in all of them, than may be shown; ``sizes`` are widths and heights.

    Raises:
        Refused: which limit is passed.
    """
    if len(sizes) > limits.pictures:
        raise Refused(f"the conversation has {len(sizes)} pictures; {limits.pictures} may be shown")
    pixels = sum(width * height for width, height in sizes)
    if pixels > limits.pixels:
        raise Refused(f"the pictures have {pixels:,} pixels together; {limits.pixels:,} may be shown (shrink them)")
