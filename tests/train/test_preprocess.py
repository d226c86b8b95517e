"""LLaVA's data functions: ids, and labels on the answers alone, counted by hand."""

from types import SimpleNamespace

import pytest
import torch
from tiny_llava import make_tokenizer, write_images

from llava import conversation
from llava.data.rows import write_jsonl
from llava.train.train import (
    LazySupervisedDataset,
    make_supervised_data_module,
    preprocess,
    preprocess_llama_2,
    preprocess_mpt,
    preprocess_multimodal,
    preprocess_plain,
    preprocess_v1,
)
from llava.utils import UserError

TALK = [
    {"from": "human", "value": "<image>\nQ1"},
    {"from": "gpt", "value": "A1"},
    {"from": "human", "value": "Q2"},
    {"from": "gpt", "value": "A2"},
]
SYSTEM = conversation.conv_templates["v1"].system


@pytest.fixture
def template(monkeypatch):
    """Sets LLaVA's global template, which is put back afterwards."""
    return lambda name: monkeypatch.setattr(conversation, "default_conversation", conversation.conv_templates[name])


def text(ids, tokenizer):
    """Ids as text, ``#`` where the picture is."""
    return tokenizer.decode([tokenizer("#", add_special_tokens=False)["input_ids"][0] if i == -200 else i for i in ids])


def answers(found, tokenizer, row=0):
    """The labelled stretches as texts."""
    labels, stretches = found["labels"][row].tolist(), [[]]
    for label in labels:
        if label == -100:
            stretches.append([])
        else:
            stretches[-1].append(label)
    return [tokenizer.decode(one) for one in stretches if one]


@pytest.mark.parametrize(
    "name, own, whole, labelled",
    [
        ("v1", preprocess_v1, f"<s>{SYSTEM} USER: #\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>", " {0}</s>"),
        (
            "mistral_instruct",
            preprocess_llama_2,
            "<s>[INST] #\nQ1 [/INST] A1 </s>[INST] Q2 [/INST] A2 </s>",
            " {0} </s>",
        ),
        (
            "mistral_direct",
            preprocess_mpt,
            "<s><|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n#\nQ1<|im_end|>"
            "<|im_start|>assistant\nA1<|im_end|><|im_start|>user\nQ2<|im_end|><|im_start|>assistant\nA2<|im_end|>",
            "{0}<|im_end|>",
        ),
    ],
)
def test_answers_alone_are_labelled(template, name, own, whole, labelled):
    template(name)
    tokenizer = make_tokenizer()
    found = preprocess([TALK], tokenizer, has_image=True)
    assert found["input_ids"].shape == found["labels"].shape and found["input_ids"].shape[0] == 1
    assert text(found["input_ids"][0].tolist(), tokenizer) == whole
    assert answers(found, tokenizer) == [labelled.format("A1"), labelled.format("A2")]
    assert torch.equal(own([TALK], tokenizer, has_image=True)["labels"], found["labels"])
    kept = found["labels"] != -100
    assert torch.equal(found["labels"][kept], found["input_ids"][kept])


def test_a_caption_follows_its_picture(template):
    template("plain")
    tokenizer = make_tokenizer()
    talk = [{"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": "a lung"}]
    found = preprocess([talk], tokenizer)
    assert text(found["input_ids"][0].tolist(), tokenizer) == "<s>#a lung\n"
    assert found["labels"][0].tolist()[:2] == [-100, -100] and answers(found, tokenizer) == ["a lung\n"]
    with pytest.raises(UserError, match="a plain conversation is <image> and a caption"):
        preprocess_plain([TALK], tokenizer)


def test_text_is_padded_and_cut_to_the_tokenizers_limit(template):
    template("v1")
    tokenizer = make_tokenizer()
    talks = [[{"from": "human", "value": f"Q{'!' * n}"}, {"from": "gpt", "value": "A"}] for n in (1, 4)]
    found = preprocess(talks, tokenizer)
    assert answers(found, tokenizer, 0) == answers(found, tokenizer, 1) == [" A</s>"]
    assert found["labels"][0, -1] == -100 and found["input_ids"][0, -1] == tokenizer.pad_token_id
    tokenizer.model_max_length = 9
    assert preprocess(talks, tokenizer)["input_ids"].shape == (2, 9)
    with pytest.raises(UserError, match="has_image is False"):
        preprocess([TALK], tokenizer)


def test_a_first_turn_of_the_model_is_left_out_and_turns_alternate(template):
    template("v1")
    tokenizer = make_tokenizer()
    greeting = [{"from": "gpt", "value": "Hello"}, *TALK[2:]]
    assert answers(preprocess([greeting], tokenizer), tokenizer) == [" A2</s>"]
    with pytest.raises(UserError, match="turn 2 is 'human'"):
        preprocess([[TALK[2], TALK[2]]], tokenizer)
    with pytest.raises(UserError, match="style TWO, not MPT"):
        preprocess_mpt([TALK[2:]], tokenizer)


@pytest.mark.parametrize(
    "name, marks, expected",
    [
        ("v1", False, "<image>\nQ1"),
        ("v1", True, "<im_start><image><im_end>\nQ1"),
        ("v1_mmtag", False, "<Image><image></Image>\nQ1"),
    ],
)
def test_the_picture_goes_in_front(template, name, marks, expected):
    template(name)
    data_args = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=marks)
    (source,) = preprocess_multimodal([[{"from": "human", "value": "Q1\n<image>"}]], data_args)
    assert source[0]["value"] == expected
    data_args.is_multimodal = False
    untouched = [[{"from": "human", "value": "Q1\n<image>"}]]
    assert preprocess_multimodal(untouched, data_args)[0][0]["value"] == "Q1\n<image>"


def test_the_dataset_reads_llavas_file(template, tmp_path):
    from transformers import CLIPImageProcessorPil

    template("v1")
    tokenizer = make_tokenizer()
    write_images(tmp_path, ["a.png"])
    talk = [{"from": one["from"], "value": one["value"]} for one in TALK]
    write_jsonl(
        tmp_path / "rows.json",
        [{"id": 1, "image": "a.png", "conversations": talk}, {"id": 2, "conversations": talk[2:]}],
    )
    size = {"height": 16, "width": 16}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
    data_args = SimpleNamespace(
        data_path=str(tmp_path / "rows.json"),
        image_folder=str(tmp_path),
        image_processor=processor,
        image_aspect_ratio="pad",
        is_multimodal=True,
        mm_use_im_start_end=False,
    )
    module = make_supervised_data_module(tokenizer, data_args)
    dataset = module["train_dataset"]
    assert isinstance(dataset, LazySupervisedDataset) and len(dataset) == 2 and module["eval_dataset"] is None
    assert torch.equal(dataset[0]["labels"], preprocess([TALK], tokenizer, has_image=True)["labels"][0])
    assert dataset[0]["image"].shape == (3, 16, 16) and dataset[1]["image"] is None
    assert dataset.modality_lengths[0] == dataset.lengths[0] and dataset.modality_lengths[1] == -dataset.lengths[1]
    assert dataset.list_data_dict[0]["id"] == 1
    batch = module["data_collator"]([dataset[0], dataset[1]])
    assert batch["input_ids"].shape == batch["labels"].shape and batch["images"][1] is None
    own = [{"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 2])}]  # a sample of another program's
    assert module["data_collator"](own)["attention_mask"].tolist() == [[True, True]]


def test_a_template_without_a_name_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(conversation, "default_conversation", conversation.conv_templates["v1"].copy())
    write_jsonl(tmp_path / "rows.json", [{"id": 2, "conversations": TALK[2:]}])
    with pytest.raises(UserError, match="is none of conv_templates"):
        LazySupervisedDataset(str(tmp_path / "rows.json"), make_tokenizer(), SimpleNamespace())
