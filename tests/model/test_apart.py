"""Turns that are kept apart: the loss and the gradients of as many rows of their own; and the loss of answers alone."""

from __future__ import annotations

import pytest
import tiny_llava
import torch

from llava.constants import IGNORE_INDEX
from llava.data.prompt import Prompt, PromptEncoder
from llava.data.rows import parse_row
from llava.data.samples import DataCollatorForSupervisedDataset, TrainingSamples
from llava.model.answer_loss import answer_loss
from llava.model.apart import spread, who_sees_whom
from llava.model.builder import load_pretrained_model

TALKS = [
    [("is there a lesion", "yes"), ("what side", "left"), ("where is the image of", "chest and abdomen")],
    [("what lung", "no"), ("is there a lesion in the head", "right right")],
    [("left", "right")],
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("apart")
    base = tiny_llava.write_base(folder / "llava-base")
    tiny_llava.write_images(folder, ["a.png", "b.png", "c.png"])
    tokenizer, model, processor, _ = load_pretrained_model(str(base), None, "llava-base", device="cpu")
    return folder, tokenizer, model.double(), processor


def talk(number, pairs, image):
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)]
    return parse_row({"id": str(number), "conversations": turns} | ({"image": image} if image else {}))


def batch_of(world, rows, apart, **fields):
    folder, tokenizer, model, processor = world
    encoder = PromptEncoder(Prompt("v1", aspect_ratio="pad", **fields), tokenizer, processor, model.config, folder)
    data = TrainingSamples(rows, encoder, apart)
    return DataCollatorForSupervisedDataset(tokenizer)([data[place] for place in range(len(data))])


def loss_and_gradient(model, batch, **more):
    model.zero_grad()
    loss = model(**{**batch, "images": batch["images"].double()}, **more).loss
    loss.backward()
    return loss.item(), model.get_model().layers[0].self_attn.q_proj.weight.grad.clone()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("answers_only", [False, True])
def test_turns_apart_are_rows_of_their_own(world, attention, answers_only):
    model = world[2]
    model.set_attn_implementation(attention)
    names = ["a.png", "b.png", "c.png"]
    packed = [talk(number, pairs, name) for number, (pairs, name) in enumerate(zip(TALKS, names, strict=True))]
    single = [
        talk(f"{name}{n}", [pair], name)
        for pairs, name in zip(TALKS, names, strict=True)
        for n, pair in enumerate(pairs)
    ]
    mine = loss_and_gradient(model, batch_of(world, packed, True), answers_only=answers_only)
    theirs = loss_and_gradient(model, batch_of(world, single, False))
    assert mine[0] == pytest.approx(theirs[0], rel=1e-5)
    assert torch.allclose(mine[1], theirs[1], rtol=1e-4, atol=1e-6)
    together = loss_and_gradient(model, batch_of(world, packed, False))
    assert abs(together[0] - theirs[0]) > 1e-4  # later turns see the earlier ones


def test_turns_that_do_not_fit_are_left_out(world):
    row = talk(1, TALKS[0], "a.png")
    whole = batch_of(world, [row], True)["segments"]
    least = len(batch_of(world, [talk(1, TALKS[0][:2], "a.png")], True)["input_ids"][0]) + 3  # a picture is 4 positions
    cut = batch_of(world, [row], True, max_length=least)["segments"]
    assert whole.max() == 3 and cut.max() == 2


def test_a_row_with_several_pictures_stays_as_it_is(world):
    turns = [{"from": "human", "value": "<image>\n<image>\nwhat side"}, {"from": "gpt", "value": "left"}] * 1
    turns += [{"from": "human", "value": "is there a lesion"}, {"from": "gpt", "value": "no"}]
    row = parse_row({"id": "1", "image": ["a.png", "b.png"], "conversations": turns})
    assert batch_of(world, [row], True)["segments"].eq(0).all()


def test_who_sees_whom_by_hand():
    seen, positions = who_sees_whom(torch.tensor([[0, 0, 1, 1, 2, -1]]))
    rows = ["100000", "110000", "111000", "111100", "110010", "110001"]
    assert ["".join(str(int(one)) for one in row) for row in seen[0, 0]] == rows
    assert positions[0, :5].tolist() == [0, 1, 2, 3, 2]


def test_rows_that_were_cut_are_refused():
    ids, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3)
    with pytest.raises(ValueError, match="must fit"):
        spread(torch.tensor([[0, 1, 1]]), ids, mask, [[]], 2)


def test_loss_of_the_answers_alone_equals_the_loss_of_all_positions(world):
    model = world[2]
    batch = batch_of(world, [talk(1, TALKS[0], "a.png"), talk(2, TALKS[1], "b.png")], False)
    for items in ({}, {"num_items_in_batch": torch.tensor(7)}):
        mine = loss_and_gradient(model, batch, answers_only=True, **items)
        theirs = loss_and_gradient(model, batch, **items)
        assert mine[0] == pytest.approx(theirs[0], rel=1e-6) and torch.allclose(mine[1], theirs[1], atol=1e-7)


def test_a_batch_without_answers_has_the_loss_0():
    head = torch.nn.Linear(4, 5)
    loss, logits = answer_loss(head, torch.randn(2, 3, 4), torch.full((2, 3), IGNORE_INDEX))
    assert loss.item() == 0 and logits.shape == (0, 5)
