"""VLMEvalKit's ``LLaVA``: text and pictures interleaved, chat turns, a system text of its own, and its LLaVA-NeXT."""

from __future__ import annotations

from abc import abstractproperty

import pytest
import torch
from clients.room import NEW, half, one_row, open_prompt, slots_of

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, conv_templates
from llava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)
STOP = "</s>"
GREEDY = {"do_sample": False, "temperature": 0, "max_new_tokens": NEW, "top_p": None, "num_beams": 1, "use_cache": True}


class Llava:
    """The suite's model, loaded by keywords."""

    def __init__(self, side):
        self.side = side
        self.tokenizer, self.model, self.image_processor, self.context_len = load_pretrained_model(
            model_path=str(side.path),
            model_base=None,
            model_name=get_model_name_from_path(str(side.path)),
            device="cpu",
            device_map="cpu",
        )

    @staticmethod
    def joined(message):
        """The text with `` <image> `` in the pictures' places, and the pictures."""
        text, images = "", []
        for kind, value in message:
            text += value if kind == "text" else " <image> "
            images += [value] if kind == "image" else []
        return text, images

    def answer(self, prompt, names):
        """The answer's text and slots."""
        view = abstractproperty()
        view.image_aspect_ratio = "pad"
        images = self.side.opened(*names)
        pictures = half(process_images(images, self.image_processor, view), self.model) if images else None
        input_ids = tokenizer_image_token(prompt, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt").unsqueeze(0)
        stopping = KeywordsStoppingCriteria([STOP], self.tokenizer, input_ids)
        with torch.inference_mode():
            output_ids = self.model.generate(input_ids, images=pictures, stopping_criteria=[stopping], **GREEDY)
        text = self.tokenizer.batch_decode(output_ids, skip_special_tokens=True)[0].strip()
        return text, slots_of(self.model, 1)[0]


@pytest.fixture(scope="module")
def suite(side):
    return Llava(side)


MESSAGES = {
    "one picture": [("image", "abd0.png"), ("text", "is there a lesion in the image of the abdomen?")],
    "two pictures": [("image", "chest1.png"), ("image", "head2.png"), ("text", "what side")],
    "no picture": [("text", "what is there in the left lung")],
    "interleaved": [("text", "is there a lesion in"), ("image", "abd0.png"), ("text", "or in"), ("image", "abd3.png")],
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_one_turn(side, suite, kind):
    """A prompt that is nearly a template's: a space behind ``ASSISTANT:``, the marks between spaces."""
    content, names = suite.joined(MESSAGES[kind])
    prompt = f"{SYSTEM}USER: {content} ASSISTANT: "
    expected = side.reference(prompt, content.replace("<image>", "").strip(), names)
    assert suite.answer(prompt, names) == (expected.text, expected.slots)


def test_chat_turns(side, suite):
    """Three turns, pictures in the first and the last: the last question decides."""
    turns = [
        ("user", MESSAGES["one picture"]),
        ("assistant", [("text", "yes")]),
        ("user", [("image", "head2.png"), ("text", "what side")]),
    ]
    prompt, names = SYSTEM, []
    for role, message in turns:
        content, shown = suite.joined(message)
        prompt += f"USER: {content} " if role == "user" else f"ASSISTANT: {content}{STOP}"
        names += shown
    prompt += "ASSISTANT: "
    expected = side.reference(prompt, "what side", names)
    assert suite.answer(prompt, names) == (expected.text, expected.slots)


@pytest.mark.parametrize("kind", ["one picture", "two pictures"])
def test_llava_next(side, kind):
    """Pictures preprocessed one by one and stacked, in half precision; no sizes."""
    tokenizer, model, image_processor, _ = load_pretrained_model(str(side.path), None, side.name, device_map=None)
    model.eval()
    model.tie_weights()
    content, names = "", []
    for what, value in MESSAGES[kind]:
        content += value if what == "text" else "<image>\n"
        names += [value] if what == "image" else []
    shown = [
        image_processor.preprocess(image, return_tensors="pt")["pixel_values"][0].half()
        for image in side.opened(*names)
    ]
    input_ids = one_row(open_prompt(side.template, content), tokenizer, model)
    conv = conv_templates[side.template]
    stop = conv.sep if conv.sep_style == SeparatorStyle.SINGLE else conv.sep2
    output = model.generate(
        input_ids,
        images=torch.stack(shown),
        do_sample=False,
        temperature=0,
        max_new_tokens=NEW,
        stopping_criteria=[KeywordsStoppingCriteria([stop], tokenizer, input_ids)],
    )
    expected = side.ask([("human", content)], names, aspect_ratio="square")
    text = tokenizer.batch_decode(output, skip_special_tokens=True)[0]
    assert (text.split(stop)[0].strip(), slots_of(model, 1)[0]) == (expected.text, expected.slots)
