"""LLaVA-Med's ``model_vqa`` with its own question file, and its chat over a folder of pictures."""

from __future__ import annotations

import json
import os

import torch
from clients.room import NEW, ROWS, half, one_row, open_prompt, slots_of, with_mark
from PIL import Image
from transformers import TextStreamer, set_seed

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import SeparatorStyle, conv_templates
from llava.data.jsonl import write_jsonl
from llava.eval import model_vqa_loader
from llava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, process_images
from llava.model.builder import load_pretrained_model
from llava.utils import disable_torch_init

DOMAINS = ("chest_xray", "mri", "ct_scan", "histology", "gross")
TRUE = (("histology", "gross"), ("histology",), ("ct_scan",), (), ("chest_xray", "mri"))


def med_rows():
    """LLaVA-Med's fields: ``<image>`` behind the question, several true domains or none, the same picture again."""
    return [
        {
            "question_id": row["question_id"],
            "image": row["image"],
            "pair_id": row["image"].removesuffix(".png"),
            "text": f"{row['text']}\n<image>",
            "gpt4_answer": "It is there.",
            "fig_caption": "A figure.",
            "in_text_mention": [{"tokens": "( Fig. 3 )", "entities": [{"type": "figure", "entity_id": "3"}]}],
            "domain": {name: name in true for name in DOMAINS},
            "type": "conversation",
            "fig_label": "Fig. 3",
        }
        for row, true in zip(ROWS, TRUE, strict=True)
    ]


def load(side):
    disable_torch_init()
    model_path = os.path.expanduser(str(side.path))
    name = get_model_name_from_path(model_path)
    return load_pretrained_model(model_path, None if side.base is None else str(side.base), name)


def test_model_vqa(side):
    """No ``image_sizes``; a stopping criterion is made and left out; the answers go to the same rows."""
    set_seed(0)
    tokenizer, model, image_processor, _ = load(side)
    conv_mode = "mistral_instruct" if side.family == "mistral" else "vicuna_v1"
    found = []
    for line in med_rows():
        question = line["text"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        prompt = open_prompt(conv_mode, with_mark(model.config, question))
        input_ids = one_row(prompt, tokenizer, model)
        image = Image.open(os.path.join(side.images, line["image"]))
        image_tensor = process_images([image], image_processor, model.config)[0]
        conv = conv_templates[conv_mode]
        stop = conv.sep if conv.sep_style != SeparatorStyle.TWO else conv.sep2
        KeywordsStoppingCriteria([stop], tokenizer, input_ids)
        with torch.inference_mode():
            output_ids = model.generate(
                input_ids,
                images=image_tensor.unsqueeze(0).half().to(model.device),
                do_sample=False,
                temperature=0,
                top_p=None,
                num_beams=1,
                max_new_tokens=NEW,
                use_cache=True,
            )
        text = tokenizer.batch_decode(output_ids, skip_special_tokens=True)[0].strip()
        found.append((text, slots_of(model, 1)[0]))
    expected = side.answers(ROWS, "--conv-mode", conv_mode)
    assert found == [(answer.text, answer.slots) for answer in expected]


def test_its_question_file(side, tmp_path):
    """The command reads it as it is, rows with two true domains and with none, and answers as without domains."""
    write_jsonl(tmp_path / "qa50.jsonl", med_rows())
    words = ["--model-path", side.path, "--question-file", tmp_path / "qa50.jsonl", "--image-folder", side.images]
    words += ["--model-base", side.base] if side.base else []
    words += ["--answers-file", tmp_path / "answers.jsonl", "--device", "cpu", "--max_new_tokens", NEW]
    model_vqa_loader.main([str(word) for word in words])
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in written] == [row["question_id"] for row in ROWS]
    assert [row["text"] for row in written] == side.texts(ROWS)


def test_its_chat_over_a_folder(side, capsys):
    """A fresh conversation for each picture, streamed, no ``image_sizes``, the template always Mistral's."""
    tokenizer, model, image_processor, _ = side.loaded
    rows = ROWS[:3]
    found = []
    for row in rows:
        (image,) = side.opened(row["image"])
        pictures = half(process_images([image], image_processor, model.config), model)
        input_ids = one_row(open_prompt("mistral_instruct", with_mark(model.config, row["text"])), tokenizer, model)
        with torch.inference_mode():
            output_ids = model.generate(
                input_ids,
                images=pictures,
                do_sample=False,
                temperature=0,
                max_new_tokens=NEW,
                streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
                use_cache=True,
            )
        found.append((tokenizer.decode(output_ids[0], skip_special_tokens=True).strip(), slots_of(model, 1)[0]))
    expected = side.answers(rows, "--conv-mode", "mistral_instruct")
    assert found == [(answer.text, answer.slots) for answer in expected]
