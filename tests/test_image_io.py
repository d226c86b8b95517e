"""Pictures as hospitals have them: every kind opens as 8-bit RGB, a broken one is named."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava import image_io
from llava.deep_grey import stretch_to_bytes
from llava.image_io import FORMATS, allow_pixels, decode_image, expand2square, load_image, open_image
from llava.utils import UserError

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def saved(tmp_path, image: Image.Image, name: str, **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def test_greyscale_keeps_its_values(tmp_path):
    path = saved(tmp_path, Image.fromarray((RAMP * 255).astype(np.uint8)), "grey.png")
    opened = load_image(path)
    assert opened.mode == "RGB"
    assert np.array_equal(np.asarray(opened)[..., 1], (RAMP * 255).astype(np.uint8))


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_16_bit_is_stretched_not_clipped(tmp_path, name):
    path = saved(tmp_path, Image.fromarray((1000 + RAMP * 3000).astype(np.uint16)), name)
    grey = np.asarray(load_image(path))[..., 0]
    assert grey.min() == 0 and grey.max() == 255
    assert np.abs(grey - RAMP * 255).max() <= 1


def test_float_tiff_with_a_hole_is_finite(tmp_path):
    values = RAMP.astype(np.float32)
    values[0, 0] = np.nan
    assert np.asarray(load_image(saved(tmp_path, Image.fromarray(values), "float.tif"))).max() == 255


def test_constant_16_bit_is_black(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.full((4, 4), 30000, dtype=np.uint16)), "flat.png")
    assert np.asarray(load_image(path)).max() == 0


def test_transparency_lies_on_black_and_opaque_is_unchanged(tmp_path):
    pixels = np.full((2, 2, 4), 200, dtype=np.uint8)
    pixels[..., 3] = [[0, 255], [0, 255]]
    opened = np.asarray(load_image(saved(tmp_path, Image.fromarray(pixels, "RGBA"), "alpha.png")))
    assert opened[:, 0].max() == 0 and (opened[:, 1] == 200).all()


def test_cmyk_and_palette_open(tmp_path):
    cmyk = load_image(saved(tmp_path, Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "cmyk.jpg"))
    palette = load_image(saved(tmp_path, Image.new("RGB", (4, 4), (255, 0, 0)).convert("P"), "palette.gif"))
    assert np.asarray(cmyk).min() > 250
    assert palette.getpixel((0, 0)) == (255, 0, 0)


def test_exif_rotation_is_undone(tmp_path):
    image = Image.new("RGB", (6, 4), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path, image, "turned.jpg", exif=exif)
    assert load_image(path).size == (4, 6)
    assert decode_image(path.read_bytes(), "http://host/turned.jpg").tobytes() == load_image(path).tobytes()


def test_truncated_file_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(noise), "cut.jpg")
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UserError, match="cut.jpg.*replace the file"):
        load_image(path)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_file_that_is_no_picture_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read.*broken.png"):
        load_image(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="image file not found.*gone.png"):
        load_image(tmp_path / "gone.png")


# -- formats and sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"8BPS" + b"\0" * 40, b"%PDF-1.4\n"]
)
def test_a_format_that_is_not_listed_is_never_opened(tmp_path, content, monkeypatch):
    path = tmp_path / "scan.png"
    path.write_bytes(content)
    monkeypatch.setattr("subprocess.Popen", None)
    with pytest.raises(UserError, match="scan.png .no picture of a format that is opened: PNG, JPEG"):
        load_image(path)
    with pytest.raises(UserError, match="holds no readable picture"):
        open_image(content, "the text")


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ("MPO", "AVIF")])
def test_every_listed_format_opens_whatever_its_file_is_called(tmp_path, format):
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 10, 10)).save(stream, format)
    path = tmp_path / "scan.xyz"
    path.write_bytes(stream.getvalue())
    opened = load_image(path)
    assert opened.mode == "RGB" and abs(opened.getpixel((8, 8))[0] - 200) < 12


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setenv(image_io.BUDGET_VARIABLE, "99")
    path = saved(tmp_path, Image.new("L", (10, 10)), "large.png")
    with pytest.raises(UserError, match=r"large.png has more than 99 pixels .*--max_pixels"):
        load_image(path)
    allow_pixels(100)
    assert load_image(path).size == (10, 10)
    for wrong in (0, -1):
        with pytest.raises(UserError, match=f"--max_pixels is {wrong}"):
            allow_pixels(wrong)
    monkeypatch.setenv(image_io.BUDGET_VARIABLE, "many")
    with pytest.raises(UserError, match="LLAVA_MAX_PIXELS is 'many'"):
        load_image(path)


def test_a_bomb_is_refused_by_its_header(tmp_path):
    header = struct.pack(">IIBBBBB", 200_000, 200_000, 8, 0, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)))
    with pytest.raises(UserError, match="bomb.png has more than 100,000,000 pixels"):
        load_image(path)


@pytest.mark.parametrize("size", [(30_000, 2), (2, 30_000)])
def test_a_strip_is_made_smaller_before_it_is_padded(size):
    square = expand2square(Image.new("RGB", size, (9, 9, 9)), (0, 0, 0))
    assert square.size == (4096, 4096)
    assert expand2square(Image.new("RGB", (600, 2)), (0, 0, 0)).size == (600, 600)


# -- notes beside the pixels -------------------------------------------------------------------------------------------


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


LONG = zlib.compress(b"a" * (3 << 20))
NOTES = {
    "broken exif": chunk(b"eXIf", b"no exif at all"),
    "cut exif": chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x09\x01\x12"),
    "long text": chunk(b"zTXt", b"Comment\0\0" + LONG),
    "long xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
    "profile": chunk(b"iCCP", b"icc\0\0" + zlib.compress(np.random.default_rng(0).bytes(2 << 20))),
    "broken text": chunk(b"zTXt", b"Comment\0\0not compressed"),
    "wrong checksum": chunk(b"tEXt", b"a\0b")[:-1] + b"x",
}


@pytest.mark.parametrize("note", NOTES)
def test_notes_beside_healthy_pixels_change_nothing(tmp_path, note):
    grey = (RAMP * 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, "PNG")
    data = stream.getvalue()
    shown = decode_image(data[:33] + NOTES[note] + data[33:], "noted.png")
    assert np.array_equal(np.asarray(shown)[..., 0], grey)
    with pytest.raises(UserError, match="cut.png"):
        decode_image(data[:33] + NOTES[note] + data[33:-40], "cut.png")


def test_a_jpeg_with_broken_exif_opens(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (8, 8), (99, 99, 99)), "a.jpg", exif=b"Exif\0\0MM\0*\0\0\xff\xff broken")
    assert load_image(path).getpixel((4, 4))[0] in range(97, 102)


# -- deep greys --------------------------------------------------------------------------------------------------------


def tiff(pixels, photometric=1, sample_format=1, no_data=None):
    """An uncompressed TIFF; photometric 0 is white-is-zero, sample format 1 unsigned, 2 signed, 3 float."""
    height, width = pixels.shape
    data = pixels.tobytes() + (no_data or b"")
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8 * pixels.itemsize), (259, 3, 1, 1)]
    tags += [(262, 3, 1, photometric), (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, pixels.nbytes)]
    tags += [(339, 3, 1, sample_format)]
    tags += [(42113, 2, len(no_data), 8 + pixels.nbytes)] if no_data else []
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


BYTES = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (4, 1))
HOLED = BYTES.astype(np.float32) - 1000
HOLED[0, 0] = np.nan
FILLED = BYTES.astype(np.float32) - 1000
FILLED[0, 0] = -99999


@pytest.mark.parametrize(
    ("file", "right"),
    [
        (tiff(BYTES, 0), 255 - BYTES),
        (tiff(BYTES.astype(np.uint16) * 257), BYTES),
        (tiff(BYTES.astype(np.uint16) * 257, 0), 255 - BYTES),
        (tiff(BYTES.astype(np.uint32) * 16843009), BYTES),
        (tiff(BYTES.astype(np.int32) * 1000 - 99999, 1, 2), BYTES),
        (tiff(BYTES.astype(np.float32) - 1000, 1, 3), BYTES),
        (tiff(HOLED, 1, 3), BYTES),
        (tiff(FILLED, 1, 3, b"-99999\0\0\0"), BYTES),
    ],
)
def test_deep_grey_is_shown_as_the_files_own_tags_say(file, right):
    shown = np.asarray(decode_image(file, "deep.tif"))[..., 0].astype(int)
    assert np.abs(shown[1:] - right[1:]).max() <= 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=9))
def test_any_values_become_bytes_in_their_order(values):
    numbers = np.array(values, dtype=np.float32)
    shown = stretch_to_bytes(numbers).astype(int)
    finite = np.isfinite(numbers)
    assert (shown[np.isnan(numbers)] == 0).all()
    order = np.argsort(numbers[finite], kind="stable")
    assert (np.diff(shown[finite][order]) >= 0).all()
    if len(set(numbers[finite].tolist())) > 1:
        assert shown[finite].min() == 0 and shown[finite].max() == 255


# -- any bytes ---------------------------------------------------------------------------------------------------------


def _samples():
    grey = Image.effect_noise((12, 9), 60)
    for name, image in (("PNG", grey), ("JPEG", grey), ("GIF", grey), ("TIFF", grey), ("BMP", grey), ("WEBP", grey)):
        stream = io.BytesIO()
        image.save(stream, name)
        yield stream.getvalue()
    yield tiff(BYTES.astype(np.uint16) * 257, 0)


SAMPLES = list(_samples())


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=6),
    st.integers(0, 2000) | st.none(),
)
def test_damaged_bytes_are_a_picture_or_one_line(data, changes, cut):
    damaged = bytearray(data)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    try:
        opened = decode_image(bytes(damaged[:cut]), "damaged")
    except UserError as error:
        assert "damaged" in str(error) and "\n" not in str(error)
    else:
        assert opened.mode == "RGB"
