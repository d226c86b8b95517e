"""Command lines: a dataclass of arguments, read as transformers' ``HfArgumentParser`` reads one.

Without transformers, whose import takes longer than what a light command does. A field is a flag, spelled with hyphens
or underscores; its ``metadata`` holds ``help``, and further:

- ``choices``, ``aliases``, ``metavar``, ``nargs``: as in argparse;
- ``least``, ``most``, ``above``: the range of a number, ends included but for ``above``; NaN and infinity are none;
- ``positional``: no flag but a word of its own; a list takes all that are left;
- ``empty``: a list that may be given without values.

A ``bool`` takes no value or one (``--force``, ``--force False``); none where the command has positional words, which it
would swallow. A wrong command line ends in one line on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from llava.schema import HUGE, number, whole
from llava.utils import UserError

Arguments = TypeVar("Arguments")
RANGE = ("least", "most", "above")
MANY = 2**20
"""Batches, beams and threads beyond this would only fill the memory."""
SEEDS = {"least": 0, "most": 2**32 - 1}
"""What every generator of random numbers takes."""


def flag(default: Any = dataclasses.MISSING, help: str = "", **more: Any) -> Any:
    """A field with its help and further metadata; without a default the flag is needed."""
    about = {"help": help, **more}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=about)
    return dataclasses.field(default=default, metadata=about)


def word(help: str = "", default: Any = dataclasses.MISSING) -> Any:
    """A positional field; of type ``list`` it takes all the words that are left."""
    return flag(default, help, positional=True)


def spelled(*names: str) -> list[str]:
    """Both spellings of further names of a flag."""
    return [f"--{name}" for name in names] + [f"--{name.replace('_', '-')}" for name in names]


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The module's text as it stands; defaults where they say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        plain = action.default is None or action.default is False or action.default in (argparse.SUPPRESS, "", [])
        return text if plain or "default" in text else f"{text} (default: %(default)s)".strip()


class FieldsParser(argparse.ArgumentParser):
    """The part of a parser that knows the fields' metadata above, and ends a wrong command line in one line."""

    def __init__(self, dataclass_types: Any = None, **options: Any):
        kinds: list[Any] = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types or [])
        self._words = any(entry.metadata.get("positional") for kind in kinds for entry in dataclasses.fields(kind))
        read_them: Any = super().__init__  # of the parser beside this one, which reads dataclasses
        read_them(kinds, **{"formatter_class": _Help, **options})

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        positional, empty = options.pop("positional", False), options.pop("empty", False)
        for name in RANGE:
            options.pop(name, None)
        if positional:
            needed = options.pop("required", False)
            if options.get("nargs") == "+" and not needed:
                options["nargs"] = "*"
            return super().add_argument(names[0].removeprefix("--"), **options)
        if empty:
            options["nargs"] = "*"
        if self._words and options.get("nargs") == "?" and options.get("const") is True:
            options = {name: value for name, value in options.items() if name not in ("nargs", "const", "type")}
            options["action"] = "store_true"
        return super().add_argument(*names, **options)

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class _DataclassParser(argparse.ArgumentParser):
    """A flag for each field, of the kinds that the commands have: text, number, truth value, ``None``, list of them."""

    def __init__(self, kinds: Sequence[Any], **options: Any):
        super().__init__(**options)
        for kind in kinds:
            hints = typing.get_type_hints(kind)
            for entry in dataclasses.fields(kind):
                self._add_field(entry, hints[entry.name])

    def _add_field(self, entry: dataclasses.Field, hint: Any) -> None:
        hyphened = entry.name.replace("_", "-")
        options = dict(entry.metadata)
        names = list(dict.fromkeys([f"--{entry.name}", f"--{hyphened}", *options.pop("aliases", [])]))
        about = dict(options)
        if entry.default_factory is not dataclasses.MISSING:
            options["default"] = entry.default_factory()
        elif entry.default is not dataclasses.MISSING:
            options["default"] = entry.default
        else:
            options["required"] = True
        kind = _without_none(hint)
        if kind is bool:
            options["type"] = _truth
            if hint is bool:
                options.update(nargs="?", const=True)
        elif typing.get_origin(kind) is list:
            options.update(type=typing.get_args(kind)[0], nargs="+")
        else:
            options["type"] = kind
        self.add_argument(*names, **options)
        if hint is bool and entry.default is True:
            opposite = list(dict.fromkeys([f"--no_{entry.name}", f"--no-{hyphened}"]))
            self.add_argument(*opposite, action="store_false", dest=entry.name, default=False, **about)


def _without_none(hint: Any) -> Any:
    """``X`` of ``X | None``."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint
    (kind,) = (member for member in typing.get_args(hint) if member is not type(None))
    return kind


def _truth(text: str) -> bool:
    """What a truth value is written as on a command line."""
    for value, spellings in ((True, ("yes", "true", "t", "y", "1")), (False, ("no", "false", "f", "n", "0"))):
        if text.lower() in spellings:
            return value
    raise argparse.ArgumentTypeError(f"expected true or false, found {text!r}")


class Parser(FieldsParser, _DataclassParser):
    """The parser of every command but training's, whose arguments are transformers' own."""


def parse(
    kind: type[Arguments], argv: Sequence[str] | None = None, description: str | None = None, **defaults: Any
) -> Arguments:
    """The command line as an instance of ``kind``; ``argv`` is the process's own unless given.

    Args:
        defaults: in place of the fields' own.
    """
    parser = Parser(kind, description=description)
    parser.set_defaults(**defaults)
    return check_ranges(_instance(kind, parser.parse_args(argv)))


def parse_command(
    commands: Mapping[str, type], argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[str, Any]:
    """The sub-command's name and its arguments; a class's docstring is its help."""
    parser = Parser(description=description)
    rooms = parser.add_subparsers(dest="command", required=True)
    for name, kind in commands.items():
        text = (kind.__doc__ or "").strip()
        rooms.add_parser(name, help=text, description=text, dataclass_types=kind)
    namespace = parser.parse_args(argv)
    return namespace.command, check_ranges(_instance(commands[namespace.command], namespace))


def check_ranges(arguments: Arguments) -> Arguments:
    """The arguments, if every number of theirs is one, and in the range of its flag.

    Raises:
        UserError: naming the flag, its value and what is wanted.
    """
    for entry in dataclasses.fields(typing.cast(Any, arguments)):
        value = getattr(arguments, entry.name)
        if type(value) not in (int, float):
            continue
        about = {name: entry.metadata[name] for name in RANGE if name in entry.metadata}
        if type(value) is int and "above" in about:
            about = {"least": about["above"] + 1, **{name: end for name, end in about.items() if name != "above"}}
        wanted = whole(**{"least": -HUGE, **about}) if type(value) is int else number(**about)
        if not wanted.fits(value):
            raise UserError(f"--{entry.name} is {value}; give {wanted.words.replace(f' of {-HUGE:g} or more', '')}")
    return arguments


def fail(message: str) -> typing.NoReturn:
    """End as a wrong command line does, for what only the flags together make wrong."""
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


def flags_of(kind: type, default: str | None = None) -> type:
    """A dataclass with the fields of ``kind`` as flags that are ``None`` unless given; for settings kept elsewhere.

    Args:
        default: what help says of defaults, such as "the sequence's"; the field's own unless given.
    """
    hints = typing.get_type_hints(kind)
    entries = []
    for entry in dataclasses.fields(kind):
        hint = list[str] if typing.get_origin(hints[entry.name]) is tuple else hints[entry.name]
        more = {name: value for name, value in entry.metadata.items() if name in ("choices", *RANGE)}
        text = f"{entry.metadata.get('help', '')} (default: {default or entry.default})".strip()
        more["help"] = text.replace("%", "%%")
        entries.append((entry.name, hint | None, dataclasses.field(default=None, metadata=more)))
    return dataclasses.make_dataclass(f"{kind.__name__}Flags", entries, kw_only=True)


def given(arguments: Any, kind: type) -> dict[str, Any]:
    """The fields of ``kind`` that the command line gives (see ``flags_of``); lists as tuples."""
    values = {entry.name: getattr(arguments, entry.name, None) for entry in dataclasses.fields(kind)}
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if value is not None
    }


def filled(kind: type[Arguments], values: Any, **defaults: Any) -> Arguments:
    """Arguments from Python: the attributes that any object has of those of ``kind``, defaults for the others.

    Raises:
        UserError: one that has no default is missing.
    """
    found = dict(defaults)
    for entry in dataclasses.fields(typing.cast(Any, kind)):
        if hasattr(values, entry.name):
            found[entry.name] = getattr(values, entry.name)
        elif entry.name not in found and entry.default is entry.default_factory is dataclasses.MISSING:
            raise UserError(f"args.{entry.name} is missing (what the flag --{entry.name.replace('_', '-')} gives)")
    return check_ranges(kind(**found))


def _instance(kind: type[Arguments], namespace: argparse.Namespace) -> Arguments:
    names = [entry.name for entry in dataclasses.fields(typing.cast(Any, kind))]
    return kind(**{name: getattr(namespace, name) for name in names})
