"""What a new raw data set gets from ``RawDataset``, and how one is told from the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.data.raw import RAW, TEST, TRAIN, VALIDATE, Example, RawDataset, RawOptions, Report, Source
from llava.data.raw.sources import DATASETS, data_sets, find_source
from llava.utils import UserError


class Films(RawDataset):
    """Told by the fields of its rows."""

    name = "films"
    title = "Films"
    row_fields = ("image_name", "film_size")
    file_names = ("films.json",)
    variable, folder = "FILMS_DIR", "films"
    what_to_place = "place films.json"
    domains = ("a", "b")


class Listed(RawDataset):
    """In a form that is no JSON, told by its own code."""

    name = "listed"
    title = "Lists"
    what_to_place = "place list.txt"

    def inside(self, place: Path, options: RawOptions) -> Source | None:
        file = place if place.is_file() else place / "list.txt"
        return Source(self.name, file, self.pictures(file.parent, options)) if file.name == "list.txt" else None


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty working folder, with the two data sets above for the length of a test."""
    monkeypatch.chdir(tmp_path)
    for variable in ("VQA_RAD_DIR", "SLAKE_DIR", "FILMS_DIR"):
        monkeypatch.delenv(variable, raising=False)
    RAW.names()
    monkeypatch.setattr(RAW, "_items", dict(RAW._items))
    RAW.register(Listed)
    RAW.register(Films)
    return tmp_path


def write_rows(path, **fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([fields]), encoding="utf-8")
    return path


def test_data_sets_are_looked_for_in_order():
    assert [data_set.name for data_set in data_sets()] == [*DATASETS, "films", "listed"]


def test_a_file_is_the_data_sets_with_most_of_its_fields(home):
    """A field in common with another data set does no harm."""
    films = write_rows(home / "one.json", image_name="a.png", film_size=3)
    theirs = write_rows(home / "two.json", image_name="a.png", image_organ="ABD")
    assert find_source(RawOptions(data_dir=str(films))).dataset == "films"
    assert find_source(RawOptions(data_dir=str(theirs))).dataset == "vqa-rad"
    with pytest.raises(UserError, match="no films input in .*two.json: place films.json"):
        find_source(RawOptions(dataset="films", data_dir=str(theirs)))


def test_its_home_is_searched_after_those_of_the_others(home, monkeypatch):
    write_rows(home / "elsewhere" / "films.json", film_size=3)
    with pytest.raises(UserError, match="no raw input found: place VQA_RAD_Dataset_Public.json"):
        find_source(RawOptions())
    monkeypatch.setenv("FILMS_DIR", "elsewhere")
    source = find_source(RawOptions())
    assert (source.dataset, source.path) == ("films", Path("elsewhere/films.json"))
    assert source.image_folders == (Path("elsewhere/images"), Path("elsewhere"))
    assert find_source(RawOptions(image_dir="there")).image_folders == (Path("there"),)


def test_another_form_than_json_is_told_by_its_own_code(home):
    (home / "list.txt").write_text("a.png yes")
    assert find_source(RawOptions(data_dir=".")).dataset == "listed"
    with pytest.raises(UserError, match="no VQA-RAD or SLAKE or Films or Lists input in nowhere"):
        find_source(RawOptions(data_dir="nowhere"))


def test_its_files_are_the_published_splits_under_its_name():
    splits = {1: TRAIN, 2: TRAIN, 3: VALIDATE, 4: TEST}
    rows = [Example(n, f"{n}.png", "q?", "yes", "ab"[n % 2], split) for n, split in splits.items()]
    fused = Films().fuse(rows, Films.domains, 0, Report("films"))
    counts = {name: text.count("\n") for name, text in fused.files.items()}
    assert counts == {
        "films_train_combined.jsonl": 2,
        "films_train_a.jsonl": 1,
        "films_train_b.jsonl": 1,
        "films_test.jsonl": 1,
        "films_validate.jsonl": 1,
    }
    assert list(fused.splits) == [TRAIN, VALIDATE, TEST]
    fewer = Films().fuse(rows[:2], Films.domains, 0, Report("films"))
    assert [*fewer.files] == ["films_train_combined.jsonl", "films_train_a.jsonl", "films_train_b.jsonl"]
    assert Films().pairs == (("films_train_combined.jsonl", "films_test.jsonl"),)


def test_one_that_reads_nothing_says_so():
    with pytest.raises(NotImplementedError, match="'films' must say how its examples are read"):
        Films().read(Source("films", Path("x"), (Path("."),)), Report("films"))
