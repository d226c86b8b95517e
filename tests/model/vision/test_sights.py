"""What a tower saw of pictures, on the disk: found again bit for bit, bounded, and never an error."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from llava.model.vision import sights
from llava.model.vision.features import ahead
from llava.model.vision.sights import Sight, SightStore

MAPS = Path("/proc/self/maps")
EYE, OTHER, PICTURE = "a" * 32, "b" * 32, "0" * 64


def sight(number=0, megabytes=0.0, dtype=torch.float32):
    patches = max(int(megabytes * 2**20 / dtype.itemsize), 6)
    return Sight(torch.full((1, patches, 1), float(number), dtype=dtype), {"tower": torch.arange(3.0) + number}, (4, 3))


def same(one, other):
    assert one.size == other.size and one.queries.keys() == other.queries.keys()
    assert one.features.dtype == other.features.dtype and torch.equal(one.features, other.features)
    return all(torch.equal(query, other.queries[kind]) for kind, query in one.queries.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sight_is_found_again_by_its_picture_and_its_eye(tmp_path, dtype):
    kept = SightStore(tmp_path, EYE).put(PICTURE, sight(3, dtype=dtype))
    found = SightStore(tmp_path, EYE).get(PICTURE)
    assert same(found, sight(3, dtype=dtype)) and same(kept, found)
    assert SightStore(tmp_path, OTHER).get(PICTURE) is None and SightStore(tmp_path, EYE).get("1" * 64) is None


@pytest.mark.skipif(not MAPS.exists(), reason="the system does not tell what is mapped")
def test_large_features_are_mapped_as_many_as_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(sights, "MAPS", 1)
    store = SightStore(tmp_path, EYE)
    kept = [store.put(str(number) * 64, sight(number, size)) for number, size in enumerate((0.01, 0.4, 0.4))]
    assert all(same(one, sight(number, size)) for number, (one, size) in enumerate(zip(kept, (0.01, 0.4, 0.4))))
    mapped = MAPS.read_text()
    assert [f"{str(number) * 32}.safetensors" in mapped for number in range(3)] == [False, True, False]


def test_no_damage_is_an_error(tmp_path, capsys):
    store = SightStore(tmp_path, EYE)
    store.put(PICTURE, sight())
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    cuts = [whole[:length] for length in range(0, len(whole) - 1, 41)]
    flips = [bytes([*whole[:place], whole[place] ^ 255, *whole[place + 1 :]]) for place in range(0, len(whole), 23)]
    for data in [*cuts, *flips]:
        path.unlink()  # what is mapped is another file
        path.write_bytes(data)
        assert store.get(PICTURE) is None
    assert capsys.readouterr().out.count("is damaged; its picture is looked at again") == len(cuts) + len(flips)
    store.put(PICTURE, sight())
    os.rename(path, path.with_name(f"{'1' * 32}.safetensors"))
    assert store.get("1" * 64) is None  # an exchanged one
    assert same(store.put(PICTURE, sight(1)), sight(1)) and same(store.get(PICTURE), sight(1))


def test_a_disk_that_refuses_is_said_once(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = SightStore(tmp_path, EYE)
    monkeypatch.setattr("llava.files.os.open", refuse)
    assert all(same(store.put(str(number) * 64, sight(number)), sight(number)) for number in range(3))
    assert capsys.readouterr().out.count("cannot be written (No space left on device)") == 1


def test_without_room_queries_alone_are_kept(tmp_path, capsys):
    store = SightStore(tmp_path, EYE, megabytes=1)
    for number in range(3):
        assert same(store.put(str(number) * 64, sight(number, 0.4)), sight(number, 0.4))
    again = SightStore(tmp_path, EYE, megabytes=1)
    assert [again.get(str(number) * 64) is not None for number in range(3)] == [True, True, False]
    found = again.get("2" * 64, whole=False)
    assert not found.whole and torch.equal(found.queries["tower"], sight(2).queries["tower"])
    assert capsys.readouterr().out.count("exceed the 1 MB that") == 1


def test_too_much_is_noticed_before_the_first_is_kept(tmp_path, capsys):
    store = SightStore(tmp_path, EYE, megabytes=1)
    store.expect(3 * 2**19)
    assert "exceed the 1 MB" in capsys.readouterr().out
    store.put(PICTURE, sight(0, 0.4))
    assert store.get(PICTURE) is None and store.get(PICTURE, whole=False) is not None


def test_what_others_saw_longest_ago_makes_room(tmp_path):
    eyes = [letter * 32 for letter in "abc"]
    for age, eye in enumerate(eyes):
        SightStore(tmp_path, eye, megabytes=2).put(PICTURE, sight(age, 0.6))
        os.utime(tmp_path / eye, (age, age))
    (tmp_path / "notes").mkdir()  # nobody's eye
    SightStore(tmp_path, eyes[0], megabytes=2)  # used again
    assert SightStore(tmp_path, "d" * 32, megabytes=2).put(PICTURE, sight(4, 0.6)).whole
    assert sorted(place.name[0] for place in tmp_path.iterdir()) == ["a", "c", "d", "n"]


def test_several_write_and_read_the_same_at_a_time(tmp_path):
    def work(_):
        store = SightStore(tmp_path, EYE)
        for number in range(20):
            picture = f"{number:032d}" * 2
            found = store.get(picture) or store.put(picture, sight(number))
            assert same(found, sight(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(list(tmp_path.rglob("*.*"))) == 20


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_is_read_ahead_comes_in_order_and_raises_where_it_is_used(workers):
    assert list(ahead(lambda number: number * 2, range(20), workers)) == list(range(0, 40, 2))
    coming = ahead(lambda number: 1 // (3 - number), range(20), workers)
    assert [next(coming) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(coming)


def test_what_another_process_gives_up_meanwhile_is_no_error(tmp_path, monkeypatch, capsys):
    """Folders and files that vanish between being listed and being looked at, or right after they were written."""
    root = tmp_path / "sights"
    for eye in (OTHER, "c" * 32):
        SightStore(root, eye).put(PICTURE, sight(0, 0.6))

    def vanishing(listed):
        def found(place="."):
            names = listed(place)
            if (root / OTHER).exists():
                (root / OTHER).rename(tmp_path / "gone")
            return names

        return found

    with monkeypatch.context() as meanwhile:
        for name in ("listdir", "scandir"):
            meanwhile.setattr(os, name, vanishing(getattr(os, name)))
        store = SightStore(root, EYE, megabytes=1)
        assert same(store.put(PICTURE, sight(1, 0.6)), sight(1, 0.6)) and store.get(PICTURE).whole
    assert not (root / OTHER).exists() and (tmp_path / "gone").exists()
    store = SightStore(root, EYE)
    read = sights._read
    monkeypatch.setattr(sights, "_read", lambda path: path.unlink() or read(path))
    assert same(store.put("1" * 64, sight(2)), sight(2)) and not store.holds("1" * 64)
    monkeypatch.setattr(sights, "_read", read)
    assert not store.refused and "cannot be written" not in capsys.readouterr().out
    assert same(store.put("1" * 64, sight(2)), sight(2)) and store.holds("1" * 64)


def test_a_folder_that_may_not_be_looked_into_holds_nothing(tmp_path, monkeypatch, capsys):
    SightStore(tmp_path, EYE).put(PICTURE, sight())

    def deny(place, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))

    with monkeypatch.context() as denied:
        for owner, name in ((os, "stat"), (os, "scandir"), (os, "open"), (Path, "stat"), (Path, "iterdir")):
            denied.setattr(owner, name, deny)
        store = SightStore(tmp_path, EYE, megabytes=1)
        found = store.holds(PICTURE), store.get(PICTURE), store.put("1" * 64, sight(1, 0.6))
    assert found[:2] == (False, None) and same(found[2], sight(1, 0.6))
    assert capsys.readouterr().out.count("cannot be written (Permission denied)") == 1
