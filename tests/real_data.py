"""The real VQA-RAD, for tests that are about it: its public metadata and pictures, where they lie on this machine."""

import json
import os
from pathlib import Path

import pytest

from llava.data.rows import question_row

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "VQA_RAD_Dataset_Public.json"


def vqa_rad_folder():
    """The folder of VQA-RAD; skips the test where it is not here."""
    folder = Path(os.environ.get("VQA_RAD_DIR", ROOT.parent / "shared" / "data" / "vqa-rad"))
    if not (folder / SOURCE).is_file():
        pytest.skip(f"the real VQA-RAD is not at {folder} (set VQA_RAD_DIR)")
    return folder


def vqa_rad_rows():
    """Question rows of its official ``train`` and ``test`` split, with the organ as domain."""
    source = vqa_rad_folder() / SOURCE
    organs = {"ABD": "abd", "CHEST": "chest", "HEAD": "head"}
    rows = {"train": [], "test": []}
    for raw in json.loads(source.read_text(encoding="utf-8")):
        split = "test" if raw["phrase_type"].startswith("test_") else "train"
        text, domain = " ".join(str(raw["question"]).split()), organs[raw["image_organ"].strip()]
        answer, kind = str(raw["answer"]).strip(), raw["answer_type"].strip()
        row = question_row(
            int(raw["qid"]), raw["image_name"], text, answer, domain, tuple(organs.values()), answer_type=kind
        )
        rows[split].append(row)
    return rows
