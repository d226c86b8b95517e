"""LLaVA's own two stages: what trains, what is written, and that it loads here and in transformers."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_parts import stage_words, trained_names, write_parts
from tiny_world import arguments
from transformers import LlavaForConditionalGeneration, SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from llava.checkpoints.weights import load_bin
from llava.model.builder import load_base, load_pretrained_model
from llava.model.convert import convert
from llava.train import llava_trainer
from llava.train.arguments import parse_arguments
from llava.train.flags import check_frozen_base
from llava.train.train import train
from llava.utils import UserError


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A language model, a tower and rows, each a folder or file of its own."""
    return write_parts(tmp_path_factory.mktemp("parts"))


def run(parts, stage, *more, data="instruct.json"):
    with arguments(stage_words(parts, stage, data, *more)):
        train()
    return stage


@pytest.fixture(scope="module")
def aligned(parts):
    return run(parts, parts / "llava-aligned", "--version", "plain", "--tune_mm_mlp_adapter", "True", data="align.json")


@pytest.fixture(scope="module")
def tuned(parts, aligned):
    more = ("--version", "v1", "--pretrain_mm_mlp_adapter", aligned / "mm_projector.bin")
    return run(parts, parts / "llava-tuned", *more)


# -- feature alignment -------------------------------------------------------------------------------------------------


def test_alignment_writes_a_projector_and_llavas_config(parts, aligned):
    files = {file.name for file in aligned.iterdir()}
    assert {"mm_projector.bin", "config.json", "tokenizer.json", "training.json"} <= files
    assert not [name for name in files if name.endswith(".safetensors")]
    card = (aligned / "README.md").read_text()
    assert "Not for clinical use" in card and "| method | align |" in card and str(parts) not in card
    config = json.loads((aligned / "config.json").read_text())
    expected = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_vision_tower": str(parts / "clip"),
        "mm_hidden_size": 16,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": True,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "square",
        "tokenizer_model_max_length": 256,
        "use_cache": True,
    }
    assert {name: config[name] for name in expected} == expected and "vision_config" not in config


def test_alignment_changes_the_projector_alone(parts, aligned):
    """Bit for bit: everything else is the language model's and the tower's."""
    _, model, processor, _ = load_pretrained_model(str(aligned), str(parts / "vicuna"), device="cpu")
    found, lm = model.state_dict(), load_base(parts / "vicuna")[0].state_dict()
    saved = load_bin(aligned / "mm_projector.bin")
    assert set(saved) == {name for name in found if "mm_projector" in name} and processor is not None
    assert all(torch.equal(found[name], value) for name, value in (lm | saved).items())
    assert set(found) - set(lm) - set(saved) == {name for name in found if "vision_tower" in name}


def test_the_projector_starts_from_the_seed_and_learns(parts, aligned, tmp_path):
    words = ("--version", "plain", "--tune_mm_mlp_adapter", "True", "--learning_rate")
    still, long = (
        run(parts, tmp_path / f"llava-{rate}", *words, rate, "--max_steps", steps, data="align.json")
        for rate, steps in (("0", 1), ("1e-1", 20))
    )
    start, end = load_bin(still / "mm_projector.bin"), load_bin(aligned / "mm_projector.bin")
    assert not any(torch.equal(start[name], value) for name, value in end.items())
    losses = [entry["loss"] for entry in json.loads((long / "log_history.json").read_text()) if "loss" in entry]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_start_and_end_tokens_are_learned_with_the_projector(parts, tmp_path):
    more = ("--version", "v1", "--tune_mm_mlp_adapter", "True", "--mm_use_im_start_end", "True")
    stage = run(parts, tmp_path / "llava-marks", *more, data="align.json")
    saved = load_bin(stage / "mm_projector.bin")
    table = saved["model.embed_tokens.weight"]
    lm = load_base(parts / "vicuna")[0].get_input_embeddings().weight
    assert len(table) == len(lm) + 2 and not torch.equal(table[-2], table[-1])
    tokenizer, model, *_ = load_pretrained_model(str(stage), str(parts / "vicuna"), device="cpu")
    assert tokenizer.convert_tokens_to_ids("<im_end>") == len(lm) + 1
    assert torch.equal(model.get_input_embeddings().weight, table)
    more = ("--version", "v1", "--mm_use_im_start_end", "True", "--freeze_backbone", "True", "--learning_rate", 0)
    next_stage = run(parts, tmp_path / "llava-next", *more, "--pretrain_mm_mlp_adapter", stage / "mm_projector.bin")
    own = load_pretrained_model(str(next_stage), None, device="cpu")[1].get_input_embeddings().weight
    assert torch.equal(own[-2:], table[-2:]) and torch.equal(own[:-2], lm)


# -- instruction tuning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, whole",
    [
        ("", {"decoder", "head", "projector"}),
        ("--freeze_backbone True", {"head", "projector"}),
        ("--freeze_mm_mlp_adapter True", {"decoder", "head"}),
        ("--freeze_backbone True --freeze_mm_mlp_adapter True", {"head"}),
        ("--unfreeze_mm_vision_tower True", {"decoder", "head", "projector", "tower"}),
        ("--freeze_backbone True --unfreeze_mm_vision_tower True --mm_vision_tower_lr 1e-3",
         {"head", "projector", "tower"}),
        ("--mm_tunable_parts mm_vision_tower,mm_mlp_adapter,mm_language_model",
         {"decoder", "head", "projector", "tower"}),
        ("--mm_tunable_parts mm_language_model", {"decoder", "head"}),
        ("--mm_tunable_parts mm_vision_tower", {"tower"}),
    ],
)  # fmt: skip
def test_every_part_that_trains_changes_and_nothing_else(parts, tmp_path, flags, whole):
    """Weight for weight, against the same run with a learning rate of nothing."""
    more = ("--version", "v1", *flags.split(), "--max_steps", 2)
    changed = load_pretrained_model(str(run(parts, tmp_path / "llava-moved", *more)), None, device="cpu")[1]
    rates = [word for name in ("learning_rate", "mm_vision_tower_lr") for word in (f"--{name}", 0)]
    rates = rates if "mm_vision_tower_lr" in flags else rates[:2]
    still = load_pretrained_model(str(run(parts, tmp_path / "llava-still", *more, *rates)), None, device="cpu")[1]
    before, after = still.state_dict(), changed.state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == trained_names(before, whole)


def test_a_tower_that_trains_is_not_looked_at_ahead(parts, tmp_path, monkeypatch):
    seen = []
    collate = llava_trainer.LLaVATrainer.compute_loss

    def note(self, model, inputs, *args, **kwargs):
        seen.append(("images" in inputs, "image_features" in inputs))
        return collate(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(llava_trainer.LLaVATrainer, "compute_loss", note)
    run(parts, tmp_path / "llava-frozen", "--version", "v1", "--max_steps", 1)
    run(parts, tmp_path / "llava-free", "--version", "v1", "--max_steps", 1, "--unfreeze_mm_vision_tower", "True")
    assert seen == [(False, True), (True, False)]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--tune_mm_mlp_adapter True --freeze_mm_mlp_adapter True", "nothing would train"),
        ("--tune_mm_mlp_adapter True --unfreeze_mm_vision_tower True", "trains the projector alone"),
        ("--freeze_mm_mlp_adapter True --mm_projector_lr 1", "the projector does not train"),
        ("--mm_vision_tower_lr 1", "add --unfreeze_mm_vision_tower True"),
        ("--mm_tunable_parts mm_eyes", "'mm_eyes' is no part"),
        ("--mm_tunable_parts mm_vision_tower --freeze_backbone True", "leave out --freeze_backbone"),
        ("--mm_tunable_parts mm_language_model --lora_enable True", "leave it out, or --lora_enable"),
        ("--bits 4", "quantised weights cannot train; add --lora_enable True"),
        ("--lora_bias all", "goes with --lora_enable True"),
        ("--lora_weight_path x", "LLaVA never reads it"),
        ("--mpt_attn_impl triton", "MPT decoders"),
        ("--method instruct --tune_mm_mlp_adapter True", "is feature alignment"),
        ("--mm_vision_select_layer -9", "the tower has 2 layers"),
        ("--mm_patch_merge_type round", "choose from flat"),
        ("--mm_projector_type mlp", "known: linear, mlp<N>x_gelu"),
        ("--mm_projector_type identity", "16 wide and the decoder is 32"),
        ("--mm_vision_select_feature eyes", "must be 'patch' or 'cls_patch'"),
        ("--version v9", "unknown conversation template 'v9'"),
        ("--image_aspect_ratio anyres", "image_grid_pinpoints"),
        ("--image_grid_pinpoints 7", "is no list of sizes"),
        ("--pretrain_mm_mlp_adapter nowhere.bin", "projector file not found: nowhere.bin"),
        ("--vision_tower nowhere", "cannot be read"),
    ],
)
def test_flags_that_cannot_act_are_refused(parts, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        run(parts, tmp_path / "llava-none", "--version", "v1", *flags.split())
    assert not (tmp_path / "llava-none").exists()


def test_a_language_model_needs_a_tower(parts, tmp_path):
    words = stage_words(parts, tmp_path / "llava-blind", "instruct.json", "--version", "v1")
    place = words.index("--vision_tower")
    with (
        arguments(words[:place] + words[place + 2 :]),
        pytest.raises(UserError, match="give its tower as --vision_tower"),
    ):
        train()


def test_alignment_refuses_rows_without_pictures(parts, tmp_path):
    with pytest.raises(UserError, match="row 10 has no picture"):
        run(parts, tmp_path / "llava-none", "--version", "plain", "--tune_mm_mlp_adapter", "True")


# -- what is written ---------------------------------------------------------------------------------------------------


def question(folder, base=None):
    """Logits of one picture's question under a checkpoint."""
    tokenizer, model, processor, _ = load_pretrained_model(str(folder), base and str(base), device="cpu")
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    ids = torch.tensor([[1, -200, *tokenizer("is there a lesion?", add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        return model, ids, pixels, model(input_ids=ids, images=pixels).logits


def test_the_whole_model_is_written_and_read_in_transformers(tuned, tmp_path):
    model, ids, pixels, logits = question(tuned)
    config = json.loads((tuned / "config.json").read_text())
    assert config["vision_config"]["hidden_size"] == 16 and config["conversation_version"] == "v1"
    assert (tuned / "preprocessor_config.json").is_file()
    convert(tuned, tmp_path / "hf", "to_hf")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    image_token = theirs.config.image_token_id
    flat = [token for one in ids[0].tolist() for token in ([image_token] * 4 if one == -200 else [one])]
    with torch.no_grad():
        found = theirs(input_ids=torch.tensor([flat]), pixel_values=pixels).logits
    assert torch.allclose(found[..., : logits.shape[-1]], logits, atol=1e-4)


def test_a_lora_is_written_with_the_projector_and_comes_back(parts, aligned, tmp_path):
    flags = "--version v1 --lora_enable True --lora_r 4 --lora_alpha 8 --mm_projector_lr 1e-2 --max_steps 3"
    more = (*flags.split(), "--pretrain_mm_mlp_adapter", aligned / "mm_projector.bin")
    stage = run(parts, tmp_path / "llava-lora", *more)
    extra = load_bin(stage / "non_lora_trainables.bin")
    assert set(extra) == {f"base_model.model.{name}" for name in load_bin(aligned / "mm_projector.bin")}
    adapter = json.loads((stage / "adapter_config.json").read_text())
    assert adapter["r"] == 4 and adapter["base_model_name_or_path"] == str(parts / "vicuna")
    merged, *_, logits = question(stage)
    state, lm = merged.state_dict(), load_base(parts / "vicuna")[0].state_dict()
    assert not torch.equal(state["model.layers.0.mlp.up_proj.weight"], lm["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(state["lm_head.weight"], lm["lm_head.weight"])
    for name, value in extra.items():
        assert torch.equal(state[name.removeprefix("base_model.model.")], value)
    assert torch.isfinite(logits).all()


def test_another_llava_is_tuned_further_with_its_own_tower(tuned, parts, tmp_path):
    """finetune_task.sh: the base is a LLaVA, and the command names the tower that it has."""
    stage = run(parts, tmp_path / "llava-task", "--model_name_or_path", tuned, "--version", "v1", "--learning_rate", 0)
    one, other = (question(folder)[-1] for folder in (tuned, stage))
    assert torch.equal(one, other)


def test_a_finished_stage_is_skipped_and_another_tower_is_a_difference(tuned, parts, aligned, capsys, tmp_path):
    more = ("--version", "v1", "--pretrain_mm_mlp_adapter", aligned / "mm_projector.bin")
    run(parts, tuned, *more)
    assert "is finished already; skipped" in capsys.readouterr().out
    with pytest.raises(UserError, match="projector"):
        run(parts, tuned, "--version", "v1")


def test_stage_2_refuses_what_would_change_the_base_and_takes_what_equals_it(world, tmp_path):
    same = "--mm_vision_select_layer -2 --mm_projector_type mlp2x_gelu --mm_use_im_start_end False"
    world.train("abd", tmp_path / "llava-same", None, *same.split(), "--tune_mm_mlp_adapter", "False", "--max_steps", 1)
    for flags in (
        "--tune_mm_mlp_adapter True", "--mm_projector_lr 1e-3", "--mm_vision_select_layer -1", "--lora_bias all",
        "--pretrain_mm_mlp_adapter x.bin", "--unfreeze_mm_vision_tower True",
        "--mm_projector_type linear", "--mm_tunable_parts mm_mlp_adapter", "--mm_use_im_patch_token True",
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"^{flags.split()[0]}"):
            world.train("abd", tmp_path / "llava-other", None, *flags.split())


def test_stage_2_takes_the_bases_tower_by_its_last_name_and_no_other(capsys):
    words = "--task abd --model_name_or_path base --use_cpu True --vision_tower output/clip-vit-large-patch14-336"
    groups = parse_arguments(words.split())
    check_frozen_base(SimpleNamespace(mm_vision_tower="openai/clip-vit-large-patch14-336"), *groups)
    assert "note" not in capsys.readouterr().out
    with pytest.raises(UserError, match="the base's tower is openai/clip-vit-large-patch14; leave it out"):
        check_frozen_base(SimpleNamespace(mm_vision_tower="openai/clip-vit-large-patch14"), *groups)
    check_frozen_base(SimpleNamespace(mm_vision_tower=""), *groups)
    assert "gives it no name; that one stays" in capsys.readouterr().out


def test_rows_are_grouped_by_modality(parts, tmp_path, monkeypatch):
    kinds = []
    compute = llava_trainer.LLaVATrainer.compute_loss

    def note(self, model, inputs, *args, **kwargs):
        kinds.append(tuple(bool(entry) for entry in inputs["image_features"]))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(llava_trainer.LLaVATrainer, "compute_loss", note)
    more = ("--version", "v1", "--group_by_modality_length", "True", "--max_steps", -1, "--num_train_epochs", 1)
    run(parts, tmp_path / "llava-grouped", *more, "--per_device_train_batch_size", 2)
    assert len(kinds) == 8 and all(len(set(kind)) == 1 for kind in kinds)


# -- decoders, towers and sizes of other kinds -------------------------------------------------------------------------


def test_tied_embeddings_stay_tied(tmp_path):
    parts = write_parts(tmp_path, tie_word_embeddings=True)
    stage = run(parts, tmp_path / "llava-tied", "--version", "v1")
    model = load_pretrained_model(str(stage), None, device="cpu")[1]
    assert model.lm_head.weight is model.get_input_embeddings().weight
    lm = load_base(parts / "vicuna")[0]
    assert not torch.equal(model.lm_head.weight, lm.lm_head.weight)


def test_a_mistral_becomes_a_llava_mistral_with_tiles(tmp_path):
    parts = write_parts(tmp_path, family="mistral")
    flags = "--version mistral_instruct --image_aspect_ratio anyres --mm_patch_merge_type spatial_unpad"
    sizes = ("--image_grid_pinpoints", "[(16, 32), (32, 16)]", "--mm_use_im_patch_token", "True")
    stage = run(parts, tmp_path / "llava-mistral", *flags.split(), *sizes)
    config = json.loads((stage / "config.json").read_text())
    assert config["model_type"] == "llava_mistral" and config["image_grid_pinpoints"] == [[16, 32], [32, 16]]
    tokenizer, model, *_ = load_pretrained_model(str(stage), None, device="cpu")
    assert model.model.image_newline.abs().sum() > 0 and config["mm_use_im_patch_token"]
    assert tokenizer.convert_tokens_to_ids("<im_patch>") == len(model.get_input_embeddings().weight) - 1
    with pytest.raises(UserError, match="Llama and Mistral decoders"):
        values = json.loads((parts / "vicuna" / "config.json").read_text())
        (parts / "vicuna" / "config.json").write_text(
            json.dumps({**values, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
        )
        run(parts, tmp_path / "llava-other", "--version", "v1")


def test_another_tower_takes_the_place_of_a_llavas_own(tuned, parts, tmp_path):
    """Where the whole model is written; a projector or LoRA would come back over the base's tower."""
    other = write_parts(tmp_path, seed=1) / "clip"
    other = other.rename(tmp_path / "other-clip")
    more = ("--model_name_or_path", tuned, "--vision_tower", other, "--version", "v1", "--learning_rate", 0)
    stage = run(parts, tmp_path / "llava-other-eyes", *more)
    state = load_pretrained_model(str(stage), None, device="cpu")[1].state_dict()
    expected = load_file(other / "model.safetensors")
    ours = {name.split("vision_tower.vision_tower.")[-1]: value for name, value in state.items()}
    assert all(torch.equal(ours[name.removeprefix("vision_model.")], value) for name, value in expected.items())
    with pytest.raises(UserError, match="is kept without a tower"):
        run(parts, tmp_path / "llava-lora", *more, "--lora_enable", "True")


def test_another_projector_takes_the_place_of_a_llavas_own(tuned, parts, tmp_path, capsys):
    more = ("--model_name_or_path", tuned, "--version", "v1", "--mm_projector_type", "linear")
    stage = run(parts, tmp_path / "llava-linear", *more, "--mm_vision_select_layer", "-1")
    assert "a new projector of type linear takes the place of mlp2x_gelu" in capsys.readouterr().out
    model = load_pretrained_model(str(stage), None, device="cpu")[1]
    names = [name for name in model.state_dict() if "mm_projector" in name]
    assert names == ["model.mm_projector.weight", "model.mm_projector.bias"]
    assert model.config.mm_vision_select_layer == model.get_vision_tower().select_layer == -1


def test_another_kind_of_tower_trains_as_far_as_it_is_looked_at(parts, tmp_path):
    """SigLIP: no class token, and a pooling head that no feature depends on."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    SiglipVisionModel(SiglipVisionConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(tmp_path / "siglip")
    size = {"height": 16, "width": 16}
    SiglipImageProcessorPil(size=size).save_pretrained(tmp_path / "siglip")
    more = ("--version", "v1", "--vision_tower", tmp_path / "siglip", "--mm_tunable_parts", "mm_vision_tower")
    stages = [run(parts, tmp_path / f"llava-{rate}", *more, "--learning_rate", rate) for rate in (0, 1e-3)]
    before, after = (load_pretrained_model(str(stage), None, device="cpu")[1].state_dict() for stage in stages)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert all("vision_tower" in name for name in moved)
    changed = {name.split("vision_tower.vision_tower.")[-1].removeprefix("vision_model.") for name in moved}
    assert any("layers.0." in name for name in changed) and "embeddings.patch_embedding.weight" in changed
    assert not [name for name in changed if "layers.1." in name or "head" in name or "layernorm" in name.split(".")[0]]


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_train_beside_a_lora_are_kept_with_the_projector(tmp_path, bias):
    parts = write_parts(tmp_path, attention_bias=True)
    more = ("--version", "v1", "--lora_enable", "True", "--lora_r", 2, "--lora_bias", bias)
    stage = run(parts, tmp_path / "llava-bias", *more)
    extra = {name.removeprefix("base_model.model.") for name in load_bin(stage / "non_lora_trainables.bin")}
    names = {f"model.layers.{n}.self_attn.{part}_proj.bias" for n in (0, 1) for part in "qkvo"}
    assert names == {name for name in extra if "mm_projector" not in name}
    model, *_ = question(stage)
    assert model.state_dict()["model.layers.0.self_attn.q_proj.bias"].abs().sum() > 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "flags", ["--version v1 --lora_enable True --lora_r 2", "--version plain --tune_mm_mlp_adapter True"]
)
def test_a_quantised_language_model_serves_both_stages(tmp_path, bits, flags):
    parts = write_parts(tmp_path, hidden_size=64, intermediate_size=64)
    data = "align.json" if "plain" in flags else "instruct.json"
    stage = run(parts, tmp_path / "llava-bits", *flags.split(), "--bits", bits, "--max_steps", 1, data=data)
    extra = load_bin(stage / ("mm_projector.bin" if "plain" in flags else "non_lora_trainables.bin"))
    assert {value.dtype for value in extra.values()} == {torch.float32}
    _, model, *_ = load_pretrained_model(str(stage), str(parts / "vicuna"), device="cpu")
    assert torch.equal(model.model.mm_projector[0].weight, next(v for k, v in extra.items() if "0.weight" in k))
    assert "quantization_config" not in json.loads((stage / "config.json").read_text())
