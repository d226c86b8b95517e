"""Arguments of a training run: LLaVA's three groups with its defaults, and what the continual protocol adds.

What a flag does not say, the task sequence's ``train`` block and the environment do (``llava/continual/settings.py``),
then LLaVA's and transformers' defaults. Folders follow from sequence, task and method (``llava/continual/places.py``).
Flags that LLaVA's and the prototype's scripts pass under another name are aliases.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers.hf_argparser import HfArgumentParser

from llava.cli import MANY, FieldsParser, spelled
from llava.continual.chain import base_under, stage_given_as_base
from llava.continual.places import Places
from llava.continual.sequence import load_sequence, sequence_flag
from llava.schema import number, whole
from llava.train.ignored_flags import ignored_beside, say_ignored
from llava.train.machine import settle_machine, without_auto
from llava.train.trackers import trackers_here
from llava.utils import UserError, rank0_print

PROJECTOR_PART = "mm_mlp_adapter"
_PUBLISHED = "__lazy_preprocess"
"""Stands, without effect, in every command line of LLaVA's and the prototype's, and in none of this project's."""

_LEAST = {
    "learning_rate": 0,
    "weight_decay": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "model_max_length": 1,
    "lora_r": 1,
}


_RANGES = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), whole(1, MANY)),
    **dict.fromkeys(("gradient_accumulation_steps", "lora_r", "lora_alpha"), whole(1, MANY)),
    **dict.fromkeys(("dataloader_num_workers",), whole(0, 1024)),
    **dict.fromkeys(("seed", "data_seed"), whole(0, 2**32 - 1)),
    **dict.fromkeys(("max_grad_norm", "warmup_steps", "adam_epsilon", "logging_steps", "save_steps"), number(0)),
    **dict.fromkeys(("mm_projector_lr", "mm_vision_tower_lr", "learning_rate"), number(0, 1000)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), number(0, 1 - 1e-9)),
    "lora_dropout": number(0, 1),
    "feature_cache_mb": whole(0),
    "model_max_length": whole(1),
    "save_total_limit": whole(0),
    "num_train_epochs": number(-1, 1e6),
}
"""Of further numbers of transformers' and LLaVA's what can be meant; the rest fails steps later, or trains nothing."""
_PACKAGES = {
    "apex": "apex",
    "bnb": "bitsandbytes",
    "8bit": "bitsandbytes",
    "galore": "galore_torch",
    "lomo": "lomo_optim",
    "schedule_free": "schedulefree",
    "apollo": "apollo_torch",
    "grokadamw": "grokadamw",
    "stable_adamw": "optimi",
    "torchao": "torchao",
}
"""What optimizers need beside transformers, by a part of their names."""


def check_packages(args: Any) -> None:
    """Refuse an optimizer or a number of bits whose package is not installed.

    Raises:
        UserError: naming the flag and the package.
    """
    optimizer = str(getattr(args.optim, "value", args.optim))
    needed = {package: f"--optim {optimizer}" for part, package in _PACKAGES.items() if part in optimizer}
    if args.bits != 16:
        needed["bitsandbytes"] = f"--bits {args.bits}"
    for package, flag in needed.items():
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{flag} needs the package {package}, which is not installed; install it, or leave it out")


def renamed(name: str, old: str) -> Any:
    """A field of transformers' arguments that older versions call ``old``."""
    known = transformers.TrainingArguments.__dataclass_fields__[name]
    return field(default=known.default, metadata={**known.metadata, "aliases": spelled(old)})


def task_field() -> Any:
    """The task to train; the prototype's ``--cl_data_clss``."""
    about = {"help": "the task to train, as the sequence names it", "aliases": spelled("cl_data_clss")}
    return field(default=None, metadata=about)


def own(about: str, default: Any = None) -> Any:
    """A flag of LLaVA's own training stages; in stage 2 it may say what the base is, and no more."""
    return field(default=default, metadata={"help": about})


@dataclass
class ModelArguments:
    """The base model, and what LLaVA's own training makes of it. LLaVA's fields."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "base model, path or hub name (default: BASE_MODEL, else the sequence's); a stage goes on as the "
            "stage before, over its own base"
        },
    )
    version: str | None = field(default=None, metadata={"help": "conversation template (default: the checkpoint's)"})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager or flash_attention_2"})
    vision_tower: str | None = own("a tower's folder or hub name; makes a LLaVA of a language model")
    mm_vision_select_layer: int | None = own("the tower's layer to look at, from the end: -1 is the last")
    mm_vision_select_feature: str | None = own("patch, or cls_patch with the class token")
    mm_projector_type: str | None = own("linear, mlp2x_gelu or identity")
    mm_patch_merge_type: str | None = own("flat, spatial or spatial_unpad")
    mm_use_im_start_end: bool | None = own("put <im_start> and <im_end> around pictures")
    mm_use_im_patch_token: bool | None = own("add the token <im_patch>")
    pretrain_mm_mlp_adapter: str | None = own("projector file, mm_projector.bin")
    tune_mm_mlp_adapter: bool = own("feature alignment: the projector alone trains", False)
    freeze_backbone: bool = own("the decoder's layers and embeddings stay as they are", False)
    unfreeze_mm_vision_tower: bool = own("the tower trains too", False)
    mm_tunable_parts: str | None = own("what trains: mm_mlp_adapter, mm_vision_tower, mm_language_model, by commas")


@dataclass
class DataArguments:
    """The data. ``data_path`` overrides the task sequence's training file."""

    data_path: str | None = field(default=None, metadata={"help": "training rows (default: the sequence's)"})
    eval_data_path: str | None = field(default=None, metadata={"help": "rows for a validation loss while training"})
    image_folder: str | None = field(default=None, metadata={"help": "picture folder (default: the sequence's)"})
    follow_links: bool = field(default=False, metadata={"help": "open pictures that are links out of their folder"})
    max_pixels: int | None = field(
        default=None, metadata={"help": "pixels that a picture may have (default: LLAVA_MAX_PIXELS or 100 million)"}
    )
    image_aspect_ratio: str | None = field(default=None, metadata={"help": "default: the checkpoint's"})
    image_grid_pinpoints: str | None = field(
        default=None,
        metadata={"help": "sizes for anyres, such as '[(336, 672), (672, 336)]' (default: the checkpoint's)"},
    )
    lazy_preprocess: bool = field(default=True, metadata={"help": "rows are always prepared when they are needed"})
    turns_apart: bool = own("the turns of a row are questions of their own: none sees another", False)
    is_multimodal: bool | None = field(default=None, metadata={"help": "each row says whether it has a picture"})
    sequence: str = sequence_flag(aliases=spelled("dataset_type"))
    task: str | None = task_field()


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Transformers' arguments with LLaVA's defaults, and the continual run's."""

    optim: str = "adamw_torch"
    remove_unused_columns: bool = False
    eval_strategy: str = renamed("eval_strategy", "evaluation_strategy")
    warmup_steps: float = renamed("warmup_steps", "warmup_ratio")
    use_cpu: bool = renamed("use_cpu", "no_cuda")
    model_max_length: int = 2048
    method: str = field(default="retrieval", metadata={"help": "continual method (llava/continual/methods)"})
    retriever_state_dict: str | None = field(
        default=None, metadata={"help": "merged keys and initial offsets (default: the sequence's)"}
    )
    previous_stage: str | None = field(
        default=None,
        metadata={"help": "checkpoint of the stage before this one (default, without --output_dir: the sequence's)"},
    )
    feature_cache_mb: int = field(default=4096, metadata={"help": "memory for the frozen tower's picture features"})
    query_cache: str | None = field(
        default=None,
        metadata={"help": "where queries and picture features are kept (default: stage 1's; '' keeps none)"},
    )
    checkpoint_if_needed: bool = field(
        default=False, metadata={"help": "what --gradient_checkpointing auto stands for: on where memory asks for it"}
    )
    bits: int = field(default=16, metadata={"help": "4 or 8: quantise the frozen base with bitsandbytes"})
    double_quant: bool = field(default=True, metadata={"help": "4 bits: quantise the scales too"})
    quant_type: str = field(default="nf4", metadata={"help": "4 bits: nf4 or fp4"})
    lora_enable: bool = field(default=False, metadata={"help": "train a LoRA beside the slots, shared by all tasks"})
    lora_r: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_bias: str = field(default="none", metadata={"help": "biases that train beside it: none, all or lora_only"})
    freeze_mm_mlp_adapter: bool = own("the projector stays as it is", False)
    mm_projector_lr: float | None = own("the projector's learning rate (default: --learning_rate)")
    mm_vision_tower_lr: float | None = own("the tower's learning rate (default: --learning_rate)")
    group_by_modality_length: bool = field(default=False, metadata={"help": "steps of one modality and of like length"})
    cache_dir: str | None = field(default=None, metadata={"help": "where downloads are kept (default: HF_HOME's)"})
    lora_weight_path: str = field(default="", metadata={"help": "refused: LLaVA never reads it"})
    mpt_attn_impl: str | None = field(default=None, metadata={"help": "refused: there are no MPT decoders here"})
    save_full_model: bool = field(default=False, metadata={"help": "write the base's weights into the checkpoint too"})


@dataclass
class EarlyArguments:
    """What must be known before the rest is parsed: transformers' arguments start devices when they are made."""

    deepspeed: str | None = None
    output_dir: str | None = None
    model_name_or_path: str | None = None
    cache_dir: str | None = None
    method: str = TrainingArguments.method
    sequence: str = sequence_flag(aliases=spelled("dataset_type"))
    task: str | None = task_field()
    tune_mm_mlp_adapter: bool = False
    mm_tunable_parts: str | None = None


class TrainParser(FieldsParser, HfArgumentParser):
    """Reads transformers' arguments as transformers does, and ours beside them."""


def early_arguments(argv: Sequence[str]) -> EarlyArguments:
    """The few arguments above from a whole command line; nothing is started or checked.

    A command that names no task, no sequence and no method is one of LLaVA's own: feature alignment where the projector
    alone is to train, else visual instruction tuning.
    """
    parser = TrainParser(EarlyArguments, add_help=False, allow_abbrev=False)
    found = EarlyArguments(**vars(parser.parse_known_args(list(argv))[0]))
    parser.set_defaults(method=None, sequence=None)
    given = parser.parse_known_args(list(argv))[0]
    if not (given.method or given.sequence or given.task):
        alone = found.tune_mm_mlp_adapter or found.mm_tunable_parts == PROJECTOR_PART
        found.method = "align" if alone else "instruct"
    return found


def parse_arguments(argv: Sequence[str], options: type | None = None, of_sequence: bool = True) -> tuple:
    """Parse a command line.

    Args:
        options: a method's dataclass of options; its fields become flags, and it is returned as a fourth.
        of_sequence: a task of the sequence trains, with its settings; else the rows are ``--data_path``'s.

    Returns:
        ``(ModelArguments, DataArguments, TrainingArguments)``, and the options where their class is given.

    Raises:
        UserError: an unknown flag, or what a run cannot do without.
    """
    early = early_arguments(argv)
    sequence = load_sequence(early.sequence)
    places = Places.of(sequence, early.method)
    own = [ModelArguments, DataArguments, TrainingArguments]
    names = {entry.name for kind in own for entry in dataclasses.fields(kind)}
    for entry in dataclasses.fields(options) if options else ():
        if entry.name in names:
            raise UserError(
                f"method {early.method!r}: its option {entry.name!r} is a flag of every training run; rename it"
            )
    kinds = [*own, *([options] if options else [])]
    taken = {entry.name for kind in kinds for entry in dataclasses.fields(kind)}
    parser = TrainParser([*kinds, ignored_beside(taken)], prog="train_mem", allow_abbrev=False)
    parser.set_defaults(retriever_state_dict=str(places.merged_keys), method=early.method)
    parser.set_defaults(query_cache=str(places.query_cache) if of_sequence else "")
    stated = sequence.train.flags(sequence.stated) if of_sequence else {}
    precision = stated.pop("bf16", None)
    parser.set_defaults(**stated)
    if of_sequence and early.output_dir is None and early.task in sequence.task_names:
        before = places.stage_before(early.task)
        parser.set_defaults(output_dir=str(places.stage(early.task)), previous_stage=before and str(before))
    chained = stage_given_as_base(early.model_name_or_path) if of_sequence else None
    if chained is not None:
        parser.set_defaults(previous_stage=str(chained))
    namespace, unknown = parser.parse_known_args(without_auto(argv, precision))
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}; {_nearest(unknown[0], parser)}")
    if not of_sequence and not namespace.data_path:
        raise UserError(f"method {early.method!r} has no rows of a task; add --data_path (or --task, for stage 2)")
    if of_sequence and not namespace.task:
        raise UserError("no task given; add --task <name>, as the task sequence names it")
    if namespace.output_dir is None:
        raise UserError("no --output_dir given, e.g. output/llava-vqa-rad_abd")
    if str(namespace.eval_strategy) != "no" and namespace.eval_data_path is None:
        raise UserError(f"--eval_strategy {namespace.eval_strategy} needs rows; add --eval_data_path")
    if not namespace.model_name_or_path:
        namespace.model_name_or_path = places.base_model()
        rank0_print(f"base model: {namespace.model_name_or_path}")
    if chained is not None:
        namespace.model_name_or_path = base_under(chained, namespace.previous_stage, sequence, early.method)
        rank0_print(f"{chained} is a stage: it is the stage before; base model: {namespace.model_name_or_path}")
    _check_numbers(namespace)
    check_packages(namespace)
    settle_machine(namespace)
    published = any(word.split("=")[0].replace("-", "_") == _PUBLISHED for word in argv)
    namespace.report_to = trackers_here(namespace.report_to, published)
    try:
        *parsed, without_effect = (
            kind(**{entry.name: getattr(namespace, entry.name) for entry in dataclasses.fields(kind) if entry.init})
            for kind in parser.dataclass_types
        )
    except ValueError as error:  # transformers' own checks
        raise UserError(f"{' '.join(str(error).split())}; see python -m llava.train.train_mem --help") from error
    say_ignored(without_effect)
    return tuple(parsed)


def _check_numbers(namespace: Any) -> None:
    """Refuse numbers that would fail, or train nothing, once the base is loaded."""
    for name, least in _LEAST.items():
        if (value := getattr(namespace, name)) < least:
            raise UserError(f"--{name} is {value}; give {least} or more")
    for name, value in vars(namespace).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} is {value}; give a finite number")
        if name in _RANGES and value is not None and not _RANGES[name].fits(value):
            raise UserError(f"--{name} is {value}; give {_RANGES[name].words}")
    if namespace.max_steps <= 0 and not namespace.num_train_epochs > 0:
        raise UserError(f"--num_train_epochs is {namespace.num_train_epochs}; give more than 0")


def _nearest(flag: str, parser: TrainParser) -> str:
    name = flag.split("=")[0].replace("-", "_").replace("__", "--", 1)
    near = difflib.get_close_matches(name, list(parser._option_string_actions), n=1, cutoff=0.8)
    return f"did you mean {near[0]}?" if near else "see python -m llava.train.train_mem --help"
