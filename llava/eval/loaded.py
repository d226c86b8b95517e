"""The model that an answerer has in memory: how it got there, and what is looked at before it does."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from llava.checkpoints.checkpoint import Checkpoint
from llava.checkpoints.kinds import ADAPTER_CONFIG
from llava.conversation import get_conversation
from llava.data.prompt import check_aspect_ratio
from llava.devices import default_device
from llava.eval.generation import Loading
from llava.eval.question_cache import MEGABYTES, QuestionCache, contents_of
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.model.configs import llava_config
from llava.model.kept_prefixes import PrefixFolder
from llava.model.loading import settle_tf32
from llava.model.prefixes import PrefixStore
from llava.utils import UserError

_PROMPT_ENTRIES = ("prompt", "conversation_version", "image_aspect_ratio")


@dataclass
class Loaded:
    """A model as it was loaded, and from where.

    Attributes:
        key: folder or hub name, and that of the model under it where it has one.
        adapter: what it came with. entries: what its config said of the prompt.
    """

    key: tuple[str, str | None]
    tokenizer: Any
    model: Any
    image_processor: Any
    adapter: Any
    entries: dict[str, Any]

    @classmethod
    def load(cls, place: str, base: str | None, loading: Loading, cache: QuestionCache) -> Loaded:
        """Load the model of ``place``, over ``base`` where it needs one; with prefixes, if the cache says so.

        Raises:
            UserError: a device that is not here; no checkpoint; a model without pictures.
        """
        settle_tf32(loading.tf32)
        device = default_device(loading.device)
        found: Any = load_pretrained_model(
            place,
            base,
            get_model_name_from_path(place),
            load_8bit=loading.load_8bit,
            load_4bit=loading.load_4bit,
            device_map=loading.device_map or {"": device},
            device=device,
            attn_implementation=loading.attn_implementation,
            dtype=loading.dtype,
        )
        tokenizer, model, image_processor, _ = found
        if not hasattr(model, "get_vision_tower"):
            raise UserError(f"{place} is a plain language model, not a LLaVA checkpoint")
        if cache.prefixes:
            model.requires_grad_(False)  # of weights that may change nothing is kept
            folder = PrefixFolder(cache.folder, contents_of(place, base)) if cache.folder else None
            model.prefixes = PrefixStore(MEGABYTES * 2**20, folder)
        entries = {name: value for name, value in vars(model.config).items() if name in _PROMPT_ENTRIES}
        return cls((place, base), tokenizer, model.eval(), image_processor, model.retriever, entries)

    def clear(self) -> None:
        """Take off what was put on the model since it was loaded."""
        self.model.detach_adapter()
        values = vars(self.model.config)
        for name in _PROMPT_ENTRIES:
            values.pop(name, None)
        values.update(self.entries)


def is_light(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is slots alone, which any number of can share one loaded base."""
    return checkpoint.kind == "stage" and not checkpoint.has_weights and not checkpoint.has(ADAPTER_CONFIG)


def check_asked(checkpoint: Checkpoint, asked: dict[str, Any]) -> None:
    """Refuse a template or picture mode that is not known, or that the model cannot do, before it is loaded."""
    if asked.get("conv_mode"):
        get_conversation(asked["conv_mode"])
    if asked.get("aspect_ratio"):
        config = llava_config(checkpoint) if checkpoint.has("config.json") else None
        check_aspect_ratio(asked["aspect_ratio"], config)


def check_task(task: str | None, trained: Collection[str]) -> None:
    """Refuse a task that a model has no trained slots for."""
    if task and task not in trained:
        raise UserError(f"no trained slots for task {task!r}; the model has {', '.join(trained) or 'no slots'}")
