"""Arguments of a training run: LLaVA's three groups with its defaults, and what the continual protocol adds.

Flags that LLaVA's and the prototype's scripts pass, but that current transformers no longer knows, are translated.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import transformers

from llava.utils import UserError, rank0_print


@dataclass
class ModelArguments:
    """The base model. LLaVA's fields; ``vision_tower`` and below serve its first stage (projector alignment)."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "base model, path or hub name"})
    version: str | None = field(default=None, metadata={"help": "conversation template (default: the checkpoint's)"})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager or flash_attention_2"})


@dataclass
class DataArguments:
    """The data. ``data_path`` overrides the task sequence's training file."""

    data_path: str | None = None
    eval_data_path: str | None = field(default=None, metadata={"help": "rows for a validation loss while training"})
    lazy_preprocess: bool = False
    is_multimodal: bool = False
    image_folder: str | None = None
    image_aspect_ratio: str | None = None
    sequence: str = field(default_factory=lambda: os.environ.get("SEQUENCE", "vqa-rad"))
    task: str | None = field(default=None, metadata={"help": "the task to train, as the sequence names it"})
    disable_task_id: bool = field(default=True, metadata={"help": "kept for the prototype's scripts; routing is free"})


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Transformers' arguments with LLaVA's defaults, and the continual run's."""

    optim: str = "adamw_torch"
    remove_unused_columns: bool = False
    model_max_length: int = 2048
    cache_dir: str | None = None
    method: str = field(default="retrieval", metadata={"help": "continual method (llava/continual/methods)"})
    retriever_state_dict: str = field(
        default="output/prompt-key/merged_prompt_key.pth", metadata={"help": "merged keys and initial offsets"}
    )
    previous_stage: str | None = field(default=None, metadata={"help": "checkpoint of the stage before this one"})
    feature_cache_mb: int = field(default=4096, metadata={"help": "memory for the frozen tower's picture features"})
    query_cache: str = field(
        default="output/cache/queries", metadata={"help": "where queries and picture features are kept; '' keeps none"}
    )
    bits: int = field(default=16, metadata={"help": "4 or 8: quantise the frozen base with bitsandbytes"})
    double_quant: bool = field(default=True, metadata={"help": "4 bits: quantise the scales too"})
    quant_type: str = field(default="nf4", metadata={"help": "4 bits: nf4 or fp4"})
    lora_enable: bool = field(default=False, metadata={"help": "train a LoRA beside the slots, shared by all tasks"})
    lora_r: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_bias: str = "none"
    save_full_model: bool = field(default=False, metadata={"help": "write the base's weights into the checkpoint too"})


RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "cl_data_clss": "task",
    "dataset_type": "sequence",
}
DROPPED = (
    "save_safetensors",
    "overwrite_output_dir",
    "logging_dir",
    "mpt_attn_impl",
    "preprare_retreival_version",
    "prepare_retrieval_version",
    "tune_mm_mlp_adapter",
    "freeze_mm_mlp_adapter",
    "freeze_backbone",
    "lora_weight_path",
    "group_by_modality_length",
)
SHIPPED_WITH_BASE = (
    "vision_tower",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_projector_type",
    "mm_use_im_start_end",
    "mm_use_im_patch_token",
    "mm_patch_merge_type",
    "mm_projector_lr",
    "pretrain_mm_mlp_adapter",
)


def translate(argv: list[str]) -> list[str]:
    """Arguments as current transformers takes them. What has no effect here is dropped and said."""
    result: list[str] = []
    position = 0
    while position < len(argv):
        flag, _, inline = argv[position].partition("=")
        values = [inline] if inline else []
        position += 1
        while not inline and position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        name = flag.removeprefix("--").replace("-", "_")
        if name in DROPPED or name in SHIPPED_WITH_BASE:
            why = "the base checkpoint's config decides" if name in SHIPPED_WITH_BASE else "it has no effect here"
            rank0_print(f"note: {flag} is accepted and ignored: {why}")
            continue
        if name == "no_cuda":
            name = "use_cpu"
        result += [f"--{RENAMED.get(name, name)}", *values]
    return result


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse a command line. ``UserError`` for unknown flags and what a run cannot do without."""
    parser = transformers.HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, training_args, unknown = parser.parse_args_into_dataclasses(
        translate(argv), return_remaining_strings=True
    )
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}; see python -m llava.train.train_mem --help")
    if not data_args.task:
        raise UserError("no task given; add --task <name>, as the task sequence names it")
    if training_args.output_dir is None or training_args.output_dir == "trainer_output":
        raise UserError("no --output_dir given, e.g. output/llava-vqa-rad_abd")
    if training_args.eval_strategy != "no" and data_args.eval_data_path is None:
        raise UserError(f"--eval_strategy {training_args.eval_strategy.value} needs rows; add --eval_data_path")
    return model_args, data_args, training_args
