"""Flags that LLaVA's, the prototype's and older transformers' scripts pass, and that change nothing here.

They are taken, so that published command lines run, and said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from llava.utils import rank0_print

IN_THE_BASE = "the base checkpoint's config decides"
FIRST_QUESTION = "a row is routed by its first question (the prototype's firstq), never by an answer"
NO_EFFECT = "it has no effect here"


def ignored(why: str = NO_EFFECT, **more: Any) -> Any:
    """A flag with any number of values; ``why`` is said where it is given."""
    about = {"help": f"ignored: {why}", "nargs": "*", "metavar": "ANY", **more}
    return dataclasses.field(default=None, metadata=about)


@dataclass
class IgnoredArguments:
    """Flags without effect."""

    vision_tower: str | None = ignored(IN_THE_BASE)
    mm_vision_select_layer: str | None = ignored(IN_THE_BASE)
    mm_vision_select_feature: str | None = ignored(IN_THE_BASE)
    mm_projector_type: str | None = ignored(IN_THE_BASE)
    mm_use_im_start_end: str | None = ignored(IN_THE_BASE)
    mm_use_im_patch_token: str | None = ignored(IN_THE_BASE)
    mm_patch_merge_type: str | None = ignored(IN_THE_BASE)
    mm_projector_lr: str | None = ignored(IN_THE_BASE)
    pretrain_mm_mlp_adapter: str | None = ignored(IN_THE_BASE)
    tune_mm_mlp_adapter: str | None = ignored()
    freeze_mm_mlp_adapter: str | None = ignored()
    freeze_backbone: str | None = ignored()
    lora_weight_path: str | None = ignored()
    group_by_modality_length: str | None = ignored()
    mpt_attn_impl: str | None = ignored()
    lazy_preprocess: str | None = ignored("rows are always prepared when they are needed")
    is_multimodal: str | None = ignored("rows say themselves whether they have a picture")
    cache_dir: str | None = ignored("HF_HOME says where downloads are kept")
    disable_task_id: str | None = ignored("a task trains its own slots; answering never sees which task it is")
    preprare_retreival_version: str | None = ignored(FIRST_QUESTION)
    prepare_retrieval_version: str | None = ignored(FIRST_QUESTION)
    save_safetensors: str | None = ignored()
    overwrite_output_dir: str | None = ignored()
    logging_dir: str | None = ignored()


def ignored_beside(taken: Container[str]) -> type:
    """``IgnoredArguments`` without the flags that mean something: a method's options, or of this transformers."""
    entries = [
        (entry.name, str | None, dataclasses.field(default=None, metadata=entry.metadata))
        for entry in dataclasses.fields(IgnoredArguments)
        if entry.name not in taken
    ]
    return dataclasses.make_dataclass("IgnoredArguments", entries)


def say_ignored(given: Any) -> None:
    """One note for each flag that was given."""
    for entry in dataclasses.fields(given):
        if getattr(given, entry.name) is not None:
            why = entry.metadata["help"].removeprefix("ignored: ")
            rank0_print(f"note: --{entry.name} is accepted and ignored: {why}")
