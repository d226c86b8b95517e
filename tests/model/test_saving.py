"""A loaded stage is saved as transformers' models are, and what is read again routes and answers the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_llava import write_base, write_stage
from tiny_world import LORA, make_world
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from llava.checkpoints.checkpoint import Checkpoint
from llava.data.labels import prompt_ids
from llava.eval.answerer import Answerer
from llava.eval.generation import Loading
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.slots.pool import Pool
from llava.utils import UserError

QUESTIONS = ("is there a lesion", "where is the lesion in the image")
KINDS = ("retrieval", "l2p", "moelora", "lora")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny base, keys, and a stage of every kind after two tasks."""
    world = make_world(tmp_path_factory.mktemp("saving"), ("abd", "chest"))
    for kind in KINDS:
        more = LORA if kind == "lora" else ("--method", kind)
        world.train("abd", world.folder / f"llava-{kind}_abd", None, *more)
        world.train("chest", world.folder / f"llava-{kind}", world.folder / f"llava-{kind}_abd", *more)
    return world


def load(folder, base=None, **options):
    return load_pretrained_model(str(folder), None if base is None else str(base), device="cpu", **options)


@torch.inference_mode()
def answers(tokenizer, model, image_processor):
    """Logits, answers and routes of two questions with a picture each."""
    pictures = [Image.new("RGB", (20, 16), (40 * n, 90, 200 - 60 * n)) for n in (1, 2)]
    pixels = process_images(pictures, image_processor, model.config).to(model.dtype)
    found = []
    for question, picture in zip(QUESTIONS, pixels, strict=True):
        ids = torch.tensor([prompt_ids(question, tokenizer, "vicuna_v1", True)])
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        output = model.generate(ids, images=picture[None], questions=[question], **options)
        route = model.last_route
        query = model.retriever.encode_questions([question])
        logits = model(input_ids=ids, images=picture[None], text_query=query).logits
        found.append((output.tolist(), route.slot_indices.tolist(), route.slot_weights, logits))
    return found


def assert_same(one, other):
    for (output, slots, weights, logits), (output2, slots2, weights2, logits2) in zip(one, other, strict=True):
        assert output == output2 and slots == slots2
        assert torch.equal(weights, weights2) and torch.equal(logits, logits2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_stage_answers_as_the_stage_with_and_without_its_base(world, tmp_path, kind):
    stage = world.folder / f"llava-{kind}"
    tokenizer, model, image_processor, _ = load(stage, world.base)
    expected = answers(tokenizer, model, image_processor)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    for base in (None, world.base):
        again = load(tmp_path / "saved", base)
        assert_same(answers(*again[:3]), expected)
        assert again[1].config.prompt == model.config.prompt
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert_same(answers(AutoTokenizer.from_pretrained(tmp_path / "saved"), model, image_processor), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_auto_class_gives_a_light_stage_with_its_slots(world, kind):
    stage = world.folder / f"llava-{kind}"
    expected = answers(*load(stage)[:3])
    model, report = AutoModelForCausalLM.from_pretrained(stage, output_loading_info=True)
    tokenizer, base, image_processor, _ = load(world.base)
    assert not model.training and not report["missing_keys"]
    assert_same(answers(tokenizer, model, image_processor), expected)
    ids = torch.tensor([prompt_ids(QUESTIONS[0], tokenizer, "vicuna_v1", False)])
    query = model.retriever.encode_questions(QUESTIONS[:1])
    image_query = torch.zeros(1, model.retriever.settings.image_dim)
    assert not torch.equal(model(ids, text_query=query, image_query=image_query).logits, base(ids).logits)


def test_the_auto_class_takes_a_base_that_has_moved(world, tmp_path):
    stage = tmp_path / "llava-moved"
    shutil.copytree(world.folder / "llava-retrieval", stage)
    pool = Pool.read(stage / "slots.pth")
    pool.base["path"] = str(tmp_path / "gone")
    pool.write(stage / "slots.pth")
    with pytest.raises(UserError, match="gone"):
        AutoModelForCausalLM.from_pretrained(stage)
    assert AutoModelForCausalLM.from_pretrained(stage, model_base=str(world.base)).retriever.known_tasks


def test_the_weights_file_holds_no_slots_and_the_slots_are_those_of_the_stage(world, tmp_path):
    stage = world.folder / "llava-retrieval"
    model = load(stage)[1]
    model.save_pretrained(tmp_path)  # the tokenizer and the image processor go along
    saved = Checkpoint.open(tmp_path)
    assert saved.kind == "stage" and saved.has_weights
    assert not [name for name in saved.tensor_files if "retriever" in name]
    assert any(name.startswith("model.vision_tower.") for name in saved.tensor_files)
    before, after = (Pool.read(folder / "slots.pth") for folder in (stage, tmp_path))
    assert [task.checksum() for task in before.tasks] == [task.checksum() for task in after.tasks]
    assert (before.base, before.prompt, before.settings) == (after.base, after.prompt, after.settings)
    assert "retriever" in model.state_dict().popitem()[0]  # the model itself is as it was
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == AutoTokenizer.from_pretrained(stage).get_vocab()


def test_shards_and_the_flags_of_older_programs(world, tmp_path):
    tokenizer, model, image_processor, _ = load(world.folder / "llava-retrieval")
    model.save_pretrained(tmp_path, max_shard_size="100KB", safe_serialization=True)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same(answers(*load(tmp_path)[:3]), answers(tokenizer, model, image_processor))


def test_a_stage_saved_whole_is_not_loaded_over_its_base_where_its_weights_are_gone(world, tmp_path):
    """They may have a LoRA in them, or be fine-tuned."""
    model = load(world.folder / "llava-lora")[1]
    model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "stage_has_weights")
    assert not hasattr(load(tmp_path)[1].config, "stage_has_weights")
    (tmp_path / "model.safetensors").unlink()
    for base in (None, world.base):
        with pytest.raises(UserError, match="saved with weights of its own, which are gone"):
            load(tmp_path, base)
    with pytest.raises(UserError, match="saved with weights of its own, which are gone"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="saved with weights of its own, which are gone"):
        Answerer(str(world.base), Loading(device="cpu")).use(str(tmp_path))


def test_weights_in_shards_replace_those_in_one_file_and_the_other_way_round(world, tmp_path):
    tokenizer, model, image_processor, _ = load(world.folder / "llava-retrieval")
    expected = answers(tokenizer, model, image_processor)
    for size in ("50GB", "50KB", "50GB"):
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert (tmp_path / "model.safetensors").is_file() is (size == "50GB")
        assert (tmp_path / "model.safetensors.index.json").is_file() is (size != "50GB")
        assert_same(answers(*load(tmp_path)[:3]), expected)


def test_a_given_state_decides_for_weights_and_slots(world, tmp_path):
    """As ``Trainer`` and accelerate give it: gathered, with the adapter's tensors in it."""
    model = load(world.folder / "llava-l2p")[1]
    state = {name: value.clone() + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    again = load(tmp_path)[1].state_dict()
    changed = [name for name in state if not torch.equal(again[name], state[name])]
    assert not changed and again.keys() == state.keys()


def test_trainer_saves_a_stage_that_loads(world, tmp_path):
    tokenizer, model, image_processor, _ = load(world.folder / "llava-retrieval")
    arguments = TrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True)
    Trainer(model=model, args=arguments, processing_class=tokenizer).save_model(str(tmp_path / "saved"))
    assert_same(answers(*load(tmp_path / "saved")[:3]), answers(tokenizer, model, image_processor))


def test_another_process_writes_nothing(world, tmp_path):
    load(world.folder / "llava-retrieval")[1].save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not list((tmp_path / "saved").glob("*"))


def test_uploading_takes_the_whole_stage(world, tmp_path, monkeypatch):
    sent = {}
    monkeypatch.setattr("huggingface_hub.create_repo", lambda name, **_: type("Repo", (), {"repo_id": f"me/{name}"}))
    monkeypatch.setattr("huggingface_hub.upload_folder", lambda **options: sent.update(options))
    tmp_path.joinpath("llava-mine").mkdir()
    tmp_path.joinpath("llava-mine", "notes.txt").write_text("mine")
    model = load(world.folder / "llava-l2p")[1]
    model.save_pretrained(tmp_path / "llava-mine", push_to_hub=True, commit_message="first")
    assert (sent["repo_id"], sent["commit_message"]) == ("me/llava-mine", "first")
    assert {"slots.pth", "memory.pth", "model.safetensors", "config.json"} <= set(sent["allow_patterns"])
    assert "notes.txt" not in sent["allow_patterns"]


def test_push_to_hub_uploads_a_stage_with_its_card(world, monkeypatch):
    """Transformers writes a card of its own over the stage's before it uploads."""
    hub, sent = transformers.utils.hub, {}
    api = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(hub, "hf_api", lambda: api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: ModelCard("---\ntags: []\n---\nTheirs.\n"))
    monkeypatch.setattr(
        hub.PushToHubMixin,
        "_upload_modified_files",
        lambda _, folder, *__, **___: sent.update({path.name: path.read_bytes() for path in Path(folder).iterdir()}),
    )
    load(world.folder / "llava-retrieval")[1].push_to_hub("me/llava-mine")
    assert {"slots.pth", "model.safetensors", "config.json"} <= sent.keys()
    card = sent["README.md"].decode()
    assert "Theirs." in card and "# llava-mine" in card and "Not for clinical use" in card


def test_a_lora_put_on_by_another_program_is_not_left_out(world, tmp_path):
    model = load(world.folder / "llava-retrieval")[1]
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="a LoRA lies beside"):
        model.save_pretrained(tmp_path / "saved")
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "saved")
    assert Checkpoint.open(tmp_path / "saved").kind == "stage"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_stage_over_a_coarser_base_is_saved_in_full_precision(tmp_path, dtype):
    """The CPU widens the base's numbers; the text queries still are those of its embeddings."""
    base = write_base(tmp_path / "base")
    model = load(base)[1].to(dtype)
    model.save_pretrained(base)
    stage = write_stage(tmp_path / "llava-stage", base)
    found = load(stage)
    found[1].save_pretrained(tmp_path / "saved")
    assert Checkpoint.open(tmp_path / "saved").config["dtype"] == "float32"
    assert_same(answers(*load(tmp_path / "saved")[:3]), answers(*found[:3]))


def test_a_stage_saved_coarser_than_its_base_still_routes_the_same(world, tmp_path):
    found = load(world.folder / "llava-retrieval", dtype=torch.bfloat16)
    found[1].save_pretrained(tmp_path)
    assert_same(answers(*load(tmp_path, dtype=torch.bfloat16)[:3]), answers(*found[:3]))


def test_a_stage_of_an_older_version_keeps_the_template_that_its_base_has(tmp_path):
    base = write_base(tmp_path / "llava-v1-base")
    config = json.loads((base / "config.json").read_text())
    del config["conversation_version"]
    (base / "config.json").write_text(json.dumps(config))
    stage = write_stage(tmp_path / "llava-old", base)  # keeps no prompt
    found = load(stage)
    found[1].save_pretrained(tmp_path / "other-name")
    again = load(tmp_path / "other-name")
    assert again[1].config.prompt == found[1].config.prompt == {"conv_mode": "llava_v1"}


def test_lost_slots_are_refused_by_every_loader(world, tmp_path):
    load(world.folder / "llava-retrieval")[1].save_pretrained(tmp_path)
    (tmp_path / "slots.pth").unlink()  # a save that was killed, or a copy of the weights alone
    with pytest.raises(UserError, match=r"slots\.pth is not there"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"slots\.pth is not there"):
        load(tmp_path)


def test_what_would_be_read_as_something_else_is_not_written(world, tmp_path):
    stage = load(world.folder / "llava-lora")[1]
    with pytest.raises(UserError, match="holds a LoRA"):
        stage.save_pretrained(world.folder / "llava-lora")
    base = load(world.base)[1]
    with pytest.raises(UserError, match="this model has no slots"):
        base.save_pretrained(world.folder / "llava-retrieval")
    base.save_pretrained(tmp_path / "base")
    assert Checkpoint.open(tmp_path / "base").kind == "llava"


def test_a_failed_save_leaves_no_slots_behind(world, tmp_path, monkeypatch):
    model = load(world.folder / "llava-l2p")[1]
    model.save_pretrained(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Pool, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert not Path(tmp_path / "slots.pth").exists()
    with pytest.raises(UserError, match=r"slots\.pth is not there"):
        load(tmp_path)


def test_a_stage_that_is_saved_over_keeps_no_file_of_its_tasks(world, tmp_path):
    stage = tmp_path / "llava-saved-over"
    shutil.copytree(world.folder / "llava-retrieval", stage)
    before = Pool.read(stage / "slots.pth")
    assert list((stage / "slots").iterdir())
    load(stage)[1].save_pretrained(stage)
    assert not list((stage / "slots").iterdir())
    after = Pool.read(stage / "slots.pth")
    assert [task.checksum() for task in before.tasks] == [task.checksum() for task in after.tasks]


def test_without_a_tokenizer_the_loader_names_what_is_missing(world, tmp_path):
    model = load(world.folder / "llava-retrieval")[1]
    model.tokenizer = None
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no tokenizer can be read here"):
        load(tmp_path)
