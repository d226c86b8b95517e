"""transformers and PEFT: auto classes, the text pipeline, chat templates, adapters put on a base and on a stage."""

from __future__ import annotations

import json

import pytest
import torch
from clients.room import NEW, ROWS, STAGE_TASKS, TEXT_ONLY, half, one_row, open_prompt, slots_of, with_mark
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tiny_world import run_main
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

import llava  # noqa: F401 -- programs import it so that the auto classes know LLaVA
from llava.continual import slots as slots_command
from llava.mm_utils import process_images
from llava.slots.peft_export import fixed_mixture
from llava.slots.pool import Pool

PROMPTED = ROWS[1]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": r".*layers.*\.(q_proj|o_proj)", "task_type": "CAUSAL_LM"}


def answer(side, model, tokenizer, image_processor, row=PROMPTED, ids_by_name=False):
    """The row's answer, asked as LLaVA's programs ask."""
    prompt = open_prompt(side.template, with_mark(model.config, row["text"]))
    pictures = half(process_images(side.opened(row["image"]), image_processor, model.config), model)
    ids = one_row(prompt, tokenizer, model)
    more = {"images": pictures, "do_sample": False, "max_new_tokens": NEW}
    output = model.generate(input_ids=ids, **more) if ids_by_name else model.generate(ids, **more)
    return tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip()


# -- auto classes ------------------------------------------------------------------------------------------------------


def test_auto_classes(side, tmp_path):
    """The config and the model by the folder alone; a stage saved whole is the stage, not its base."""
    folder = side.path
    if side.is_stage:
        side.load()[1].save_pretrained(tmp_path)
        side.loaded[0].save_pretrained(tmp_path)
        folder = tmp_path
    assert AutoConfig.from_pretrained(folder).model_type == f"llava_{side.family}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = [answer(side, model, tokenizer, side.loaded[2], row) for row in ROWS]
    assert found == side.texts(ROWS)


def test_auto_class_on_a_light_stage(stage):
    """Slots alone are no model to transformers; what it says names the folder, and nothing answers as the base."""
    try:
        model = AutoModelForCausalLM.from_pretrained(stage.path).eval()
    except (OSError, ValueError) as error:
        assert str(stage.path) in str(error)
    else:
        tokenizer, _, image_processor, _ = stage.loaded
        assert [answer(stage, model, tokenizer, image_processor, row) for row in ROWS] == stage.texts(ROWS)


@pytest.mark.parametrize("batched", [False, True])
def test_pipeline(side, batched):
    """``text-generation`` on rendered prompts without a picture: the text behind the prompt is the answer."""
    tokenizer, model, _, _ = side.load()
    questions = [TEXT_ONLY, "where is the lesion"] if batched else [TEXT_ONLY]
    prompts = [open_prompt(side.template, text) for text in questions]
    ask = pipeline("text-generation", model=model, tokenizer=tokenizer)
    told = ask(prompts, max_new_tokens=NEW, do_sample=False, return_full_text=False, batch_size=len(prompts))
    expected = [side.ask([("human", text)], []).text for text in questions]
    assert [one[0]["generated_text"].strip() for one in told] == expected
    whole = ask(prompts[0], max_new_tokens=NEW, do_sample=False)
    assert whole[0]["generated_text"].removeprefix(prompts[0]).strip() == expected[0]


def test_chat_template(side, tmp_path):
    """``apply_chat_template`` of a converted base gives the evaluation's prompt, token for token."""
    from llava.checkpoints.weights import resolve_checkpoint
    from llava.model.convert import convert

    base = side.path if side.base is None else side.base
    convert(resolve_checkpoint(str(base)), tmp_path / "hf", "to_hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    content = [{"type": "image"}, {"type": "text", "text": PROMPTED["text"]}]
    turns = [{"role": "user", "content": content}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    expected = one_row(open_prompt(side.template, f"<image>\n{PROMPTED['text']}"), side.loaded[0], side.loaded[1])[0]
    image = tokenizer.convert_tokens_to_ids("<image>")
    found = ids["input_ids"] if hasattr(ids, "keys") else ids
    assert [-200 if token == image else token for token in found] == expected.tolist(), rendered


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(stage, tmp_path_factory):
    """Each task of the stage as an adapter for PEFT."""
    folder = tmp_path_factory.mktemp("peft")
    for task in STAGE_TASKS:
        run_main(slots_command.main, "export-peft", stage.path, task, "--output", folder / task)
    return folder


def mixture(stage, task):
    """The export's fixed route as ``forward`` takes it."""
    pool = Pool.read(stage.path / "slots.pth")
    slots = pool.task(task)
    found = fixed_mixture(pool, slots)
    return {
        "slot_indices": torch.tensor([[slots.start + slot for slot in found]]),
        "slot_weights": torch.tensor([list(found.values())]),
    }


def inputs(side, loaded, row=PROMPTED):
    tokenizer, model, image_processor, _ = loaded
    prompt = open_prompt(side.template, with_mark(model.config, row["text"]))
    pictures = process_images(side.opened(row["image"]), image_processor, model.config)
    return {"input_ids": one_row(prompt, tokenizer, model), "images": pictures}


def test_auto_peft(stage, exported):
    """An exported task loads by itself; the base that it names is found."""
    for task in STAGE_TASKS:
        model = AutoPeftModelForCausalLM.from_pretrained(exported / task).eval()
        with torch.inference_mode():
            found = model(**inputs(stage, stage.loaded)).logits
            expected = stage.loaded[1](**inputs(stage, stage.loaded), **mixture(stage, task)).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_several_adapters(stage, sides, exported):
    """Loaded side by side on one base, switched, switched off."""
    loaded = sides[stage.family, "base"].load()
    asked = inputs(stage, loaded)
    with torch.inference_mode():
        plain = loaded[1](**asked).logits
        model = PeftModel.from_pretrained(loaded[1], exported / STAGE_TASKS[0], adapter_name=STAGE_TASKS[0]).eval()
        for task in STAGE_TASKS[1:]:
            model.load_adapter(exported / task, adapter_name=task)
        for task in STAGE_TASKS:
            model.set_adapter(task)
            expected = stage.loaded[1](**asked, **mixture(stage, task)).logits
            torch.testing.assert_close(model(**asked).logits, expected, rtol=1e-3, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(**asked).logits, plain)


@pytest.mark.parametrize("ids_by_name", [False, True])
def test_a_new_lora(side, tmp_path, ids_by_name):
    """``get_peft_model`` and a step: untrained it changes nothing, trained it can be switched off, saved and loaded."""
    tokenizer, model, image_processor, _ = side.load()
    (expected,) = side.texts([PROMPTED])
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(**LORA))
    assert answer(side, wrapped, tokenizer, image_processor, ids_by_name=ids_by_name) == expected
    asked = inputs(side, (tokenizer, model, image_processor, None))
    labels = asked["input_ids"].clone()
    labels[:, :-4] = -100
    wrapped.train()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = wrapped(**asked, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    wrapped.eval()
    with wrapped.disable_adapter():
        assert answer(side, wrapped, tokenizer, image_processor, ids_by_name=ids_by_name) == expected
    wrapped.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == LORA["target_modules"]
    again = PeftModel.from_pretrained(side.load()[1], tmp_path).eval()
    with torch.inference_mode():
        assert torch.equal(again(**asked).logits, wrapped(**asked).logits)
    assert answer(side, again, tokenizer, image_processor) == answer(side, wrapped, tokenizer, image_processor)
    assert slots_of(again.get_base_model(), 1) == [side.answers([PROMPTED])[0].slots]
