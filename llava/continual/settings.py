"""Every number of a run of a task sequence, on one page: the blocks ``keys``, ``train`` and ``base`` of its file.

A block is a dataclass; a field that the file leaves out has the default given here. The environment overrides the
file: ``EPOCHS=3`` is ``train.epochs``, ``KEY_RANK=16`` is ``keys.rank``, ``BASE_MODEL=...`` is ``base.model`` (an empty
variable counts as none). A flag of a command overrides both.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, ClassVar, Protocol, TypeVar

from llava.schema import HUGE, Wanted, list_of, number, refuse_unknown, whole, words
from llava.slots.names import ALL, KINDS, QUERY_MODES, SCOPES
from llava.utils import UserError


class _IsBlock(Protocol):
    """A dataclass of settings; ``VARIABLES`` goes in front of the environment's names for its fields."""

    VARIABLES: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


Block = TypeVar("Block", bound=_IsBlock)
WIDE = 2**20
"""Counts beyond this would only fill the memory."""


def setting(default: Any, help: str, **more: Any) -> Any:
    """A field with its default, what it means, and further: ``choices``; ``least``, ``most`` and ``above`` of a number;
    ``flag`` of a trainer."""
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class KeySettings:
    """``keys``: what stage 1 takes. It shapes the slots, so it is the same for all tasks that are to be merged."""

    VARIABLES: ClassVar[str] = "KEY_"

    query_mode: str = setting("text+image", "what a question is routed by", choices=QUERY_MODES)
    text_encoder: str = setting("auto", "auto, base, minilm, or a sentence encoder's folder")
    image_query: str = setting("tower+picture", "what the picture's query is made of", choices=KINDS)
    groups: int = setting(4, "groups a key is split into", least=1, most=WIDE)
    top_k: int = setting(4, "slots selected for each question", least=1, most=WIDE)
    rank: int = setting(8, "rank of a slot", least=1, most=WIDE)
    tau: float = setting(0.1, "temperature of the slot weights", above=0)
    scale: float = setting(1.0, "factor on every weight offset")
    image_weight: float = setting(0.5, "share of the picture in key similarity", least=0, most=1)
    router: str = setting("gaussian", "keys, gaussian, ridge, uniform, random or batch_vote")
    unknown_share: float = setting(0.005, "share of a task's own questions that may count as unknown", least=0, most=1)
    targets: tuple[str, ...] = setting(("o_proj",), "projections that get offsets")
    offset_scope: str = setting(
        ALL, "positions that offsets act on; question: those behind the picture", choices=SCOPES
    )
    held_out: float = setting(0.1, "share of pictures kept to measure routing", least=0, most=1)
    iterations: int = setting(50, "rounds of key fitting at most", least=1)


@dataclass(frozen=True)
class TrainSettings:
    """``train``: stage 2, as ``finetune_continual.sh`` runs it for each task. ``seed`` is stage 1's too."""

    VARIABLES: ClassVar[str] = ""

    epochs: float = setting(1.0, "passes over a task's rows", above=0, most=10**6, flag="num_train_epochs")
    learning_rate: float = setting(2e-4, "peak learning rate", least=0, most=10**3, flag="learning_rate")
    batch_size: int = setting(4, "rows a step on one device", least=1, most=WIDE, flag="per_device_train_batch_size")
    gradient_accumulation: int = setting(1, "steps added up", least=1, most=WIDE, flag="gradient_accumulation_steps")
    max_length: int = setting(2048, "tokens a row may have", least=1, most=2**27, flag="model_max_length")
    save_steps: int = setting(200, "steps between two checkpoints", least=1, flag="save_steps")
    warmup: float = setting(0.03, "steps of warm-up, or their share where below 1", least=0, flag="warmup_steps")
    scheduler: str = setting("cosine", "course of the learning rate", flag="lr_scheduler_type")
    weight_decay: float = setting(0.0, "weight decay", least=0, flag="weight_decay")
    adam_beta2: float = setting(0.999, "memory of squared gradients", least=0, most=1, flag="adam_beta2")
    seed: int = setting(42, "seed of both stages", least=0, flag="seed")
    bf16: str | None = setting(
        None, "auto: bfloat16 where the machine multiplies it by itself", choices=("auto", "true", "false"), flag="bf16"
    )
    zero: str | None = setting(None, "DeepSpeed's json, or none; left out: scripts/zero3.json where DeepSpeed starts")

    def flags(self, names: Iterable[str] | None = None) -> dict[str, Any]:
        """Values by the trainer's names; of all fields that it has, or of ``names``."""
        flags = {entry.name: entry.metadata["flag"] for entry in fields(self) if "flag" in entry.metadata}
        found = {flags[name]: getattr(self, name) for name in (flags if names is None else names) if name in flags}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class BaseSettings:
    """``base``: the model under the slots. ``null`` in the file names none, and ``BASE_MODEL`` must be given."""

    VARIABLES: ClassVar[str] = "BASE_"

    recipe: str | None = setting("phantom", "base that is made where no model is given", choices=("phantom", "medical"))
    model: str | None = setting(None, "folder or hub name of a LLaVA checkpoint, in place of the one that is made")


def read_block(kind: type[Block], values: Any, where: str) -> Block:
    """A block as its file gives it; ``where`` names file and block in messages.

    Raises:
        UserError: it is no JSON object, or a field is unknown or has a value of another type.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where} is {values!r}; write a JSON object of settings")
    refuse_unknown(values, [entry.name for entry in fields(kind)], where)
    given = {name: value for name, value in values.items() if value is not None}
    return replace(kind(), **{name: checked(kind, name, value, f"{where}.{name}") for name, value in given.items()})


def overridden(block: Block, environ: Mapping[str, str]) -> Block:
    """The block with what the environment sets."""
    return replace(block, **_from_environment(type(block), environ))


def stated_by(kind: type[_IsBlock], values: Mapping[str, Any], environ: Mapping[str, str]) -> frozenset[str]:
    """Names of the fields that the file's block or the environment gives, rather than the defaults above."""
    return frozenset({name for name, value in values.items() if value is not None} | set(_names_set(kind, environ)))


def checked(kind: type, name: str, value: Any, where: str) -> Any:
    """``value`` as the field's type. Integers pass as floats; nothing else is converted.

    Raises:
        UserError: another type, out of the field's range, or not one of its choices.
    """
    _wanted(kind, name).check(value, where)
    wanted = field_type(kind, name)
    return tuple(value) if wanted is tuple else float(value) if wanted is float else value


def _wanted(kind: type, name: str) -> Wanted:
    """What a field's value must be, as its type and metadata say."""
    about = {entry.name: entry for entry in fields(kind)}[name].metadata
    wanted, least, most = field_type(kind, name), about.get("least"), about.get("most")
    if wanted is tuple:
        return replace(list_of(words(empty=False), empty=False), words='a list of words, e.g. ["o_proj"]')
    if wanted is int:
        return whole(least, most or HUGE)
    return number(least, most, about.get("above")) if wanted is float else words(about.get("choices") or ())


def field_type(kind: type, name: str) -> type:
    """The type of a block's field: ``str``, ``int``, ``float`` or ``tuple``; without ``None``."""
    hint = typing.get_type_hints(kind)[name]
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    found: type = typing.get_origin(hint) or hint
    return found


def _names_set(kind: type[_IsBlock], environ: Mapping[str, str]) -> dict[str, str]:
    """Fields that the environment sets, with the variable that does."""
    variables = {entry.name: kind.VARIABLES + entry.name.upper() for entry in fields(kind)}
    return {name: variable for name, variable in variables.items() if environ.get(variable)}


def _from_environment(kind: type[_IsBlock], environ: Mapping[str, str]) -> dict[str, Any]:
    return {
        name: parsed(kind, name, environ[variable], variable) for name, variable in _names_set(kind, environ).items()
    }


def parsed(kind: type, name: str, text: str, where: str) -> Any:
    """A field's value from the text of an environment variable."""
    wanted = field_type(kind, name)
    if wanted is tuple:
        return tuple(text.split())
    try:
        value = wanted(text)
    except ValueError as error:
        raise UserError(f"{where} is {text!r}; write {_wanted(kind, name).words}") from error
    return checked(kind, name, value, where)
