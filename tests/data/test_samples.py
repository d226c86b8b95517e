"""Samples and batches: what the model gets, and what is refused before training starts."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import tokenizer_zoo
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data import prompt as module
from llava.data.labels import expanded_length, image_token_count, prompt_ids
from llava.data.prompt import Prompt, PromptEncoder
from llava.data.rows import parse_row
from llava.data.samples import DataCollatorForSupervisedDataset, TrainingSamples, picture_groups
from llava.utils import UserError

CONFIG = SimpleNamespace(image_aspect_ratio="pad", vision_config={"image_size": 32, "patch_size": 8})
PROCESSOR = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_zoo.build("llama")


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 20), (200, 10, 10)).save(tmp_path / "a.png")
    Image.new("RGB", (20, 30), (10, 200, 10)).save(tmp_path / "b.png")
    return tmp_path


def row(number, image="a.png", answer="yes", question="Is there a fracture?"):
    value = {"question_id": number, "text": question + ("\n<image>" if image else ""), "gpt4_answer": answer}
    return parse_row(value | ({"image": image} if image else {}))


def build(rows, folder, tokenizer, config=CONFIG, cache_megabytes=256, **fields):
    prompt = Prompt("v1", aspect_ratio=config.image_aspect_ratio, **fields)
    encoder = PromptEncoder(prompt, tokenizer, PROCESSOR, config, folder, cache_megabytes)
    return TrainingSamples(rows, encoder)


def test_sample_holds_ids_labels_picture_and_its_size(folder, tokenizer):
    sample = build([row(1)], folder, tokenizer)[0]
    prompt = prompt_ids("Is there a fracture?", tokenizer, "v1", has_image=True)
    assert sample["input_ids"][: len(prompt)].tolist() == prompt
    assert sample["labels"][: len(prompt)].eq(IGNORE_INDEX).all()
    assert sample["labels"][len(prompt) :].equal(sample["input_ids"][len(prompt) :])
    assert sample["image"].shape == (3, 32, 32) and sample["image_size"] == (40, 20)
    assert "text_query" not in sample


def test_batch_is_padded_right_with_a_mask_from_the_lengths(folder, tokenizer):
    data = build([row(1), row(2, "b.png", "a long answer of many words")], folder, tokenizer)
    batch = DataCollatorForSupervisedDataset(tokenizer)([data[0], data[1]])
    short = len(data[0]["input_ids"])
    assert batch["attention_mask"].sum(1).tolist() == [short, len(data[1]["input_ids"])]
    assert batch["labels"][0, short:].eq(IGNORE_INDEX).all()
    assert batch["images"].shape == (2, 3, 32, 32)
    assert batch["images"][1].equal(data[1]["image"])
    assert batch["image_sizes"] == [(40, 20), (20, 30)]


def equal(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) if torch.is_tensor(one[name]) else one[name] == other[name] for name in one
    )


def test_samples_and_batches_go_to_processes_that_are_not_forked(folder, tokenizer):
    """``spawn`` and ``forkserver`` send a worker all it needs."""
    data = build([row(1), row(2, "b.png")], folder, tokenizer).add(text_queries=torch.ones(2, 3))
    collate = DataCollatorForSupervisedDataset(tokenizer, hold_queries=True)
    sent, sent_collate = pickle.loads(pickle.dumps((data, collate)))
    one, other = collate([data[0], data[1]]), pickle.loads(pickle.dumps(sent_collate([sent[0], sent[1]])))
    assert torch.equal(one.pop("text_query").tensor, other.pop("text_query").tensor) and equal(one, other)


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_of_every_start_method_give_the_same_batches(method, folder, tokenizer):
    data = build([row(1), row(2, "b.png"), row(3, None)], folder, tokenizer)
    collate = DataCollatorForSupervisedDataset(tokenizer)
    more = {"num_workers": 1, "multiprocessing_context": method}
    found = list(torch.utils.data.DataLoader(data, 2, collate_fn=collate, **more))
    here = [collate([data[0], data[1]]), collate([data[2]])]
    assert len(found) == 2 and all(equal(one, other) for one, other in zip(found, here, strict=True))


def test_padding_id_that_is_a_real_token_stays_visible(folder, tokenizer):
    data = build([row(1), row(2, answer="a long answer of many words")], folder, tokenizer)
    shared = SimpleNamespace(pad_token_id=tokenizer.eos_token_id)
    batch = DataCollatorForSupervisedDataset(shared)([data[0], data[1]])
    length = len(data[0]["input_ids"])
    assert batch["input_ids"][0, length - 1] == tokenizer.eos_token_id
    assert batch["attention_mask"][0, length - 1] and not batch["attention_mask"][0, length]


def test_text_only_row_does_not_shift_its_neighbours(folder, tokenizer):
    data = build([row(1), row(2, None), row(3, "b.png")], folder, tokenizer)
    batch = DataCollatorForSupervisedDataset(tokenizer)([data[0], data[1], data[2]])
    assert batch["images"][1] is None and batch["image_sizes"] == [(40, 20), None, (20, 30)]
    assert batch["images"][2].equal(data[2]["image"])
    assert [int((ids == IMAGE_TOKEN_INDEX).sum()) for ids in batch["input_ids"]] == [1, 0, 1]


def pair(number, text="Is it worse?", images=("a.png", "b.png")):
    return parse_row({"question_id": number, "text": text, "gpt4_answer": "yes", "image": list(images)})


def test_a_row_with_two_pictures_has_a_list_of_them_beside_its_neighbours(folder, tokenizer):
    data = build([pair(1), row(2, None), row(3, "b.png")], folder, tokenizer)
    samples = [data[index] for index in range(3)]
    assert [tuple(image.shape) for image in samples[0]["image"]] == [(3, 32, 32)] * 2
    assert samples[0]["image"][1].equal(samples[2]["image"]) and samples[0]["image_size"] == [(40, 20), (20, 30)]
    batch = DataCollatorForSupervisedDataset(tokenizer)(samples)
    assert [int((ids == IMAGE_TOKEN_INDEX).sum()) for ids in batch["input_ids"]] == [2, 0, 1]
    assert batch["image_sizes"] == [[(40, 20), (20, 30)], None, (20, 30)]
    assert len(batch["images"][0]) == 2 and batch["images"][1] is None
    assert data.lengths[0] == len(samples[0]["input_ids"]) - 2 + 2 * 16
    assert data.modality_lengths[0] == data.lengths[0]
    features = {name: (torch.full((1, 16, 8), float(place)), (1, 1)) for place, name in enumerate(("a.png", "b.png"))}
    batch = DataCollatorForSupervisedDataset(tokenizer)([data.add(features=features)[index] for index in range(3)])
    assert [[float(one[0, 0, 0]) for one in sample] for sample in batch["image_features"]] == [[0, 1], [], [1]]


def test_pictures_of_turns_that_are_cut_off_are_left_out(folder, tokenizer):
    turns = [("human", "<image> What is this?"), ("gpt", "A rib."), ("human", "And <image>?"), ("gpt", "A lung.")]
    value = {"id": 1, "image": ["a.png", "b.png"]}
    value["conversations"] = [{"from": who, "value": text} for who, text in turns]
    whole = build([parse_row(value)], folder, tokenizer)
    cut = build([parse_row(value)], folder, tokenizer, max_length=whole.lengths[0] - 16)
    assert len(whole[0]["image"]) == 2
    assert cut[0]["input_ids"].eq(IMAGE_TOKEN_INDEX).sum() == 1 and cut[0]["image_size"] == (40, 20)
    asked = whole.encoder.encode(whole.rows[0], answer=False)
    assert [size for _, size in asked.pictures] == [(40, 20)]


def test_any_of_several_missing_pictures_is_named(folder, tokenizer):
    with pytest.raises(UserError, match="row 4: image file not found: .*gone.png"):
        build([pair(4, images=("a.png", "gone.png"))], folder, tokenizer)
    with pytest.raises(
        UserError, match="row 4: model_max_length 40 leaves no room for an answer beside 48 image tokens"
    ):
        build([pair(4, images=("a.png", "b.png", "a.png"))], folder, tokenizer, max_length=40)


def test_rows_that_share_a_picture_are_one_group():
    rows = [row(1), row(2, "b.png"), row(3, None), row(4, "c.png"), pair(5, images=("d.png", "e.png"))]
    assert picture_groups(rows) == ["a.png", "b.png", "row 3", "c.png", "d.png"]
    joined = picture_groups([*rows, pair(6, images=("b.png", "c.png")), row(7, "e.png")])
    assert joined == ["a.png", "b.png", "row 3", "b.png", "d.png", "b.png", "d.png"]
    linked = [pair(number, images=(f"{number + 1:03}.png", f"{number:03}.png")) for number in range(300)]
    assert picture_groups(linked) == picture_groups(linked[::-1]) == ["000.png"] * 300


def test_a_system_turn_is_learned_from_and_carries_no_label(folder, tokenizer):
    turns = [{"from": "human", "value": "Normal?"}, {"from": "gpt", "value": "yes"}]
    rows = [{"id": number, "conversations": turns} for number in range(2)]
    rows[1]["conversations"] = [{"from": "system", "value": "You are a radiologist."}, *turns]
    own, said = (build([parse_row(value)], folder, tokenizer)[0] for value in rows)
    assert "You are a radiologist." in tokenizer.decode(said["input_ids"])
    learned = [sample["labels"][sample["labels"] != IGNORE_INDEX].tolist() for sample in (own, said)]
    assert learned[0] == learned[1]
    encoder = PromptEncoder(Prompt("mistral_instruct"), tokenizer, PROCESSOR, CONFIG, folder)
    with pytest.raises(UserError, match="row 1: template 'mistral_instruct' has no place for a system turn"):
        TrainingSamples([parse_row(rows[1])], encoder)


def test_anyres_pictures_keep_their_tiles(folder, tokenizer):
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=[[64, 32], [32, 64], [64, 64]])
    data = build([row(1), row(2, "b.png")], folder, tokenizer, config=config)
    batch = DataCollatorForSupervisedDataset(tokenizer)([data[0], data[1]])
    assert [tuple(image.shape) for image in batch["images"]] == [(3, 3, 32, 32), (3, 3, 32, 32)]
    assert isinstance(batch["images"], list)


@pytest.mark.parametrize("image", ["a.png", None])
@pytest.mark.parametrize("suffix", ["", "Answer the question using a single word or phrase."])
def test_training_prompt_is_the_evaluation_prompt(image, suffix, folder, tokenizer):
    untidy = row(1, image, question="  Is there a fracture? ")
    sample = build([untidy], folder, tokenizer, answer_suffix=suffix)[0]
    asked = f"{untidy.question}\n{suffix}" if suffix else untidy.question
    prompt = prompt_ids(asked, tokenizer, "v1", has_image=image is not None)
    assert sample["input_ids"][: len(prompt)].tolist() == prompt
    assert sample["labels"][: len(prompt)].eq(IGNORE_INDEX).all()
    assert sample["labels"][len(prompt) :].ne(IGNORE_INDEX).all()


def test_given_features_replace_the_pictures(folder, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "load_image", lambda path: pytest.fail(f"opened {path}"))
    features = {"a.png": (torch.ones(1, 16, 8), (40, 20))}
    data = build([row(1), row(2, None)], folder, tokenizer).add(features=features)
    batch = DataCollatorForSupervisedDataset(tokenizer)([data[0], data[1]])
    assert batch["image_features"][0][0].shape == (1, 16, 8) and batch["image_features"][1] == []
    assert "images" not in batch and batch["image_sizes"] == [(40, 20), None]


def test_text_queries_travel_with_their_rows(folder, tokenizer):
    data = build([row(1), row(2, None)], folder, tokenizer).add(torch.eye(2, 5))
    batch = DataCollatorForSupervisedDataset(tokenizer)([data[1], data[0]])
    assert batch["text_query"].equal(torch.eye(2, 5).flip(0))
    with pytest.raises(UserError, match="1 text queries for 2 rows"):
        build([row(1), row(2)], folder, tokenizer).add(torch.eye(1, 5))


def test_one_picture_is_opened_once(folder, tokenizer, monkeypatch):
    opened = []
    monkeypatch.setattr(module, "load_image", lambda path: opened.append(path.name) or Image.open(path).convert("RGB"))
    data = build([row(number) for number in range(4)], folder, tokenizer)
    assert all(data[index]["image"].equal(data[0]["image"]) for index in range(4))
    assert opened == ["a.png"]


def test_cache_stays_within_its_bytes(folder, tokenizer):
    data = build([row(1), row(2, "b.png")], folder, tokenizer, cache_megabytes=0)
    assert data[0]["image"] is not None and data[1]["image"] is not None
    assert data.encoder.pictures.used == 0 and not data.encoder.pictures.entries


def test_missing_picture_is_named_before_training(folder, tokenizer):
    with pytest.raises(UserError, match=r"row 7: image file not found: .*gone.png; 2 files are missing in all"):
        build([row(1), row(7, "gone.png"), row(8, "far.png")], folder, tokenizer)


def test_missing_folder_and_missing_flag_are_named(folder, tokenizer):
    with pytest.raises(UserError, match="image folder not found"):
        build([row(1)], folder / "nowhere", tokenizer)
    with pytest.raises(UserError, match="give --image_folder"):
        build([row(1)], None, tokenizer)
    assert len(build([row(1, None)], None, tokenizer)) == 1


def test_broken_picture_names_row_and_file(folder, tokenizer):
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:40])
    with pytest.raises(UserError, match=r"row 'q-1': image file cannot be read: .*cut.png"):
        build([row("q-1", "cut.png")], folder, tokenizer)[0]


def test_text_that_does_not_fit_its_picture_names_the_row(folder, tokenizer):
    bad = row(5, None)
    object.__setattr__(bad, "conversations", (("human", "Where?\n<image>"), ("gpt", "lung")))
    with pytest.raises(UserError, match="row 5: the text holds <image> but there is no image"):
        build([row(1), bad], folder, tokenizer)


def test_second_mark_for_one_picture_names_the_row(folder, tokenizer):
    bad = row(6)
    object.__setattr__(bad, "conversations", (("human", "<image> or <image>?"), ("gpt", "left")))
    with pytest.raises(UserError, match="row 6: .*2 times <image> for one image"):
        build([bad], folder, tokenizer)


def test_a_few_rows_without_answer_are_reported_many_stop_the_run(folder, tokenizer, capsys):
    rows = [row(number, None) for number in range(100)]
    rows[42] = row(42, None, answer="")
    assert build(rows, folder, tokenizer).unlabelled == 1
    assert "1 of 100 rows have no answer to learn from (row 42)" in capsys.readouterr().out
    rows[43] = row(43, None, answer="")
    with pytest.raises(UserError, match=r"2 of 100 rows have no answer .*row 42, 43.*at most 1%"):
        build(rows, folder, tokenizer)


def test_no_rows_are_refused(folder, tokenizer):
    with pytest.raises(UserError, match="holds no rows"):
        build([], folder, tokenizer)


def test_long_rows_are_cut_to_the_limit_with_the_answer_kept(folder, tokenizer):
    data = build([row(1, question="left right " * 60)], folder, tokenizer, max_length=90)
    sample = data[0]
    assert expanded_length(sample["input_ids"].tolist(), 16) == 90 == data.lengths[0]
    kept = sample["labels"][sample["labels"] != IGNORE_INDEX]
    assert tokenizer.decode(kept).strip() == "yes</s>"


def test_limit_below_the_picture_names_the_row(folder, tokenizer):
    with pytest.raises(UserError, match="row 1: model_max_length 16 leaves no room"):
        build([row(1)], folder, tokenizer, max_length=16)


def test_lengths_tell_text_only_rows_by_their_sign(folder, tokenizer):
    data = build([row(1), row(2, None)], folder, tokenizer)
    assert data.modality_lengths == [data.lengths[0], -data.lengths[1]]
    assert data.lengths[0] == len(data[0]["input_ids"]) - 1 + 16


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, 4),
        ({"vision_config": {"image_size": 336, "patch_size": 14}}, 576),
        ({"vision_config": {"image_size": 336, "patch_size": 14}, "mm_vision_select_feature": "cls_patch"}, 577),
        (
            {
                "vision_config": {"image_size": 336, "patch_size": 14},
                "image_aspect_ratio": "anyres",
                "image_grid_pinpoints": "[[336, 672], [672, 672]]",
            },
            576 * 5 + 48,
        ),
        ({}, 1),
    ],
)
def test_features_a_picture_becomes(config, tokens):
    assert image_token_count(SimpleNamespace(**config), PROCESSOR, config.get("image_aspect_ratio", "square")) == tokens
