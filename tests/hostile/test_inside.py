"""Paths out of data: nothing is read or written outside the folder that a name belongs to."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava.checkpoints.weights import tensor_places
from llava.data.raw.example import Report
from llava.data.raw.outputs import write_together
from llava.data.raw.pictures import missing_images
from llava.data.raw.references import read_references
from llava.data.rows import parse_row
from llava.data.samples import check_image_files, pictures_checksum
from llava.inside import LinkedFolder, check_file_name, inside, opened_to_links
from llava.utils import UserError

OUTSIDE = [
    "../secret.png",
    "a/../../secret.png",
    "..",
    "./..",
    "/etc/passwd",
    "//etc/passwd",
    "C:\\Windows\\x.png",
    "C:/x.png",
    "\\\\server\\share\\x.png",
    "..\\secret.png",
    "a\\..\\..\\secret.png",
    "a\0.png",
    "a\n.png",
    "\x7f",
    "",
    ".",
    "/",
    "x" * 256,
    "é" * 128,
    "a/" * 3000 + "b.png",
    "\ud800.png",
]


@pytest.fixture
def pictures(tmp_path):
    """A folder of pictures, a secret beside it, and links from one to the other."""
    folder = tmp_path / "pictures"
    (folder / "ct").mkdir(parents=True)
    for place in (folder / "a.png", folder / "ct" / "b.png", tmp_path / "secret.png"):
        Image.new("L", (2, 2)).save(place)
    (folder / "near.png").symlink_to("a.png")
    (folder / "far.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to("..")
    (folder / "loop.png").symlink_to("loop.png")
    return folder


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: ascii(name)[:20])
def test_a_name_that_leads_out_is_refused_in_reading_and_writing(pictures, name):
    row = {"id": 7, "image": name, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    calls = [lambda: inside(pictures, name), lambda: inside(LinkedFolder(pictures), name)]
    if name.strip() and "\ud800" not in name:
        rows = [parse_row(row)]
        calls += [lambda: check_image_files(rows, pictures), lambda: pictures_checksum(rows, pictures)]
        calls += [lambda: write_together(pictures, {name: "x"})]
        assert missing_images([type("Row", (), {"image": name})], pictures) == [name]
    before = sorted(pictures.parent.rglob("*"))
    for call in calls:
        with pytest.raises(UserError) as caught:
            call()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert sorted(pictures.parent.rglob("*")) == before


@pytest.mark.parametrize("name", ["far.png", "up/secret.png", "up/pictures/../secret.png"])
def test_a_link_leads_out_only_where_it_may(pictures, name):
    with pytest.raises(UserError, match="leads out of"):
        inside(pictures, name)
    opened = opened_to_links(str(pictures), True)
    if ".." not in name:
        assert inside(opened, name).read_bytes() == (pictures.parent / "secret.png").read_bytes()


def test_links_within_the_folder_and_a_folder_that_is_a_link_are_fine(pictures, tmp_path):
    assert inside(pictures, "near.png").is_file()
    (tmp_path / "link").symlink_to(pictures)
    assert inside(tmp_path / "link", "ct/b.png").is_file()
    assert inside(f"{tmp_path}/link/", "./ct//b.png").is_file()
    assert not inside(pictures, "loop.png").is_file()
    assert opened_to_links("x", False) == "x" and opened_to_links(None, True) is None
    assert str(opened_to_links("x", True)) == os.fspath(LinkedFolder("x")) == "x"


def test_a_whole_path_may_be_named_where_it_lies_in_the_folder(pictures):
    assert inside(pictures, str(pictures / "a.png")) == pictures / "a.png"
    assert inside("/", str(pictures / "a.png")) == pictures / "a.png"


def test_names_from_other_systems_are_found(pictures):
    assert inside(pictures, "ct\\b.png") == pictures / "ct" / "b.png"
    composed = unicodedata.normalize("NFC", "schädel.png")
    (pictures / composed).write_bytes(b"x")
    assert inside(pictures, unicodedata.normalize("NFD", composed)) == pictures / composed
    (pictures / "a\\b.png").write_bytes(b"x")
    assert inside(pictures, "a\\b.png").name == "a\\b.png"  # as it is there


@given(st.lists(st.sampled_from(["..", ".", "a", "ct", "up", "far.png", "/", "\\", "C:", "\0", "é"]), max_size=6))
@settings(max_examples=150, deadline=None)
def test_no_mixture_of_parts_leaves_the_folder(tmp_path_factory, parts):
    folder = tmp_path_factory.getbasetemp() / "mixed"
    (folder / "ct").mkdir(parents=True, exist_ok=True)
    if not (folder / "up").is_symlink():
        (folder / "up").symlink_to("..")
    try:
        place = inside(folder, "/".join(parts))
    except UserError:
        return
    assert Path(os.path.realpath(place)).is_relative_to(os.path.realpath(folder))


@pytest.mark.parametrize("name", ["a/b", "..", ".", "", "  ", "a\\b", "a\0", "x" * 300])
def test_a_folders_name_is_one_part(name):
    with pytest.raises(UserError, match="model_id"):
        check_file_name(name, "scores.json: model_id")


@pytest.mark.parametrize("organ", ["../../out", "a/b", "x" * 300, "a\0b", "two words"])
def test_an_organ_of_a_reference_file_names_no_other_folder(tmp_path, organ):
    import json

    path = tmp_path / "all.json"
    path.write_text(json.dumps([{"question": "q?", "answer": "a", "image_organ": organ}]))
    with pytest.raises(UserError, match="field 'image_organ': expected one word"):
        read_references([path], Report("x"))


@pytest.mark.parametrize("shard", ["../base/model.safetensors", "/etc/passwd", "a\0b", "x" * 300, "."])
def test_an_index_names_files_beside_it(tmp_path, shard):
    import json

    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(UserError, match="index.json: file name"):
        tensor_places(tmp_path, [])
