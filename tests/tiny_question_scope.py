"""A tiny random model whose offsets act behind the picture alone, and rows that it is asked."""

from __future__ import annotations

import torch
from tiny_llava import FAMILIES, HIDDEN, PIXELS, VISION
from transformers import CLIPVisionConfig

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.language_model.retriever import Retriever
from llava.padding import pad
from llava.slots.offsets import target_features
from llava.slots.pool import Pool
from llava.slots.settings import RetrieverSettings

WORDS, PATCHES, SLOTS, TOP_K = 60, (PIXELS // 8) ** 2, 4, 2
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
PICTURE = [IMAGE_TOKEN_INDEX]
HEAD = [1, 7, 8]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
ROWS = {
    "one": HEAD + PICTURE + [9, 10, 11],
    "longer": HEAD + PICTURE + [12, 13, 14, 15, 16, 17],
    "two": HEAD + PICTURE + [18] + PICTURE + [19, 20, 25],
    "none": [1, 21, 22, 23, 24],
}
NAMES = {"one": ("a.png",), "longer": ("b.png",), "two": ("a.png", "b.png"), "none": ()}


def make_model(scope="question", family="llama", **fields):
    """A random model in float64 with one trained task of slots on several projections."""
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=VISION, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=PIXELS,
        patch_size=8,
    )  # fmt: skip
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=WORDS, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, vision_config=tower.to_dict(), mm_hidden_size=VISION, mm_projector_type="linear",
    )  # fmt: skip
    model = model_class(config).eval().requires_grad_(False).double()
    settings = RetrieverSettings(
        num_layers=2, features={target: target_features(config, target) for target in TARGETS}, text_dim=8,
        query_mode="text", rank=2, top_k=TOP_K, router="keys", offset_scope=scope, **fields,
    )  # fmt: skip
    pool = Pool(settings)
    task = pool.append("abd", SLOTS)
    task.text_keys.normal_()
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.normal_(std=0.3)
    task.trained = True
    model.attach_adapter(Retriever(pool))
    model.retriever.double()
    return model


def picture(file):
    return torch.randn(3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(ord(file[0])))


def batch_of(*names, side="right", labels=False, seed=0):
    """Rows, their pictures and queries; with ``labels`` the last two words of each are answers."""
    rows = [torch.tensor(ROWS[name]) for name in names]
    ids, mask = pad(rows, side)
    generator = torch.Generator().manual_seed(seed)
    pictures = [[picture(file).double() for file in NAMES[name]] for name in names]
    batch = {"input_ids": ids, "attention_mask": mask.long(), "images": pictures}
    batch["text_query"] = torch.randn(len(rows), 8, generator=generator).double()
    if labels:
        known = [torch.cat([torch.full_like(row[:-2], IGNORE_INDEX), row[-2:]]) for row in rows]
        batch["labels"] = pad(known, side, IGNORE_INDEX)[0]
    return batch


def spliced_length(name):
    return len(ROWS[name]) + ROWS[name].count(IMAGE_TOKEN_INDEX) * (PATCHES - 1)


def head_length(name):
    """Positions up to the end of a row's last picture."""
    if IMAGE_TOKEN_INDEX not in ROWS[name]:
        return 0
    return spliced_length(name) - ROWS[name][::-1].index(IMAGE_TOKEN_INDEX)
