"""What the shell scripts ask of a task sequence; the sequence itself is ``llava.continual.sequence``.

python -m llava.continual.tasks get SEQUENCE FIELD          test, tasks, train:<task>, keys.rank, merged_keys, ...
python -m llava.continual.tasks variables SEQUENCE NAME=FIELD...   several of them, as assignments of bash
python -m llava.continual.tasks stages SEQUENCE [--output_dir output] [--method retrieval]
python -m llava.continual.tasks flags SEQUENCE              flags of llava.train.train_mem, one word a line
python -m llava.continual.tasks check SEQUENCE [--method]    what would stop the training of any of its tasks
python -m llava.continual.tasks choose DATASET              the sequence that the quick start takes
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from typing import Any

from llava.cli import flag, parse_command, word
from llava.continual.places import Places
from llava.continual.sequence import FIELDS, choose_sequence, load_sequence
from llava.utils import UserError, quiet_libraries, run_cli

_OUTPUT_DIR: Any = flag(None, "default: OUTPUT_DIR, else output")


@dataclass(kw_only=True)
class Get:
    """print one field"""

    sequence: str = word("task sequence, name or file")
    field: str = word("such as test, train:<task>, keys.rank or merged_keys")
    output_dir: str | None = _OUTPUT_DIR
    method: str = "retrieval"


@dataclass(kw_only=True)
class Variables:
    """print fields as assignments that bash evaluates, lists as arrays; also of the fields flags and stages"""

    sequence: str = word("task sequence, name or file")
    fields: list[str] = word("such as zero=train.zero; tasks means tasks=tasks")
    output_dir: str | None = _OUTPUT_DIR
    method: str = "retrieval"


@dataclass(kw_only=True)
class Stages:
    """print the stage checkpoints' folders, one a line"""

    sequence: str = word("task sequence, name or file")
    output_dir: str | None = _OUTPUT_DIR
    method: str = "retrieval"


@dataclass(kw_only=True)
class Flags:
    """print the sequence's training settings as flags of llava.train.train_mem, one word a line"""

    sequence: str = word("task sequence, name or file")


@dataclass(kw_only=True)
class Check:
    """look for what would stop the training of any task of the sequence, before the first is trained"""

    sequence: str = word("task sequence, name or file")
    output_dir: str | None = _OUTPUT_DIR
    method: str = "retrieval"
    keys: str = flag("", "merged key file (default: the sequence's)")
    zero: str = flag("", "DeepSpeed's file")
    follow_links: bool = flag(False, "pictures may be links out of their folder")


@dataclass(kw_only=True)
class Choose:
    """print the name of the sequence that the quick start takes for a data set"""

    dataset: str = word("vqa-rad, slake, phantom, auto, or your own")


def main() -> None:
    commands = {"get": Get, "variables": Variables, "stages": Stages, "flags": Flags, "check": Check, "choose": Choose}
    name, args = parse_command(commands, None, __doc__)
    if name == "choose":
        print(choose_sequence(args.dataset, os.environ))
        return
    sequence = load_sequence(args.sequence)
    environ = {**os.environ, **({"OUTPUT_DIR": given} if (given := getattr(args, "output_dir", None)) else {})}
    places = Places.of(sequence, getattr(args, "method", "retrieval"), environ)
    if name == "check":
        _check(places, args)
    elif name == "variables":
        print("\n".join(_assignment(places, wanted) for wanted in args.fields))
    else:
        found = _field(places, args.field if name == "get" else name)
        print(found if isinstance(found, str) else "\n".join(found))


def _check(places: Places, args: Check) -> None:
    """See ``Check``. What it needs takes seconds to import, and the other commands do not need it."""
    quiet_libraries()
    from llava.continual.preflight import check_training
    from llava.inside import opened_to_links

    if args.zero:
        from llava.outside import read_object

        read_object(args.zero, "DeepSpeed settings", "scripts/zero3.json is the one that ships")
    folder = opened_to_links(places.sequence.image_folder, args.follow_links) or ""
    check_training(places, places.base_model(), args.keys or None, folder)


def _assignment(places: Places, wanted: str) -> str:
    """``zero=train.zero`` as bash takes it."""
    name, given, field = wanted.partition("=")
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise UserError(f"{name!r} is no name of a variable; write NAME=FIELD, such as zero=train.zero")
    found = _field(places, field if given else name)
    return f"{name}={shlex.quote(found) if isinstance(found, str) else f'({shlex.join(found)})'}"


def _field(places: Places, wanted: str) -> str | list[str]:
    """A field as text, or as several.

    Raises:
        UserError: there is none of that name; the base model is not there.
    """
    sequence = places.sequence
    block, _, name = wanted.partition(".")
    if wanted == "tasks":
        return sequence.task_names
    if wanted == "train":
        return [file for task in sequence.tasks for file in task.files]
    if wanted.startswith("train:"):
        return list(sequence.task(wanted.removeprefix("train:")).files)
    if wanted == "stages":
        return list(map(str, places.stages))
    if wanted == "flags":
        return [part for flag, value in sequence.train.flags().items() for part in (f"--{flag}", str(value))]
    if name and block in ("keys", "train", "base"):
        values = vars(getattr(sequence, block))
    else:
        values = {field: getattr(sequence, field) for field in FIELDS if field not in ("keys", "base")}
        values |= {name: getattr(places, name) for name in ("key_folder", "merged_keys", "made_base", "query_cache")}
        name = wanted
    if wanted == "base_model":
        return str(places.base_model())
    if name not in values:
        more = ("base_model", "train:<task>", "stages", "flags", "keys.*", "train.*", "base.*")
        known = ", ".join(values if "." in wanted else (*values, *more))
        raise UserError(f"unknown field {wanted!r}; known: {known}")
    value = values[name]
    return list(value) if isinstance(value, tuple) else "" if value is None else str(value)


if __name__ == "__main__":
    run_cli(main)
