"""The room's stage over a tiny base, what the evaluation answers to it, a service on it, and pictures of all kinds."""

from __future__ import annotations

import base64
import io
import struct
import threading
import time
import zlib
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_llava import write_base, write_images, write_stage

from llava.eval.answerer import Answerer
from llava.eval.generation import Generation, Loading
from llava.eval.run_llava import eval_model
from llava.serve.question import Limits, Question
from llava.serve.service import Service

NEW = 12
"""Tokens of an answer."""
NAME = "llava-tiny_abd_chest"


class Place:
    """A folder with a base, a stage over it and pictures; ``service`` answers as the stage."""

    def __init__(self, folder):
        self.folder = folder
        self.base = write_base(folder / "tiny-base")
        self.stage = write_stage(folder / NAME, self.base, seed=1)
        self.images = write_images(folder / "images", [f"{number}.png" for number in range(4)])
        answerer = Answerer(str(self.base), Loading(device="cpu")).use(str(self.stage))
        self.service = Service(answerer, NAME, Generation(max_new_tokens=NEW), Limits(at_once=4))

    def picture(self, number=0):
        return Image.open(self.images / f"{number}.png").convert("RGB")

    def png(self, number=0):
        return (self.images / f"{number}.png").read_bytes()

    def question(self, text, *numbers, new=NEW, **more):
        """What a user asks about some of the pictures."""
        turns = (("human", "<image>\n" * len(numbers) + text),)
        pictures = tuple(self.picture(number) for number in numbers)
        return Question(turns, pictures, Generation(max_new_tokens=new), **more)

    def truth(self, query, *files, new=NEW, **more):
        """What ``run_llava`` answers to the same."""
        flags = {"model_path": str(self.stage), "model_base": str(self.base), "device": "cpu", "temperature": 0}
        names = [str(file if hasattr(file, "parts") else self.images / f"{file}.png") for file in files]
        return eval_model(SimpleNamespace(**flags, image_file=names, query=query, max_new_tokens=new, **more))


def dicom_bytes(frames=1):
    """A small DICOM file of 12 bits, shown by its window."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian

    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3.4"
    data.Rows, data.Columns, data.SamplesPerPixel = 24, 20, 1
    data.PhotometricInterpretation, data.PixelRepresentation = "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.WindowCenter, data.WindowWidth = 1000, 1500
    data.NumberOfFrames = frames
    data.PixelData = np.linspace(0, 4095, 480).astype("<u2").tobytes() * frames
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, data, enforce_file_format=True)
    return stream.getvalue()


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def bomb(width=10_000, height=10_000):
    """A small PNG file of 100 megapixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width // 8 + 1) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@contextmanager
def running(app):
    """The address of an app that answers on a port of this machine."""
    uvicorn = pytest.importorskip("uvicorn")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
