"""What ``fusion.py`` writes: all files together at the end, a report, and a table of the rows."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from llava.data.raw.example import TEST, TRAIN, Example, Report
from llava.data.rows import ANSWER_TYPES, json_line
from llava.files import atomic_write
from llava.inside import inside
from llava.utils import UserError

Table = dict[str, list[Example]]


def split_files(
    examples: Sequence[Example],
    domains: Sequence[str],
    combined: str,
    task: str,
    test: str,
    fold_of: dict[int | str, int] | None = None,
) -> dict[str, str]:
    """File name -> text: all training rows, each domain's, and the test rows where there are some.

    Args:
        combined, task, test: the file names; ``task`` with ``{}`` for the domain.
        fold_of: question id -> fold, written into the rows.
    """
    train = [example for example in examples if example.split == TRAIN]
    files = {combined: lines_of(train, domains, fold_of)}
    for domain in domains:
        files[task.format(domain)] = lines_of([row for row in train if row.domain == domain], domains, fold_of)
    if tested := [example for example in examples if example.split == TEST]:
        files[test] = lines_of(tested, domains, fold_of)
    return files


def lines_of(examples: Sequence[Example], domains: Sequence[str], fold_of: dict[int | str, int] | None = None) -> str:
    """The examples as question rows, one a line."""
    return "".join(
        json_line(example.row(domains, fold=fold_of[example.id] if fold_of else None), f"question {example.id}")
        for example in examples
    )


def write_together(folder: Path, files: dict[str, str]) -> None:
    """Write all files or none: each is complete on disk, under a temporary name, before the first takes its place.

    Raises:
        UserError: ``folder`` is no folder and cannot be made.
        OSError: disk full, no permission.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output folder {folder} is a file (choose another with --output_dir)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"cannot make output folder {folder}: {reason} (choose another with --output_dir)") from error
    with contextlib.ExitStack() as stack:
        for name, text in files.items():
            stream = stack.enter_context(atomic_write(inside(folder, name)))
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())


def report_text(report: Report, files: dict[str, str]) -> str:
    """The report as JSON, with the number of rows in each file."""
    content = asdict(report) | {"files": {name: text.count("\n") for name, text in files.items()}}
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def summary_table(splits: Table, domains: Sequence[str]) -> str:
    """Rows per split, domain and answer type, and pictures per split, as text with aligned columns."""
    kinds: list[str | None] = list(ANSWER_TYPES[::-1])
    if any(example.answer_type is None for rows in splits.values() for example in rows):
        kinds.append(None)
    header = ["rows", *(f"{domain} {(kind or 'untyped').lower()}" for domain in domains for kind in kinds)]
    lines = [[*header, "total", "images"]]
    for name, rows in splits.items():
        count = Counter((row.domain, row.answer_type) for row in rows)
        counts = [count[domain, kind] for domain in domains for kind in kinds]
        lines.append([name, *map(str, counts), str(len(rows)), str(len({row.image for row in rows}))])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(_aligned(line, widths) for line in lines)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([cells[0].ljust(widths[0]), *numbers])
