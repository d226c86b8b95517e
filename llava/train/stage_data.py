"""What a stage learns from: its rows, how they are asked, their queries and the features of their pictures."""

from __future__ import annotations

from pathlib import Path

import torch

from llava.continual.queries import PictureSource, look_at_pictures, text_queries
from llava.continual.query_cache import QueryCache
from llava.continual.sequence import TaskSequence
from llava.data.prompt import Prompt, PromptEncoder
from llava.data.rows import Row, read_rows
from llava.data.samples import TrainingSamples
from llava.devices import default_device
from llava.mm_utils import get_model_name_from_path
from llava.model.configs import llava_config
from llava.slots.encoders import encoder_from_identity
from llava.slots.settings import RetrieverSettings
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.utils import rank0_print


def read_training_rows(files: list[str]) -> list[Row]:
    """The files' rows; each has an answer to each question, and its ``domain``, where it has one, is one task."""
    return [row for file in files for row in read_rows(file, require_answer=True, one_task=True)]


def stage_prompt(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    sequence: TaskSequence,
    base: Path,
    of_keys: dict,
) -> Prompt:
    """How this stage asks: the flags, else the pictures as the keys saw them, else what the base says.

    Args:
        of_keys: prompt of the merged keys; empty in files of older versions.

    Raises:
        UserError: an unknown template or picture mode, or one that the base cannot do.
    """
    prompt = Prompt.of(
        llava_config(base),
        get_model_name_from_path(str(model_args.model_name_or_path)),
        conv_mode=model_args.version,
        answer_suffix=sequence.answer_suffix,
        answer_style=sequence.answer_style,
        aspect_ratio=data_args.image_aspect_ratio or of_keys.get("aspect_ratio"),
        max_length=args.model_max_length,
    )
    if changed := prompt.difference({name: of_keys[name] for name in ("aspect_ratio",) if name in of_keys}):
        rank0_print(f"note: the keys were fitted to other pictures: {changed}; routes may suffer")
    return prompt


def base_dtype(args: TrainingArguments) -> torch.dtype:
    """Of the frozen base: half precision when training in it, float32 otherwise."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def build_dataset(
    rows: list[Row], encoder: PromptEncoder, settings: RetrieverSettings, source: PictureSource, args: TrainingArguments
) -> TrainingSamples:
    """Training samples with their queries, and with the frozen tower's features where these fit the memory.

    The rows are checked before anything is computed of them; each picture is then looked at once.
    """
    dataset, cache = TrainingSamples(rows, encoder), QueryCache(args.query_cache)
    texts = None
    if settings.uses_text and settings.encoder:
        texts = text_queries(
            rows, settings.encoder, lambda: encoder_from_identity(settings.encoder, source.base), cache
        )
    kind = settings.image_query if settings.uses_images else None
    images, features = look_at_pictures(rows, source, kind, cache, args.feature_cache_mb * 2**20)
    if features is None:
        rank0_print("note: the pictures' features exceed --feature_cache_mb; the tower runs every step")
    return dataset.add(texts, images, features)


def picture_source(model, base: Path, prompt: Prompt, image_folder: str, args: TrainingArguments) -> PictureSource:
    """The pictures as this stage sees them: by the model's own tower where it is whole, else by one of its own.

    Under ZeRO-3 the model's weights are in parts, and beside a quantised decoder they are where accelerate puts them.
    """
    device, dtype, tower = default_device(use_cpu=args.use_cpu), base_dtype(args), model.get_vision_tower()
    if args.bits < 16 or any(hasattr(weight, "ds_id") for weight in tower.parameters()):
        return PictureSource.standalone(base, image_folder, prompt.aspect_ratio, device, dtype)
    return PictureSource(base, model.config, image_folder, prompt.aspect_ratio, lambda: tower.to(device), device, dtype)
