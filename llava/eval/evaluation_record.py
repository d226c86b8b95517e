"""What an evaluation was asked, and where it ran: ``evaluation.json`` in its folder, for the page about it."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shlex
from pathlib import Path
from typing import Any

from llava.devices import accelerator_names
from llava.eval.eval_video_qa import package_version
from llava.eval.evaluation import Evaluation, Settings
from llava.eval.shown_pictures import KINDS
from llava.files import atomic_write
from llava.outside import read_object
from llava.schema import Wanted, an_object, check_fields, list_of, whole, words, yes_or_no
from llava.utils import UserError

EVALUATION_NAME = "evaluation.json"
FORMAT_VERSION = 1
PACKAGES = ("llava", "torch", "transformers", "numpy")
_OWN = ("worker", "chunks", "page")
"""Settings that spread the same answers over processes, or show the same results."""
_NEEDED = ("sequence", "base_model")
"""Settings whose defaults are the environment's."""
_CPUS = Path("/proc/cpuinfo")

RECORD: dict[str, Wanted] = {
    "format_version": whole(1),
    **dict.fromkeys(("sequence", "method", "base", "question_file", "image_folder"), words(empty=False)),
    "route": words(),
    "follow_links": yes_or_no,
    "pictures": list_of(words()),
    "command": words(empty=False),
    "machine": words(),
    "versions": an_object(),
}


def write_evaluation_record(evaluation: Evaluation) -> Path:
    """Write the record into the evaluation's folder; returns the file."""
    asked, sequence = evaluation.settings, evaluation.sequence
    pictures = [kind for kind in KINDS if kind in asked.pictures]
    settings = dataclasses.replace(asked, base_model=evaluation.base, pictures=pictures)
    found = {
        "format_version": FORMAT_VERSION,
        "sequence": sequence.name,
        "method": settings.method,
        "route": settings.route,
        "base": Path(evaluation.base).name,
        "question_file": str(sequence.test),
        "image_folder": str(sequence.image_folder),
        "follow_links": settings.follow_links,
        "pictures": settings.pictures,
        "command": command_of(settings),
        "machine": machine_in_words(),
        "versions": {
            "python": platform.python_version(),
            **{name: package_version(name) for name in PACKAGES},
        },
    }
    with atomic_write(evaluation.folder / EVALUATION_NAME) as stream:
        json.dump(found, stream, indent=1, ensure_ascii=False)
        stream.write("\n")
    return evaluation.folder / EVALUATION_NAME


def read_evaluation_record(path: Path) -> dict[str, Any]:
    """A record.

    Raises:
        UserError: it is none.
    """
    try:
        found = read_object(path, "evaluation's record")
        check_fields(found, RECORD, str(path), closed=False, needed=("sequence", "method"))
    except UserError as error:
        raise UserError(f"{error} (not an evaluation's record; evaluate again)") from error
    return found


def command_of(settings: Settings) -> str:
    """The command line that asks for these settings, without what goes without saying."""
    line = ["python", "-m", "llava.eval.evaluate_sequence"]
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        if entry.name not in _OWN and (entry.name in _NEEDED or value != default):
            line += [f"--{entry.name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(line)


def machine_in_words() -> str:
    """``4 CPU cores (AMD EPYC 9454), 62 GiB of memory; NVIDIA H100``."""
    cores = os.cpu_count() or 1
    found = f"{cores} CPU core{'s' if cores > 1 else ''}"
    model = (
        re.search(r"^model name\s*:\s*(.+)$", _CPUS.read_bytes().decode(errors="replace"), re.M)
        if (_CPUS.is_file())
        else None
    )
    if name := (model[1].strip() if model else platform.processor()):
        found += f" ({name})"
    if {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        found += f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB of memory"
    return "; ".join([found, *accelerator_names()])
