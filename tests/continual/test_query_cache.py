"""The cache of queries and features: what is kept is found again; neither damage nor a full disk is an error."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch

from llava.continual.query_cache import QueryCache

CONTENT = {"pictures": ["a", "b"]}


def entry():
    return [torch.arange(6.0), torch.ones(3)]


def test_an_entry_is_found_by_its_content(tmp_path):
    cache = QueryCache(tmp_path)
    cache.write("image", CONTENT, entry())
    found = cache.read("image", dict(CONTENT))
    assert all(torch.equal(one, other) for one, other in zip(found, entry(), strict=True))
    assert cache.read("image", {"pictures": ["b", "a"]}) is None and cache.read("text", CONTENT) is None


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = QueryCache("")
    cache.write("image", CONTENT, entry())
    assert not cache and cache.read("image", CONTENT) is None and not list(tmp_path.iterdir())


def test_no_damage_is_an_error(tmp_path, capsys):
    cache = QueryCache(tmp_path)
    cache.write("image", CONTENT, entry())
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    cuts = [whole[:length] for length in range(0, len(whole) - 1, 41)]
    flips = [bytes([*whole[:place], whole[place] ^ 255, *whole[place + 1 :]]) for place in range(0, len(whole), 23)]
    for data in [*cuts, *flips]:
        path.write_bytes(data)
        assert cache.read("image", CONTENT) is None
    assert capsys.readouterr().out.count("is damaged; its contents are computed again") == len(cuts) + len(flips)
    path.write_bytes(whole)
    assert cache.read("image", CONTENT) is not None


def test_a_disk_that_refuses_is_said(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("llava.files.os.open", refuse)
    QueryCache(tmp_path).write("image", CONTENT, entry())
    assert "cannot be written (No space left on device); it is not kept" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_what_may_not_be_read_is_computed_again(tmp_path, monkeypatch, capsys):
    def deny(place, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))

    QueryCache(tmp_path).write("image", CONTENT, entry())
    monkeypatch.setattr(Path, "read_bytes", deny)
    assert QueryCache(tmp_path).read("image", CONTENT) is None
    assert "cannot be read (Permission denied); its contents are computed again" in capsys.readouterr().out
    for owner in (Path, os):
        monkeypatch.setattr(owner, "stat", deny)  # nor may its folder be looked into
    assert QueryCache(tmp_path).read("image", CONTENT) is None
