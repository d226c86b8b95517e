"""How a stage sees pictures where the run's weights lie in parts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from tiny_llava import write_base
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel
from transformers.integrations import deepspeed

from llava.checkpoints.checkpoint import Checkpoint
from llava.model.builder import load_pretrained_model
from llava.train.stage_data import picture_source


class Zero3:
    """DeepSpeed's config as transformers asks for it while a model is read; of its engine there is nothing here."""

    def is_zero3(self):
        return True


def with_tower_apart(folder: Path) -> Path:
    """A base that names its tower, which lies in a folder of its own, as LLaVA-1.5 is published."""
    base, tower = write_base(folder / "tiny-llava-base"), folder / "clip-tower"
    state = load_file(base / "model.safetensors")
    save_file({key: value for key, value in state.items() if "vision_tower" not in key}, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    shape = CLIPVisionConfig(**config.pop("vision_config"))
    CLIPVisionModel(shape).save_pretrained(tower)
    size = {"height": shape.image_size, "width": shape.image_size}
    CLIPImageProcessorPil(size={"shortest_edge": shape.image_size}, crop_size=size).save_pretrained(tower)
    (base / "config.json").write_text(json.dumps({**config, "mm_vision_tower": str(tower)}))
    return base


def test_under_zero3_a_tower_in_a_folder_of_its_own_looks_at_pictures_whole(tmp_path):
    base = with_tower_apart(tmp_path)
    model = load_pretrained_model(str(base), None, device="cpu")[1]
    for weight in model.get_vision_tower().parameters():
        weight.ds_id = 0  # of weights in parts
    args = SimpleNamespace(use_cpu=True, bits=16, bf16=False, fp16=False)
    config = Zero3()
    deepspeed.set_hf_deepspeed_config(config)
    try:
        tower = picture_source(model, Checkpoint.open(base), SimpleNamespace(aspect_ratio="pad"), "", args)
        tower = tower.pictures.load_tower()
        assert deepspeed.is_deepspeed_zero3_enabled()  # what is read afterwards is in parts again
    finally:
        deepspeed.unset_hf_deepspeed_config()
    expected = load_file(tmp_path / "clip-tower" / "model.safetensors")
    found = {name.replace("vision_model.", ""): value for name, value in expected.items()}
    own = {name.replace("vision_model.", ""): value for name, value in tower.vision_tower.state_dict().items()}
    assert all(torch.equal(own[name], value) for name, value in found.items() if name in own) and len(own) > 20
    assert not any(hasattr(weight, "ds_id") for weight in tower.parameters())
