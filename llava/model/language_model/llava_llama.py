"""LLaVA on a Llama decoder, with retrieved weight offsets."""

from __future__ import annotations

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from llava.model.language_model.fields import LlavaFields
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel
from llava.model.saving import StageFolder


class LlavaConfig(LlavaFields, LlamaConfig):
    """A ``LlamaConfig`` with LLaVA's fields (``LlavaFields``); unknown ones are kept, and nothing is read from disk.

    Of this project: ``vision_config`` (the checkpoint ships its vision tower) and ``conversation_version`` (the
    conversation template the checkpoint was trained with).
    """

    model_type = "llava_llama"


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    """The decoder with vision tower and projector."""

    config_class = LlavaConfig


class LlavaLlamaForCausalLM(StageFolder, LlavaMetaForCausalLM, LlamaForCausalLM):
    """The causal language model with images, questions and per-question weight offsets.

    ``retriever`` is ``None`` until ``attach_adapter``; without a trained slot the logits are the base model's.
    """

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig):
        super(LlamaForCausalLM, self).__init__(config)  # not Llama's own: it would build the decoder twice
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_routing()
        self.post_init()


AutoConfig.register(LlavaConfig.model_type, LlavaConfig)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM)
