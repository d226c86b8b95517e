"""Fetches VQA-RAD (about 20 MB, CC0 1.0) for users with internet.

    python scripts/download_vqa_rad.py                 # the authors' JSON and pictures, from OSF
    python scripts/download_vqa_rad.py --source hf     # the Hugging Face copy, with the organ references from OSF

Running it again keeps what is there and right, and fetches the rest.
"""

import csv
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from llava.cli import fail, flag, parse
from llava.data.raw.download import Unreachable, fetch, pictures_sha256, unpack_pictures
from llava.data.raw.example import Report
from llava.data.raw.vqa_rad import DOMAINS, FILE_NAMES, read_vqa_rad
from llava.data.rows import json_values
from llava.files import atomic_write, file_sha256
from llava.targets import remove
from llava.utils import UserError, run_cli

# Everything that lies elsewhere. OSF project 89kps; OSF makes the zip of the image folder anew for each request, so
# its own checksum changes, and the pictures are checked instead (see pictures_sha256).
HOME = "https://osf.io/89kps/"
JSON_URL = "https://osf.io/download/6qdas/"
JSON_SHA256 = "948b7156059b864cf72344fb10669233526b175c243e5a046d20d4201d297a95"
IMAGES_URL = "https://files.osf.io/v1/resources/89kps/providers/osfstorage/5b21453986d8510011c277bc/?zip="
IMAGES_SHA256 = "04324ab9dd8bfabd07538bddcb8fb31677741036e047cce68df4098a3cc583ba"
HF_DATASET = "flaviagiammarino/vqa-rad"

PICTURE = re.compile(r"synpic\d+\.jpg")
ENDINGS = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png"}


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    folder = Path(options.output_dir)
    by_hand = f"place {FILE_NAMES[0]} and images/ (315 pictures) in {folder} yourself, from {HOME}"
    try:
        table = fetch_json(options, folder)
        if options.source == "osf":
            fetch_images(options, folder)
            print(f"VQA-RAD is complete in {folder}; next: python fusion.py --data_dir {folder}")
            return 0
    except Unreachable as error:
        raise UserError(f"cannot download {error} ({by_hand})") from error
    train = Path(options.train_dir)
    write_references(table, train)
    rows = export_hf(options.hf_dataset, folder / "images", train / "metadata.csv")
    print(f"wrote {train / 'metadata.csv'} ({rows} rows); next: python fusion.py --metadata {train / 'metadata.csv'}")
    return 0


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    source: str = flag("osf", "where the pictures come from", choices=("osf", "hf"))
    output_dir: str = flag("data/vqa-rad", "folder of the JSON and of images/")
    train_dir: str = flag("data/train", "folder of metadata.csv and vqa_<ORGAN>.json (hf)")
    json_url: str = JSON_URL
    json_sha256: str = JSON_SHA256
    images_url: str = IMAGES_URL
    images_sha256: str = flag(IMAGES_SHA256, "of the lines '<sha256>  <name>' of all pictures")
    hf_dataset: str = flag(HF_DATASET, "dataset id, or a local folder in its layout")
    timeout: float = flag(30.0, "seconds without a byte until a connection is broken", above=0)
    attempts: int = flag(4, "downloads to try for each file", least=1, most=100)


def parse_arguments(arguments: list[str] | None) -> Arguments:
    options = parse(Arguments, arguments, __doc__)
    if options.attempts < 1 or options.timeout <= 0:
        fail("--attempts and --timeout must be positive")
    return options


def fetch_json(options: Arguments, folder: Path) -> Path:
    """The authors' JSON, under either of its names, with the right checksum."""
    for name in FILE_NAMES:
        path = folder / name
        if path.is_file() and file_sha256(path) == options.json_sha256:
            print(f"{path} is there")
            return path
    target = folder / FILE_NAMES[0]
    if target.is_file():
        raise UserError(f"{target} is another version than the published one (move it away, or pass --json_sha256)")
    fetch(options.json_url, target, options.json_sha256, options.timeout, options.attempts)
    return target


def fetch_images(options: Arguments, folder: Path) -> None:
    """The pictures, checked as a whole."""

    def right(place: Path) -> bool:
        return pictures_sha256(place, PICTURE) == options.images_sha256

    images = folder / "images"
    if right(images):
        print(f"{images} is complete")
        return
    archive = folder / "images.zip"
    fetch(options.images_url, archive, None, options.timeout, options.attempts)
    count = unpack_pictures(archive, images, PICTURE, right)
    remove(archive)
    print(f"unpacked {count} pictures into {images}")


def write_references(table: Path, folder: Path) -> None:
    """``vqa_<ORGAN>.json`` for each organ, from the authors' JSON: the Hugging Face copy lacks the organ."""
    organs = {example.id: example.domain for example in read_vqa_rad(table, Report("vqa-rad"))}
    rows = [value for _, value in json_values(table)]
    for domain in DOMAINS:
        target = folder / f"vqa_{domain.upper()}.json"
        own = [row for row in rows if organs[int(row["qid"])] == domain]
        with atomic_write(target) as stream:
            json.dump(own, stream, ensure_ascii=False, indent=1)
        print(f"wrote {target} ({len(own)} rows)")


def export_hf(dataset: str, images: Path, target: Path) -> int:
    """The Hugging Face copy as ``metadata.csv``, and its pictures named by their content, so each is stored once.

    Returns:
        The number of rows.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image", "question", "answer", "split"])
    count = 0
    for split, row in hf_rows(dataset):
        image = row.get("image")
        data = image.get("bytes") if isinstance(image, dict) else None
        if not data or not isinstance(row.get("question"), str) or not isinstance(row.get("answer"), str):
            raise UserError(f"{dataset}, split {split}: a row lacks image, question or answer")
        ending = next((ending for magic, ending in ENDINGS.items() if data.startswith(magic)), ".jpg")
        name = f"hf_{hashlib.sha256(data).hexdigest()[:16]}{ending}"
        if not (images / name).is_file():
            with atomic_write(images / name, "wb") as stream:
                stream.write(data)
        writer.writerow([name, row["question"], row["answer"], split])
        count += 1
    with atomic_write(target) as stream:
        stream.write(table.getvalue())
    return count


def hf_rows(dataset: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(split, row)`` of a Hugging Face data set, pictures as the bytes that were uploaded."""
    import datasets

    try:
        loaded = datasets.load_dataset(dataset)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot load {dataset}: {reason} (without internet, place metadata.csv with columns image, question, "
            "answer, split in data/train and its pictures in data/vqa-rad/images)"
        ) from error
    for split in ("train", "test"):
        if split not in loaded:
            raise UserError(f"{dataset} has no split {split!r}, only {', '.join(loaded)}")
        for row in loaded[split].cast_column("image", datasets.Image(decode=False)):
            yield split, row


if __name__ == "__main__":
    run_cli(main)
