"""The prompt object: where its fields come from, what it refuses, and that training and answering share one encoder."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tokenizer_zoo
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from llava.constants import IGNORE_INDEX
from llava.data.prompt import Prompt, PromptEncoder, check_aspect_ratio, pixels_of
from llava.data.rows import parse_row
from llava.data.samples import pictures_checksum
from llava.mm_utils import process_images
from llava.utils import UserError

PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
PINPOINTS = [[64, 32], [32, 64]]
SUFFIX = "Answer with one word."


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_zoo.build("llama")


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 20), (200, 10, 10)).save(tmp_path / "a.png")
    return tmp_path


def config(**fields):
    return SimpleNamespace(vision_config={"image_size": 32, "patch_size": 8}, **fields)


def row(number=1, answer="Left Lung", image="a.png", question="  Where is it? "):
    value = {"question_id": number, "text": question + ("\n<image>" if image else ""), "gpt4_answer": answer}
    return parse_row(value | ({"image": image} if image else {}))


# -- where the fields come from ----------------------------------------------------------------------------------------


def test_a_base_says_its_template_and_its_picture_mode():
    found = Prompt.of(config(conversation_version="llava_v0", image_aspect_ratio="pad"), "any")
    assert found == Prompt("llava_v0", "", "as_is", "pad", None)
    assert Prompt.of(config(mm_projector_type="mlp2x_gelu"), "llava-v1.5-7b") == Prompt("llava_v1")
    assert Prompt.of(config(mm_projector_type="mlp2x_gelu", image_aspect_ratio=None), "x") == Prompt("vicuna_v1")


def test_what_is_asked_goes_over_the_stage_over_defaults_over_the_base():
    base = config(conversation_version="v1", image_aspect_ratio="pad")
    base.prompt = {"answer_suffix": "of the stage", "aspect_ratio": "square"}
    defaults = {"answer_suffix": "default", "answer_style": "lower"}
    found = Prompt.of(base, "x", defaults, conv_mode=None)
    assert found == Prompt("v1", "of the stage", "lower", "square")
    assert Prompt.of(base, "x", defaults, answer_suffix="").answer_suffix == ""
    asked = Prompt.of(base, "x", aspect_ratio="pad", conv_mode="llava_v0")
    assert asked == Prompt("llava_v0", "of the stage", aspect_ratio="pad")


def test_it_survives_a_file_and_a_config():
    prompt = Prompt("llava_v0", SUFFIX, "lower", "square", 99)
    assert Prompt.from_dict(prompt.to_dict()) == prompt
    told = config(conversation_version="v1", image_aspect_ratio="pad")
    prompt.tell(told)
    assert (told.conversation_version, told.image_aspect_ratio) == ("llava_v0", "square")
    assert Prompt.of(told, "llava-v1.5-7b") == prompt


def test_a_difference_names_the_fields_but_not_the_length():
    prompt = Prompt("v1", aspect_ratio="pad", max_length=5)
    assert prompt.difference(Prompt("v1", aspect_ratio="pad", max_length=9).to_dict()) == ""
    assert prompt.difference({"conv_mode": "vicuna_v1"}) == ""  # another name of the same template
    assert prompt.difference({"conv_mode": "llava_v1"}) == "conv_mode is 'v1', was 'llava_v1'"
    assert prompt.difference({"aspect_ratio": "square"}) == "aspect_ratio is 'pad', was 'square'"


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conv_mode": "v7"}, "unknown conversation template 'v7'"),
        ({"answer_style": "upper"}, "answer style 'upper' is not known; choose from as_is, lower"),
        ({"aspect_ratio": "pdd"}, "image_aspect_ratio 'pdd' is not known; did you mean 'pad'"),
        ({"aspect_ratio": "sqare"}, "did you mean 'square'"),
        ({"aspect_ratio": "any-res"}, "did you mean 'anyres'"),
        ({"aspect_ratio": "PAD"}, "image_aspect_ratio 'PAD' is not known"),
        ({"max_length": 0}, "longest sample is 0 positions"),
        ({"answer_suffix": 3}, "the answer suffix is 3"),
    ],
)
def test_bad_values_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Prompt.from_dict({"conv_mode": "v1", **fields})


def test_a_field_of_a_newer_version_is_named():
    with pytest.raises(UserError, match="unknown field 'frames'"):
        Prompt.from_dict({"conv_mode": "v1", "frames": 8})


def test_anyres_needs_a_base_that_has_grids():
    with pytest.raises(UserError, match="'anyres' needs a base whose config.json has image_grid_pinpoints"):
        Prompt.of(config(), "x", aspect_ratio="anyres")
    check_aspect_ratio("anyres", config(image_grid_pinpoints=PINPOINTS))
    with pytest.raises(UserError, match="list of"):
        check_aspect_ratio("anyres", config(image_grid_pinpoints="[[1"))


# -- one encoder for training and answering ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["pad", "square", "anyres"])
@pytest.mark.parametrize("template", ["vicuna_v1", "llava_v0", "mistral_instruct", "v1_mmtag"])
def test_training_and_answering_give_the_same_question(folder, tokenizer, template, mode):
    other = "square" if mode == "pad" else "pad"  # a model's config that says otherwise is not asked
    model = config(image_aspect_ratio=other, conversation_version="v0", image_grid_pinpoints=PINPOINTS)
    encoder = PromptEncoder(Prompt(template, SUFFIX, "lower", mode, 400), tokenizer, PROCESSOR, model, folder)
    trained, asked = encoder.encode(row(), answer=True), encoder.encode(row(), answer=False)
    length = len(asked.input_ids)
    assert trained.input_ids[:length] == asked.input_ids
    assert set(trained.labels[:length]) == {IGNORE_INDEX} == set(asked.labels)
    answer = tokenizer.decode(trained.input_ids[length:])
    assert trained.labels[length:] == trained.input_ids[length:] and "left lung" in answer
    assert SUFFIX in tokenizer.decode([token for token in asked.input_ids if token >= 0])
    ((pixels, size),) = asked.pictures
    assert torch.equal(trained.pictures[0][0], pixels) and trained.pictures[0][1] == size == (40, 20)
    view = SimpleNamespace(image_aspect_ratio=mode, image_grid_pinpoints=PINPOINTS)
    assert torch.equal(pixels, process_images([Image.open(folder / "a.png")], PROCESSOR, view)[0])


def test_picture_modes_differ(folder):
    picture = [Image.open(folder / "a.png")]
    pad, square = (pixels_of(picture, PROCESSOR, config(), mode) for mode in ("pad", "square"))
    assert pad.shape == square.shape == (1, 3, 32, 32) and not torch.equal(pad, square)


def test_the_suffix_follows_each_question_of_a_chat(tokenizer):
    encoder = PromptEncoder(Prompt("v1", SUFFIX), tokenizer, PROCESSOR, config())
    ids, _ = encoder.conversation([("human", "Where?"), ("gpt", "here"), ("human", "Which side?")], 0)
    assert tokenizer.decode(ids).count(SUFFIX) == 2


def test_only_training_is_cut_to_the_length(folder, tokenizer):
    encoder = PromptEncoder(Prompt("v1", max_length=90), tokenizer, PROCESSOR, config(), folder)
    long = row(question="left right " * 100)
    assert len(encoder.tokens(long, answer=True)[0]) - 1 + 16 == 90
    assert len(encoder.tokens(long, answer=False)[0]) > 200


def test_a_question_without_a_picture_and_a_model_without_a_tower(tokenizer):
    encoder = PromptEncoder(Prompt("v1"), tokenizer, None, config())
    assert encoder.encode(row(image=None), answer=False).pictures == []
    with pytest.raises(UserError, match="row 1: it has a picture but the model has no vision tower"):
        encoder.encode(row(), answer=False)


# -- which pictures these are ------------------------------------------------------------------------------------------


def test_the_pictures_checksum_follows_their_contents(folder, tmp_path_factory):
    rows = [row(1), row(2), row(3, image=None)]
    before = pictures_checksum(rows, folder)
    elsewhere = tmp_path_factory.mktemp("moved")
    (elsewhere / "a.png").write_bytes((folder / "a.png").read_bytes())
    assert pictures_checksum(rows[::-1], elsewhere) == before and len(before) == 16
    Image.new("RGB", (40, 20), (0, 0, 0)).save(folder / "a.png")
    assert pictures_checksum(rows, folder) != before
    assert pictures_checksum([rows[2]], None) is None
