"""What users of the demo have shown and said: in memory alone, for as long as they talk."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.labels import Turn
from llava.data.rows import GPT, HUMAN, with_pictures
from llava.eval.generation import Generation
from llava.serve.pictures import opened, thumbnail
from llava.serve.question import Answer, Limits, Question, Refused, check_sizes
from llava.serve.service import Answering

MOST_CONVERSATIONS = 64
"""Beyond it the one that was used longest ago is forgotten."""


@dataclass(frozen=True)
class Shown:
    """A picture as its file was, and as a page shows it."""

    name: str
    data: bytes
    thumbnail: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Said:
    """A question as it was typed, how many pictures came with it, and the answer so far, or ``None``."""

    question: str
    pictures: int
    text: str = ""
    answer: Answer | None = None
    base: Answer | None = None
    reference: str | None = None


@dataclass
class Conversation:
    """One user's pictures and turns.

    Attributes:
        answering: the answer that is on its way. reference: what the test set answers to ``expected``.
    """

    pictures: list[Shown] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    answering: Answering | None = None
    busy: threading.Lock = field(default_factory=threading.Lock)
    expected: str = ""
    reference: str | None = None

    def add(self, data: bytes, name: str, limits: Limits) -> None:
        """Show one picture more, from the next question on.

        Raises:
            Refused: it cannot be opened, or is too much beside the others.
        """
        if sum(len(shown.data) for shown in self.pictures) + len(data) > limits.picture_bytes:
            raise Refused(f"{name}: the pictures are larger than {limits.picture_bytes >> 20} MB together")
        picture = opened(data, name, limits)
        check_sizes([*(shown.size for shown in self.pictures), picture.size], limits)
        self.pictures.append(Shown(name, data, thumbnail(picture), picture.size))

    def question(self, text: str, limits: Limits, generation: Generation) -> Question:
        """What the next question asks, with all that was said before.

        Raises:
            UserError: there is no picture, or the text does not fit them.
        """
        if not self.pictures:
            raise Refused("there is no picture yet; add one first")
        shown = list(self.pictures)  # more may come meanwhile
        fresh = len(shown) - sum(said.pictures for said in self.said)
        pictures = tuple(opened(one.data, one.name, limits) for one in shown)
        return Question((*self.turns, (HUMAN, with_pictures(text, fresh))), pictures, generation)

    def begin(self, question: Question, text: str) -> None:
        """The question is asked."""
        fresh = question.turns[-1][1].count(DEFAULT_IMAGE_TOKEN)
        reference = self.reference if text == self.expected else None
        self.said.append(Said(text, fresh, reference=reference))

    def more(self, text: str) -> None:
        """The answer so far."""
        self.said[-1] = replace(self.said[-1], text=text)

    def end(self, question: Question, answer: Answer) -> None:
        """The answer is there; one that was stopped before its first word leaves no turn."""
        self.said[-1] = replace(self.said[-1], text=answer.text, answer=answer)
        if answer.finish == "stopped" and not answer.text:
            self.said.pop()
        else:
            self.turns = [*question.turns, (GPT, answer.text)]

    def compare(self, answer: Answer) -> None:
        """What the base says to the same."""
        self.said[-1] = replace(self.said[-1], base=answer)


class Conversations:
    """Everybody's, by a key that each page has."""

    def __init__(self, most: int = MOST_CONVERSATIONS) -> None:
        self.most = most
        self._kept: OrderedDict[str, Conversation] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, key: str) -> Conversation:
        """The conversation of a page, a new one where it has none."""
        with self._lock:
            found = self._kept.setdefault(key, Conversation())
            self._kept.move_to_end(key)
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)
            return found

    def forget(self, key: str) -> None:
        """Forget a page's conversation, and stop its answer."""
        with self._lock:
            found = self._kept.pop(key, None)
        if found is not None and found.answering is not None:
            found.answering.stop()

    def holds(self, key: str, talk: Conversation) -> bool:
        """Whether a page still has this conversation."""
        with self._lock:
            return self._kept.get(key) is talk

    def __len__(self) -> int:
        return len(self._kept)
