"""What LLaVA's own training begins with, tiny: a language model, a vision tower, rows; and the command's flags."""

import json

import torch
from tiny_llava import PIXELS, make_tokenizer, write_images
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

DECODERS = {"llama": (LlamaConfig, LlamaForCausalLM), "mistral": (MistralConfig, MistralForCausalLM)}
TOWER_LAYERS = 2


def write_parts(folder, family="llama", seed=0, **config):
    """``vicuna`` (a language model), ``clip`` (a tower), ``images``, ``align.json`` and ``instruct.json``, which has
    rows without pictures too; returns the folder."""
    tokenizer = make_tokenizer()
    config_class, model_class = DECODERS[family]
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"max_position_embeddings": 512, "pad_token_id": 0, "initializer_range": 0.3, "num_key_value_heads": 1}
    decoder = config_class(vocab_size=len(tokenizer), **{**sizes, **more, **config})
    model_class(decoder).save_pretrained(folder / "vicuna")
    tokenizer.save_pretrained(folder / "vicuna")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": TOWER_LAYERS, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(image_size=PIXELS, patch_size=8, **sizes)).save_pretrained(folder / "clip")
    size = {"height": PIXELS, "width": PIXELS}
    CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=size).save_pretrained(folder / "clip")
    write_images(folder / "images", [f"{number}.png" for number in range(5)])
    pictured = [{**_talk(number, "<image>\nis there a lesion?"), "image": f"{number % 5}.png"} for number in range(10)]
    blind = [_talk(10 + number, f"what is {number}?") for number in range(6)]
    (folder / "instruct.json").write_text(json.dumps(pictured + blind), encoding="utf-8")
    captions = [{**row, "conversations": row["conversations"][:2]} for row in pictured]
    (folder / "align.json").write_text(json.dumps(captions), encoding="utf-8")
    return folder


def _talk(number, question):
    answers = ("yes", "no", "left", "right")
    turns = [("human", question), ("gpt", answers[number % 4]), ("human", "what side?"), ("gpt", answers[number % 3])]
    return {"id": number, "conversations": [{"from": who, "value": text} for who, text in turns]}


def stage_words(parts, stage, data, *more):
    """The command line of one of LLaVA's stages, as words; later ones win."""
    words = ["--model_name_or_path", parts / "vicuna", "--vision_tower", parts / "clip", "--output_dir", stage]
    words += ["--data_path", parts / data, "--image_folder", parts / "images", "--mm_projector_type", "mlp2x_gelu"]
    words += ["--mm_vision_select_layer", -2, "--mm_use_im_patch_token", "False", "--model_max_length", 256]
    words += ["--max_steps", 3, "--per_device_train_batch_size", 4, "--learning_rate", "1e-3", "--use_cpu", "True"]
    words += ["--save_strategy", "no", "--logging_steps", 1, "--report_to", "none", "--disable_tqdm", "True"]
    return [str(word) for word in [*words, *more]]


def trained_names(state, parts):
    """Names of a LLaVA's weights that belong to some of ``decoder``, ``head``, ``projector`` and ``tower``.

    Of the tower those up to the layer that is looked at, the last but one.
    """
    behind = (f"layers.{TOWER_LAYERS - 1}.", "post_layernorm")

    def part(name):
        if "vision_tower" in name:
            return None if any(word in name for word in behind) else "tower"
        return "projector" if "mm_projector" in name else "head" if name.startswith("lm_head") else "decoder"

    return {name for name in state if part(name) in parts}
