"""Files that no one should write, given to the readers of rows, answers, tables and pictures: read, or one line."""

from __future__ import annotations

import io
import json
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from llava.data.answers import read_answers
from llava.data.raw.example import Report
from llava.data.raw.metadata_csv import read_metadata
from llava.data.rows import read_rows
from llava.image_io import load_image
from llava.utils import UserError

ROW = {"question_id": 1, "image": "a.png", "text": "What?", "gpt4_answer": "yes", "domain": {"abd": True}}
ODD = [
    None,
    True,
    0,
    -1,
    1e308,
    2**70,
    "",
    " ",
    "\0",
    "\ud800",
    "a" * 100_000,
    [],
    [[]],
    {},
    {"path": None},
    [None],
    "NaN",
]
FIELDS = ("question_id", "image", "images", "text", "gpt4_answer", "domain", "answer_type", "conversations", "messages")


def rows():
    for field in FIELDS:
        for number, value in enumerate(ODD):
            yield f"{field}-{number}", json.dumps({**ROW, field: value}).encode()
    yield "deep", b"[" * 100_000
    yield "number", b'{"question_id": ' + b"9" * 10_000 + b"}"
    yield "utf-16", json.dumps(ROW).encode("utf-16")
    yield "latin-1", json.dumps({**ROW, "text": "naïve"}, ensure_ascii=False).encode("latin-1")
    yield "csv", b"question_id,text\n1,What?\n"
    yield "binary", bytes(range(256)) * 9
    yield "twice", b'{"text": "a", "text": "b", "question_id": 1}'
    yield "constants", b'{"question_id": 1, "text": "a", "x": [NaN, Infinity]}'


def tables():
    head = "image,question,answer\n"
    for number, cell in enumerate(
        ("", "nan", "{}", "{'bytes': b''", "[", '"', "\0", "a" * 100_000, "../a.png", "=1+1")
    ):
        yield f"cell-{number}", f"{head}{cell},b,c\n".encode()
    yield "ragged", f"{head}a,b\na,b,c,d\n".encode()
    yield "no header", b"a.png,what,yes\n"
    yield "utf-16", head.encode("utf-16")
    yield "binary", bytes(range(256))
    yield "twice", b"image,image,question,answer\na,b,c,d\n"


def pictures():
    grey = Image.effect_noise((24, 18), 60)
    for name in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "JPEG2000", "PPM", "ICO"):
        stream = io.BytesIO()
        grey.save(stream, name)
        data = stream.getvalue()
        for part in (1, 8, 40, len(data) // 2, len(data) - 3):
            yield f"{name}-{part}", data[:part]
        yield f"{name}-zeros", data[:40] + bytes(len(data) - 40)
        yield f"{name}-tail", data + b"\0" * 1000
    for name, size in (("wide", (2**31 - 1, 1)), ("huge", (200_000, 200_000)), ("empty", (0, 0))):
        header = b"IHDR" + struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0)
        checked = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        yield name, b"\x89PNG\r\n\x1a\n" + checked
    yield "eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/bin/true) run\n"
    yield "svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    yield "pdf", b"%PDF-1.7\n"
    yield "pickle", b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix\x94."
    yield "dicom", b"\0" * 128 + b"DICM" + b"\xff" * 100
    yield "dicom group", b"\x08\0\x05\0CS\xff\xff"
    yield "noise", np.random.default_rng(0).bytes(5000)


READERS = {
    "rows": (read_rows, rows),
    "answers": (read_answers, rows),
    "table": (lambda path: read_metadata(path, Report("mine")), tables),
    "pictures": (load_image, pictures),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", READERS)
def test_hostile_files_are_read_or_refused_in_one_line(kind, tmp_path):
    read, inputs = READERS[kind]
    for name, content in inputs():
        path = tmp_path / "hostile.png"
        path.write_bytes(content)
        start = time.monotonic()
        try:
            read(path)
        except UserError as error:
            said = str(error)
            assert "hostile.png" in said and "\n" not in said and len(said) < 1000, (name, said[:2000])
        except Exception as error:
            pytest.fail(f"{kind} {name}: {type(error).__name__}: {error}")
        assert time.monotonic() - start < 10, name
    assert [file.name for file in tmp_path.iterdir()] == ["hostile.png"]
