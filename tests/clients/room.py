"""The room's models, rows and expected answers: what every client program is held to.

A ``Side`` is a tiny base or a stage of three tasks over it, of one family. Programs load it as they load any LLaVA and
ask it in their own way; what they must get is what ``llava.eval.model_vqa_loader`` (or its engine, for what a question
file cannot say) answers to the same questions. The stage's answers differ from the base's on every row, and the rows
take different routes, so a program that gets the base's answers from a stage, or one row's route for another, is found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from tiny_llava import write_base
from tiny_world import TASKS, World, fit, merge, write_sequence

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import conv_templates
from llava.data.answers import read_answers
from llava.data.jsonl import write_jsonl
from llava.eval import model_vqa_loader
from llava.eval.answerer import Answerer
from llava.eval.generation import Generation, Loading
from llava.mm_utils import get_model_name_from_path, tokenizer_image_token
from llava.model.builder import load_pretrained_model

NEW = 6
"""Tokens of an answer."""
STAGE_TASKS = TASKS[:3]
TEMPLATES = {"llama": "vicuna_v1", "mistral": "mistral_instruct"}
NAMES = {"llama": "llava-v1.5-tiny", "mistral": "llava-med-v1.5-mistral-tiny"}
"""Folder names from which LLaVA's programs guess the template."""
SUFFIX = "Answer the question using a single word or phrase."

QUESTIONS = (
    ("abd0.png", "is there a lesion in the image of the abdomen?"),
    ("chest1.png", "what side"),
    ("head2.png", "where is the lesion in the image"),
    ("abd3.png", "is the lung left"),
    ("head4.png", "what side of the head is it, left or right?"),
)
TEXT_ONLY = "what is there in the left lung"
ROWS = tuple(
    {"question_id": number, "image": image, "text": text, "category": "detail"}
    for number, (image, text) in enumerate(QUESTIONS)
)
MIXED = (ROWS[0], {"question_id": 7, "text": TEXT_ONLY}, ROWS[1], {"question_id": 8, "text": "where is the lesion"})


class Answer(NamedTuple):
    """An answer's text and the route it took (``Route.describe``); no route where the base answered."""

    text: str
    route: dict[str, Any] | None

    @property
    def slots(self) -> list[int] | None:
        """The slots of the route."""
        return None if self.route is None else sorted(self.route["slots"])


@dataclass
class Side:
    """A base or a stage over it.

    Attributes:
        path: the checkpoint's folder. base: the folder under a stage, ``None`` for a base.
        template: the conversation template it was trained with.
    """

    family: str
    kind: str
    path: Path
    base: Path | None
    world: World
    template: str
    _answers: dict[str, list[Answer]] = field(default_factory=dict)

    @property
    def is_stage(self) -> bool:
        return self.kind == "stage"

    @property
    def name(self) -> str:
        """What LLaVA's programs call it."""
        return get_model_name_from_path(str(self.path))

    @property
    def images(self) -> Path:
        """Folder of the pictures."""
        return self.world.folder / "images"

    def load(self, **more: Any) -> tuple[Any, Any, Any, int]:
        """What LLaVA's programs do first; on a machine without a GPU the model is on the CPU whatever they ask for."""
        base = None if self.base is None else str(self.base)
        return load_pretrained_model(str(self.path), base, self.name, **{"device": "cpu", **more})

    @cached_property
    def loaded(self) -> tuple[Any, Any, Any, int]:
        """A copy in memory for programs that leave the model as it was."""
        return self.load()

    @cached_property
    def engine(self) -> Answerer:
        """The engine of ``model_vqa_loader``, for conversations and several pictures."""
        return Answerer(None if self.base is None else str(self.base), Loading(device="cpu")).use(str(self.path))

    def opened(self, *names: str) -> list[Image.Image]:
        """The pictures, RGB."""
        return [Image.open(self.images / name).convert("RGB") for name in names]

    def answers(self, rows: Sequence[dict[str, Any]], *flags: Any) -> list[Answer]:
        """What ``model_vqa_loader`` answers."""
        key = json.dumps([list(rows), [str(flag) for flag in flags]])
        if key not in self._answers:
            folder = self.world.folder / f"answers-{self.kind}-{len(self._answers)}"
            folder.mkdir()
            write_jsonl(folder / "questions.jsonl", rows)
            words = ["--model-path", self.path, "--question-file", folder / "questions.jsonl"]
            words += ["--model-base", self.base] if self.base else []
            words += ["--image-folder", self.images, "--answers-file", folder / "answers.jsonl", "--device", "cpu"]
            words += ["--max_new_tokens", NEW, *flags]
            model_vqa_loader.main([str(word) for word in words])
            written = read_answers(folder / "answers.jsonl")
            self._answers[key] = [Answer(row["text"], row["metadata"].get("route")) for row in written]
        return self._answers[key]

    def texts(self, rows: Sequence[dict[str, Any]], *flags: Any) -> list[str]:
        """The texts of ``answers``."""
        return [answer.text for answer in self.answers(rows, *flags)]

    def ask(self, turns: Sequence[tuple[str, str]], pictures: Sequence[str], **prompt: Any) -> Answer:
        """What the engine answers to the last human turn; ``prompt`` as in ``Answerer.use``."""
        if prompt:
            self.engine.use(str(self.path), **prompt)
        try:
            reply = self.engine.ask(turns, self.opened(*pictures), Generation(max_new_tokens=NEW))
        finally:
            if prompt:
                self.engine.use(str(self.path))
        return Answer(reply.text, reply.route)

    def reference(self, prompt: str, question: str, pictures: Sequence[str] = ()) -> Answer:
        """What the engine answers to a prompt that is no template's, its question given beside it."""
        model, shown = self.engine.model, self.pixels(pictures)
        output = model.generate(
            one_row(prompt, self.engine.tokenizer, model),
            images=[shown] if shown else None,
            questions=[question],
            do_sample=False,
            max_new_tokens=NEW,
        )
        text = self.engine.tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip()
        return Answer(text, None if model.last_route is None else model.last_route.describe(0))

    def truth(self, prompt: str, question: str, pictures: Sequence[str] = (), **more: Any) -> Any:
        """The engine's forward pass on one prompt, its question given beside it."""
        model, shown = self.engine.model, self.pixels(pictures)
        ids = one_row(prompt, self.engine.tokenizer, model)
        return model(input_ids=ids, images=[shown] if shown else None, questions=[question], **more)

    def decided(self, prompt: str, question: str, pictures: Sequence[str] = ()) -> dict[str, Any]:
        """The engine's route of one prompt as ``forward`` takes it; nothing for a base."""
        self.reference(prompt, question, pictures)
        route = self.engine.model.last_route
        return {} if route is None else {"slot_indices": route.slot_indices, "slot_weights": route.slot_weights}

    def pixels(self, pictures: Sequence[str]) -> list[torch.Tensor]:
        """The pictures as the engine prepares them."""
        return list(self.engine.encoder().pixels(self.opened(*pictures))) if pictures else []


def slots_of(model: Any, rows: int) -> list[list[int] | None]:
    """The slots that a model's last answers used, row by row; ``None`` where the base answered."""
    route = model.last_route
    return [None if route is None else sorted(route.slot_indices[row].tolist()) for row in range(rows)]


def write_side_pair(folder: Path, family: str, suffix: str = "") -> tuple[Side, Side]:
    """A base and a stage of three tasks over it, trained by the commands; ``suffix``: the stage's answer suffix."""
    name, template = NAMES[family], TEMPLATES[family]
    base = write_base(folder / name, family=family)
    values = json.loads((base / "config.json").read_text()) | {"conversation_version": template}
    (base / "config.json").write_text(json.dumps(values))
    sequence = write_sequence(folder, STAGE_TASKS)
    sequence.write_text(json.dumps(json.loads(sequence.read_text()) | {"answer_suffix": suffix}))
    for task in STAGE_TASKS:
        fit(folder, base, sequence, task)
    world, stage = World(folder, base, sequence, merge(folder, sequence)), None
    for number, task in enumerate(STAGE_TASKS):
        previous, stage = stage, folder / f"{name}-stage{number}"
        world.train(task, stage, previous, "--max_steps", 6, "--learning_rate", 1)
    assert stage is not None
    return (
        Side(family, "base", base, None, world, template),
        Side(family, "stage", stage, base, world, template),
    )


def must_differ(base: Side, stage: Side) -> None:
    """The stage is one on which a program that gets the base's answers, or another row's route, is found."""
    rows = [*ROWS, *MIXED[1::2]]
    mine, plain = stage.answers(rows), base.answers(rows)
    assert all(answer.route is None for answer in plain)
    assert not [row for row, one, other in zip(rows, mine, plain, strict=True) if one.text == other.text]
    assert len({str(answer.slots) for answer in mine}) >= 4
    assert len({answer.text for answer in mine}) >= 4


# -- what all of LLaVA's programs do in the same way -------------------------------------------------------------------


def with_mark(config: Any, text: str) -> str:
    """The question behind ``<image>``, as LLaVA's programs put it."""
    if config.mm_use_im_start_end:
        return f"{DEFAULT_IM_START_TOKEN}{DEFAULT_IMAGE_TOKEN}{DEFAULT_IM_END_TOKEN}\n{text}"
    return f"{DEFAULT_IMAGE_TOKEN}\n{text}"


def open_prompt(conv_mode: str, *turns: str) -> str:
    """A template filled with human and assistant turns in alternation, and open for the assistant."""
    conv = conv_templates[conv_mode].copy()
    for number, text in enumerate(turns):
        conv.append_message(conv.roles[number % 2], text)
    conv.append_message(conv.roles[1], None)
    return conv.get_prompt()


def one_row(prompt: str, tokenizer: Any, model: Any) -> torch.Tensor:
    """``[1, length]`` prompt ids on the model's device."""
    ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
    return ids.unsqueeze(0).to(model.device)


def half(pictures: Any, model: Any) -> Any:
    """Pictures as LLaVA's programs hand them over: half precision, on the model's device."""
    if isinstance(pictures, list):
        return [picture.to(model.device, dtype=torch.float16) for picture in pictures]
    return pictures.to(model.device, dtype=torch.float16)
