"""Logits equal to transformers' own LLaVA classes, on models that transformers wrote; conversion there and back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_llava import PINPOINTS, TOKENS, hf_ids, pad, write_hf_model
from PIL import Image
from safetensors.torch import load_file
from tiny_llava import write_base, write_stage
from tiny_world import TASKS, World, fit, merge, write_sequence
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaProcessor,
)

from llava.checkpoints.checkpoint import Checkpoint
from llava.checkpoints.hf_layout import config_from_hf
from llava.data.labels import prompt_ids
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.convert import convert, grown
from llava.model.vision.features import load_vision_tower
from llava.utils import UserError

FAMILIES = ("llama", "mistral")
ROOT = Path(__file__).resolve().parents[2]
PROMPTS = (
    "USER: <image>\nis there a lesion ASSISTANT:",
    "USER: <image>\n<image>\nwhere is the lesion in the left lung ASSISTANT:",
    "USER: what side ASSISTANT:",
)


@pytest.fixture(scope="module", params=FAMILIES)
def written(request, tmp_path_factory):
    """A folder that transformers wrote, its model, and the model our loader makes of it, directly and converted."""
    folder = tmp_path_factory.mktemp("hf") / f"tiny-{request.param}"
    theirs = write_hf_model(folder, request.param)
    converted = folder.with_name(f"llava-tiny-{request.param}")
    convert(folder, converted, "from_hf")
    ours = {
        name: load_pretrained_model(str(place), None, device="cpu")
        for name, place in (("direct", folder), ("converted", converted))
    }
    return {"family": request.param, "folder": folder, "converted": converted, "theirs": theirs, "ours": ours}


def random_pictures(count, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def their_logits(model, rows, pictures, side, tokens=TOKENS, **more):
    """Logits of real positions, row by row, from transformers' class."""
    ids, mask = pad([hf_ids(row, model.config.image_token_index, tokens) for row in rows], side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=pictures, **more)
    return [logits[keep.bool()] for logits, keep in zip(out.logits, mask, strict=True)]


@torch.inference_mode()
def our_logits(model, rows, images, side, **more):
    """The same from ours; its own padding follows ``tokenizer_padding_side``."""
    ids, mask = pad(rows, side)
    model.config.tokenizer_padding_side = side
    out = model(input_ids=ids, attention_mask=mask.bool(), images=images, **more).logits
    lengths = [len(hf_ids(row, 0, more.pop("tokens", TOKENS))) for row in rows]
    return [row[-length:] if side == "left" else row[:length] for row, length in zip(out, lengths, strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("way", ["direct", "converted"])
def test_logits_equal_transformers_for_mixed_batches(written, way, side):
    tokenizer, model, *_ = written["ours"][way]
    rows = [tokenizer_image_token(prompt, tokenizer) for prompt in PROMPTS]
    pictures = random_pictures(3)
    expected = their_logits(written["theirs"], rows, pictures, side)
    found = our_logits(model, rows, [pictures[0], pictures[1:], None], side)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4, rtol=0), (mine - theirs).abs().max()
    assert max(theirs.abs().max() for theirs in expected) > 1  # not a comparison of zeros


def test_greedy_answers_equal_transformers(written):
    tokenizer, model, *_ = written["ours"]["direct"]
    rows = [tokenizer_image_token(prompt, tokenizer) for prompt in PROMPTS[:2]]
    pictures, theirs = random_pictures(3, seed=1), written["theirs"]
    ids, mask = pad(rows, "left")
    images = [pictures[0], pictures[1:]]
    found = model.generate(ids, attention_mask=mask, images=images, max_new_tokens=6, do_sample=False, pad_token_id=0)
    full, full_mask = pad([hf_ids(row, theirs.config.image_token_index) for row in rows], "left")
    expected = theirs.generate(
        input_ids=full,
        attention_mask=full_mask,
        pixel_values=pictures,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )
    assert found.tolist() == expected[:, full.shape[1] :].tolist()


def test_the_decoder_is_the_one_the_config_names(written):
    _, model, *_ = written["ours"]["converted"]
    assert written["family"] in type(model).__name__.lower()
    assert model.config.model_type == f"llava_{written['family']}"


def test_the_vision_tower_can_be_had_alone(written):
    tower, pictures = load_vision_tower(written["folder"]), random_pictures(2)
    expected = written["theirs"].model.vision_tower(pictures, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.allclose(tower(pictures), expected, atol=1e-5)


def test_a_converted_checkpoint_goes_back_to_equal_tensors(written, tmp_path):
    convert(written["converted"], tmp_path / "back", "to_hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (written["folder"], tmp_path / "back"))
    before = {key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in before.items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_model_loaded_from_their_layout_saves_in_ours(written, tmp_path):
    _, model, *_ = written["ours"]["direct"]
    model.save_pretrained(tmp_path)
    assert "model.mm_projector.0.weight" in Checkpoint.open(tmp_path).tensor_files
    assert not [
        key for key in Checkpoint.open(tmp_path).tensor_files if "multi_modal" in key or "language_model" in key
    ]


def test_our_checkpoint_opens_in_transformers_with_equal_logits(tmp_path):
    """Also through their processor: prompt and picture in, the same logits out."""
    write_base(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "to_hf")
    theirs, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokenizer, model, image_processor, _ = load_pretrained_model(str(tmp_path / "ours"), None, device="cpu")
    settings = json.loads((tmp_path / "theirs" / "processor_config.json").read_text())
    processor = LlavaProcessor(
        LlavaImageProcessorPil.from_pretrained(tmp_path / "theirs"),
        AutoTokenizer.from_pretrained(tmp_path / "theirs"),
        **{name: value for name, value in settings.items() if name != "processor_class"},
    )
    picture = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
    batch = processor(images=picture, text=PROMPTS[0], return_tensors="pt")
    with torch.inference_mode():
        expected = theirs.eval()(**batch).logits[0]
    pixels = process_images([picture], image_processor, model.config)
    assert torch.allclose(pixels, batch["pixel_values"], atol=1e-6)  # letter-boxed alike
    found = our_logits(model, [tokenizer_image_token(PROMPTS[0], tokenizer)], pixels, "right")[0]
    vocabulary = found.shape[1]
    assert torch.allclose(found, expected[:, :vocabulary], atol=1e-4, rtol=0)
    assert (expected.argmax(-1) < vocabulary).all()  # the added row never wins


@pytest.fixture(scope="module")
def anyres(tmp_path_factory):
    folder = tmp_path_factory.mktemp("next") / "tiny-next"
    return write_hf_model(folder, "mistral", anyres=True), load_pretrained_model(str(folder), None, device="cpu")


@pytest.mark.parametrize("size", [(32, 20), (20, 32), (30, 30), (60, 16)])
def test_anyres_tiles_merge_as_in_transformers(anyres, size):
    """LLaVA-1.6: overview and tiles, letter-box cut away, a newline after each row."""
    theirs, (tokenizer, model, image_processor, _) = anyres
    picture = Image.radial_gradient("L").resize(size).convert("RGB")
    tiles = process_images([picture], image_processor, model.config)  # [1, tiles, 3, 16, 16]
    ids = tokenizer_image_token(PROMPTS[0], tokenizer)
    sizes = torch.tensor([[size[1], size[0]]])
    with torch.inference_mode():
        features = model.project_features(model.vision_features(list(tiles)), [size])[0][0]
        expected = theirs.model.get_image_features(tiles, sizes).pooler_output[0]
        assert features.shape == expected.shape
        assert torch.allclose(features, expected, atol=1e-4)
        mine = model(input_ids=torch.tensor([ids]), images=list(tiles), image_sizes=[size]).logits
        full = torch.tensor([hf_ids(ids, theirs.config.image_token_index, len(features))])
        logits = theirs(input_ids=full, pixel_values=tiles, image_sizes=sizes).logits
    assert torch.allclose(mine, logits, atol=1e-4)


def test_their_anyres_processor_makes_the_same_tiles(anyres):
    size = {"height": 16, "width": 16}
    theirs = LlavaNextImageProcessorPil(size={"shortest_edge": 16}, crop_size=size, image_grid_pinpoints=PINPOINTS)
    _, (_, model, image_processor, _) = anyres
    picture = Image.linear_gradient("L").resize((32, 16)).convert("RGB")
    mine = process_images([picture], image_processor, model.config)[0]
    expected = theirs(picture, return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(mine, expected, atol=1e-5)


def test_an_anyres_checkpoint_opens_in_transformers_again(anyres, tmp_path):
    theirs, (tokenizer, model, _, _) = anyres
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "to_hf")
    again, report = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert again.config.image_grid_pinpoints == theirs.config.image_grid_pinpoints
    expected = theirs.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())
    picture = Image.radial_gradient("L").resize((32, 20)).convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "is there a lesion"}]
    processor = AutoProcessor.from_pretrained(tmp_path / "theirs")
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    ids = processor.apply_chat_template([{"role": "user", "content": content}], **options)["input_ids"][0]
    wanted = prompt_ids("is there a lesion", tokenizer, "mistral_instruct", True)
    tokens = ids.count(again.config.image_token_index)
    assert tokens > TOKENS and ids == hf_ids(wanted, again.config.image_token_index, tokens)


def test_head_rows_added_for_the_image_token_never_win():
    head = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    logits = torch.randn(1000, 8, generator=torch.Generator().manual_seed(1)) @ grown(head, 53).T
    assert logits.shape[1] == 53
    assert (logits.argmax(1) < 50).all()


@pytest.mark.slow
def test_the_command_line_names_what_is_wrong(tmp_path):
    write_base(tmp_path / "ours")
    script = [sys.executable, str(ROOT / "scripts" / "convert_llava_weights.py"), "--source", str(tmp_path / "ours")]
    done = subprocess.run([*script, "--direction", "from_hf", "--target", str(tmp_path / "x")], capture_output=True)
    assert done.returncode == 2
    assert b"layout already" in done.stderr and b"Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


def test_published_fields_become_llavas():
    """llava-hf/llava-1.5-7b-hf says little; the rest are transformers' defaults."""
    values = config_from_hf(
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": 32000,
            "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
                            "torch_dtype": "float16", "vocab_size": 32064},
            "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336,
                              "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
                              "patch_size": 14, "projection_dim": 768, "vocab_size": 32000},
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        }
    )  # fmt: skip
    expected = {"hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 32064, "rms_norm_eps": 1e-5}
    expected |= {"mm_hidden_size": 1024, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    expected |= {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "image_aspect_ratio": "pad"}
    expected |= {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu"}
    assert {key: values[key] for key in expected} == expected
    for change, message in (
        ({"text_config": {"model_type": "qwen2"}}, "qwen2"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "siglip"),
        ({"vision_feature_layer": [-2, -5]}, "one layer"),
        ({"multimodal_projector_bias": False}, "not two linear layers"),
    ):
        with pytest.raises(UserError, match=message):
            config_from_hf({"architectures": ["LlavaForConditionalGeneration"], **change})


def test_what_the_other_layout_has_no_word_for_is_refused(tmp_path):
    write_base(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps({**config, "mm_projector_type": "linear"}))
    with pytest.raises(UserError, match="mlp2x_gelu only"):
        convert(tmp_path / "ours", tmp_path / "theirs", "to_hf")


def test_slots_are_not_lost_on_the_way(tmp_path):
    base = write_base(tmp_path / "base")
    load_pretrained_model(str(write_stage(tmp_path / "llava-s", base)), None, device="cpu")[1].save_pretrained(
        tmp_path / "whole"
    )
    for folder in ("llava-s", "whole"):
        with pytest.raises(UserError, match="export each task|no config"):
            convert(tmp_path / folder, tmp_path / "hf", "to_hf")


def test_the_whole_pipeline_runs_on_their_layout(written, tmp_path):
    """Keys, slots and answers over a checkpoint that transformers wrote, nothing converted."""
    base, sequence = written["folder"], write_sequence(tmp_path, TASKS[:2])
    for task in TASKS[:2]:
        fit(tmp_path, base, sequence, task)
    world = World(tmp_path, base, sequence, merge(tmp_path, sequence))
    assert world.train("abd", tmp_path / "llava-hf_abd").task("abd").trained
    tokenizer, model, *_ = load_pretrained_model(str(tmp_path / "llava-hf_abd"), None, device="cpu")
    ids = torch.tensor([tokenizer_image_token(PROMPTS[0], tokenizer)])
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    output = model.generate(ids, images=random_pictures(1), questions=["is there a lesion"], **options)
    assert output.shape[1] <= 2 and model.last_route.describe(0)["task"] == "abd"
