"""LLaVA's commands on a tiny model: run_llava, model_vqa, the chat, merging a LoRA, extracting the projector."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_llava import write_base, write_images, write_stage

from llava.data.answers import read_answers
from llava.data.rows import with_pictures
from llava.eval import model_vqa, run_llava
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.serve import cli
from llava.utils import UserError

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base, a stage checkpoint over it and two pictures."""
    folder = tmp_path_factory.mktemp("commands")
    write_stage(folder / "llava-tiny_abd_chest", write_base(folder / "tiny-base"))
    write_images(folder, ["a.png", "b,1.png", "c.png"])
    return folder


def run_script(name, *words):
    before = sys.argv
    sys.argv = [name, *map(str, words)]
    try:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before


def test_eval_model_takes_the_object_of_llavas_readme(place, capsys):
    """A class with a few attributes, no device, no router."""
    values = {"model_path": str(place / "tiny-base"), "model_base": None, "query": "is there a lesion"}
    values |= {"image_file": str(place / "a.png"), "conv_mode": None, "sep": ",", "temperature": 0, "top_p": None}
    args = type("Args", (), {**values, "num_beams": 1, "max_new_tokens": 4})()
    text = run_llava.eval_model(args)
    assert capsys.readouterr().out.rstrip("\n").endswith(text)
    assert run_llava.eval_model(args) == text
    with pytest.raises(UserError, match="args.query is missing"):
        run_llava.eval_model(type("Args", (), {"model_path": "x", "image_file": "y"})())


def test_pictures_are_named_by_a_text_or_a_list(place):
    names = [str(place / "a.png"), str(place / "b,1.png")]
    args = SimpleNamespace(image_file=";".join(names), sep=";")
    assert run_llava.image_parser(args) == run_llava.image_parser(SimpleNamespace(image_file=names)) == names
    first, second = run_llava.load_images(names)
    assert first.mode == "RGB" and second.tobytes() == cli.load_image(names[1]).tobytes()


def test_run_llava_answers_with_slots_and_several_pictures(place):
    words = ["--model-path", place / "llava-tiny_abd_chest", "--model-base", place / "tiny-base", "--temperature", "0"]
    words += ["--image-file", f"{place / 'a.png'};{place / 'b,1.png'}", "--sep", ";", "--max_new_tokens", "3"]
    run_llava.main([str(word) for word in [*words, "--query", "is there a lesion", "--task-id", "chest"]])
    with pytest.raises(UserError, match="no trained slots for task 'knee'"):
        run_llava.main([str(word) for word in [*words, "--query", "x", "--task-id", "knee"]])


def test_the_query_may_place_its_pictures_but_not_others():
    assert with_pictures("what?", 2) == "<image>\n<image>\nwhat?"
    assert with_pictures("<image-placeholder> what?", 1) == "<image> what?"
    with pytest.raises(UserError, match="2 times <image> for one image"):
        with_pictures("<image> <image>", 1)


def test_a_missing_picture_is_named(place):
    with pytest.raises(UserError, match="nothing.png"):
        run_llava.load_images([str(place / "nothing.png")])


def test_chat_remembers_what_was_said(place, monkeypatch, capsys):
    """The second prompt holds the first question and answer; an empty line ends the chat."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("is there a lesion\nwhat side\n\nnever asked\n"))
    prompts = []
    generate = LlavaLlamaForCausalLM.generate

    def recorded(self, **inputs):
        prompts.append(inputs)
        return generate(self, **inputs)

    monkeypatch.setattr(LlavaLlamaForCausalLM, "generate", recorded)
    words = ["--model-path", place / "llava-tiny_abd_chest", "--model-base", place / "tiny-base", "--debug"]
    words += ["--image-file", place / "b,1.png", "--device", "cpu", "--temperature", "0", "--max-new-tokens", "3"]
    cli.main([str(word) for word in words])
    out = capsys.readouterr().out
    assert "USER: " in out and "ASSISTANT: " in out and "'task'" in out
    assert len(prompts) == 2
    first, second = (inputs["input_ids"][0].tolist() for inputs in prompts)
    assert second[: len(first)] == first and len(second) > len(first) and second.count(-200) == 1
    assert [inputs["questions"] for inputs in prompts] == [["is there a lesion"], ["what side"]]


def test_model_vqa_is_the_loaders_engine_with_llavas_defaults(place, monkeypatch):
    from llava.eval import model_vqa_loader

    seen, chunk_of = [], model_vqa_loader.chunk_of
    monkeypatch.setattr(model_vqa_loader, "chunk_of", lambda found: seen.append(chunk_of(found)) or seen[-1])
    rows = [
        {"question_id": n, "image": name, "text": "what side\n<image>"} for n, name in enumerate(["a.png", "c.png"])
    ]
    (place / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--model-path", place / "tiny-base", "--question-file", place / "questions.jsonl", "--image-folder", place]
    model_vqa.main([*map(str, [*words, "--answers-file", place / "answers.jsonl", "--max_new_tokens", 3])])
    (chunk,) = seen
    assert chunk.generation.temperature == 0.2 and chunk.generation.batch_size == 1 and chunk.asked == {}
    assert [row["question_id"] for row in read_answers(place / "answers.jsonl")] == [0, 1]
    flags = dict(zip([word.strip("-").replace("-", "_") for word in words[::2]], map(str, words[1::2])))
    model_vqa.eval_model(SimpleNamespace(**flags, answers_file=str(place / "python.jsonl"), max_new_tokens=3))
    assert seen[1].generation == chunk.generation and seen[1].model == chunk.model
    assert [row["text"] for row in read_answers(place / "python.jsonl")] == [
        row["text"] for row in read_answers(place / "answers.jsonl")
    ]
    assert model_vqa_loader.parse_arguments(words := ["--model-path", "x", "--question-file", "y"]).temperature == 0
    assert model_vqa_loader.parse_arguments(words, **model_vqa.DEFAULTS).max_new_tokens == 1024


def load(folder, base=None):
    return load_pretrained_model(str(folder), base and str(base), device="cpu")


def test_merge_lora_writes_a_whole_checkpoint(place, tmp_path, capsys):
    _, model, *_ = load(place / "tiny-base")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    wrapped.save_pretrained(tmp_path / "llava-lora")
    expected = {name: value.clone() for name, value in wrapped.merge_and_unload().state_dict().items()}
    words = ["--model-path", tmp_path / "llava-lora", "--model-base", place / "tiny-base"]
    assert run_script("merge_lora_weights.py", *words, "--save-model-path", tmp_path / "merged") == 0
    merged = load(tmp_path / "merged")
    state = merged[1].state_dict()
    assert state.keys() == expected.keys() and merged[2] is not None
    assert all(torch.allclose(state[key], expected[key], atol=1e-6) for key in state)
    assert run_script("merge_lora_weights.py", *words, "--save-model-path", tmp_path / "merged") == 2
    assert "is there already" in capsys.readouterr().err


def test_slots_are_not_merged(place, tmp_path, capsys):
    words = ["--model-path", place / "llava-tiny_abd_chest", "--save-model-path", tmp_path / "merged"]
    assert run_script("merge_lora_weights.py", *words) == 2
    assert "slots, which route each question" in capsys.readouterr().err


def test_a_merged_model_with_vicunas_generation_config_can_be_saved(place, tmp_path):
    """Its temperature without sampling stops the saving in newer transformers."""
    folder = tmp_path / "vicuna"
    shutil.copytree(place / "tiny-base", folder)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6, "pad_token_id": 0}))
    _, model, *_ = load(folder)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "generation_config.json").is_file()


def test_the_extracted_projector_loads_over_its_language_model(place, tmp_path, capsys):
    output = tmp_path / "projector" / "mm_projector.bin"
    assert run_script("extract_mm_projector.py", "--model-path", place / "tiny-base", "--output", output) == 0
    state = torch.load(output, weights_only=True)
    _, model, *_ = load(place / "tiny-base")
    assert sorted(state) == [f"model.mm_projector.{part}.{kind}" for part in (0, 2) for kind in ("bias", "weight")]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert "ships its vision tower" in capsys.readouterr().out
    _, again, image_processor, _ = load(output.parent, place / "tiny-base")
    assert torch.equal(again.state_dict()["model.mm_projector.0.weight"], state["model.mm_projector.0.weight"])
    assert image_processor is not None
    assert again.get_vision_tower().config.num_attention_heads == model.get_vision_tower().config.num_attention_heads
    assert run_script("extract_mm_projector.py", "--model-path", place, "--output", tmp_path / "x.bin") == 2


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_batch_of_sixteen_answers_as_one_by_one(tmp_path, family):
    """Greedy, routed, questions of many lengths, one row in five without a picture."""
    from llava.eval import model_vqa_loader

    base = write_base(tmp_path / "tiny-base", family=family)
    stage = write_stage(tmp_path / "llava-tiny_abd_chest", base)
    write_images(tmp_path, [f"{number}.png" for number in range(5)])
    words = "is there a lesion in the image of the left lung what side where abdomen head".split()
    rows = []
    for number in range(20):
        text = " ".join(words[number % 7 : number % 7 + 1 + number % 9])
        image = {} if number % 5 == 4 else {"image": f"{number % 5}.png"}
        rows.append({"question_id": number, "text": f"{text}\n<image>" if image else text, **image})
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = {}
    for size in (1, 16):
        words = ["--model-path", stage, "--model-base", base, "--question-file", tmp_path / "questions.jsonl"]
        words += ["--image-folder", tmp_path, "--answers-file", tmp_path / f"{size}.jsonl", "--max_new_tokens", 6]
        model_vqa_loader.main([*map(str, [*words, "--batch-size", size, "--device", "cpu"])])
        found[size] = [(a["text"], a["metadata"]["route"]["slots"]) for a in read_answers(tmp_path / f"{size}.jsonl")]
    assert found[1] == found[16] and len({text for text, _ in found[1]}) > 5
