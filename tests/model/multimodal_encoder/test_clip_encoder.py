"""A tower in a folder of its own has every weight from its files, or is refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llava import PIXELS, write_base
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ViTConfig,
    ViTModel,
)

from llava.model.builder import load_pretrained_model, load_vision_tower
from llava.utils import UserError

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": PIXELS,
    "patch_size": 8,
}


@pytest.fixture
def bare(tmp_path):
    """A LLaVA checkpoint without its tower; call it with a tower's folder to name that one."""
    folder = write_base(tmp_path / "bare")
    state = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in state.items() if "vision_tower" not in key}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config.pop("vision_config")

    def naming(tower):
        size = {"height": PIXELS, "width": PIXELS}
        CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=size).save_pretrained(tower)
        (folder / "config.json").write_text(json.dumps({**config, "mm_vision_tower": str(tower)}))
        return folder

    return naming


@pytest.fixture
def whole(tmp_path):
    torch.manual_seed(3)
    CLIPVisionModel(CLIPVisionConfig(**SHAPE)).save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def altered(whole, change):
    """A copy of the tower with other tensors: ``change`` takes and gives a state."""
    folder = shutil.copytree(whole, whole.with_name("altered"))
    state = change(load_file(whole / "model.safetensors"))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def features(folder, alone=False):
    pixels = torch.rand(1, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))
    if alone:
        return load_vision_tower(folder)(pixels)
    return load_pretrained_model(str(folder), None, device="cpu")[1].get_vision_tower()(pixels)


def test_a_whole_tower_gives_the_same_features_at_every_load(bare, whole):
    folder = bare(whole)
    first = features(folder)
    torch.manual_seed(9)
    assert torch.equal(first, features(folder)) and torch.equal(first, features(folder, alone=True))


def test_the_vision_half_of_a_whole_clip_is_a_whole_tower(bare, tmp_path):
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPModel(CLIPConfig(vision_config=SHAPE, text_config=text, projection_dim=8)).save_pretrained(tmp_path / "clip")
    folder = bare(tmp_path / "clip")
    assert torch.equal(features(folder), features(folder, alone=True))


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: {key: value for key, value in state.items() if "layers.0" not in key}, r"lacks 16 tensors"),
        (lambda state: {f"module.{key}": value for key, value in state.items()}, r"lacks 39 tensors"),
    ],
    ids=["cut", "renamed"],
)
def test_missing_tensors_are_not_made_up(bare, whole, change, said, alone):
    folder = bare(altered(whole, change))
    with pytest.raises(
        UserError, match=rf"vision tower .*altered' {said}, among them .*layers.0.*; copy the whole tower"
    ):
        features(folder, alone)


def test_tensors_of_another_shape(bare, whole):
    folder = bare(altered(whole, lambda state: {key: value[..., :3].clone() for key, value in state.items()}))
    with pytest.raises(UserError, match=r"altered': tensors don't have the shapes that its config.json asks for"):
        features(folder)


@pytest.mark.parametrize("alone", [False, True])
def test_another_kind_of_tower_is_named(bare, tmp_path, alone):
    ViTModel(ViTConfig(**SHAPE)).save_pretrained(tmp_path / "vit")
    folder = bare(tmp_path / "vit")
    known = "clip, dinov2, dinov2_with_registers, efficientnet_lite, siglip"
    with pytest.raises(UserError, match=rf"vit' is a 'vit', and the towers known are {known}; name one"):
        features(folder, alone)


def test_two_sets_of_tower_weights(bare, whole):
    state = load_file(whole / "model.safetensors")
    save_file(state, whole / "model-00001-of-00001.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="whole holds two sets of weights"):
        features(bare(whole))


def test_a_tower_that_is_not_there(bare, tmp_path):
    folder = bare(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(UserError, match=r"vision tower .*gone' cannot be read .*mm_vision_tower"):
        features(folder)
