"""Turn checkpoint folders between LLaVA's layout and Hugging Face's (``hf_layout``), one weight file at a time.

A 14 GB checkpoint needs the memory of its largest file. Tensors are renamed, never changed; the one addition is the
``<image>`` token that Hugging Face's classes count pictures by: where the tokenizer lacks it, the embeddings get rows
for it, and the head rows equal to the mean of the others, which is never the largest logit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedTokenizerBase

from llava.checkpoints.card import CARD_FILE, NOT_CLINICAL, PIPELINE, TAGS, licence_section, public_name, write_card
from llava.checkpoints.checkpoint import Checkpoint
from llava.checkpoints.hf_layout import TO_HF, TO_LLAVA, config_to_hf, renamed
from llava.checkpoints.kinds import SLOTS_FILE, TOWER_PREFIX
from llava.checkpoints.manifest import seal
from llava.checkpoints.schemas import has_processor
from llava.checkpoints.tokenizer import load_tokenizer
from llava.checkpoints.weights import load_bin
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_mode_for
from llava.files import atomic_folder, atomic_write
from llava.model.chat_template import faithful_template
from llava.model.configs import llava_config
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_encoder.tower import VisionTower, tower_kind
from llava.outside import parsed
from llava.utils import UserError, rank0_print

FROM_HF, TO_HF_DIRECTION = "from_hf", "to_hf"
VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
COPIED = ("generation_config.json", "preprocessor_config.json")
CHAT_TEMPLATES = ("chat_template.json", "chat_template.jinja")


def convert(source: Path, target: Path, direction: str) -> None:
    """Write the checkpoint ``source`` in the other layout to the new folder ``target``.

    Raises:
        UserError: the source has the wrong layout, something the other layout has no word for, or ``target`` exists.
    """
    if direction not in (FROM_HF, TO_HF_DIRECTION):
        raise UserError(f"unknown direction {direction!r} (choose {FROM_HF} or {TO_HF_DIRECTION})")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is there already; give a new folder")
    checkpoint = Checkpoint(source)
    if checkpoint.is_hf != (direction == FROM_HF):
        found = "Hugging Face's" if direction == TO_HF_DIRECTION else "LLaVA's"
        raise UserError(f"{source} has {found} layout already, or is no LLaVA checkpoint; nothing to convert")
    if direction == TO_HF_DIRECTION and checkpoint.has(SLOTS_FILE):
        raise UserError(
            f"{source} holds slots, which Hugging Face's classes don't know: convert its base, and export each task "
            "with python -m llava.continual.slots export-peft --layout hf"
        )
    if not checkpoint.has_weights:
        raise UserError(f"{source} holds no full weights; merge the adapter first (scripts/merge_lora_weights.py)")
    with atomic_folder(target) as partial:
        for name in (*COPIED, *CHAT_TEMPLATES) if direction == FROM_HF else COPIED:
            if checkpoint.has(name):
                shutil.copyfile(source / name, partial / name)
        (_from_hf if direction == FROM_HF else _to_hf)(checkpoint, partial)
        _write_card(checkpoint, partial, target.name, direction)
        seal(partial)
    rank0_print(f"{source} converted ({direction}) to {target}")


def _write_card(source: Checkpoint, folder: Path, name: str, direction: str) -> None:
    """The source's model card goes along; what was done to the weights is a section of its own."""
    library, layout = ("llava", "LLaVA's") if direction == FROM_HF else ("transformers", "Hugging Face's")
    is_new = not source.has(CARD_FILE)
    if not is_new:
        shutil.copyfile(source.folder / CARD_FILE, folder / CARD_FILE)
    base = public_name(source.folder)
    text = f"`{base}` (fingerprint `{source.fingerprint}`) in {layout} layout: its tensors renamed, not changed."
    text = f"# {name}\n\n{text}\n\n{NOT_CLINICAL}" if is_new else f"## Conversion\n\n{text}"
    front = {"base_model": base, "library_name": library, "pipeline_tag": PIPELINE, "tags": list(TAGS)}
    licence = {"licence": licence_section(base, "")} if is_new else {}
    write_card(folder, front, {"conversion": text, **licence})


def _from_hf(source: Checkpoint, target: Path) -> None:
    _write_json(target / "config.json", source.llava_config)
    if has_processor(source.folder) and not source.has("preprocessor_config.json"):
        kind = tower_kind(source.llava_config["vision_config"].get("model_type"), "the checkpoint's vision tower")
        kind.read_processor(str(source.folder)).save_pretrained(target)
    load_tokenizer(source.folder).save_pretrained(target)
    write_shards(target, ({renamed(key, TO_LLAVA): value for key, value in shard.items()} for shard in shards(source)))


def _to_hf(source: Checkpoint, target: Path) -> None:
    config = llava_config(source)
    tokenizer = load_tokenizer(source.folder)
    tower = None if getattr(config, "vision_config", None) else build_vision_tower(config)
    vision = tower.config.to_dict() if tower else dict(config.vision_config)
    kind = tower_kind(vision.get("model_type"), "the checkpoint's vision tower")
    if kind is not CLIPVisionTower:
        raise UserError(
            f"the checkpoint's vision tower is {kind.name}; only CLIP towers are written to Hugging Face's layout"
        )
    image_token = _image_token(tokenizer)
    _set_chat_template(tokenizer, conv_mode_for(config, source.name), config)
    config.vocab_size = max(config.vocab_size, image_token + 1)
    _write_json(target / "config.json", config_to_hf(_plain_values(config), vision, image_token))
    write_shards(target, _hf_shards(source, config.vocab_size, tower))
    _write_processor(source.folder, target, tokenizer, config, vision, tower)


def _plain_values(config: PretrainedConfig) -> dict[str, Any]:
    values = parsed(config.to_json_string(use_diff=False), "the config")
    values.pop("transformers_version", None)
    return {**values, "model_type": config.model_type}


def _hf_shards(source: Checkpoint, vocabulary: int, tower: VisionTower | None) -> Iterator[dict[str, Tensor]]:
    for shard in shards(source):
        for key in VOCABULARY_TENSORS:
            if key in shard:
                shard[key] = grown(shard[key], vocabulary)
        yield {renamed(key, TO_HF): value for key, value in shard.items() if not key.endswith("rotary_emb.inv_freq")}
    if tower is not None:  # LLaVA's checkpoints mostly leave the tower out
        state = {f"{TOWER_PREFIX}{key}": value for key, value in tower.state_dict().items()}
        yield {renamed(key, TO_HF): value.contiguous() for key, value in state.items()}


def grown(table: Tensor, rows: int) -> Tensor:
    """``[n, hidden]`` with the mean row repeated up to ``rows``: as a head row it is never the largest logit."""
    lacking = rows - table.shape[0]
    if lacking <= 0:
        return table
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(lacking, -1)])


def _image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of ``<image>``, which is added where the tokenizer lacks it."""
    if DEFAULT_IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([DEFAULT_IMAGE_TOKEN], special_tokens=True)
    return tokenizer.get_vocab()[DEFAULT_IMAGE_TOKEN]


def _set_chat_template(tokenizer: PreTrainedTokenizerBase, conv_mode: str, config: PretrainedConfig) -> None:
    """What the tokenizer brought is the language model's, and not how this checkpoint is asked."""
    tokenizer.chat_template = faithful_template(tokenizer, conv_mode, getattr(config, "mm_use_im_start_end", False))
    if tokenizer.chat_template is None:
        rank0_print(f"note: no chat template is written: with this tokenizer none gives the ids of {conv_mode}")


def _write_processor(
    source: Path,
    target: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    vision: dict[str, Any],
    tower: VisionTower | None,
) -> None:
    """Tokenizer, image processor and the file that tells transformers' processor how many tokens a picture is."""
    tokenizer.save_pretrained(target)
    processor: Any = tower.image_processor if tower else _shipped_processor(source, vision)
    pictures, mode = processor.to_dict(), getattr(config, "image_aspect_ratio", None)
    if mode == "anyres":
        pinpoints = [[height, width] for width, height in config.image_grid_pinpoints]
        pictures |= {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": pinpoints}
    else:
        pictures |= {"image_processor_type": "LlavaImageProcessor", "do_pad": mode == "pad"}
    _write_json(target / "preprocessor_config.json", pictures)
    select = getattr(config, "mm_vision_select_feature", None) or "patch"
    settings = {
        "processor_class": "LlavaNextProcessor" if mode == "anyres" else "LlavaProcessor",
        "image_token": DEFAULT_IMAGE_TOKEN,
        "patch_size": vision["patch_size"],
        "vision_feature_select_strategy": "default" if select == "patch" else "full",
        "num_additional_image_tokens": 1,
    }
    _write_json(target / "processor_config.json", settings)


def _shipped_processor(source: Path, vision: dict[str, Any]) -> BaseImageProcessor:
    return CLIPVisionTower.shipped_processor(source, CLIPVisionTower.config_class(**vision))


def shards(source: Checkpoint) -> Iterator[dict[str, Tensor]]:
    """The tensors of each weight file in turn."""
    for file in sorted(set(source.tensor_files.values())):
        yield load_file(file) if file.suffix == ".safetensors" else load_bin(file)


def write_shards(folder: Path, parts: Iterator[dict[str, Tensor]]) -> None:
    """Write each part as a safetensors file, with transformers' names and index."""
    files: list[list[str]] = []
    total = 0
    for number, part in enumerate(parts):
        part = {key: value.contiguous() for key, value in part.items()}
        save_file(part, folder / f"part-{number}.safetensors", metadata={"format": "pt"})
        files.append(list(part))
        total += sum(value.numel() * value.element_size() for value in part.values())
    if len(files) == 1:
        (folder / "part-0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, keys in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / name)
        weight_map.update(dict.fromkeys(keys, name))
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with atomic_write(path) as stream:
        json.dump(values, stream, indent=2, sort_keys=True)
