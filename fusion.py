"""Turns raw medical VQA data into the JSONL files that training and evaluation read.

    python fusion.py                                   # VQA-RAD from its default place
    python fusion.py --data_dir <folder>               # VQA-RAD or SLAKE, told by content
    python fusion.py --metadata metadata.csv --reference vqa_ABD.json vqa_CHEST.json vqa_HEAD.json
    python fusion.py --dataset slake

See data/README.md for the inputs, the files written and the fields of a row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from llava.cli import SEEDS, flag, parse
from llava.data.raw import RAW, Example, RawOptions, Report
from llava.data.raw.outputs import report_text, summary_table, write_together
from llava.data.raw.pictures import missing_images
from llava.data.raw.sources import DATASETS, find_source
from llava.inside import Folder
from llava.utils import UserError, run_cli


def main(arguments: list[str] | None = None) -> int:
    options = parse(Arguments, arguments, __doc__)
    wanted = {field.name: getattr(options, field.name) for field in fields(RawOptions)}
    source = find_source(RawOptions(**wanted))
    print(f"{source.dataset} from {source.path}")
    data_set, report = RAW.get(source.dataset)(), Report(source.dataset)
    examples, domains, image_folder = data_set.read(source, report)
    check_images(examples, image_folder, options.allow_missing_images, report)
    fused = data_set.fuse(examples, domains, options.seed, report)
    output, files = Path(options.output_dir), fused.files
    refuse_stale_test_file(output, files, data_set.pairs)
    check_tasks(files)
    write_together(output, {data_set.report_name: report_text(report, files), **files})
    print(f"images in {image_folder}\n\n{summary_table(fused.splits, domains)}\n")
    print_report(report, output / data_set.report_name)
    for name, text in files.items():
        print(f"wrote {output / name} ({text.count(chr(10))} rows)")
    return 0


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    dataset: str = flag("auto", f"auto (told by content) or {', '.join(DATASETS)}")
    data_dir: str | None = flag(None, "raw data (default: VQA_RAD_DIR or data/vqa-rad; SLAKE_DIR or data/slake)")
    metadata: str | None = flag(None, "csv with image, question, answer (default: data/train/metadata.csv)")
    test_metadata: str | None = flag(None, "second csv, whose rows are the test rows")
    reference: list[str] = flag([], "vqa_<ORGAN>.json files or their folder (default: beside the csv)")
    image_dir: str | None = flag(None, "pictures (default: images/ of the data folder; imgs/ for SLAKE)")
    follow_links: bool = flag(False, "open pictures that are links out of their folder")
    output_dir: str = flag("data", "where the JSONL files go")
    seed: int = flag(0, "deals the pictures of the unseen-image split", **SEEDS)
    allow_missing_images: bool = flag(False, "keep rows whose picture is not there")


def check_images(examples: list[Example], folder: Folder, allow: bool, report: Report) -> None:
    """Refuse (or note, where allowed) rows whose picture is missing."""
    missing = missing_images(examples, folder)
    if not missing:
        return
    text = f"{len(missing)} images are missing or empty in {folder}: {shortened(missing, 3)}"
    if not allow:
        raise UserError(
            f"{text} (place them there, name the folder with --image_dir, pass --follow_links where they are links, or "
            "pass --allow_missing_images)"
        )
    report.notes.append(text)


def refuse_stale_test_file(output: Path, files: dict[str, str], pairs: Iterable[tuple[str, str]]) -> None:
    """A test file of an earlier run must not stand beside training files that may hold its rows."""
    for train, test in pairs:
        if train in files and test not in files and (output / test).exists():
            raise UserError(
                f"{output / test} is from an earlier run, but this input gives no test rows for it "
                "(give --test_metadata, or remove it)"
            )


def check_tasks(files: dict[str, str]) -> None:
    """Refuse an empty file: a task without rows cannot be trained or tested."""
    empty = [name for name, text in files.items() if not text]
    if empty:
        raise UserError(f"no rows for {', '.join(empty)}: the input lacks a domain or a split; nothing was written")


def print_report(report: Report, path: Path) -> None:
    for how, count in report.organ_join.get("counts", {}).items():
        print(f"organ by {how}: {count} rows")
    for kind, ids in sorted(report.mended.items()):
        print(f"mended {kind}: {len(ids)} rows")
    reasons = [row["reason"] for row in report.dropped]
    for reason in sorted(set(reasons)):
        ids = [row["question_id"] for row in report.dropped if row["reason"] == reason]
        print(f"dropped, {reason}: {len(ids)} rows (question_id {shortened(ids)})")
    if report.repeated:
        ids = [row["question_id"] for row in report.repeated]
        print(f"kept, but repeat another row: {len(ids)} rows (question_id {shortened(ids)})")
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"details in {path}")


def shortened(values: list, most: int = 8) -> str:
    """The first values, and a mark where there are more."""
    return ", ".join(map(str, values[:most])) + (", …" if len(values) > most else "")


if __name__ == "__main__":
    run_cli(main)
