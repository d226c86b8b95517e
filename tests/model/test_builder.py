"""Loading stage checkpoints: the right base, the right dimensions, or a line that says what differs."""

import json
import shutil

import pytest
import torch
from tiny_llava import FAMILIES, LAYERS, write_base, write_stage
from tiny_world import same

from llava.model.builder import load_pretrained_model
from llava.slots.pool import Pool
from llava.utils import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("builder")
    write_base(folder / "tiny-llava-base")
    write_base(folder / "tiny-llava-other", seed=9)
    write_stage(folder / "llava-stage", folder / "tiny-llava-base")
    return folder


def load(path, base=None):
    return load_pretrained_model(str(path), None if base is None else str(base), device="cpu")


def altered_stage(place, target, change):
    """A copy of the stage with changed slots."""
    shutil.copytree(place / "llava-stage", target)
    slots = Pool.read(target / "slots.pth")
    change(slots)
    slots.write(target / "slots.pth")
    return target


def answer(loaded):
    _, model, _, _ = loaded
    torch.manual_seed(0)
    ids, pictures = torch.tensor([[1, 9, -200, 12, 20]]), torch.randn(1, 3, 16, 16)
    more = {"questions": ["is there a lesion?"], "max_new_tokens": 5, "pad_token_id": 0}
    return model.generate(ids, images=pictures, output_logits=True, return_dict_in_generate=True, **more).logits


def test_a_stage_finds_its_base_by_itself_and_by_flag(place, capsys):
    loaded = load(place / "llava-stage")
    tokenizer, model, processor, context = loaded
    assert model.retriever.pool.names == ["abd", "chest"] and model.retriever.active
    assert not model.training and not any(parameter.requires_grad for parameter in model.retriever.parameters())
    assert processor.crop_size["height"] == 16 and context == 2048 and tokenizer.eos_token == "</s>"
    assert "over base" in capsys.readouterr().out
    assert same(answer(loaded), answer(load(place / "llava-stage", place / "tiny-llava-base")))


def test_the_content_decides_and_not_the_folders_name(place, tmp_path):
    shutil.copytree(place / "llava-stage", tmp_path / "stage7")
    shutil.copytree(place / "tiny-llava-base", tmp_path / "mine")
    assert same(answer(load(tmp_path / "stage7", tmp_path / "mine")), answer(load(place / "llava-stage")))


def test_another_base_is_refused_with_both_fingerprints(place):
    with pytest.raises(
        UserError,
        match=r"on base .*tiny-llava-base, and .*other is another: its fingerprint is [0-9a-f]{16}, not [0-9a-f]{16}",
    ):
        load(place / "llava-stage", place / "tiny-llava-other")


def test_a_base_that_is_gone_or_no_checkpoint(place, tmp_path):
    def forget(slots):
        slots.base = {"path": str(tmp_path / "gone"), "fingerprint": slots.base["fingerprint"]}

    stage = altered_stage(place, tmp_path / "llava-a", forget)
    with pytest.raises(UserError, match="llava-a names .*gone as its base model, which is not there; give its place"):
        load(stage)
    assert load(stage, place / "tiny-llava-base")[1].retriever.active
    nameless = altered_stage(place, tmp_path / "llava-b", lambda slots: slots.base.clear())
    with pytest.raises(UserError, match="holds only slots; give the base model they were trained on as --model-base"):
        load(nameless)
    with pytest.raises(UserError, match="checkpoint folder not found"):
        load(tmp_path / "absent")
    (tmp_path / "llava-empty").mkdir()
    with pytest.raises(UserError, match="llava-empty"):
        load(tmp_path / "llava-empty")


def test_a_base_named_from_where_training_was_started_is_found_from_anywhere(place, tmp_path, monkeypatch):
    """Evaluation suites run in folders of their own and give no base."""

    def relative(slots):
        slots.base = {"path": "output/base", "fingerprint": slots.base["fingerprint"]}

    stage = altered_stage(place, tmp_path / "work" / "output" / "llava-a", relative)
    shutil.copytree(place / "tiny-llava-base", tmp_path / "work" / "output" / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert same(answer(load(stage)), answer(load(place / "llava-stage")))
    with pytest.raises(UserError, match="llava-b names output/base as its base model, which is not there"):
        load(altered_stage(place, tmp_path / "llava-b", relative))


def test_slots_for_another_number_of_layers(place, tmp_path):
    def deeper(slots):
        slots.settings.num_layers = LAYERS + 3
        slots.base.pop("fingerprint")

    with pytest.raises(UserError, match="the slots are for 5 layers, the base model has 2"):
        load(altered_stage(place, tmp_path / "llava-deep", deeper), place / "tiny-llava-base")


def test_slots_for_another_width(place, tmp_path):
    def narrower(slots):
        slots.base.pop("fingerprint")
        slots.settings.features["o_proj"] = (16, 16)
        for task in slots.tasks:
            narrow = {kind: {"o_proj": getattr(task, kind)["o_proj"][..., :16]} for kind in ("A", "B")}
            slots.remove(task.name)
            slots.add(task.copy(**narrow))

    with pytest.raises(UserError, match=r"slots are for o_proj of 16 -> 16 features, the base model has 32 -> 32"):
        load(altered_stage(place, tmp_path / "llava-narrow", narrower), place / "tiny-llava-base")


def test_keys_of_another_text_encoder(place, tmp_path):
    def foreign(slots):
        slots.settings.encoder = {**slots.settings.encoder, "fingerprint": "0" * 16}

    with pytest.raises(
        UserError, match="fitted with text encoder 'base' .0000000000000000, 32 dimensions.*, here it is"
    ):
        load(altered_stage(place, tmp_path / "llava-foreign", foreign), place / "tiny-llava-base")


@pytest.mark.parametrize("keep", [0, 0.4])
def test_a_truncated_slot_file_is_named(place, tmp_path, keep):
    stage = tmp_path / "llava-cut"
    shutil.copytree(place / "llava-stage", stage)
    data = (stage / "slots.pth").read_bytes()
    (stage / "slots.pth").write_bytes(data[: int(keep * len(data))])
    with pytest.raises(UserError, match="llava-cut/slots.pth: cannot be read as a slot file"):
        load(stage)


def test_a_base_whose_weights_are_cut_or_gone(place, tmp_path):
    base = tmp_path / "tiny-llava-base"
    shutil.copytree(place / "tiny-llava-base", base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match="tiny-llava-base"):
        load(base)
    weights.unlink()
    with pytest.raises(UserError, match="tiny-llava-base"):
        load(base)


def test_a_self_contained_stage_needs_no_base(world, place, tmp_path):
    light, whole = tmp_path / "llava-light", tmp_path / "llava-whole"
    world.train("abd", light)
    world.train("abd", whole, None, "--save_full_model", "True")
    slots = Pool.read(whole / "slots.pth")
    config = json.loads((whole / "config.json").read_text())
    assert "retriever" in config and config["vision_config"]["hidden_size"] == 16
    slots.base["path"] = "nowhere"
    slots.write(whole / "slots.pth")
    assert same(answer(load(whole)), answer(load(light)))


def test_4bit_and_8bit_at_once_is_refused(place):
    with pytest.raises(UserError, match="choose one of"):
        load_pretrained_model(str(place / "tiny-llava-base"), None, load_4bit=True, load_8bit=True, device="cpu")


# -- LLaVA-NeXT's and evaluation suites' keyword arguments -------------------------------------------------------------


@pytest.fixture(scope="module", params=[(family, kind) for family in sorted(FAMILIES) for kind in ("base", "stage")])
def model_path(request, tmp_path_factory):
    """A base, or a stage over one, of each family."""
    family, kind = request.param
    folder = tmp_path_factory.mktemp("next")
    base = write_base(folder / "tiny-llava-base", family=family)
    return str(base if kind == "base" else write_stage(folder / "llava-stage", base))


@pytest.mark.parametrize("dtype", ["float16", torch.float16, "torch.bfloat16", "auto", None])
def test_the_asked_dtype_is_the_weights(model_path, dtype):
    names = {"float16": torch.float16, "torch.bfloat16": torch.bfloat16, "auto": torch.float32, None: torch.float32}
    expected = names.get(dtype, dtype)
    more = {"multimodal": True, "attn_implementation": "sdpa", "use_flash_attention_2": False}
    _, model, _, _ = load_pretrained_model(model_path, None, "llava-x", device="cpu", torch_dtype=dtype, **more)
    parts = (model.lm_head, model.get_model().mm_projector[0], model.get_model().layers[0].mlp.up_proj)
    assert all(part.weight.dtype == expected for part in parts) and model.get_vision_tower().dtype == expected
    assert answer((None, model, None, None))[0].dtype in (expected, torch.float32)
    if dtype is not None:
        _, again, _, _ = load_pretrained_model(model_path, None, device="cpu", dtype=dtype)
        assert again.dtype == model.dtype


def test_an_unknown_dtype_is_named(model_path):
    with pytest.raises(UserError, match=r"torch_dtype 'float12' is not known; choose from auto, float16"):
        load_pretrained_model(model_path, None, device="cpu", torch_dtype="float12")


def test_the_overwritten_config_holds(model_path):
    changes = {"image_aspect_ratio": "square", "tokenizer_model_max_length": 77, "mm_spatial_pool_stride": 2}
    tokenizer, model, processor, _ = load_pretrained_model(model_path, None, device="cpu", overwrite_config=changes)
    config = model.config
    assert {name: getattr(config, name) for name in changes} == changes
    if model.retriever is not None:
        assert config.prompt["aspect_ratio"] == "square"
    untouched = load_pretrained_model(model_path, None, device="cpu")[1].config
    assert untouched.image_aspect_ratio == "pad" and not hasattr(untouched, "mm_spatial_pool_stride")


def test_what_from_pretrained_takes_goes_there(model_path, tmp_path):
    more = {"low_cpu_mem_usage": True, "cache_dir": str(tmp_path)}
    assert load_pretrained_model(model_path, None, device="cpu", **more)[1].dtype == torch.float32
    with pytest.raises(TypeError, match="no_such_argument"):
        load_pretrained_model(model_path, None, device="cpu", no_such_argument=1)
