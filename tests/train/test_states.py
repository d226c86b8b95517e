"""LLaVA's helpers that gather what was trained, on a model of a few weights."""

import pytest
import torch
from tiny_llava import write_base
from torch import nn

from llava.checkpoints.weights import load_bin
from llava.model.builder import load_base, load_pretrained_model
from llava.train.train import (
    LLaVATrainer,
    TrainingArguments,
    find_all_linear_names,
    get_mm_adapter_state_maybe_zero_3,
    get_peft_state_maybe_zero_3,
    get_peft_state_non_lora_maybe_zero_3,
    maybe_zero_3,
    safe_save_model_for_hf_trainer,
    smart_tokenizer_and_embedding_resize,
)


def params(*trained):
    names = "a.lora_A.weight a.bias b.bias b.weight mm_projector.weight".split()
    return [(name, nn.Parameter(torch.full((2,), float(n)), name in trained)) for n, name in enumerate(names)]


def test_a_parameter_is_copied():
    own = nn.Parameter(torch.ones(2))
    copied = maybe_zero_3(own)
    own.data.zero_()
    assert copied.tolist() == [1, 1] and not copied.requires_grad


@pytest.mark.parametrize(
    "bias, names",
    [
        ("none", {"a.lora_A.weight"}),
        ("all", {"a.lora_A.weight", "a.bias", "b.bias"}),
        ("lora_only", {"a.lora_A.weight", "a.bias"}),
    ],
)
def test_the_loras_tensors_with_its_biases(bias, names):
    found = get_peft_state_maybe_zero_3(iter(params()), bias)
    assert set(found) == names and found["a.lora_A.weight"].tolist() == [0, 0]
    assert not names - {"a.lora_A.weight"} or found["a.bias"].tolist() == [1, 1]


def test_another_word_for_the_biases_is_refused():
    with pytest.raises(NotImplementedError, match="some"):
        get_peft_state_maybe_zero_3(params(), "some")


def test_what_is_no_lora():
    assert set(get_peft_state_non_lora_maybe_zero_3(iter(params("b.weight", "a.lora_A.weight")))) == {"b.weight"}
    found = get_peft_state_non_lora_maybe_zero_3(iter(params()), require_grad_only=False)
    assert set(found) == {"a.bias", "b.bias", "b.weight", "mm_projector.weight"}


def test_what_a_word_names():
    assert set(get_mm_adapter_state_maybe_zero_3(iter(params()), ["mm_projector", "a.b"])) == {
        "mm_projector.weight",
        "a.bias",
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "tiny-llava")


def test_the_decoders_linear_layers(base):
    model, *_ = load_base(base)
    names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    assert find_all_linear_names(model) == sorted(names)
    assert find_all_linear_names(nn.ModuleDict({"lm_head": nn.Linear(1, 1), "x": nn.Linear(1, 1)})) == ["x"]


def test_new_tokens_start_as_the_mean_of_the_others(base):
    model, tokenizer, _ = load_base(base)
    before = model.get_input_embeddings().weight.detach().clone()
    smart_tokenizer_and_embedding_resize({"unk_token": "[UNK]"}, tokenizer, model)
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert len(table) == len(tokenizer) == len(before) + 1
        assert torch.allclose(table[-1], table[:-1].mean(0), atol=1e-6)
    assert torch.equal(model.get_input_embeddings().weight[:-1], before)
    smart_tokenizer_and_embedding_resize({"unk_token": "[UNK]"}, tokenizer, model)
    assert len(model.get_input_embeddings().weight) == len(before) + 1


def trainer(base, folder, **more):
    """LLaVA's trainer as other programs build it: no recipe, and the tokenizer under LLaVA's name."""
    model, tokenizer, _ = load_base(base)
    ids = torch.tensor([1, 5, 6, 2])
    rows = [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}] * 2
    settings = {"max_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_steps": 1}
    args = TrainingArguments(output_dir=str(folder), learning_rate=1e-2, **settings)
    vars(args).update(more)
    return LLaVATrainer(model=model, tokenizer=tokenizer, args=args, train_dataset=rows)


def test_the_whole_model_is_written(base, tmp_path):
    mine = trainer(base, tmp_path / "work")
    safe_save_model_for_hf_trainer(mine, str(tmp_path / "llava-whole"))
    _, model, *_ = load_pretrained_model(str(tmp_path / "llava-whole"), None, device="cpu")
    for name, value in mine.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_the_projector_alone_is_written(base, tmp_path):
    mine = trainer(base, tmp_path / "work", tune_mm_mlp_adapter=True)
    safe_save_model_for_hf_trainer(mine, str(tmp_path / "llava-projector"))
    safe_save_model_for_hf_trainer(mine, str(tmp_path / "run" / "checkpoint-7"))
    own = {name: value for name, value in mine.model.state_dict().items() if "mm_projector" in name}
    for file in ("llava-projector/mm_projector.bin", "run/mm_projector/checkpoint-7.bin"):
        found = load_bin(tmp_path / file)
        assert set(found) == set(own) and all(torch.equal(own[name], value) for name, value in found.items())
    assert (tmp_path / "llava-projector" / "config.json").is_file()
    mine.args.use_im_start_end = True
    safe_save_model_for_hf_trainer(mine, str(tmp_path / "llava-tokens"))
    assert "model.embed_tokens.weight" in load_bin(tmp_path / "llava-tokens" / "mm_projector.bin")


def test_a_trainer_without_a_recipe_trains_and_saves(base, tmp_path):
    mine = trainer(base, tmp_path / "work", tune_mm_mlp_adapter=True, mm_projector_lr=0.5)
    mine.train()
    assert (tmp_path / "work" / "checkpoint-1" / "config.json").is_file()
    assert (tmp_path / "work" / "mm_projector" / "checkpoint-1.bin").is_file()
    rates = {group["initial_lr"] for group in mine.optimizer.param_groups}
    assert rates == {0.5, 1e-2}
    whole = trainer(base, tmp_path / "whole")
    whole.train()
    assert list((tmp_path / "whole" / "checkpoint-1").glob("*.safetensors"))


def test_names_are_where_llava_has_them():
    import llava.train.llava_trainer as trainers
    import llava.train.train as training

    for module in (training, trainers):
        for name in module.__all__:
            assert hasattr(module, name)
    assert trainers.maybe_zero_3 is training.maybe_zero_3
