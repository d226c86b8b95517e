"""Generate the radiology phantom dataset: pictures, a training file for each task, and one test file.

Example::

    python scripts/make_phantom.py --output_dir data/phantom --contact_sheet output/phantom.png

Running it again with the same settings does nothing; with others it replaces the folder.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from llava.cli import flag, flags_of, given, parse
from llava.data.rows import Row, read_rows
from llava.files import atomic_write
from llava.inside import inside
from llava.toy.phantom import PhantomConfig, make_phantom, png_bytes
from llava.toy.phantom_domains import DOMAINS
from llava.utils import run_cli

_ZOOM = 3
_LINES = 2
_LINE_HEIGHT = 14


@dataclass(kw_only=True)
class Arguments(flags_of(PhantomConfig)):
    """Flags; those of ``PhantomConfig`` override its defaults."""

    output_dir: str = flag("data/phantom", "folder to write")
    contact_sheet: str | None = flag(None, "also draw an overview of pictures, questions, answers", metavar="PNG")


def main() -> int:
    """Generate the dataset and print what it holds."""
    args = parse(Arguments, description=__doc__)
    config = PhantomConfig(**given(args, PhantomConfig))
    made = make_phantom(args.output_dir, config)
    print(f"{args.output_dir}: {'generated' if made else 'already complete, nothing to do'}")
    folder = Path(args.output_dir)
    parts = {f"train_{task}": read_rows(folder / f"train_{task}.jsonl") for task in DOMAINS}
    parts |= {name: read_rows(folder / f"{name}.jsonl") for name in ("validation", "test")}
    print_summary(parts)
    if args.contact_sheet:
        with atomic_write(args.contact_sheet, "wb") as stream:
            stream.write(png_bytes(contact_sheet(parts["test"], folder / "images")))
        print(f"overview: {args.contact_sheet}")
    return 0


def print_summary(parts: dict[str, list[Row]]) -> None:
    """Rows, pictures and the share of the commonest answer for each file and domain."""
    print(f"{'file':<12} {'domain':<7} {'rows':>5} {'closed':>7} {'pictures':>9} {'majority answer':>16}")
    for name, rows in parts.items():
        for domain in DOMAINS:
            own = [row for row in rows if row.domain == domain]
            if not own:
                continue
            commonest = Counter(row.answer for row in own).most_common(1)[0][1] / len(own)
            closed = sum(row.answer_type == "CLOSED" for row in own)
            pictures = len({row.image for row in own})
            print(f"{name:<12} {domain:<7} {len(own):>5} {closed:>7} {pictures:>9} {commonest:>16.1%}")


def contact_sheet(rows: list[Row], image_folder: Path, columns: int = 8) -> np.ndarray:
    """A uint8 overview picture: ``columns`` pictures of each domain with one question and answer below each."""
    by_domain: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        by_domain[str(row.domain)].setdefault(str(row.image), row)
    lines = []
    for domain in DOMAINS:
        chosen = list(by_domain[domain].values())[: 2 * columns]
        tiles = [_tile(row, image_folder) for row in chosen]
        blank = np.full_like(tiles[0], 255)
        tiles += [blank] * (-len(tiles) % columns)
        lines += [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
    return np.vstack(lines)


def _tile(row: Row, image_folder: Path) -> np.ndarray:
    picture = cv2.imread(str(inside(image_folder, str(row.image))), cv2.IMREAD_GRAYSCALE)
    large = cv2.resize(picture, None, fx=_ZOOM, fy=_ZOOM, interpolation=cv2.INTER_NEAREST)
    text = np.full((_LINES * _LINE_HEIGHT, large.shape[1]), 255, np.uint8)
    for index, line in enumerate((row.question, str(row.answer))):
        place = (2, (index + 1) * _LINE_HEIGHT - 4)
        cv2.putText(text, line, place, cv2.FONT_HERSHEY_SIMPLEX, 0.33, 0, 1, cv2.LINE_AA)
    return cv2.copyMakeBorder(np.vstack([large, text]), 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=255)


if __name__ == "__main__":
    run_cli(main)
