"""The content of a model folder: what changes it and what does not; folders that keep the list of their files."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from llava.checkpoints import large_files
from llava.checkpoints.checkpoint import Checkpoint
from llava.checkpoints.manifest import (
    CHECKSUMS_FILE,
    TOWER,
    check_seal,
    content_of,
    difference,
    manifest,
    manifest_of,
    seal,
)
from llava.files import file_sha256
from llava.utils import UserError


@pytest.fixture
def folder(tmp_path):
    """A model with weights, config, tokenizer and image processor, and a tower in a folder of its own."""
    tower, model = tmp_path / "tower", tmp_path / "model"
    for place in (tower, model):
        place.mkdir()
        save_file({"weight": torch.arange(9000.0)}, place / "model.safetensors")
        (place / "preprocessor_config.json").write_text('{"size": 16}')
    (tower / "config.json").write_text('{"model_type": "clip_vision_model", "hidden_act": "gelu"}')
    (model / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (model / "config.json").write_text(json.dumps({"hidden_size": 8, "mm_vision_tower": str(tower)}))
    return model


def flip(file, place=-1):
    """Change one bit, and put the file's time back."""
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_bytes(data)
    os.utime(file, ns=times)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_one_bit_anywhere_is_another_content(folder, name):
    """A base was known by samples of its weights and four fields of its config; a tower by its name."""
    before = manifest(folder)
    flip(folder / name, -9000 if name.startswith("model") else -3)
    assert difference(before, manifest(folder)) == f"{name} has changed"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_a_tower_of_another_content_is_another_tower(folder, name):
    before, file = manifest(folder), folder.parent / "tower" / name
    if name == "config.json":
        file.write_text(file.read_text().replace("gelu", "silu"))
    else:
        flip(file, -3)
    assert difference(before, manifest(folder)) == f"{TOWER} has changed"


def test_places_logs_and_what_wrote_a_model_say_nothing_of_it(folder, tmp_path):
    before = manifest(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    values = json.loads((copy / "config.json").read_text())
    said = {"transformers_version": "5", "_name_or_path": "x", "base_model_name_or_path": "y"}
    (copy / "config.json").write_text(json.dumps({**said, **values}, indent=9))
    for name in ("README.md", "trainer_state.json", "log_history.json"):
        (copy / name).write_text("{}")
    for name in ("training_args.bin", "optimizer.pt", "pytorch_model.bin"):  # the last is not what a model is made of
        (copy / name).write_bytes(b"1")
    assert manifest(copy) == before == manifest_of(str(folder))
    (copy / "slots.pth").write_bytes(b"1")
    assert difference(before, manifest(copy)) == "slots.pth is new"
    assert manifest_of("some/hub-id") == {"hub id": "some/hub-id"} and manifest_of("../no") == {"hub id": "../no"}


def test_a_base_is_known_again_by_its_files(folder):
    kept = Checkpoint(folder).identity("base")
    assert Checkpoint(folder).other_than(kept) is None
    flip(folder / "tokenizer.json", -3)
    assert Checkpoint(folder).other_than(kept) == "tokenizer.json has changed"
    del kept["files"]  # as earlier versions kept it
    assert Checkpoint(folder).other_than(kept) is None


def test_a_large_file_is_not_read_again_in_the_next_process(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    monkeypatch.setattr(large_files, "LARGE", 10)
    monkeypatch.setattr(large_files, "SAMPLE_SIZE", 16)
    monkeypatch.setattr(large_files, "SETTLED", 10**18)
    file = folder / "model.safetensors"
    first = large_files.weights_sha256(file)
    assert not (folder.parent / "cache").exists()  # changed a moment ago: it could change again at the same time
    monkeypatch.setattr(large_files, "SETTLED", -1)
    assert large_files.weights_sha256(file) == first
    with monkeypatch.context() as patch:
        patch.setattr(large_files, "file_sha256", lambda _: pytest.fail("read again"))
        assert large_files.weights_sha256(file) == first
    (kept,) = (folder.parent / "cache" / "llava").iterdir()
    kept.write_bytes(kept.read_bytes().replace(first[:8].encode(), b"01234567"))
    assert large_files.weights_sha256(file) == first  # a damaged entry is none
    flip(file, -5)
    assert large_files.weights_sha256(file) != first


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", CHECKSUMS_FILE])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_a_damaged_file_of_a_sealed_folder_is_named(folder, name, damage):
    seal(folder)
    (folder / "README.md").write_text("a card is written to later")
    check_seal(folder)
    file = folder / name
    data = file.read_bytes()
    if damage == "flip":
        flip(file, len(data) // 2)
    elif damage == "remove":
        file.unlink()
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    if damage == "remove" and name == CHECKSUMS_FILE:  # as in folders of earlier versions
        check_seal(folder)
        return
    with pytest.raises(UserError, match=rf"model/{name}(: |, line )"):
        check_seal(folder)


def test_exchanged_files_are_named(folder):
    seal(folder)
    (folder / "tokenizer.json").write_bytes((folder / "preprocessor_config.json").read_bytes())
    with pytest.raises(UserError, match=r"tokenizer\.json: is not the file that was written"):
        Checkpoint(folder).kind  # noqa: B018


@pytest.mark.parametrize("name", ["../tower/config.json", "/etc/passwd", "a\0", "x" * 300])
def test_a_list_names_files_of_its_own_folder_alone(folder, name):
    files = {name: "0" * 16}
    (folder / CHECKSUMS_FILE).write_text(json.dumps({"files": files, "checksum": content_of(files)}))
    with pytest.raises(UserError, match=f"{CHECKSUMS_FILE}: file name "):
        check_seal(folder)


@pytest.mark.parametrize("content", ["[]", "{", '{"files": 1}', "[" * 100_000, '{"files": {}, "files": {}}'])
def test_what_is_no_list_is_one_line(folder, content):
    (folder / CHECKSUMS_FILE).write_text(content)
    with pytest.raises(UserError, match=CHECKSUMS_FILE) as caught:
        check_seal(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tower", [5, ["a"], {"a": 1}, True])
def test_a_tower_that_is_no_name_is_refused_by_its_field(folder, tower):
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "mm_vision_tower": tower}))
    with pytest.raises(UserError, match="config.json: mm_vision_tower is "):
        manifest(folder)


def test_the_home_of_a_user_who_is_not_here_is_a_name_like_any_other():
    assert manifest_of("~nobody-of-this-name/model") == {"hub id": "~nobody-of-this-name/model"}


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "\udcff", '{"entries": [], "checksum": 1}'])
def test_a_broken_list_of_large_files_is_made_again(folder, monkeypatch, content):
    kept = folder / "cache" / "llava" / "checksums.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    for name, value in (("LARGE", 1), ("SAMPLE_SIZE", 16), ("SETTLED", -1)):
        monkeypatch.setattr(large_files, name, value)
    kept.parent.mkdir(parents=True)
    kept.write_bytes(content.encode("utf-8", "surrogateescape"))
    file = folder / "model.safetensors"
    assert large_files.weights_sha256(file) == file_sha256(file)


def test_without_a_home_no_checksum_is_kept(folder, monkeypatch):
    def nobody(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(large_files.Path, "expanduser", nobody)
    for name, value in (("LARGE", 1), ("SAMPLE_SIZE", 16), ("SETTLED", -1)):
        monkeypatch.setattr(large_files, name, value)
    file = folder / "model.safetensors"
    assert large_files.weights_sha256(file) == file_sha256(file)
