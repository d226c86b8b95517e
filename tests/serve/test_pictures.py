"""Pictures as bytes and data URLs: what opens as the file opens, and what is refused before it is decoded."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image
from serve.room import bomb, data_url, dicom_bytes

from llava import dicom
from llava.image_io import load_image
from llava.serve.pictures import of_data_url, opened, thumbnail
from llava.serve.question import Limits, Refused

LIMITS = Limits()


def test_bytes_open_as_their_file_does(place, tmp_path):
    expected = load_image(place.images / "1.png")
    for kind in ("image/png", "image/jpeg", "application/octet-stream"):  # the bytes say what they are
        assert of_data_url(data_url(place.png(1), kind), "picture 1", LIMITS).tobytes() == expected.tobytes()
    (tmp_path / "a.dcm").write_bytes(dicom_bytes())
    expected = load_image(tmp_path / "a.dcm")
    assert opened(dicom_bytes(), "a.dcm", LIMITS).tobytes() == expected.tobytes()
    assert of_data_url(data_url(dicom_bytes(), "application/dicom"), "x", LIMITS).tobytes() == expected.tobytes()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1:9/x"/></svg>'


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:9/a.png", "fetches nothing"),
        ("file:///etc/hostname", "fetches nothing"),
        ("ftp://a/b", "fetches nothing"),
        ("", "fetches nothing"),
        ("data:image/png;base64", "no data URL in base64"),
        ("data:image/png,abc", "no data URL in base64"),
        ("data:image/png;base64,@@@@", "broken base64"),
        ("data:image/png;base64,abc", "broken base64"),
        ("data:image/png;base64,", "is empty"),
        ("data:;base64,aGk=", "no picture"),
        (data_url(b"<html><script>alert(1)</script></html>", "text/html"), "no picture"),
        (data_url(b"<html></html>"), "cannot be read"),
        (data_url(SVG, "image/svg+xml"), "cannot be read"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image/eps"), "cannot be read"),
        (data_url(b"\x89PNG\r\n\x1a\nnothing more"), "cannot be read"),
        (data_url(b"a" * 300, "application/dicom"), "cannot be read"),
    ],
)
def test_what_is_no_picture_is_refused(url, said):
    with pytest.raises(Refused, match=said) as refused:
        of_data_url(url, "picture 1", LIMITS)
    assert "picture 1" in str(refused.value) and len(str(refused.value)) < 400


def test_a_large_file_is_refused_before_it_is_decoded():
    small = Limits(picture_bytes=1000)
    for data in (b"a" * 1001, b"a" * 4000):
        with pytest.raises(Refused, match="larger than"):
            of_data_url(data_url(data), "picture 1", small)
    with pytest.raises(Refused, match="larger than"):
        opened(b"a" * 1001, "picture 1", small)


def test_a_bomb_of_100_megapixels_is_refused(monkeypatch):
    monkeypatch.setenv("LLAVA_MAX_PIXELS", str(LIMITS.pixels))
    data = bomb()
    assert len(data) < 20_000
    with pytest.raises(Refused, match="pixels"):
        opened(data, "picture 1", LIMITS)


def test_the_name_of_a_users_file_is_not_said(monkeypatch, capsys):
    monkeypatch.setattr(dicom, "_SAID", [])
    opened(dicom_bytes(frames=2), "ann-smith.dcm", LIMITS)
    assert dicom._SAID == [] and capsys.readouterr().out == ""


def test_a_thumbnail_is_a_small_square_on_the_page():
    head, _, text = thumbnail(Image.new("RGB", (900, 30), "white")).partition(",")
    shown = Image.open(io.BytesIO(base64.b64decode(text)))
    assert head == "data:image/png;base64" and shown.size == (336, 336)
