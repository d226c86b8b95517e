"""LLaVA with retrieved low-rank weight offsets, for continual learning on medical visual question answering."""

from llava.model.auto_classes import announce

__version__ = "0.1.0"
__all__ = ["LlavaLlamaForCausalLM"]


def __getattr__(name: str):
    if name == "LlavaLlamaForCausalLM":  # imported on demand: light commands need no transformers
        from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

        return LlavaLlamaForCausalLM
    raise AttributeError(f"module 'llava' has no attribute {name!r}")


announce()
