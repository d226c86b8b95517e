"""The demo behind its page: what each of its buttons does, as changes of what the page shows.

A ``View`` holds the parts that change; ``None`` leaves one as it is. Nothing here knows how a page is made.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llava.outside import kind_of
from llava.serve.conversations import Conversation, Conversations
from llava.serve.examples import Example
from llava.serve.page import notice, pictures_part, route_part, talk_part
from llava.serve.question import Limits, ModelFailed, Refused
from llava.serve.service import Service
from llava.utils import UserError, server_error_msg

WAITING = "Waiting for the answer …"


@dataclass(frozen=True)
class View:
    """Parts of the page as HTML, the question's box, and whether an answer is on its way."""

    pictures: str | None = None
    talk: str | None = None
    route: str | None = None
    notice: str | None = None
    question: str | None = None
    busy: bool | None = None


class Desk:
    """Everybody's conversations with one service."""

    def __init__(self, service: Service, examples: Sequence[Example] = ()) -> None:
        self.service, self.examples = service, list(examples)
        self.talks = Conversations()

    def whole(self, talk: Conversation) -> View:
        """All of a conversation, with nothing said to the user."""
        return View(
            pictures_part(talk.pictures),
            talk_part(talk.said),
            route_part(talk.said, self.service.slot_tasks),
            notice(""),
        )

    def show(self, key: str, files: Any) -> View:
        """Take pictures that a page sends: ``{"name": ..., "data": base64}`` each."""
        talk, wrong = self.talks.of(key), []
        for file in files if isinstance(files, list) else []:
            try:
                name, data = _file(file, self.service.limits)
                talk.add(data, name, self.service.limits)
            except UserError as error:
                wrong.append(str(error))
        said = notice(" · ".join(wrong), wrong=True)
        return View(pictures=pictures_part(talk.pictures), notice=said)

    def example(self, key: str, number: Any) -> View:
        """Begin anew with an example of the test set."""
        if type(number) is not int or not 0 <= number < len(self.examples):
            return View(notice=notice(f"there is no example {kind_of(number)}", wrong=True))
        self.talks.forget(key)
        talk, chosen = self.talks.of(key), self.examples[number]
        try:
            for name, data in chosen.pictures:
                talk.add(data, name, self.service.limits)
        except UserError as error:
            return replace(self.whole(talk), notice=notice(str(error), wrong=True))
        talk.expected, talk.reference = chosen.question, chosen.reference
        return replace(self.whole(talk), question=chosen.question, busy=False)

    def start_over(self, key: str) -> View:
        """Forget the pictures and what was said."""
        self.talks.forget(key)
        return replace(self.whole(self.talks.of(key)), question="", busy=False)

    def stop(self, key: str) -> None:
        """End the answer that is on its way."""
        answering = self.talks.of(key).answering
        if answering is not None:
            answering.stop()

    def forget(self, key: str) -> None:
        """The page was closed."""
        self.talks.forget(key)

    def ask(self, key: str, text: str, with_base: bool = False) -> Iterator[View]:
        """Ask, and show the answer as it comes; then, where wanted, what the base says."""
        talk = self.talks.of(key)
        if not talk.busy.acquire(blocking=False):
            yield View(notice=notice("the answer before is still on its way; stop it, or wait", wrong=True))
            return
        try:
            for view in self._ask(talk, text.strip(), with_base):
                if not self.talks.holds(key, talk):  # it was started over, or its page is closed
                    return
                yield view
        except UserError as error:
            yield View(talk=talk_part(talk.said), notice=notice(str(error), wrong=True), question=text, busy=False)
        except ModelFailed:
            said = notice(server_error_msg.replace("**", ""), wrong=True)
            yield View(talk=talk_part(talk.said), notice=said, question=text, busy=False)
        finally:
            if talk.answering is not None:
                talk.answering.stop()
            talk.answering = None
            talk.busy.release()

    def _ask(self, talk: Conversation, text: str, with_base: bool) -> Iterator[View]:
        question = talk.question(text, self.service.limits, self.service.generation)
        talk.answering = self.service.ask(question)
        talk.begin(question, text)
        try:
            yield View(talk=talk_part(talk.said), notice=notice(WAITING), question="", busy=True)
            for so_far in talk.answering.texts():
                talk.more(so_far)
                yield View(talk=talk_part(talk.said))
            answer = talk.answering.answer
        except BaseException:
            talk.said.pop()
            raise
        talk.end(question, answer)
        compared = with_base and self.service.has_base and answer.finish != "stopped"
        done = replace(self.whole(talk), pictures=None)
        if not compared:
            yield replace(done, question=text if answer.finish == "stopped" and not answer.text else None, busy=False)
            return
        yield replace(done, notice=notice("Waiting for the base's answer …"))
        talk.answering = self.service.ask(replace(question, base=True))
        base = talk.answering.answer
        if base.finish != "stopped":
            talk.compare(base)
        yield replace(self.whole(talk), pictures=None, busy=False)


def _file(file: Any, limits: Limits) -> tuple[str, bytes]:
    """Name and bytes of a file as a page sends it."""
    name, text = (file.get("name"), file.get("data")) if isinstance(file, dict) else (None, None)
    if isinstance(name, str) and text is None:
        raise Refused(f"{name[:200]}: the pictures are larger than {limits.picture_bytes >> 20} MB together")
    if not isinstance(name, str) or not isinstance(text, str):
        raise Refused(f"a picture is sent as {kind_of(file)}; send its name and its bytes in base64")
    try:
        return name[:200], base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(f"{name[:200]} came as broken base64; add it again") from error
