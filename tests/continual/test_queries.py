"""Sights of a data file's pictures: shared out among processes, bounded, and of no tower that changes."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_llava import write_base, write_images

from llava.continual.queries import PictureSource, look_at_pictures
from llava.data.rows import question_row, read_rows, write_jsonl
from llava.files import file_sha256
from llava.image_io import load_image
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

NAMES = [f"{number}.png" for number in range(7)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("queries")
    write_base(folder / "tiny-llava-base")
    write_images(folder / "images", NAMES)
    written = [question_row(name, name, "is there a lesion?", "yes", "abd", ["abd"]) for name in NAMES]
    write_jsonl(folder / "rows.jsonl", written)
    rows = read_rows(folder / "rows.jsonl")
    source = PictureSource.standalone(folder / "tiny-llava-base", str(folder / "images"), None, "cpu")
    return SimpleNamespace(rows=rows, source=source)


@pytest.fixture
def through(monkeypatch):
    """How many pictures go through a tower at a time."""
    found, forward = [], CLIPVisionTower.forward
    monkeypatch.setattr(CLIPVisionTower, "forward", lambda self, x: found.append(len(x)) or forward(self, x))
    return found


def test_processes_of_one_run_share_the_pictures(place, through, tmp_path, monkeypatch):
    """Each looked at all of them: with eight GPUs eight times as many passes as pictures."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    at_work = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        sights = place.source.sights(NAMES, place.source.store(tmp_path), True)
        at_work.append((sights, [next(sights)]))
    for _ in NAMES[1:]:
        for sights, seen in at_work:
            seen.append(next(sights))
    assert through == [1] * len(NAMES)
    first, second = (dict(seen) for _, seen in at_work)
    assert list(first) == NAMES and list(second) == [*NAMES[3:], *NAMES[:3]]
    assert all(torch.equal(first[name].features, second[name].features) for name in NAMES)


def test_features_that_do_not_fit_are_neither_kept_nor_given(place, through, tmp_path):
    each = next(iter(place.source.sights(NAMES[:1], None, True)))[1].features.nbytes
    looked = look_at_pictures(place.rows, place.source, "tower", None, 7 * each)
    queries, features = looked
    assert list(features) == NAMES and len(queries) == 7
    short, none = look_at_pictures(place.rows, place.source, "tower", None, 7 * each - 1)
    assert none is None and torch.equal(short, queries)
    store = place.source.store(tmp_path, 0)
    through.clear()
    for calls in (7, 0):  # queries are kept all the same
        found, none = look_at_pictures(place.rows, place.source, "tower", store, 0)
        assert none is None and torch.equal(found, queries) and len(through) == calls
        through.clear()
    assert not any(store.get(path.stem + "0" * 32) for path in store.folder.iterdir())


def test_without_queries_looking_ends_where_features_exceed_their_room(place, through):
    each = next(iter(place.source.sights(NAMES[:1], None, True)))[1].features.nbytes
    through.clear()
    assert look_at_pictures(place.rows, place.source, None, None, 2 * each) == (None, None)
    assert len(through) == 3


def test_a_picture_that_changes_while_it_is_looked_at_is_not_kept(place, tmp_path, monkeypatch):
    """Its checksum was taken long before: whoever has the old picture would be given the new one's sight."""
    write_images(tmp_path, ["old.png", "new.png"])
    Image.new("RGB", (5, 7)).save(tmp_path / "new.png")
    changed = lambda path: load_image(shutil.copy(tmp_path / "new.png", path))  # noqa: E731
    monkeypatch.setattr("llava.continual.queries.load_image", changed)
    source = replace(place.source, image_folder=str(tmp_path))
    store = source.store(tmp_path)
    ((_, seen),) = source.sights(["old.png"], store, True)
    assert seen.size == (5, 7) and not list(store.folder.rglob("*.safetensors"))
    ((_, again),) = source.sights(["old.png"], store, True)
    assert torch.equal(again.features, seen.features) and store.holds(file_sha256(tmp_path / "new.png"))
