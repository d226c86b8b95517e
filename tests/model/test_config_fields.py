"""LLaVA's config fields are there to be read on every checkpoint, whatever its file says; a file's own value wins."""

import json

import pytest
from hf_llava import write_hf_model
from tiny_llava import write_base

from llava.model.builder import load_pretrained_model
from llava.model.convert import convert

# What LLaVA's own loader, evaluation scripts and workers, and programs written like them, read as attributes.
READ = {
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "mm_patch_merge_type": "flat",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 16,
    "image_aspect_ratio": "pad",
    "tokenizer_padding_side": "right",
    "tokenizer_model_max_length": None,
    "use_mm_proj": True,
    "tune_mm_mlp_adapter": False,
}


def read(folder):
    config = load_pretrained_model(str(folder), None, device="cpu")[1].config
    return {name: getattr(config, name) for name in READ}


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_fields_are_read_on_every_layout(tmp_path, family):
    write_hf_model(tmp_path / "hf", family)
    write_base(tmp_path / "base", family=family)
    convert(tmp_path / "hf", tmp_path / "converted", "from_hf")
    assert read(tmp_path / "hf") == read(tmp_path / "base") == read(tmp_path / "converted") == READ


def test_the_converter_writes_them_and_defaults_are_written_nowhere_else(tmp_path):
    write_hf_model(tmp_path / "hf", "mistral", anyres=True)
    convert(tmp_path / "hf", tmp_path / "converted", "from_hf")
    values = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert values["mm_use_im_start_end"] is values["mm_use_im_patch_token"] is False
    assert (values["mm_patch_merge_type"], values["tokenizer_padding_side"]) == ("spatial_unpad", "right")
    assert values["image_aspect_ratio"] == "anyres"
    write_base(tmp_path / "base")
    assert "mm_use_im_start_end" not in json.loads((tmp_path / "base" / "config.json").read_text())


def test_a_value_in_the_file_wins_and_survives_both_conversions(tmp_path):
    write_base(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mm_use_im_start_end": True}))
    convert(tmp_path / "base", tmp_path / "hf", "to_hf")
    convert(tmp_path / "hf", tmp_path / "back", "from_hf")
    for folder in ("base", "hf", "back"):
        assert read(tmp_path / folder)["mm_use_im_start_end"] is True
