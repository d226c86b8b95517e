"""A stage trained with a prompt of its own, loaded without flags: the same token ids and pixels, looked at once.

Training runs through its command; what it saw is noted where samples leave the data set and pixels enter the tower.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_llava import write_base
from tiny_world import PICTURES, World, fit, merge, refusal, write_sequence

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.rows import read_rows, write_jsonl
from llava.data.samples import TrainingSamples
from llava.eval import model_vqa_loader, run_llava
from llava.eval.answerer import Answerer
from llava.image_io import load_image
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.serve import cli
from llava.slots.pool import Pool
from llava.train import stage_data
from llava.train import train as train_module

SUFFIX = "Answer with one word."
PINPOINTS = [[16, 32], [32, 16], [32, 32]]
OWN = ("--version", "llava_v0", "--image_aspect_ratio", "square")
TASKS = ("abd", "chest")


def make(folder, family="llama", name="llava-v1.5-7b", suffix=SUFFIX, **config) -> World:
    """A world whose base is named as LLaVA names them; ``config`` changes its config.json, None removes a field."""
    base = write_base(folder / name, family=family)
    values = json.loads((base / "config.json").read_text()) | config
    values = {field: value for field, value in values.items() if value is not None}
    (base / "config.json").write_text(json.dumps(values))
    sequence = write_sequence(folder, TASKS)
    values = json.loads(sequence.read_text()) | {"answer_suffix": suffix, "answer_style": "lower"}
    sequence.write_text(json.dumps(values))
    for task in TASKS:
        fit(folder, base, sequence, task)
    return World(folder, base, sequence, merge(folder, sequence))


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Llama and Mistral bases whose config names no template."""
    return {
        family: make(tmp_path_factory.mktemp(family), family, conversation_version=None)
        for family in ("llama", "mistral")
    }


class Seen:
    """What training and answering made of the rows: ids and labels by row, pixels by checksum."""

    def __init__(self, monkeypatch):
        self.trained: dict = {}
        self.asked: dict = {}
        self.pixels: set[str] = set()
        get, collate, forward = TrainingSamples.__getitem__, Answerer._inputs, CLIPVisionTower.forward

        def note_sample(dataset, index):
            sample = get(dataset, index)
            self.trained[dataset.rows[index].id] = sample
            return sample

        def note_batch(answerer, rows, ids, encoder):
            self.asked |= {row.id: mine for row, mine in zip(rows, ids, strict=True)}
            return collate(answerer, rows, ids, encoder)

        def note_pixels(tower, images):
            self.pixels |= {checksum(image) for image in images}
            return forward(tower, images)

        monkeypatch.setattr(TrainingSamples, "__getitem__", note_sample)
        monkeypatch.setattr(Answerer, "_inputs", note_batch)
        monkeypatch.setattr(CLIPVisionTower, "forward", note_pixels)

    def take_pixels(self):
        taken, self.pixels = self.pixels, set()
        return taken


def checksum(image):
    return hashlib.sha256(image.float().cpu().contiguous().numpy().tobytes()).hexdigest()


def answer(world, stage, target, *flags):
    """Answer the training questions of ``abd`` with a stage, by the command."""
    words = ["--model-path", stage, "--model-base", world.base, "--question-file", world.folder / "train_abd.jsonl"]
    words += ["--image-folder", world.folder / "images", "--answers-file", target, "--device", "cpu"]
    words += ["--max_new_tokens", 1, *flags]
    model_vqa_loader.main([str(word) for word in words])


def same_questions(seen):
    """Whether each question's ids are the training sample's up to its answer."""
    assert seen.asked.keys() == seen.trained.keys() and len(seen.asked) == 12
    for row_id, ids in seen.asked.items():
        sample = seen.trained[row_id]
        if sample["input_ids"][: len(ids)].tolist() != ids or len(sample["input_ids"]) == len(ids):
            return False
        if sample["labels"][: len(ids)].ne(IGNORE_INDEX).any() or sample["labels"][len(ids) :].eq(IGNORE_INDEX).any():
            return False
    return True


def expected_pixels(world, mode, **view):
    """Checksums of the pictures of ``abd`` as LLaVA prepares them under a picture mode."""
    _, _, processor, _ = load_pretrained_model(str(world.base), None, device="cpu")
    view = SimpleNamespace(image_aspect_ratio=mode, **view)
    found = [
        process_images([load_image(world.folder / "images" / f"abd{number}.png")], processor, view)[0]
        for number in range(PICTURES)
    ]
    return {checksum(tile) for picture in found for tile in (picture if picture.dim() == 4 else picture[None])}


# -- equal prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", ["4096", "0"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_stage_is_asked_as_it_was_trained(worlds, tmp_path, monkeypatch, family, cached):
    world, stage = worlds[family], tmp_path / "llava-tiny_abd"
    square = expected_pixels(world, "square")
    assert square != expected_pixels(world, "pad")
    seen = Seen(monkeypatch)
    world.train("abd", stage, None, *OWN, "--feature_cache_mb", cached)
    assert seen.take_pixels() == square
    answer(world, stage, tmp_path / "answers.jsonl")
    assert seen.pixels == square
    assert same_questions(seen)
    _, model, _, _ = load_pretrained_model(str(stage), str(world.base), device="cpu")
    assert (model.config.image_aspect_ratio, model.config.conversation_version) == ("square", "llava_v0")
    written = json.loads((stage / "config.json").read_text())
    assert (written["image_aspect_ratio"], written["conversation_version"]) == ("square", "llava_v0")
    expected = {"conv_mode": "llava_v0", "answer_suffix": SUFFIX, "answer_style": "lower", "aspect_ratio": "square"}
    assert Pool.read(stage / "slots.pth").prompt == {**expected, "max_length": 2048}


@pytest.mark.parametrize("family, template", [("llama", "llava_v1"), ("mistral", "mistral_instruct")])
def test_without_flags_the_base_decides_for_both(worlds, tmp_path, monkeypatch, family, template):
    """The folder's name decides for a config without a template, and a stage is not called as its base is."""
    world, stage = worlds[family], tmp_path / "llava-tiny_abd"
    seen = Seen(monkeypatch)
    world.train("abd", stage)
    assert seen.take_pixels() == expected_pixels(world, "pad")
    answer(world, stage, tmp_path / "answers.jsonl")
    assert same_questions(seen)
    assert Pool.read(stage / "slots.pth").prompt["conv_mode"] == template
    assert Pool.read(world.keys).prompt["conv_mode"] == template


def test_a_stage_that_keeps_no_prompt_is_asked_as_its_base(worlds, tmp_path, monkeypatch):
    world, stage = worlds["llama"], tmp_path / "llava-tiny_abd"
    seen = Seen(monkeypatch)
    slots = world.train("abd", stage)
    slots.prompt = {}
    slots.write(stage / "slots.pth")
    answer(world, stage, tmp_path / "answers.jsonl", "--default-answer-suffix", SUFFIX)
    assert same_questions(seen)


def test_flags_go_over_the_stage_and_its_suffix_over_the_default(worlds, tmp_path, monkeypatch):
    world, stage = worlds["llama"], tmp_path / "llava-tiny_abd"
    seen = Seen(monkeypatch)
    world.train("abd", stage)
    answer(world, stage, tmp_path / "a.jsonl", "--default-answer-suffix", "Of another kind.")
    assert same_questions(seen)
    seen.take_pixels()
    flags = ("--conv-mode", "llava_v0", "--answer-suffix", "", "--image_aspect_ratio", "square")
    answer(world, stage, tmp_path / "b.jsonl", *flags)
    assert seen.pixels == expected_pixels(world, "square")
    tokenizer = load_pretrained_model(str(world.base), None, device="cpu")[0]
    (row, *_), ids = read_rows(world.folder / "train_abd.jsonl"), seen.asked["abd-0"]
    text = tokenizer.decode([token for token in ids if token >= 0])
    assert row.question in text and SUFFIX not in text and "###" in text


def test_an_earlier_tasks_other_prompt_is_noted(worlds, tmp_path, capsys):
    world = worlds["llama"]
    world.train("abd", tmp_path / "llava-1", None, *OWN)
    world.train("chest", tmp_path / "llava-2", tmp_path / "llava-1", *OWN)
    assert "another prompt" not in capsys.readouterr().out
    world.train("chest", tmp_path / "llava-3", tmp_path / "llava-1", *OWN[:2])
    assert "with this one: aspect_ratio is 'pad', was 'square'" in capsys.readouterr().out


def test_one_question_and_a_chat_are_asked_so_too(worlds, tmp_path, monkeypatch):
    world, stage = worlds["llama"], tmp_path / "llava-tiny_abd"
    seen, batches, generate = Seen(monkeypatch), [], Answerer._generate
    world.train("abd", stage, None, *OWN)

    def note(answerer, inputs, *args, **options):
        batches.append(dict(inputs))
        return generate(answerer, inputs, *args, **options)

    monkeypatch.setattr(Answerer, "_generate", note)
    (row, *_) = read_rows(world.folder / "train_abd.jsonl")
    words = ["--model-path", stage, "--model-base", world.base, "--image-file", world.folder / "images" / row.image]
    seen.take_pixels()
    run_llava.main([*map(str, words), "--query", row.question, "--device", "cpu", "--max_new_tokens", "1"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{row.question}\n\n"))
    cli.main([*map(str, words), "--device", "cpu", "--max-new-tokens", "1"])
    for batch in batches:
        ids = batch["input_ids"][0]
        assert seen.trained[row.id]["input_ids"][: len(ids)].equal(ids)
    assert len(batches) == 2
    assert seen.pixels <= expected_pixels(world, "square")


# -- several pictures, a system text -----------------------------------------------------------------------------------


def of_several_pictures(folder):
    """A file of world's rows of ``abd``: a third with two pictures, a third with a system text, a third as they are."""
    rows = [row.raw for row in read_rows(folder / "train_abd.jsonl")]
    for number, row in enumerate(rows):
        question, image = row["text"].replace("<image>", "").strip(), row["image"]
        if number % 3 == 0:
            row["image"] = [image, f"abd{(number + 1) % PICTURES}.png"]
            row["text"] = f"Prior: <image>\nCurrent: <image>\n{question}" if number % 2 else question
        if number % 3 == 1:
            said = [
                ("system", "You are a radiologist."),
                ("human", f"<image>\n{question}"),
                ("gpt", row["gpt4_answer"]),
            ]
            turns = [{"from": who, "value": text} for who, text in said]
            rows[number] = {"id": row["question_id"], "image": image, "conversations": turns}
    (folder / "several.json").write_text(json.dumps(rows))
    return folder / "several.json"


@pytest.mark.parametrize("cached", ["4096", "0"])
def test_rows_with_several_pictures_and_with_a_system_text_are_asked_as_they_were_trained(
    worlds, tmp_path, monkeypatch, cached
):
    world, stage = worlds["llama"], tmp_path / "llava-tiny_abd"
    questions = of_several_pictures(world.folder)
    fit(tmp_path, world.base, world.sequence, "abd", "--data_paths", questions)
    seen = Seen(monkeypatch)
    world.train("abd", stage, None, *OWN, "--feature_cache_mb", cached, "--data_path", questions)
    answer(world, stage, tmp_path / "answers.jsonl", "--question-file", questions)
    assert same_questions(seen)
    _, model, processor, _ = load_pretrained_model(str(stage), str(world.base), device="cpu")
    for row in read_rows(questions)[:4]:
        opened = [load_image(world.folder / "images" / name) for name in row.images]
        pixels = [list(process_images(opened, processor, model.config))]
        query = model.image_query(model.vision_features(pixels), pixels)[0]
        torch.testing.assert_close(query, seen.trained[row.id]["image_query"])
        assert (seen.trained[row.id]["input_ids"] == IMAGE_TOKEN_INDEX).sum() == len(row.images)


# -- picture modes -----------------------------------------------------------------------------------------------------


def test_a_picture_mode_acts_the_same_with_and_without_cached_features(worlds, tmp_path):
    world = worlds["llama"]
    pad = world.train("abd", tmp_path / "llava-pad").tasks[0].A["o_proj"]
    cached, opened = (
        world.train("abd", tmp_path / f"llava-{size}", None, *OWN[2:], "--feature_cache_mb", size).tasks[0].A["o_proj"]
        for size in ("4096", "0")
    )
    assert (cached - opened).norm() < 0.02 * opened.norm()
    assert (cached - pad).norm() > 0.05 * pad.norm()


def test_the_route_in_training_is_the_route_of_the_answer(worlds, tmp_path, monkeypatch):
    world, stage = worlds["llama"], tmp_path / "llava-tiny_abd"
    seen = Seen(monkeypatch)
    world.train("abd", stage, None, *OWN)
    _, model, processor, _ = load_pretrained_model(str(stage), str(world.base), device="cpu")
    for row in read_rows(world.folder / "train_abd.jsonl")[:4]:
        pixels = process_images([load_image(world.folder / "images" / row.image)], processor, model.config)
        query = model.image_query(model.vision_features(pixels), pixels)[0]
        torch.testing.assert_close(query, seen.trained[row.id]["image_query"])


def test_other_pictures_than_the_keys_saw_are_noted(worlds, tmp_path, capsys):
    world = worlds["llama"]
    world.train("abd", tmp_path / "llava-1")
    assert "fitted to other pictures" not in capsys.readouterr().out
    world.train("abd", tmp_path / "llava-2", None, *OWN)
    out = capsys.readouterr().out
    assert out.count("note: the keys were fitted to other pictures: aspect_ratio is 'square', was 'pad'") == 1


def test_keys_of_another_picture_mode_decide_for_their_stage(worlds, tmp_path):
    world = worlds["llama"]
    for task in TASKS:
        fit(tmp_path, world.base, world.sequence, task, "--image_aspect_ratio", "square")
    keys = merge(tmp_path, world.sequence)
    pad, square = Pool.read(world.keys), Pool.read(keys)
    assert (pad.prompt["aspect_ratio"], square.prompt["aspect_ratio"]) == ("pad", "square")
    assert not torch.equal(pad.tasks[0].image_keys, square.tasks[0].image_keys)
    slots = world.train("abd", tmp_path / "llava-1", None, "--retriever_state_dict", keys)
    assert slots.prompt["aspect_ratio"] == "square"


@pytest.mark.parametrize("mode, message", [("pdd", "did you mean 'pad'"), ("anyres", "has image_grid_pinpoints")])
def test_a_mode_that_cannot_be_is_refused_before_anything_is_loaded(
    worlds, tmp_path, capsys, monkeypatch, mode, message
):
    world = worlds["llama"]
    monkeypatch.setattr(train_module, "load_for_training", lambda *_, **__: pytest.fail("found out too late"))
    monkeypatch.setattr("llava.model.builder.load_pretrained_model", lambda *_, **__: pytest.fail("too late"))
    words = world.train_arguments("abd", tmp_path / "llava-x", None, "--image_aspect_ratio", mode)
    assert message in refusal(world, capsys, words)
    with pytest.raises(ValueError, match=message):
        answer(world, world.base, tmp_path / "a.jsonl", "--image_aspect_ratio", mode)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, world.base, world.sequence, "abd", "--image_aspect_ratio", mode)


@pytest.mark.parametrize("cached", ["4096", "0"])
def test_anyres_works_where_the_base_has_grids(tmp_path, monkeypatch, cached):
    world, stage = make(tmp_path, image_grid_pinpoints=PINPOINTS, mm_patch_merge_type="flat"), tmp_path / "llava-any"
    seen = Seen(monkeypatch)
    world.train("abd", stage, None, "--image_aspect_ratio", "anyres", "--feature_cache_mb", cached)
    tiles = seen.take_pixels()
    answer(world, stage, tmp_path / "answers.jsonl")
    assert seen.pixels == tiles == expected_pixels(world, "anyres", image_grid_pinpoints=PINPOINTS)
    assert same_questions(seen)


# -- once each ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def counts(monkeypatch):
    """How often pictures are looked for (once more in opening them), opened and put through a tower; towers built."""
    found = Counter()
    is_file, opening, forward, init = Path.is_file, Image.open, CLIPVisionTower.forward, CLIPVisionTower.__init__

    def note(name, number=1):
        found[name] += number

    monkeypatch.setattr(Path, "is_file", lambda p: (p.suffix == ".png" and note("looked for")) or is_file(p))
    monkeypatch.setattr(Image, "open", lambda *a, **k: note("opened") or opening(*a, **k))
    monkeypatch.setattr(
        CLIPVisionTower, "forward", lambda self, images: note("through", len(images)) or forward(self, images)
    )
    monkeypatch.setattr(CLIPVisionTower, "__init__", lambda self, *a, **k: note("towers") or init(self, *a, **k))
    return found


def test_a_training_run_looks_at_each_picture_once(world, tmp_path, counts):
    world.train("abd", tmp_path / "llava-1")
    assert counts == {"looked for": 2 * PICTURES, "opened": PICTURES, "through": PICTURES, "towers": 1}


def test_stage_1_and_stage_2_share_what_they_compute(world, tmp_path, counts, monkeypatch):
    expected = world.train("abd", tmp_path / "llava-1").tasks[0].checksum()
    counts.clear()
    cache = tmp_path / "cache"
    fit(tmp_path, world.base, world.sequence, "abd", "--cache_dir", cache)
    assert counts == {"looked for": 2 * PICTURES, "opened": PICTURES, "through": PICTURES, "towers": 1}
    counts.clear()
    monkeypatch.setattr(stage_data, "encoder_from_identity", lambda *_: pytest.fail("the queries are there"))
    moved = tmp_path / "moved" / "pictures"
    shutil.copytree(world.folder / "images", moved)  # contents decide, not places and dates
    more = ("--query_cache", cache, "--image_folder", moved)
    assert world.train("abd", tmp_path / "llava-2", None, *more).tasks[0].checksum() == expected
    assert counts == {"looked for": PICTURES, "towers": 1}


def test_a_damaged_entry_is_computed_again(world, tmp_path, capsys):
    expected = world.train("abd", tmp_path / "llava-0").tasks[0].checksum()
    cache, words = tmp_path / "cache", ("--query_cache", tmp_path / "cache")
    world.train("abd", tmp_path / "llava-1", None, *words)
    whole = {path: path.read_bytes() for path in cache.rglob("*.*")}
    assert Counter(path.suffix for path in whole) == {".safetensors": PICTURES, ".pt": 1}
    for number, (path, data) in enumerate(whole.items()):
        path.write_bytes(data[: len(data) // 2] if number % 2 else b"")
    capsys.readouterr()
    assert world.train("abd", tmp_path / "llava-2", None, *words).tasks[0].checksum() == expected
    said = capsys.readouterr().out
    assert said.count("is damaged; its contents are computed again") == 1
    assert said.count("is damaged; its picture is looked at again") == PICTURES
    assert set(cache.rglob("*.*")) == set(whole)
    assert world.train("abd", tmp_path / "llava-3", None, *words).tasks[0].checksum() == expected


def test_another_mode_another_picture_and_another_question_are_other_entries(world, tmp_path):
    cache = tmp_path / "cache"
    folder = tmp_path / "images"
    shutil.copytree(world.folder / "images", folder)
    rows = [row.raw for row in read_rows(world.folder / "train_abd.jsonl")]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    words = ("--query_cache", cache, "--image_folder", folder, "--data_path", tmp_path / "rows.jsonl")

    def entries(*more):
        world.train("abd", tmp_path / f"llava-{len(list(tmp_path.iterdir()))}", None, *words, *more)
        return Counter(path.suffix for path in cache.rglob("*.*"))

    assert entries() == {".pt": 1, ".safetensors": PICTURES}
    assert entries("--image_aspect_ratio", "square") == {".pt": 1, ".safetensors": 2 * PICTURES}
    (folder / "abd0.png").write_bytes((folder / "abd1.png").read_bytes() + b" ")  # another file, though alike
    assert entries() == {".pt": 1, ".safetensors": 2 * PICTURES + 1}
    rows[0]["text"] = "another question?\n<image>"
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert entries() == {".pt": 2, ".safetensors": 2 * PICTURES + 1}
