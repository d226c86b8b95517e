"""LLaVA on a Mistral decoder (LLaVA-Med v1.5), with retrieved weight offsets: the mix-ins of the Llama back-end."""

from __future__ import annotations

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM, MistralModel

from llava.model.language_model.fields import LlavaFields
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel
from llava.model.saving import StageFolder


class LlavaMistralConfig(LlavaFields, MistralConfig):
    """A ``MistralConfig`` with LLaVA's fields and this project's own (see ``LlavaConfig``)."""

    model_type = "llava_mistral"


class LlavaMistralModel(LlavaMetaModel, MistralModel):
    """The decoder with vision tower and projector."""

    config_class = LlavaMistralConfig


class LlavaMistralForCausalLM(StageFolder, LlavaMetaForCausalLM, MistralForCausalLM):
    """The causal language model with images, questions and per-question weight offsets."""

    config_class = LlavaMistralConfig

    def __init__(self, config: LlavaMistralConfig):
        super(MistralForCausalLM, self).__init__(config)  # not Mistral's own: it would build the decoder twice
        self.model = LlavaMistralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_routing()
        self.post_init()


AutoConfig.register(LlavaMistralConfig.model_type, LlavaMistralConfig)
AutoModelForCausalLM.register(LlavaMistralConfig, LlavaMistralForCausalLM)
