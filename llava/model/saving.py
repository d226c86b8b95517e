"""Write a loaded model as a checkpoint that needs no other: weights, tower, tokenizer, image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from llava.files import atomic_folder
from llava.utils import UserError, rank0_print


def save_whole_model(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write ``model`` to the new ``folder``, which appears under its name only when it is whole.

    Raises:
        UserError: ``folder`` exists already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is there already; give a new folder")
    find_tower: Any = getattr(model, "get_vision_tower", None)  # a plain language model has none
    tower = find_tower() if find_tower else None
    if tower is not None:
        model.config.vision_config = tower.config.to_dict()  # its weights are written too, fine-tuned or not
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("retriever.")}
    with atomic_folder(folder) as partial:
        model.save_pretrained(partial, state_dict=state, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(partial)
        if image_processor is not None:
            image_processor.save_pretrained(partial)
    rank0_print(f"written to {folder}")
