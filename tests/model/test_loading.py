"""Every layout of a checkpoint, told by its content, with equal tensors after loading; what does not fit is named."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import sentencepiece
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_llava import FAMILIES, make_tokenizer, write_base
from tokenizer_zoo import CORPUS
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from llava.checkpoints.checkpoint import Checkpoint
from llava.checkpoints.kinds import language_family
from llava.checkpoints.tokenizer import load_tokenizer
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.configs import llava_config
from llava.model.loading import attention
from llava.model.saving import save_whole_model
from llava.utils import UserError

TEXT_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig}
PROMPT = "USER: <image>\nis there a lesion ASSISTANT:"


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def base(request, tmp_path_factory):
    """A full tiny LLaVA checkpoint of each family."""
    return write_base(tmp_path_factory.mktemp("loading") / "tiny-base", family=request.param)


@pytest.fixture(scope="module")
def reference(base):
    return load(base)


@pytest.fixture(scope="module")
def plain(base, reference):
    """The base's language model alone, as a plain checkpoint."""
    folder, model = base.parent / "plain-lm", reference[1]
    family = family_of(base)
    values = {
        key: value for key, value in model.config.to_dict().items() if not key.startswith(("mm_", "vision", "im"))
    }
    language = AutoModelForCausalLM.from_config(TEXT_CONFIGS[family].from_dict(values))
    wanted = language.state_dict().keys()
    language.load_state_dict({key: value for key, value in model.state_dict().items() if key in wanted})
    language.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def family_of(folder):
    return language_family(json.loads((folder / "config.json").read_text()))


def load(path, model_base=None, name=None, **options):
    return load_pretrained_model(str(path), model_base and str(model_base), name, device="cpu", **options)


def copy(base, folder, *without):
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns(*without))
    return folder


def change_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    values = {key: value for key, value in {**values, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))


@torch.inference_mode()
def logits(loaded):
    tokenizer, model, *_ = loaded
    picture = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return model(input_ids=tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")[None], images=picture).logits


def same_tensors(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# -- full checkpoints --------------------------------------------------------------------------------------------------


def test_full_checkpoint_whatever_its_folder_is_called(base, reference, tmp_path, capsys):
    """A name without "llava", or with the other decoder's name in it, changes nothing."""
    other = "vicuna" if family_of(base) == "mistral" else "mistral-prompt-lora"
    loaded = load(copy(base, tmp_path / other))
    assert type(loaded[1]) is FAMILIES[family_of(base)][1]
    assert same_tensors(loaded[1], reference[1]) and loaded[2] is not None
    assert "LLaVA checkpoint (config.json says model type" in capsys.readouterr().out


def test_legacy_model_type_with_an_architecture(base, reference, tmp_path):
    folder = copy(base, tmp_path / "any")
    change_config(folder, model_type="llava")  # what llava-v1.5-7b says, the same word as Hugging Face's own class
    assert same_tensors(load(folder)[1], reference[1])


def test_legacy_model_type_without_a_decoder_lets_the_name_decide_and_says_so(capsys):
    assert language_family({"model_type": "llava"}, "llava-med-mistral") == "mistral"
    assert "holds 'mistral'" in capsys.readouterr().out
    assert language_family({"model_type": "llava"}, "llava-7b") == "llama"
    with pytest.raises(UserError, match="Llama and Mistral"):
        language_family({"model_type": "llava_mpt", "architectures": ["LlavaMptForCausalLM"]})


def test_old_style_rope_theta_is_kept(base, tmp_path):
    """LLaVA-Med 1.5 says rope_theta 1e6 the old way; read as 1e4 its answers would be quietly worse."""
    folder = copy(base, tmp_path / "old")
    change_config(folder, rope_parameters=None, rope_theta=1000000.0, rope_scaling=None, torch_dtype="float16")
    assert load(folder)[1].config.rope_parameters["rope_theta"] == 1000000.0


def test_old_tower_names_and_shards_in_both_formats(base, reference, tmp_path):
    state = load_file(base / "model.safetensors")
    old = {key.replace("tower.vision_tower.", "tower.vision_tower.vision_model."): v for key, v in state.items()}
    old["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # harmless: computed nowadays
    assert len(set(old) - set(state)) > 10
    names = sorted(old)
    parts = [{key: old[key].clone() for key in names[half::2]} for half in (0, 1)]
    for ending, stem in (("safetensors", "model"), ("bin", "pytorch_model")):
        folder = copy(base, tmp_path / ending, "model.safetensors")
        weight_map = {}
        for number, part in enumerate(parts):
            file = f"{stem}-{number + 1:05d}-of-00002.{ending}"
            save_file(part, folder / file, {"format": "pt"}) if ending != "bin" else torch.save(part, folder / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
        assert same_tensors(load(folder)[1], reference[1])


def test_tower_in_the_checkpoint_wins_over_the_named_one(base, reference, tmp_path, capsys):
    """A fine-tuned tower must not be replaced by the hub's; its shape is read off the tensors."""
    folder = copy(base, tmp_path / "shipped")
    change_config(folder, vision_config=None, mm_vision_tower="nobody/such-clip-patch8-16")
    config = llava_config(folder)
    assert config.vision_config["image_size"] == 16 and config.vision_config["patch_size"] == 8
    assert "read off the checkpoint's tensors" in capsys.readouterr().out
    change_config(folder, vision_config={**config.vision_config, "num_attention_heads": 2})  # tiny heads, not 64 wide
    assert torch.equal(logits(load(folder)), logits(reference))


def test_a_pickle_that_runs_code_is_refused(base, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    folder = copy(base, tmp_path / "evil", "model.safetensors")
    with open(folder / "pytorch_model.bin", "wb") as stream:
        pickle.dump({"model.norm.weight": Evil()}, stream)
    with pytest.raises(UserError, match="more than plain tensors"):
        load(folder)


@pytest.mark.parametrize(
    ("drop", "add", "said"),
    [("model.mm_projector.0.weight", None, "lacks 1 tensors"), (None, "model.layers.9.x", "no place for 1 tensors")],
)
def test_missing_and_unexpected_tensors_are_listed(base, tmp_path, drop, add, said):
    folder = copy(base, tmp_path / "broken")
    state = load_file(folder / "model.safetensors")
    if drop:
        state.pop(drop)
    else:
        state[add] = torch.ones(2)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"{said}.*{drop or add}"):
        load(folder)


def test_wrong_shapes_and_cut_files_are_named(base, tmp_path):
    folder = copy(base, tmp_path / "shape")
    change_config(folder, intermediate_size=40)
    with pytest.raises(UserError, match="shape"):
        load(folder)
    folder = copy(base, tmp_path / "cut")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        load(folder)


def test_plain_language_model_is_loaded_and_said_to_be_one(plain, capsys):
    _, model, image_processor, _ = load(plain)
    assert image_processor is None and not hasattr(model, "get_vision_tower")
    assert "plain language model" in capsys.readouterr().out


def test_empty_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="nothing to load"):
        _ = Checkpoint.open(tmp_path).kind


# -- projector and LoRA over a base ------------------------------------------------------------------------------------


def write_projector(base, model, folder):
    """What LLaVA's first stage leaves: projector and config."""
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    state = {key: value for key, value in model.state_dict().items() if "mm_projector" in key}
    torch.save(state, folder / "mm_projector.bin")
    return folder


def separate_tower(base, model, folder):
    """The tower as a CLIP folder of its own, and the change to a config that names it."""
    tower = model.get_vision_tower()
    tower.vision_tower.save_pretrained(folder)
    tower.image_processor.save_pretrained(folder)
    return {"vision_config": None, "mm_vision_tower": str(folder)}


def test_projector_over_a_plain_language_model(base, reference, plain, tmp_path):
    folder = write_projector(base, reference[1], tmp_path / "pretrain")
    change_config(folder, **separate_tower(base, reference[1], tmp_path / "clip"))
    loaded = load(folder, plain)
    assert torch.allclose(logits(loaded), logits(reference), atol=1e-5)
    with pytest.raises(UserError, match="only a projector.*--model-base"):
        load(folder)
    (folder / "mm_projector.bin").unlink()
    with pytest.raises(UserError, match="mm_projector.bin"):
        load(folder, plain)


def write_lora(base, model, folder, seed=0, **more):
    """A LoRA folder as LLaVA writes it, with a projector that was trained too; returns the expected logits' model."""
    _, fresh, *_ = load(base)
    targets = {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ".*vision_tower.*", **more}
    settings = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **targets)
    wrapped = get_peft_model(fresh, settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "mm_projector" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)
    state = {key: value for key, value in wrapped.named_parameters() if "mm_projector" in key}
    torch.save({key: value.detach() for key, value in state.items()}, folder / "non_lora_trainables.bin")
    model.config.save_pretrained(folder)
    return wrapped.eval()


def test_lora_is_merged_and_its_base_is_found(base, reference, tmp_path, capsys):
    folder = tmp_path / "run-7"  # neither "llava" nor "lora" in the name
    wrapped = write_lora(base, reference[1], folder)
    tokenizer, model, *_ = loaded = load(folder)  # base from adapter_config.json
    assert type(model) is FAMILIES[family_of(base)][1]
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    expected = logits((tokenizer, wrapped))
    assert not torch.allclose(logits(reference), expected, atol=1e-3)
    assert torch.allclose(logits(loaded), expected, atol=1e-4)
    assert torch.allclose(logits(load(folder, base)), expected, atol=1e-4)
    said = capsys.readouterr().out
    assert "adapter_config.json names it" in said and "merged" in said


def test_lora_over_a_plain_language_model(base, reference, plain, tmp_path):
    """LLaVA's usual case: the base is Vicuna, the projector is in non_lora_trainables.bin, the tower is elsewhere."""
    folder = tmp_path / "llava-lora"
    wrapped = write_lora(base, reference[1], folder)
    change_config(folder, **separate_tower(base, reference[1], tmp_path / "clip"))
    assert torch.allclose(logits(load(folder, plain)), logits((reference[0], wrapped)), atol=1e-4)
    (folder / "non_lora_trainables.bin").rename(tmp_path / "kept.bin")
    with pytest.raises(UserError, match="neither in the base nor in .*non_lora_trainables.bin"):
        load(folder, plain)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="copy config.json"):
        load(folder, plain)


def test_layers_named_by_their_last_word_are_the_decoders_unless_the_tower_was_trained_too(base, reference, tmp_path):
    """LLaVA attached its tower after the LoRA; here it is there before, and has a q_proj of its own."""
    wrapped = write_lora(base, reference[1], tmp_path / "decoder")
    values = json.loads((tmp_path / "decoder" / "adapter_config.json").read_text())
    change = {**values, "exclude_modules": None}
    (tmp_path / "decoder" / "adapter_config.json").write_text(json.dumps(change))
    assert torch.allclose(logits(load(tmp_path / "decoder", base)), logits((reference[0], wrapped)), atol=1e-4)
    wrapped = write_lora(base, reference[1], tmp_path / "both", exclude_modules=None)
    assert [name for name, _ in wrapped.named_parameters() if "vision_tower" in name and "lora" in name]
    assert torch.allclose(logits(load(tmp_path / "both", base)), logits((reference[0], wrapped)), atol=1e-4)


def test_lora_for_another_base_is_refused(base, reference, tmp_path):
    folder = tmp_path / "lora"
    write_lora(base, reference[1], folder)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {key: value[..., :3].contiguous() for key, value in weights.items()}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match="does not fit the base"):
        load(folder, base)
    with pytest.raises(UserError, match="no full model"):
        load(folder, folder)


def test_adapter_beside_full_weights_is_a_tie_that_the_name_decides(base, tmp_path, capsys):
    folder = copy(base, tmp_path / "both")
    (folder / "adapter_config.json").write_text("{}")
    assert Checkpoint.open(folder, "llava-merged").kind == "llava"
    assert "the adapter is left out" in capsys.readouterr().out
    lora = Checkpoint.open(folder, "llava-lora")
    assert lora.kind == "lora" and "the name holds 'lora'" in lora.rule


# -- tokenizer and attention -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llava", "llava_llama", "llava_mistral"])
def test_sentencepiece_ids_do_not_depend_on_the_model_type(tmp_path, model_type):
    """transformers reads a ``llava`` folder without the word-start mark; LLaVA-1.5's ids have it."""
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "mm_vision_tower": "x"}))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for settings in ({}, {"tokenizer_class": "LlamaTokenizer", "legacy": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = load_tokenizer(tmp_path)
        for text in ("USER: Is there a fracture? ASSISTANT:", "\nis there", "x é"):
            assert tokenizer(text).input_ids == [1, *reference.encode(text)]


def test_a_folder_without_tokenizer_says_which_files_to_copy(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_llama"}))
    with pytest.raises(UserError, match="copy tokenizer"):
        load_tokenizer(tmp_path)


def test_attention_is_sdpa_and_falls_back_with_a_message(monkeypatch, capsys):
    assert attention(None) == "sdpa" and attention("eager") == "eager"
    monkeypatch.setattr("llava.model.loading.is_flash_attn_2_available", lambda: False)
    assert attention(None, use_flash_attn=True) == "sdpa"
    assert "using SDPA" in capsys.readouterr().out
    monkeypatch.setattr("llava.model.loading.is_flash_attn_2_available", lambda: True)
    assert attention("flash_attention_2") == "flash_attention_2"


def test_attention_implementations_agree(base, reference):
    eager = load(base, attn_implementation="eager")
    assert eager[1].config._attn_implementation == "eager"
    assert reference[1].config._attn_implementation == "sdpa"
    assert torch.allclose(logits(eager), logits(reference), atol=1e-4)


PUBLISHED = {
    "llama": {  # llava-v1.5-7b
        "model_type": "llava", "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False, "max_length": 4096,
        "mm_resampler_type": None, "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "pad_token_id": 0,
        "pretraining_tp": 1, "rope_scaling": None, "tune_mm_mlp_adapter": False, "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": False, "use_mm_proj": True, "torch_dtype": "float16",
        "transformers_version": "4.31.0",
    },
    "mistral": {  # llava-med-v1.5-mistral-7b
        "model_type": "llava_mistral", "feature_outs": "encoder+decoder", "img_size": 640, "segtok_posembed": "sincos",
        "vision_backbone": "convnextlarge", "proj_vis_to_txt_tokens": False, "tune_vision_tokenizer": "none",
        "vision_tokenizer_lr": None, "sliding_window": None, "rope_theta": 1000000.0, "attention_dropout": 0.0,
        "tokenizer_model_max_length": 2048, "tokenizer_padding_side": "right", "torch_dtype": "bfloat16",
        "transformers_version": "4.36.2",
    },
}  # fmt: skip


def test_published_configs_load_keep_their_fields_and_save(base, tmp_path):
    family = family_of(base)
    folder = copy(base, tmp_path / "published")
    change_config(folder, rope_parameters=None, dtype=None)
    values = {**json.loads((folder / "config.json").read_text()), **PUBLISHED[family]}
    (folder / "config.json").write_text(json.dumps(values))
    tokenizer, model, image_processor, _ = load(folder)
    for name in ("mm_use_im_start_end", "unfreeze_mm_vision_tower", "img_size", "tokenizer_padding_side"):
        if name in values:
            assert getattr(model.config, name) == values[name]
    save_whole_model(tmp_path / "again", tokenizer, model, image_processor)
    assert same_tensors(load(tmp_path / "again")[1], model)
