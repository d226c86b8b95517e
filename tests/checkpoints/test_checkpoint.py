"""A checkpoint folder is read once and then known, and everyone who reads it reads the same tensors."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llava import write_base

from llava.checkpoints import weights
from llava.checkpoints.checkpoint import Checkpoint
from llava.model.builder import load_pretrained_model, load_vision_tower
from llava.model.configs import llava_config
from llava.slots.encoders import read_embedding_table
from llava.utils import UserError

EMBEDDINGS, NORM = "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    """Two checkpoints of one shape with other weights, as states."""
    folder = tmp_path_factory.mktemp("saves")
    return {name: write_base(folder / name, seed=seed) for seed, name in enumerate(("old", "new"))}


def state_of(folder):
    return load_file(folder / "model.safetensors")


def folder_without_weights(saves, folder):
    shutil.copytree(saves["new"], folder, ignore=shutil.ignore_patterns("model*"))
    return folder


def write_single(folder, state, ending):
    if ending == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", {"format": "pt"})


def write_shards(folder, state, ending):
    stem, names, weight_map = "pytorch_model" if ending == "bin" else "model", sorted(state), {}
    for half in (0, 1):
        part, file = {key: state[key] for key in names[half::2]}, f"{stem}-0000{half + 1}-of-00002.{ending}"
        torch.save(part, folder / file) if ending == "bin" else save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load(folder):
    return load_pretrained_model(str(folder), None, device="cpu")[1]


OPENERS = {
    "model": load,
    "tower": load_vision_tower,
    "text queries": read_embedding_table,
    "fingerprint": weights.fingerprint,
}


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("opener", OPENERS)
def test_a_single_file_beside_the_shards_of_another_save_is_refused_wherever_it_is_opened(
    saves, tmp_path, ending, opener
):
    """The model was made of the single file, keys and extraction of the shards."""
    folder = folder_without_weights(saves, tmp_path / "mixed")
    write_shards(folder, state_of(saves["old"]), ending)
    write_single(folder, state_of(saves["new"]), ending)
    with pytest.raises(UserError, match=rf"mixed holds two sets .*model.{ending} and .*-00001-of-00002.{ending} both"):
        OPENERS[opener](folder)


@pytest.mark.parametrize("others", [write_single, write_shards])
@pytest.mark.parametrize("own", [write_single, write_shards])
def test_safetensors_beside_bin_is_what_everyone_reads(saves, tmp_path, own, others):
    folder, state = folder_without_weights(saves, tmp_path / "both"), state_of(saves["new"])
    own(folder, state, "safetensors")
    others(folder, state_of(saves["old"]), "bin")
    assert torch.equal(read_embedding_table(folder), state[EMBEDDINGS])
    assert torch.equal(load(folder).get_input_embeddings().weight, state[EMBEDDINGS])
    assert {file.suffix for file in Checkpoint.open(folder).tensor_files.values()} == {".safetensors"}


def test_an_index_that_outlived_its_shards_changes_nothing(saves, tmp_path):
    folder, state = folder_without_weights(saves, tmp_path / "merged"), state_of(saves["new"])
    write_shards(folder, state, "safetensors")
    for shard in folder.glob("model-*"):
        shard.unlink()
    with pytest.raises(UserError, match=r"index.json names model-00001-of-00002.safetensors, which is not there"):
        read_embedding_table(folder)
    write_single(folder, state, "safetensors")
    assert torch.equal(read_embedding_table(folder), state[EMBEDDINGS])
    assert torch.equal(load(folder).get_input_embeddings().weight, state[EMBEDDINGS])


def test_shards_without_their_index(saves, tmp_path):
    folder, state = folder_without_weights(saves, tmp_path / "lost"), state_of(saves["new"])
    write_shards(folder, state, "safetensors")
    (folder / "model.safetensors.index.json").unlink()
    assert torch.equal(read_embedding_table(folder), state[EMBEDDINGS])
    save_file({NORM: state[NORM]}, folder / "model-00003-of-00003.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"two sets .* model-00003-of-00003.safetensors both have {NORM}"):
        read_embedding_table(folder)


def test_broken_files_are_named(saves, tmp_path):
    folder = folder_without_weights(saves, tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(UserError, match=r"model.safetensors: cannot be read as safetensors .*copy it again"):
        read_embedding_table(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match=r"model.safetensors.index.json, line 1: broken JSON"):
        read_embedding_table(folder)


def test_tensors_are_read_across_files_by_name(saves, tmp_path):
    folder, state = folder_without_weights(saves, tmp_path / "sharded"), state_of(saves["new"])
    write_shards(folder, state, "bin")
    checkpoint = Checkpoint.open(folder)
    wanted = sorted(state)[:5]
    assert len({checkpoint.tensor_files[name] for name in wanted}) == 2
    found = checkpoint.read_tensors(wanted)
    assert sorted(found) == wanted and all(torch.equal(found[name], state[name]) for name in wanted)


def test_fingerprints_are_those_that_slot_files_hold(tmp_path):
    """Written by the first release; another value would refuse every slot file that users have."""
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 99}))
    for name, size in (("model-00001-of-00002.safetensors", 300_000), ("model-00002-of-00002.safetensors", 70_000)):
        (tmp_path / name).write_bytes(bytes(number * 7 % 251 for number in range(size)))
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at beside safetensors")
    assert weights.fingerprint(tmp_path) == Checkpoint.open(tmp_path).fingerprint == "09173e19e70b6522"
    for file in tmp_path.glob("model-*"):
        file.unlink()
    assert weights.fingerprint(tmp_path) == Checkpoint.open(tmp_path).fingerprint == "d21f740f6619b9b3"


def test_a_folder_is_read_once_for_a_model(saves, tmp_path, monkeypatch):
    folder = shutil.copytree(saves["new"], tmp_path / "counted")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "model_type": "llama", "architectures": []}))
    seen = []
    for name in ("read_config", "tensor_names", "weight_files"):
        real = getattr(weights, name)
        monkeypatch.setattr(weights, name, lambda place, name=name, real=real: (seen.append(name), real(place))[1])
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.kind == "llava" and "the weights hold model.mm_projector" in checkpoint.rule
    assert Checkpoint.open(checkpoint) is checkpoint
    load(checkpoint.folder)
    first = len(seen)
    assert sorted(set(seen)) == ["read_config", "tensor_names", "weight_files"] and first == 6
    shutil.rmtree(folder)
    assert checkpoint.kind == "llava" and checkpoint.family == "llama" and checkpoint.has_weights
    assert EMBEDDINGS in checkpoint.tensor_files and not checkpoint.is_hf and len(seen) == first


def test_kind_family_and_names_of_either_layout(tmp_path):
    ours = write_base(tmp_path / "ours")
    from llava.model.convert import convert

    convert(ours, tmp_path / "theirs", "to_hf")
    one, other = Checkpoint.open(ours), Checkpoint.open(tmp_path / "theirs")
    assert (one.is_hf, one.kind, other.is_hf, other.kind) == (False, "llava", True, "hf")
    assert one.family == other.family == "llama" and other.vocab_size >= one.vocab_size
    assert set(one.llava_names.values()) == {name.replace(".vision_model.", ".") for name in other.llava_names.values()}


def test_what_a_model_config_completes_stays_out_of_the_checkpoint(saves):
    checkpoint = Checkpoint.open(saves["new"])
    before = json.dumps(checkpoint.config, sort_keys=True)
    one, other = llava_config(checkpoint), llava_config(checkpoint)
    one.vision_config["hidden_size"] = one.rope_parameters["rope_theta"] = -1
    assert other.vision_config["hidden_size"] != -1 and json.dumps(checkpoint.config, sort_keys=True) == before


@pytest.mark.parametrize("value", [["a"], 3, {1: torch.ones(1)}])
def test_a_bin_file_of_something_else_than_named_tensors_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match=r"mm_projector.bin: holds something else than tensors by name; copy it again"):
        weights.load_bin(tmp_path / "mm_projector.bin")


@pytest.mark.parametrize("data", [b"", b"\x80\x02}q\x01.", b"\x80\x02h\x05.", b"\x80\x02c\n\xff\n."])
def test_no_pickle_of_a_bin_file_gets_past_the_reader(tmp_path, data):
    """An empty file, a bare dictionary, one that asks for what it has not kept, one whose name is no text."""
    (tmp_path / "mm_projector.bin").write_bytes(data)
    with pytest.raises(UserError, match="mm_projector.bin: "):
        weights.load_bin(tmp_path / "mm_projector.bin")
