"""What a stage learns from: its rows, how they are asked, their queries and the features of their pictures."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava.checkpoints.checkpoint import Checkpoint
from llava.checkpoints.manifest import content_of, manifest_of
from llava.checkpoints.weights import fingerprint
from llava.continual.queries import PictureSource, look_at_pictures, text_queries
from llava.continual.query_cache import QueryCache
from llava.continual.record import checksums
from llava.continual.sequence import TaskSequence
from llava.data.prompt import Prompt, PromptEncoder
from llava.data.rows import Row, read_rows
from llava.data.samples import TrainingSamples, picture_names
from llava.devices import default_device
from llava.inside import Folder
from llava.mm_utils import get_model_name_from_path
from llava.model.kept_prefixes import PrefixFolder
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.tower import VisionTower
from llava.model.partitioned import never_parted
from llava.model.prefixes import PrefixStore
from llava.model.vision.features import load_vision_tower
from llava.slots.encoders import encoder_from_identity
from llava.slots.names import QUESTION
from llava.slots.settings import RetrieverSettings
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.utils import rank0_print


def read_training_rows(files: list[str], tasks: Collection[str] = ()) -> list[Row]:
    """The files' rows, each with an answer to each question; a ``domain``, where a row has one, is one of the tasks."""
    return [row for file in files for row in read_rows(file, require_answer=True, one_task=True, tasks=tasks)]


def stage_prompt(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    sequence: TaskSequence,
    config: Any,
    of_keys: dict,
) -> Prompt:
    """How this stage asks: the flags, else the pictures as the keys saw them, else what the base says.

    Args:
        config: the model's.
        of_keys: prompt of the merged keys; empty in files of older versions.

    Raises:
        UserError: an unknown template or picture mode, or one that the base cannot do.
    """
    prompt = Prompt.of(
        config,
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
    rows: list[Row],
    encoder: PromptEncoder,
    settings: RetrieverSettings,
    source: Looks,
    args: TrainingArguments,
    apart: bool = False,
) -> TrainingSamples:
    """Training samples with their queries, and with the frozen tower's features where these fit the memory.

    The rows are checked before anything is computed of them; each picture is then looked at once.
    """
    dataset, cache = TrainingSamples(rows, encoder, apart), QueryCache(args.query_cache)
    texts = None
    if settings.uses_text and settings.encoder:
        identity, device = settings.encoder, source.pictures.device
        load = functools.partial(encoder_from_identity, identity, source.base)
        texts = text_queries(rows, identity, source.base, load, cache, device)
    kind = settings.image_query if settings.uses_images else None
    room = 0 if source.trains else args.feature_cache_mb * 2**20
    shown = len(picture_names(rows))
    once = args.num_train_epochs <= 1 and args.max_steps <= 0 and shown == sum(len(row.images) for row in rows)
    if shown * source.least_bytes > room or (kind is None and once):
        room = 0  # known before any picture is looked at: they don't fit, or each is needed once
    store = source.pictures.store("" if source.trains else args.query_cache, args.feature_cache_mb if room else 0)
    images, features = look_at_pictures(rows, source.pictures, kind, store, room) if kind or room else (None, None)
    if features is None and not source.trains and not once:
        rank0_print("note: the pictures' features exceed --feature_cache_mb; the tower runs every step")
    return dataset.add(texts, images, features)


def share_prefixes(
    model: Any, base: Checkpoint, datasets: Iterable[TrainingSamples], settings: RetrieverSettings, args: Any
) -> None:
    """Where offsets leave alone what stands in front of a question, let the model keep what its frozen base makes of it
    (``llava.model.prefixes``): in the memory that the pictures' features leave of ``--feature_cache_mb``, and on the
    disk beside the queries."""
    if settings.offset_scope != QUESTION:
        return
    room = args.feature_cache_mb * 2**20
    for dataset in datasets:
        dataset.named = True
        room -= sum(features.nbytes for features, _ in (dataset.features or {}).values())
    folder = (
        PrefixFolder(args.query_cache, {"base": base.manifest}, args.feature_cache_mb) if args.query_cache else None
    )
    model.prefixes = PrefixStore(max(room, 0), folder)


@dataclass(frozen=True)
class Looks:
    """How this stage sees pictures.

    Attributes:
        pictures: files and tower. trains: the tower changes while training, so nothing of it may be kept.
        least_bytes: of a picture's features, where it is one tile.
    """

    pictures: PictureSource
    trains: bool
    least_bytes: int

    @property
    def base(self) -> Path:
        return self.pictures.base


def picture_source(
    model: Any, base: Checkpoint, prompt: Prompt, image_folder: Folder, args: TrainingArguments
) -> Looks:
    """The pictures as this stage sees them: by the model's own tower where it is whole, else by one of its own.

    Under ZeRO-3 the model's weights are in parts, and beside a quantised decoder they are where accelerate puts them.
    """
    device, dtype, tower = default_device(use_cpu=args.use_cpu), base_dtype(args), model.get_vision_tower()
    config = model.config

    def alone() -> VisionTower:
        with never_parted():
            named = getattr(config, "vision_config", None) is None
            found = build_vision_tower(config) if named else load_vision_tower(base, device)
        found.select_layer, found.select_feature = tower.select_layer, tower.select_feature
        return found.to(device=device, dtype=dtype).eval()

    parted = args.bits < 16 or any(hasattr(weight, "ds_id") for weight in tower.parameters())
    load = functools.cache(alone) if parted else (lambda: tower.to(device))
    kind = "sdpa" if parted else str(getattr(tower.config, "_attn_implementation", "sdpa"))
    found = PictureSource(base.folder, config, image_folder, prompt.aspect_ratio, load, device, dtype, kind)
    return Looks(found, tower.trains, tower.num_patches * tower.hidden_size * dtype.itemsize)


def parts_record(model_args: ModelArguments) -> dict[str, Any]:
    """Checksums of a tower and a projector that the command names, for the run's record."""
    found: dict[str, Any] = {}
    if model_args.vision_tower:
        folder = Path(model_args.vision_tower)
        found["tower"] = fingerprint(folder) if (folder / "config.json").is_file() else folder.name
        found["tower_content"] = content_of(manifest_of(model_args.vision_tower))
    if model_args.pretrain_mm_mlp_adapter and Path(model_args.pretrain_mm_mlp_adapter).is_file():
        (found["projector"],) = checksums([model_args.pretrain_mm_mlp_adapter])
    return found


def keep_downloads_in(folder: str) -> None:
    """``--cache_dir``: models from the hub are looked for and kept there, by this process and those it starts."""
    from huggingface_hub import constants

    os.environ["HF_HUB_CACHE"] = constants.HF_HUB_CACHE = folder
