"""Naming, the alignment without a decoder: what it reads, what changes, and that it is gone on with."""

import json

import pytest
import torch
from tiny_parts import stage_words, write_parts
from tiny_world import arguments

from llava.checkpoints.weights import load_bin
from llava.data.rows import parse_row, read_rows
from llava.model.builder import load_base, load_pretrained_model
from llava.model.naming import UNKNOWN
from llava.train.naming import truths, words_of
from llava.train.train import train
from llava.utils import UserError

PLAIN = ("--version", "plain", "--tune_mm_mlp_adapter", "True", "--method", "naming")


def row(words, number=0):
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a caption"}]
    return parse_row({"id": number, "image": "a.png", "conversations": turns, "words": words}, "here")


def named(parts, file="words.json"):
    """Rows whose pictures are left or right by their number."""
    rows = json.loads((parts / "align.json").read_text())
    for number, each in enumerate(rows):
        each["words"] = {"left": number % 2 == 0, "right": number % 2 == 1, "always": True}
    (parts / file).write_text(json.dumps(rows))
    return file


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    named(folder)
    return folder


def run(parts, stage, *more):
    with arguments(stage_words(parts, stage, "words.json", *PLAIN, *more)):
        train()
    return stage


def test_a_word_is_learned_where_it_is_true_of_some_and_false_of_others():
    rows = [row({"liver": True, "ct": True}), row({"liver": False, "ct": True, "spleen": True}), row({"spleen": False})]
    assert words_of(rows) == ["liver", "spleen"]
    assert truths(rows[1], ["liver", "spleen"]).tolist() == [0, 1]
    assert truths(rows[2], ["liver", "spleen"]).tolist() == [UNKNOWN, 0]


@pytest.mark.parametrize(
    "words, message",
    [
        (["liver"], "row 7: 'words' is a list"),
        ({"liver": "yes"}, "row 7: 'words' says 'yes' of 'liver'"),
        ({" ": True}, "row 7: 'words' says True of ' '"),
        ({"liver": True}, "no word is true of one picture and false of another"),
        ({}, "no word is true of one picture and false of another"),
    ],
)
def test_words_that_cannot_be_learned_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        words_of([row(words, 7)])


def test_words_held_out_are_looked_at_too():
    with pytest.raises(UserError, match="row 7: 'words' says 'yes' of 'liver'"):
        truths(row({"liver": "yes"}, 7), ["liver"])


def test_the_projector_alone_changes_and_learns_the_words(parts, tmp_path):
    stage = run(parts, tmp_path / "llava-named", "--max_steps", 60, "--learning_rate", "1e-2")
    log = json.loads((stage / "log_history.json").read_text())
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    saved = load_bin(stage / "mm_projector.bin")
    _, model, *_ = load_pretrained_model(str(stage), str(parts / "vicuna"), device="cpu")
    found, lm = model.state_dict(), load_base(parts / "vicuna")[0].state_dict()
    assert all(torch.equal(found[name], value) for name, value in (lm | saved).items())
    assert set(saved) == {name for name in found if "mm_projector" in name}


def test_the_loss_of_a_step_does_not_depend_on_its_parts(parts, tmp_path):
    """Gradient accumulation: the mean of two halves, which here hold as many known words."""
    whole = run(parts, tmp_path / "llava-whole", "--max_steps", 1, "--logging_steps", 1)
    words = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2)
    halves = run(parts, tmp_path / "llava-halves", "--max_steps", 1, "--logging_steps", 1, *words)
    first, second = (load_bin(stage / "mm_projector.bin") for stage in (whole, halves))
    loss = [json.loads((stage / "log_history.json").read_text())[0]["loss"] for stage in (whole, halves)]
    assert float(loss[0]) == pytest.approx(float(loss[1]), rel=1e-4)
    assert all(torch.allclose(value, second[name], atol=1e-4) for name, value in first.items())


def test_a_run_that_was_stopped_goes_on_to_the_same_projector(parts, tmp_path, monkeypatch):
    words = ("--max_steps", 6, "--save_strategy", "steps", "--save_steps", 2)
    whole = run(parts, tmp_path / "llava-whole", *words)
    from llava.train import llava_trainer

    def stop(folder, mark=llava_trainer.mark_complete):
        mark(folder)
        if folder.name.endswith("-4"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llava_trainer, "mark_complete", stop)
        with pytest.raises(KeyboardInterrupt):
            run(parts, tmp_path / "llava-again", *words)
    again = run(parts, tmp_path / "llava-again", *words)
    assert (again / "mm_projector.bin").read_bytes() == (whole / "mm_projector.bin").read_bytes()


def test_rows_are_read_with_their_words(parts):
    assert read_rows(parts / "words.json")[1].raw["words"] == {"left": False, "right": True, "always": True}
