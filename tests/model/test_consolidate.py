"""LLaVA's ``consolidate`` and ``auto_upgrade``: whole checkpoints, and configs that say what they are."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_llava import write_base, write_stage

from llava.model import consolidate, saving
from llava.model.builder import load_pretrained_model
from llava.model.utils import auto_upgrade
from llava.utils import UserError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("consolidate") / "tiny-base")


def test_a_bin_checkpoint_becomes_one_of_safetensors(base, tmp_path, monkeypatch):
    source, target = tmp_path / "bins", tmp_path / "whole"
    shutil.copytree(base, source, ignore=shutil.ignore_patterns("model*"))
    state = {name: value.half() for name, value in load_file(base / "model.safetensors").items()}
    torch.save(state, source / "pytorch_model.bin")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    monkeypatch.setattr(sys, "argv", ["consolidate", "--src", str(source), "--dst", str(target)])
    consolidate.main()
    found = load_file(target / "model.safetensors")
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    assert load_pretrained_model(str(target), None, device="cpu")[2] is not None
    with pytest.raises(UserError, match="is there already"):
        consolidate.consolidate_ckpt(str(source), str(target))


def test_a_checkpoint_appears_with_its_card_or_not_at_all(base, tmp_path, monkeypatch):
    """Killed between the two, the same command said that it was there already, without a card."""

    def fail(*_):
        raise OSError("of the disk")

    with monkeypatch.context() as broken, pytest.raises(OSError, match="of the disk"):
        broken.setattr(saving, "write_merged_card", fail)
        consolidate.consolidate_ckpt(str(base), str(tmp_path / "whole"))
    assert list(tmp_path.iterdir()) == []
    consolidate.consolidate_ckpt(str(base), str(tmp_path / "whole"))
    assert (tmp_path / "whole" / "README.md").read_text().count("# whole\n") == 1


def test_slots_are_not_consolidated(base, tmp_path):
    stage = write_stage(tmp_path / "llava-tiny_abd", base, tasks=("abd",))
    with pytest.raises(UserError, match="holds slots"):
        consolidate.consolidate_ckpt(str(stage), str(tmp_path / "whole"))
    assert not (tmp_path / "whole").exists()


def old_config(folder, base, **values):
    """A checkpoint whose config says Llama, as the first LLaVA's did."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **values}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_auto_upgrade_asks_and_writes_llavas_model_type(base, tmp_path, monkeypatch):
    folder = old_config(tmp_path / "old", base)
    monkeypatch.setattr("builtins.input", lambda _: "n")
    with pytest.raises(UserError, match="left as it is"):
        auto_upgrade(str(folder))
    monkeypatch.setattr("builtins.input", lambda _: "Yes")
    auto_upgrade(str(folder))
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llava_llama" and config["architectures"] == ["LlavaLlamaForCausalLM"]


def test_auto_upgrade_leaves_others_alone(base, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked"))
    before = (base / "config.json").read_text()
    auto_upgrade(str(base))
    assert (base / "config.json").read_text() == before
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    torch.save({"model.embed_tokens.weight": torch.zeros(2, 2)}, plain / "pytorch_model.bin")
    auto_upgrade(str(plain))
    assert "llava" not in (plain / "config.json").read_text()
