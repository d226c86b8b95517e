"""What is kept of pictures between questions: never under the name of another file."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from llava.data.rows import Row
from llava.eval.question_cache import QuestionCache
from llava.files import file_sha256
from llava.model.vision.sights import Sight, SightStore

PICTURE = "a.png"


@pytest.mark.parametrize("ahead", [False, True])
def test_a_picture_that_changes_while_it_is_looked_at_is_not_kept(tmp_path, monkeypatch, ahead):
    (tmp_path / PICTURE).write_bytes(b"old")
    old = file_sha256(tmp_path / PICTURE)
    changes = iter([b"new", b"new"])

    def open_picture(row, name):
        pixels = torch.tensor(list((tmp_path / name).read_bytes()), dtype=torch.float32)
        (tmp_path / name).write_bytes(next(changes))
        return pixels, (1, 1)

    prompt = SimpleNamespace(aspect_ratio="pad")
    encoder = SimpleNamespace(image_folder=str(tmp_path), prompt=prompt, open_picture=open_picture)
    row = Row(0, (PICTURE,), (("human", "?"),), (), None, {})
    monkeypatch.setattr(QuestionCache, "_seen", lambda self, pixels, size, model: Sight(pixels[None], {}, size))

    def look():
        cache, store = QuestionCache(folder=tmp_path), SightStore(tmp_path / "sights", "a" * 32)
        cache.places, cache.stores = ("base", None), {"pad": store}
        with ThreadPoolExecutor(1) as pool:
            if ahead:
                cache.read_ahead([row], encoder, pool)
            (found,) = cache.look(row, encoder, None)
        return bytes(found.features[0].to(torch.uint8).tolist()), store

    seen, store = look()
    assert seen == b"old" and not store.holds(old) and not store.holds(file_sha256(tmp_path / PICTURE))
    seen, store = look()
    assert seen == b"new" and store.holds(file_sha256(tmp_path / PICTURE))
