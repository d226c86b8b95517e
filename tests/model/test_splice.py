"""The splice: a prompt that is longer than the model's window is cut as in training, and keeps its end."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llava import FAMILIES, make_tokenizer, write_base, write_images, write_stage

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.labels import conversation_ids, prompt_ids, truncate
from llava.eval.model_vqa_loader import main
from llava.model.builder import load_pretrained_model
from llava.model.splice import splice
from llava.utils import UserError

LONG = "is there a lesion in the image of the chest " * 14
WINDOW = 160
PATCHES = 4


def embed(ids):
    """Ids as their own embeddings ``[tokens, 1]``."""
    return ids[:, None].float()


def picture(number, length=PATCHES):
    return torch.full((length, 1), -float(number))


def spliced(ids, limit, labels=None, pictures=1, **more):
    labels = None if labels is None else torch.tensor([labels])
    features = [[picture(number + 1) for number in range(pictures)]]
    return splice(embed, torch.tensor([ids]), None, labels, features, limit=limit, **more)


def expanded(ids):
    """What the splice makes of ids with their first picture as number 1."""
    counter = iter(range(1, 9))
    return [value for token in ids for value in ([-next(counter)] * PATCHES if token == IMAGE_TOKEN_INDEX else [token])]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 60), st.integers(1, 30), st.integers(0, 40), st.integers(12, 80))
def test_a_row_loses_what_it_would_lose_in_training(question, answer, later, limit):
    ids = [1, IMAGE_TOKEN_INDEX, *range(100, 100 + question), *range(300, 300 + answer), *range(500, 500 + later)]
    labels = [token if 300 <= token < 500 else IGNORE_INDEX for token in ids]
    try:
        wanted, wanted_labels = truncate(ids, labels, limit, PATCHES)
    except UserError:
        with pytest.raises(UserError, match=rf"row 0 .* 4 positions leave no room .* window of {limit}"):
            spliced(ids, limit, labels)
        return
    found = spliced(ids, limit, labels)
    assert found.embeds[0, :, 0].tolist() == expanded(wanted) and found.cut == [len(ids) - len(wanted)]
    assert [label for label in found.labels[0].tolist() if label != IGNORE_INDEX] == [
        label for label in wanted_labels if label != IGNORE_INDEX
    ]


@pytest.mark.parametrize("limit", [30, 60, 200])
def test_a_prompt_keeps_the_tokens_it_has_in_training_and_the_answers_mark(limit):
    tokenizer = make_tokenizer()
    ids = prompt_ids(LONG, tokenizer, "vicuna_v1", True)
    whole, labels = conversation_ids([("human", LONG), ("gpt", "no")], tokenizer, "vicuna_v1", True)
    reply = sum(label != IGNORE_INDEX for label in labels)
    trained, trained_labels = truncate(whole, labels, limit + reply, PATCHES)
    prompt = [token for token, label in zip(trained, trained_labels, strict=True) if label == IGNORE_INDEX]
    found = spliced(ids, limit)
    assert found.embeds[0, :, 0].tolist() == expanded(prompt) and found.embeds.shape[1] == min(limit, len(ids) + 3)
    assert found.embeds[0, -8:, 0].tolist() == ids[-8:]


def test_each_row_and_its_prefix_have_their_own_room():
    rows = torch.tensor([[1, *range(100, 130)], [1, *range(100, 105), *[0] * 25]])
    mask = torch.tensor([[1] * 31, [1] * 6 + [0] * 25])
    prefix = torch.full((2, 3, 1), 7.0)
    found = splice(embed, rows, mask, None, [[], []], limit=20, prefix=prefix, side="left")
    assert found.mask.sum(1).tolist() == [23, 9] and found.cut == [11, 0]
    assert found.embeds[0, :, 0].tolist() == [7, 7, 7, 1, *range(100, 111), *range(122, 130)]
    assert found.positions[1, -9:].tolist() == list(range(9))


def test_the_picture_of_a_dropped_turn_goes_with_it():
    ids = [1, *range(100, 110), 300, 301, *range(110, 120), IMAGE_TOKEN_INDEX, 302, 303]
    labels = [token if 300 <= token < 400 else IGNORE_INDEX for token in ids]
    found = spliced(ids, 20, labels)
    assert found.embeds[0, :, 0].tolist() == ids[:13]


def test_pictures_that_fill_the_window_are_refused():
    with pytest.raises(UserError, match="row 0 of the batch: pictures of 8 positions leave no room .* window of 9"):
        spliced([1, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX, *range(100, 120)], 9, pictures=2)


# -- in a model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(family, kind) for family in sorted(FAMILIES) for kind in ("base", "stage")])
def place(request, tmp_path_factory):
    """``(model path, base)`` of a base with a small window, and of a stage over it."""
    family, kind = request.param
    folder = tmp_path_factory.mktemp("window")
    base = write_base(folder / "tiny-llava-base", family=family)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tokenizer_model_max_length": WINDOW}))
    return (base if kind == "base" else write_stage(folder / "llava-stage", base)), base


def test_a_long_prompt_keeps_its_end_and_the_cut_is_said_once(place, capsys):
    tokenizer, model, _, _ = load_pretrained_model(str(place[0]), str(place[1]), device="cpu")
    ids = torch.tensor(prompt_ids(LONG, tokenizer, "vicuna_v1", True))
    capsys.readouterr()
    for rows in (1, 2):
        embeds, mask, *_ = model._splice(ids.expand(rows, -1), None, None, [[torch.zeros(PATCHES, 32)]] * rows)
        assert embeds.shape[:2] == mask.shape == (rows, WINDOW)
        assert torch.equal(embeds[0, -3:], model.get_input_embeddings()(ids[-3:]))
    assert model.prompts_cut == 3
    said = capsys.readouterr().out
    cut = len(ids) - 1 + PATCHES - WINDOW
    assert said.count("longer than the model's window of 160 positions") == 1 and f"; {cut} tokens are cut" in said


def test_the_evaluation_says_how_many_prompts_were_cut(place, tmp_path, capsys):
    write_images(tmp_path / "images", ["a.png"])
    rows = [{"question_id": n, "image": "a.png", "text": f"{text}?\n<image>"} for n, text in enumerate([LONG, "left"])]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "question_id": 2}]))
    words = {"--model-path": place[0], "--model-base": place[1], "--question-file": tmp_path / "q.jsonl"}
    words |= {"--image-folder": tmp_path / "images", "--answers-file": tmp_path / "a.jsonl", "--device": "cpu"}
    words |= {"--max_new_tokens": 2}
    main([str(word) for pair in words.items() for word in pair])
    said = capsys.readouterr().out
    assert said.count("longer than the model's window") == 1 and "2 prompts were cut to the model's window" in said
