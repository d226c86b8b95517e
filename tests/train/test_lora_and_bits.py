"""A LoRA beside the slots, a validation loss, and 4-bit and 8-bit bases: train a step, save, load, answer."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_llava import write_base
from tiny_world import LORA, TASKS, World, fit, merge, same_slots, write_sequence

from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.slots.pool import Pool
from llava.train.arguments import TrainingArguments
from llava.train.lora import base_options, decoder_linears
from llava.utils import UserError

QUESTION = "is there a lesion"


def load(folder, base=None, **options):
    return load_pretrained_model(str(folder), base and str(base), device="cpu", **options)


@torch.inference_mode()
def logits(loaded, routed=True):
    tokenizer, model, *_ = loaded
    ids = tokenizer_image_token(f"USER: <image>\n{QUESTION} ASSISTANT:", tokenizer, return_tensors="pt")[None]
    picture = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    query = model.retriever.encode_questions([QUESTION]) if routed else None
    return model(input_ids=ids, images=picture, text_query=query).logits


# -- LoRA --------------------------------------------------------------------------------------------------------------


def test_lora_trains_beside_the_slots_and_comes_back_merged(world, tmp_path, capsys):
    stage = tmp_path / "llava-tiny_abd"
    slots = world.train("abd", stage, None, *LORA)
    assert "shared by all tasks" in capsys.readouterr().out
    assert slots.task("abd").trained and any(value.abs().sum() > 0 for value in slots.task("abd").A.values())
    weights = load_file(stage / "adapter_model.safetensors")
    assert any(value.abs().sum() > 0 for key, value in weights.items() if "lora_B" in key)
    assert not [key for key in weights if "vision_tower" in key or "projector" in key or "lm_head" in key]
    loaded = load(stage, world.base)
    assert not [name for name, _ in loaded[1].named_parameters() if "lora" in name]
    base = load(world.base)[1].state_dict()
    assert not torch.equal(
        loaded[1].state_dict()["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"]
    )
    assert torch.equal(loaded[1].state_dict()["model.mm_projector.0.weight"], base["model.mm_projector.0.weight"])


def test_the_lora_goes_on_with_the_next_task_and_earlier_slots_stay(world, tmp_path):
    first = world.train("abd", tmp_path / "llava-one", None, *LORA)
    with pytest.raises(UserError, match="add --lora_enable True"):
        world.train("chest", tmp_path / "llava-two", tmp_path / "llava-one")
    second = world.train("chest", tmp_path / "llava-two", tmp_path / "llava-one", *LORA)
    assert same_slots(first.task("abd"), second.task("abd"))
    one, two = (load_file(tmp_path / f"llava-{name}" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and any(not torch.equal(one[key], two[key]) for key in one)
    assert json.loads((tmp_path / "llava-two" / "training.json").read_text())["lora_r"] == 2


def test_offsets_act_alike_beside_lora_layers_and_over_merged_weights(world, tmp_path):
    """PEFT wraps the projection the offsets act on; nothing of theirs may get lost."""
    from llava.model.adapters import apply_adapter
    from llava.model.builder import attach_slots

    stage = tmp_path / "llava-tiny_abd"
    slots = world.train("abd", stage, None, *LORA)
    merged = load(stage, world.base)
    tokenizer, before, *_ = load(world.base)
    attach_slots(before, slots, world.base)  # the order of training: slots, then LoRA
    before = apply_adapter(before, stage, merge=False).eval()
    tokenizer, after, *_ = load(world.base)
    after = apply_adapter(after, stage, merge=False)  # the order of loading a quantised base
    attach_slots(after, slots, world.base)
    expected = logits(merged)
    for model in (before, after.eval()):
        assert torch.allclose(logits((tokenizer, model)), expected, atol=1e-3)
    without = load(world.base)
    assert not torch.allclose(logits(without, routed=False), expected, atol=1e-2)


def test_only_the_decoders_layers_get_a_lora(world):
    import re

    _, model, *_ = load(world.base)
    pattern = decoder_linears(model)
    chosen = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    assert len(chosen) == 7 * model.config.num_hidden_layers


def test_flags_that_do_not_go_together(tmp_path):
    def options(**more):
        return base_options(TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **more), torch.float32)

    assert options() == {"dtype": torch.float32}
    with pytest.raises(UserError, match="choose 4, 8 or 16"):
        options(bits=3)
    with pytest.raises(UserError, match="--save_full_model"):
        options(bits=4, save_full_model=True)


# -- validation loss ---------------------------------------------------------------------------------------------------


def test_a_validation_loss_is_logged_and_changes_nothing(world, tmp_path):
    rows = ("--eval_data_path", world.folder / "train_abd.jsonl")
    watched = world.train("abd", tmp_path / "llava-watched", None, *rows, "--eval_strategy", "steps", "--eval_steps", 1)
    plain = world.train("abd", tmp_path / "llava-plain")
    assert same_slots(watched.task("abd"), plain.task("abd"))
    log = json.loads((tmp_path / "llava-watched" / "log_history.json").read_text())
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]
    with pytest.raises(UserError, match="add --eval_data_path"):
        world.train("abd", tmp_path / "llava-other", None, "--eval_strategy", "steps", "--eval_steps", 1)


# -- 4 and 8 bits ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A world on a base that is wide enough for bitsandbytes' blocks of 64 on a CPU, and a stage trained on it."""
    folder = tmp_path_factory.mktemp("bits")
    base, sequence = write_base(folder / "tiny-llava-base", hidden=64), write_sequence(folder, TASKS[:2])
    for task in TASKS[:2]:
        fit(folder, base, sequence, task)
    world = World(folder, base, sequence, merge(folder, sequence))
    world.train("abd", folder / "llava-full")
    return world


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA or ROCm knows")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_answers_on_a_gpu(wide, bits):
    stage, quantised = str(wide.folder / "llava-full"), {"load_4bit": bits == 4, "load_8bit": bits == 8}
    tokenizer, model, *_ = load_pretrained_model(stage, str(wide.base), device="cuda", **quantised)
    ids = tokenizer_image_token(f"USER: <image>\n{QUESTION} ASSISTANT:", tokenizer, return_tensors="pt")[None]
    picture = torch.zeros(1, 3, 16, 16)
    more = {"questions": [QUESTION], "max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    output = model.generate(ids.cuda(), images=picture.cuda(), **more)
    assert output.shape[1] <= 2 and model.last_route is not None


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_keeps_slots_projector_and_tower(wide, bits):
    base, stage = wide.base, wide.folder / "llava-full"
    loaded = load(stage, base, load_4bit=bits == 4, load_8bit=bits == 8)
    _, model, image_processor, _ = loaded
    kinds = {
        name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    decoder = {kind for name, kind in kinds.items() if ".layers." in name and "vision" not in name}
    assert decoder == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    assert {kind for name, kind in kinds.items() if "vision" in name or "projector" in name or name == "lm_head"} == {
        "Linear"
    }
    assert {value.dtype for value in model.retriever.parameters()} == {torch.float32}
    assert model.get_vision_tower().dtype == torch.float32 and image_processor is not None
    full = logits(load(stage, base))
    near = torch.nn.functional.cosine_similarity(logits(loaded).flatten(), full.flatten(), dim=0)
    assert near > 0.8  # random weights magnify rounding


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_of_a_quantised_base_reach_the_trained_slots_alone(wide, bits):
    tokenizer, model, *_ = load(wide.folder / "llava-full", wide.base, load_4bit=bits == 4, load_8bit=bits == 8)
    model.train()
    parameters = model.requires_grad_(False).retriever.train_only("abd")
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    ids = tokenizer_image_token(f"USER: <image>\n{QUESTION} ASSISTANT: yes", tokenizer, return_tensors="pt")[None]
    query = model.retriever.encode_questions([QUESTION])
    picture, labels = torch.zeros(1, 3, 16, 16), ids.masked_fill(ids < 3, -100)
    model(input_ids=ids, labels=labels, images=picture, text_query=query).loss.backward()
    torch.optim.SGD(parameters, lr=0.1).step()
    after = model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and all(name.startswith("retriever.") and "abd" in name for name in changed)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_step_on_a_quantised_base_changes_slots_only(wide, tmp_path, bits):
    world = wide
    stage = tmp_path / "llava-tiny_abd"
    trained = world.train("abd", stage, None, "--bits", bits, "--max_steps", 1).task("abd")
    fresh = Pool.read(world.keys).task("abd")
    assert any(not torch.equal(trained.A[target], fresh.A[target]) for target in trained.A)
    assert "quantization_config" not in json.loads((stage / "config.json").read_text())
    assert not (stage / "adapter_config.json").exists() and not list(stage.glob("model*.safetensors"))
    tokenizer, model, *_ = load(stage, world.base, load_4bit=bits == 4, load_8bit=bits == 8)
    ids = tokenizer_image_token(f"USER: <image>\n{QUESTION} ASSISTANT:", tokenizer, return_tensors="pt")[None]
    picture = torch.zeros(1, 3, 16, 16)
    output = model.generate(
        ids, images=picture, questions=[QUESTION], max_new_tokens=2, do_sample=False, pad_token_id=0
    )
    assert output.shape[1] <= 2 and model.last_route.describe(0)["task"] == TASKS[0]


def test_lora_stays_beside_a_quantised_base(wide, tmp_path, capsys):
    world = wide
    stage = tmp_path / "llava-tiny_abd"
    world.train("abd", stage, None, *LORA, "--bits", 4, "--max_steps", 1)
    _, model, *_ = load(stage, world.base, load_4bit=True)
    assert [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert "LoRA kept beside the base" in capsys.readouterr().out
    assert torch.isfinite(logits((load(world.base)[0], model))).all()
