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
from dataclasses import replace
from typing import Any, Literal

import torch
from transformers import StoppingCriteria

from llava.data.labels import expanded_length
from llava.eval.answerer import Answerer
from llava.eval.generation import NO_ROUTE, Generation
from llava.mm_utils import KeywordsStoppingCriteria
from llava.serve.question import Answer, Busy, Limits, ModelFailed, Question, Refused, check
from llava.slots.encoders import TextEncoder
from llava.utils import UserError

LOGGER = logging.getLogger(__name__)
_STOPPED_BEFORE = Answer("", None, "stopped", 0, 0)


class Answering:
    """An answer that is on its way; one thread may read it, any may stop it."""

    def __init__(self, place: threading.BoundedSemaphore) -> None:
        self.stopped = threading.Event()
        self._coming: queue.SimpleQueue[str | Answer | Exception] = queue.SimpleQueue()
        self._place = place
        self._future: Future[None] | None = None
        self._answer: Answer | None = None

    def start(self, worker: ThreadPoolExecutor, work: Any) -> None:
        """Let ``work(self)`` be done by the worker when those before are through; then the place is free again."""
        self._future = worker.submit(self._do, work)
        self._future.add_done_callback(self._done)

    def _do(self, work: Any) -> None:
        try:
            self._coming.put(work(self))
        except UserError as error:
            self._coming.put(error)
        except BaseException:
            LOGGER.exception("a question could not be answered")
            self._coming.put(ModelFailed())
            raise

    def _done(self, future: Future[None]) -> None:
        if future.cancelled():
            self._coming.put(_STOPPED_BEFORE)
        self._place.release()

    def say(self, text: str) -> None:
        """Hand on the answer so far."""
        self._coming.put(text)

    def stop(self) -> None:
        """End the answer with what was said so far; one that waits ends at once. Later calls do nothing."""
        self.stopped.set()
        if self._future is not None:
            self._future.cancel()

    def next(self) -> str | None:
        """The answer so far, as soon as there is more of it; ``None`` when ``answer`` holds it whole.

        Raises:
            UserError: the question cannot be answered. ModelFailed: it could have been.
        """
        if self._answer is not None:
            return None
        found = self._coming.get()
        if isinstance(found, Exception):
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
            UserError: the question cannot be answered. ModelFailed: it could have been.
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
        self._closing = threading.Event()

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
        """Take no more questions, and stop those that are being answered or wait."""
        self._closing.set()
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
        ends: list[StoppingCriteria] = [_OnRequest(answering.stopped, self._closing)]
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
        stopped = answering.stopped.is_set() or self._closing.is_set()
        finish: Literal["stop", "length", "stopped"] = "stopped" if stopped else said.finish(generation)
        return Answer(text, reply.route, finish, length, len(said.tokens))

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

    def finish(self, generation: Generation) -> Literal["stop", "length"]:
        """How an answer that nobody stopped has ended."""
        whole = self.service.cleaned(self.tokens, ())
        full = len(self.tokens) >= generation.max_new_tokens and not self.service.ended(self.tokens)
        return "length" if full and _before(whole, self.stop) == whole else "stop"


class _OnRequest(StoppingCriteria):
    """Ends an answer when one of some events has come."""

    def __init__(self, *events: threading.Event) -> None:
        self.events = events

    def __call__(self, input_ids: torch.Tensor, scores: Any = None, **kwargs: Any) -> torch.Tensor:
        come = any(event.is_set() for event in self.events)
        return torch.full((len(input_ids),), come, dtype=torch.bool, device=input_ids.device)


def _before(text: str, stops: Sequence[str]) -> str:
    """The text in front of the first of ``stops``."""
    places = [place for place in map(text.find, stops) if place >= 0]
    return text[: min(places)].strip() if places else text


def _without_half_stop(text: str, stops: Sequence[str]) -> str:
    """The text without an end with which one of ``stops`` may begin."""
    longest = max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
    return text[: len(text) - longest].rstrip() if longest else text
