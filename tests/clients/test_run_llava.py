"""LLaVA's ``run_llava``: ``eval_model(args)`` of the README, and the steps inside it made by hand."""

from __future__ import annotations

import re

import pytest
import torch
from clients.room import NEW, ROWS, half, one_row, open_prompt, slots_of, with_mark

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.eval.run_llava import eval_model
from llava.mm_utils import get_model_name_from_path, process_images
from llava.model.builder import load_pretrained_model
from llava.utils import disable_torch_init


def guessed_template(model_name):
    """The names from which LLaVA's programs guess."""
    for mark, template in (("llama-2", "llava_llama_2"), ("mistral", "mistral_instruct"), ("v1", "llava_v1")):
        if mark in model_name.lower():
            return template
    return "llava_v0"


def load(side):
    """As the program loads: all arguments by place, no device."""
    disable_torch_init()
    model_name = get_model_name_from_path(str(side.path))
    return load_pretrained_model(str(side.path), None if side.base is None else str(side.base), model_name)


def answer(side, loaded, query, files, conv_mode):
    """The program's steps after loading; the text and the slots."""
    tokenizer, model, image_processor, _ = loaded
    if IMAGE_PLACEHOLDER in query:
        query = re.sub(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN, query)
    else:
        query = with_mark(model.config, query)
    images = side.opened(*files)
    pictures = half(process_images(images, image_processor, model.config), model)
    input_ids = one_row(open_prompt(conv_mode, query), tokenizer, model)
    with torch.inference_mode():
        output_ids = model.generate(
            input_ids,
            images=pictures,
            image_sizes=[image.size for image in images],
            do_sample=False,
            temperature=0,
            top_p=None,
            num_beams=1,
            max_new_tokens=NEW,
            use_cache=True,
        )
    return tokenizer.batch_decode(output_ids, skip_special_tokens=True)[0].strip(), slots_of(model, 1)[0]


def test_eval_model(side, capsys):
    """The object of LLaVA's README, made of a class body."""
    values = {
        "model_path": str(side.path),
        "model_base": None if side.base is None else str(side.base),
        "model_name": get_model_name_from_path(str(side.path)),
        "query": ROWS[1]["text"],
        "conv_mode": None,
        "image_file": str(side.images / ROWS[1]["image"]),
        "sep": ",",
        "temperature": 0,
        "top_p": None,
        "num_beams": 1,
        "max_new_tokens": NEW,
    }
    (expected,) = side.texts(ROWS[1:2])
    capsys.readouterr()
    eval_model(type("Args", (), values)())
    assert capsys.readouterr().out.rstrip("\n").endswith(expected)


def test_the_steps_by_hand(side):
    """One picture, the template guessed from the folder's name."""
    loaded, conv_mode = load(side), guessed_template(side.name)
    for row, expected in zip(ROWS, side.answers(ROWS, "--conv-mode", conv_mode), strict=True):
        assert answer(side, loaded, row["text"], [row["image"]], conv_mode) == (expected.text, expected.slots)


@pytest.mark.parametrize("conv_mode", ["llava_v0", "vicuna_v1", "mistral_instruct", "llava_llama_2", "mpt"])
def test_another_template_than_the_models_own(side, conv_mode):
    """The user's ``--conv-mode``; the question, and with it the route, is the same in each."""
    for row, expected in zip(ROWS[2:4], side.answers(ROWS[2:4], "--conv-mode", conv_mode), strict=True):
        found = answer(side, side.loaded, row["text"], [row["image"]], conv_mode)
        assert found == (expected.text, expected.slots)


def test_two_pictures(side):
    """As many placeholders as pictures, one tensor for the one prompt."""
    query = f"{IMAGE_PLACEHOLDER}\n{IMAGE_PLACEHOLDER}\n{ROWS[1]['text']}"
    expected = side.ask([("human", f"<image>\n<image>\n{ROWS[1]['text']}")], ["chest1.png", "head2.png"])
    found = answer(side, side.loaded, query, ["chest1.png", "head2.png"], side.template)
    assert found == (expected.text, expected.slots)
