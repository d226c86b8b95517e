"""LLaVA's evaluation loops: ``model_vqa``, ``model_vqa_loader``, ``model_vqa_science``, ``model_vqa_mmbench``.

The loops as their own programs write them; that this package's commands of the same names give the same answers is
tested where those lie (``tests/eval``).
"""

from __future__ import annotations

import base64
import json
import math
import os

import pandas as pd
import pytest
import torch
from clients.room import NEW, ROWS, TEXT_ONLY, half, one_row, open_prompt, slots_of, with_mark
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, conv_templates
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    get_model_name_from_path,
    load_image_from_base64,
    process_images,
    tokenizer_image_token,
)
from llava.model.builder import load_pretrained_model
from llava.utils import disable_torch_init

GREEDY = {"do_sample": False, "temperature": 0, "top_p": None, "num_beams": 1, "max_new_tokens": NEW}
SAMPLED = {"do_sample": True, "temperature": 0.2, "max_new_tokens": NEW}


def load(side):
    disable_torch_init()
    model_path = os.path.expanduser(str(side.path))
    model_name = get_model_name_from_path(model_path)
    return load_pretrained_model(model_path, None if side.base is None else str(side.base), model_name)


def decoded(tokenizer, output_ids):
    return tokenizer.batch_decode(output_ids, skip_special_tokens=True)[0].strip()


def pairs(answers):
    return [(answer.text, answer.slots) for answer in answers]


def test_model_vqa(side, tmp_path):
    """One question after the other from a JSONL file."""
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer, model, image_processor, _ = load(side)
    found = []
    for line in (tmp_path / "question.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = open_prompt(side.template, with_mark(model.config, row["text"]))
        input_ids = one_row(prompt, tokenizer, model)
        image = Image.open(os.path.join(side.images, row["image"])).convert("RGB")
        image_tensor = process_images([image], image_processor, model.config)[0]
        with torch.inference_mode():
            output_ids = model.generate(
                input_ids,
                images=image_tensor.unsqueeze(0).half().to(model.device),
                image_sizes=[image.size],
                use_cache=True,
                **GREEDY,
            )
        found.append((decoded(tokenizer, output_ids), slots_of(model, 1)[0]))
    assert found == pairs(side.answers(ROWS))


class Questions(Dataset):
    """What the loader of ``model_vqa_loader`` reads in its worker."""

    def __init__(self, rows, image_folder, tokenizer, image_processor, model_config, conv_mode):
        self.rows, self.image_folder, self.tokenizer = rows, image_folder, tokenizer
        self.image_processor, self.model_config, self.conv_mode = image_processor, model_config, conv_mode

    def __getitem__(self, index):
        row = self.rows[index]
        prompt = open_prompt(self.conv_mode, with_mark(self.model_config, row["text"]))
        image = Image.open(os.path.join(self.image_folder, row["image"])).convert("RGB")
        image_tensor = process_images([image], self.image_processor, self.model_config)[0]
        input_ids = tokenizer_image_token(prompt, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        return input_ids, image_tensor, image.size

    def __len__(self):
        return len(self.rows)


def collate(batch):
    input_ids, image_tensors, image_sizes = zip(*batch)
    return torch.stack(input_ids, dim=0), torch.stack(image_tensors, dim=0), image_sizes


@pytest.mark.parametrize("beams", [1, 2])
def test_model_vqa_loader(side, beams):
    """A ``DataLoader`` of batch size 1; ``image_sizes`` is a tuple of tuples."""
    tokenizer, model, image_processor, _ = side.loaded
    rows = Questions(ROWS, side.images, tokenizer, image_processor, model.config, side.template)
    found = []
    for input_ids, image_tensor, image_sizes in DataLoader(rows, batch_size=1, num_workers=0, collate_fn=collate):
        with torch.inference_mode():
            output_ids = model.generate(
                input_ids.to(device=model.device, non_blocking=True),
                images=image_tensor.to(dtype=torch.float16, device=model.device, non_blocking=True),
                image_sizes=image_sizes,
                use_cache=True,
                **GREEDY | {"num_beams": beams},
            )
        found.append((decoded(tokenizer, output_ids), slots_of(model, 1)[0]))
    assert found == pairs(side.answers(ROWS, "--num_beams", beams))


SCIENCE = tuple(
    {"id": str(row["question_id"]), "image": row["image"], "conversations": [{"from": "human", "value": value}]}
    for row, value in zip(ROWS, [f"{ROWS[0]['text']}\n<image>", f"<image>\n{ROWS[1]['text']}"])
) + ({"id": "text", "conversations": [{"from": "human", "value": TEXT_ONLY}]},)


@pytest.mark.parametrize("conv_mode", ["llava_v0", "own"])
def test_model_vqa_science(side, conv_mode):
    """Instruct rows, some of them text alone; sampled; a stopping criterion where the template is ``v0``."""
    tokenizer, model, image_processor, _ = side.loaded
    template = side.template if conv_mode == "own" else conv_mode
    found = []
    for number, line in enumerate(SCIENCE):
        question = line["conversations"][0]["value"].replace("<image>", "").strip()
        if "image" in line:
            image = Image.open(os.path.join(side.images, line["image"]))
            image_tensor = image_processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
            images, question = image_tensor.unsqueeze(0).half().to(model.device), with_mark(model.config, question)
        else:
            images = None
        conv = conv_templates[template].copy()
        input_ids = one_row(open_prompt(template, question), tokenizer, model)
        stop = conv.sep if conv.sep_style != SeparatorStyle.TWO else conv.sep2
        criteria = [KeywordsStoppingCriteria([stop], tokenizer, input_ids)] if conv.version == "v0" else None
        torch.manual_seed(number)
        with torch.inference_mode():
            output_ids = model.generate(input_ids, images=images, use_cache=True, stopping_criteria=criteria, **SAMPLED)
        text = decoded(tokenizer, output_ids)
        found.append((text.removesuffix(stop).strip() if stop else text, slots_of(model, 1)[0]))
    flags = ["--conv-mode", template, "--temperature", 0.2, "--batch-size", 1, "--image_aspect_ratio", "square"]
    assert found == pairs(side.answers(SCIENCE, *flags))


LETTER = "Answer with the option's letter from the given choices directly."
OPTIONS = ("A", "B", "C", "D")
BENCH = [
    {"index": 241, "question": "what side", "hint": "look at the lung", "A": "left", "B": "right", "C": "both"},
    {"index": 252, "question": "is there a lesion", "hint": math.nan, "A": "yes", "B": "no"},
]


def missing(value):
    return value is None or (isinstance(value, float) and math.isnan(value)) or str(value).lower() in ("nan", "none")


@pytest.mark.parametrize("all_rounds", [False, True])
def test_model_vqa_mmbench(side, tmp_path, all_rounds):
    """A table with pictures in base64; options in rotation; the picture as it was opened, not converted."""
    for row, name in zip(BENCH, ["chest1.png", "head2.png"], strict=True):
        row["image"] = base64.b64encode((side.images / name).read_bytes()).decode()
    pd.DataFrame(BENCH).to_csv(tmp_path / "bench.tsv", sep="\t", index=False)
    tokenizer, model, image_processor, _ = side.loaded
    found, asked = [], []
    for _, row in pd.read_table(tmp_path / "bench.tsv").iterrows():
        options = [row[letter] for letter in OPTIONS if letter in row and not missing(row[letter])]
        for _ in range(len(options) if all_rounds else 1):
            image = load_image_from_base64(row["image"])
            question = row["question"] if missing(row["hint"]) else f"{row['hint']}\n{row['question']}"
            for letter, option in zip(OPTIONS, options, strict=False):
                question = f"{question}\n{letter}. {option}"
            query = f"{with_mark(model.config, question)}\n{LETTER}"
            input_ids = one_row(open_prompt(side.template, query), tokenizer, model)
            image_tensor = process_images([image], image_processor, model.config)[0]
            with torch.inference_mode():
                output_ids = model.generate(
                    input_ids,
                    images=image_tensor.unsqueeze(0).half().to(model.device),
                    image_sizes=[image.size],
                    use_cache=True,
                    **GREEDY,
                )
            found.append((decoded(tokenizer, output_ids), slots_of(model, 1)[0]))
            name = "chest1.png" if row["index"] == 241 else "head2.png"
            asked.append({"question_id": len(asked), "image": name, "text": f"{question}\n{LETTER}"})
            options = options[1:] + options[:1]
    assert found == pairs(side.answers(asked)) and len(found) == (5 if all_rounds else 2)


def test_a_batch_of_two_as_one_by_one(side):
    """What users write when they batch LLaVA's loop: left padding, a mask, one picture a prompt."""
    tokenizer, model, image_processor, _ = side.loaded
    found = []
    for start in range(0, 4, 2):
        rows = ROWS[start : start + 2]
        prompts = [open_prompt(side.template, with_mark(model.config, row["text"])) for row in rows]
        ids = [tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt") for prompt in prompts]
        longest = max(map(len, ids))
        padded = torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in ids]).to(model.device)
        images = side.opened(*(row["image"] for row in rows))
        pictures = half(process_images(images, image_processor, model.config), model)
        with torch.inference_mode():
            output_ids = model.generate(
                padded,
                attention_mask=padded.ne(0),
                images=pictures,
                image_sizes=[image.size for image in images],
                use_cache=True,
                **GREEDY,
            )
        texts = tokenizer.batch_decode(output_ids, skip_special_tokens=True)
        found += zip([text.strip() for text in texts], slots_of(model, 2), strict=True)
    assert found == pairs(side.answers(ROWS[:4]))
