"""Pictures as hospitals have them: every kind opens as 8-bit RGB, a broken one is named."""

from __future__ import annotations

import struct
import sys

import numpy as np
import pytest
from PIL import Image

from llava.image_io import load_image
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
    assert load_image(saved(tmp_path, image, "turned.jpg", exif=exif)).size == (4, 6)


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


def write_dicom(path, pixels: np.ndarray, photometric: str = "MONOCHROME2", **tags):
    pydicom = pytest.importorskip("pydicom", reason="the dicom extra is not installed")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3"
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    data.Rows, data.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = (3, "RGB") if colour else (1, photometric)
    if colour:
        data.PlanarConfiguration = 0
    data.BitsAllocated = data.BitsStored = pixels.dtype.itemsize * 8
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype.kind == "i")
    if pixels.ndim == 3 and not colour:
        data.NumberOfFrames = pixels.shape[0]
    data.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


def test_dicom_uses_its_window_and_slope(tmp_path):
    raw = np.array([[0, 1024], [1064, 2000]], dtype=np.int16)
    path = write_dicom(
        tmp_path / "ct.dcm", raw, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400
    )
    grey = np.asarray(load_image(path))[..., 0]
    assert grey[0, 0] == 0 and grey[1, 1] == 255
    assert abs(int(grey[1, 0]) - 128) <= 2 and abs(int(grey[0, 1]) - 102) <= 2


def test_dicom_monochrome1_is_inverted_and_frames_give_the_first(tmp_path):
    frames = np.stack([np.array([[0, 100]]), np.array([[100, 0]])]).astype(np.uint16)
    grey = np.asarray(load_image(write_dicom(tmp_path / "xray.dcm", frames, "MONOCHROME1")))[..., 0]
    assert grey.tolist() == [[255, 0]]


def test_dicom_padding_does_not_eat_the_contrast(tmp_path):
    raw = np.array([[-2000, 0], [50, 100]], dtype=np.int16)
    grey = np.asarray(load_image(write_dicom(tmp_path / "pad.dcm", raw, PixelPaddingValue=-2000)))[..., 0]
    assert grey.tolist() == [[0, 0], [127, 255]]


def test_dicom_without_ending_and_colour(tmp_path):
    pixels = np.full((2, 2, 3), (10, 20, 30), dtype=np.uint8)
    assert load_image(write_dicom(tmp_path / "IM000001", pixels)).getpixel((0, 0)) == (10, 20, 30)


def test_broken_dicom_is_named(tmp_path):
    pytest.importorskip("pydicom", reason="the dicom extra is not installed")
    path = tmp_path / "broken.dcm"
    path.write_bytes(b"\0" * 128 + b"DICM" + struct.pack("<I", 7))
    with pytest.raises(UserError, match="DICOM file cannot be read.*broken.dcm"):
        load_image(path)


def test_dicom_without_the_extra_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "scan.dcm"
    path.write_bytes(b"\0" * 132)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"scan.dcm.*pip install '\.\[dicom\]'"):
        load_image(path)
