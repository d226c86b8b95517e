"""Questions and answers about phantom scenes. Most question texts are shared by all domains; the answers are not.

Each question states which scenes it can be asked about, and its answer follows from the scene and the domain's words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llava.toy.phantom_domains import VOCABULARY, Domain, Scene


@dataclass(frozen=True)
class Question:
    """One question of the phantom.

    Args:
        name: short name, the same in every domain (``question_type`` of the rows).
        text: the question, with ``{organ}`` where the domain puts its own phrase.
        closed: whether it is a yes/no question.
        fits: which scenes it can be asked about.
        answer: the answer from the scene and the domain's words.
    """

    name: str
    text: str
    closed: bool
    fits: Callable[[Scene], bool]
    answer: Callable[[Scene, Domain], str]

    def text_for(self, domain: str) -> str:
        """The question as asked in a domain."""
        return self.text.format(organ=VOCABULARY[domain].organ)

    def answer_for(self, scene: Scene) -> str:
        """The reference answer."""
        return self.answer(scene, VOCABULARY[scene.domain])


def _always(scene: Scene) -> bool:
    return True


def _abnormal(scene: Scene) -> bool:
    return scene.look is not None


def _single(scene: Scene) -> bool:
    return scene.count == 1


def _yes(value: bool) -> str:
    return "yes" if value else "no"


QUESTIONS: tuple[Question, ...] = (
    Question("modality", "What kind of picture is this?", False, _always, lambda s, d: d.modalities[s.modality]),
    Question("normal", "Is the picture normal?", True, _always, lambda s, d: _yes(s.look is None)),
    Question("organ", "{organ} enlarged?", True, _always, lambda s, d: _yes(s.enlarged)),
    Question("look", "What is the abnormality?", False, _abnormal, lambda s, d: d.looks[str(s.look)]),
    Question("side", "On which side is the abnormality?", False, _abnormal, lambda s, d: d.sides[s.right]),
    Question("left", "Is the abnormality on the left?", True, _abnormal, lambda s, d: _yes(d.sides[s.right] == "left")),
    Question("place", "Where is the abnormality located?", False, _single, lambda s, d: d.places[(s.lower, s.right)]),
    Question("count", "How many abnormalities are there?", False, _abnormal, lambda s, d: d.counts[s.count > 1]),
    Question("several", "Is there more than one abnormality?", True, _abnormal, lambda s, d: _yes(s.count > 1)),
    Question("grade", "How severe is the abnormality?", False, _abnormal, lambda s, d: d.grades[s.large]),
    Question("urgent", "Does it need urgent treatment?", True, _abnormal, lambda s, d: _yes(d.urgent(s))),
    Question(
        "density",
        "How does the abnormality appear?",
        False,
        lambda s: s.look in ("bright", "dark"),
        lambda s, d: d.densities[s.look == "dark"],
    ),
)
