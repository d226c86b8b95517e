"""Questions of several users to one model: answered one after the other, streamed, and stopped on request.

    service = Service(answerer, "llava-vqa-rad_abd")
    answering = service.ask(Question((("human", "<image>\\nis it normal?"),), (picture,)))
    for text in answering.texts():      # the answer so far, each longer than the one before
        ...
    answering.answer.route              # of this question, whoever asked beside it

It knows nothing of pages and protocols: the demo and the API ask it, and both get what ``llava.eval.run_llava`` says to
the same pictures and question. One thread alone touches the model, in the order in which questions came; so no answer
depends on who else asks, and a question that waits costs its pictures' memory only.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from PIL.Image import Image
from transformers import StoppingCriteria

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.conversation import plain_question
from llava.data.labels import Turn, expanded_length
from llava.data.rows import HUMAN, wrong_count
from llava.eval.answerer import Answerer
from llava.eval.generation import NO_ROUTE, Generation
from llava.mm_utils import KeywordsStoppingCriteria
from llava.slots.encoders import TextEncoder
from llava.utils import UserError

LOGGER = logging.getLogger(__name__)


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


_STOPPED_BEFORE = Answer("", None, "stopped", 0, 0)


class Answering:
    """An answer that is on its way; one thread may read it, any may stop it."""

    def __init__(self, place: threading.BoundedSemaphore) -> None:
        self.stopped = threading.Event()
        self._coming: queue.SimpleQueue[str | Answer | BaseException] = queue.SimpleQueue()
        self._place = place
        self._future: Future[None] | None = None
        self._answer: Answer | None = None

    def start(self, worker: ThreadPoolExecutor, work: Any) -> None:
        """Let ``work(self)`` be done by the worker when those before are through; then the place is free again."""
        self._future = worker.submit(self._do, work)
        self._future.add_done_callback(lambda _: self._place.release())

    def _do(self, work: Any) -> None:
        try:
            self._coming.put(work(self))
        except BaseException as error:
            if not isinstance(error, UserError):
                LOGGER.exception("a question could not be answered")
            self._coming.put(error)

    def say(self, text: str) -> None:
        """Hand on the answer so far."""
        self._coming.put(text)

    def stop(self) -> None:
        """End the answer with what was said so far; one that waits ends at once. Later calls do nothing."""
        self.stopped.set()
        if self._future is not None and self._future.cancel():
            self._coming.put(_STOPPED_BEFORE)

    def next(self) -> str | None:
        """The answer so far, as soon as there is more of it; ``None`` when ``answer`` holds it whole.

        Raises:
            UserError: the question cannot be answered.
        """
        if self._answer is not None:
            return None
        found = self._coming.get()
        if isinstance(found, BaseException):
            raise found
        if isinstance(found, Answer):
            self._answer = found
            return None
        return found

    def texts(self) -> Iterator[str]:
        """The answer so far, again and again until it is whole; the last is ``answer.text`` unless that is empty."""
        try:
            while (text := self.next()) is not None:
                yield text
            if self.answer.text:
                yield self.answer.text
        finally:
            self.stop()

    @property
    def answer(self) -> Answer:
        """The whole answer, waited for.

        Raises:
            UserError: the question cannot be answered.
        """
        while self._answer is None:
            self.next()
        return self._answer


class Service:
    """A model that answers anybody's questions.

    Args:
        answerer: has a model in use; nobody else may ask it from now on.
        name: of the model. generation: how answers are made where a question does not say.
    """

    def __init__(
        self, answerer: Answerer, name: str, generation: Generation | None = None, limits: Limits | None = None
    ) -> None:
        self.name, self.limits = name, limits or Limits()
        self.generation = generation or Generation()
        self._answerer = answerer
        self._worker = ThreadPoolExecutor(1, "model")
        self._places = threading.BoundedSemaphore(self.limits.at_once)

    @property
    def slot_tasks(self) -> dict[int, str]:
        """The task that each slot belongs to, by the number it has in routes."""
        pool = getattr(self._answerer.model.retriever, "pool", None)
        return {} if pool is None else {slot: task.name for task in pool.tasks for slot in range(task.start, task.stop)}

    @property
    def has_base(self) -> bool:
        """Whether a base lies under the model, whose answer can be had for comparison."""
        return self._answerer.model.retriever is not None

    def ask(self, question: Question) -> Answering:
        """Begin to answer; returns at once.

        Raises:
            Refused: a limit is passed, or text and pictures do not fit. Busy: too many wait already.
        """
        check(question, self.limits)
        if question.base and not self.has_base:
            raise Refused("this model has no base under it", "model")
        if not self._places.acquire(blocking=False):
            raise Busy(f"{self.limits.at_once} questions are being answered already; ask again in a moment")
        answering = Answering(self._places)
        answering.start(self._worker, lambda on_its_way: self._answer(question, on_its_way))
        return answering

    def close(self) -> None:
        """Take no more questions; the one that is being answered is waited for."""
        self._worker.shutdown(cancel_futures=True)

    def _answer(self, question: Question, answering: Answering) -> Answer:
        """Runs in the one thread that touches the model."""
        answerer = self._answerer
        encoder = answerer.encoder()
        ids, _ = encoder.conversation(question.turns, len(question.pictures), question.system)
        length = expanded_length(ids, encoder.image_tokens)
        room = (getattr(answerer.model.config, "max_position_embeddings", None) or length + 2**20) - length
        if room < 1:
            raise Refused(
                f"the conversation takes {length} positions with its pictures, which leaves the model no room to "
                "answer; shorten it",
                code="context_length_exceeded",
            )
        generation = replace(question.generation, max_new_tokens=min(question.generation.max_new_tokens, room))
        said = _Said(self, question.stop, None if generation.refuse_unknown else answering)
        ends: list[StoppingCriteria] = [_OnRequest(answering)]
        if question.stop:
            ends.append(KeywordsStoppingCriteria(list(question.stop), answerer.tokenizer, torch.tensor([ids])))
        if question.seed is not None and generation.temperature > 0:
            torch.manual_seed(question.seed)
        options: dict[str, Any] = {"streamer": said, "stopping_criteria": ends}
        if question.base:
            options["route"] = NO_ROUTE
        try:
            reply = answerer.ask(question.turns, question.pictures, generation, question.system, **options)
        finally:
            self._forget()
        text = _before(reply.text, question.stop)
        return Answer(text, reply.route, said.finish(generation, answering), length, len(said.tokens))

    def _forget(self) -> None:
        """Let the encoder of questions keep none: they are their askers' alone."""
        encoder = getattr(self._answerer.model.retriever, "encode_text", None)
        if isinstance(encoder, TextEncoder):
            encoder.forget()

    def cleaned(self, tokens: Sequence[int], stop: Sequence[str]) -> str:
        """The answer that some tokens are, as it is handed out."""
        text = self._answerer.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return _before(self._answerer.clean(text), stop)

    def ended(self, tokens: Sequence[int]) -> bool:
        """Whether the last token is one that ends an answer."""
        ends = self._answerer.model.generation_config.eos_token_id
        return bool(tokens) and tokens[-1] in (ends if isinstance(ends, list) else [ends])


class _Said:
    """What the model has said so far: a streamer of transformers', told the prompt first and then token by token."""

    def __init__(self, service: Service, stop: tuple[str, ...], answering: Answering | None) -> None:
        self.service, self.stop, self.answering = service, stop, answering
        self.tokens: list[int] = []
        self._prompted = False
        self._before = self._told = ""

    def put(self, value: torch.Tensor) -> None:
        """Hand on what the next token cannot change any more: a token may be half a character, or end a stop text."""
        if not self._prompted:
            self._prompted = True
            return
        self.tokens += value.flatten().tolist()
        if self.answering is None:
            return
        now = self.service.cleaned(self.tokens, self.stop)
        sure = _without_half_stop(os.path.commonprefix([self._before, now]).rstrip().rstrip("\ufffd"), self.stop)
        self._before = now
        if len(sure) > len(self._told) and sure.startswith(self._told):
            self._told = sure
            self.answering.say(sure)

    def end(self) -> None:
        """The last token is there; the answer itself follows."""

    def finish(self, generation: Generation, answering: Answering) -> Literal["stop", "length", "stopped"]:
        """How the answer ended."""
        if answering.stopped.is_set():
            return "stopped"
        whole = self.service.cleaned(self.tokens, ())
        full = len(self.tokens) >= generation.max_new_tokens and not self.service.ended(self.tokens)
        return "length" if full and _before(whole, self.stop) == whole else "stop"


class _OnRequest(StoppingCriteria):
    """Ends an answer that was stopped."""

    def __init__(self, answering: Answering) -> None:
        self.answering = answering

    def __call__(self, input_ids: torch.Tensor, scores: Any = None, **kwargs: Any) -> torch.Tensor:
        stopped = self.answering.stopped.is_set()
        return torch.full((len(input_ids),), stopped, dtype=torch.bool, device=input_ids.device)


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


def placed(text: str, count: int) -> str:
    """A question with one ``<image>`` for each of ``count`` pictures, in front unless it places them itself.

    Raises:
        Refused: it names another number of pictures.
    """
    text = text.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)
    named = text.count(DEFAULT_IMAGE_TOKEN)
    if named and named != count:
        raise Refused(f"the question holds {wrong_count(named, count)}")
    return text if named else f"{DEFAULT_IMAGE_TOKEN}\n" * count + text


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


def _before(text: str, stops: Sequence[str]) -> str:
    """The text in front of the first of ``stops``."""
    places = [place for place in map(text.find, stops) if place >= 0]
    return text[: min(places)].strip() if places else text


def _without_half_stop(text: str, stops: Sequence[str]) -> str:
    """The text without an end with which one of ``stops`` may begin."""
    longest = max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
    return text[: len(text) - longest].rstrip() if longest else text
