"""A task as a LoRA for PEFT, in both layouts: logits equal the routed stage's, alone and among several adapters."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hf_llava import hf_ids
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftModel
from safetensors import safe_open
from tiny_llava import FAMILIES, HIDDEN, LAYERS, write_base, write_stage
from tiny_world import run_main
from transformers import LlavaForConditionalGeneration

from llava.continual import slots as slots_command
from llava.model.builder import load_pretrained_model
from llava.model.convert import convert
from llava.slots.edit import read_place
from llava.slots.peft_export import export_peft, fixed_mixture
from llava.slots.pool import Pool
from llava.slots.settings import RetrieverSettings
from llava.utils import UserError

TASKS = ("abd", "chest")


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def made(request, tmp_path_factory):
    """A base in both layouts, a stage, and what its tasks answer when they are given."""
    folder = tmp_path_factory.mktemp("export")
    base = write_base(folder / "base", family=request.param)
    stage = write_stage(folder / "llava-stage", base)
    convert(base, folder / "base-hf", "to_hf")
    slots = read_place(stage)
    model = load_pretrained_model(str(stage), None, device="cpu")[1]
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 3] = -200
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    wanted = {}
    for task in TASKS:
        mixture, start = fixed_mixture(slots, slots.task(task)), slots.slot_range(task).start
        indices = torch.tensor([[start + slot for slot in mixture]] * 2)
        weights = torch.tensor([list(mixture.values())] * 2)
        with torch.no_grad():
            wanted[task] = model(ids, images=pixels, slot_indices=indices, slot_weights=weights).logits
    return {"folder": folder, "slots": slots, "ids": ids, "pixels": pixels, "wanted": wanted}


def export(made, task, layout):
    target = made["folder"] / f"{task}-{layout}"
    base = made["folder"] / ("base-hf" if layout == "hf" else "base")
    export_peft(made["slots"], task, target, layout=layout, base=str(base))
    return target


def hf_model(made):
    return LlavaForConditionalGeneration.from_pretrained(made["folder"] / "base-hf").eval()


@torch.no_grad()
def hf_logits(made, model):
    token = model.config.image_token_index
    ids = torch.tensor([hf_ids(row, token) for row in made["ids"].tolist()])
    logits = model(input_ids=ids, pixel_values=made["pixels"]).logits
    return logits[..., : made["wanted"]["abd"].shape[-1]]  # without the added <image> row


def test_the_hf_layout_fits_transformers_own_class(made):
    plain = hf_logits(made, hf_model(made))
    for task in TASKS:
        adapted = PeftModel.from_pretrained(hf_model(made), export(made, task, "hf")).eval()
        found = hf_logits(made, adapted)
        assert (found - made["wanted"][task]).abs().max() <= 1e-4
        assert (plain - made["wanted"][task]).abs().max() > 1e-2


def test_several_tasks_are_adapters_of_one_model(made):
    model = PeftModel.from_pretrained(hf_model(made), export(made, "abd", "hf"), adapter_name="abd").eval()
    model.load_adapter(str(export(made, "chest", "hf")), adapter_name="chest")
    for task in ("chest", "abd", "chest"):
        model.set_adapter(task)
        assert (hf_logits(made, model) - made["wanted"][task]).abs().max() <= 1e-4
    with model.disable_adapter():
        assert (hf_logits(made, model) - hf_logits(made, hf_model(made))).abs().max() == 0


def test_transformers_loads_it_without_peft_in_the_program(made):
    model = hf_model(made)
    model.load_adapter(str(export(made, "abd", "hf")), adapter_name="abd")
    assert (hf_logits(made, model) - made["wanted"]["abd"]).abs().max() <= 1e-4


def test_peft_finds_base_and_class_of_both_layouts_by_itself(made):
    model = AutoPeftModel.from_pretrained(export(made, "abd", "hf")).eval()
    assert isinstance(model.get_base_model(), LlavaForConditionalGeneration)
    assert (hf_logits(made, model) - made["wanted"]["abd"]).abs().max() <= 1e-4
    model = AutoPeftModelForCausalLM.from_pretrained(export(made, "abd", "llava")).eval()
    with torch.no_grad():
        found = model(input_ids=made["ids"], images=made["pixels"]).logits
    assert (found - made["wanted"]["abd"]).abs().max() <= 1e-4


@pytest.mark.parametrize("base", ["base", "base-hf"])
@pytest.mark.parametrize("layout", ["llava", "hf"])
def test_this_packages_loader_reads_both_layouts_over_both_bases(made, layout, base):
    model = load_pretrained_model(str(export(made, "abd", layout)), str(made["folder"] / base), device="cpu")[1]
    with torch.no_grad():
        found = model(input_ids=made["ids"], images=made["pixels"]).logits
    assert (found[..., : made["wanted"]["abd"].shape[-1]] - made["wanted"]["abd"]).abs().max() <= 1e-4


def test_the_hf_layout_is_what_serving_engines_read(made):
    """vLLM and SGLang: last names in a list, one rank, no pattern per layer, the decoder's tensors alone."""
    folder = export(made, "abd", "hf")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["o_proj"] and config["r"] == config["lora_alpha"] == 4
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    assert config["modules_to_save"] is None and config["bias"] == "none" and not config["use_dora"]
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        names = set(tensors.keys())
    place = "base_model.model.model.language_model.layers.{}.self_attn.o_proj.lora_{}.weight"
    assert names == {place.format(layer, side) for layer in range(LAYERS) for side in "AB"}
    assert not (folder / "added_tokens.json").exists()


def test_projections_that_the_vision_tower_has_too_are_the_decoders_alone(made, tmp_path):
    slots = read_place(made["folder"] / "llava-stage")
    slots.settings.features = {"q_proj": (HIDDEN, HIDDEN)}
    for task in slots.tasks:
        for offsets in (task.A, task.B):
            offsets["q_proj"] = offsets.pop("o_proj")
    export_peft(slots, "abd", tmp_path, layout="hf")
    adapted = PeftModel.from_pretrained(hf_model(made), tmp_path)
    names = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert len(names) == 2 * LAYERS and all("language_model" in name for name in names)


def test_projections_are_named_in_one_order(made, tmp_path):
    """PEFT writes a set in the order of chance: two exports of one task had different files."""
    slots, names = read_place(made["folder"] / "llava-stage"), ["k_proj", "o_proj", "q_proj", "v_proj"]
    slots.settings.features = dict.fromkeys(reversed(names), (HIDDEN, HIDDEN))
    for task in slots.tasks:
        for offsets in (task.A, task.B):
            offsets.update(dict.fromkeys(names, offsets["o_proj"]))
    export_peft(slots, "abd", tmp_path, layout="hf")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_command_writes_it_and_names_the_converted_base(made, tmp_path):
    words = ["export-peft", made["folder"] / "llava-stage", "abd", "--output", tmp_path / "abd", "--layout", "hf"]
    run_main(slots_command.main, *words, "--model-base", "llava-hf/llava-1.5-7b-hf")
    written = safetensors_bytes(tmp_path / "abd"), safetensors_bytes(export(made, "abd", "hf"))
    assert written[0] == written[1]
    config = json.loads((tmp_path / "abd" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "llava-hf/llava-1.5-7b-hf"


def safetensors_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_stage_with_a_lora_beside_its_slots_is_not_exported_without_it(made, tmp_path):
    stage = shutil.copytree(made["folder"] / "llava-stage", tmp_path / "llava-lora")
    (stage / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="has a LoRA beside its slots"):
        run_main(slots_command.main, "export-peft", stage, "abd", "--output", tmp_path / "abd")
    assert not (tmp_path / "abd").exists()


def test_offsets_that_act_behind_the_picture_alone_are_no_lora(tmp_path):
    settings = RetrieverSettings(num_layers=1, features={"o_proj": (8, 8)}, offset_scope="question")
    with pytest.raises(UserError, match="--offset_scope all"):
        export_peft(Pool(settings), "abd", tmp_path / "abd")


@pytest.mark.parametrize("name", ["llava-stage", "base"])
def test_an_adapter_is_not_put_into_a_models_folder(made, tmp_path, name):
    target = shutil.copytree(made["folder"] / name, tmp_path / name)
    before = sorted(target.iterdir())
    with pytest.raises(UserError, match="is a model's folder"):
        run_main(slots_command.main, "export-peft", made["folder"] / "llava-stage", "abd", "--output", target)
    assert sorted(target.iterdir()) == before


def test_a_base_that_the_layout_does_not_fit_is_told(made, tmp_path, capsys):
    export_peft(made["slots"], "abd", tmp_path / "abd", layout="hf")
    assert "is not in Hugging Face's layout" in capsys.readouterr().out
    export(made, "abd", "hf")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_are_finite(made, weight):
    slots = made["slots"]
    with pytest.raises(UserError, match="finite"):
        fixed_mixture(slots, slots.task("abd"), [weight, 1, 0, 0])


def test_an_unknown_layout_is_refused(made, tmp_path):
    with pytest.raises(UserError, match="choose llava or hf"):
        export_peft(made["slots"], "abd", tmp_path / "x", layout="flat")
    assert not (tmp_path / "x").exists()
