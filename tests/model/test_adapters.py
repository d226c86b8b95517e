"""A LoRA on the tables of a base whose head is its token embeddings."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from llava.model.adapters import apply_adapter

IDS = torch.arange(8)[None]


def base(tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "q_proj"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_lora_answers_as_it_was_trained_also_on_tied_tables(tmp_path, tied, target):
    trained = get_peft_model(base(tied), LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
    expected = trained(IDS).logits
    trained.save_pretrained(tmp_path / "lora")
    merged = apply_adapter(base(tied), tmp_path / "lora", merge=True)
    torch.testing.assert_close(merged(IDS).logits, expected)
    untied = not tied or target != "q_proj"
    assert merged.config.tie_word_embeddings is not untied
    merged.save_pretrained(tmp_path / "merged")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(IDS).logits, expected)
