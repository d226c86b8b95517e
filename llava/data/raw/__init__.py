"""Raw data sets, one file each, and what ``fusion.py`` does with them: mending, joining organs, splitting, writing.

A data set is a subclass of ``RawDataset``, registered under its name; see ``docs/extending.md``.
"""

from __future__ import annotations

from llava.data.raw.dataset import Fused, RawDataset, RawOptions, Source
from llava.data.raw.example import TEST, TRAIN, VALIDATE, Example, Report
from llava.registry import Registry

RAW: Registry[type[RawDataset]] = Registry("raw data set", __name__)

__all__ = ["RAW", "TEST", "TRAIN", "VALIDATE", "Example", "Fused", "RawDataset", "RawOptions", "Report", "Source"]
