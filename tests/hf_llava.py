"""Tiny random LLaVA models written by transformers' own classes: the outside check of the loader's fidelity."""

import torch
from tiny_llava import make_tokenizer
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
)

PIXELS, PATCH = 16, 8
TOKENS = (PIXELS // PATCH) ** 2
TEXT_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig}
PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def make_hf_tokenizer():
    """The tiny tokenizer with the ``<image>`` token that Hugging Face's prompts hold."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def make_hf_model(family="llama", anyres=False, seed=0):
    """A random ``LlavaForConditionalGeneration`` (``LlavaNext…`` with ``anyres``) in fp32."""
    tokenizer = make_hf_tokenizer()
    text = TEXT_CONFIGS[family](
        vocab_size=len(tokenizer) + 3,  # published models have spare rows too
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        initializer_range=0.3,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=PIXELS,
        patch_size=PATCH,
        projection_dim=8,
    )
    more = {"image_grid_pinpoints": PINPOINTS} if anyres else {"image_seq_length": TOKENS}
    config_class = LlavaNextConfig if anyres else LlavaConfig
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = config_class(vision_config=vision, text_config=text, image_token_index=image_token, **more)
    torch.manual_seed(seed)
    model = (LlavaNextForConditionalGeneration if anyres else LlavaForConditionalGeneration)(config).eval()
    if anyres:
        torch.nn.init.normal_(model.model.image_newline)
    return model


def write_hf_model(folder, family="llama", anyres=False):
    """Save such a model with tokenizer and image processor; returns the model."""
    model = make_hf_model(family, anyres)
    model.save_pretrained(folder)
    make_hf_tokenizer().save_pretrained(folder)
    size = {"height": PIXELS, "width": PIXELS}
    CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=size).save_pretrained(folder)
    return model


def hf_ids(ids, image_token, tokens=TOKENS):
    """LLaVA's ids with one placeholder a picture, as Hugging Face wants them: one placeholder a feature."""
    result = []
    for token in ids:
        result += [image_token] * tokens if token == -200 else [token]
    return result


def pad(rows, side, fill=0):
    """``[batch, longest]`` ids and mask, padded on ``side``."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), fill)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return ids, mask
