"""The record of a run: everything that decides what a stage learns, built from the settings themselves.

A stage counts as finished, and an interrupted one goes on, only where the record of the command equals the one that was
kept. So every field of every group of arguments is in it; one that is left out stands in ``IGNORED`` with the reason.
What a path points to enters by checksum, so that moving files changes nothing and changing them does.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from llava.files import file_sha256
from llava.outside import read_object
from llava.schema import an_object, check_fields, whole, words
from llava.utils import UserError

VERSION = 3
"""Of the record. Records without a version were written by hand-picked names; they are compared as far as they go."""

SINCE_THIRD = ("base_content", "tower_content")
"""What records of the second version did not hold: they knew a base and a tower by samples of their weights."""

FIRST_VERSION = {"lora_enable": False}
"""What records of the first version left out where it was not asked for."""

RECORD = {
    "record": whole(1),
    **dict.fromkeys(("method", "task"), words()),
    **dict.fromkeys(("prompt", "slots", "earlier_tasks", "deepspeed", "options"), an_object()),
}
"""What a record's fields must be that are looked at one by one; the others are only compared."""

SHORT = 16  # hex digits of a checksum

_PLACE = "names a place; what lies there is recorded by its checksum"
_PROMPT = "is part of the prompt, which is recorded as a whole"
_SAYS = "decides what is said and logged"
_SAVES = "decides when and where a run can be resumed from"
_CHECKS = "belongs to evaluation while training, which trains nothing"
_HUB = "belongs to uploads of the result"
_MACHINE = "spreads the same steps over devices, memory and processes"

IGNORED: dict[str, str] = {
    **dict.fromkeys(
        "model_name_or_path data_path image_folder sequence output_dir previous_stage retriever_state_dict cache_dir "
        "query_cache follow_links eval_data_path resume_from_checkpoint root vision_tower "
        "pretrain_mm_mlp_adapter".split(),
        _PLACE,
    ),
    **dict.fromkeys("version image_aspect_ratio model_max_length".split(), _PROMPT),
    **dict.fromkeys(
        "logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_on_each_node log_level "
        "log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id "
        "trackio_static_space_id include_num_input_tokens_seen skip_memory_metrics debug logging_dir".split(),
        _SAYS,
    ),
    **dict.fromkeys(
        "save_strategy save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint "
        "restore_callback_states_from_checkpoint ignore_data_skip overwrite_output_dir save_safetensors".split(),
        _SAVES,
    ),
    **dict.fromkeys(
        "do_eval do_predict eval_strategy eval_steps eval_delay eval_on_start eval_do_concat_batches "
        "eval_use_gather_object eval_accumulation_steps per_device_eval_batch_size prediction_loss_only "
        "include_for_metrics batch_eval_metrics bf16_full_eval fp16_full_eval evaluation_strategy".split(),
        _CHECKS,
    ),
    **dict.fromkeys(
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision".split(), _HUB
    ),
    **dict.fromkeys(
        "use_cpu no_cuda dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order gradient_checkpointing "
        "gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs torch_compile "
        "torch_compile_backend torch_compile_mode torch_empty_cache_steps ddp_find_unused_parameters ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config accelerator_config "
        "parallelism_config local_rank use_cache feature_cache_mb auto_find_batch_size attn_implementation "
        "lazy_preprocess checkpoint_if_needed".split(),
        _MACHINE,
    ),
    "deepspeed": "its optimiser, schedule and clipping are recorded; the rest spreads the same steps over memory",
    "do_train": "is what every run does",
    "max_pixels": "refuses pictures, and changes none",
    "is_multimodal": "each row says whether it has a picture",
    "disable_task_id": "is kept for the prototype's scripts and decides nothing",
    "remove_unused_columns": "rows have no columns that could be removed",
    "label_names": "the model's loss is used",
    "length_column_name": "lengths come from the samples",
    "warmup_ratio": "is carried over into warmup_steps",
    "cl_data_clss": "is carried over into task",
    "dataset_type": "is carried over into sequence",
}


def settings_record(*groups: Any) -> dict[str, Any]:
    """Every recorded field of some groups of arguments (dataclass instances) as plain values.

    Fields that only say that they are deprecated or have no effect (``metadata["recorded"]`` is ``False``) are left out
    like the ones in ``IGNORED``.
    """
    return {item.name: plain(getattr(group, item.name)) for group in groups for item in fields(group) if recorded(item)}


def defaults(*groups: Any) -> dict[str, Any]:
    """The default of every recorded field that has a plain one."""
    return {
        item.name: plain(item.default)
        for group in groups
        for item in fields(group)
        if recorded(item) and item.default is not MISSING
    }


def recorded(item: Field[Any]) -> bool:
    """Whether a field of a group of arguments belongs to the record."""
    return item.name not in IGNORED and item.metadata.get("recorded", True)


def plain(value: Any) -> Any:
    """``value`` as JSON gives it back."""
    if isinstance(value, enum.Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(part) for part in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def checksums(files: Iterable[str | Path]) -> list[str]:
    """A short checksum of each file, in order: files of one name in different folders stay apart."""
    return [file_sha256(file)[:SHORT] for file in files]


def first_version(
    model_args: Any, data_args: Any, args: Any, answer_style: str, files: Iterable[str | Path]
) -> dict[str, Any]:
    """What records of the first version kept under other names than today's."""
    return {
        "version": model_args.version,
        "image_aspect_ratio": data_args.image_aspect_ratio,
        "model_max_length": args.model_max_length,
        "answer_style": answer_style,
        "data": {Path(file).name: file_sha256(file)[:SHORT] for file in files},
    }


def deepspeed_record(path: str | Path | None) -> dict[str, Any]:
    """What a DeepSpeed file says about the steps themselves; ``"auto"`` takes the command's own settings."""
    if not path:
        return {}
    values = read_object(path, "DeepSpeed settings")
    kept = {name: values[name] for name in ("optimizer", "scheduler", "gradient_clipping") if name in values}
    return {name: value for name, value in kept.items() if value != "auto"}


def difference(kept: Mapping[str, Any], now: Mapping[str, Any], unset: Mapping[str, Any]) -> str | None:
    """The first setting in which two records differ, in words; ``None`` where they agree.

    Args:
        unset: value of each setting that nobody has set. A name that one record lacks, because another version of a
            library wrote it, agrees with this value.
    """
    old = "record" not in kept
    kept, now = _flat({**FIRST_VERSION, **kept} if old else kept), _flat(now)
    for name in sorted({*kept, *now} - {"record"}):
        if name not in kept and (old or name in SINCE_THIRD or (name in unset and unset[name] == now[name])):
            continue
        if name not in now and (old or name in unset):
            continue
        if kept.get(name) != now.get(name):
            return f"{name} = {kept.get(name)}, now it is {now.get(name)}"
    return None


def read_record(path: Path) -> dict[str, Any]:
    """A record as it was written; ``UserError`` names a damaged file."""
    try:
        values = read_object(path, "run's record", "remove its folder to train again")
        check_fields(values, RECORD, str(path), closed=False)
    except UserError as error:
        raise UserError(f"{path}: the run's record is damaged ({error}); remove its folder to train again") from error
    return values


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the prompt's settings under names of their own, so that a message names the one that differs."""
    flat = {name: value for name, value in record.items() if name != "prompt"}
    return flat | {f"prompt.{name}": value for name, value in (record.get("prompt") or {}).items()}
