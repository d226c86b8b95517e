"""Small raw data sets in the forms that ``fusion.py`` reads, with their traps, and where the real ones are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORGANS = ("ABD", "CHEST", "HEAD")


def real_data(variable: str, folder: str, file: str) -> Path:
    """Folder of a real data set; the test is skipped when it is not there."""
    choices = [os.environ.get(variable), ROOT.parent / "shared" / "data" / folder, ROOT / "data" / folder]
    for choice in choices:
        if choice and (Path(choice) / file).is_file():
            return Path(choice)
    pytest.skip(f"the real data is not here (set {variable} to its folder)")


def vqa_rad_row(qid, image, organ, question, answer, kind="CLOSED", phrase_type="freeform", **fields):
    """One row as in the authors' JSON."""
    row = {"qid": qid, "phrase_type": phrase_type, "image_case_url": f"https://case/{image}", "image_name": image}
    row |= {"image_organ": organ, "evaluation": "evaluated", "question": question, "question_type": "PRES"}
    return row | {"answer": answer, "answer_type": kind} | fields


def vqa_rad_rows() -> list[dict]:
    """Twelve pictures, four an organ; a shared question; a test row that leaks; a repeated row; the file's slips."""
    rows = []
    for organ in ORGANS:
        for number in range(4):
            image, base = f"{organ.lower()}{number}.jpg", len(rows) + 10
            rows.append(vqa_rad_row(base, image, organ, f"Is the {organ} finding {number} there?", "Yes"))
            rows.append(vqa_rad_row(base + 1, image, organ, "Is it normal?", "No"))
            own = f"What does {organ} {number} show?"
            rows.append(vqa_rad_row(base + 2, image, organ, own, "A mass", "OPEN", "test_para"))
    rows[0]["qid"] = str(rows[0]["qid"])
    rows[1]["answer_type"] = "CLOSED "
    rows[3]["question_type"] = "POS, PRSE"
    rows[4]["question_type"] = "Other"
    rows[5] |= {"answer": 4, "question_type": "ATRIB"}
    rows[8]["answer"] = "lungs \tbony cavit y\tvessels"
    rows[11]["answer"] = '" on the skin'
    rows.append(vqa_rad_row(900, "abd0.jpg", "ABD", "what does abd 0 show", "a mass.", "OPEN"))  # leaks a test row
    rows.append(vqa_rad_row(901, "head3.jpg", "HEAD", "Is it normal ?", "no"))  # repeats a training row
    rows[-3]["image_case_url"] = rows[-6]["image_case_url"]  # head2 and head3 are one case
    return rows


def write_vqa_rad(folder: Path, rows: list[dict] | None = None, name: str = "VQA_RAD_Dataset_Public.json") -> Path:
    """The authors' layout in ``folder``: the JSON and ``images/``. Each picture has bytes of its own."""
    rows = vqa_rad_rows() if rows is None else rows
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    write_pictures(folder / "images", (row["image_name"] for row in rows))
    return folder


def write_pictures(folder: Path, names) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"picture {name}".encode())


def slake_row(qid, image, modality, question, answer, kind="CLOSED", **fields):
    """One row as in SLAKE's files."""
    row = {"img_id": 1, "img_name": image, "question": question, "answer": answer, "q_lang": "en", "location": "Lung"}
    row |= {"modality": modality, "answer_type": kind, "base_type": "vqa", "content_type": "Organ", "qid": qid}
    return row | fields


def write_slake(folder: Path) -> Path:
    """SLAKE's layout: three files, three modalities each, Chinese rows, an empty answer and a repeated row."""
    number = 0
    images = []
    for split in ("train", "validate", "test"):
        rows = []
        for modality in ("CT", "MRI", "X-Ray"):
            image = f"xmlab{number}/source.jpg"
            images.append(image)
            rows.append(slake_row(number, image, modality, "Is this  a lung?", "Yes"))
            rows.append(slake_row(number + 1, image, modality, "Which organ?", "Liver", "OPEN"))
            rows.append(slake_row(number + 2, image, modality, "这是肺吗?", "是", q_lang="zh"))
            number += 3
        if split == "train":
            rows.append(slake_row(800, images[0], "CT", "Is there a liver?", ""))
            rows.append(slake_row(801, images[0], "CT", "Is this a lung?", "yes"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    write_pictures(folder / "imgs", images)
    return folder


def write_references(folder: Path, rows: list[dict]) -> list[Path]:
    """``vqa_<ORGAN>.json`` for the organs of ``rows``."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for organ in ORGANS:
        path = folder / f"vqa_{organ}.json"
        path.write_text(json.dumps([row for row in rows if row["image_organ"] == organ]), encoding="utf-8")
        files.append(path)
    return files


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
