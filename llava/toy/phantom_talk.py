"""What the tiny base talks about while it is trained: generic pictures, plainly and in made-up *dialects*.

A dialect gives the same findings other names ("Ward 3: What is the abnormality?" asks for its word), other
sides and another rule of urgency, all drawn at random. So the base learns to say every word of the glossary about
whatever it sees, and that a convention is something to be learned; the conventions of the phantom tasks are not among
the dialects, and no task picture is seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llava.toy.phantom_draw import LOOKS
from llava.toy.phantom_generic import GenericScene

DIALECTS = 12
_GLOSSARY_TEXT = """
stone; cyst; mass; abscess; nodule; pneumothorax; pneumonia; cavity; haemorrhage; infarct; tumour; metastasis; ct;
mri; x-ray; upright film; portable film; t1; t2; liver; spleen; kidney; upper lobe; lower lobe; frontal lobe;
occipital lobe; parietal lobe; temporal lobe; mild; marked; minor; extensive; grade 1; grade 2; grade 3; moderate;
severe; one; several; solitary; multiple; 1; 2; 3; paired; hyperdense; hypodense; opaque; lucent; hyperintense;
hypointense; isodense; left; right; bilateral; midline; effusion; fracture; oedema; aneurysm; hernia; polyp;
lymphoma; granuloma; fibrosis; emphysema; ascites; lung; heart; aorta; pancreas; bladder; colon; stomach; brain;
cerebellum; ventricle; pleura; diaphragm; rib; spine; axial; coronal; sagittal; supine; contrast; flair;
diffusion; ultrasound; angiogram; acute; chronic; benign; malignant; calcified; cystic; solid; round; irregular;
diffuse; focal; thickened; dilated; normal; enlarged; displaced; absent; present; anterior; posterior; medial;
lateral; apical; basal
"""
GLOSSARY: tuple[str, ...] = tuple(" ".join(word.split()) for word in _GLOSSARY_TEXT.split(";"))
"""Words that the base must be able to say."""

_LOOK_WORDS = dict(zip(LOOKS, ("bright", "dark", "ring", "target"), strict=True))
_COUNTS = ("none", "one", "two", "three", "four")
_NOUNS = ("abnormality", "finding", "lesion", "spot")
_ORGANS = ("Is the middle", "Is the organ", "Is the aorta", "Is the heart", "Are the ventricles", "Is the core")


def yes(value: bool) -> str:
    """``yes`` or ``no``."""
    return "yes" if value else "no"


@dataclass(frozen=True)
class Dialect:
    """The words and rules of one made-up ward."""

    name: str
    looks: dict[str, str]
    places: tuple[str, str, str, str]
    sides: tuple[str, str]
    counts: tuple[str, str]
    grades: tuple[str, str]
    densities: tuple[str, str]
    kinds: tuple[str, str]
    kind_of: str
    urgent_looks: tuple[str, ...]
    urgent_by: str

    def is_urgent(self, scene: GenericScene) -> bool:
        """The ward's own rule, from the size, the number or the look."""
        return {
            "large": scene.large,
            "count": scene.count > 1,
            "look": scene.look in self.urgent_looks,
            "right": scene.right,
        }[self.urgent_by]


def make_dialects(seed: int, count: int = DIALECTS) -> list[Dialect]:
    """``count`` dialects whose words are drawn from the glossary; every word is used about equally often."""
    rng = np.random.default_rng([seed, 77])
    stream: list[str] = []

    def words(number: int) -> tuple[str, ...]:
        while len(stream) < number:
            stream.extend(GLOSSARY[i] for i in rng.permutation(len(GLOSSARY)))
        return tuple(stream.pop(0) for _ in range(number))

    dialects = []
    for index in range(count):
        upper_left, upper_right, lower_left, lower_right = words(4)
        if index % 3 == 1:
            upper_right, lower_right = upper_left, lower_left  # places that do not depend on the side
        dialects.append(
            Dialect(
                name=f"Ward {index + 1}:",
                looks=dict(zip(LOOKS, words(4), strict=True)),
                places=(upper_left, upper_right, lower_left, lower_right),
                sides=("left", "right") if index % 2 else ("right", "left"),
                counts=words(2),  # type: ignore[arg-type]
                grades=words(2),  # type: ignore[arg-type]
                densities=words(2),  # type: ignore[arg-type]
                kinds=words(2),  # type: ignore[arg-type]
                kind_of=("bright_rim", "crossed", "bright_core")[index % 3],
                urgent_looks=tuple(LOOKS[i] for i in rng.permutation(len(LOOKS))[:2]),
                urgent_by=("large", "look", "count", "look", "right")[index % 5],
            )
        )
    return dialects


def ask_dialect(scene: GenericScene, dialect: Dialect, rng: np.random.Generator) -> tuple[str, str]:
    """A question in a dialect and its answer."""
    noun = _NOUNS[min(int(rng.integers(6)), 3) if rng.random() < 0.6 else 0]
    asked: list[tuple[str, str]] = [
        ("What kind of picture is this?", dialect.kinds[getattr(scene, dialect.kind_of)]),
    ]
    if scene.look is not None:
        asked += [
            (f"What is the {noun}?", dialect.looks[scene.look]),
            (f"What is the {noun}?", dialect.looks[scene.look]),
            (f"On which side is the {noun}?", dialect.sides[scene.right]),
            (f"Is the {noun} on the left?", yes(dialect.sides[scene.right] == "left")),
            (f"How many {_plural(noun)} are there?", dialect.counts[scene.count > 1]),
            (f"How severe is the {noun}?", dialect.grades[scene.large]),
            ("Does it need urgent treatment?", yes(dialect.is_urgent(scene))),
        ]
        if scene.lower is not None:
            place = dialect.places[2 * scene.lower + scene.right]
            asked += [(f"Where is the {noun} located?", place)] * 2
        if scene.look in ("bright", "dark"):
            asked.append((f"How does the {noun} appear?", dialect.densities[scene.look == "dark"]))
    question, answer = asked[int(rng.integers(len(asked)))]
    return f"{dialect.name} {question}", answer


def ask_plainly(scene: GenericScene, rng: np.random.Generator) -> tuple[str, str]:
    """A question in plain words and its answer: positions as the viewer sees them."""
    noun = _NOUNS[int(rng.integers(len(_NOUNS)))]
    asked = _about_body(scene, rng) + _about_presence(scene, noun)
    if scene.look is not None:
        asked += _about_spots(scene, noun, rng) * 2
    return asked[int(rng.integers(len(asked)))]


def scene_words(scene: GenericScene) -> dict[str, bool]:
    """Words that are true of a generic picture, and those that are not."""
    words = {"abnormal": scene.look is not None}
    words |= {count: place == scene.count for place, count in enumerate(_COUNTS)}
    words |= {word: look == scene.look for look, word in _LOOK_WORDS.items()}
    if scene.look is not None:
        words |= {"large": scene.large, "small": not scene.large, "right": scene.right, "left": not scene.right}
    if scene.lower is not None:
        words |= {"lower": scene.lower, "upper": not scene.lower}
    return words


def _about_body(scene: GenericScene, rng: np.random.Generator) -> list[tuple[str, str]]:
    organ = _ORGANS[int(rng.integers(len(_ORGANS)))]
    return [
        (f"{organ} enlarged?", yes(scene.wide_core)),
        (f"{organ} enlarged?", yes(scene.wide_core)),
        ("Is the rim bright or dark?", "bright" if scene.bright_rim else "dark"),
        ("Is the middle bright or dark?", "bright" if scene.bright_core else "dark"),
        ("Is the picture crossed by lines?", yes(scene.crossed)),
    ]


def _about_presence(scene: GenericScene, noun: str) -> list[tuple[str, str]]:
    return [
        ("Is the picture normal?", yes(scene.look is None)),
        (f"Is there any {noun}?", yes(scene.look is not None)),
        (f"How many {_plural(noun)} are there?", _COUNTS[scene.count]),
        (f"Is there more than one {noun}?", yes(scene.count > 1)),
    ]


def _about_spots(scene: GenericScene, noun: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    look = str(scene.look)
    guess = LOOKS[int(rng.integers(len(LOOKS)))] if rng.random() < 0.5 else look
    side = "right" if scene.right else "left"
    size = "large" if scene.large else "small"
    asked = [
        (f"What is the {noun}?", _LOOK_WORDS[look]),
        (f"Is the {noun} {_LOOK_WORDS[guess]}?", yes(guess == look)),
        (f"On which side is the {noun}?", side),
        (f"Is the {noun} on the left?", yes(not scene.right)),
        (f"How severe is the {noun}?", size),
        (f"Is the {noun} large?", yes(scene.large)),
    ]
    if look in ("bright", "dark"):
        asked.append((f"How does the {noun} appear?", _LOOK_WORDS[look]))
    if scene.lower is not None:
        height = "lower" if scene.lower else "upper"
        asked += [(f"Where is the {noun} located?", f"{height} {side}"), (f"Is the {noun} low?", yes(scene.lower))]
    else:
        asked.append(
            ("Describe the picture.", f"{_COUNTS[scene.count]} {size} {_LOOK_WORDS[look]} spots on the {side}")
        )
    return asked


def ask_word(rng: np.random.Generator) -> tuple[str, str]:
    """A word of the glossary to be repeated."""
    word = GLOSSARY[int(rng.integers(len(GLOSSARY)))]
    return f"Say {word}.", word


def _plural(noun: str) -> str:
    return f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"


def talk(scene: GenericScene, dialects: list[Dialect], count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """``count`` questions with answers about one picture: half plain, most others in dialects, some words to repeat."""
    pairs = []
    for draw in rng.random(count):
        if draw < 0.45:
            pairs.append(ask_plainly(scene, rng))
        elif draw < 0.95:
            pairs.append(ask_dialect(scene, dialects[int(rng.integers(len(dialects)))], rng))
        else:
            pairs.append(ask_word(rng))
    return pairs
