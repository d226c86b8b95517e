"""DICOM in the standard's order: checked by hand, against pydicom's own steps, and on its sample files."""

from __future__ import annotations

import io
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava import dicom
from llava.image_io import decode_image, load_image
from llava.utils import UserError


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


# -- the standard's order, by hand -------------------------------------------------------------------------------------

RAMP = np.tile(np.linspace(0, 4095, 64).astype(np.uint16), (4, 1))
HU = RAMP[0].astype(float) - 1024
CT = {"RescaleSlope": "1", "RescaleIntercept": "-1024"}
WINDOW = {"WindowCenter": "40", "WindowWidth": "400"}


def items(*values):
    pydicom = pytest.importorskip("pydicom", reason="the dicom extra is not installed")
    return pydicom.Sequence(list(values))


def item(**values):
    pydicom = pytest.importorskip("pydicom", reason="the dicom extra is not installed")
    made = pydicom.Dataset()
    for name, value in values.items():
        setattr(made, name, value)
    return made


def table(first, entries, vr="SS", bits=16):
    made = item()
    made.add_new(0x00283002, vr, [len(entries), first, bits])
    made.add_new(0x00283006, "OW", np.asarray(entries).astype(np.uint16).tobytes())
    return made


def between(values, low, high):
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)


def seen(path):
    return np.asarray(load_image(path))[0].astype(int)


@pytest.mark.parametrize(
    ("pixels", "tags", "right"),
    [
        (RAMP, {**CT, "WindowCenter": None, "WindowWidth": None}, between(HU, -1024, 3071)),
        (RAMP, {**CT, "WindowCenter": "40", "WindowWidth": "0"}, between(HU, -1024, 3071)),
        (RAMP, {**CT, "WindowCenter": ["40", "300"], "WindowWidth": ["0", "2000"]}, between(HU, -700, 1299)),
        (RAMP, {"RescaleSlope": None, "RescaleIntercept": None, "WindowCenter": "2048", "WindowWidth": "4096"},
         between(RAMP[0].astype(float), 0, 4095)),
        (RAMP, {"RescaleSlope": "0", "RescaleIntercept": "-1024", **WINDOW}, between(HU, -160, 239)),
        (RAMP, {**CT, **WINDOW}, between(HU, -160, 239)),
        (RAMP, {**CT, **WINDOW, "VOILUTFunction": "LINEAR_EXACT"}, between(HU, -160, 240)),
        (RAMP, {**CT, **WINDOW, "VOILUTFunction": "NEW"}, between(HU, -160, 239)),
        (RAMP, {"WindowCenter": "2048", "WindowWidth": "1000", "VOILUTFunction": "SIGMOID"},
         255 / (1 + np.exp(-4 * (RAMP[0] - 2048.0) / 1000))),
        (RAMP, {**CT, **WINDOW, "PhotometricInterpretation": "MONOCHROME1"}, 255 - between(HU, -160, 239)),
        (RAMP.astype(np.int16) - 1000, {"PixelPaddingValue": -1000, "PixelPaddingRangeLimit": -500},
         between(RAMP[0] - 1000.0, -480, 3095)),
    ],
)  # fmt: skip
def test_the_standards_order(tmp_path, pixels, tags, right):
    assert np.abs(seen(write_dicom(tmp_path / "a.dcm", pixels, **tags))[:, 0] - right).max() <= 2


def test_tables_come_after_the_rescale_and_empty_ones_are_no_tables(tmp_path):
    inside = between(HU, -160, 240)
    signed, unsigned = (table(first, np.linspace(0, 65535, 401), vr) for first, vr in ((-160, "SS"), (65376, "US")))
    for one in (signed, unsigned):
        path = write_dicom(tmp_path / "a.dcm", RAMP.astype(np.int16), **CT, VOILUTSequence=items(one))
        assert np.abs(seen(path)[:, 0] - inside).max() <= 2
    empty = write_dicom(tmp_path / "c.dcm", RAMP, **CT, **WINDOW, VOILUTSequence=items())
    assert np.abs(seen(empty)[:, 0] - between(HU, -160, 239)).max() <= 2
    squares = table(0, np.arange(4096) ** 2 // 256, "US")
    shown = seen(write_dicom(tmp_path / "d.dcm", RAMP, ModalityLUTSequence=items(squares), RescaleSlope="3"))
    assert np.abs(shown[:, 0] - between(RAMP[0].astype(float) ** 2, 0, 4095**2)).max() <= 2


def test_what_functional_groups_say_is_heeded(tmp_path):
    group = item(
        FrameVOILUTSequence=items(item(**WINDOW)), PixelValueTransformationSequence=items(item(**CT, RescaleType="HU"))
    )
    frames = np.stack([RAMP, RAMP])
    path = write_dicom(tmp_path / "a.dcm", frames, SharedFunctionalGroupsSequence=items(group))
    assert np.abs(seen(path)[:, 0] - between(HU, -160, 239)).max() <= 2
    own = items(item(FrameVOILUTSequence=items(item(WindowCenter="1000", WindowWidth="2000"))), item())
    path = write_dicom(
        tmp_path / "b.dcm", frames, SharedFunctionalGroupsSequence=items(group), PerFrameFunctionalGroupsSequence=own
    )
    assert np.abs(seen(path)[:, 0] - between(HU, 0, 1999)).max() <= 2


def test_a_palette_is_colours(tmp_path):
    index = np.tile(np.arange(64, dtype=np.uint8) * 4, (4, 1))
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    tags = {}
    for colour, entries in (("Red", ramp[::-1]), ("Green", ramp * 0), ("Blue", ramp)):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tags[f"{colour}PaletteColorLookupTableData"] = np.ascontiguousarray(entries).tobytes()
    shown = seen(write_dicom(tmp_path / "a.dcm", index, "PALETTE COLOR", **tags))
    right = np.stack([255 - index[0].astype(int), index[0] * 0, index[0].astype(int)], -1)
    assert np.abs(shown - right).max() <= 1


def test_a_file_without_its_first_part_opens(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", RAMP, WindowCenter="2048", WindowWidth="4096")
    whole, data = seen(path), path.read_bytes()
    bare = data[132 + 12 + int.from_bytes(data[140:144], "little") :]
    for name in ("bare.dcm", "bare"):
        (tmp_path / name).write_bytes(bare)
        assert np.array_equal(seen(tmp_path / name), whole)


def test_several_frames_are_said_once_and_a_large_frame_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dicom, "_SAID", [])
    path = write_dicom(tmp_path / "a.dcm", np.stack([RAMP, RAMP]))
    load_image(path)
    load_image(path)
    assert capsys.readouterr().out.count("a.dcm has 2 frames; the first is seen") == 1
    monkeypatch.setenv("LLAVA_MAX_PIXELS", "255")
    with pytest.raises(UserError, match=r"a.dcm has 64 x 4 pixels, more than 255"):
        load_image(path)


# -- pydicom's own steps and files -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([None, "LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    st.floats(-500, 3000).map(lambda value: round(value, 2)),
    st.floats(2, 4000).map(lambda value: round(value, 2)),
    st.sampled_from([0.5, 1, 2]),
    st.integers(-1024, 0),
)
def test_windows_are_pydicoms(function, center, width, slope, intercept):
    pixels = pytest.importorskip("pydicom.pixels", reason="the dicom extra is not installed")
    tags = item(WindowCenter=center, WindowWidth=width, RescaleSlope=slope, RescaleIntercept=intercept)
    tags.update({"PhotometricInterpretation": "MONOCHROME2", "BitsStored": 12, "PixelRepresentation": 0})
    if function:
        tags.VOILUTFunction = function
    theirs = pixels.apply_voi_lut(pixels.apply_modality_lut(RAMP, tags), tags)
    low, high = intercept, 4095 * slope + intercept  # pydicom's range of the output
    stream = io.BytesIO()
    write_dicom(stream, RAMP, **{tag.keyword: tag.value for tag in tags if tag.keyword.startswith(("W", "R", "V"))})
    ours = np.asarray(decode_image(stream.getvalue(), "a.dcm"))[..., 0]
    assert np.abs(ours - (theirs - low) * (255 / (high - low))).max() <= 1.01


SAMPLE_FILES = (
    "693_J2KI CT_small ExplVR_BigEnd J2K_pixelrep_mismatch JPEG2000 MR_small MR_small_RLE MR_small_bigendian "
    "MR_small_implicit MR_small_jp2klossless SC_rgb_rle SC_rgb_jpeg_dcmtk SC_rgb_rle_16bit_2frame examples_palette "
    "examples_overlay examples_ybr_color image_dfl liver_1frame rtdose_1frame SC_ybr_full_422_uncompressed"
).split()


@pytest.mark.parametrize("name", SAMPLE_FILES)
def test_pydicoms_sample_files_are_seen_as_its_own_steps_give_them(name):
    pydicom = pytest.importorskip("pydicom", reason="the dicom extra is not installed")
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array

    path = Path(pydicom.__file__).parent / "data" / "test_files" / f"{name}.dcm"
    if not path.is_file():
        pytest.skip(f"this pydicom comes without {name}.dcm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = pydicom.dcmread(path)
        stored = pixel_array(data, index=0)
        shown = np.asarray(load_image(path)).astype(float)
        photometric = data.PhotometricInterpretation
        if photometric == "PALETTE COLOR":
            right = apply_color_lut(stored, data)[..., :3].astype(float)
            right = right / 257 if right.max() > 255 else right
        elif stored.ndim == 3:
            right = stored.astype(float)
            right = right if stored.dtype == np.uint8 else (right - right.min()) * 255 / np.ptp(right)
        else:
            values = apply_modality_lut(stored, data).astype(float)
            right = apply_voi_lut(values, data)
            low, high = (values.min(), values.max()) if right is values else (right.min(), right.max())
            right = (right - low) * 255 / (high - low)
            right = (255 - right if photometric == "MONOCHROME1" else right)[..., None].repeat(3, -1)
    assert shown.shape == right.shape
    assert np.corrcoef(shown.ravel(), right.ravel())[0, 1] > 0.999


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(128, 700), st.integers(0, 255)), min_size=1, max_size=5),
    st.integers(140, 900) | st.none(),
)
def test_damaged_files_are_a_picture_or_one_line(changes, cut):
    stream = io.BytesIO()
    write_dicom(stream, RAMP[:2, :16], **CT, **WINDOW)
    damaged = bytearray(stream.getvalue())
    for place, value in changes:
        damaged[place % len(damaged)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opened = decode_image(bytes(damaged[:cut]), "damaged.dcm")
        except UserError as error:
            assert "damaged.dcm" in str(error) and "\n" not in str(error)
        else:
            assert opened.mode == "RGB"
