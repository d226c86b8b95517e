"""Every template against a golden string: what LLaVA's own ``get_prompt`` renders, written out here in full."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from PIL import Image

from llava import conversation as llavas
from llava.conversation import conv_mode_for, conv_templates, default_conversation, get_conversation
from llava.mm_utils import load_image_from_base64
from llava.utils import UserError

HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language.The "
    "visual content will be provided with the following format: <Image>visual content</Image>."
)
LLAVA_2 = (
    "<<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language.\n<</SYS>>\n\n"
)
META = (
    "<<SYS>>\nYou are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
    "safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal "
    "content. Please ensure that your responses are socially unbiased and positive in nature.\n\nIf a question does "
    "not make any sense, or is not factually coherent, explain why instead of answering something not correct. If you "
    "don't know the answer to a question, please don't share false information.\n<</SYS>>\n\n"
)
MPT = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. The assistant gives helpful and "
    "honest answers.<|im_end|>"
)
CHATML = "<|im_start|>system\nAnswer the questions.<|im_end|>"

TWO = " USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>"
SINGLE = "###Human: <image>\nQ1###Assistant: A1###Human: Q2###Assistant: A2###"
IM = (
    "<|im_start|>user\n<image>\nQ1<|im_end|><|im_start|>assistant\nA1<|im_end|>"
    "<|im_start|>user\nQ2<|im_end|><|im_start|>assistant\nA2<|im_end|>"
)
GOLDEN = {
    "v1": USER + TWO,
    "vicuna_v1": USER + TWO,
    "llava_v1": HUMAN + TWO,
    "v1_mmtag": MMTAG + TWO,
    "llava_v0": HUMAN + SINGLE,
    "v0_mmtag": MMTAG + SINGLE,
    "llava_llama_2": f"[INST] {LLAVA_2}<image>\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST] A2 </s>",
    "llama_2": f"[INST] {META}<image>\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST] A2 </s>",
    "mistral_instruct": "[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST] A2 </s>",
    "chatml_direct": CHATML + IM,
    "mistral_direct": CHATML + IM,
    "mpt": MPT + IM,
    "plain": "<image>A1\n<image>A2\n",
    "v0_plain": "<image>A1\n<image>A2\n",
}
OPEN_TURN = {
    "v1": USER + " USER: <image>\nQ1 ASSISTANT:",
    "llava_v1": HUMAN + " USER: <image>\nQ1 ASSISTANT:",
    "llava_v0": HUMAN + "###Human: <image>\nQ1###Assistant:",
    "llava_llama_2": f"[INST] {LLAVA_2}<image>\nQ1 [/INST]",
    "mistral_instruct": "[INST] <image>\nQ1 [/INST]",
    "chatml_direct": CHATML + "<|im_start|>user\n<image>\nQ1<|im_end|><|im_start|>assistant\n",
    "plain": "<image>",
}


def said(mode: str, *texts: str | None):
    conversation = get_conversation(mode)
    for index, text in enumerate(texts):
        conversation.append_message(conversation.roles[index % 2], text)
    return conversation


@pytest.mark.parametrize("mode", sorted(GOLDEN))
def test_two_closed_turns_render_as_in_llava(mode):
    second = "<image>\nQ2" if "plain" in mode else "Q2"
    assert said(mode, "<image>\nQ1", "A1", second, "A2").get_prompt() == GOLDEN[mode]


@pytest.mark.parametrize("mode", sorted(OPEN_TURN))
def test_open_turn_ends_where_the_model_goes_on(mode):
    assert said(mode, "<image>\nQ1", None).get_prompt() == OPEN_TURN[mode]


def test_second_open_turn_keeps_the_first_answer():
    assert said("v1", "<image>\nQ1", "A1", "Q2", None).get_prompt() == (
        USER + " USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"
    )


@pytest.mark.parametrize("mode", ["v0", "default"])
def test_v0_begins_with_its_example(mode):
    prompt = said(mode, "<image>\nQ1", "A1").get_prompt()
    assert prompt.startswith(HUMAN + "###Human: What are the key differences between renewable and non-renewable")
    assert "###Assistant: Renewable energy sources are those that can be replenished" in prompt
    assert prompt.endswith("lead to economic and social instability.\n###Human: <image>\nQ1###Assistant: A1###")
    assert conv_templates[mode].offset == 2


def test_every_template_has_a_golden_string():
    assert set(conv_templates) == set(GOLDEN) | {"v0", "default"}


def test_default_is_the_vicuna_template_and_aliases_are_one_object():
    assert default_conversation is conv_templates["v1"] is conv_templates["vicuna_v1"]
    assert conv_templates["chatml_direct"] is conv_templates["mistral_direct"]


def test_picture_in_the_first_message_moves_to_the_front():
    conversation = said("v1", ("Q1 <image>", Image.new("RGB", (4, 4)), "Pad"), None)
    assert conversation.get_prompt() == USER + " USER: <image>\nQ1 ASSISTANT:"
    assert conversation.dict()["messages"] == [["USER", "Q1 <image>"], ["ASSISTANT", None]]


def test_picture_under_mmtag_gets_its_own_turn():
    conversation = said("v1_mmtag", ("<image>\nQ1", object(), "Pad"), None)
    assert conversation.get_prompt() == (
        MMTAG + " USER: <Image><image></Image> ASSISTANT: Received.</s>USER: Q1 ASSISTANT:"
    )


def test_pictures_come_as_base64_files_or_as_pillow():
    """Those of the user's turns after the template's own example."""
    red, wide = Image.new("RGB", (8, 8), "red"), Image.new("L", (8, 4), 9)
    conversation = said("v0", ("Q1", red, "Default"), "A1", "Q2", "A2", ("Q3", wide, "Pad"), None)
    first, second = conversation.get_images(return_pil=True)
    assert first.tobytes() == red.tobytes()
    assert second.size == (8, 8) and second.getpixel((0, 0)) == (122, 116, 104) and second.getpixel((0, 4)) == (9,) * 3
    texts = conversation.get_images()
    assert [load_image_from_base64(text).tobytes() for text in texts] == [first.tobytes(), second.tobytes()]
    assert load_image_from_base64(texts[0]).format == "PNG"


@pytest.mark.parametrize(
    ("size", "mode", "limits", "shown"),
    [
        ((1344, 10), "Crop", (), (1344, 10)),
        ((2000, 1000), "Default", (), (1344, 672)),
        ((1000, 2000), "Default", (), (672, 1344)),
        ((1400, 1400), "Default", (), (672, 672)),
        ((2000, 1000), "Resize", (), (336, 336)),
        ((2000, 1000), "Pad", (), (672, 672)),
        ((1000, 500), "Default", (800, 400), (800, 400)),
    ],
)
def test_a_picture_of_a_chat_has_llavas_size(size, mode, limits, shown):
    """Positional, as LLaVA's callers pass it: return_pil, image_format, max_len, min_len."""
    picture = Image.new("RGB", size)
    assert default_conversation.process_image(picture, mode, True, "PNG", *limits).size == shown


def test_an_unknown_picture_mode_is_named():
    with pytest.raises(UserError, match="'Stretch'.*Pad, Crop, Resize, Default"):
        default_conversation.process_image(Image.new("RGB", (4, 4)), "Stretch")


def test_gradio_gets_pairs_with_pictures_in_front():
    see_through = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    conversation = said("v0", ("<image>\nQ1", see_through, "Pad"), "A1", "Q2", None)
    (first, answer), second = conversation.to_gradio_chatbot()
    head, text = first.split("base64,")[1].split('" alt="user upload image" />')
    assert text == "Q1" and answer == "A1" and second == ["Q2", None]
    assert first.startswith('<img src="data:image/jpeg;base64,')
    assert load_image_from_base64(head).format == "JPEG" and load_image_from_base64(head).size == (8, 8)
    assert said("v1", "Q1").to_gradio_chatbot() == [["Q1", None]]


def test_each_template_has_llavas_name():
    names = "vicuna_v0 vicuna_v1 llama_2 llava_llama_2 mpt llava_plain llava_v0 llava_v0_mmtag llava_v1 llava_v1_mmtag"
    found = [getattr(llavas, f"conv_{name}") for name in f"{names} mistral_instruct chatml_direct".split()]
    assert {id(template) for template in found} == {id(template) for template in conv_templates.values()}
    assert llavas.conv_llava_v1 is conv_templates["llava_v1"]
    assert llavas.conv_llava_v0_mmtag is conv_templates["v0_mmtag"]


def test_segments_mark_replies_with_their_end_and_leading_space():
    replies = {
        mode: [segment.text for segment in said(mode, "Q1", "A1", "Q2", "A2").segments() if segment.is_reply]
        for mode in ("v1", "llava_v0", "mistral_instruct", "chatml_direct", "plain")
    }
    assert replies == {
        "v1": [" A1</s>", " A2</s>"],
        "llava_v0": [" A1###", " A2###"],
        "mistral_instruct": [" A1 </s>", " A2 </s>"],
        "chatml_direct": ["A1<|im_end|>", "A2<|im_end|>"],
        "plain": ["A1\nA2\n"],
    }


def test_copy_leaves_the_template_alone():
    said("v1", "Q1", "A1")
    assert conv_templates["v1"].messages == []


def test_llama_2_refuses_to_begin_without_a_question():
    with pytest.raises(UserError, match="begin with a question"):
        said("llava_llama_2", None).get_prompt()


def test_unknown_template_is_named():
    with pytest.raises(UserError, match="unknown conversation template 'v9'.*vicuna_v1"):
        get_conversation("v9")


@pytest.mark.parametrize(
    ("config", "name", "mode", "rule"),
    [
        ({"conversation_version": "plain"}, "llava-v1.5-7b", "plain", "conversation_version"),
        ({"model_type": "llava_mistral"}, "llava-med-7b", "mistral_instruct", "model_type"),
        ({}, "LLaVA-Llama-2-13b-chat", "llava_llama_2", "llama-2"),
        ({}, "llava-v1.6-mistral-7b", "mistral_instruct", "mistral"),
        ({}, "llava-v1.6-34b", "chatml_direct", "v1.6-34b"),
        ({}, "llava-v1.5-7b", "llava_v1", "v1"),
        ({}, "llava-mpt-7b", "mpt", "mpt"),
        ({"mm_projector_type": "mlp2x_gelu"}, "llava-prompt-attempt", "vicuna_v1", "no name rule"),
        ({"mm_projector_type": "mlp2x_gelu"}, "llava-vqa-rad_abd", "vicuna_v1", "no name rule"),
        ({"mm_use_im_start_end": True, "mm_projector_type": "linear"}, "llava-7b", "llava_v0", "early LLaVA"),
    ],
)
def test_template_choice_and_the_rule_that_fired(config, name, mode, rule, capsys):
    assert conv_mode_for(SimpleNamespace(**config), name) == mode
    assert rule in capsys.readouterr().out


def test_a_config_with_an_unknown_template_is_refused():
    with pytest.raises(UserError, match="unknown conversation template"):
        conv_mode_for(SimpleNamespace(conversation_version="v7"), "llava")
