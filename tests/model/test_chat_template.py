"""A converted checkpoint's chat template gives the evaluation's ids, for every conversation template and tokenizer."""

from __future__ import annotations

import copy
import json

import pytest
import tokenizer_zoo
from PIL import Image
from tiny_llava import write_base
from transformers import AutoProcessor, AutoTokenizer

from llava.checkpoints.checkpoint import Checkpoint
from llava.conversation import conv_templates
from llava.data.labels import conversation_ids
from llava.model.chat_template import chat_template, faithful_template
from llava.model.convert import convert

MODES = sorted(conv_templates)
CONVERSATIONS = {
    "one picture": [("human", "<image>\nIs there a lesion?")],
    "picture behind the text": [("human", " what side\n<image>")],
    "no picture": [("human", "what is this ")],
    "two pictures": [("human", "<image>\n<image>\ncompare")],
    "several turns": [("human", "<image>\nWhat side?"), ("gpt", "left"), ("human", "where "), ("gpt", "lung\n"),
                      ("human", "is it new")],
    "picture in a later turn": [("human", "what"), ("gpt", "yes"), ("human", "<image>\nand here?")],
    "picture alone": [("human", "<image>")],
}  # fmt: skip
PICTURE = Image.new("RGB", (20, 16), (10, 90, 200))


def messages_of(turns, listed=True):
    """The turns as chat messages: pictures and text as parts (in the order of the text), or plain strings."""
    found = []
    for speaker, text in turns:
        role = "user" if speaker == "human" else "assistant"
        if not listed or role == "assistant":
            found.append({"role": role, "content": text})
            continue
        parts = []
        for number, piece in enumerate(text.split("<image>")):
            parts += [{"type": "image", "image": PICTURE}] if number else []
            parts += [{"type": "text", "text": piece}] if piece else []
        found.append({"role": role, "content": parts})
    return found


def expected_ids(turns, tokenizer, mode, marks=False):
    has_image = any("<image>" in text for _, text in turns)
    return conversation_ids(turns, tokenizer, mode, has_image, marks)[0]


def placed(ids, image, features=1):
    """LLaVA's placeholder for each picture's features."""
    found, left = [], 0
    for token in ids:
        if token != image:
            found.append(token)
        elif left == 0:
            found.append(-200)
        left = 0 if token != image else (left + 1) % features
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint of each template, converted."""
    folder = tmp_path_factory.mktemp("chat")
    write_base(folder / "base")
    config = json.loads((folder / "base" / "config.json").read_text())

    def make(mode):
        if not (folder / mode).is_dir():
            (folder / "base" / "config.json").write_text(json.dumps({**config, "conversation_version": mode}))
            convert(folder / "base", folder / mode, "to_hf")
        return folder / mode

    return make


@pytest.mark.parametrize("mode", MODES)
def test_the_processor_gives_the_evaluations_prompt(written, mode):
    folder = written(mode)
    processor, tokenizer = AutoProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    image = tokenizer.convert_tokens_to_ids("<image>")
    for name, turns in CONVERSATIONS.items():
        wanted = expected_ids(turns, tokenizer, mode)
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        found = processor.apply_chat_template(messages_of(turns), **options)
        assert placed(found["input_ids"][0], image, features=4) == wanted, name
        pictures = sum(text.count("<image>") for _, text in turns)
        assert found["input_ids"][0].count(image) == 4 * pictures
        assert len(found.get("pixel_values", [])) == pictures
        for listed in (True, False):
            alone = tokenizer.apply_chat_template(messages_of(turns, listed), **options)["input_ids"]
            assert placed(alone, image) == wanted, name


@pytest.mark.parametrize("mode", MODES)
def test_training_turns_and_a_system_message(written, mode):
    tokenizer = AutoTokenizer.from_pretrained(written(mode))
    turns = [("human", "what side"), ("gpt", "left"), ("human", "where"), ("gpt", "lung")]
    text = tokenizer.apply_chat_template(messages_of(turns), tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == expected_ids(turns, tokenizer, mode)
    conversation = copy.deepcopy(conv_templates[mode])
    start = "<|im_start|>system\n"
    conversation.system = f"{start if conversation.system.startswith(start) else ''}Be brief."
    conversation.append_message(conversation.roles[0], "what side")
    conversation.append_message(conversation.roles[1], None)
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what side"}]
    rendered = tokenizer.apply_chat_template(system, tokenize=False, add_generation_prompt=True)
    assert rendered == "<s>" + conversation.get_prompt()


def test_turns_out_of_order_are_refused(written):
    tokenizer = AutoTokenizer.from_pretrained(written("vicuna_v1"))
    with pytest.raises(Exception, match="user and assistant by turns"):
        tokenizer.apply_chat_template([{"role": "assistant", "content": "yes"}], tokenize=False)


@pytest.mark.parametrize("name", tokenizer_zoo.NAMES)
@pytest.mark.parametrize("mode", ["vicuna_v1", "llava_llama_2", "mistral_instruct", "chatml_direct", "llava_v0"])
def test_every_tokenizer_gets_a_faithful_template_or_none(name, mode):
    """``llama`` writes the word-start mark only once, where the evaluation writes it after each picture."""
    tokenizer = copy.deepcopy(tokenizer_zoo.build(name))
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    source = faithful_template(tokenizer, mode)
    assert (source is None) == (name == "llama")
    if source is not None:
        image = tokenizer.convert_tokens_to_ids("<image>")
        for turns in CONVERSATIONS.values():
            text = tokenizer.apply_chat_template(
                messages_of(turns), chat_template=source, tokenize=False, add_generation_prompt=True
            )
            special = "bos_token" not in source
            assert placed(tokenizer(text, add_special_tokens=special)["input_ids"], image) == expected_ids(
                turns, tokenizer, mode
            )


def test_picture_marks_of_early_checkpoints_are_written(tmp_path):
    write_base(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mm_use_im_start_end": True}))
    convert(tmp_path / "base", tmp_path / "hf", "to_hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    turns = CONVERSATIONS["two pictures"]
    text = tokenizer.apply_chat_template(messages_of(turns), tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert placed(ids, image) == expected_ids(turns, tokenizer, "vicuna_v1", marks=True)


def test_a_template_of_the_language_model_is_replaced_and_a_false_one_left_out(tmp_path, monkeypatch, capsys):
    write_base(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ 'not the evaluation' }}")
    convert(tmp_path / "base", tmp_path / "hf", "to_hf")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template == chat_template("vicuna_v1")
    monkeypatch.setattr("llava.model.convert.faithful_template", lambda *_: None)
    convert(tmp_path / "base", tmp_path / "none", "to_hf")
    assert "no chat template" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "none").chat_template is None
    assert not list((tmp_path / "none").glob("chat_template*"))


def test_there_and_back_keeps_the_template_by_its_name(written, tmp_path):
    convert(written("llava_llama_2"), tmp_path / "back", "from_hf")
    assert Checkpoint.open(tmp_path / "back").llava_config["conversation_version"] == "llava_llama_2"
