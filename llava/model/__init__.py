"""The model: decoder back-ends, vision tower, projector, retriever and loader.

LLaVA's names are found here, imported on demand; an import that fails says why.
"""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "LlavaConfig": "llava_llama",
    "LlavaLlamaForCausalLM": "llava_llama",
    "LlavaMistralConfig": "llava_mistral",
    "LlavaMistralForCausalLM": "llava_mistral",
}

__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.language_model.{_PLACES[name]}"), name)
