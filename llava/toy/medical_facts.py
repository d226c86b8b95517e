"""What SLAKE's answers say of a picture, asked again in many other words.

SLAKE asks from a few dozen forms, so a model that learns these alone ties what it sees to their wording and doesn't
look when another word comes. Here a picture's answers are first read as facts (its modality, weighting, plane, region,
the organs on it, findings, what is normal, the side), and each fact can then be asked in several forms, to
agree to or to deny, as a choice, or open. What is denied is what other pictures of the same region have, so that region
and wording alone tell nothing.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

Pair = tuple[str, str]
T = TypeVar("T")

MODALITIES = {
    "ct": ("a ct", "a ct scan", "a ct image", "computed tomography"),
    "mri": ("an mri", "an mri scan", "an mr image", "magnetic resonance imaging"),
    "x-ray": ("an x-ray", "an x-ray image", "a radiograph", "a plain film"),
}
PLANES = {
    "axial": ("an axial image", "an axial section", "a transverse section", "in the axial plane"),
    "coronal": ("a coronal image", "a coronal section", "in the coronal plane"),
    "sagittal": ("a sagittal image", "a sagittal section", "in the sagittal plane"),
}
REGIONS = {
    "head": ("the head", "the brain", "the skull"),
    "neck": ("the neck",),
    "chest": ("the chest", "the thorax"),
    "abdomen": ("the abdomen",),
    "pelvis": ("the pelvis", "the pelvic cavity"),
}
_PLACES = (("brain", "head"), ("neck", "neck"), ("lung", "chest"), ("chest", "chest"), ("abdomen", "abdomen"))
FINDINGS = {
    "cardiomegaly": ("cardiomegaly", "an enlarged heart", "enlargement of the heart"),
    "atelectasis": ("atelectasis", "collapsed lung tissue"),
    "lung cancer": ("lung cancer", "a tumor in the lung", "a lung lesion"),
    "nodule": ("a nodule", "a pulmonary nodule", "a nodule in the lung"),
    "mass": ("a mass", "a pulmonary mass", "a mass in the lung"),
    "pneumonia": ("pneumonia", "a consolidation", "an infection of the lung"),
    "pneumothorax": ("a pneumothorax", "air in the pleural space"),
    "effusion": ("an effusion", "a pleural effusion", "fluid in the pleural space"),
    "infiltration": ("an infiltration", "infiltrates", "a pulmonary infiltrate"),
    "liver cancer": ("liver cancer", "a liver lesion", "a mass in the liver"),
    "kidney cancer": ("kidney cancer", "a mass in the kidney"),
    "brain edema": ("edema", "brain edema", "swelling of the brain"),
    "brain tumor": ("a brain tumor", "a mass in the brain", "a space occupying lesion"),
}
_SAME_KIND = ({"lung cancer", "nodule", "mass"}, {"pneumonia", "infiltration", "atelectasis", "effusion"})
"""Findings that a reader may name one for another: none is denied where another of its kind is."""

_THERE = (
    "is there {}?",
    "is there evidence of {}?",
    "are there signs of {}?",
    "does this patient have {}?",
    "do you see {}?",
    "can you see {} in this image?",
    "does the image show {}?",
    "is there any evidence of {} in this image?",
)
_NORMAL = ("is the {} normal?", "does the {} appear normal?", "does the {} look healthy?", "is the {} unremarkable?")
_ABNORMAL = ("is the {} abnormal?", "is there an abnormality of the {}?", "is there anything abnormal about the {}?")
_VISIBLE = (
    "is the {} visible?",
    "can the {} be seen?",
    "is the {} in the image?",
    "do you see the {}?",
    "is the {} shown?",
)

_ORGAN = re.compile(
    r"(?:does the picture contain|(?:is|are)(?:/is)? there) (?:an? |the )?([a-z ]+?)(?: in (?:this|the) .*)?\?"
)
_NO_ORGAN = re.compile(r"organ|tissue|abnormal|tumor|edema|\b(?:that|which|with)\b")
_STATE = re.compile(
    r"(?:is|does|do) (?:the |this )?([a-z]+)(?: look| appear)? (healthy|normal|abnormal)(?: appearing)?\?"
)
_SIDED = re.compile(r"(which (?:side of lung|lobe|hemisphere) is abnormal)|where is/are the abnormality")
_SIDE = re.compile(r"(left|right)( lung| lobe)?\b")


@dataclass
class Facts:
    """What is known of one picture; what no answer told is left out.

    Attributes:
        modality, region: keys of ``MODALITIES`` and ``REGIONS``. weighting: ``t1`` or ``t2``. plane: of ``PLANES``.
        findings: all of the picture, ``None`` where no answer lists them. organs: whether each can be seen.
        normal: whether each organ is (``image``: the whole). side: of the abnormal lung or hemisphere.
    """

    modality: str
    region: str
    weighting: str = ""
    plane: str = ""
    findings: set[str] | None = None
    organs: dict[str, bool] = field(default_factory=dict)
    normal: dict[str, bool] = field(default_factory=dict)
    side: str = ""


def facts_of(modality: str, place: str, pairs: Sequence[Pair]) -> Facts:
    """The facts in a picture's questions and answers.

    Args:
        modality: SLAKE's ``ct``, ``mri`` or ``xray``. place: its ``location``. pairs: answers in lower case.
    """
    place = place.lower()
    region = next((region for word, region in _PLACES if word in place), "pelvis" if "pelvi" in place else "")
    facts = Facts("x-ray" if modality == "xray" else modality, region)
    for question, answer in pairs:
        question = question.lower().strip()
        if answer in ("t1", "t2"):
            facts.weighting = answer
        elif "plane" in answer and answer.split()[0] in ("transverse", "coronal"):
            facts.plane = answer.split()[0].replace("transverse", "axial")
        elif question == "what diseases are included in the picture?":
            facts.findings = _named_findings(answer)
        elif (asked := _SIDED.match(question)) and (side := _SIDE.match(answer)) and (side[2] or asked[1]):
            facts.side = side[1] if region in ("chest", "head") else ""
        elif answer in ("yes", "no"):
            _take_up(facts, question, answer == "yes")
    return facts


def _take_up(facts: Facts, question: str, agreed: bool) -> None:
    """What a question that was agreed to (or denied) tells."""
    if state := _STATE.fullmatch(question):
        organ = "image" if state[1] in ("image", "picture") else state[1].removesuffix("s")
        facts.normal[organ] = agreed == (state[2] != "abnormal")
    elif (found := _ORGAN.fullmatch(question)) and not _NO_ORGAN.search(found[1]):
        facts.organs[re.sub("^(kidney|lung|eye|ear)s$", r"\1", found[1].replace("brian", "brain"))] = agreed


def _named_findings(answer: str) -> set[str]:
    """An answer's list in the words of ``FINDINGS``; SLAKE writes some of them in two ways, and some not rightly."""
    named = set()
    for words in answer.split(","):
        word = words.strip().removeprefix("pulmonary ").removeprefix("pleural ").replace("brian", "brain")
        word = "brain tumor" if word.endswith("enhancing tumor") else word
        named.update(difflib.get_close_matches(word, FINDINGS, 1, cutoff=0.75))
    return named


def common_findings(all_facts: Sequence[Facts]) -> dict[str, list[str]]:
    """Per region the findings of its pictures: what can be denied of another one."""
    found: dict[str, set[str]] = defaultdict(set)
    for facts in all_facts:
        found[facts.region] |= facts.findings or set()
    return {region: sorted(names) for region, names in found.items()}


def asked_again(facts: Facts, common: dict[str, list[str]], count: int, rng: np.random.Generator) -> list[Pair]:
    """``count`` questions on different facts, fewer where fewer are known; each in a form chosen at random."""
    said = [_about_modality(facts, rng), *_about_findings(facts, common, rng), *_about_states(facts, rng)]
    if facts.region:
        forms = ("is this an image of {}?", "is {} shown?", "does this show {}?")
        said.append(_one_of(REGIONS, facts.region, forms, rng))
    if facts.plane:
        said.append(_about_plane(facts.plane, rng))
    if facts.weighting:
        said.append(_about_weighting(facts.weighting, rng))
    for organ in _some(sorted(facts.organs), 2, rng):
        said.append((_any(_VISIBLE, rng).format(organ), _agreed(facts.organs[organ])))
    if facts.side:
        said.append(_about_side(facts.side, "lung" if facts.region == "chest" else "hemisphere", rng))
    return _some(list(dict(said).items()), count, rng)


def words_of(facts: Facts, common: dict[str, list[str]]) -> dict[str, bool]:
    """Words that are true of a picture, and words that are only of others; what is not known is left out.

    Args:
        common: what ``common_findings`` gives.
    """
    words = {modality: modality == facts.modality for modality in MODALITIES}
    for known, among in ((facts.region, REGIONS), (facts.plane, PLANES), (facts.weighting, ("t1", "t2"))):
        if known:
            words |= {word: word == known for word in among}
    words |= facts.organs
    words |= _found(facts, common)
    if facts.normal:
        words["abnormal"] = not all(facts.normal.values())
    if facts.side:
        words |= {side: side == facts.side for side in ("left", "right")}
    return words


def told(facts: Facts, common: dict[str, list[str]], count: int, rng: np.random.Generator) -> str:
    """``count`` of a picture's facts in a few words each, in random order, fewer where fewer are known.

    A caption for alignment: each of its words must be looked for, where a question's words say most of the answer.
    """
    known = [facts.modality, *filter(None, (facts.region, facts.plane, facts.weighting))]
    agreed = dict(facts.organs) | {f"{organ} normal": normal for organ, normal in facts.normal.items()}
    agreed |= _found(facts, common)
    if facts.side:
        agreed |= {f"{side} side abnormal": side == facts.side for side in ("left", "right")}
    known += [f"{thing}: {'yes' if true else 'no'}" for thing, true in agreed.items()]
    return ", ".join(_some(known, count, rng)) + "."


def _found(facts: Facts, common: dict[str, list[str]]) -> dict[str, bool]:
    """Which of its region's findings a picture has; empty where no answer lists them."""
    return {} if facts.findings is None else {name: name in facts.findings for name in common.get(facts.region, [])}


def _about_modality(facts: Facts, rng: np.random.Generator) -> Pair:
    chance = rng.random()
    if chance < 0.6:
        agree = ("is this {}?", "is this image {}?", "is {} shown?", "was this made by {}?")
        return _one_of(MODALITIES, facts.modality, agree, rng)
    if chance < 0.8:
        other = _any([name for name in MODALITIES if name != facts.modality], rng)
        first, second = _some([facts.modality, other], 2, rng)
        return f"is this {MODALITIES[first][0]} or {MODALITIES[second][0]}?", facts.modality
    forms = ("what kind of image is this?", "what imaging modality is this?", "which method of imaging was used?")
    return _any(forms, rng), facts.modality


def _about_plane(plane: str, rng: np.random.Generator) -> Pair:
    agree = rng.random() < 0.7
    which = _any(("which plane is this?", "in what plane is the image?", "what is the plane of section?"), rng)
    if agree:
        return _one_of(PLANES, plane, ("is this {}?", "is the image {}?"), rng)
    choice = [] if plane == "sagittal" else ["is this an axial or a coronal image?"]
    return _any([*choice, which], rng), plane


def _about_weighting(true: str, rng: np.random.Generator) -> Pair:
    weighting = _any(("t1", "t2"), rng)
    if rng.random() >= 0.7:
        return "is this a t1 or a t2 weighted image?", true
    forms = ("is this a {} weighted image?", "is this {} weighted?", "is the image {} weighted?")
    return _any(forms, rng).format(weighting), _agreed(weighting == true)


def _about_side(true: str, what: str, rng: np.random.Generator) -> Pair:
    side = _any(("left", "right"), rng)
    which = _any((f"which {what} is abnormal?", f"which side is abnormal, left or right {what}?"), rng)
    if rng.random() >= 0.7:
        return which, true
    forms = ("is the {0} {1} abnormal?", "is the lesion in the {0} {1}?", "is the abnormality in the {0} {1}?")
    return _any(forms, rng).format(side, what), _agreed(side == true)


def _agreed(true: bool) -> str:
    return "yes" if true else "no"


def _about_findings(facts: Facts, common: dict[str, list[str]], rng: np.random.Generator) -> list[Pair]:
    if facts.findings is None:
        return []
    alike = set().union(*(kind for kind in _SAME_KIND if kind & facts.findings))
    absent = [name for name in common.get(facts.region, []) if name not in facts.findings | alike]
    present = _some(sorted(facts.findings), 2, rng)
    said = [(name, "yes") for name in present] + [(name, "no") for name in _some(absent, max(len(present), 1), rng)]
    return [(_any(_THERE, rng).format(_any(FINDINGS[name], rng)), answer) for name, answer in said]


def _about_states(facts: Facts, rng: np.random.Generator) -> list[Pair]:
    said = []
    for organ, normal in sorted(facts.normal.items()):
        asked_normal = bool(rng.random() < 0.5)
        form = _any(_NORMAL if asked_normal else _ABNORMAL, rng)
        said.append((form.format(organ), _agreed(asked_normal == normal)))
    return said


def _one_of(named: Mapping[str, tuple[str, ...]], true: str, forms: Sequence[str], rng: np.random.Generator) -> Pair:
    """A question about one of ``named``, the true one in half of them, and whether it is."""
    name = true if rng.random() < 0.5 else _any([other for other in named if other != true], rng)
    return _any(forms, rng).format(_any(named[name], rng)), _agreed(name == true)


def _any(values: Sequence[T], rng: np.random.Generator) -> T:
    return values[int(rng.integers(len(values)))]


def _some(values: Sequence[T], count: int, rng: np.random.Generator) -> list[T]:
    """``count`` of the values, each once, in random order."""
    return [values[place] for place in rng.permutation(len(values))[:count]]
